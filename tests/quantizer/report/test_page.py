"""The report page and its charts, and the TAESD decoder it reads."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from ternary_flux.benchmarks import comfyui
from ternary_flux.quantizer import cli
from ternary_flux.quantizer.files.architecture import Architecture
from ternary_flux.quantizer.model.flux import Flux
from ternary_flux.quantizer.pictures import conditioning
from ternary_flux.quantizer.report import charts
from ternary_flux.quantizer.report.decoders import preview, taesd_decoder

ARCH = Architecture(1, 128, 1, 1, 16, 16, context_dim=32, vec_dim=24, guidance=False)


def taesd(width=8):
    comfyui.make_importable()
    from comfy.taesd.taesd import TAESD

    torch.manual_seed(0)
    return TAESD(latent_channels=16).taesd_decoder


def test_a_page_with_everything(tmp_path, capsys):
    generator = torch.Generator().manual_seed(0)
    state = {name: 0.08 * torch.randn(p.shape, generator=generator) for name, p in Flux(ARCH).named_parameters()}
    save_file(state, tmp_path / "tiny.safetensors")
    context, pooled = torch.randn(20, 5, 32, generator=generator), torch.randn(20, 24, generator=generator)
    conditioning.write(tmp_path / "cond.safetensors", [f"<prompt> {i}" for i in range(20)], context, pooled)
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
    names = {"pictures", "velocity", "divergence", "weights-my-round"}
    assert {path.stem for path in (tmp_path / "page").glob("*.png")} == names
    for name in names:
        with Image.open(tmp_path / "page" / f"{name}.png") as image:
            assert min(image.size) > 100 and len(image.convert("RGB").getcolors(1 << 24)) > 5


def test_the_decoder_equals_comfyuis(tmp_path):
    theirs = taesd()
    state = {f"taesd_decoder.{name}": value for name, value in theirs.state_dict().items()}
    save_file(state, tmp_path / "vae.safetensors")
    latents = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(latents).clamp(0, 1).movedim(1, -1).numpy()
    np.testing.assert_allclose(taesd_decoder(tmp_path / "vae.safetensors")(latents), expected, atol=1e-5)


def test_other_vaes_are_refused(tmp_path):
    save_file({"decoder.conv_in.weight": torch.zeros(1)}, tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match="TAESD"):
        taesd_decoder(tmp_path / "vae.safetensors")


def test_previews_are_colours():
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    colours = preview(latents)(latents)
    assert colours.shape == (2, 8, 8, 3) and colours.min() >= 0 and colours.max() <= 1 and colours.std() > 0.05


def test_files_are_asked_for(tmp_path, capsys):
    arguments = ["report", "-o", tmp_path, "--teacher", tmp_path / "a", "--conditioning", tmp_path / "b"]
    assert cli.run([str(x) for x in arguments]) == 2
    assert "NAME=FILE" in capsys.readouterr().err


@pytest.mark.parametrize("values", [[0.01, 1.7], [0.02, 0.021], [0.0, 0.0], [5.0]])
@pytest.mark.parametrize("log", [False, True])
def test_lines_of_any_range(values, log):
    image = charts.lines("title", "t", {"a": list(enumerate(values)), "b": []}, log)
    assert image.size == (560, 340)


def test_long_headings_are_wrapped():
    heading = "a red circle and a blue square"
    lines = charts.wrap(heading, 80)
    assert len(lines) > 1 and " ".join(lines) == heading
    assert all(charts.text_width(line, 11) <= 80 for line in lines)
    assert charts.wrap("", 80) == [""]


def test_heatmap_of_equal_and_missing_values():
    image = charts.heatmap("title", ["a", "b"], ["x", "y"], [[1.0, None], [1.0, 1.0]])
    assert image.width > 100
