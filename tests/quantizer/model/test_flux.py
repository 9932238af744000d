"""The differentiable forward against ComfyUI's own, and the properties training relies on."""

import pytest
import torch
from ternary_flux.benchmarks import comfyui
from ternary_flux.quantizer.files.architecture import Architecture
from ternary_flux.quantizer.model.flux import Flux

FLUX1 = Architecture(1, 256, 2, 2, 16, 16, context_dim=64, vec_dim=48, guidance=True)
ARCHITECTURES = {
    "dev": FLUX1,
    "schnell": Architecture(1, 128, 1, 2, 16, 16, context_dim=64, vec_dim=48, guidance=False),
    "fill": Architecture(1, 128, 2, 1, 96, 16, context_dim=64, vec_dim=48, guidance=True),
    "flux2-dev": Architecture(2, 256, 2, 2, 128, 128, context_dim=64, vec_dim=None, guidance=True),
    "klein": Architecture(2, 128, 1, 2, 128, 128, context_dim=64, vec_dim=None, guidance=False),
}


def model(arch: Architecture, seed: int = 0) -> Flux:
    generator = torch.Generator().manual_seed(seed)
    flux = Flux(arch)
    for name, parameter in flux.named_parameters():
        scale, mean = (0.05, 0.0) if parameter.ndim == 2 else (0.3, float(name.endswith("scale")))
        parameter.data = mean + scale * torch.randn(parameter.shape, generator=generator)
    return flux


def inputs(arch: Architecture, batch: int = 2, height: int = 8, width: int = 12) -> dict[str, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    return {
        "latent": torch.randn(batch, arch.in_channels, height, width, generator=generator),
        "t": torch.rand(batch, generator=generator),
        "context": torch.randn(batch, 7, arch.context_dim, generator=generator),
        "pooled": torch.randn(batch, arch.vec_dim, generator=generator) if arch.vec_dim else None,
        "guidance": torch.linspace(1, 4, batch) if arch.guidance else None,
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_comfyui(name):
    arch = ARCHITECTURES[name]
    flux, batch = model(arch), inputs(arch)
    theirs = comfyui_flux(flux)
    with torch.no_grad():
        expected = theirs(*(value if value is None else value.clone() for value in batch.values()))
        ours = flux(**batch)
    assert ours.shape == expected.shape
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("missing", ["pooled", "guidance"])
def test_optional_conditioning_may_be_absent_as_in_comfyui(missing):
    flux, batch = model(FLUX1), inputs(FLUX1) | {missing: None}
    with torch.no_grad():
        expected = comfyui_flux(flux)(*(value if value is None else value.clone() for value in batch.values()))
        torch.testing.assert_close(flux(**batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["dev", "klein"])
def test_gradients_reach_every_parameter_and_are_right(name):
    arch = ARCHITECTURES[name]
    flux, batch = model(arch).double(), inputs(arch, batch=1, height=4, width=4)
    batch = {key: value if value is None else value.double() for key, value in batch.items()}
    flux(**batch).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in flux.parameters())
    weight = flux.get_parameter("single_blocks.0.linear1.weight")
    step, gradient = 1e-6, weight.grad[3, 5].item()
    with torch.no_grad():
        weight[3, 5] += step
        up = flux(**batch).square().sum()
        weight[3, 5] -= 2 * step
        down = flux(**batch).square().sum()
    assert (up - down).item() / (2 * step) == pytest.approx(gradient, rel=1e-2, abs=1e-7)


def test_forward_leaves_its_inputs_alone():
    flux, batch = model(FLUX1), inputs(FLUX1)
    before = {key: value.clone() for key, value in batch.items()}
    state = flux.prepare(**batch)
    img, txt = state.img.clone(), state.txt.clone()
    flux.single_blocks[0](flux.double_blocks[0](state))
    assert torch.equal(state.img, img) and torch.equal(state.txt, txt)
    assert all(torch.equal(before[key], batch[key]) for key in batch)


def test_parameters_have_the_checkpoint_names():
    for arch in ARCHITECTURES.values():
        flux = Flux(arch)
        assert {name: tuple(p.shape) for name, p in flux.named_parameters()} == arch.shapes
        assert set(arch.linears) == {
            name for name, m in flux.named_modules() if isinstance(m, torch.nn.Linear) and "_blocks." in name
        }


def test_comfyui_norm_names_load():
    flux = model(FLUX1)
    renamed = {key.replace("_norm.scale", "_norm.weight"): value for key, value in flux.state_dict().items()}
    other = Flux(FLUX1)
    other.load_state_dict(renamed)
    torch.testing.assert_close(other.state_dict(), flux.state_dict(), rtol=0, atol=0)
    assert "double_blocks.0.img_attn.norm.query_norm.weight" in renamed


def test_the_factory_builds_the_linears_that_become_ternary():
    made = []

    def factory(inputs, outputs, bias):
        made.append((outputs, inputs))
        return torch.nn.Linear(inputs, outputs, bias)

    Flux(FLUX1, linear=factory)
    assert sorted(made) == sorted(FLUX1.linear_shapes.values())


def test_positions_cached_under_inference_mode_can_be_trained_with():
    flux, batch = model(FLUX1), inputs(FLUX1, batch=1, height=10, width=6)
    with torch.inference_mode():
        flux(**batch)
    flux(**batch).sum().backward()


def test_wrong_latents_are_refused():
    with pytest.raises(ValueError, match="16 channels"):
        Flux(FLUX1)(**inputs(FLUX1) | {"latent": torch.zeros(2, 4, 8, 8)})


def comfyui_flux(flux: Flux) -> torch.nn.Module:
    """ComfyUI's Flux, configured by its own detection, holding the same weights."""
    comfyui.make_importable()
    import comfy.ldm.flux.model
    import comfy.model_detection
    import comfy.ops

    weights = {key.replace("_norm.scale", "_norm.weight"): value for key, value in flux.state_dict().items()}
    config = comfy.model_detection.detect_unet_config(weights, "")
    theirs = comfy.ldm.flux.model.Flux(dtype=torch.float32, operations=comfy.ops.disable_weight_init, **config)
    theirs.load_state_dict(weights)
    return theirs
