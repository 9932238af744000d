"""Column scales: what the inputs of a Linear are multiplied by, so that channels of different size can share a group.

    column[k] = |W_k|^(1 - a) / rms_k^a,  with the norm of the weights and the rms of the inputs of channel k

Scaling a channel of x by s and its weights by 1 / s leaves the model as it is, but not its rounding; the exponents add
up to 1, so that scaled weights W / column and scaled inputs x * column stay the same then, for every a. With a = 0
columns of the weight get equal norms, which needs no inputs.

Rows count alike, whatever their size: norms of rows and columns are made equal in turn (Sinkhorn's iteration, as in
SINQ, arXiv 2509.22944). So the scales do not depend on how the outputs are scaled either.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor


class Matrix(Protocol):
    """A weight [N, K]: a tensor, or what reads its rows when they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def split(self, count: int) -> Iterator[Tensor]: ...


# Velocity error of the rounded miniature, plain and with realistic channels (docs/quality.md).
_PASSES = 2
_LEAST = 1e-4  # of the median norm or rms: smaller ones count as this, since dead channels need no scale
_CHUNK = 1 << 20  # weights at a time


def column_scales(weight: Tensor | Matrix, rms: Tensor | None = None, exponent: float = 0.0) -> Tensor:
    """bf16 [K] for a weight [N, K] and inputs of this rms [K]; the median is 1. The exponent 0 needs no rms."""
    column = column_norms(weight).pow(1 - exponent)
    if exponent:
        column = column / _positive(rms.float()).pow(exponent)
    return (column / column.median()).bfloat16()


def column_norms(weight: Tensor | Matrix, passes: int = _PASSES) -> Tensor:
    """Root mean squares of the columns, fp32 [K], of a weight [N, K] whose rows have been made equal."""
    norms = torch.ones(weight.shape[1], device=getattr(weight, "device", None))
    for _ in range(passes):
        squares = torch.zeros_like(norms)
        for part in weight.split(max(1, _CHUNK // weight.shape[1])):
            part = part.float()
            rows = (part / norms).square().mean(1, keepdim=True)
            squares += (part.square() / torch.where(rows > 0, rows, 1.0)).sum(0)
        norms = _positive((squares / weight.shape[0]).sqrt())
    return norms


def _positive(sizes: Tensor) -> Tensor:
    used = sizes[sizes > 0]
    return sizes.clamp_min(_LEAST * used.median()) if len(used) else torch.ones_like(sizes)
