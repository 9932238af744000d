"""LoRAs made for another model: painted without the layers that do not fit, and said in one line."""

import logging

import pytest
import torch
from ternary_flux.tests.nodes import adapters, tiny

WIDER = {name: (n * 3 // 2, k * 3 // 2) for name, (n, k) in adapters.BFL.items()}
ONE = next(iter(adapters.BFL))
SOME = {"outputs": (2, 1), "inputs": (1, 2)}


def lines(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("kind", adapters.KINDS)
def test_a_lora_of_another_width_is_left_out(comfy, path, reference, kind, caplog):
    model = adapters.apply(comfy, comfy.loader.load(str(path), "full"), [(adapters.KINDS[kind](1, shapes=WIDER), 1.0)])
    comfy.model_management.load_models_gpu([model])
    for _ in range(3):
        assert tiny.distance(tiny.run(model), reference) < 1e-5
    (line,) = lines(caplog)
    assert "4 of 4 layers do not fit: made for another model" in line


@pytest.mark.feature("A LoRA made for another model", "acts with the layers that fit; one line says how many do not")
@pytest.mark.parametrize("side", SOME)
@pytest.mark.parametrize("kind", adapters.KINDS)
def test_the_layers_that_fit_still_act(comfy, path, twin, kind, side, caplog):
    a, b = SOME[side]
    n, k = adapters.BFL[ONE]
    make = adapters.KINDS[kind]
    lora = make(1, shapes=adapters.BFL | {ONE: (a * n, b * k)})
    expected = adapters.merged(comfy, twin, [(lora, 1.0)])
    caplog.clear()  # core's own errors
    model = adapters.apply(comfy, comfy.loader.load(str(path), "full"), [(lora, 1.0)])
    comfy.model_management.load_models_gpu([model])
    assert tiny.distance(tiny.run(model), expected) < 1e-5
    misfits = [line for line in lines(caplog) if "do not fit" in line]
    blind = side == "inputs" and kind in ("oft", "boft")  # these turn outputs and have no inputs of their own
    assert ["1 of 4 layers do not fit" in line for line in misfits] == ([] if blind else [True])


def test_layers_that_are_not_quantized_count_too(comfy, path, reference, caplog):
    g = tiny.generator(0)
    names = {"img_in": (2 * tiny.HIDDEN, 64), "final_layer.linear": (64, 2 * tiny.HIDDEN)}
    lora = {}
    for name, (n, k) in names.items():
        lora[f"diffusion_model.{name}.lora_A.weight"] = torch.randn(4, k, generator=g)
        lora[f"diffusion_model.{name}.lora_B.weight"] = torch.randn(n, 4, generator=g)
    model = adapters.apply(comfy, comfy.loader.load(str(path), "full"), [(lora, 1.0)])
    model.patch_model(tiny.CPU, lowvram_model_memory=1)
    assert tiny.distance(tiny.run(model), reference) < 1e-5
    (line,) = lines(caplog)
    assert "2 of 2 layers do not fit" in line


def test_hooks_leave_them_out(comfy, path, reference, caplog):
    model, group = adapters.hooked(comfy, comfy.loader.load(str(path), "full"), adapters.dora(1, shapes=WIDER))
    comfy.model_management.load_models_gpu([model])
    for _ in range(2):
        model.apply_hooks(group)
        assert tiny.distance(tiny.run(model), reference) < 1e-5
        model.apply_hooks(None)
    assert len([line for line in lines(caplog) if "do not fit" in line]) == 1


@pytest.mark.parametrize("file", ["path", "mixed"])
def test_models_are_saved_without_them(comfy, request, tmp_path, file):
    model = comfy.loader.load(str(request.getfixturevalue(file)), "full")
    before = tiny.run(model)
    model = adapters.apply(comfy, model, [(adapters.bfl_lora(1, shapes=WIDER), 1.0)])
    comfy.sd.save_checkpoint(str(tmp_path / "saved.safetensors"), model)
    saved = comfy.loader.load(str(tmp_path / "saved.safetensors"), "full")
    assert tiny.distance(tiny.run(saved), before) < 1e-3  # rounding of the int8 layer's activations


def test_merging_with_another_model_is_reported_once(comfy, path, tmp_path, reference, caplog):
    from dataclasses import replace

    other = tiny.write(tmp_path / "wide.safetensors", replace(tiny.FLUX1, hidden=384))
    model = comfy.loader.load(str(path), "full").clone()
    for key, patch in comfy.loader.load(str(other), "full").get_key_patches("diffusion_model.").items():
        model.add_patches({key: patch}, 0.5, 1.0)
    comfy.model_management.load_models_gpu([model])
    tiny.run(model)
    assert len([line for line in lines(caplog) if "do not fit" in line]) == 1
