"""What calibration measures of the inputs of a Linear."""

import pytest
import torch
from ternary_flux.ops import ternary_linear
from ternary_flux.quantizer.calibration.statistics import InputSums, needs_full_precision, watched
from ternary_flux.quantizer.rounding.columns import column_scales
from ternary_flux.quantizer.rounding.one_term import ternarize
from torch import nn


def inputs(outlier: float) -> torch.Tensor:
    x = torch.randn(4, 300, 256, generator=torch.Generator().manual_seed(0))
    x[..., 7] *= outlier
    return x


@pytest.mark.parametrize("outlier, scaled", [(1.0, False), (60.0, False), (60.0, True)])
def test_the_noise_of_int8_is_what_the_product_has(outlier, scaled):
    x, dense = inputs(outlier), torch.randn(96, 256, generator=torch.Generator().manual_seed(1))
    column = column_scales(dense, x.square().mean((0, 1)).sqrt(), 0.5) if scaled else None
    weight, _ = ternarize(dense, column=column)
    y, quantized = (ternary_linear(x, weight, None, activations, "eager") for activations in ("full", "int8"))
    sums = InputSums(96, 256, weight.column, "cpu")
    for part, outputs in zip(x.split(1), y.split(1), strict=True):
        sums.add(part, outputs)
    found = sums.of(dense, weight)
    variance = (y - y.mean((0, 1))).square().mean()
    assert found.int8_noise == pytest.approx(float((quantized - y).square().mean() / variance), rel=0.1)
    seen = x if column is None else x * column
    crest = (seen.abs().amax(-1) / seen.square().mean(-1).sqrt()).mean()
    assert found.crest == pytest.approx(float(crest), rel=1e-5)
    power = seen.square().mean((0, 1))
    assert found.largest_two == pytest.approx(float(power.topk(2).values.sum() / power.sum()), rel=1e-5)
    assert found.kurtosis == pytest.approx(3, abs=0.2)
    if outlier == 1:
        assert 1 < found.spread < 1.2
    elif not scaled:
        assert found.spread == pytest.approx((60 + 1) / 2, rel=0.1)  # one of two groups has the channel


def test_one_channel_of_a_layer_can_make_8_bits_too_few():
    dense = torch.randn(96, 256, generator=torch.Generator().manual_seed(1))
    weight, error = ternarize(dense)
    noise = []
    for outlier in (1.0, 200.0):
        block = nn.ModuleDict({"linear": nn.Linear(256, 96)})
        with torch.no_grad():
            block["linear"].weight.copy_(weight.dequantize())
            with watched(block, {"linear": weight}) as sums:
                block["linear"](inputs(outlier))
        noise.append(sums["linear"].of(dense, weight).int8_noise)
    assert not needs_full_precision(noise[0], error)
    assert needs_full_precision(noise[1], 0.1 * error) and noise[1] > 10 * noise[0]
    assert not block["linear"]._forward_hooks
