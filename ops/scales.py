"""Group scales as (row scale) x (integer of the group): what an int8 kernel folds into its weight operand exactly."""

import torch
from torch import Tensor

MAX_MULTIPLIER = 127


def fit_integer_groups(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Fit scales [ceil(K/128), N] >= 0 by row[n] * group[j, n].

    Returns row fp32 [N] and group uint8 [ceil(K/128), N] in 1..127. The largest group of a row gets 127, the row scale
    is then the least-squares one. A scale is off by at most 1/254 of the largest of its row, 1/127 if it is below that.
    Raises ValueError for scales that are negative or not finite.
    """
    if not bool((scales >= 0).all() and scales.isfinite().all()):
        raise ValueError("group scales must be finite and not negative")
    return nearest_integer_groups(scales)


def nearest_integer_groups(scales: Tensor) -> tuple[Tensor, Tensor]:
    """`fit_integer_groups` of scales that are known to be fit for it: nothing is read back from the device."""
    scales = scales.float()
    row = scales.amax(0) / MAX_MULTIPLIER
    group = torch.where(row > 0, scales / row, 1.0).round_().clamp_(1, MAX_MULTIPLIER)
    used = group * (scales > 0)  # a group of zeros has no say in the row's scale
    row = (scales * used).sum(0) / used.square().sum(0).clamp_min(1)
    return row, group.to(torch.uint8)
