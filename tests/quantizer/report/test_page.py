"""The report page, its charts, and the pictures in it."""

import importlib.util
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from ternary_flux.benchmarks import comfyui, miniature
from ternary_flux.quantizer import cli
from ternary_flux.quantizer.files.architecture import Architecture
from ternary_flux.quantizer.report import charts
from ternary_flux.quantizer.report.decoders import preview, vae_decoder
from ternary_flux.tests import builders

ARCH = Architecture(1, 128, 1, 1, 16, 16, context_dim=32, vec_dim=24, guidance=False)


@pytest.mark.slow
def test_a_page_with_everything(tmp_path, capsys):
    builders.write_flux(tmp_path / "tiny.safetensors", ARCH)
    builders.write_conditioning(tmp_path / "cond.safetensors", ARCH)
    dense, rounded = tmp_path / "tiny.safetensors", tmp_path / "rounded.safetensors"
    assert cli.run(["round", str(dense), "-o", str(rounded)]) == 0
    fixed = ["--teacher", dense, "--conditioning", tmp_path / "cond.safetensors", "--size", "64x64", "--held-out", 2]
    arguments = [
        "report",
        f"my round={rounded}",
        "-o",
        tmp_path / "page",
        *fixed,
        "--pictures",
        2,
        "--sampler-steps",
        3,
    ]
    assert cli.run([str(x) for x in arguments]) == 0
    text = (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    assert "my round" in text and "1.58-bit" in text
    assert not re.search(r'(src|href)="(?!data:)', text)  # self-contained
    names = {"pictures", "velocity", "detail", "divergence", "weights-my-round"}
    assert {path.stem for path in (tmp_path / "page").glob("*.png")} == names
    for name in names:
        with Image.open(tmp_path / "page" / f"{name}.png") as image:
            assert min(image.size) > 100 and len(image.convert("RGB").getcolors(1 << 24)) > 5


@pytest.fixture
def vae(tmp_path, monkeypatch):
    """The miniature's VAE, as the file that ComfyUI reads."""
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui.make_importable()))
    miniature.write_stock_autoencoder(tmp_path / "vae.safetensors")
    return tmp_path / "vae.safetensors"


@pytest.mark.slow
def test_pictures_are_those_of_the_vae(vae):
    latents = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    found = vae_decoder(vae, ARCH)(latents)
    assert found.shape == (2, 32, 32, 3) and found.std() > 0.1
    np.testing.assert_allclose(found, miniature.decode(latents), atol=1e-3)


def test_other_files_and_other_vaes_are_refused(tmp_path, vae):
    with pytest.raises(FileNotFoundError, match="no such VAE"):
        vae_decoder(tmp_path / "absent.safetensors", ARCH)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors: ComfyUI cannot load this as a VAE"):
        vae_decoder(tmp_path / "other.safetensors", ARCH)
    with pytest.raises(ValueError, match="16 latent channels, and .* paints 128"):
        vae_decoder(vae, replace(ARCH, version=2))


def test_previews_are_colours():
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    colours = preview(latents)(latents)
    assert colours.shape == (2, 8, 8, 3) and colours.min() >= 0 and colours.max() <= 1 and colours.std() > 0.05


def test_files_are_asked_for(tmp_path, capsys):
    arguments = ["report", "-o", tmp_path, "--teacher", tmp_path / "a", "--conditioning", tmp_path / "b"]
    assert cli.run([str(x) for x in arguments]) == 2
    assert "NAME=FILE" in capsys.readouterr().err


def test_matplotlib_is_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    arguments = ["report", "a=b", "-o", tmp_path, "--teacher", tmp_path / "a", "--conditioning", tmp_path / "b"]
    assert cli.run([str(x) for x in arguments]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize("values", [[0.01, 1.7], [0.02, 0.021], [0.0, 0.0], [5.0]])
@pytest.mark.parametrize("log", [False, True])
def test_lines_show_their_points(values, log):
    drawn = charts.figure()
    axes = drawn.subplots()
    charts.lines(axes, "title", "t", {"costs $1 and $2": list(enumerate(values)), "none": []}, log)
    expected = [(x, y) for x, y in enumerate(values) if y > 0 or not log]
    found = [tuple(point) for line in axes.lines for point in line.get_xydata()]
    assert np.allclose(found, expected) if expected else not found
    assert axes.get_yscale() == ("log" if log else "linear")
    low, high = axes.get_ylim()
    assert all(low <= y <= high for _, y in expected)
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["costs $1 and $2"] if expected else legend is None
    assert charts.png(drawn).startswith(b"\x89PNG")


def test_bars_show_values_and_intervals():
    axes = charts.figure().subplots()
    charts.bars(axes, "title", {"a": (0.5, 0.4, 0.7), "b": (0.25, 0.2, 0.3)}, top=1.0, percent=True)
    assert [bar.get_width() for bar in axes.patches] == [0.5, 0.25]
    (intervals,) = axes.collections
    assert np.allclose([segment[:, 0] for segment in intervals.get_segments()], [[0.4, 0.7], [0.2, 0.3]])
    assert {"50.0 %", "25.0 %"} <= {text.get_text() for text in axes.texts}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"] and axes.yaxis_inverted()


def test_a_heatmap_shows_its_numbers():
    axes = charts.figure().subplots()
    charts.heatmap(axes, "title", rows=["a", "b"], columns=["x", "y"], values=[[1.0, None], [0.25, 0.5]])
    assert {(t.get_position(), t.get_text()) for t in axes.texts} == {
        ((0, 0), "1.000"),
        ((0, 1), "0.250"),
        ((1, 1), "0.500"),
    }
    (image,) = axes.images
    colours = image.to_rgba(image.get_array())[..., :3].sum(-1)
    assert colours[1, 0] == pytest.approx(3) and colours[0, 0] < colours[1, 1] < colours[1, 0]
    assert image.get_array().mask.tolist() == [[False, True], [False, False]]


def test_a_grid_shows_its_pictures():
    drawn = charts.figure(4, 4)
    pictures = [[np.full((2, 2, 3), value) for value in row] for row in ((0.0, 0.5), (1.0, 7.0))]
    heading = "a red circle and a blue square"
    charts.grid(drawn, pictures, ["first", "second"], [heading, "other"])
    shown = [float(axes.images[0].get_array().mean()) for axes in drawn.axes]
    assert shown == [0.0, 0.5, 1.0, 1.0]  # values beyond 1 are white
    title = drawn.axes[0].get_title()
    assert title.count("\n") >= 1 and title.replace("\n", " ") == heading
    assert [axes.get_ylabel() for axes in drawn.axes] == ["first", "", "second", ""]
