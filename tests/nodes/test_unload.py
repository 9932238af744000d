"""Unloading and loading again, in inference mode as ComfyUI runs nodes, and outside it as its server frees memory."""

import itertools

import pytest
import torch
from ternary_flux.tests.nodes import adapters, tiny

MODES = list(itertools.product([True, False], repeat=3))


@pytest.mark.feature("Unload Models, /free and memory pressure, then Run")
@pytest.mark.parametrize("made, unloaded, loaded", MODES)
@pytest.mark.parametrize("kind", ["none", "lora", "dora"])
def test_a_model_runs_again_after_unloading(comfy, path, made, unloaded, loaded, kind):
    patches = {"none": [], "lora": [(adapters.diffusers_lora(1), 1.0)], "dora": [(adapters.dora(4), 1.0)]}[kind]
    with torch.inference_mode(made):
        model = adapters.apply(comfy, comfy.loader.load(str(path), "full"), patches)
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([model])
        before = tiny.run(model)
    with torch.inference_mode(unloaded):
        comfy.model_management.unload_all_models()
    with torch.inference_mode(loaded):
        comfy.model_management.load_models_gpu([model])
    assert tiny.distance(tiny.run(model), before) < 1e-5


@pytest.mark.parametrize("made, moved, back", MODES)
@pytest.mark.parametrize("file", ["path", "mixed"])
def test_weights_move_in_any_mode(comfy, request, file, made, moved, back):
    """What a move to a GPU and back does, with copies that stay on the CPU."""
    with torch.inference_mode(made):
        model = comfy.loader.load(str(request.getfixturevalue(file)), "full")
    before = tiny.run(model)
    for mode in (moved, back):
        with torch.inference_mode(mode):
            model.model._apply(lambda tensor: tensor.to(device="cpu", copy=True))
    assert tiny.distance(tiny.run(model), before) < 1e-5


@pytest.mark.parametrize("loaded, restored", [(True, False), (False, True)])
def test_small_layers_made_resident_are_restored_in_any_mode(comfy, path, loaded, restored):
    """Dynamic VRAM force-loads layers under 16 KiB and puts the originals back from the backup."""
    with torch.inference_mode(not loaded):
        model = comfy.loader.load(str(path), "full")
    before = tiny.run(model)
    key = "diffusion_model.double_blocks.0.img_attn.qkv.weight"
    original = model.quantized_linear(key).weight
    with torch.inference_mode(loaded):
        model.patch_weight_to_device(key, device_to=tiny.CPU, force_cast=True)
    assert model.quantized_linear(key).weight is not original
    assert tiny.distance(tiny.run(model), before) < 1e-5
    with torch.inference_mode(restored):
        model.unpatch_model(tiny.CPU)
    assert model.quantized_linear(key).weight._qdata.data_ptr() == original._qdata.data_ptr()
