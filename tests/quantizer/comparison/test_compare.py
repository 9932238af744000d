"""`compare` in the real ComfyUI: the miniature beside its ternary file, and a small FLUX from prompts as text."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from ternary_flux.benchmarks import comfyui, miniature
from ternary_flux.benchmarks.scorers import folder
from ternary_flux.quantizer import cli, console
from ternary_flux.quantizer.comparison import run as comparison
from ternary_flux.quantizer.comparison import scores
from ternary_flux.quantizer.comparison.gallery import PAGE
from ternary_flux.quantizer.files.architecture import Architecture
from ternary_flux.quantizer.files.ternary import open_ternary
from ternary_flux.quantizer.model.student import load_student
from ternary_flux.quantizer.pictures import conditioning
from ternary_flux.quantizer.pictures.sampler import noise_levels
from ternary_flux.quantizer.rounding.round import round_checkpoint
from ternary_flux.tests import builders
from ternary_flux.tests.quantizer.pictures import narrow

PROMPTS = ["a red circle and a blue square", "a ring", "three green crosses"]
SHOWN = [PROMPTS[0], '<script>alert("a & b")</script>', PROMPTS[2]]  # what the file calls them
STEPS = 3


@pytest.fixture(scope="module", autouse=True)
def found_comfyui():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMFYUI_PATH", str(comfyui.make_importable()))
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    miniature.write_stock_autoencoder(folder / "vae.safetensors")
    conditioning.write(folder / "cond.safetensors", SHOWN, *miniature.encode_prompts(PROMPTS))
    return folder


def compare(files, folder, *more, ternary=miniature.TERNARY, original=miniature.TRANSFORMER):
    fixed = ["--prompts", files / "cond.safetensors", "--vae", files / "vae.safetensors", "--size", "64x64"]
    fixed += ["--sampler-steps", STEPS, "--seeds", 2, "--seed", 7, "-o", folder]
    return cli.run([str(x) for x in ("compare", original, ternary, *fixed, *more)])


@pytest.fixture(scope="module")
def done(files, tmp_path_factory):
    """A comparison that was interrupted while the ternary model painted, and gone on with."""
    folder, show = tmp_path_factory.mktemp("comparison") / "page", console.Bars.show

    def interrupting(self, what, done, total):
        show(self, what, done, total)
        if what == "pictures of the ternary model" and done == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console.Bars, "show", interrupting)
        assert compare(files, folder) == cli.INTERRUPTED
    assert not (folder / PAGE).exists()
    painted = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    assert len(painted) == 6 + 3 + 2
    assert compare(files, folder) == 0
    assert all(path.stat().st_mtime_ns == time for path, time in painted.items())
    return folder


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(float)


@pytest.mark.slow
def test_pictures_are_those_of_ksampler(files, done):
    import comfy.sample
    import comfy.sd
    from ternary_flux.quantizer.files.checkpoint import open_checkpoint
    from ternary_flux.quantizer.report.decoders import load_vae

    model = comfy.sd.load_diffusion_model(str(miniature.TRANSFORMER))
    vae = load_vae(files / "vae.safetensors", open_checkpoint(miniature.TRANSFORMER).architecture)
    context, pooled = conditioning.read(files / "cond.safetensors").batch([2])
    positive, empty = [[context, {"pooled_output": pooled}]], torch.zeros(1, *miniature.LATENT_SHAPE)
    noise = comfy.sample.prepare_noise(empty, 8)
    with torch.inference_mode():
        latent = comfy.sample.sample(
            model, noise, STEPS, 1.0, "euler", "simple", positive, positive, empty, seed=8, disable_pbar=True
        )
        expected = 255 * vae.decode(latent)[0].numpy()
    found = pixels(done / "original" / "00002" / "samples" / "0001.png")
    assert found.std() > 10 and abs(found - np.clip(expected, 0, 255)).max() <= 1.5


@pytest.mark.slow
def test_velocity_errors_are_those_of_the_quantizer(done):
    """The same states through the quantizer's own FLUX, teacher and student."""
    teacher, student = miniature.load_transformer(), load_student(open_ternary(miniature.TERNARY)).requires_grad_(False)
    context, pooled = miniature.encode_prompts(PROMPTS)
    error = power = torch.zeros(STEPS)
    noise = torch.randn(1, *miniature.LATENT_SHAPE, generator=torch.Generator().manual_seed(7))
    latent, levels = noise.expand(3, -1, -1, -1), noise_levels(STEPS, 0.0)
    for step, (now, after) in enumerate(zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True)):
        t, place = torch.full((3,), now), torch.arange(STEPS) == step
        with torch.no_grad():
            theirs, ours = (model(latent, t, context, pooled) for model in (teacher, student))
        error, power = error + place * (ours - theirs).square().sum(), power + place * theirs.square().sum()
        latent = latent + (after - now) * theirs
    rows = read(done / "summary.json")["steps"]["ternary"]
    assert [row["sigma"] for row in rows] == pytest.approx(levels[:-1].tolist(), abs=1e-3)
    assert [row["error"] for row in rows] == pytest.approx((error / power).tolist(), rel=0.1)
    assert all(0.5 < row["response"] < 1.5 and 0.5 < row["detail"] < 1.5 for row in rows)


