"""What ComfyUI's own nodes give a sampler beside the prompt acts on a ternary model as on its dense twin."""

from dataclasses import replace

import pytest
import torch
from ternary_flux.tests.nodes import tiny

FLUX2 = replace(tiny.FLUX1, version=2, in_channels=128, out_channels=128, vec_dim=None)
FILL = replace(tiny.FLUX1, in_channels=16 + 16 + 64)  # the picture, what stays of it, the mask
CANNY = replace(tiny.FLUX1, in_channels=16 + 16)


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=tiny.generator(seed))


@pytest.fixture
def models(comfy, tmp_path):
    """Makes the ternary model of an architecture and its dense twin."""

    def make(arch):
        path = tiny.write(tmp_path / "model.safetensors", arch)
        options = {"dtype": torch.float32}
        dense = comfy.sd.load_diffusion_model_state_dict(tiny.dense_twin(path), model_options=options)
        return comfy.loader.load(str(path), "full"), dense

    return make


def sample(model, latent: torch.Tensor, **conditions) -> torch.Tensor:
    """Two steps of KSampler."""
    import comfy.sample

    said = {"pooled_output": noise(1, 64, seed=3), "guidance": 3.5} | conditions
    positive, negative = ([[noise(1, 8, 128, seed=seed), dict(said)]] for seed in (4, 5))
    start = noise(*latent.shape, seed=6)
    return comfy.sample.sample(model, start, 2, 1.5, "euler", "simple", positive, negative, latent, seed=7)


def differs_only_by(models, arch, *, latent=(1, 16, 8, 8), **conditions):
    """Both models paint the same, and another picture than without the conditions."""
    ternary, dense = models(arch)
    given = noise(*latent, seed=1)
    painted = sample(ternary, given, **conditions)
    assert tiny.distance(painted, sample(dense, given, **conditions)) < 1e-4
    return tiny.distance(sample(ternary, given), painted)


@pytest.mark.feature("Inpaint with FLUX.1 Fill (InpaintModelConditioning)")
def test_fill_sees_picture_and_mask(models):
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., :32] = 1
    change = differs_only_by(models, FILL, concat_latent_image=noise(1, 16, 8, 8, seed=8), concat_mask=mask)
    assert change > 0.01


@pytest.mark.feature("FLUX.1 Canny and Depth (InstructPixToPixConditioning)")
def test_control_models_see_their_picture(models):
    assert differs_only_by(models, CANNY, concat_latent_image=noise(1, 16, 8, 8, seed=8)) > 0.01


@pytest.mark.feature("Kontext: Reference Latent, one and several")
@pytest.mark.parametrize("count", [1, 2])
def test_reference_pictures_are_seen(models, count):
    references = [noise(1, 16, 8, 12, seed=seed) for seed in range(8, 8 + count)]
    assert differs_only_by(models, tiny.FLUX1, reference_latents=references) > 0.01


@pytest.mark.feature("FLUX.2 in KSampler, with reference pictures")
def test_flux2_is_sampled(models):
    reference = [noise(1, 128, 4, 4, seed=8)]
    assert differs_only_by(models, FLUX2, latent=(1, 128, 4, 4), reference_latents=reference) > 0.003


@pytest.mark.feature("ControlNet (Apply ControlNet)")
def test_a_controlnet_steers(comfy, models):
    """ComfyUI's own ControlNet class, of XLabs' layout."""
    import comfy.controlnet

    g, h = tiny.generator(9), tiny.HIDDEN
    state = {name: t for name, t in tiny.dense_tensors(tiny.FLUX1, g).items() if not name.startswith("final_layer")}
    for name in ("controlnet_blocks.0", "controlnet_single_blocks.0"):
        state |= {f"{name}.weight": torch.randn(h, h, generator=g) * h**-0.5, f"{name}.bias": torch.zeros(h)}
    state |= {"pos_embed_input.weight": torch.randn(h, 64, generator=g) / 8, "pos_embed_input.bias": torch.zeros(h)}
    for number, inputs in zip(range(0, 15, 2), (3, *[16] * 7), strict=True):
        state[f"input_hint_block.{number}.weight"] = torch.randn(16, inputs, 3, 3, generator=g) / 8
        state[f"input_hint_block.{number}.bias"] = torch.zeros(16)
    control = comfy.controlnet.load_controlnet_state_dict(state)
    hint = noise(1, 3, 64, 64, seed=10).sigmoid()
    control.set_cond_hint(hint, 1.0, (0.0, 1.0))
    assert differs_only_by(models, tiny.FLUX1, control=control, control_apply_to_uncond=True) > 0.01
