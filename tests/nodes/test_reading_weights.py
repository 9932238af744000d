"""Core code that reads a patched model's weights gets the merged dense weights, not packed trits."""

import pytest
import torch
from safetensors.torch import load_file
from ternary_flux.tests.nodes import adapters, tiny

KEY = f"diffusion_model.{adapters.QKV}.weight"


@pytest.fixture
def extract(comfy, tmp_path, monkeypatch):
    """The nodes ModelMergeSubtract and Extract and Save LoRA; returns the LoRA of the difference."""
    from comfy_extras.nodes_lora_extract import LoraSave
    from comfy_extras.nodes_model_merging import ModelSubtract

    monkeypatch.setattr(comfy.folder_paths, "get_output_directory", lambda: str(tmp_path))

    def extract(first, second, rank=8, kind="standard"):
        (difference,) = ModelSubtract().merge(first, second, 1.0)
        LoraSave.execute("extracted", rank, kind, False, difference)
        (file,) = tmp_path.glob("extracted*.safetensors")
        return load_file(file)

    return extract


@pytest.mark.feature("Extract and Save LoRA")
@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("kind", ["standard", "full_diff"])
def test_a_lora_can_be_extracted_again(comfy, path, extract, kind, loaded, monkeypatch):
    if not loaded:
        monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda models: None)
    base = comfy.loader.load(str(path), "full")
    lora = adapters.bfl_lora(1)
    extracted = extract(adapters.apply(comfy, base, [(lora, 1.0)]), base, kind=kind)
    name = f"diffusion_model.{adapters.QKV}"
    if kind == "standard":
        found = extracted[f"{name}.lora_up.weight"].float() @ extracted[f"{name}.lora_down.weight"].float()
    else:
        found = extracted[f"{name}.diff"].float()
    flat = f"lora_unet_{adapters.QKV.replace('.', '_')}"
    given = lora[f"{flat}.lora_up.weight"] @ lora[f"{flat}.lora_down.weight"] * 0.5  # alpha 4 of rank 8
    assert tiny.distance(found, given) < (0.2 if kind == "standard" else 0.01)  # core clamps the factors' outliers


@pytest.mark.parametrize("file", ["path", "mixed"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_state_dict_of_a_patched_model_is_dense(comfy, request, file, kind):
    file = request.getfixturevalue(file)
    model = adapters.apply(comfy, comfy.loader.load(str(file), "full"), [(adapters.KINDS[kind](1), 1.0)])
    key = "diffusion_model.double_blocks.0.txt_mlp.0.weight"
    dense = model.quantized_linear(key).weight.dequantize()
    expected = comfy.lora.comfy.calculate_weight(model.patches[key], dense.clone(), key)
    comfy.model_management.load_models_gpu([model])
    state = model.model_state_dict("diffusion_model.")
    assert all(torch.is_floating_point(tensor) for tensor in state.values())
    assert {name.rpartition(".")[2] for name in state} == {"weight", "bias"}
    for read in (
        state[key],
        state.get(key),
        dict(state.items())[key],
        model.patch_weight_to_device(key, tiny.CPU, return_weight=True),
    ):
        assert tiny.distance(read, expected) < 1e-6


@pytest.mark.feature("Model Merge Subtract and Add")
def test_a_subtracted_model_has_the_difference_as_its_weights(comfy, path, twin):
    from comfy_extras.nodes_model_merging import ModelSubtract

    other = [(adapters.bfl_lora(2), 1.0)]
    results = []
    for make in (twin, lambda: comfy.loader.load(str(path), "full")):
        (model,) = ModelSubtract().merge(adapters.apply(comfy, make(), other), make(), 0.5)
        results.append(model.patch_weight_to_device(KEY, tiny.CPU, return_weight=True))
    assert tiny.distance(results[1], results[0]) < 1e-5
