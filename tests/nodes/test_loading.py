"""Loading, moving, cloning, compiling and saving a ternary model in the real ComfyUI."""

import copy
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from ternary_flux.ops import resolve
from ternary_flux.ops.backends import eager
from ternary_flux.quantizer.files.ternary import open_ternary
from ternary_flux.tests.nodes import adapters, tiny

QKV = "double_blocks.0.img_attn.qkv"


@pytest.mark.feature("KSampler and every sampler: ComfyUI's own Flux")
def test_detection_and_parity_with_the_dense_model(comfy, path, reference):
    model = comfy.loader.load(str(path), "full")
    config = model.model.model_config.unet_config
    assert (config["image_model"], config["hidden_size"], config["context_in_dim"]) == ("flux", 256, 128)
    assert (config["depth"], config["depth_single_blocks"], config["vec_in_dim"]) == (1, 1, 64)
    assert tiny.distance(tiny.run(model), reference) < 1e-5
    assert (tiny.run(model, torch.no_grad) - reference).abs().max() < 1e-4


def test_the_model_is_as_small_in_memory_as_in_the_file(comfy, path):
    assert comfy.loader.load(str(path)).model_size() < 1.05 * path.stat().st_size


def test_int8_activations_are_close(comfy, path, reference):
    error = tiny.distance(tiny.run(comfy.loader.load(str(path), "int8")), reference)
    rounded = resolve(tiny.CPU, "int8").activations == "int8"  # a CPU without int8 products keeps full precision
    assert (1e-4 if rounded else 0) < error < 0.05


@pytest.mark.parametrize("activations", ["auto", "int8", "full"])
def test_the_backend_can_be_chosen(comfy, path, reference, activations):
    model = comfy.loader.load(str(path), activations, "eager")
    layer = model.quantized_linear(f"diffusion_model.{QKV}.weight")
    assert layer._choice.backend.NAME == "eager" and layer.weight._params.backend == "eager"
    assert tiny.distance(tiny.run(model), reference) < 0.05
    make, arguments = model.cached_patcher_init
    assert make(*arguments).quantized_linear(f"diffusion_model.{QKV}.weight").weight._params.backend == "eager"


def test_a_backend_that_cannot_run_is_refused_with_the_reason(comfy, path):
    with pytest.raises(ValueError, match="the backend triton cannot run here: .*not on cpu. Choose auto"):
        comfy.loader.load(str(path), "auto", "triton")


@pytest.mark.parametrize(
    ("metadata", "line"),
    [
        (
            {"ternary.method": "least-squares", "ternary.weight_errors": '{"a": 0.3, "b": 0.5}'},
            "rounded only: expect noise, weight error 0.40",
        ),
        ({"ternary.method": "calibrate"}, "calibrated"),
        (
            {"ternary.method": "distill", "ternary.settings": '{"distill": {"velocity_error": 0.0345}}'},
            "distilled, velocity error 0.0345",
        ),
        ({"ternary.method": "distill", "ternary.settings": "[broken"}, "distilled"),
        ({"modelspec.title": "x"}, "the file does not say how it was made"),
    ],
)
def test_the_status_says_how_far_the_conversion_went(comfy, tmp_path, metadata, line):
    file = comfy.loader.check(tiny.write(tmp_path / "file.safetensors", metadata=metadata))
    lines = comfy.loader.status(file, tiny.CPU, "auto").splitlines()
    assert lines[0] == "file.safetensors" and lines[3] == line
    assert len(lines) == 5


FORMS = [
    {"rank": 8},
    {"float_groups": True},
    {"packing": "base3"},
    {"terms": 2},
    {"terms": 2, "packing": "base3"},
    {"columns": True},
    {"columns": True, "rank": 8, "packing": "base3"},
    {"columns": True, "terms": 2},
]


@pytest.mark.parametrize("variant", FORMS)
@pytest.mark.parametrize("activations", ["full", "int8"])
def test_every_form_of_the_format_loads(comfy, tmp_path, variant, activations):
    path = tiny.write(tmp_path / "variant.safetensors", **variant)
    dense = comfy.sd.load_diffusion_model_state_dict(tiny.dense_twin(path), model_options={"dtype": torch.float32})
    error = tiny.distance(tiny.run(comfy.loader.load(str(path), activations)), tiny.run(dense))
    assert error < (1e-4 if activations == "full" else 0.05)


