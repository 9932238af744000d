"""Intervals over prompts, and verdicts only beyond the noise floor."""

import math

import numpy as np
import pytest
from ternary_flux.quantizer.comparison import statistics
from ternary_flux.quantizer.comparison.statistics import BEYOND, INSIDE, LEAST, TOO_FEW, compare, estimate


def values(mean, prompts=40, seeds=3, spread=1.0, seed=0):
    generator = np.random.default_rng(seed)
    of_prompt = mean + spread * generator.standard_normal((prompts, 1))
    return (of_prompt + 0.1 * generator.standard_normal((prompts, seeds))).tolist()


def test_intervals_are_as_wide_as_theory_says():
    """Of a mean over prompts, whose seeds are no further samples: 1.96 standard errors on either side."""
    rows = values(5.0, prompts=200)
    found = compare(rows, rows).ternary
    means = np.mean(rows, axis=1)
    assert found.value == pytest.approx(means.mean())
    expected = 1.96 * means.std(ddof=1) / math.sqrt(200)
    assert (found.high - found.low) / 2 == pytest.approx(expected, rel=0.1)


def test_a_difference_by_prompt_is_seen_where_intervals_overlap():
    floor = values(5.0, spread=3.0, seeds=1)
    found = compare([[v - 0.2 for v in row] * 2 for row in floor], floor)
    assert found.ternary.low < found.floor.value < found.ternary.high
    assert found.verdict == BEYOND and found.difference.value == pytest.approx(-0.2)


def test_no_verdict_inside_the_floor_or_of_few_prompts():
    assert compare(values(5.0, seed=1), values(5.0, seed=2)).verdict == INSIDE
    few = compare(values(5.0, prompts=LEAST - 1), values(9.0, prompts=LEAST - 1))
    assert few.verdict == TOO_FEW and few.ternary.low is None and few.prompts == LEAST - 1


def test_ratios_are_averaged_as_logarithms():
    found = estimate(np.log([0.5, 2.0] * 10), math.exp)
    assert found.value == pytest.approx(1) and 0.5 < found.low < 1 < found.high < 2


def test_the_same_numbers_every_time(monkeypatch):
    assert estimate([1, 2, 3, 4, 5, 6]) == estimate([1, 2, 3, 4, 5, 6])
    monkeypatch.setattr(statistics, "_RESAMPLES", 20_000)
    assert estimate(range(20)).low == pytest.approx(9.5 - 1.96 * np.std(range(20)) / math.sqrt(20), abs=0.15)
