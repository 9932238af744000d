"""A ternary model made elsewhere, in the real ComfyUI."""

import pytest
import torch
from ternary_flux.quantizer.imports.run import import_model
from ternary_flux.tests.nodes import tiny
from ternary_flux.tests.quantizer.imports import bonsai


def run(patcher) -> torch.Tensor:
    """The velocity of a FLUX.2 of 128 latent channels for fixed random inputs, fp32."""
    latent = torch.randn(1, bonsai.CHANNELS, 4, 4, generator=tiny.generator(1))
    context = torch.randn(1, 8, bonsai.CONTEXT, generator=tiny.generator(2))
    with torch.inference_mode():
        return patcher.model.diffusion_model(latent, torch.tensor([0.5]), context).float().clone()


@pytest.mark.slow
def test_bonsai_is_the_dense_model_that_its_files_decode_to(comfy, tmp_path):
    model = bonsai.Model()
    bonsai.write(tmp_path / "bonsai", "mlx-2bit", model.tensors("mlx-2bit"))
    import_model(tmp_path / "bonsai", tmp_path / "bonsai.safetensors")
    dense = comfy.sd.load_diffusion_model_state_dict(model.bfl(), model_options={"dtype": torch.float32})
    loaded = comfy.loader.load(str(tmp_path / "bonsai.safetensors"), "full")
    config = loaded.model.model_config.unet_config
    assert (config["image_model"], config["depth"], config["depth_single_blocks"]) == ("flux2", 5, 20)
    assert tiny.distance(run(loaded), run(dense)) < 1e-4
    status = comfy.loader.status(comfy.loader.check(tmp_path / "bonsai.safetensors"), tiny.CPU, "auto")
    assert "80 ternary layers" in status and "imported bit for bit" in status
    assert tiny.distance(run(comfy.loader.load(str(tmp_path / "bonsai.safetensors"), "int8")), run(dense)) < 0.1
