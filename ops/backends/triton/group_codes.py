"""group_codes: ternary codes of a group's 128 inputs, one after the other, each change passed on to those after it.

A program keeps the block of its outputs in the registers of one warp, so that no sum waits for another warp. In torch
these are 640 launches for each group.
"""

import torch
import triton
import triton.language as tl

BLOCK_N = 16


@triton.jit
def _group_codes(
    block_ptr, scale_ptr, weights_ptr, factors_ptr, old_ptr, codes_ptr, changes_ptr, N,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, DESCENT: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, GROUP)
    inside = n < N
    block = tl.load(block_ptr + k[:, None].to(tl.int64) * N + n[None, :], mask=inside[None, :], other=0.0)
    scale = tl.load(scale_ptr + n, mask=inside, other=0.0)
    divisor = tl.where(scale == 0.0, 1.0, scale)
    for i in range(GROUP):
        value = tl.sum(tl.where(k[:, None] == i, block, 0.0), 0)
        factor = tl.load(factors_ptr + i)
        at = tl.cast(i, tl.int64) * N + n
        old = tl.zeros_like(value)
        if DESCENT:
            old = tl.load(old_ptr + at, mask=inside, other=0.0)
            value = scale * old + factor * value
        ratio = tl.where(scale == 0.0, 0.0, value / divisor)
        code = tl.where(ratio > 0.5, 1.0, tl.where(ratio < -0.5, -1.0, 0.0))
        change = scale * (code - old) if DESCENT else factor * (value - scale * code)
        tl.store(codes_ptr + at, code, mask=inside)
        tl.store(changes_ptr + at, change, mask=inside)
        passed_on = tl.load(weights_ptr + i * GROUP + k)
        block -= tl.where(k > i, passed_on, 0.0)[:, None] * change[None, :]


def group_codes(
    block: torch.Tensor,
    scale: torch.Tensor,
    weights: torch.Tensor,
    factors: torch.Tensor,
    old: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `ops.group_codes`, of contiguous tensors."""
    group, n = block.shape
    codes, changes = torch.empty_like(block), torch.empty_like(block)
    tensors = block, scale, weights, factors, old, codes, changes
    grid = (triton.cdiv(n, BLOCK_N),)
    _group_codes[grid](*tensors, n, GROUP=group, BLOCK_N=BLOCK_N, DESCENT=old is not None, num_warps=1)
    return codes, changes
