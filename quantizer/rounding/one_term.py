"""Ternary weights from weights alone: the exact least-squares rounding of every group of 128, and BitNet's absmean.

For one group and a scale s the best trits are sign(w) where |w| > s/2. The best s is the mean of the k largest |w|,
with the k that maximises (sum of the k largest)^2 / k; sorting the group finds it exactly. The scales are then put in
the form row x integer, which is what the kernels multiply by, and the trits are chosen for those.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...ops import GROUP_SIZE, TernaryWeight
from ...ops.packing import groups_of, pack_planes32
from ...ops.scales import fit_integer_groups

METHODS = ("least-squares", "absmean")
_CHUNK = 1 << 19  # weights rounded at a time
_SIGN_BIT = np.uint32(0x80000000)
_BYTE_ONES = np.uint64(0x0101010101010101)
_COUNTS = np.arange(1, GROUP_SIZE + 1, dtype=np.float32)


@dataclass(frozen=True)
class Rows:
    """Some rows of a rounded weight."""

    trits: Tensor  # uint8 [G, rows, 32]
    scale: Tensor  # fp32 [rows]
    group: Tensor  # uint8 [G, rows]
    squared_error: float
    squared_norm: float


def round_rows(weight: np.ndarray, method: str = "least-squares", column: np.ndarray | None = None) -> Rows:
    """Round fp32 [rows, K], best a few hundred thousand weights at a time. Raises ValueError if one is not finite.

    With `column` scales, fp32 [K], it is the weights over them that are rounded; the error is that of the weights.
    """
    n, k = weight.shape
    groups = _grouped(weight if column is None else weight / column)
    sums = largest_sums(groups)
    scales = best_scales(sums) if method == "least-squares" else absmean_scales(sums, k)
    if not np.isfinite(scales).all():
        raise ValueError("the weight has values that are not finite")
    row, group = fit_integer_groups(torch.from_numpy(scales).view(n, -1).t().contiguous())
    scales = (row * group).t().contiguous().view(-1).numpy()
    threshold = scales[:, None] * np.float32(0.5)
    codes = (groups > threshold).view(np.int8) - (groups < -threshold).view(np.int8)
    trits = pack_planes32(torch.from_numpy(codes).view(n, -1))
    if column is not None:
        left = np.subtract(groups, scales[:, None] * codes, out=groups).reshape(n, -1)[:, :k]
        left *= column
        return Rows(trits, row, group, _squares(left), _squares(weight))
    squared_norm = _squares(groups)
    gain = _squared_gain(sums, scales, codes)
    return Rows(trits, row, group, max(squared_norm - gain, 0.0), squared_norm)


def _squares(values: np.ndarray) -> float:
    return float(np.einsum("ij,ij->i", values, values).sum(dtype=np.float64))


def largest_sums(groups: np.ndarray) -> np.ndarray:
    """fp32 [groups, 128] -> fp32 [groups, 128]: element k - 1 is the sum of the k largest |w| of the group."""
    descending = (groups.view(np.uint32) | _SIGN_BIT).view(np.float32)  # -|w|
    descending.sort(axis=1)  # 2.6 ns a weight; torch's sort takes 40
    return torch.from_numpy(descending).cumsum(1).neg_().numpy()


def best_scales(sums: np.ndarray) -> np.ndarray:
    """The least-squares scale of each group, from its `largest_sums`: fp32 [groups], 0 for a group of zeros."""
    best = np.argmax(sums * (1 / np.sqrt(_COUNTS)), axis=1)
    return sums[np.arange(len(sums)), best] / _COUNTS[best]


def absmean_scales(sums: np.ndarray, inputs: int) -> np.ndarray:
    """BitNet b1.58's scale of each group, the mean of |w|, from its `largest_sums`; K = `inputs`."""
    members = np.minimum(GROUP_SIZE, inputs - GROUP_SIZE * np.arange(groups_of(inputs), dtype=np.float32))
    return sums[:, -1] / np.tile(members, len(sums) // len(members))


def _squared_gain(sums: np.ndarray, scales: np.ndarray, codes: np.ndarray) -> float:
    """||W||^2 - ||W - W'||^2: s (2 sum - s count) in a group, with count and sum of |w| of its non-zero trits."""
    ones = (codes.view(np.uint64) & _BYTE_ONES).sum(axis=1)
    count = ((ones * _BYTE_ONES) >> np.uint64(56)).astype(np.intp)  # the sum of the eight bytes
    selected = np.where(count > 0, sums[np.arange(len(sums)), count - 1], 0)
    return float((scales * (2 * selected - scales * count)).sum(dtype=np.float64))


def _grouped(weight: np.ndarray) -> np.ndarray:
    """fp32 [N, K] -> [N * ceil(K/128), 128], padded with zeros."""
    padding = -weight.shape[1] % GROUP_SIZE
    return (np.pad(weight, ((0, 0), (0, padding))) if padding else weight).reshape(-1, GROUP_SIZE)


def ternarize(
    weight: Tensor, method: str = "least-squares", column: Tensor | None = None
) -> tuple[TernaryWeight, float]:
    """Round a weight [N, K] of any float dtype, with column scales [K] if they are given.

    Returns it and its relative error ||W - W'|| / ||W||. Raises ValueError if the weight is not finite.
    """
    scales = None if column is None else column.float().cpu().numpy()
    return by_rows(weight, lambda rows: round_rows(rows.float().cpu().numpy(), method, scales), column=column)


def by_rows(
    weight: Tensor, rounding: Callable[[Tensor], Rows], terms: int = 1, column: Tensor | None = None
) -> tuple[TernaryWeight, float]:
    """Round a weight [N, K] some rows at a time; returns it and its relative error."""
    n, k = weight.shape
    matrix = Matrix((n, k), terms, column)
    step = Matrix.chunk_rows(matrix.weight.shape)
    for start in range(0, len(weight), step):
        matrix.put(start, rounding(weight[start : start + step].detach()))
    return matrix.weight, matrix.error


class Matrix:
    """A ternary weight [N, K] that is filled in by rows."""

    def __init__(self, shape: tuple[int, int], terms: int = 1, column: Tensor | None = None):
        n, k = shape
        groups = terms * groups_of(k)
        self.missing = n
        self.weight = TernaryWeight(
            torch.empty(groups, n, 32, dtype=torch.uint8),
            torch.empty(n),
            shape,
            torch.empty(groups, n, dtype=torch.uint8),
            column=column,
        )
        self._squares = []

    @staticmethod
    def chunk_rows(shape: tuple[int, int]) -> int:
        """How many rows to round at a time."""
        return max(1, _CHUNK // shape[1])

    def put(self, start: int, rows: Rows) -> None:
        stop = start + len(rows.scale)
        self.weight.trits[:, start:stop] = rows.trits
        self.weight.scale[start:stop] = rows.scale
        self.weight.group[:, start:stop] = rows.group
        self._squares.append((rows.squared_error, rows.squared_norm))
        self.missing -= len(rows.scale)

    @property
    def error(self) -> float:
        error, norm = (sum(column) for column in zip(*self._squares, strict=True))
        return (error / norm) ** 0.5 if norm else 0.0
