"""ComfyUI's options for dense weights do not touch a ternary model, nor the files saved from it."""

import pytest
import torch
from ternary_flux.tests.nodes import tiny

OPTIONS = ["fp8_e4m3fn_unet", "fp8_e5m2_unet", "fp8_e8m0fnu_unet", "bf16_unet", "fp16_unet", "fp32_unet", "fp64_unet"]


@pytest.mark.feature("--fp8_e4m3fn-unet and similar options", "do not touch a ternary model")
@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_for_dense_weights(comfy, path, reference, monkeypatch, option, tmp_path):
    monkeypatch.setattr(comfy.model_management.args, option, True)
    model = comfy.loader.load(str(path), "full")
    assert model.model.get_dtype() == torch.float32
    assert tiny.distance(tiny.run(model), reference) < 1e-5
    comfy.sd.save_checkpoint(str(tmp_path / "saved.safetensors"), model)
    again = comfy.loader.load(str(tmp_path / "saved.safetensors"), "full")
    assert tiny.distance(tiny.run(again), reference) < 1e-5
