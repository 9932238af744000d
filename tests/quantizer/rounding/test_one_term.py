import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from ternary_flux.quantizer.rounding.one_term import (
    METHODS,
    absmean_scales,
    best_scales,
    largest_sums,
    round_rows,
    ternarize,
)


def padded(values) -> np.ndarray:
    group = np.zeros((1, 128), np.float32)
    group[0, : len(values)] = values
    return group


@settings(max_examples=60)
@given(arrays(np.float32, st.integers(1, 6), elements=st.floats(-8, 8, width=16)))
def test_no_codes_and_scale_are_better_than_the_best_scale(values):
    def error(scale):
        codes = np.sign(values) * (np.abs(values) > scale / 2)
        return float(((values - scale * codes) ** 2).sum())

    def least_squares_error(codes):
        codes = np.array(codes, np.float64)
        scale = values @ codes / max(codes @ codes, 1)
        return float(((values - scale * codes) ** 2).sum())

    best = min(least_squares_error(codes) for codes in itertools.product((-1, 0, 1), repeat=len(values)))
    assert error(best_scales(largest_sums(padded(values)))[0]) == pytest.approx(best, rel=1e-5, abs=1e-5)


def test_largest_sums_count_from_the_largest():
    sums = largest_sums(padded([1, -3, 2]))
    assert sums[0, :4].tolist() == [3, 5, 6, 6]


@settings(max_examples=30)
@given(n=st.integers(1, 70), k=st.integers(1, 300), method=st.sampled_from(METHODS), seed=st.integers(0, 99))
def test_any_shape(n, k, method, seed):
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    ternary, error = ternarize(weight, method)
    dense = ternary.dequantize()
    assert dense.shape == weight.shape
    assert error == pytest.approx(float((dense - weight).norm() / weight.norm()), abs=2e-3)
    scale = ternary.group_scales().repeat_interleave(128, 0)[:k].t()
    assert torch.equal(ternary.codes(), (weight.sign() * (weight.abs() > scale / 2)).to(torch.int8))


def test_the_error_on_gaussian_weights_is_the_known_optimum():
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(1))
    assert ternarize(weight)[1] == pytest.approx(0.433, abs=0.003)
    assert ternarize(weight, "absmean")[1] == pytest.approx(0.512, abs=0.003)


def test_integer_multipliers_cost_nearly_nothing():
    weight = np.random.default_rng(0).standard_normal((64, 3072), dtype=np.float32)
    rows = round_rows(weight)
    sums = largest_sums(weight.reshape(-1, 128))
    gain = (sums / np.sqrt(np.arange(1, 129))).max(1) ** 2
    exact = (weight**2).sum(dtype=np.float64) - gain.sum(dtype=np.float64)
    assert exact <= rows.squared_error < exact * 1.0002


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_ternary_weight_is_found_again(dtype):
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(-1, 2, (40, 256), generator=generator)
    weight = codes * torch.rand(40, 1, generator=generator).add(0.5).to(dtype)
    ternary, error = ternarize(weight)
    assert torch.equal(ternary.codes(), codes.to(torch.int8))
    assert torch.equal(ternary.dequantize(dtype), weight) if dtype == torch.bfloat16 else error < 1e-3


def test_zeros():
    ternary, error = ternarize(torch.zeros(3, 200))
    assert error == 0 and not ternary.codes().any() and not ternary.dequantize().any()
    weight = torch.zeros(2, 256)
    weight[0, 130] = 1
    assert torch.allclose(ternarize(weight)[0].dequantize(), weight, rtol=1e-3)


def test_absmean_is_the_mean_over_the_inputs_that_exist():
    weight = np.ones((2, 130), np.float32)
    groups = np.pad(weight, ((0, 0), (0, 126))).reshape(-1, 128)
    assert absmean_scales(largest_sums(groups), 130).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", METHODS)
def test_values_that_are_not_finite_are_refused(value, method):
    weight = torch.ones(4, 128)
    weight[2, 5] = value
    with pytest.raises(ValueError, match="not finite"):
        ternarize(weight, method)