def test_layers_that_lose_too_much_with_8_bits_have_full_activations_unless_told_not_to(comfy, tmp_path, monkeypatch):
    monkeypatch.setattr(eager, "formats", lambda device: ("int8", "full"))
    comfy.layout.choice_for.cache_clear()
    path = tiny.write(tmp_path / "file.safetensors", columns="half")
    marked = [name for name, plan in open_ternary(path).layers.items() if plan.full_precision]
    assert 0 < len(marked) < len(open_ternary(path).layers) / 2
    for chosen, expected in (("auto", {"full"}), ("int8", {"int8"}), ("full", {"full"})):
        model = comfy.loader.load(str(path), chosen).model.diffusion_model
        used = {name: model.get_submodule(name)._choice.activations for name in open_ternary(path).layers}
        assert {used.pop(name) for name in marked} == expected
        assert set(used.values()) == {"full" if chosen == "full" else "int8"}
    comfy.layout.choice_for.cache_clear()


def test_float_group_scales_stay_where_8_bit_floats_are_fastest(comfy, tmp_path, monkeypatch):
    """A B200 multiplies e4m3 faster than int8, and needs no row x integer scales for it."""
    monkeypatch.setattr(eager, "formats", lambda device: ("e4m3", "int8", "full"))
    comfy.layout.choice_for.cache_clear()
    path = tiny.write(tmp_path / "imported.safetensors", float_groups=True)
    for chosen, activations in (("auto", "e4m3"), ("int8", "int8"), ("full", "full")):
        layer = comfy.loader.load(str(path), chosen).model.diffusion_model.double_blocks[0].img_attn.qkv
        assert layer._choice.activations == activations
        assert layer.weight._params.scale.ndim == (1 if chosen == "int8" else 2)
    comfy.layout.choice_for.cache_clear()


def test_group_scales_of_an_imported_file_are_rounded_for_int8_only_and_saved_as_they_were(comfy, tmp_path):
    path, saved = tiny.write(tmp_path / "imported.safetensors", float_groups=True), tmp_path / "saved.safetensors"
    rounded = resolve(tiny.CPU, "int8").activations == "int8"  # a CPU without int8 products keeps full precision
    model = comfy.loader.load(str(path), "int8")
    lines = comfy.loader.scale_errors(model)
    assert len(lines) == rounded
    assert all(re.fullmatch(r"group scales rounded for int8, by 0\.\d\d% \(at most 0\.\d\d%\)", line) for line in lines)
    comfy.sd.save_checkpoint(str(saved), model)
    before, after = load_file(path), load_file(saved)
    layers = [key for key in before if f"{key.rpartition('.')[0]}.comfy_quant" in before]
    assert len(layers) == 4 * 13  # trits, scales, bias and JSON, as in the file; no multipliers
    assert all(torch.equal(after[f"model.diffusion_model.{key}"], before[key]) for key in layers)
    assert not any(key.endswith("weight_group") for key in after)
    assert comfy.loader.scale_errors(comfy.loader.load(str(path), "full")) == []
    assert comfy.loader.scale_errors(comfy.loader.load(str(tiny.write(tmp_path / "own.safetensors")), "int8")) == []
    other = tiny.write(tmp_path / "other.safetensors", seed=1, float_groups=True)
    other.replace(path)  # another file has its place
    comfy.sd.save_checkpoint(str(saved), model)
    assert (f"model.diffusion_model.{QKV}.weight_group" in load_file(saved)) == rounded


