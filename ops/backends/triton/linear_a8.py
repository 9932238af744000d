"""linear_a8: 8-bit activations times ternary weights (W1.58A8).

    y[m, n] = token_scale[m] * row_scale[n] * sum_j group[j, n] * sum_(k in block j) x[m, k] * trit[n, k]
              + (low @ up.T)[m, n] + bias[n]

    x            int8 or e4m3 [M, 128 * blocks], from quantize_rows
    token_scale  fp32 [M]
    trits        uint8 [blocks, N, 32], planes32; two ternary terms meet inputs that were repeated before the launch
    row_scale    fp32 [N], or absent with float groups
    group        uint8 [blocks, N], 1..127, or with e4m3 float [blocks, N]; optional
    low, up      fp16 / bf16 [M, r], [N, r], optional
    bias         [N], optional

int8: the group multiplier goes into the weight operand (0, +-g by a byte look-up), the sum over all of K is exact in
int32 (at most 127 * 127 * 24576 = 4.0e8 for the largest FLUX layer, twice that with two ternary terms), and everything
after it is fp32.
e4m3: sums are fp32 as the tensor core makes them; with groups each block of 128 is summed apart and scaled in fp32.

The weight is the first operand (Y^T = W X^T), so that wgmma takes it from registers. wgmma and tcgen05 get one product
of K = 128 a block (JOIN); for mma.sync four of K = 32 avoid moving data between lanes. Triton 3.6 pipelines e4m3 wgmma
across blocks but waits for every int8 one, and has no int8 tcgen05.
"""

import torch
import triton
import triton.language as tl

from .decode import join_planes, planes8, planes8_scaled
from .reduce_splits import reduce_splits
from .tiling import finish, group_pointers, in_words, load_group, tile_of_program


@triton.jit
def _multiply(w0, w1, w2, w3, x_ptrs, acc, JOIN: tl.constexpr):
    """acc [BLOCK_N, BLOCK_M] plus one block of 128 inputs."""
    if JOIN:
        w = join_planes(w0, w1, w2, w3)
        return tl.dot(w, tl.load(x_ptrs).T, acc, out_dtype=acc.dtype)
    else:
        x0 = tl.load(x_ptrs)
        x1 = tl.load(x_ptrs + 32)
        x2 = tl.load(x_ptrs + 64)
        x3 = tl.load(x_ptrs + 96)
        acc = tl.dot(w0, x0.T, acc, out_dtype=acc.dtype)
        acc = tl.dot(w1, x1.T, acc, out_dtype=acc.dtype)
        acc = tl.dot(w2, x2.T, acc, out_dtype=acc.dtype)
        return tl.dot(w3, x3.T, acc, out_dtype=acc.dtype)


@triton.jit(do_not_specialize=["M", "blocks", "split_blocks"])
def _linear_a8(
    x_ptr,
    token_scale_ptr,
    trits_ptr,
    row_scale_ptr,
    group_ptr,
    low_ptr,
    up_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
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
    ROW_SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    RANK: tl.constexpr,
    SPLIT: tl.constexpr,
    JOIN: tl.constexpr,
    PTX: tl.constexpr,
):
    X_TYPE: tl.constexpr = x_ptr.dtype.element_ty
    INT8: tl.constexpr = X_TYPE == tl.int8
    SUM_TYPE: tl.constexpr = tl.int32 if INT8 else tl.float32
    UNIT: tl.constexpr = (1.0 if GROUPS else 64.0) if INT8 else 2.0

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
    acc = tl.zeros((BLOCK_N, BLOCK_M), SUM_TYPE)
    if GROUPS:
        group_ptrs, group_step, shift = group_pointers(group_ptr, group_stride, first, n_safe, WORDS)
    for _ in range(first, last):
        trits = tl.load(w_ptrs)
        if GROUPS:
            group = load_group(group_ptrs, shift, group_ptr.dtype.element_ty, WORDS)
            group_ptrs += group_step
        if INT8:
            if GROUPS:
                w0, w1, w2, w3 = planes8_scaled(trits, group, PTX)
            else:
                w0, w1, w2, w3 = planes8(trits, PTX)
            acc = _multiply(w0, w1, w2, w3, x_ptrs, acc, JOIN)
        else:
            w0, w1, w2, w3 = planes8(trits, PTX)
            w0 = w0.to(X_TYPE, bitcast=True)
            w1 = w1.to(X_TYPE, bitcast=True)
            w2 = w2.to(X_TYPE, bitcast=True)
            w3 = w3.to(X_TYPE, bitcast=True)
            if GROUPS:
                part = _multiply(w0, w1, w2, w3, x_ptrs, tl.zeros((BLOCK_N, BLOCK_M), SUM_TYPE), JOIN)
                acc += part * group.to(tl.float32)[:, None]
            else:
                acc = _multiply(w0, w1, w2, w3, x_ptrs, acc, JOIN)
        w_ptrs += trits_stride
        x_ptrs += 128

    if SPLIT:
        offsets = (tl.program_id(1) * M + m).to(tl.int64)[:, None] * N + n[None, :]
        tl.store(y_ptr + offsets, acc.T, mask=(m[:, None] < M) & (n[None, :] < N))
    else:
        y = acc.to(tl.float32) * tl.load(token_scale_ptr + m_safe)[None, :]
        finish(y, y_ptr, row_scale_ptr, bias_ptr, low_ptr, up_ptr, m, n, M, N, UNIT, ROW_SCALE, BIAS, RANK)


def linear_a8(x, token_scale, weight, low, up, bias, y, tile, chip):
    """Launches the kernel (and the sum of its splits) on y [M, N]; shapes and dtypes as above."""
    (m, n), blocks = y.shape, weight.trits.shape[0]
    splits, split_blocks = tile.split(m, n, blocks, chip)
    int8 = x.dtype == torch.int8
    row_scale, group = (None, weight.scale) if weight.scale.ndim == 2 else (weight.scale, weight.group)
    sums = y
    if splits > 1:
        sums = torch.empty(splits, m, n, dtype=torch.int32 if int8 else torch.float32, device=y.device)
    _linear_a8[(tile.tiles(m, n), splits)](
        x,
        token_scale,
        weight.trits,
        row_scale,
        group,
        low,
        up,
        bias,
        sums,
        m,
        n,
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
        ROW_SCALE=row_scale is not None,
        BIAS=bias is not None,
        RANK=0 if up is None else up.shape[1],
        SPLIT=splits > 1,
        JOIN=("int8" if int8 else "e4m3") in chip.wide,
        PTX=chip.ptx,
        **tile.options,
    )
    if splits > 1:
        unit = 2 if not int8 else 64 if group is None else 1
        reduce_splits(sums, token_scale, row_scale, low, up, bias, y, unit)
    return y
