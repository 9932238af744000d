"""linear_a16: fp16 or bf16 activations times ternary weights (W1.58A16), for few tokens.

    y[m, n] = row_scale[n] * sum_j group[j, n] * sum_(k in block j) column[k] * x[m, k] * trit[n, k]
              + (low @ up.T)[m, n] + bias[n]

    x          fp16 / bf16 [M, K], any row stride, any K
    trits      uint8 [blocks, N, 32], planes32; two terms meet inputs that were repeated before the launch
    row_scale  fp32 [N], or absent with float groups
    group      uint8 [blocks, N], or float [blocks, N], optional
    column     [K] in the dtype of x, optional; repeated as x is
    low, up    [M, r], [N, r] in the dtype of x, optional
    bias       [N], optional

Products accumulate in fp32. Trits and integer groups are exact in both dtypes; float groups are rounded to the dtype
of x, as in a dense weight of that dtype. With many tokens the decode cannot be hidden behind 16-bit products: there,
dequantize followed by torch's own matmul is faster.
"""

import torch
import triton
import triton.language as tl

from .decode import join_planes, planes16
from .reduce_splits import reduce_splits
from .tiling import finish, group_pointers, in_words, load_group, tile_of_program


@triton.jit
def _inputs(ptrs, column_ptrs, k, count, COLUMN: tl.constexpr, TAIL: tl.constexpr):
    """A tile of inputs, with COLUMN times their column scales; with TAIL, zeros from index `count` on."""
    if TAIL:
        x = tl.load(ptrs, mask=k[None, :] < count, other=0.0)
        if COLUMN:
            x *= tl.load(column_ptrs, mask=k < count, other=0.0)[None, :]
    else:
        x = tl.load(ptrs)
        if COLUMN:
            x *= tl.load(column_ptrs)[None, :]
    return x


@triton.jit(do_not_specialize=["M", "blocks", "split_blocks"])
def _linear_a16(
    x_ptr,
    column_ptr,
    trits_ptr,
    row_scale_ptr,
    group_ptr,
    low_ptr,
    up_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    blocks,
    split_blocks,
    x_stride,
    trits_stride,
    group_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    GROUPS: tl.constexpr,
    WORDS: tl.constexpr,
    COLUMN: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    RANK: tl.constexpr,
    SPLIT: tl.constexpr,
    TAIL: tl.constexpr,
    JOIN: tl.constexpr,
    PTX: tl.constexpr,
):
    X_TYPE: tl.constexpr = x_ptr.dtype.element_ty
    tile_m, tile_n = tile_of_program(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_safe = tl.where(m < M, m, 0)
    n_safe = tl.where(n < N, n, 0)
    first = tl.program_id(1) * split_blocks
    last = tl.minimum(first + split_blocks, blocks)

    k = tl.arange(0, 128 if JOIN else 32)
    x_ptrs = x_ptr + m_safe.to(tl.int64)[:, None] * x_stride + first * 128 + k[None, :]
    w_ptrs = trits_ptr + first * trits_stride + n_safe[:, None] * 32 + tl.arange(0, 32)[None, :]
    column_ptrs = (column_ptr if COLUMN else x_ptr) + first * 128 + k  # not read without COLUMN
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if GROUPS:
        group_ptrs, group_step, shift = group_pointers(group_ptr, group_stride, first, n_safe, WORDS)
    for block in range(first, last):
        w0, w1, w2, w3 = planes16(tl.load(w_ptrs), X_TYPE, PTX)
        if GROUPS:
            g = load_group(group_ptrs, shift, group_ptr.dtype.element_ty, WORDS).to(X_TYPE)[:, None]
            group_ptrs += group_step
            w0 *= g
            w1 *= g
            w2 *= g
            w3 *= g
        inputs = K - block * 128
        if JOIN:
            w = join_planes(w0, w1, w2, w3)
            acc = tl.dot(w, _inputs(x_ptrs, column_ptrs, k, inputs, COLUMN, TAIL).T, acc)
        else:
            x0 = _inputs(x_ptrs, column_ptrs, k, inputs, COLUMN, TAIL)
            x1 = _inputs(x_ptrs + 32, column_ptrs + 32, k, inputs - 32, COLUMN, TAIL)
            x2 = _inputs(x_ptrs + 64, column_ptrs + 64, k, inputs - 64, COLUMN, TAIL)
            x3 = _inputs(x_ptrs + 96, column_ptrs + 96, k, inputs - 96, COLUMN, TAIL)
            acc = tl.dot(w0, x0.T, acc)
            acc = tl.dot(w1, x1.T, acc)
            acc = tl.dot(w2, x2.T, acc)
            acc = tl.dot(w3, x3.T, acc)
        w_ptrs += trits_stride
        x_ptrs += 128
        column_ptrs += 128

    if SPLIT:
        offsets = (tl.program_id(1) * M + m).to(tl.int64)[:, None] * N + n[None, :]
        tl.store(y_ptr + offsets, acc.T, mask=(m[:, None] < M) & (n[None, :] < N))
    else:
        finish(acc, y_ptr, row_scale_ptr, bias_ptr, low_ptr, up_ptr, m, n, M, N, 2.0, ROW_SCALE, BIAS, RANK)


def linear_a16(x, column, weight, low, up, bias, y, tile, chip):
    """Launches the kernel (and the sum of its splits) on y [M, N]; shapes and dtypes as above."""
    (m, n), blocks = y.shape, weight.trits.shape[0]
    splits, split_blocks = tile.split(m, n, blocks, chip)
    row_scale, group = (None, weight.scale) if weight.scale.ndim == 2 else (weight.scale, weight.group)
    sums = y
    if splits > 1:
        sums = torch.empty(splits, m, n, dtype=torch.float32, device=y.device)
    _linear_a16[(tile.tiles(m, n), splits)](
        x,
        column,
        weight.trits,
        row_scale,
        group,
        low,
        up,
        bias,
        sums,
        m,
        n,
        x.shape[1],
        blocks,
        split_blocks,
        x.stride(0),
        weight.trits.stride(0),
        0 if group is None else group.stride(0),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        GROUP_M=tile.GROUP_M,
        GROUPS=group is not None,
        WORDS=in_words(group),
        COLUMN=column is not None,
        ROW_SCALE=row_scale is not None,
        BIAS=bias is not None,
        RANK=0 if up is None else up.shape[1],
        SPLIT=splits > 1,
        TAIL=x.shape[1] % 128 != 0,
        JOIN="a16" in chip.wide,
        PTX=chip.ptx,
        **tile.options,
    )
    if splits > 1:
        reduce_splits(sums, None, row_scale, low, up, bias, y, 2)
    return y