def test_auto_keeps_scales_whose_rounding_would_show(comfy):
    weight = tiny.ternary_weight((16, 8192), tiny.generator(0), float_groups=True)
    fit_scales, most = comfy.linear.fit_scales, comfy.linear.SHOWS
    fitted, error = fit_scales(weight, "auto")
    assert fitted.scale.ndim == 1 and 0 < error < most
    apart = replace(weight, scale=weight.scale * torch.tensor([10.0, *[1.0] * 63]).bfloat16()[:, None])
    kept, error = fit_scales(apart, "auto")
    assert kept is apart and error > most
    fitted, error = fit_scales(apart, "int8")
    assert fitted.scale.ndim == 1 and error > most
    own = tiny.ternary_weight((64, 1024), tiny.generator(0))
    assert fit_scales(own, "auto") == (own, None)


def test_a_file_of_two_terms_takes_loras_and_is_saved_as_it_was(comfy, tmp_path):
    path, saved = tiny.write(tmp_path / "two.safetensors", terms=2), tmp_path / "saved.safetensors"
    model = comfy.loader.load(str(path), "full")
    assert model.model_size() < 1.05 * path.stat().st_size
    status = comfy.loader.status(comfy.loader.check(path), tiny.CPU, "auto")
    assert "13 ternary layers (13 of two ternary terms)" in status and ", 4." in status
    comfy.sd.save_checkpoint(str(saved), model)
    before, after = load_file(path), load_file(saved)
    for part in ("weight", "weight_scale", "weight_group", "comfy_quant"):
        assert torch.equal(after[f"model.diffusion_model.{QKV}.{part}"], before[f"{QKV}.{part}"])

    def twin():
        options = {"dtype": torch.float32}
        return comfy.sd.load_diffusion_model_state_dict(tiny.dense_twin(path), model_options=options)

    for name in ("stacked", "dora"):
        loras = adapters.COMBINATIONS[name]
        patched = adapters.apply(comfy, model, loras)
        comfy.model_management.load_models_gpu([patched])
        assert tiny.distance(tiny.run(patched), adapters.merged(comfy, twin, loras)) < 1e-5
        patched.unpatch_model(tiny.CPU)


def test_a_key_prefix_is_accepted(comfy, tmp_path, reference):
    path = tiny.write(tmp_path / "prefixed.safetensors", prefix="model.diffusion_model.", columns="half")
    assert tiny.distance(tiny.run(comfy.loader.load(str(path), "full")), reference) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(comfy, path, dtype):
    operations = comfy.linear.operations(dtype, tiny.CPU, "full")
    layer = operations.Linear(256, 768)
    state = {k.removeprefix(f"{QKV}."): v for k, v in load_file(path).items() if k.startswith(f"{QKV}.")}
    layer.load_state_dict(state)
    x = torch.randn(3, 256, generator=tiny.generator(4), dtype=dtype)
    y = layer(x)
    dense = tiny.dense_twin(path)
    expected = x.double() @ dense[f"{QKV}.weight"].double().t() + dense[f"{QKV}.bias"].double()
    assert y.dtype == dtype
    assert tiny.distance(y.double(), expected) < 0.02


@pytest.mark.feature("Low VRAM: partly loaded models")
@pytest.mark.parametrize("budget", [1, 600_000])
def test_partial_load_and_unload(comfy, path, reference, budget):
    model = comfy.loader.load(str(path), "full")
    model.patch_model(tiny.CPU, lowvram_model_memory=budget)
    assert model.model.model_lowvram
    assert tiny.distance(tiny.run(model), reference) < 1e-5
    model.partially_unload(tiny.CPU, 100_000)
    assert tiny.distance(tiny.run(model), reference) < 1e-5
    model.unpatch_model(tiny.CPU)
    comfy.model_management.load_models_gpu([model])
    assert tiny.distance(tiny.run(model), reference) < 1e-5


@pytest.mark.feature("Switching between models")
def test_unload_and_reload(comfy, path, reference):
    model = comfy.loader.load(str(path), "full")
    for _ in range(2):
        comfy.model_management.load_models_gpu([model])
        assert tiny.distance(tiny.run(model), reference) < 1e-5
        comfy.model_management.unload_all_models()


