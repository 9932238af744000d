"""The solver on correlated synthetic inputs: each of its parts helps, and nothing breaks it."""

import pytest
import torch
from ternary_flux.ops.codes import nearest
from ternary_flux.quantizer.calibration import gptq
from ternary_flux.quantizer.calibration.moments import Moments
from ternary_flux.quantizer.rounding.two_terms import two_terms

K, N = 256, 48


def inputs(seed: int = 0, tokens: int = 2000, decay: float = 1.0) -> torch.Tensor:
    """Tokens whose covariance has eigenvalues i^-decay, with a mean that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(K, K, generator=generator)).Q
    spread = torch.arange(1, K + 1) ** (-decay / 2)
    return torch.randn(tokens, K, generator=generator) * spread @ basis.t() + 0.3 * basis[3]


def moments(student: torch.Tensor, teacher: torch.Tensor | None = None) -> Moments:
    collected = Moments(N, student.shape[1])
    for part in range(0, len(student), 500):
        rows = slice(part, part + 500)
        collected.add(student[rows, None])
        if teacher is not None:
            collected.add_drift(student[rows, None], teacher[rows, None])
    return collected


def weight() -> torch.Tensor:
    return 0.02 * torch.randn(N, K, generator=torch.Generator().manual_seed(9))


def output_error(solution, x, teacher, w, bias):
    wanted = teacher @ w.t() + bias
    got = x @ solution.weight.dequantize(torch.float32).t() + solution.bias
    return ((got - wanted).norm() / wanted.norm()).item()


def round_to_nearest(w):
    groups = w.view(N, -1, 128)
    scale = torch.stack([gptq.best_scale(groups[:, j], torch.ones(128)) for j in range(groups.shape[1])], 1)
    return gptq.dense(nearest(groups, scale[..., None]).flatten(1), scale)


def test_beats_rounding_on_the_outputs():
    x, w, bias = inputs(), weight(), torch.zeros(N)
    solution = gptq.solve(w, bias, moments(x))
    rounded = (x @ (round_to_nearest(w) - w).t()).norm() / (x @ w.t()).norm()
    found = output_error(solution, x, x, w, bias)
    assert found < 0.7 * rounded
    assert solution.fit.tokens == 2000 and solution.fit.inputs == K
    assert 1 < solution.fit.effective_rank < K / 2
    assert solution.fit.weight_error == pytest.approx(
        ((solution.weight.dequantize(torch.float32) - w).norm() / w.norm()).item(), rel=1e-4
    )


def test_two_terms_leave_little():
    x, w, bias = inputs(), weight(), torch.zeros(N)
    one, two = (gptq.solve(w, bias, moments(x), terms=terms) for terms in (1, 2))
    assert (one.weight.terms, two.weight.terms) == (1, 2)
    rounded = (x @ (two_terms(w)[0].dequantize() - w).t()).norm() / (x @ w.t()).norm()
    error = output_error(two, x, x, w, bias)
    assert error < 0.85 * rounded
    assert error < 0.6 * output_error(one, x, x, w, bias)


def test_follows_the_teacher_where_the_inputs_drifted():
    teacher, w, bias = inputs(), weight(), 0.1 * torch.randn(N)
    drift = 0.2 * torch.randn(K, K, generator=torch.Generator().manual_seed(5)) / K**0.5
    student = teacher @ (torch.eye(K) + drift) + 0.1
    towards_teacher = gptq.solve(w, bias, moments(student, teacher))
    plain = gptq.solve(w, bias, moments(student))
    errors = [output_error(s, student, teacher, w, bias) for s in (towards_teacher, plain)]
    assert errors[0] < 0.8 * errors[1]


def test_a_residual_is_made_up_for():
    """Outputs are added to tokens through a gate; what the tokens miss depends on the inputs, and is learnt."""
    x, w, bias = inputs(tokens=2000).view(20, 100, K), weight(), torch.zeros(N)
    gate = 0.5 + torch.rand(20, 1, N, generator=torch.Generator().manual_seed(2))
    wanted = w + 0.01 * torch.randn(N, K, generator=torch.Generator().manual_seed(3))
    missing = gate * (x @ (wanted - w).t() + 0.2)
    collected = moments(x.flatten(0, 1))
    collected.add_residual(x, missing, gate)
    errors = []
    for solution in (gptq.solve(w, bias, collected), gptq.solve(w, bias, moments(x.flatten(0, 1)))):
        errors.append(output_error(solution, x.flatten(0, 1), x.flatten(0, 1), wanted, bias + 0.2))
    assert errors[0] < 0.75 * errors[1]


def test_a_dense_linear_is_refitted_to_all_that_is_missing():
    teacher, w, bias = inputs(tokens=20_000), weight(), 0.1 * torch.randn(N)
    shrunk = torch.diag(torch.linspace(0.7, 1.0, K))
    student = teacher @ shrunk + 0.1
    missing = (teacher - student) @ w.t()
    collected = moments(student)
    collected.add_residual(student[:, None], missing[:, None], torch.ones(len(student), 1, N))
    new, new_bias = gptq.refit(w, bias, collected)
    left = teacher @ w.t() + bias - student @ new.t() - new_bias
    assert left.norm() < 0.05 * missing.norm()
    assert left.mean(0).norm() < 0.01 * missing.mean(0).norm()


def test_weights_say_where_errors_count():
    x, w, bias = torch.stack((inputs(1), inputs(2, decay=0.2))), weight(), torch.zeros(N)
    collected = Moments(N, K)
    collected.add(x, torch.tensor([[1.0], [1e-4]]).expand(x.shape[:2]))
    first = gptq.solve(w, bias, collected)
    second = gptq.solve(w, bias, moments(x.flatten(0, 1)))
    errors = [output_error(solution, x[0], x[0], w, bias) for solution in (first, second)]
    assert errors[0] < 0.95 * errors[1]


@pytest.mark.parametrize("outputs", [6, 24])
@pytest.mark.parametrize("options", [{}, {"rank": 4}, {"terms": 2}])
def test_rows_make_up_for_each_other_where_few_outputs_are_left(options, outputs):
    x, w, bias = inputs(), weight(), torch.zeros(N)
    mixed = torch.randn(outputs, N, generator=torch.Generator().manual_seed(3))
    alone, together = moments(x), moments(x)
    together.add_reach(torch.ones(1, 1, N))
    together.metric *= mixed.t() @ mixed
    errors = []
    for collected in (alone, together):
        solution = gptq.solve(w, bias, collected, **options)
        difference = x @ (solution.weight.dequantize(torch.float32) - w).t() + solution.bias
        errors.append((difference.norm().item(), (difference @ mixed.t()).norm().item(), solution.fit.output_error))
    assert errors[1][1] < {6: 0.5, 24: 0.8}[outputs] * errors[0][1]
    assert errors[1][0] > errors[0][0]  # where nobody looks
    assert errors[1][2] == pytest.approx(errors[1][1] / (x @ w.t() @ mixed.t()).norm().item(), rel=0.1)


def test_outputs_that_matter_alike_and_alone_stay_as_they_were():
    x, w, bias = inputs(), weight(), torch.zeros(N)
    alone, together = moments(x), moments(x)
    together.expect_metric()
    together.metric += torch.eye(N)
    plain, shared = (output_error(gptq.solve(w, bias, m), x, x, w, bias) for m in (alone, together))
    assert shared < 1.01 * plain


def test_outputs_that_do_not_matter_at_all_are_handled():
    collected = moments(inputs())
    collected.expect_metric()
    solution = gptq.solve(weight(), torch.zeros(N), collected)
    assert torch.isfinite(solution.weight.dequantize(torch.float32)).all()
    assert solution.fit.weight_error < 1.5


def test_the_bias_takes_up_the_mean():
    x, w, bias = inputs() + 3, weight(), torch.randn(N)
    solution = gptq.solve(w, bias, moments(x))
    difference = x @ (solution.weight.dequantize(torch.float32) - w).t() + solution.bias - bias
    torch.testing.assert_close(difference.mean(0), torch.zeros(N), rtol=0, atol=1e-4)
    assert gptq.solve(w, None, moments(x)).bias is None


def test_each_step_lowers_what_is_minimised():
    w, collected = weight(), moments(inputs())
    problem = gptq._Problem.of(w, collected, centred=True, damping=0.01)

    def loss(codes, scales):
        return ((problem.target - gptq.dense(codes, scales)) @ problem.factor).square().sum().item()

    codes, scales = gptq.error_feedback(problem.target, problem.hessian)
    losses = [loss(codes, scales)]
    projected = problem.target @ problem.hessian
    for _ in range(2):
        codes, scales = gptq.fit_scales(codes, projected, problem.hessian)
        losses.append(loss(codes, scales))
        codes = gptq.descend(codes, scales, projected, problem.hessian)
        losses.append(loss(codes, scales))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    row, group = gptq.fit_integer_scales(codes, scales, projected, problem.hessian)
    assert loss(codes, row[:, None] * group) < 1.01 * losses[-1]
    assert group.min() >= 1 and group.max() <= 127


def test_error_feedback_without_correlation_is_exact_rounding():
    w, identity = weight(), torch.eye(K)
    codes, scales = gptq.error_feedback(w, identity)
    torch.testing.assert_close(gptq.dense(codes, scales), round_to_nearest(w))


def test_best_scale_is_the_best():
    generator = torch.Generator().manual_seed(0)
    w, importance = torch.randn(3, 16, generator=generator), torch.rand(16, generator=generator) + 0.1
    best = gptq.best_scale(w, importance)

    def loss(scale):
        return (importance * (w - scale[:, None] * nearest(w, scale[:, None])).square()).sum(1)

    for scale in torch.linspace(0.01, 4, 800):
        assert (loss(best) <= loss(scale.expand(3)) + 1e-6).all()


def test_low_rank_factors_help_and_are_the_best_for_the_inputs():
    x, w, bias = inputs(), weight(), torch.zeros(N)
    errors = [output_error(gptq.solve(w, bias, moments(x), rank=rank), x, x, w, bias) for rank in (0, 8, 32)]
    assert errors[0] > errors[1] > errors[2]
    factor = torch.linalg.cholesky(x.t() @ x / len(x) + 0.01 * torch.eye(K))
    up, down = gptq.weighted_low_rank(w, factor, 8)
    left = torch.linalg.svdvals((w - up @ down) @ factor).square().sum()
    torch.testing.assert_close(left, torch.linalg.svdvals(w @ factor)[8:].square().sum(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_few_tokens_are_handled(tokens):
    x, w = inputs(tokens=tokens), weight()
    solution = gptq.solve(w, torch.zeros(N), moments(x))
    assert torch.isfinite(solution.weight.dequantize(torch.float32)).all()
    assert solution.fit.weight_error < 1.5
    assert output_error(solution, x, x, w, torch.zeros(N)) < 0.5


def test_dead_inputs_and_no_inputs_are_handled():
    x = inputs()
    x[:, 128:] = 0
    for collected in (moments(x), moments(torch.zeros(10, K)), Moments(N, K)):
        solution = gptq.solve(weight(), None, collected)
        assert torch.isfinite(solution.weight.dequantize(torch.float32)).all()
        assert solution.fit.weight_error < 0.8


def test_inputs_that_never_change_are_handled():
    x, w, bias = (1 + torch.randn(K)).expand(1000, K), weight(), torch.zeros(N)
    solution = gptq.solve(w, bias, moments(x))
    assert solution.fit.weight_error < 0.6 and output_error(solution, x, x, w, bias) < 1e-3


def test_damping_rises_until_the_moments_can_be_factored():
    collected = Moments(N, K)
    collected.count, collected.second = torch.tensor(1.0), torch.eye(K)
    collected.second[0, 0] = -5
    solution = gptq.solve(weight(), None, collected)
    assert solution.fit.damping > 1 and torch.isfinite(solution.weight.dequantize(torch.float32)).all()


def test_activations_that_overflow_are_an_error():
    collected = moments(inputs())
    collected.second[3, 4] = torch.inf
    with pytest.raises(ValueError, match="overflow"):
        gptq.solve(weight(), None, collected)


def test_inputs_must_fill_groups():
    with pytest.raises(ValueError, match="multiples of 128"):
        gptq.solve(torch.zeros(4, 100), None, Moments(4, 100))
