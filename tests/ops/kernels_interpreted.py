"""Every kernel and mode in Triton's interpreter against float64; test_kernels.py runs this file in its own process.

The interpreter must be chosen before Triton is imported, knows no inline PTX (test_kernels_decode.py emulates that) and
multiplies bf16 wrongly, so activations are fp16 and fp32 here.
"""

import math

import pytest
import torch
from ternary_flux.ops import TernaryWeight, group_codes, ternary_linear
from ternary_flux.ops.backends import eager
from ternary_flux.ops.backends.triton import backend as triton
from ternary_flux.ops.backends.triton import configs, dispatch
from ternary_flux.ops.backends.triton.quantize_rows import quantize_rows
from ternary_flux.ops.codes import group_codes_in_torch

SCALES = ("row", "integer", "float")


@pytest.fixture(params=["portable", "sm_90"])
def chip(request, monkeypatch):
    """Products of K = 32 and of K = 128, with the tiles of such GPUs and the portable decode."""
    wide = () if request.param == "portable" else ("int8", "e4m3", "a16")
    chip = configs.Chip("interpreter", request.param, 8, False, wide, ("int8", "e4m3", "full"))
    monkeypatch.setattr(configs, "chip", lambda device: chip)


def make(n, k, scales="integer", rank=0, seed=0, terms=1, column=False):
    """(weight, its float64 dense form)"""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, (n, terms * k), dtype=torch.int8, generator=g)
    blocks = terms * math.ceil(k / 128)
    scale, group = torch.rand(n, generator=g) * 0.01 + 1e-3, None
    per_block = scale.double().expand(blocks, n)
    if scales == "integer":
        group = torch.randint(1, 128, (blocks, n), dtype=torch.uint8, generator=g)
        per_block = per_block * group.double()
    if scales == "float":
        scale = (torch.rand(blocks, n, generator=g) * 0.01 + 1e-3).half()
        per_block = scale.double()
    down = torch.randn(rank, k, generator=g).bfloat16() * 0.1 if rank else None
    up = torch.randn(n, rank, generator=g).bfloat16() * 0.1 if rank else None
    per_input = [term.t().repeat_interleave(128, 1)[:, :k] for term in per_block.chunk(terms)]
    dense = (codes.double() * torch.cat(per_input, 1)).view(n, terms, k).sum(1)
    # exact in the dtypes of the activations
    columns = (torch.randn(k, generator=g) * 0.7).exp().half().float() if column else None
    if column:
        dense *= columns.double()
    if rank:
        dense += up.double() @ down.double()
    return TernaryWeight.from_codes(codes, scale, group, down=down, up=up, terms=terms, column=columns), dense


