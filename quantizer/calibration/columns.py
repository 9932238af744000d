"""Which column scales (`rounding.columns`) suit a Linear, or whether none do: a rough fit decides, on some rows."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..rounding.columns import column_scales
from .moments import Moments

EXPONENTS = (-0.25, 0.0, 0.25, 0.5)
_ROWS = 256  # of the weight, on which the exponents are compared
_WORTH = 0.998  # of the error without column scales: what they must come below, as less is chance


def choose(
    weight: Tensor,
    moments: Moments,
    fit: Callable[[Tensor, Moments, Tensor | None], float],
    exponents: Sequence[float] = EXPONENTS,
) -> tuple[Tensor | None, float | None]:
    """The column scales with the smallest error, and their exponent; (None, None) where the weight is best as it is.

    `fit`: (some rows [n, K] of the weight, their moments, column scales [K] or None) -> error of what it is rounded to.
    """
    if not exponents:
        return None, None
    rows = torch.linspace(0, len(weight) - 1, min(_ROWS, len(weight)), device=weight.device).round().long()
    rms = (moments.second.diagonal() / moments.count.clamp_min(1e-30)).clamp_min(0).sqrt()
    best, column, chosen = _WORTH * fit(weight[rows], moments.rows(rows), None), None, None
    for exponent in exponents:
        candidate = column_scales(weight, rms, exponent)
        error = fit(weight[rows], moments.rows(rows), candidate)
        if error < best:
            best, column, chosen = error, candidate, exponent
    return column, chosen