@pytest.mark.slow
def test_what_is_written(done):
    """GenEval's folders, maps of prompts to files, metrics, and a page that shows every picture and escapes prompts."""
    rows, summary = read(done / "pictures.json"), read(done / "summary.json")
    assert [(row["number"], row["seed"]) for row in rows] == [(n, seed) for n in range(3) for seed in (7, 8)]
    for model, seeds in (("original", 2), ("ternary", 2), ("again", 1)):
        folders = sorted(path for path in (done / model).iterdir() if path.name.isdigit())
        assert [read(folder / "metadata.jsonl")["prompt"] for folder in folders] == SHOWN
        assert all(len(list((folder / "samples").glob("*.png"))) == seeds for folder in folders)
        assert read(done / f"{model}.json") == {p: f"{model}/{n:05}/samples/0000.png" for n, p in enumerate(SHOWN)}
    page = (done / PAGE).read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;alert(&quot;a &amp; b&quot;)&lt;/script&gt;" in page
    sources = re.findall(r'src="([^"]+)"', page)
    assert len(sources) == len(set(sources)) == 15 and all((done / source).is_file() for source in sources)
    metrics = summary["metrics"]
    assert set(metrics) == {"psnr", "ssim", "detail", "velocity"}  # pictures of 64 pixels are too small for MS-SSIM
    assert metrics["psnr"]["ternary"]["value"] < 50 < metrics["psnr"]["floor"]["value"]
    assert metrics["velocity"]["floor"]["value"] < 1e-6 < metrics["velocity"]["ternary"]["value"] < 0.5
    assert summary["names"]["again"] != summary["about"][1] and "attention" in summary["names"]["again"]
    assert not (done / "work" / "paths").exists()


@pytest.mark.slow
def test_scores_of_other_programs_are_taken_in(files, done, monkeypatch, capsys):
    """What scorers run in writes the file; a finished comparison paints nothing more."""
    monkeypatch.setattr(comparison.painter, "load_original", None)
    judge = "[('ternary' in str(file)) + len(prompt) for file in files]"
    code = f"import folder; folder.main('judge', lambda: lambda prompt, files: {judge})"
    scorers = Path(folder.__file__).parent
    run = subprocess.run([sys.executable, "-c", code, done], cwd=scorers, capture_output=True, text=True)
    assert run.returncode == 0 and "15 pictures" in run.stdout, run.stderr
    assert compare(files, done) == 0
    assert "judge: 1.000; original against itself 0.000" in capsys.readouterr().out
    (done / "scores-judge.json").write_text(json.dumps({"original/00000/samples/0000.png": 1}))
    assert compare(files, done) == 2
    assert "there is no score of ternary/00000/samples/0000.png" in capsys.readouterr().err
    (done / "scores-judge.json").unlink()


