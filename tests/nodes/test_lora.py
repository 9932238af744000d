"""LoRAs on ternary weights: equal to merging them into the dense twin, and gone without a trace afterwards."""

import logging

import pytest
import torch
from ternary_flux.tests.nodes import adapters, tiny


@pytest.mark.feature(
    "Load LoRA: BFL and diffusers keys, stacked, negative, with DoRA, LoKr, full differences",
    "all but plain LoRAs make their layers dense while they act: slower",
)
@pytest.mark.parametrize("budget", [None, 600_000])
@pytest.mark.parametrize("name", adapters.COMBINATIONS)
def test_equals_the_dense_model_with_the_lora_merged(comfy, path, twin, reference, name, budget):
    loras = adapters.COMBINATIONS[name]
    expected = adapters.merged(comfy, twin, loras)
    model = adapters.apply(comfy, comfy.loader.load(str(path), "full"), loras)
    assert type(model) is comfy.patcher.TernaryPatcher
    if budget is None:
        comfy.model_management.load_models_gpu([model])
    else:
        model.patch_model(tiny.CPU, lowvram_model_memory=budget)
    effect = (expected - reference).norm() if name != "zero" else torch.tensor(0.5)
    assert effect > 0.1
    assert (tiny.run(model) - expected).norm() < 1e-4 * effect
    model.partially_unload(tiny.CPU, 300_000)
    assert (tiny.run(model) - expected).norm() < 1e-4 * effect
    model.unpatch_model(tiny.CPU)
    untouched = comfy.loader.load(str(path), "full")
    state = untouched.model.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.model.state_dict().items())
    assert tiny.distance(tiny.run(model), tiny.run(untouched)) < 1e-6


def test_plain_loras_never_touch_the_weights(comfy, path):
    model = adapters.apply(comfy, comfy.loader.load(str(path), "full"), adapters.COMBINATIONS["stacked"])
    before = model.model.diffusion_model.double_blocks[0].img_attn.qkv.weight
    comfy.model_management.load_models_gpu([model])
    module = model.model.diffusion_model.double_blocks[0].img_attn.qkv
    assert module.weight._qdata.data_ptr() == before._qdata.data_ptr()
    assert module.weight_function == []
    assert [part.outputs for part in module.branch.parts] == [
        (0, tiny.HIDDEN),
        (tiny.HIDDEN, tiny.HIDDEN),
        (2 * tiny.HIDDEN, tiny.HIDDEN),
        None,
    ]
    assert model.loaded_size() > model.model_size()  # the branches are counted


def test_branches_are_built_once(comfy, path):
    model = adapters.apply(comfy, comfy.loader.load(str(path), "full"), adapters.COMBINATIONS["stacked"])
    comfy.model_management.load_models_gpu([model])
    module = model.model.diffusion_model.double_blocks[0].img_attn.qkv
    branch = module.branch
    model.partially_load(tiny.CPU)
    assert module.branch is branch


@pytest.mark.feature("Several models with different LoRAs", "they share one set of weights")
def test_models_with_different_loras_share_one_set_of_weights(comfy, path, twin, reference):
    base = comfy.loader.load(str(path), "full")
    variants = [
        [],
        adapters.COMBINATIONS["diffusers keys"],
        adapters.COMBINATIONS["dora"],
        adapters.COMBINATIONS["negative"],
        [],
    ]
    models = [adapters.apply(comfy, base, loras) for loras in variants]
    assert len({id(model.model) for model in models}) == 1
    for model, loras in zip(models, variants, strict=True):
        comfy.model_management.load_models_gpu([model])
        expected = adapters.merged(comfy, twin, loras)
        assert tiny.distance(tiny.run(model), expected) < 1e-5


@pytest.mark.feature("Changing a LoRA's strength", "costs no pass over the weights")
@pytest.mark.parametrize("budget", [None, 600_000])
def test_another_strength_moves_no_weight(comfy, path, twin, tmp_path, budget, monkeypatch):
    base = comfy.loader.load(str(path), "full")
    loras, other = adapters.bfl_lora(2), comfy.loader.load(str(tiny.write(tmp_path / "other.safetensors", seed=9)))
    dense_other = dense(comfy, tmp_path / "other.safetensors")

    def variants(base, other):
        yield adapters.apply(comfy, base, [(loras, 1.0)])
        yield adapters.apply(comfy, base, [(loras, 0.3), (adapters.dora(4), 1.0)])
        for ratio in (0.5, 0.9):
            merged = base.clone()
            for key, patch in other.get_key_patches("diffusion_model.double_blocks.0.img_attn.qkv.w").items():
                merged.add_patches({key: patch}, 1 - ratio, ratio)
            yield merged
        yield base

    layer = base.model.diffusion_model.double_blocks[0].img_attn.qkv
    moves = []
    base.partially_load(tiny.CPU, budget or 1e9)
    monkeypatch.setattr(type(layer), "_apply", lambda module, *_: moves.append(module))
    for model, expected in zip(variants(base, other), variants(twin(), dense_other), strict=True):
        model.partially_load(tiny.CPU, budget or 1e9)
        assert budget or not moves
        comfy.model_management.load_models_gpu([expected])
        assert tiny.distance(tiny.run(model), tiny.run(expected)) < 1e-5
        assert model.model.current_weight_patches_uuid == model.patches_uuid


