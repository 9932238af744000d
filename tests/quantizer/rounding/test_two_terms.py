import pytest
import torch
from ternary_flux.quantizer.rounding.one_term import ternarize
from ternary_flux.quantizer.rounding.two_terms import two_terms


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_error_on_gaussian_weights():
    weight = normal(128, 512)
    assert two_terms(weight)[1] ** 2 == pytest.approx(0.0291, abs=0.0005)
    assert ternarize(weight)[1] ** 2 == pytest.approx(0.188, abs=0.003)


@pytest.mark.parametrize("n, k", [(1, 1), (3, 200), (70, 130)])
def test_any_shape(n, k):
    weight = normal(n, k).bfloat16()
    result, error = two_terms(weight)
    assert result.terms == 2 and result.shape == (n, k) and result.codes().shape == (n, 2 * k)
    dense = result.dequantize()
    assert error == pytest.approx(float((dense - weight).norm() / weight.float().norm()), abs=1e-4)


def test_every_weight_takes_the_nearest_value():
    weight = normal(4, 300) ** 3  # heavy tails: both scales are nearly the same in some groups
    result, _ = two_terms(weight)
    scales = result.group_scales().view(2, -1, 4).repeat_interleave(128, 1)[:, :300].transpose(1, 2)
    values = torch.stack([a * scales[0] + b * scales[1] for a in (-1, 0, 1) for b in (-1, 0, 1)])
    nearest = (values - weight).abs().amin(0)
    torch.testing.assert_close((result.dequantize() - weight).abs(), nearest)
    assert (scales[0] >= scales[1]).all()


def test_a_sum_of_two_ternary_weights_is_found_again():
    codes = torch.randint(-1, 2, (2, 8, 256), generator=torch.Generator().manual_seed(0))
    weight = codes[0] + 0.3 * codes[1]
    result, error = two_terms(weight)
    assert error < 0.01
    assert torch.equal(result.codes(), torch.cat([codes[0], codes[1]], 1).to(torch.int8))


def test_zeros_and_values_that_are_not_finite():
    result, error = two_terms(torch.zeros(3, 200))
    assert error == 0 and not result.codes().any() and not result.dequantize().any()
    with pytest.raises(ValueError, match="not finite"):
        two_terms(torch.full((4, 128), torch.nan))
