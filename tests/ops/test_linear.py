"""`ternary_linear` against float64, in every scale form and activation mode, on every backend that runs here."""

import importlib.util
import inspect
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ternary_flux.ops import TernaryWeight, linear, registry, resolve, ternary_linear
from ternary_flux.ops.backends import eager
from ternary_flux.ops.scales import fit_integer_groups
from ternary_flux.tests.builders import ternary_weight
from torch.utils._python_dispatch import TorchDispatchMode

import _pack

COLUMNS = st.sampled_from([None, torch.bfloat16, torch.float32])
DIMENSIONS = st.tuples(st.integers(0, 20), st.integers(1, 70), st.integers(1, 520))


def reference(x, weight, bias=None):
    """float64, from the definition."""
    n, k = weight.shape
    scale = weight.scale.double()
    if weight.scale.ndim == 1:
        scale = scale.expand(weight.trits.shape[0], n)
        if weight.group is not None:
            scale = scale * weight.group.double()
    terms = zip(weight.codes().double().split(k, 1), scale.chunk(weight.terms), strict=True)
    dense = sum(codes * term.t().repeat_interleave(128, 1)[:, :k] for codes, term in terms)
    if weight.column is not None:
        dense = dense * weight.column.double()
    if weight.up is not None:
        dense = dense + weight.up.double() @ weight.down.double()
    return torch.nn.functional.linear(x.double(), dense, bias)