def test_a_patched_dense_parameter_is_loaded_anew(comfy, path, twin):
    g = tiny.generator(0)
    base = comfy.loader.load(str(path), "full")
    for strength in (1.0, 0.5):
        loras = [({"diffusion_model.img_in.diff": torch.randn(tiny.HIDDEN, 64, generator=g)}, strength)]
        model = adapters.apply(comfy, base, loras)
        comfy.model_management.load_models_gpu([model])
        assert tiny.distance(tiny.run(model), adapters.merged(comfy, twin, loras)) < 1e-5


def test_dense_patches_keep_their_tensors_on_the_device(comfy, path):
    other = comfy.loader.load(str(path), "full").get_key_patches("diffusion_model.double_blocks.0.img_attn.qkv.weight")
    model = comfy.loader.load(str(path), "full").clone()
    for key, patch in other.items():
        model.add_patches({key: patch}, 0.5, 0.5)
    model = adapters.apply(comfy, model, [(adapters.dora(4), 1.0)])
    key = f"diffusion_model.{adapters.QKV}.weight"
    first, second = (comfy.lora.DensePatches(key, model.patches[key]) for _ in range(2))
    meta = torch.device("meta")
    first.to(meta)
    lora = next(patch[1] for patch in first.patches if hasattr(patch[1], "weights"))
    assert all(tensor.device == meta for tensor in lora.weights if isinstance(tensor, torch.Tensor))
    weight = next(patch[1][0][0] for patch in first.patches if isinstance(patch[1], list))
    assert weight.device == meta
    packed = sum(tensor.nbytes for tensor in other[key][0][0].state_dict().values())
    assert first.nbytes > packed  # counted in what is loaded
    second.to(meta, before=first)
    assert next(patch[1][0][0] for patch in second.patches if isinstance(patch[1], list)) is weight


def test_dense_patches_are_reported_once_a_model(comfy, path, caplog):
    caplog.set_level(logging.WARNING)
    base = comfy.loader.load(str(path), "full")
    for strength in (1.0, 0.5):
        model = adapters.apply(comfy, base, [(adapters.dora(4), strength)])
        comfy.model_management.load_models_gpu([model])
    (warning,) = [record.message for record in caplog.records if "Ternary FLUX" in record.message]
    assert "DoRA" in warning


def test_int8_activations_leave_the_lora_in_full_precision(comfy, path, twin, reference):
    loras = adapters.COMBINATIONS["diffusers keys"]
    model = adapters.apply(comfy, comfy.loader.load(str(path), "int8"), loras)
    comfy.model_management.load_models_gpu([model])
    assert tiny.distance(tiny.run(model), adapters.merged(comfy, twin, loras)) < 0.05


@pytest.mark.feature("Weight wrappers of other extensions")
def test_weight_wrappers_of_other_extensions_see_the_patched_dense_weight(comfy, path, twin):
    loras = adapters.COMBINATIONS["bfl keys, alpha"]
    results = []
    for model in (twin(), comfy.loader.load(str(path), "full")):
        model = adapters.apply(comfy, model, loras)
        model.add_weight_wrapper(f"diffusion_model.{adapters.QKV}.weight", lambda weight: weight * 2)
        model.patch_model(tiny.CPU, lowvram_model_memory=1)
        results.append(tiny.run(model))
    assert tiny.distance(results[1], results[0]) < 1e-5


@pytest.mark.feature("Hook LoRA (Create Hook LoRA, with schedules)")
@pytest.mark.parametrize("mode", ["MinVram", "MaxSpeed"])
@pytest.mark.parametrize("lora", [adapters.diffusers_lora(1), adapters.dora(4)], ids=["lora", "dora"])
def test_hook_loras_come_and_go(comfy, path, twin, reference, mode, lora):
    base_loras = adapters.COMBINATIONS["bfl keys, alpha"]
    plain, both = adapters.merged(comfy, twin, base_loras), adapters.merged(comfy, twin, [*base_loras, (lora, 1.0)])
    model = adapters.apply(comfy, comfy.loader.load(str(path), "full"), base_loras)
    model, group = adapters.hooked(comfy, model, lora)
    model.hook_mode = comfy.hooks.EnumHookMode[mode]
    comfy.model_management.load_models_gpu([model])
    for _ in range(2):
        model.apply_hooks(group)
        assert tiny.distance(tiny.run(model), both) < 1e-5
        model.apply_hooks(None)
        assert tiny.distance(tiny.run(model), plain) < 1e-5
    model.clean_hooks()
    model.unpatch_model(tiny.CPU)
    assert tiny.distance(tiny.run(model), reference) < 1e-5


