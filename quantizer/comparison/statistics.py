"""What can be said of two models on the same prompts and seeds: means with bootstrap intervals, and a noise floor.

Prompts are drawn again, each with all of its seeds, because pictures of one prompt are alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

LEAST = 5  # prompts for an interval
_RESAMPLES = 2000
BEYOND, INSIDE, TOO_FEW = "beyond the noise floor", "inside the noise floor: no verdict", "too few prompts: no verdict"


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and its 95 % interval; None where there are too few prompts for one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Finding:
    """One metric: of the ternary model, of the original against itself, and of the difference by prompt."""

    ternary: Estimate
    floor: Estimate
    difference: Estimate
    prompts: int

    @property
    def verdict(self) -> str:
        if self.difference.low is None:
            return TOO_FEW
        return INSIDE if self.difference.low <= 0 <= self.difference.high else BEYOND


def estimate(values: Sequence[float], back: Callable[[float], float] = float) -> Estimate:
    """The mean of values by prompt, and its percentile bootstrap interval; `back` turns each into what is shown."""
    values = np.asarray(values, np.float64)
    if len(values) < LEAST:
        return Estimate(back(values.mean()))
    drawn = np.random.default_rng(0).integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(1), (0.025, 0.975))
    return Estimate(back(values.mean()), back(low), back(high))


def compare(
    ternary: Sequence[Sequence[float]], floor: Sequence[Sequence[float]], back: Callable[[float], float] = float
) -> Finding:
    """A finding from values by prompt and seed; the two may have other numbers of seeds.

    `back` turns means of the values into what is shown, as exp where the values are logarithms.
    """
    ours, theirs = ([float(np.mean(row)) for row in rows] for rows in (ternary, floor))
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    return Finding(estimate(ours, back), estimate(theirs, back), estimate(differences), len(ours))
