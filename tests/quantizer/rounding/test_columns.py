"""Column scales from weights, with and without the size of the inputs."""

import pytest
import torch
from ternary_flux.quantizer.rounding.columns import column_norms, column_scales
from ternary_flux.quantizer.rounding.one_term import ternarize


def weight(n: int = 96, k: int = 300) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(0))


def sizes(count: int, seed: int) -> torch.Tensor:
    return torch.exp(torch.randn(count, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("exponent", [-0.25, 0.0, 0.5])
def test_scales_follow_the_channels_and_not_the_outputs(exponent):
    w, rms, s = weight(), sizes(300, 1), sizes(300, 2)
    plain = column_scales(w, rms, exponent).float()
    scaled = column_scales(sizes(96, 3)[:, None] * w / s, rms * s, exponent).float()
    ratio = scaled * s / plain
    torch.testing.assert_close(ratio / ratio.median(), torch.ones(300), rtol=0.02, atol=0)  # bf16


def test_norms_of_columns_are_found():
    norms = column_norms(weight(2000) * sizes(300, 1))
    ratio = norms / sizes(300, 1)
    torch.testing.assert_close(ratio / ratio.median(), torch.ones(300), rtol=0.1, atol=0)


def test_rounding_with_them_is_as_good_as_without_the_spread():
    w, s = weight(), sizes(300, 2)
    columns = column_scales(w * s)
    rounded, error = ternarize(w * s, column=columns)
    assert rounded.column is columns
    left = rounded.dequantize() - w * s
    assert error == pytest.approx(float(left.norm() / (w * s).norm()), rel=1e-3)
    assert float((left / s).norm() / w.norm()) < 1.02 * ternarize(w)[1]
    assert float(((ternarize(w * s)[0].dequantize() - w * s) / s).norm() / w.norm()) > 1.3 * ternarize(w)[1]


def test_dead_channels_and_outputs():
    w, rms = weight(), sizes(300, 1)
    w[:, 3], w[5], rms[9] = 0, 0, 0
    for exponent in (-0.25, 0.0, 0.5):
        column = column_scales(w, rms, exponent).float()
        assert column.isfinite().all() and (column > 0).all()
    assert (column_scales(torch.zeros(4, 300)) == 1).all()
