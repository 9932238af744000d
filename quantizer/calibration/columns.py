"""Column scales of one Linear: what its inputs are multiplied by, so that channels of different size can share a group.

    column[k] = |W_k|^(1 - a) / rms_k^a,  with the norm of the weights and the rms of the inputs of channel k

Scaling a channel of x by s and its weights by 1 / s leaves the model as it is, but not its rounding; the exponents add
up to 1, so that scaled weights W / column and scaled inputs x * column stay the same then, for every a. With a = 0
columns of the weight get equal norms. Which a is best, and whether any is, the fit itself decides, on some of the rows.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .moments import Moments

# Velocity error of the calibrated miniature in docs/quality.md.
EXPONENTS = (-0.25, 0.0, 0.25, 0.5)
_ROWS = 512  # of the weight, on which the exponents are compared
_LEAST = 1e-4  # of the median norm or rms: smaller ones count as this, since dead channels need no scale


def column_scales(weight: Tensor, rms: Tensor | None, exponent: float = 0.0) -> Tensor:
    """bf16 [K] for a weight [N, K] and inputs of this rms [K]; the median is 1. The exponent 0 needs no rms."""
    column = _positive(weight.float().norm(dim=0)).pow(1 - exponent)
    if exponent:
        column = column / _positive(rms.float()).pow(exponent)
    return (column / column.median()).bfloat16()


def _positive(sizes: Tensor) -> Tensor:
    median = sizes[sizes > 0].median() if bool((sizes > 0).any()) else sizes.new_ones(())
    return sizes.clamp_min(_LEAST * median)


def choose(
    weight: Tensor,
    moments: Moments,
    fit: Callable[[Tensor, Moments, Tensor | None], float],
    exponents: Sequence[float] = EXPONENTS,
) -> tuple[Tensor | None, float | None]:
    """The column scales with the smallest error, and their exponent; (None, None) where the weight is best as it is.

    `fit`: (some rows [n, K] of the weight, their moments, column scales [K] or None) -> error of what it is rounded to.
    """
    rows = torch.linspace(0, len(weight) - 1, min(_ROWS, len(weight)), device=weight.device).round().long()
    rms = (moments.second.diagonal() / moments.count.clamp_min(1e-30)).clamp_min(0).sqrt()
    best, column, chosen = fit(weight[rows], moments.rows(rows), None), None, None
    for exponent in exponents:
        candidate = column_scales(weight, rms, exponent)
        error = fit(weight[rows], moments.rows(rows), candidate)
        if error < best:
            best, column, chosen = error, candidate, exponent
    return column, chosen