def test_clones_stay_ternary_without_dynamic_vram(comfy, path):
    model = comfy.loader.load(str(path))
    for clone in (model.clone(), model.clone(disable_dynamic=True), model.clone(force_deepcopy=True)):
        assert type(clone) is comfy.patcher.TernaryPatcher
    make, arguments = model.cached_patcher_init
    assert type(make(*arguments, disable_dynamic=True)) is comfy.patcher.TernaryPatcher


@pytest.mark.feature("Copies of a model (copy.deepcopy)", "of its diffusion_model; core's own object cannot be copied")
@pytest.mark.parametrize("kind", [None, "lora", "dora"])
def test_a_copy_of_a_model_is_a_model(comfy, path, kind):
    loras = [(adapters.KINDS[kind](1), 1.0)] if kind else []
    model = adapters.apply(comfy, comfy.loader.load(str(path), "full"), loras)
    comfy.model_management.load_models_gpu([model])
    before = tiny.run(model)
    with torch.inference_mode():
        copied = copy.deepcopy(model.model.diffusion_model)  # core's configuration around it cannot be copied
    model.unpatch_model(tiny.CPU)
    layer, original = (m.double_blocks[0].img_attn.qkv for m in (copied, model.model.diffusion_model))
    assert layer.weight._qdata.data_ptr() != original.weight._qdata.data_ptr()
    assert tiny.distance(tiny.run(SimpleNamespace(model=SimpleNamespace(diffusion_model=copied))), before) < 1e-5


