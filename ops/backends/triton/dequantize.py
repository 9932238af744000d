"""dequantize: a ternary weight to a dense one, for torch's own matmul.

    trits [terms * blocks, N, 32], scales, column scales, low-rank factors -> [N, K] fp16 / bf16 / fp32

Scales, low-rank part and sums are fp32; each weight is rounded once.
"""

import triton
import triton.language as tl

from .configs import ceil_div
from .decode import planes16

BLOCK_N, WARPS = 64, 4


@triton.jit
def _block(trits_ptr, group_ptr, scale, j, n, i, trits_stride, group_stride, GROUPS, LANE, PTX):
    """Block j of one term times its scales: four fp32 [BLOCK_N, 32], inputs i, 32 + i, 64 + i and 96 + i."""
    trits = tl.load(trits_ptr + j * trits_stride + n[:, None] * 32 + i[None, :])
    if GROUPS:
        scale *= tl.load(group_ptr + j * group_stride + n).to(tl.float32)
    w0, w1, w2, w3 = planes16(trits, LANE, PTX)
    scale = scale[:, None]
    return w0.to(tl.float32) * scale, w1.to(tl.float32) * scale, w2.to(tl.float32) * scale, w3.to(tl.float32) * scale


@triton.jit
def _dequantize(
    trits_ptr,
    row_scale_ptr,
    group_ptr,
    column_ptr,
    down_ptr,
    up_ptr,
    out_ptr,
    N,
    K,
    trits_stride,
    group_stride,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    COLUMN: tl.constexpr,
    RANK: tl.constexpr,
    TERMS: tl.constexpr,
    PTX: tl.constexpr,
):
    OUT_TYPE: tl.constexpr = out_ptr.dtype.element_ty
    LANE: tl.constexpr = tl.float16 if OUT_TYPE == tl.float32 else OUT_TYPE
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.program_id(1)
    i = tl.arange(0, 32)
    n_safe = tl.where(n < N, n, 0)
    scale = tl.full((BLOCK_N,), 0.5, tl.float32)
    if ROW_SCALE:
        scale *= tl.load(row_scale_ptr + n_safe)
    weights = _block(trits_ptr, group_ptr, scale, block, n_safe, i, trits_stride, group_stride, GROUPS, LANE, PTX)
    if TERMS == 2:
        j = tl.num_programs(1) + block
        second = _block(trits_ptr, group_ptr, scale, j, n_safe, i, trits_stride, group_stride, GROUPS, LANE, PTX)
    if RANK > 0:
        PADDED: tl.constexpr = max(16, triton.next_power_of_2(RANK))
        r = tl.arange(0, PADDED)
        up = tl.load(up_ptr + n_safe[:, None] * RANK + r[None, :], mask=r[None, :] < RANK, other=0.0)
    for quarter in tl.static_range(4):
        dense = weights[quarter]
        if TERMS == 2:
            dense += second[quarter]
        k = block * 128 + quarter * 32 + i
        if COLUMN:
            dense *= tl.load(column_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
        if RANK > 0:
            inside = (r[:, None] < RANK) & (k[None, :] < K)
            dense = tl.dot(up, tl.load(down_ptr + r[:, None] * K + k[None, :], mask=inside, other=0.0), dense)
        offsets = n.to(tl.int64)[:, None] * K + k[None, :]
        tl.store(out_ptr + offsets, dense.to(OUT_TYPE), mask=(n[:, None] < N) & (k[None, :] < K))


def dequantize(weight, down, up, out, chip):
    """Launches the kernel on out [N, K]. down [r, K] and up [N, r] have one 16-bit dtype; both may be None."""
    n, k = out.shape
    row_scale, group = (None, weight.scale) if weight.scale.ndim == 2 else (weight.scale, weight.group)
    _dequantize[(ceil_div(n, BLOCK_N), weight.trits.shape[0] // weight.terms)](
        weight.trits,
        row_scale,
        group,
        weight.column,
        down,
        up,
        out,
        n,
        k,
        weight.trits.stride(0),
        0 if group is None else group.stride(0),
        BLOCK_N=BLOCK_N,
        GROUPS=group is not None,
        ROW_SCALE=row_scale is not None,
        COLUMN=weight.column is not None,
        RANK=0 if up is None else up.shape[1],
        TERMS=weight.terms,
        PTX=chip.ptx,
        num_warps=WARPS,
    )
    return out
