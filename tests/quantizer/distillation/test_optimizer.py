"""Adam with a rate for each tensor or row, 8-bit states, bf16 parameters."""

import pytest
import torch
from ternary_flux.quantizer.distillation.optimizer import Adam, round_stochastically


def run(dtype=torch.float32, eight_bit=False, steps=60, rate=0.1, resume_at=None):
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(70, 60, generator=generator)
    parameters = {"w": torch.zeros(70, 60, dtype=dtype, requires_grad=True), "b": torch.zeros(60, requires_grad=True)}
    adam = Adam(parameters, {"w": rate, "b": rate}, eight_bit=eight_bit)
    for step in range(steps):
        if step == resume_at:
            state = {name: value.clone() for name, value in adam.state_dict().items()}
            adam = Adam(parameters, {"w": rate, "b": rate}, eight_bit=eight_bit)
            adam.load_state_dict(state)
        for p in parameters.values():
            p.grad = None
        (parameters["w"].float() + parameters["b"] - target).square().sum().backward()
        adam.step(dict.fromkeys(parameters, 1 - step / steps))
    with torch.no_grad():
        return parameters, float((parameters["w"].float() + parameters["b"] - target).square().mean())


def test_equals_torch():
    ours, _ = run()
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(70, 60, generator=generator)
    w, b = torch.zeros(70, 60, requires_grad=True), torch.zeros(60, requires_grad=True)
    adam = torch.optim.Adam([w, b], betas=(0.9, 0.99), eps=1e-30)
    for step in range(60):
        adam.param_groups[0]["lr"] = 0.1 * (1 - step / 60)
        adam.zero_grad()
        (w + b - target).square().sum().backward()
        adam.step()
    torch.testing.assert_close(ours["w"], w)
    torch.testing.assert_close(ours["b"], b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eight_bit", [False, True])
def test_converges_in_every_precision(dtype, eight_bit):
    _, loss = run(dtype, eight_bit)
    assert loss < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eight_bit", [False, True])
def test_resuming_changes_nothing(dtype, eight_bit):
    through, _ = run(dtype, eight_bit)
    resumed, _ = run(dtype, eight_bit, resume_at=30)
    assert all(torch.equal(through[name], resumed[name]) for name in through)


def test_steps_do_not_depend_on_the_scale_of_the_loss():
    moved = []
    for scale in (1.0, 1e-6):
        w = torch.zeros(10, requires_grad=True)
        adam = Adam({"w": w}, {"w": 0.1})
        (scale * w * torch.arange(1.0, 11)).sum().backward()
        adam.step()
        moved.append(w.detach().clone())
    torch.testing.assert_close(*moved)


def test_parameters_without_gradient_stay():
    w = torch.ones(4, requires_grad=True)
    Adam({"w": w}, {"w": 0.1}).step()
    assert torch.equal(w.detach(), torch.ones(4))
    w.grad = torch.zeros(4)
    Adam({"w": w}, {"w": 0.1}).step()
    assert torch.equal(w.detach(), torch.ones(4))


def test_stochastic_rounding_keeps_the_mean():
    values = torch.full((200_000,), 1.001)
    rounded = round_stochastically(values, torch.Generator().manual_seed(0)).float()
    assert set(rounded.unique().tolist()) == {1.0, 1.0078125}
    assert float(rounded.mean()) == pytest.approx(1.001, abs=5e-5)


@pytest.mark.parametrize("eight_bit", [False, True])
def test_rates_of_rows_are_those_of_tensors_that_hold_them(eight_bit):
    """A row is a whole number of blocks of the 8-bit states, so that both forms have the same scales there."""
    generator = torch.Generator().manual_seed(0)
    start, gradient = (torch.randn(2, 16 * 512, generator=generator) for _ in range(2))
    rates = torch.tensor([[0.1], [0.001]])
    together, apart = start.clone(), [row.clone() for row in start]
    steppers = [Adam({"w": together}, {"w": rates}, eight_bit=eight_bit)]
    steppers += [
        Adam({"w": row}, {"w": rate}, eight_bit=eight_bit) for row, rate in zip(apart, (0.1, 0.001), strict=True)
    ]
    together.grad = gradient
    for row, part in zip(apart, gradient, strict=True):
        row.grad = part
    for _ in range(3):
        for adam in steppers:
            adam.step({"w": 0.5})
    torch.testing.assert_close(together, torch.stack(apart))
    moved = (together - start).abs().mean(1).tolist()
    assert moved[0] == pytest.approx(100 * moved[1], rel=0.01)
