"""reduce_splits: adds the partial sums of a matrix kernel whose inputs were split, and finishes the output.

    partial [S, M, N] int32 or fp32 -> y [M, N]

Splitting keeps every multiprocessor busy when there are few tokens. The sums are added in a fixed order: results do
not change from run to run, and int32 sums do not depend on the number of splits either.
"""

import triton
import triton.language as tl

from .configs import ceil_div
from .tiling import finish

BLOCK_M, BLOCK_N, WARPS = 16, 64, 4


@triton.jit(do_not_specialize=["M", "splits"])
def _reduce_splits(
    partial_ptr,
    token_scale_ptr,
    row_scale_ptr,
    low_ptr,
    up_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    splits,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr,
    TOKEN_SCALE: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    RANK: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (n[:, None] < N) & (m[None, :] < M)
    ptrs = partial_ptr + m.to(tl.int64)[None, :] * N + n[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_M), partial_ptr.dtype.element_ty)
    for _ in range(0, splits):
        total += tl.load(ptrs, mask=inside, other=0)
        ptrs += M.to(tl.int64) * N
    y = total.to(tl.float32)
    if TOKEN_SCALE:
        y *= tl.load(token_scale_ptr + m, mask=m < M, other=0.0)[None, :]
    finish(y, y_ptr, row_scale_ptr, bias_ptr, low_ptr, up_ptr, m, n, M, N, UNIT, ROW_SCALE, BIAS, RANK)


def reduce_splits(partial, token_scale, row_scale, low, up, bias, y, unit):
    """Launches the kernel on y [M, N]. `unit` is what a decoded +1 counts; a scale of None is 1."""
    m, n = y.shape
    _reduce_splits[(ceil_div(n, BLOCK_N), ceil_div(m, BLOCK_M))](
        partial,
        token_scale,
        row_scale,
        low,
        up,
        bias,
        y,
        m,
        n,
        partial.shape[0],
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        UNIT=unit,
        TOKEN_SCALE=token_scale is not None,
        ROW_SCALE=row_scale is not None,
        BIAS=bias is not None,
        RANK=0 if up is None else up.shape[1],
        num_warps=WARPS,
    )
