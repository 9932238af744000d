"""quantize_rows: activations to 8 bits with one scale a token.

    x [M, K] fp16 / bf16 / fp32, any row stride -> q [M, K padded with zeros to a multiple of 128], scale fp32 [M]
    column [K], optional: what the inputs are multiplied by first, in fp32

scale = absmax / 127 for int8 and absmax / 448 for e4m3, 1 for a row of zeros; q = round(x / scale), to nearest even.
One program a token keeps the whole row in registers: one read and one write. A NaN or infinity in a row makes its
scale, and so its whole output row, NaN or infinite: broken activations stay visible.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _quantize_rows(
    x_ptr, column_ptr, q_ptr, scale_ptr, K, padded, x_stride, BLOCK_K: tl.constexpr, COLUMN: tl.constexpr
):
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK_K)
    x = tl.load(x_ptr + row.to(tl.int64) * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
    if COLUMN:
        x *= tl.load(column_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    # As integers, magnitudes keep their order with infinity and NaN on top; a float maximum would drop NaN.
    absmax = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0).to(tl.float32, bitcast=True)
    INT8: tl.constexpr = q_ptr.dtype.element_ty == tl.int8
    LIMIT: tl.constexpr = 127.0 if INT8 else 448.0
    empty = absmax == 0.0
    z = x * (LIMIT / tl.where(empty, 1.0, absmax))
    if INT8:
        # Adding 1.5 * 2**23 leaves the integer nearest to z, ties to even, in the low bits: no conversion instruction.
        q = (z + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        q = z.to(q_ptr.dtype.element_ty)
    tl.store(q_ptr + row.to(tl.int64) * padded + k, q, mask=k < padded)
    tl.store(scale_ptr + row, tl.where(empty, 1.0, absmax * (1.0 / LIMIT)))


def quantize_rows(x, padded, dtype=torch.int8, column=None):
    """x [M, K] with unit column stride, times column [K] -> (q `dtype` [M, padded], scale fp32 [M])."""
    m, k = x.shape
    q = torch.empty(m, padded, dtype=dtype, device=x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    block = 1 << (padded - 1).bit_length()
    warps = min(16, max(4, block // 2048))
    shape = k, padded, x.stride(0)
    _quantize_rows[(m,)](x, column, q, scale, *shape, BLOCK_K=block, COLUMN=column is not None, num_warps=warps)
    return q, scale
