"""What the matrix kernels share: which tile a program computes, how it reads group scales, and the epilogue."""

import triton
import triton.language as tl


@triton.jit
def tile_of_program(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(tile along M, tile along N) of program 0; GROUP_M rows of tiles run together so that L2 holds their inputs."""
    program = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    per_group = GROUP_M * tiles_n
    first = program // per_group * GROUP_M
    height = min(tiles_m - first, GROUP_M)
    within = program % per_group
    return first + within % height, within // height


# Group scales are read as 32-bit words where they lie in such. Those are copied ahead as the trits are; narrower loads
# are not, and every block then waits for its own.


def in_words(group):
    """Whether group scales [blocks, N], or None, can be read as 32-bit words."""
    return group is not None and all(size * group.element_size() % 4 == 0 for size in (group.shape[1], group.stride(0)))


@triton.jit
def group_pointers(group_ptr, stride, first, n, WORDS: tl.constexpr):
    """For `load_group`: pointers to the scales of outputs n in block `first`, the step between blocks, and a shift."""
    if WORDS:
        BITS: tl.constexpr = group_ptr.dtype.element_ty.primitive_bitwidth
        words = group_ptr.to(tl.pointer_type(tl.uint32))
        step = stride // (32 // BITS)
        return words + first * step + n // (32 // BITS), step, n % (32 // BITS) * BITS
    else:
        return group_ptr + first * stride + n, stride, n


@triton.jit
def load_group(pointers, shift, TYPE: tl.constexpr, WORDS: tl.constexpr):
    """The scales [BLOCK_N] of a block: integers, or of TYPE."""
    scales = tl.load(pointers)
    if WORDS:
        scales = scales >> shift
        if TYPE == tl.uint8:
            scales = (scales & 0xFF).to(tl.int32)
        elif TYPE.primitive_bitwidth == 16:
            scales = scales.to(tl.uint16).to(TYPE, bitcast=True)
        else:
            scales = scales.to(TYPE, bitcast=True)
    return scales


@triton.jit
def finish(
    y,
    y_ptr,
    row_scale_ptr,
    bias_ptr,
    low_ptr,
    up_ptr,
    m,
    n,
    M,
    N,
    UNIT: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    RANK: tl.constexpr,
):
    """Row scale, low-rank branch and bias in fp32 on y [BLOCK_N, BLOCK_M], then one rounding and the store to [M, N].

    m, n  indices of the tile's tokens and outputs, beyond M and N at the edges
    UNIT  what a decoded +1 counts in y
    RANK  columns of low [M, RANK] and up [N, RANK]; 0 without low-rank branch
    """
    n_safe = tl.where(n < N, n, 0)
    if ROW_SCALE:
        y *= (tl.load(row_scale_ptr + n_safe) * (1.0 / UNIT))[:, None]
    else:
        y *= 1.0 / UNIT
    if RANK > 0:
        PADDED: tl.constexpr = max(16, triton.next_power_of_2(RANK))
        r = tl.arange(0, PADDED)
        used = r[None, :] < RANK
        up = tl.load(up_ptr + n_safe[:, None] * RANK + r[None, :], mask=used, other=0.0)
        low = tl.load(low_ptr + tl.where(m < M, m, 0)[:, None] * RANK + r[None, :], mask=used, other=0.0)
        y = tl.dot(up, low.T, y)
    if BIAS:
        y += tl.load(bias_ptr + n_safe).to(tl.float32)[:, None]
    offsets = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty).T, mask=(m[:, None] < M) & (n[None, :] < N))
