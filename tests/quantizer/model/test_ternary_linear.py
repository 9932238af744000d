"""Trainable ternary Linears: a forward multiplies by what is stored, and gradients are those of that product."""

from dataclasses import replace

import pytest
import torch
from ternary_flux.ops import TernaryWeight
from ternary_flux.ops.scales import fit_integer_groups
from ternary_flux.quantizer.model.ternary_linear import TernaryLinear, svd_low_rank
from ternary_flux.quantizer.rounding.one_term import ternarize

SHAPES = [(5, 128), (7, 300), (16, 256)]


def dense(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scaled(shape, dtype=torch.bfloat16):
    """A ternary weight with column scales."""
    return replace(ternarize(dense(shape))[0], column=(0.5 * dense(shape[1:], 9)).exp().to(dtype))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("columns", [False, True])
def test_starts_as_the_stored_weight(shape, packed, columns):
    weight = scaled(shape) if columns else ternarize(dense(shape))[0]
    layer = TernaryLinear(weight, dense(shape[:1], 1), packed)
    x = dense((3, shape[1]), 2)
    expected = x @ weight.dequantize().t() + dense(shape[:1], 1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.export().dequantize(), weight.dequantize())


@pytest.mark.parametrize("shape", SHAPES)
def test_latents_reproduce_any_starting_codes(shape):
    codes = torch.randint(-1, 2, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(3))
    row, group = fit_integer_groups(dense((-(-shape[1] // 128), shape[0])).abs() + 0.1)
    layer = TernaryLinear(TernaryWeight.from_codes(codes, row, group), None)
    before = layer.weight()
    layer.train_codes(dense(shape))
    assert torch.equal(layer.codes(), codes)
    assert torch.equal(layer.weight(), before)


def test_what_is_trained_is_what_is_written():
    weight, _ = ternarize(dense((16, 256)))
    layer = TernaryLinear(weight, None)
    layer.train_codes(dense((16, 256)))
    with torch.no_grad():
        layer.log_scale += 0.3 * dense(layer.log_scale.shape, 4)
        layer.latent += 0.3 * dense((16, 256), 5)
    assert torch.equal(layer.weight(), layer.export().dequantize())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_column_scales_are_trained_as_they_are_written(dtype):
    layer = TernaryLinear(scaled((16, 200), dtype), None)
    layer.train_codes(layer.weight().detach())
    codes, x, target = layer.codes(), dense((5, 200), 6), dense((5, 16), 7)
    (layer(x) * target).sum().backward()
    expected = ((target.t() @ x) * layer.weight().detach()).sum(0)
    torch.testing.assert_close(layer.log_column.grad, expected, rtol=0.01, atol=1e-3)
    with torch.no_grad():
        layer.log_column += 0.3 * dense((200,), 4)
    stored = layer.export()
    assert stored.column.dtype == dtype and torch.equal(stored.codes(), codes)
    torch.testing.assert_close(layer.weight(), stored.dequantize())
    torch.testing.assert_close(layer(x), x @ stored.dequantize().t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("codes", [False, True])
def test_gradients_of_scales(codes):
    weight, _ = ternarize(dense((6, 200)))
    layer = TernaryLinear(weight, None)
    if codes:
        layer.train_codes(dense((6, 200)))
    target = dense((6, 200), 1)
    (layer.weight() * target).sum().backward()
    parts = torch.zeros(6, 256)
    parts[:, :200] = target * layer.codes() * layer.scales().detach().t().repeat_interleave(128, 1)[:, :200]
    torch.testing.assert_close(layer.log_scale.grad, parts.view(6, 2, 128).sum(-1).t(), rtol=0.02, atol=1e-3)
    if codes:
        straight_through = target * layer.scales().detach().t().repeat_interleave(128, 1)[:, :200]
        torch.testing.assert_close(layer.latent.grad, straight_through)


def test_a_group_of_zeros_stays_zero():
    w = dense((4, 256))
    w[:, :128] = 0
    layer = TernaryLinear(ternarize(w)[0], None)
    layer.train_codes(w)
    layer(dense((2, 256), 1)).sum().backward()
    assert layer.log_scale.grad.isfinite().all() and layer.latent.grad.isfinite().all()
    assert torch.equal(layer.export().dequantize(), layer.weight())


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_low_rank_is_the_best_one_and_balanced(shape):
    residual = dense(shape)
    up, down = svd_low_rank(residual, 8)
    singular = torch.linalg.svdvals(residual)
    assert (residual - up @ down).norm() == pytest.approx(float(singular[8:].norm()), rel=1e-4)
    assert up.norm() == pytest.approx(float(down.norm()), rel=1e-4)


def test_low_rank_of_large_matrices_is_near_the_best():
    residual = dense((1100, 40)) @ dense((40, 1200), 1) + 0.1 * dense((1100, 1200), 2)
    up, down = svd_low_rank(residual, 40)
    best = float(torch.linalg.svdvals(residual)[40:].norm())
    assert float((residual - up @ down).norm()) < 1.02 * best


def test_low_rank_prefers_loud_inputs():
    residual, loud = dense((40, 60)), torch.ones(60)
    loud[:10] = 100
    x = dense((500, 60), 1) * loud.sqrt()
    errors = []
    for moments in (None, loud):
        up, down = svd_low_rank(residual, 8, moments)
        errors.append(float((x @ (residual - up @ down).t()).norm()))
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("tokens", [3, 64])  # factors as products of their own, and summed into the weight first
@pytest.mark.parametrize("columns", [False, True])
def test_low_rank_part_is_added(tokens, columns):
    weight = scaled((16, 256)) if columns else ternarize(dense((16, 256)))[0]
    layer = TernaryLinear(weight, dense((16,), 7))
    up, down = svd_low_rank(dense((16, 256)) - layer.weight().detach(), 4)
    layer.up, layer.down = torch.nn.Parameter(up.bfloat16().float()), torch.nn.Parameter(down.bfloat16().float())
    x, target = dense((tokens, 256), 6), dense((tokens, 16), 8)
    y = layer(x)
    torch.testing.assert_close(y, x @ layer.export().dequantize().t() + layer.bias, rtol=1e-4, atol=1e-4)
    (y * target).sum().backward()
    of_weight = target.t() @ x
    torch.testing.assert_close(layer.up.grad, of_weight @ layer.down.t(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(layer.down.grad, layer.up.t() @ of_weight, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(layer.bias.grad, target.sum(0), rtol=1e-4, atol=1e-4)