@pytest.mark.feature("torch.compile (Torch Compile Model)", "one graph, no breaks")
@pytest.mark.parametrize("activations", ["full", "int8"])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_torch_compile_sees_one_graph(comfy, path, activations, mode):
    layer = comfy.loader.load(str(path), activations).model.diffusion_model.double_blocks[0].img_attn.qkv
    lora = comfy.lora.comfy.LoRAAdapter(set(), (torch.randn(768, 4), torch.randn(4, 256), None, None, None, None))
    layer.branch = comfy.lora.build("key", [(1.0, lora, 1.0, None, None)], tiny.CPU, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with mode():
        x = torch.randn(2, 5, 256)
        torch.testing.assert_close(compiled(x), layer(x))


def test_saving_and_loading_gives_the_same_file_contents(comfy, path, tmp_path, reference):
    saved = tmp_path / "saved.safetensors"
    for loaded in (False, True):
        model = comfy.loader.load(str(path), "full")
        if loaded:
            comfy.model_management.load_models_gpu([model])
        else:
            model.patch_model(tiny.CPU, lowvram_model_memory=1)
        comfy.sd.save_checkpoint(str(saved), model)
        before, after = load_file(path), load_file(saved)
        for key, tensor in before.items():
            twin = after["model.diffusion_model." + key.replace("_norm.scale", "_norm.weight")]
            assert torch.equal(twin, tensor), key
        assert tiny.distance(tiny.run(comfy.loader.load(str(saved), "full")), reference) < 1e-5


def int8_parts(path):
    return {part: load_file(path)[f"{QKV}.{part}"] for part in ("weight", "weight_scale")}


@pytest.mark.feature("Files with layers in ComfyUI's own int8 format")
def test_files_with_int8_layers_load_and_save(comfy, mixed, reference, tmp_path):
    model = comfy.loader.load(str(mixed), "full")
    assert 1e-5 < tiny.distance(tiny.run(model), reference) < 0.05
    assert "12 ternary layers and 1 int8 layers" in comfy.loader.status(comfy.loader.check(mixed), tiny.CPU, "auto")
    comfy.sd.save_checkpoint(str(tmp_path / "saved.safetensors"), model)
    saved = load_file(tmp_path / "saved.safetensors")
    stored = {f"model.diffusion_model.{QKV}.{part}": tensor for part, tensor in int8_parts(mixed).items()}
    assert all(torch.equal(saved[key], tensor) for key, tensor in stored.items())
    again = comfy.loader.load(str(tmp_path / "saved.safetensors"), "full")
    # Sums over other buffers may round otherwise, and such a rounding may move an activation to the next int8.
    assert tiny.distance(tiny.run(again), tiny.run(model)) < 1e-3


def test_loras_run_beside_int8_layers_too(comfy, mixed):
    model = comfy.loader.load(str(mixed), "full")
    layer = model.model.diffusion_model.double_blocks[0].img_attn.qkv
    x = torch.randn(3, 256)
    before = layer(x)
    up, down = torch.randn(768, 4), torch.randn(4, 256)
    adapter = comfy.lora.comfy.LoRAAdapter(set(), (up, down, None, None, None, None))
    model.add_patches({f"diffusion_model.{QKV}.weight": adapter}, 0.001)
    comfy.model_management.load_models_gpu([model])
    torch.testing.assert_close(layer(x) - before, x @ (up @ down).t() * 0.001, rtol=1e-3, atol=1e-5)
    model.unpatch_model(tiny.CPU)
    torch.testing.assert_close(layer(x), before)


@pytest.mark.feature("Load Diffusion Model and Load Checkpoint on a ternary file", "refused, with the node to use")
def test_the_stock_loaders_name_the_node(comfy, path, tmp_path):
    with pytest.raises(ValueError, match="load it with the node Load Ternary FLUX"):
        comfy.sd.load_diffusion_model(str(path))
    checkpoint = tiny.write(tmp_path / "checkpoint.safetensors", prefix="model.diffusion_model.")
    with pytest.raises(ValueError, match="load it with the node Load Ternary FLUX"):
        comfy.sd.load_checkpoint_guess_config(str(checkpoint))


@pytest.mark.feature("Cancel while loading")
def test_interrupting_stops_the_load(comfy, path):
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        comfy.loader.load(str(path))
    assert not comfy.model_management.processing_interrupted()


def vae():
    return {"decoder.conv_in.weight": torch.zeros(4, 4), "encoder.conv_in.weight": torch.zeros(4, 4)}


def text_encoder():
    return {"text_model.encoder.layers.0.self_attn.q_proj.weight": torch.zeros(4, 4)}


def lora():
    return {"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.zeros(4, 4)}


def other():
    return {"weight": torch.zeros(4, 4)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (vae, "this is a VAE. Move it to models/vae"),
        (text_encoder, "this is a text encoder. Move it to models/text_encoders"),
        (lora, "this is a LoRA. Move it to models/loras"),
        (other, "this is no FLUX transformer"),
    ],
)
def test_other_models_are_refused_with_a_remedy(comfy, tmp_path, make, message):
    path = tmp_path / "other.safetensors"
    save_file(make(), path)
    with pytest.raises(ValueError, match=message) as error:
        comfy.loader.load(str(path))
    assert "other.safetensors" in str(error.value)


def test_a_dense_flux_is_refused_with_a_remedy(comfy, path, tmp_path):
    dense = tmp_path / "dense.safetensors"
    save_file(tiny.dense_twin(path), dense)
    with pytest.raises(ValueError, match="not ternary.*Load Diffusion Model.*quantizer convert"):
        comfy.loader.load(str(dense))


def test_damaged_files_are_refused(comfy, path, tmp_path):
    data = path.read_bytes()
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="truncated"):
        comfy.loader.load(str(truncated))
    page = tmp_path / "page.safetensors"
    page.write_bytes(b"<!DOCTYPE html><html>not found</html>")
    with pytest.raises(ValueError, match="web page"):
        comfy.loader.load(str(page))
    incomplete = tmp_path / "incomplete.safetensors"
    missing = "single_blocks.0.linear2.weight"
    save_file({k: v for k, v in load_file(path).items() if not k.startswith(missing)}, incomplete)
    with pytest.raises(ValueError, match="single_blocks.0.linear2.weight"):
        comfy.loader.load(str(incomplete))


@pytest.mark.parametrize("activations", ["full", "int8"])
def test_gradients_cross_a_ternary_layer(comfy, path, activations):
    """As those of the dense layer: what is trained before it, such as a LoRA in bypass mode, learns the right thing."""
    layer = comfy.loader.load(str(path), activations).model.diffusion_model.get_submodule(QKV)
    dense = open_ternary(path).weight(QKV).dequantize()
    x = torch.randn(2, 3, dense.shape[1], generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, (2 * y.detach()) @ dense, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(layer(x), y)
