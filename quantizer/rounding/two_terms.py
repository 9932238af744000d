"""Two terms: a weight as the sum of two ternary ones, between ternary and 8 bits in size and in error.

With the scales s >= t of a group of 128, a weight is one of nine values: 0, +-t, +-(s - t), +-s, +-(s + t). The scales
start as the exact least-squares ternary of the group and that of what it leaves. Then codes and scales are fitted in
turn, each exactly for the other (Lloyd's algorithm), and the scales are put in the form row x integer. Of Gaussian
weights 0.029 of the squared norm is lost; one term loses 0.19.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...ops import GROUP_SIZE, TernaryWeight
from ...ops.packing import pack_planes32
from ...ops.scales import fit_integer_groups
from .one_term import Rows, best_scales, by_rows, largest_sums

# Squared error on Gaussian weights: 0.0410 at the start, 0.0313 after 4 rounds, 0.0291 after 12, 0.0290 after 30.
_ROUNDS = 12


def two_terms(weight: Tensor) -> tuple[TernaryWeight, float]:
    """Round a weight [N, K] of any float dtype, computing on its device; the result is in main memory.

    Returns it and its relative error ||W - W'|| / ||W||. Raises ValueError if the weight is not finite.
    """
    return by_rows(weight, _round_rows, terms=2)


def _round_rows(weight: Tensor) -> Rows:
    n, k = weight.shape
    groups = pad(weight.float(), (0, -k % GROUP_SIZE)).view(-1, GROUP_SIZE)
    if not bool(groups.isfinite().all()):
        raise ValueError("the weight has values that are not finite")
    sizes = groups.abs()
    scales = torch.stack(_fit(sizes)).view(2, n, -1).transpose(1, 2)  # [2, ceil(K/128), N]
    row, group = fit_integer_groups(scales.flatten(0, 1))
    first, second = (row * group).view_as(scales).transpose(1, 2).reshape(2, -1, 1)
    codes = _codes(sizes, first, second)
    left = sizes - first * codes[0] - second * codes[1]
    signed = [(term * groups.sign()).to(torch.int8).view(n, -1) for term in codes]
    squares = (float(x.square().sum(dtype=torch.float64)) for x in (left, sizes))
    return Rows(pack_planes32(torch.cat(signed, 1)), row, group, *squares)


def _fit(sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The scales s >= t, each [groups, 1], for the absolute weights [groups, 128]."""
    first = _exact_scale(sizes)
    second = _exact_scale(sizes - first * (sizes > first / 2))
    for _ in range(_ROUNDS):
        a, b = _codes(sizes, first, second)
        aa, ab, bb, ax, bx = _dot(a, a), _dot(a, b), _dot(b, b), _dot(a, sizes), _dot(b, sizes)
        determinant = aa * bb - ab * ab  # an integer; 0 where the codes cannot tell the scales apart
        first = torch.where(determinant > 0, (bb * ax - ab * bx) / determinant, first).abs()
        second = torch.where(determinant > 0, (aa * bx - ab * ax) / determinant, second).abs()
        first, second = torch.maximum(first, second), torch.minimum(first, second)
    return first, second


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1, keepdim=True)


def _exact_scale(groups: Tensor) -> Tensor:
    """The least-squares scale [groups, 1] of one term."""
    return torch.from_numpy(best_scales(largest_sums(groups.cpu().numpy()))).to(groups.device)[:, None]


def _codes(sizes: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of both terms, as floats, of the value nearest to each absolute weight."""
    without = (sizes > second / 2).float()
    rest = sizes - first
    beside = (rest > second / 2).float() - (rest < -second / 2).float()
    one = (rest - second * beside).abs() < (sizes - second * without).abs()
    return one.float(), torch.where(one, beside, without)
