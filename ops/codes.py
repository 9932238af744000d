"""Ternary codes of a group's 128 inputs, one after the other, each change passed on to those after it."""

import torch
from torch import Tensor

from .backends.triton import backend as triton

_FEW = 64  # outputs, for which choosing the later inputs takes longer than adding nothing to the earlier ones
_LEAST_SCALE = 1e-20  # outputs without a scale, which stay without codes, are divided by this


def group_codes(
    block: Tensor, scale: Tensor, weights: Tensor, factors: Tensor, old: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes [128, N] in {-1, 0, +1} and changes [128, N], fp32, of the inputs of N outputs; `block` is used up.

    block [128, N] fp32, inputs first    what codes are chosen from, less what earlier changes pass on
    scale [N], weights [128, 128], factors [128], old [128, N], all fp32

    With v = block[i], less sum over j < i of weights[j, i] * changes[j]:

        error feedback (without `old`)  code = nearest(v / scale),  change = factors[i] * (v - scale * code)
        coordinate descent              code = nearest(old + factors[i] * v / scale),  change = scale * (code - old)

    By a kernel where there is one, else by `group_codes_in_torch`, which is its reference.
    """
    if triton.unavailable(block.device) is None:
        from .backends.triton.group_codes import group_codes as kernel

        given = (block, scale, weights, factors, old)
        return kernel(*(tensor if tensor is None else tensor.contiguous() for tensor in given))
    return group_codes_in_torch(block, scale, weights, factors, old)


def group_codes_in_torch(
    block: Tensor, scale: Tensor, weights: Tensor, factors: Tensor, old: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `group_codes`, in 640 operations. Their number counts, so values are in units of the scale."""
    unit = scale.clamp_min(_LEAST_SCALE)
    block.div_(unit)
    codes, changes = torch.empty_like(block), torch.empty_like(block)
    passed_on, before, few = weights.triu(1), codes if old is None else old, block.shape[1] <= _FEW
    steps = zip(block, codes, changes, before, passed_on, factors.tolist(), strict=True)
    for i, (value, code, change, start, to, factor) in enumerate(steps, 1):
        if old is None:
            torch.clamp(value, -1, 1, out=code).round_()
            torch.sub(value, code, out=change).mul_(factor)
        else:
            torch.add(start, value, alpha=factor, out=code).clamp_(-1, 1).round_()
            torch.sub(code, start, out=change)
        if few:
            block.addr_(to, change, alpha=-1)
        else:
            block[i:].addr_(to[i:], change, alpha=-1)
    return codes.mul_(scale > 0), changes.mul_(scale if old is not None else unit)


def nearest(weight: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
    """The code in {-1, 0, +1} for which scale * code is nearest."""
    return torch.div(weight, scale, out=out).nan_to_num_(0.0).clamp_(-1, 1).round_()
