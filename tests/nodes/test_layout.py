"""The ternary weight as a tensor of ComfyUI: arithmetic, moving, flattening, gathering, and dynamic VRAM."""

import dataclasses
import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
from ternary_flux.tests.nodes import adapters, tiny
from torch.nn.functional import linear

N, K = 96, 200
VARIANTS = {
    "integer": {},
    "float": {"float_groups": True},
    "low rank": {"rank": 8},
    "two terms": {"terms": 2},
    "column scales": {"columns": True},
    "column scales, low rank": {"columns": True, "rank": 8},
}


@pytest.fixture(params=VARIANTS)
def weight(request, comfy):
    return comfy.layout.wrap(tiny.ternary_weight((N, K), tiny.generator(0), **VARIANTS[request.param]), torch.float32)


def test_says_what_it_is(comfy, weight):
    assert tuple(weight.shape) == (N, K)
    assert weight.dtype == torch.float32
    assert comfy.layout.is_ternary(weight)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_algebra_never_goes_dense(comfy, weight, mode, with_bias, monkeypatch):
    bias = torch.randn(N) if with_bias else None
    dense = weight.dequantize()
    monkeypatch.setattr(comfy.layout.TernaryLayout, "dequantize", lambda *_: pytest.fail("dequantized"))
    x = torch.randn(2, 3, K)
    with mode():
        torch.testing.assert_close(linear(x, weight, bias), linear(x, dense, bias), rtol=1e-4, atol=1e-5)
        if mode is torch.no_grad:
            torch.testing.assert_close(x[0] @ weight.t(), x[0] @ dense.t(), rtol=1e-4, atol=1e-5)


def test_other_operations_use_the_dense_weight(weight):
    dense = weight.dequantize()
    torch.testing.assert_close(weight + 1, dense + 1)
    torch.testing.assert_close(weight.t().dequantize(), dense.t())
    torch.testing.assert_close(torch.randn(3, N) @ weight.t().t() * 0, torch.zeros(3, K))
    torch.testing.assert_close(linear(dense[:2], weight.t().t()), dense[:2] @ dense.t(), rtol=1e-4, atol=1e-4)


def test_moves_and_copies_take_every_tensor_along(weight):
    moved = weight.to("meta")
    assert {tensor.device.type for tensor in tensors_of(moved)} == {"meta"}
    assert weight.to(dtype=torch.bfloat16).dequantize().dtype == torch.bfloat16
    copy = torch.empty_like(weight)
    copy.copy_(weight)
    assert torch.equal(copy.dequantize(), weight.dequantize())


def tensors_of(weight):
    return [weight._qdata, *(getattr(weight._params, field) for field in weight._params._tensor_fields())]


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("terms, bound", [(1, 0.01), (2, 0.15)])  # one term is 0.36 off from two
def test_quantizing_keeps_a_ternary_weight(comfy, terms, bound, columns):
    ternary = tiny.ternary_weight((N, 256), tiny.generator(0), terms=terms, columns=columns)
    weight = comfy.layout.wrap(ternary, torch.float32, "full")
    options = {"scale": "recalculate", "stochastic_rounding": 1, "inplace_ops": True}
    again = weight.requantize_from_float(weight.dequantize(), **options)
    assert again._params.activations == "full" and again._qdata.shape == weight._qdata.shape
    assert tiny.distance(again.dequantize(), weight.dequantize()) < bound


def test_state_dict_and_back(comfy, weight):
    entries = comfy.linear.entries(weight, "layer.")
    configuration = comfy.linear.read_configuration(entries, "layer.")
    expected = {"format": "ternary_v1", "packing": "planes32", "group_size": 128, "shape": [N, K]}
    terms = weight._qdata.shape[0] // 2
    assert configuration == (expected if terms == 1 else expected | {"terms": terms})
    again = comfy.linear.take_weight(entries, "layer.")
    assert not entries
    assert torch.equal(again.dequantize(), weight.dequantize())


@pytest.fixture
def second_copy(comfy):
    """The layout of the pack imported a second time, under another name."""
    from ternary_flux import __file__ as root

    folder = root.removesuffix("__init__.py")
    spec = importlib.util.spec_from_file_location("second_copy", root, submodule_search_locations=[folder])
    package = importlib.util.module_from_spec(spec)
    sys.modules["second_copy"] = package
    try:
        spec.loader.exec_module(package)
        yield importlib.import_module("second_copy.nodes.layout")
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "second_copy"]:
            del sys.modules[name]


def test_two_copies_of_the_pack_do_not_disturb_each_other(comfy, weight, request, monkeypatch):
    x = torch.randn(3, K)
    with torch.inference_mode():
        before = linear(x, weight)
    second = request.getfixturevalue("second_copy")
    ternary = comfy.layout.ternary_weight(weight._qdata, weight._params)
    theirs = second.wrap(second.TernaryWeight(**vars(ternary)), torch.float32)
    assert second.is_ternary(theirs) and not second.is_ternary(weight) and not comfy.layout.is_ternary(theirs)
    with torch.inference_mode():
        torch.testing.assert_close(linear(x, theirs), before, rtol=1e-4, atol=1e-5)
        # Each multiplies by its own weights alone.
        monkeypatch.setattr(second, "ternary_linear", lambda *_: pytest.fail("the second copy"))
        torch.testing.assert_close(linear(x, weight), before, rtol=1e-4, atol=1e-5)
        monkeypatch.undo()
        monkeypatch.setattr(comfy.layout, "ternary_linear", lambda *_: pytest.fail("the first copy"))
        torch.testing.assert_close(linear(x, theirs), before, rtol=1e-4, atol=1e-5)