@pytest.mark.parametrize("mode", ["MinVram", "MaxSpeed"])
def test_hook_loras_on_linears_that_are_not_quantized(comfy, path, twin, reference, mode):
    g, h = tiny.generator(0), tiny.HIDDEN
    shapes = {"img_in": (h, 64), "txt_in": (h, 128), "final_layer.linear": (64, h), "vector_in.in_layer": (h, 64)}
    lora = adapters.bfl_lora(2)
    for name, (n, k) in shapes.items():
        lora[f"diffusion_model.{name}.lora_A.weight"] = torch.randn(4, k, generator=g) * 0.1
        lora[f"diffusion_model.{name}.lora_B.weight"] = torch.randn(n, 4, generator=g) * 0.1
    expected = adapters.merged(comfy, twin, [(lora, 1.0)])
    model, group = adapters.hooked(comfy, comfy.loader.load(str(path), "full"), lora)
    model.hook_mode = comfy.hooks.EnumHookMode[mode]
    comfy.model_management.load_models_gpu([model])
    for _ in range(2):
        model.apply_hooks(group)
        assert tiny.distance(tiny.run(model), expected) < 1e-5
        model.apply_hooks(None)
        assert tiny.distance(tiny.run(model), reference) < 1e-5


@pytest.mark.feature("Create Hook Model as LoRA")
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_another_model_as_a_hook(comfy, path, tmp_path, twin, reference, strength):
    """The node Create Hook Model as LoRA: the difference to a whole dense checkpoint."""
    other = tiny.write(tmp_path / "other.safetensors", seed=9)
    weights = comfy.hooks.get_patch_weights_from_model(dense(comfy, other))
    results = []
    for model in (twin(), comfy.loader.load(str(path), "full")):
        group = comfy.hooks.create_hook_model_as_lora(weights, None, strength, 0.0)
        model.register_all_hook_patches(group, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model))
        comfy.model_management.load_models_gpu([model])
        model.apply_hooks(group)
        results.append(tiny.run(model))
        model.apply_hooks(None)
    assert tiny.distance(tiny.run(model), reference) < 1e-5
    assert tiny.distance(results[1], results[0]) < 1e-5


@pytest.mark.feature("Model merging (Model Merge Simple and Blocks)", "the result is dense in the layers that differ")
def test_merging_two_models(comfy, path, tmp_path, twin):
    other = tiny.write(tmp_path / "other.safetensors", seed=9)
    results = []
    for load in (lambda p: comfy.loader.load(str(p), "full"), lambda p: dense(comfy, p)):
        first, second = load(path), load(other)
        patches = second.get_key_patches("diffusion_model.")
        assert all(value[0][0] is not None for value in patches.values())
        for key, patch in patches.items():
            first.add_patches({key: patch}, 0.3, 0.7)
        comfy.model_management.load_models_gpu([first])
        results.append(tiny.run(first))
    assert tiny.distance(results[0], results[1]) < 1e-5


def dense(comfy, path):
    return comfy.sd.load_diffusion_model_state_dict(tiny.dense_twin(path), model_options={"dtype": torch.float32})


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("rank", [0, 8])
def test_saving_keeps_a_lora_in_the_low_rank_part(comfy, tmp_path, rank, columns):
    path = tiny.write(tmp_path / "model.safetensors", rank=rank, columns=columns)
    model = adapters.apply(comfy, comfy.loader.load(str(path), "full"), adapters.COMBINATIONS["stacked"])
    comfy.model_management.load_models_gpu([model])
    comfy.sd.save_checkpoint(str(tmp_path / "saved.safetensors"), model)
    saved = comfy.loader.load(str(tmp_path / "saved.safetensors"), "full")
    assert saved.model.diffusion_model.double_blocks[0].img_attn.qkv.weight._params.up.shape[1] >= rank + 3 * 4 + 8
    assert tiny.distance(tiny.run(saved), tiny.run(model)) < 0.01  # factors are bf16 in the file


def test_saving_a_patch_without_low_rank_form_gives_a_dense_layer(comfy, path, tmp_path):
    model = adapters.apply(comfy, comfy.loader.load(str(path), "full"), adapters.COMBINATIONS["dora"])
    comfy.model_management.load_models_gpu([model])
    comfy.sd.save_checkpoint(str(tmp_path / "saved.safetensors"), model)
    saved = comfy.loader.load(str(tmp_path / "saved.safetensors"), "full")
    blocks = saved.model.diffusion_model.double_blocks[0]
    assert not comfy.layout.is_ternary(blocks.img_attn.qkv.weight)
    assert comfy.layout.is_ternary(blocks.txt_attn.qkv.weight)
    assert tiny.distance(tiny.run(saved), tiny.run(model)) < 0.01  # dense weights are bf16 in the file
