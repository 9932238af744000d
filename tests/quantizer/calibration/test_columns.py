"""Column scales undo what a function-preserving scaling of channels does to a Linear, and nothing else."""

from functools import partial

import pytest
import torch
from ternary_flux.quantizer.calibration import columns, gptq
from ternary_flux.quantizer.calibration.moments import Moments
from ternary_flux.quantizer.rounding.columns import column_scales

N, K, TOKENS = 32, 256, 1500


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs() -> torch.Tensor:
    g = generator(0)
    return torch.randn(TOKENS, K, generator=g) @ (torch.eye(K) + 0.5 * torch.randn(K, K, generator=g) / K**0.5)


def weight() -> torch.Tensor:
    return 0.05 * torch.randn(N, K, generator=generator(1))


def spread() -> torch.Tensor:
    s = torch.exp(0.8 * torch.randn(K, generator=generator(2)))
    s[[5, 77]] *= 100
    return s


def moments(x: torch.Tensor) -> Moments:
    collected = Moments(N, K)
    collected.add(x[:, None])
    return collected


fit = partial(gptq.rough_error, centred=True)


def error(solution: gptq.Solution, x: torch.Tensor, w: torch.Tensor) -> float:
    wanted = x @ w.t()
    return float((x @ solution.weight.dequantize().t() + solution.bias - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("rank, terms", [(0, 1), (4, 1), (0, 2)])
def test_outlier_channels_cost_nothing(rank, terms):
    x, w, s, bias = inputs(), weight(), spread(), torch.zeros(N)
    column, _ = columns.choose(w / s, moments(x * s), fit)
    options = {"rank": rank, "terms": terms}
    plain = error(gptq.solve(w, bias, moments(x), **options), x, w)
    lost = error(gptq.solve(w / s, bias, moments(x * s), **options), x * s, w / s)
    solution = gptq.solve(w / s, bias, moments(x * s), column=column, **options)
    found = error(solution, x * s, w / s)
    assert found < 1.05 * plain and lost > 1.5 * plain
    assert torch.equal(solution.weight.column, column)
    assert solution.fit.output_error == pytest.approx(found, rel=0.15)
    assert solution.fit.weight_error == pytest.approx(
        float((solution.weight.dequantize() - w / s).norm() / (w / s).norm()), rel=1e-4
    )


def test_the_rough_fit_sees_what_the_whole_one_does():
    x, w, s = inputs(), weight(), spread()
    collected = moments(x * s)
    scales = [None, *(column_scales(w / s, (x * s).square().mean(0).sqrt(), a) for a in columns.EXPONENTS)]
    whole, rough = [], []
    for column in scales:
        rows = torch.arange(N)
        solution = gptq.solve(w / s, torch.zeros(N), collected.rows(rows), column=column)
        whole.append(solution.fit.output_error)
        rough.append(fit(w / s, collected.rows(rows), column))
    assert whole[rough.index(min(rough))] < 1.02 * min(whole) < 0.8 * whole[0]


def test_columns_that_are_alike_stay_without_scales():
    w = torch.nn.functional.normalize(weight(), dim=0)
    assert columns.choose(w, moments(inputs()), fit, (0.0,)) == (None, None)


def test_choosing_leaves_the_moments_as_they_are():
    collected = moments(inputs())
    before = collected.second.clone()
    columns.choose(weight(), collected, fit)
    assert torch.equal(collected.second, before)