def error(y, expected):
    return ((y.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_quantize_rows_int8(dtype):
    x = torch.randn(5, 500, dtype=dtype)[:, :300]  # row stride 500, K padded to 384
    x[2] = 0
    codes, scale = quantize_rows(x, 384)
    expected, expected_scale = eager.quantize_tokens(x)
    assert not codes[:, 300:].any() and not codes[2].any() and scale[2] == 1
    torch.testing.assert_close(scale[:, None], expected_scale, rtol=3e-7, atol=0)
    different = (codes[:, :300].int() - expected.int()).abs()
    assert different.max() <= 1 and different.sum() <= 1  # a product with 1 / scale may round a tie the other way


def test_quantize_rows_multiplies_by_the_column_scales():
    x, column = torch.randn(5, 300).half(), (torch.randn(300) * 0.7).exp().bfloat16()
    codes, scale = quantize_rows(x, 384, torch.int8, column)
    expected, expected_scale = eager.quantize_tokens(x.float() * column.float())
    torch.testing.assert_close(scale[:, None], expected_scale, rtol=3e-7, atol=0)
    different = (codes[:, :300].int() - expected.int()).abs()
    assert not codes[:, 300:].any() and different.max() <= 1 and different.sum() <= 1


def test_quantize_rows_keeps_broken_activations_visible():
    x = torch.randn(3, 128, dtype=torch.float16)
    x[0, 5], x[1, 7] = math.nan, -math.inf
    weight, _ = make(16, 128)
    _, scale = quantize_rows(x, 128)
    assert scale.isnan()[0] and scale.isinf()[1] and scale.isfinite()[2]
    y = ternary_linear(x, weight, None, "int8", "triton")
    assert y.isfinite().all(1).tolist() == [False, False, True]


def test_quantize_rows_e4m3():
    x = torch.randn(4, 200, dtype=torch.float32)
    codes, scale = quantize_rows(x, 256, torch.float8_e4m3fn)
    assert not codes[:, 200:].float().any()
    assert (codes.float().abs().amax(1) == 448).all()
    # the interpreter forgets the carry where rounding reaches the next power of two; test_codegen.py sees hardware's
    right = ((codes[:, :200].float() * scale[:, None] - x).abs() <= x.abs() * 0.063 + 2**-10 * scale[:, None]).float()
    assert right.mean() > 0.95


@pytest.mark.parametrize("activations", ["int8", "e4m3"])
@pytest.mark.parametrize("scales", SCALES[:2])
@pytest.mark.parametrize(
    "m, n, k, rank, terms, column",
    [
        (1, 72, 1100, 0, 1, False),
        (20, 43, 384, 3, 1, False),
        (70, 136, 300, 0, 1, True),
        (20, 40, 300, 3, 2, False),
        (20, 40, 300, 3, 2, True),
    ],
)
def test_eight_bit(chip, activations, scales, m, n, k, rank, terms, column):
    """Against the float64 product of the kernel's own codes: int8 is exact up to the fp32 epilogue."""
    weight, dense = make(n, k, scales, rank, terms=terms, column=column)
    # the interpreter multiplies bf16 wrongly, which is the low-rank branch's dtype where activations are fp32
    x, bias = torch.randn(m, k, dtype=torch.float16 if rank else torch.float32), torch.randn(n)
    dtype = torch.int8 if activations == "int8" else torch.float8_e4m3fn
    codes, scale = quantize_rows(x, 128 * math.ceil(k / 128), dtype, weight.column)
    seen = codes[:, :k].double() * scale.double()[:, None]
    seen = seen if weight.column is None else seen / weight.column.double()
    expected = bias.double() + seen @ dense.t()
    if rank:
        expected += (x.double() - seen) @ (weight.up.double() @ weight.down.double()).t()
    y = triton.linear(x, weight, bias, activations)
    assert y.dtype == x.dtype and y.is_contiguous()
    assert error(y, expected) < (1e-3 if rank else 3e-7 if activations == "int8" else 2e-6)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize(
    "m, n, k, rank, terms, column",
    [
        (1, 72, 1100, 0, 1, True),
        (20, 43, 384, 3, 1, False),
        (20, 40, 384, 0, 1, True),
        (70, 136, 300, 2, 1, True),
        (20, 40, 300, 3, 2, False),
        (20, 40, 300, 3, 2, True),
    ],
)
def test_full(chip, scales, m, n, k, rank, terms, column):
    weight, dense = make(n, k, scales, rank, terms=terms, column=column)
    x, bias = torch.randn(m, k).half(), torch.randn(n).half()
    y = triton.linear(x, weight, bias, "full")
    assert y.dtype == torch.float16 and y.is_contiguous()
    assert error(y, x.double() @ dense.t() + bias.double()) < 1e-3


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("scratch", [1 << 30, 1 << 16])
@pytest.mark.parametrize("dtype, bound, column", [(torch.float16, 1e-3, True), (torch.float32, 1e-6, False)])
def test_dense(monkeypatch, scales, scratch, dtype, bound, column):
    """Dequantize and torch's matmul: more tokens than linear_a16 takes, or fp32; whole and in parts over N."""
    monkeypatch.setattr(dispatch, "SCRATCH_BYTES", scratch)
    weight, dense = make(200, 264, scales, column=column)
    x, bias = torch.randn(300, 264, dtype=dtype), torch.randn(200)
    for b in (None, bias):
        y = triton.linear(x, weight, b, "full")
        assert y.dtype == dtype and y.is_contiguous()
        assert error(y, x.double() @ dense.t() + (0 if b is None else b.double())) < bound


@pytest.mark.parametrize("rank, terms, column", [(0, 1, False), (5, 2, True)])
@pytest.mark.parametrize("dtype, bound", [(torch.float16, 1e-3), (torch.bfloat16, 3e-3), (torch.float32, 1e-6)])
def test_turing(monkeypatch, dtype, bound, rank, terms, column):
    """No product in a kernel; bf16 is rounded once, at the end."""
    turing = configs.Chip("interpreter", "sm_75", 8, False, (), ("full",), products=False)
    monkeypatch.setattr(configs, "chip", lambda device: turing)
    weight, dense = make(200, 264, "integer", rank, terms=terms, column=column)
    x, bias = torch.randn(3, 264).to(dtype), torch.randn(200).to(dtype)
    y = triton.linear(x, weight, bias, "full")
    assert y.dtype == dtype and error(y, x.double() @ dense.t() + bias.double()) < bound


@pytest.mark.parametrize("terms", [1, 2])
def test_dense_with_low_rank(monkeypatch, terms):
    monkeypatch.setattr(dispatch, "SCRATCH_BYTES", 1 << 16)
    weight, dense = make(200, 264, "integer", rank=5, terms=terms, column=terms == 1)
    x = torch.randn(300, 264).half()
    assert error(triton.linear(x, weight, None, "full"), x.double() @ dense.t()) < 1e-3


@pytest.mark.parametrize("activations", ["int8", "full"])
def test_splits_do_not_change_int8_results(monkeypatch, activations):
    weight, dense = make(40, 2048)
    x = torch.randn(3, 2048).half()
    results = []
    for splits in (1, 2, 4):
        tile = configs.Tile(16, 64, 4, 2, splits)
        monkeypatch.setattr(configs, "tile", lambda *_, tile=tile: tile)
        monkeypatch.setattr(configs, "chip", lambda device: configs.Chip("", "portable", 64, False, (), ()))
        results.append(triton.linear(x, weight, None, activations))
    assert error(results[0], x.double() @ dense.t()) < (2e-2 if activations == "int8" else 1e-3)
    for other in results[1:]:
        if activations == "int8":
            assert torch.equal(other, results[0])
        assert error(other, results[0].double()) < 1e-3


def test_int8_sums_are_exact_at_the_extremes():
    """The largest sum a FLUX layer with two terms can meet, 127 * 127 * 49152, and the largest of the +-64 form."""
    for group in (torch.full((384, 16), 127, dtype=torch.uint8), None):
        weight = TernaryWeight.from_codes(torch.ones(16, 49152, dtype=torch.int8), torch.ones(16), group, terms=2)
        x = torch.full((1, 24576), 127.0)
        y = triton.linear(x, weight, None, "int8")
        expected = torch.full_like(y, 127 * 49152 * (1 if group is None else 127))
        torch.testing.assert_close(y, expected, rtol=3e-7, atol=0)  # one rounding of the token scale


@pytest.mark.parametrize("activations", ["int8", "full"])
def test_shapes_and_strides(activations):
    weight, dense = make(24, 256)
    wide = torch.randn(2, 6, 512).half()
    for x in (wide[..., ::2], wide[..., 128:384], wide.transpose(0, 1)[..., :256], wide[:, ::2, :256]):
        y = ternary_linear(x, weight, None, activations, "triton")
        assert y.shape == (*x.shape[:-1], 24)
        assert error(y, x.double() @ dense.t()) < 2e-2
    assert ternary_linear(wide[:0, :, :256], weight, None, activations, "triton").shape == (0, 6, 24)
    rows = weight.rows(8, 24)  # strided views, as of a sharded weight
    assert error(ternary_linear(wide[..., :256], rows, None, activations, "triton"),
                 wide[..., :256].double() @ dense[8:].t()) < 2e-2  # fmt: skip


def test_float_groups_need_conversion_for_8_bits():
    weight, dense = make(24, 256, "float")
    x = torch.randn(3, 256).half()
    with pytest.raises(ValueError, match="with_integer_groups"):
        triton.linear(x, weight, None, "int8")
    assert error(triton.linear(x, weight.with_integer_groups()[0], None, "int8"), x.double() @ dense.t()) < 2e-2
    codes, scale = quantize_rows(x, 256, torch.float8_e4m3fn)  # e4m3 takes them as they are
    expected = (codes.double() * scale.double()[:, None]) @ dense.t()
    assert error(triton.linear(x, weight, None, "e4m3"), expected) < 1e-3
    with pytest.raises(ValueError, match="float64"):
        triton.linear(x.double(), weight, None, "full")


@pytest.mark.parametrize("activations", ["int8", "full"])
def test_torch_compile_sees_one_node(activations):
    weight, _ = make(24, 256, column=True)
    bias, nodes = torch.randn(24), []

    def backend(graph, inputs):
        nodes.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    compiled = torch.compile(
        lambda x: ternary_linear(x, weight, bias, activations, "triton"), fullgraph=True, backend=backend
    )
    x = torch.randn(3, 5, 256).half()
    assert torch.equal(compiled(x), ternary_linear(x, weight, bias, activations, "triton"))
    assert len(nodes) == 1 and "ternary_flux.linear" in str(nodes[0])


def test_the_interpreter_counts_as_a_device():
    assert triton.unavailable(torch.device("cpu")) is None


@pytest.mark.parametrize("descent", [False, True])
def test_group_codes(descent):
    """Against the loops in torch; outputs without a scale stay without codes."""
    n, g = 20, torch.Generator().manual_seed(1)
    root = torch.randn(128, 256, generator=g) / 16
    hessian = root @ root.t() + 0.03 * torch.eye(128)
    weights = hessian if descent else torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    scale = torch.rand(n, generator=g) + 0.5
    scale[3] = 0
    old = torch.randint(-1, 2, (128, n), generator=g).float() if descent else None
    block = torch.randn(128, n, generator=g)
    scale = torch.stack([scale, scale + 1], 1)[:, 0]  # calibrate's are columns of a matrix
    given = scale, weights, weights.diagonal().reciprocal(), old
    codes, changes = group_codes(block.clone(), *given)
    expected, expected_changes = group_codes_in_torch(block.clone(), *given)
    same = (codes == expected).all(0)  # of an output: a tie that rounds the other way is passed on
    assert same.sum() >= n - 1 and codes.unique().tolist() == [-1, 0, 1] and not codes[:, 3].any()
    torch.testing.assert_close(changes[:, same], expected_changes[:, same], rtol=1e-4, atol=1e-4)