def test_gathers_into_one_buffer(comfy, weight):
    """Dynamic VRAM copies a layer's tensors into one buffer and views them there."""
    from comfy import memory_management

    bias = torch.randn(N)
    buffer = torch.zeros(memory_management.vram_aligned_size([weight, bias]), dtype=torch.uint8)
    comfy.model_management.cast_to_gathered([weight, bias], buffer)
    geometry = memory_management.tensors_to_geometries([weight, bias])
    gathered, gathered_bias = memory_management.interpret_gathered_like(geometry, buffer)
    assert torch.equal(gathered.dequantize(), weight.dequantize())
    assert torch.equal(gathered_bias, bias)
    assert gathered._params.activations == weight._params.activations


@pytest.fixture
def dynamic_layer(comfy, path):
    """A ternary Linear as dynamic VRAM holds it: its weight gathered in a buffer, waiting for the next call.

    The memory itself needs a GPU; here the buffer lies in CPU memory and the module claims its weights do not.
    """
    from comfy import memory_management

    model = comfy.loader.load(str(path), "full")
    layer = model.model.diffusion_model.double_blocks[0].img_attn.qkv
    tensors = [layer.weight, layer.bias]
    buffer = torch.zeros(memory_management.vram_aligned_size(tensors), dtype=torch.uint8)
    comfy.model_management.cast_to_gathered(tensors, buffer)
    layer.seed_key = "layer"
    layer._prefetch = {
        "signature": 1,
        "resident": False,
        "xfer_dest": buffer,
        "cast_dest": None,
        "cast_geometry": memory_management.tensors_to_geometries(tensors),
        "needs_cast": False,
    }
    return SimpleNamespace(layer=layer, model=model)


@pytest.mark.feature("Dynamic VRAM", "simulated on the CPU")
@pytest.mark.parametrize("kind", ["none", "lora", "dora"])
def test_dynamic_vram_keeps_loras_whole(comfy, dynamic_layer, kind):
    """Core's own path would add the LoRA, requantize, and lose it."""
    from comfy import ops

    layer = dynamic_layer.layer
    up, down = torch.randn(768, 4) * 0.05, torch.randn(4, 256) * 0.05
    scale = torch.rand(768, 1) + 0.5 if kind == "dora" else None
    adapter = comfy.lora.comfy.LoRAAdapter(set(), (up, down, None, None, scale, None))
    patches = [] if kind == "none" else [(1.0, adapter, 1.0, None, None)]
    layer.weight_lowvram_function = comfy.model_patcher.LowVramPatch("key", {"key": patches})
    comfy.lora.build("key", patches, tiny.CPU, torch.float32).attach(layer)
    dense = layer.weight.dequantize()
    if patches:
        dense = comfy.lora.comfy.calculate_weight(patches, dense, "key")
    weight, bias = ops.resolve_cast_module_with_vbar(layer, torch.float32, tiny.CPU, torch.float32, torch.float32, True)
    x = torch.randn(3, 256)
    y = layer._multiply(x, weight, bias)
    if layer.branch is not None:
        layer.branch.add_to(y, x)
    torch.testing.assert_close(y, linear(x, dense, layer.bias), rtol=1e-4, atol=1e-4)


def test_the_dynamic_patcher_falls_back_on_cpus(comfy, path):
    model = comfy.loader.load(str(path))
    patcher = comfy.patcher.TernaryPatcherDynamic(model.model, model.load_device, model.offload_device)
    assert type(patcher) is comfy.patcher.TernaryPatcher


@pytest.fixture
def dynamic_model(comfy, path, monkeypatch):
    """A model in ComfyUI's dynamic patcher. Its memory needs a GPU; without one only the bookkeeping around it runs."""
    import comfy_aimdo.host_buffer

    monkeypatch.setattr(comfy_aimdo.host_buffer, "HostBuffer", lambda *_: SimpleNamespace(size=0))
    model = comfy.loader.load(str(path), "full")
    patcher = object.__new__(comfy.patcher.TernaryPatcherDynamic)  # its constructor gives CPUs another class
    patcher.__init__(model.model, model.load_device, model.offload_device)
    patcher.cached_patcher_init = model.cached_patcher_init
    return patcher


def test_the_dynamic_patcher_attaches_loras_and_drops_cores_patches(comfy, dynamic_model, twin, reference):
    layer = dynamic_model.model.diffusion_model.double_blocks[0].img_attn.qkv
    for loras in ([], adapters.COMBINATIONS["stacked"], adapters.COMBINATIONS["dora and lora"], []):
        model = adapters.apply(comfy, dynamic_model, loras)
        model.partially_load(tiny.CPU)
        assert layer.weight_lowvram_function is None
        assert tiny.distance(tiny.run(model), adapters.merged(comfy, twin, loras)) < 1e-5


def test_a_clone_without_dynamic_vram_keeps_loras(comfy, dynamic_model, twin):
    loras = adapters.COMBINATIONS["stacked"]
    clone = adapters.apply(comfy, dynamic_model, loras).clone(disable_dynamic=True)
    assert type(clone) is comfy.patcher.TernaryPatcher
    comfy.model_management.load_models_gpu([clone])
    assert tiny.distance(tiny.run(clone), adapters.merged(comfy, twin, loras)) < 1e-5


def test_an_unloaded_dynamic_model_can_be_saved(dynamic_model, path):
    state = dynamic_model.state_dict_for_saving()
    weight = state["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"]
    assert weight.dtype == torch.uint8


def test_parameters_are_frozen(comfy, weight):
    with pytest.raises(dataclasses.FrozenInstanceError):
        weight._params.scale = None