def relative_error(y, expected):
    return ((y.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("scales", ["row", "integer", "bf16"])
@pytest.mark.parametrize("rank", [0, 3])
@given(dims=DIMENSIONS, seed=st.integers(0, 1000), with_bias=st.booleans(), terms=st.integers(1, 2), column=COLUMNS)
@settings(max_examples=20)
def test_full(scales, rank, dims, seed, with_bias, terms, column):
    m, n, k = dims
    weight = ternary_weight(n, k, scales, rank, seed, terms, column)
    x = torch.randn(m, k)
    bias = torch.randn(n).double() if with_bias else None
    # bf16 group scales are exact in fp32, so only the summation order differs
    torch.testing.assert_close(
        ternary_linear(x, weight, bias).double(), reference(x, weight, bias), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("scales", ["row", "integer"])
@given(dims=DIMENSIONS, seed=st.integers(0, 1000), terms=st.integers(1, 2), column=COLUMNS)
@settings(max_examples=25)
def test_int8_is_exact_integer_arithmetic(scales, dims, seed, terms, column):
    """int8 equals the float64 product of the quantized tokens: the only error is the epilogue's fp32 rounding."""
    m, n, k = dims
    weight = ternary_weight(n, k, scales, seed=seed, terms=terms, column=column)
    x = torch.randn(m, k)
    scaled = x if column is None else x * weight.column
    scale = (scaled.abs().amax(1, keepdim=True) / 127).clamp_min(1e-30)
    quantized = (scaled / scale).round().double() * scale.double()
    expected = reference(quantized, replace(weight, column=None))
    torch.testing.assert_close(ternary_linear(x, weight, activations="int8").double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activations", ["full", "int8"])
def test_the_low_rank_part_sees_the_inputs_as_they_come(activations):
    """A column scale of 0 takes an input from the trits alone."""
    weight = ternary_weight(24, 300, rank=3, column=torch.float32)
    weight.column[7:] = 0
    x = torch.randn(5, 300)
    x[:, :7] = 0
    expected = x.double() @ (weight.up.double() @ weight.down.double()).t()
    torch.testing.assert_close(
        ternary_linear(x, weight, activations=activations).double(), expected, rtol=1e-5, atol=1e-4
    )


@pytest.fixture(params=[True, False], ids=["int_mm", "fp32"])
def int8_products(request, monkeypatch):
    """As on this machine, and as where torch._int_mm saturates or is missing: fp32 blocks give the same integers."""
    if not request.param:
        monkeypatch.setattr(eager, "_int_mm_is_exact", lambda device: False)


@pytest.mark.parametrize("m, k", [(5, 15360), (5, 2 * 24576), (40, 1024)])
def test_int8_accumulates_exactly_at_the_extremes(int8_products, m, k):
    """All products +127*127: FLUX.1's and twice (two terms) FLUX.2's longest row, beyond what fp32 holds exactly."""
    groups = torch.full((k // 128, 16), 127, dtype=torch.uint8)
    weight = TernaryWeight.from_codes(torch.ones(16, k, dtype=torch.int8), torch.ones(16), groups)
    x = torch.full((m, k), 127.0)  # a token scale of 1
    x[:, 0] = 126.0  # odd tail in the low bits
    y = ternary_linear(x, weight, activations="int8", backend="eager")
    assert torch.equal(y, torch.full((m, 16), 127 * (127 * k - 1)).float())


@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("scales", ["row", "integer"])
def test_int8_equals_the_integer_product(int8_products, scales, terms):
    weight = ternary_weight(24, 3000, scales, terms=terms)
    codes = torch.randint(-127, 128, (9, 3000))
    codes[:, 0] = 127
    y = ternary_linear(codes.float(), weight, activations="int8", backend="eager")
    torch.testing.assert_close(y.double(), reference(codes, weight), rtol=1e-6, atol=1e-6)


def test_int8_quality():
    x, weight = torch.randn(64, 512), ternary_weight(96, 512)
    assert 0.001 < relative_error(ternary_linear(x, weight, activations="int8"), reference(x, weight)) < 0.012


@pytest.mark.parametrize("column", [None, torch.bfloat16])
@pytest.mark.parametrize("activations", ["full", "int8"])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)])
def test_dtypes_and_leading_dimensions(dtype, bound, activations, column):
    weight = ternary_weight(48, 300, rank=2, column=column)
    x = torch.randn(2, 7, 600, dtype=dtype)[..., ::2]
    y = ternary_linear(x, weight, torch.ones(48), activations)
    assert y.shape == (2, 7, 48) and y.dtype == dtype and y.is_contiguous()
    bound += 0.012 * (activations == "int8")
    assert relative_error(y, reference(x, weight, torch.ones(48).double())) < bound


@pytest.mark.parametrize("m", [1, 70])
@pytest.mark.parametrize(
    "activations, scales, terms, rank",
    [
        ("full", "row", 1, 0),
        ("full", "integer", 2, 3),
        ("full", "bf16", 1, 3),
        ("full", "bf16", 2, 0),
        ("int8", "row", 1, 0),
        ("int8", "integer", 2, 3),
    ],
)
def test_outputs_in_several_parts(monkeypatch, activations, scales, terms, rank, m):
    """The last part is smaller and K ends within a group."""
    weight, x, bias = ternary_weight(333, 500, scales, rank, terms=terms), torch.randn(m, 500), torch.randn(333)
    whole = ternary_linear(x, weight, bias, activations)
    monkeypatch.setattr(eager, "SCRATCH_BYTES", 100 * 4 * terms * 512)
    y = ternary_linear(x, weight, bias, activations)
    torch.testing.assert_close(y, whole, rtol=1e-5, atol=1e-5)
    assert relative_error(y, reference(x, weight, bias.double())) < (0.012 if activations == "int8" else 1e-6)


def test_half_precision_without_fast_products(monkeypatch):
    """On a CPU whose matmul is slow in 16 bits the product and its epilogue are fp32: one rounding, at the end."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    weight = ternary_weight(48, 300, rank=2)
    for dtype, bound in ((torch.float16, 4e-4), (torch.bfloat16, 3e-3)):
        x = torch.randn(7, 300, dtype=dtype)
        y = ternary_linear(x, weight, torch.ones(48))
        assert y.dtype == dtype and relative_error(y, reference(x, weight, torch.ones(48).double())) < bound


def test_inputs_with_gradients_are_taken_as_numbers():
    x = torch.randn(2, 128, requires_grad=True)
    assert not ternary_linear(x, ternary_weight(8, 128)).requires_grad


def test_zero_token_gives_the_bias():
    weight = ternary_weight(8, 128)
    bias = torch.randn(8)
    assert torch.equal(ternary_linear(torch.zeros(3, 128), weight, bias, "int8"), bias.expand(3, -1))


@pytest.mark.slow
def test_scratch_is_bounded(monkeypatch):
    monkeypatch.setattr(eager, "SCRATCH_BYTES", 1 << 16)
    weight, x = ternary_weight(1000, 512), torch.randn(4, 512)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not out._is_view():
                sizes.append(out.nbytes)
            return out

    for activations in ("full", "int8"):
        sizes.clear()
        with Sizes():
            y = ternary_linear(x, weight, activations=activations)
        bound = 0.012 if activations == "int8" else 1e-6
        assert relative_error(y, reference(x, weight)) < bound
        assert (1 << 15) < max(sizes) <= 1 << 16
    monkeypatch.undo()
    largest = TernaryWeight(  # FLUX.2 [dev]'s linear1, without its memory
        torch.empty(48, 55296, 32, dtype=torch.uint8, device="meta"),
        torch.empty(55296, device="meta"),
        (55296, 6144),
        torch.empty(48, 55296, dtype=torch.uint8, device="meta"),
    )
    sizes.clear()
    with Sizes():
        eager.linear(torch.empty(1, 6144, dtype=torch.bfloat16, device="meta"), largest, None, "full")
    assert 32 << 20 < max(sizes) <= eager.SCRATCH_BYTES == 64 << 20


@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("activations", ["full", "int8"])
def test_compiles_to_one_node(activations, terms):
    weight, bias = ternary_weight(24, 256, rank=2, terms=terms, column=torch.bfloat16), torch.randn(24)
    nodes = []

    def backend(graph, inputs):
        nodes.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    compiled = torch.compile(
        lambda x: ternary_linear(x, weight, bias, activations, "eager"), fullgraph=True, backend=backend
    )
    x = torch.randn(3, 5, 256)
    assert torch.equal(compiled(x), ternary_linear(x, weight, bias, activations))
    assert len(nodes) == 1 and "ternary_flux.linear" in str(nodes[0])


@pytest.mark.parametrize("column", [None, torch.bfloat16])
@pytest.mark.parametrize("activations", ["full", "int8"])
def test_operator_registration(activations, column):
    w = ternary_weight(16, 200, column=column)
    tensors = torch.randn(3, 200), w.trits, w.scale, w.group, None, None, w.column, torch.randn(16)
    args = (*tensors, 16, 200, activations, "eager")
    torch.library.opcheck(torch.ops.ternary_flux.linear.default, args, test_utils=("test_schema", "test_faketensor"))


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="64 features.*16 x 128 needs 128"):
        ternary_linear(torch.randn(2, 64), ternary_weight(16, 128))
    with pytest.raises(ValueError, match="with_integer_groups"):
        ternary_linear(torch.randn(2, 128), ternary_weight(16, 128, "bf16"), activations="int8")


def test_resolve_says_why():
    choice = resolve("cpu")
    assert choice.backend is eager and choice.activations == "full"
    assert "cpu" in choice.reason
    with pytest.raises(ValueError, match="int4"):
        resolve("cpu", "int4")


def test_int8_is_offered_where_it_is_fast(monkeypatch):
    monkeypatch.setattr(eager, "_int_mm_is_exact", lambda device: True)
    assert resolve("cpu", "int8").activations == "int8" and resolve("cpu", "e4m3").activations == "int8"
    monkeypatch.setattr(eager, "_int_mm_is_exact", lambda device: False)
    choice = resolve("cpu", "int8")
    assert choice.activations == "full" and "no int8 kernel for cpu, full instead" in choice.reason


def test_float_group_scales_are_multiplied_by_what_takes_them(monkeypatch):
    w, x = ternary_weight(16, 128, "bf16"), torch.randn(2, 128)
    for formats, expected in ((("int8", "e4m3", "full"), "full"), (("e4m3", "int8", "full"), "e4m3")):
        monkeypatch.setattr(eager, "formats", lambda device, formats=formats: formats)
        choice = resolve("cpu", float_groups=True)
        assert choice.activations == expected and ("row x integer" in choice.reason) == (expected == "full")
        assert resolve("cpu", float_groups=True, full_precision=True).activations == "full"
    monkeypatch.setattr(eager, "formats", lambda device: ("int8", "full"))
    torch.testing.assert_close(ternary_linear(x, w, activations="auto"), ternary_linear(x, w))


def test_a_backend_that_is_asked_for_runs_or_is_refused():
    assert resolve("cpu", backend="eager").backend is eager
    with pytest.raises(ValueError, match="the backend triton cannot run here: .*Choose auto"):
        resolve("cpu", backend="triton")


@pytest.mark.parametrize("name", registry.BACKENDS)
def test_every_backend_has_the_same_interface(name):
    backend, reference = registry.BACKENDS[name], eager
    assert backend.NAME == name
    for function in ("unavailable", "formats", "linear"):
        assert inspect.signature(getattr(backend, function)) == inspect.signature(getattr(reference, function))


@pytest.mark.parametrize("name", registry.BACKENDS)
def test_every_backend_multiplies_or_says_why_not(name):
    backend, cpu = registry.BACKENDS[name], torch.device("cpu")
    reason = backend.unavailable(cpu)
    if reason is not None:
        assert reason.strip() and "\n" not in reason
        return
    formats, weight, x = backend.formats(cpu), ternary_weight(16, 200), torch.randn(3, 200)
    assert "full" in formats and set(formats) < set(registry.ACTIVATIONS)
    for activations in formats:
        y = backend.linear(x, weight, None, activations)
        assert relative_error(y, reference(x, weight)) < (1e-5 if activations == "full" else 0.02)


@pytest.mark.parametrize("terms", [1, 2])
def test_integer_groups_from_float_scales(terms):
    """fp16 group scales survive the conversion to row x integer to 46-52 dB (research figures: Gaussian 51.9 dB)."""
    weight = ternary_weight(64, 1024, "bf16", terms=terms)
    converted, error = weight.with_integer_groups()
    assert converted.terms == terms
    assert converted.scale.shape == (64,) and converted.group.dtype == torch.uint8
    assert 0 < error < 10 ** (-46 / 20)
    assert relative_error(converted.dequantize(), weight.dequantize().double()) < 10 ** (-46 / 20)
    assert converted.with_integer_groups() == (converted, 0.0)


@given(n=st.integers(1, 20), groups=st.integers(1, 9), seed=st.integers(0, 10_000))
@settings(max_examples=50)
def test_fit_integer_groups(n, groups, seed):
    scales = torch.rand(groups, n, generator=torch.Generator().manual_seed(seed)) ** 3
    scales[:, 0] = 0
    row, group = fit_integer_groups(scales)
    assert group.min() >= 1 and group.max() <= 127
    assert ((row * group - scales).abs() <= scales.amax(0) / 125 + 1e-12).all()
    with pytest.raises(ValueError, match="negative"):
        fit_integer_groups(-scales - 1)


@pytest.mark.parametrize("column", [None, torch.bfloat16])
@pytest.mark.parametrize("terms", [1, 2])
def test_rows_are_views_of_the_same_weight(terms, column):
    weight = ternary_weight(20, 300, rank=2, terms=terms, column=column)
    part = weight.rows(5, 12)
    assert torch.equal(part.dequantize(), weight.dequantize()[5:12])
    assert part.trits.untyped_storage().data_ptr() == weight.trits.untyped_storage().data_ptr()


def test_column_scales_count_and_move():
    weight = ternary_weight(20, 300, column=torch.bfloat16)
    assert weight.nbytes == ternary_weight(20, 300).nbytes + 600
    assert weight.to("meta").column.device.type == "meta"
    floats = ternary_weight(20, 300, "bf16", column=torch.float32)
    assert floats.with_integer_groups()[0].column is floats.column


def test_second_import_under_another_name(tmp_path):
    """A pack folder beside an installed package must not register the operator twice."""
    spec = importlib.util.spec_from_file_location("another_name", _pack.ROOT / "__init__.py")
    spec.submodule_search_locations = [str(_pack.ROOT)]
    module = importlib.util.module_from_spec(spec)
    sys.modules["another_name"] = module
    try:
        spec.loader.exec_module(module)
        again = importlib.import_module("another_name.ops")
        assert again.ternary_linear is not linear.ternary_linear
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "another_name"]:
            del sys.modules[name]
