"""The parts of Quantize FLUX to Ternary that need no server."""

import pytest
import torch
from ternary_flux.benchmarks import miniature
from ternary_flux.quantizer.files.checkpoint import open_checkpoint
from ternary_flux.tests.nodes import adapters

NAME = "double_blocks.0.img_attn.proj"


@pytest.fixture(scope="module")
def quantize(comfy):
    from ternary_flux.nodes import quantize

    return quantize


def test_a_model_is_written_with_its_lora(comfy, quantize, tmp_path):
    model = comfy.sd.load_diffusion_model(str(miniature.TRANSFORMER))
    original = open_checkpoint(miniature.TRANSFORMER)
    n, k = original.shape(f"{NAME}.weight")
    lora = adapters.bfl_lora(1, shapes={NAME: (n, k)})
    model, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    with quantize._written(model, tmp_path) as path:
        written = open_checkpoint(path)
        assert set(written.names) == set(original.names)
        change = written.tensor(f"{NAME}.weight").float() - original.tensor(f"{NAME}.weight").float()
        other = "double_blocks.1.img_attn.proj.weight"
        assert torch.equal(written.tensor(other), original.tensor(other))
    assert torch.linalg.matrix_rank(change, rtol=0.1) < n and change.norm() > 0.01
    assert not path.exists()


def test_a_ternary_model_is_refused(comfy, quantize, tmp_path, path):
    model = comfy.loader.load(str(path), "full")
    with (
        pytest.raises(ValueError, match="this MODEL is no dense FLUX"),
        quantize._written(model, tmp_path),
    ):
        pass


@pytest.mark.parametrize("channels", [16, 128])
def test_previews_without_a_vae(quantize, channels):
    side = 8 if channels == 16 else 16
    assert quantize.picture(torch.randn(channels, 8, 8)).size == (side, side)


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a\\b"])
def test_names_of_files_only(quantize, name):
    assert "without a folder" in quantize._name_problem(name)
    assert quantize._name_problem("flux-1.58bit") is None
