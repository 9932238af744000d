"""The parts of Quantize FLUX to Ternary that need no server."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from ternary_flux.benchmarks import miniature
from ternary_flux.quantizer.cli import run
from ternary_flux.quantizer.files.checkpoint import open_checkpoint
from ternary_flux.quantizer.files.ternary import open_ternary
from ternary_flux.quantizer.pictures import conditioning
from ternary_flux.tests import builders
from ternary_flux.tests.nodes import adapters
from ternary_flux.tests.quantizer import synthetic
from ternary_flux.tests.quantizer.pictures import narrow

ROOT = Path(__file__).resolve().parents[2]
NAME = "double_blocks.0.img_attn.proj"


@pytest.fixture(scope="module")
def quantize(comfy):
    from ternary_flux.nodes import quantize

    return quantize


@pytest.fixture
def display(quantize):
    return quantize.Display(None)


@pytest.mark.slow
def test_prompts_are_encoded_by_the_clip_of_the_graph(comfy, quantize, display, tmp_path):
    """The same file as the command `embed` writes with the same text encoders; once for the same prompts."""
    prompts = ["a red fox", "two blue cubes on a table"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    words = quantize._words("\n".join(["", *prompts, " "]), object(), None, "")
    assert words == prompts and len(quantize._words("", object(), None, "")) > 2000
    with narrow.encoders(tmp_path) as paths:
        files = [str(path) for path in paths]
        clip = comfy.sd.load_clip(files, clip_type=comfy.sd.CLIPType.FLUX)
        path = quantize._conditioning(tmp_path, words, clip, None, "", display)
        again, other = (comfy.sd.load_clip(some, clip_type=comfy.sd.CLIPType.FLUX) for some in (files, files[:1]))
        assert quantize._encoders(again) == quantize._encoders(clip) != quantize._encoders(other)
        command = ["embed", "-o", str(tmp_path / "embedded.safetensors"), "--prompts", str(tmp_path / "prompts.txt")]
        assert run([*command, "--text-encoders", *files]) == 0
    written = path.read_bytes()
    ours, theirs = conditioning.read(path), conditioning.read(tmp_path / "embedded.safetensors")
    assert ours.prompts == theirs.prompts == tuple(prompts)
    torch.testing.assert_close(ours.context, theirs.context)
    torch.testing.assert_close(ours.pooled, theirs.pooled)
    assert quantize._conditioning(tmp_path, words, None, None, "", display).read_bytes() == written


def test_conditionings_of_the_graph_become_a_file(quantize, display, tmp_path):
    """Several that were put into one, with and without a pooled vector."""
    for width in (7, None):
        entries = [
            [torch.randn(1, 5, 12), {} if width is None else {"pooled_output": torch.randn(1, width)}] for _ in range(3)
        ]
        folder = tmp_path / str(width)
        folder.mkdir()
        read = conditioning.read(quantize._conditioning(folder, None, None, entries, "", display))
        torch.testing.assert_close(read.context, torch.cat([context for context, _ in entries]).bfloat16())
        assert (read.pooled is None) == (width is None) and len(read.prompts) == 3
    one, other = ([[torch.full((1, 2, 4), value), {}]] for value in (1.0, 2.0))
    assert quantize._words("", None, one, "") != quantize._words("", None, other, "")
    with pytest.raises(ValueError, match="connect clip"):
        quantize._words("a prompt", None, None, "")


def test_a_model_is_written_with_its_lora(comfy, quantize, tmp_path):
    model = comfy.sd.load_diffusion_model(str(miniature.TRANSFORMER))
    original = open_checkpoint(miniature.TRANSFORMER)
    n, k = original.shape(f"{NAME}.weight")
    lora = adapters.bfl_lora(1, shapes={NAME: (n, k)})
    model, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    with quantize._written(model, tmp_path / "mine.safetensors") as path:
        written = open_checkpoint(path)
        assert set(written.names) == set(original.names)
        change = written.tensor(f"{NAME}.weight").float() - original.tensor(f"{NAME}.weight").float()
        other = "double_blocks.1.img_attn.proj.weight"
        assert torch.equal(written.tensor(other), original.tensor(other))
        assert run(["round", str(path), "-o", str(tmp_path / "out.safetensors")]) == 0
    assert open_ternary(tmp_path / "out.safetensors").metadata["modelspec.title"] == "mine (ternary, 1.58-bit)"
    assert torch.linalg.matrix_rank(change, rtol=0.1) < n and change.norm() > 0.01
    assert not path.exists()


def test_a_ternary_model_is_refused(comfy, quantize, tmp_path, path):
    model = comfy.loader.load(str(path), "full")
    with (
        pytest.raises(ValueError, match="this MODEL is no dense FLUX"),
        quantize._written(model, tmp_path / "mine.safetensors"),
    ):
        pass


def test_a_model_of_another_kind_is_refused_before_it_is_written(comfy, quantize, tmp_path):
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher
    from comfy.supported_models import SD15

    config = {"in_channels": 4, "model_channels": 32, "out_channels": 4, "num_res_blocks": [1], "channel_mult": [1]}
    config |= {"transformer_depth": [0], "transformer_depth_output": [0, 0], "transformer_depth_middle": 0}
    config |= {"num_heads": 1, "use_spatial_transformer": True, "context_dim": 8, "legacy": False, "image_size": 32}
    cpu = torch.device("cpu")
    model = ModelPatcher(BaseModel(SD15(config), device=cpu), cpu, cpu)
    path = tmp_path / "missing folder" / "mine.safetensors"  # writing there would be another error
    with pytest.raises(ValueError, match="this MODEL is no dense FLUX"), quantize._written(model, path):
        pass


CONVERTING = """
import sys, _pack; _pack.load()
from pathlib import Path
from ternary_flux.benchmarks import comfyui
comfyui.make_importable()
from ternary_flux.nodes.conversion import Display, convert
convert(sys.argv[2:], Display(None), Path(sys.argv[1]) / "pictures")
"""


@pytest.mark.slow
@pytest.mark.feature("ComfyUI killed while Quantize FLUX to Ternary runs", "the conversion stops, and goes on later")
def test_a_conversion_ends_with_comfyui(tmp_path):
    dense, encoded = synthetic.write(tmp_path / "dense.safetensors"), tmp_path / "cond.safetensors"
    builders.write_conditioning(encoded, synthetic.FLUX1, 8)
    target, work = tmp_path / "out.safetensors", tmp_path / "work"
    options = ["--size", "64x64", "--sampler-steps", 2, "--device", "cpu", "--budget", 60, "--work", work]
    command = [sys.executable, "-c", CONVERTING, work, dense, "--output", target, "--conditioning", encoded, *options]
    with subprocess.Popen([str(part) for part in command], cwd=ROOT) as comfyui:
        try:
            while not list(work.glob("pictures/*.safetensors")):
                assert comfyui.poll() is None
                time.sleep(0.1)
            (conversion,) = psutil.Process(comfyui.pid).children()
        finally:
            comfyui.kill()
    deadline = time.monotonic() + 120
    while conversion.is_running() and conversion.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not target.exists() and (work / "decisions.json").exists()


@pytest.mark.parametrize("channels", [16, 128])
def test_previews_without_a_vae(comfy, channels):
    from ternary_flux.nodes import conversion

    side = 8 if channels == 16 else 16
    assert conversion.picture(torch.randn(channels, 8, 8)).size == (side, side)


@pytest.mark.parametrize("name", ["", "a/b", "..", "a\\b"])
def test_names_of_files_only(quantize, name):
    assert "give the name of a file, without a folder" in quantize.QuantizeFlux.validate_inputs(name=name)
    assert quantize.QuantizeFlux.validate_inputs(name="flux-1.58bit") is True


STRANGE = ("a\0b", "a\nb", "a:b", "what?", "CON", "com1.safetensors", "dot.", "blank ", "ü" * 150)


@pytest.mark.parametrize("name", STRANGE)
def test_names_that_some_system_does_not_have(quantize, name):
    """They fail on the system that the file is shared with, if not here."""
    from ternary_flux.nodes.save import SaveTernaryFlux

    problem = quantize.QuantizeFlux.validate_inputs(name=name)
    assert isinstance(problem, str) and problem.isprintable()
    assert SaveTernaryFlux.validate_inputs(f"folder/{name}") == problem
    assert SaveTernaryFlux.validate_inputs("folder/%date:yyyy-MM-dd%/console") is True


@pytest.mark.parametrize("size", ["64", "axb", "16384x16384", "-64x64", "0x0"])
def test_sizes_are_refused_before_anything_connected_is_loaded(quantize, size):
    with pytest.raises(ValueError, match=size):
        quantize.QuantizeFlux.check_lazy_status("any", size=size, clip=None)


@pytest.mark.slow
def test_a_conversion_whose_stdin_ends_goes_on_later(simple_solver, tmp_path):
    dense, encoded = synthetic.write(tmp_path / "dense.safetensors"), tmp_path / "cond.safetensors"
    builders.write_conditioning(encoded, synthetic.FLUX1, 8)
    target, work = tmp_path / "out.safetensors", tmp_path / "work"
    amounts = ["--pictures", 16, "--calibration-states", 16, "--steps", 2]
    options = ["--size", "64x64", "--sampler-steps", 4, "--device", "cpu", *amounts, "--work", work]
    command = ["convert", dense, "--output", target, "--conditioning", encoded, *options]
    arguments = [str(part) for part in command]
    pipes = dict.fromkeys(("stdin", "stderr"), subprocess.PIPE)
    stopped = subprocess.Popen([sys.executable, "-m", "quantizer", *arguments, "--stop-at-eof"], cwd=ROOT, **pipes)
    while not list(work.glob("pictures/*.safetensors")):
        assert stopped.poll() is None
        time.sleep(0.02)
    _, errors = stopped.communicate()  # closes stdin
    assert stopped.returncode == 143 and b"give the same command again to go on" in errors
    kept = {path: path.stat().st_mtime_ns for path in work.glob("pictures/*.safetensors")}
    assert run(arguments) == 0 and target.exists()
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())