@pytest.mark.slow
def test_other_work_is_not_replaced(files, done, tmp_path, capsys):
    assert compare(files, done, "--sampler-steps", 4) == 2
    assert "its steps is 3, not 4; give another folder, or --force" in capsys.readouterr().err
    (tmp_path / "letter.txt").write_text("mine")
    assert compare(files, tmp_path, "--force") == 2
    assert "is not empty, and no comparison" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_mistakes(files, tmp_path, capsys):
    def mistake(*more, **files_):
        assert compare(files, tmp_path / "out", *more, **files_) == 2
        return capsys.readouterr().err

    (tmp_path / "prompts.txt").write_text("a fox")
    assert "--text-encoders" in mistake("--prompts", tmp_path / "prompts.txt")
    assert "is encoded already" in mistake("--text-encoders", "x")
    assert "give one size" in mistake("--size", "64x64,32x32")
    assert "multiples of 16" in mistake("--size", "60x60")
    assert "this is FLUX.1" in mistake(ternary=miniature.TRANSFORMER)
    assert "no such VAE" in mistake("--vae", tmp_path / "none")
    assert "CLIP vision" in mistake("--clip-vision", files / "vae.safetensors")
    builders.write_flux(tmp_path / "other", ARCH)
    assert "give the checkpoint that it was made from" in mistake(original=tmp_path / "other")
    (tmp_path / "page.safetensors").write_text("<!doctype html>")
    assert "page.safetensors: this is a web page" in mistake("--vae", tmp_path / "page.safetensors")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").touch()
    assert "is a file; give the name of a folder" in mistake()
    (tmp_path / "out").unlink()
    said = mistake("--prompts", tmp_path / "prompts.txt", "--text-encoders", files / "vae.safetensors")
    assert "vae.safetensors" in said and "text encoders" in said
    assert [path for path in (tmp_path / "out").iterdir() if path.name != ".lock"] == []  # others may follow


ARCH = Architecture(1, 128, 1, 1, 16, 16, context_dim=narrow.CONTEXT, vec_dim=narrow.POOLED, guidance=True)


@pytest.mark.slow
def test_from_text(files, tmp_path, capsys):
    """GenEval's metadata, text encoders, guidance, and a picture that is large enough for MS-SSIM."""
    dense, ternary = builders.write_flux(tmp_path / "dense.safetensors", ARCH), tmp_path / "ternary.safetensors"
    round_checkpoint(dense, ternary)
    rows = [{"tag": "single", "include": [{"class": "fox", "count": 1}], "prompt": "a fox"}]
    (tmp_path / "metadata.jsonl").write_text(json.dumps(rows[0]))
    with narrow.encoders(tmp_path) as encoders:
        arguments = ["--prompts", tmp_path / "metadata.jsonl", "--text-encoders", *encoders, "--guidance", 2.5]
        arguments += ["--sampler-steps", 1, "--seeds", 1, "--size", "176x176"]
        assert compare(files, tmp_path / "out", *arguments, original=dense, ternary=ternary) == 0
    assert read(tmp_path / "out" / "ternary" / "00000" / "metadata.jsonl") == rows[0]
    summary = read(tmp_path / "out" / "summary.json")
    assert "MS-SSIM" in capsys.readouterr().out and "ms_ssim" in summary["metrics"]
    assert summary["steps"]["ternary"][0]["response"] is None  # there is no other prompt


def test_image_embeddings(tmp_path):
    """ComfyUI's CLIP vision class, small."""
    import comfy.clip_vision

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    shape = {"image_size": 28, "patch_size": 14, "num_channels": 3, "projection_dim": 16}
    encoder = comfy.clip_vision.ClipVisionModel(
        {**sizes, **shape, "hidden_act": "quick_gelu", "model_type": "clip_vision_model"}
    )
    encoder.load_sd({name: 0.3 * torch.randn(value.shape) for name, value in encoder.get_sd().items()})
    one, other = torch.rand(2, 3, 40, 40).unbind()
    embed = scores.embedder(encoder)
    assert embed(one).shape == (16,)
    assert scores.pair(one, one, embed)["cosine"] == pytest.approx(1, abs=1e-5)
    assert scores.pair(one, other, embed)["cosine"] < 0.999
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="does not know this CLIP vision model"):
        scores.image_embedder(tmp_path / "x.safetensors")
