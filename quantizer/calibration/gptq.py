"""Ternary codes for one Linear from the second moments of its inputs.

Minimises E |y - V x|^2 over V = codes * group scales, where x is what the ternary model's Linear sees and y what should
come out: what the teacher's Linear gives there, or what the tokens miss. Error feedback as in GPTQ (arXiv 2210.17323)
towards the target of GPTAQ (arXiv 2504.02692), then coordinate descent over codes in turn with a joint least squares
over the scales of each row. All of it needs the data only through H = E x x^T and C = E (y - W x) x^T.

Where something behind the Linear mixes its outputs, E (y - V x)^T M (y - V x) is what counts: rows then make up for
each other's errors (as in two-sided feedback, arXiv 2505.22988). M is known of the last Linear (`Streams.moments`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...ops import GROUP_SIZE, TernaryWeight, group_codes
from ...ops.codes import nearest
from ...ops.scales import MAX_MULTIPLIER, fit_integer_groups
from .moments import Moments

# Chosen on held-out prompts of the miniature. A damping of 0.01 with the whole correction ends in a velocity error of
# 4.06, worse than rounding: weights grow 20-fold along directions that the inputs hardly use. 0.1 ends in 0.24, with
# half of the correction in 0.064; 0.03 with half of it in 0.060.
DAMPING = 0.03
CORRECTION = 0.5  # of the drift that earlier Linears caused, made up for here; GPTAQ takes all of it
SWEEPS = 3
# Of the final Linear, which stays dense and behind which nothing can be ruined: all is made up for. On held-out prompts
# the velocity error is 0.0372 with 0.1, 0.0360 with 0.01 and 0.0003; with 0.01 and half of the correction it is 0.0396.
DENSE_DAMPING = 0.01
# Of the metric M, relative to the mean of its diagonal. On held-out prompts the velocity error, 0.0382 without M, is
# 0.0312 after 3 sweeps with 0.03, and 0.0302 after 6 with 0.003.
METRIC_DAMPING = 0.003
_SHARING = 2  # sweeps over rows for each over codes; after 3 of the former 0.51 of the error by M is left, after 6 0.47
_TOGETHER = 0.25  # of the metric's effective rank: rows that make up for the others at a time; more spoil it
_ROWS = 1024  # rows at a time on a CPU
_INTEGER_SWEEPS = 4
_EXACT = 4096  # inputs up to which H is factored in float64
_MAX_DAMPING = 1e6
_NOISE = 1e-5  # of the inputs' power, below which their variance is rounding error
_ROUNDING = 1e-6  # added to a damped H against rounding errors


@dataclass(frozen=True)
class LayerFit:
    """How one Linear was quantized; errors are relative and not squared."""

    weight_error: float  # of the weights
    output_error: float  # of the outputs on the calibration states, against the best dense Linear; by M if there is one
    effective_rank: float  # of the inputs: (trace H)^2 / |H|^2
    inputs: int
    tokens: int
    damping: float  # what was needed to factor H, relative to the mean of its diagonal
    exponent: float | None = None  # of the column scales; None without any


@dataclass(frozen=True, eq=False)
class Solution:
    weight: TernaryWeight
    bias: Tensor | None  # fp32 [N]
    fit: LayerFit


def solve(
    weight: Tensor,
    bias: Tensor | None,
    moments: Moments,
    *,
    rank: int = 0,
    damping: float = DAMPING,
    sweeps: int = SWEEPS,
    terms: int = 1,
    column: Tensor | None = None,
) -> Solution:
    """Quantize `weight` [N, K] (K a multiple of 128). Everything is computed in fp32 on the device of the moments,
    which are used up.

    A bias [N] also absorbs the difference of means. `damping` is relative to the mean of H's diagonal, and is raised
    tenfold until H can be factored. `rank` adds low-rank factors fitted to what codes and scales leave. Without them
    there can be two `terms`. With `column` scales [K] all of it happens on inputs times those, and weights over them.
    """
    w = weight.to(moments.second.device, torch.float32)
    if column is not None:
        w = w / column.float()
        moments.scale_inputs(column.float())
    if w.shape[1] % GROUP_SIZE:
        raise ValueError(f"a Linear with {w.shape[1]} inputs; multiples of {GROUP_SIZE} are supported")
    problem = _Problem.of(w, moments, centred=bias is not None, damping=damping)
    if terms == 2:
        codes, row, group, factors = *_solve_two_terms(problem, sweeps), {}
    else:
        codes, row, group, factors = _solve_one_term(problem, rank, sweeps, column)
    group = group.t().to(torch.uint8).contiguous()
    result = TernaryWeight.from_codes(codes.to(torch.int8), row, group, terms=terms, column=column, **factors)
    approximation = result.dequantize(torch.float32)
    fit = problem.fit(weight.to(w), approximation, column)
    if bias is not None:
        approximation = approximation if column is None else approximation / column.float()
        bias = bias.to(w) + problem.wanted + (w - approximation) @ problem.mean
    return Solution(result, bias, fit)


def refit(weight: Tensor, bias: Tensor | None, moments: Moments) -> tuple[Tensor, Tensor | None]:
    """The weight [N, K] and bias [N] of a Linear that stays dense: least squares towards the outputs that are wanted.

    The moments are used up.
    """
    w = weight.to(moments.second.device, torch.float32)
    problem = _Problem.of(w, moments, centred=bias is not None, damping=DENSE_DAMPING, correction=1.0)
    if bias is not None:
        bias = bias.to(w) + problem.wanted + (w - problem.target) @ problem.mean
    return problem.target, bias


def rough_error(weight: Tensor, moments: Moments, column: Tensor | None, centred: bool) -> float:
    """About the error of the outputs that `solve` would leave with these column scales, for a tenth of the time.

    Codes are rounded to the nearest and descend once, towards the outputs of the weight as it is: nothing is factored.
    The moments are used up.
    """
    target = weight
    if column is not None:
        target = target / column.float()
        moments.scale_inputs(column.float())
    hessian, _, _ = _covariance(moments, centred)
    damped = hessian.clone()
    damped.diagonal().add_(DAMPING)
    groups = target.unflatten(1, (-1, GROUP_SIZE)).unbind(1)
    power = damped.diagonal().view(-1, GROUP_SIZE)
    scales = torch.stack([best_scale(group, p) for group, p in zip(groups, power, strict=True)], 1)
    codes = nearest(target, dense(torch.ones_like(target), scales))
    error = target - dense(descend(codes, scales, target @ damped, damped), scales)
    squares = [((x @ hessian) * x).sum().clamp_min(0) for x in (error, target)]
    return float((squares[0] / squares[1].clamp_min(1e-30)).sqrt())


def _solve_one_term(
    problem: "_Problem", rank: int, sweeps: int, column: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Codes [N, K], row scales [N], group multipliers [N, K/128] and low-rank factors, if any.

    The factors are for the inputs as they come, without the column scales.
    """
    hessian, stored = problem.hessian, {}
    codes, scales = error_feedback(problem.target, hessian)
    projected = problem.target @ hessian
    for _ in range(sweeps):
        codes, scales = fit_scales(codes, projected, hessian)
        codes = descend(codes, scales, projected, hessian)
        if rank:
            up, down = weighted_low_rank(problem.target - dense(codes, scales), problem.factor, rank)
            down = down if column is None else down * column.float()
            stored = {"up": up.bfloat16(), "down": down.bfloat16()}  # codes and scales make up for the rounding
            up, down = (factor.float() for factor in stored.values())
            down = down if column is None else down / column.float()
            projected = (problem.target - up @ down) @ hessian
    codes, scales = fit_scales(codes, projected, hessian)
    row, group = fit_integer_scales(codes, scales, projected, hessian)
    codes = descend(codes, row[:, None] * group, projected, hessian)
    row, group = fit_integer_scales(codes, row[:, None] * group, projected, hessian)
    if problem.metric is not None:
        codes, row, group = share_among_rows(codes, row, group, projected, hessian, problem.metric, sweeps)
    return codes, row, group, stored


def _solve_two_terms(problem: "_Problem", sweeps: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `_solve_one_term` with codes [N, 2K] and multipliers [N, 2K/128]: two ternary weights that are added.

    The second one starts as the answer to what the first leaves; then each in turn is fitted to what the other leaves.
    """
    hessian, terms, left = problem.hessian, [], problem.target
    for _ in range(2):
        codes, scales = error_feedback(left, hessian)
        terms.append((codes, scales))
        left = left - dense(codes, scales)
    for _ in range(sweeps):
        for this in range(2):
            projected = (problem.target - dense(*terms[1 - this])) @ hessian
            codes, scales = fit_scales(terms[this][0], projected, hessian)
            terms[this] = descend(codes, scales, projected, hessian), scales
    # Two terms are one ternary weight whose inputs come twice, and share their row scales as such.
    twice, projected = hessian.repeat(2, 2), (problem.target @ hessian).repeat(1, 2)
    codes = torch.cat([codes for codes, _ in terms], 1)
    row, group = fit_integer_scales(codes, torch.cat([scales for _, scales in terms], 1), projected, twice)
    if problem.metric is not None:
        codes, row, group = share_among_rows(codes, row, group, projected, twice, problem.metric, sweeps)
    return codes, row, group


@dataclass(frozen=True, eq=False)
class _Problem:
    """The problem min |(target - V) factor|^2 with H = factor factor^T, normalised to a mean diagonal of 1."""

    target: Tensor  # [N, K]
    hessian: Tensor  # [K, K], damped
    factor: Tensor  # [K, K], lower triangular
    mean: Tensor  # [K] of the inputs
    wanted: Tensor  # [N], what the outputs should have more on the mean
    metric: Tensor | None  # [N, N] of the outputs, with a mean diagonal of 1
    damping: float
    effective_rank: float
    tokens: int

    @classmethod
    def of(
        cls, weight: Tensor, moments: Moments, centred: bool, damping: float, correction: float = CORRECTION
    ) -> "_Problem":
        hessian, mean, unit = _covariance(moments, centred)
        cross, wanted = moments.correction(weight)
        if centred:
            cross -= torch.outer(wanted, mean)
        # Few tokens cannot tell what inputs cause from chance.
        cross *= correction * moments.tokens / (moments.tokens + len(mean)) / unit
        effective_rank = (hessian.trace().square() / hessian.square().sum().clamp_min(1e-30)).item()
        factor, damping = _factor(hessian, damping)
        factor = factor.float()
        hessian.diagonal().add_(damping)
        target = weight + torch.cholesky_solve(cross.t(), factor).t()
        metric = moments.metric
        if metric is not None:
            metric = (metric / metric.diagonal().mean().clamp_min(1e-30)).float()
        return cls(target, hessian, factor, mean, wanted, metric, damping, effective_rank, moments.tokens)

    def fit(self, weight: Tensor, approximation: Tensor, column: Tensor | None) -> LayerFit:
        """Of a weight [N, K] and what it became, both as they meet the inputs that come."""
        error = weight - approximation
        scaled = approximation if column is None else approximation / column.float()
        return LayerFit(
            weight_error=(error.norm() / weight.norm().clamp_min(1e-30)).item(),
            output_error=self._size(self.target - scaled) / max(self._size(self.target), 1e-30),
            effective_rank=self.effective_rank,
            inputs=weight.shape[1],
            tokens=self.tokens,
            damping=self.damping,
        )

    def _size(self, weight: Tensor) -> float:
        """Root of the outputs' power, without the damping."""
        seen = weight if self.metric is None else self.metric @ weight
        power = ((seen @ self.factor) * (weight @ self.factor)).sum() - self.damping * (seen * weight).sum()
        return power.clamp_min(0).sqrt().item()


def _covariance(moments: Moments, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
    """H [K, K] of inputs, from moments that it uses up, with a mean diagonal of 1; their mean [K]; and H's unit."""
    count = moments.count.clamp_min(1e-30)
    hessian, mean = moments.second.div_(count).float(), (moments.mean / count).float()
    power = hessian.diagonal().mean()
    if centred:
        hessian -= torch.outer(mean, mean)
    # What is left of inputs that hardly vary is rounding error, and must not be blown up.
    unit = torch.maximum(hessian.diagonal().mean(), _NOISE * power).clamp_min(torch.finfo(torch.float32).tiny)
    hessian = hessian.div_(unit)
    return hessian.add_(hessian.t().clone()).div_(2), mean, unit


def _factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """Lower Cholesky factor of H + damping I (float64 for small H), and the damping that was needed."""
    if not hessian.sum().isfinite():
        raise ValueError("the second moments of a Linear's inputs are not finite: activations of the model overflow")
    damped = hessian.double() if hessian.shape[0] <= _EXACT else hessian  # of large ones there is no room for a copy
    diagonal = damped.diagonal().clone()
    try:
        while damping < _MAX_DAMPING:
            damped.diagonal().copy_(diagonal + damping)
            factor, failed = torch.linalg.cholesky_ex(damped)
            if not failed and factor.sum().isfinite():
                return factor, damping
            del factor
            damping *= 10
    finally:
        damped.diagonal().copy_(diagonal)
    raise ValueError(
        f"the second moments of a Linear's inputs cannot be factored with a damping of {damping:g}: give a --damping "
        f"below {_MAX_DAMPING:g}, and more --states"
    )


def error_feedback(target: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """GPTQ with a ternary grid: codes fp32 [N, K] and group scales [N, K/128].

    Groups are taken in the order of their inputs' power, and inputs likewise within a group; the scale of a group is
    the best one at its turn for the weights as the feedback has left them.
    """
    power = hessian.diagonal().view(-1, GROUP_SIZE)
    groups = power.sum(1).argsort(descending=True)
    order = (groups[:, None] * GROUP_SIZE + power[groups].argsort(1, descending=True)).flatten()
    inverse = _inverse_factor(hessian, order)
    codes, scales = torch.empty_like(target), target.new_empty(len(target), len(groups))
    for rows in _chunks(target):
        w = target[rows][:, order]
        ordered = torch.empty_like(w)
        for turn, group in enumerate(groups.tolist()):
            columns, rest = slice(turn * GROUP_SIZE, (turn + 1) * GROUP_SIZE), slice((turn + 1) * GROUP_SIZE, None)
            local = inverse[columns, columns]
            scale = best_scale(w[:, columns], local.diagonal().square().reciprocal())
            block = w[:, columns].t().contiguous()
            chosen, errors = group_codes(block, scale, local, local.diagonal().reciprocal())
            w[:, rest].addmm_(errors.t(), inverse[columns, rest], alpha=-1)
            ordered[:, columns] = chosen.t()
            scales[rows, group] = scale
        codes[rows] = ordered[:, order.argsort()]
    return codes, scales


def _chunks(rows: Tensor) -> list[slice]:
    """Rows that a CPU's cache can hold; a GPU takes all at once."""
    step = _ROWS if rows.device.type == "cpu" else len(rows)
    return [slice(start, min(start + step, len(rows))) for start in range(0, len(rows), step)]


def _inverse_factor(hessian: Tensor, order: Tensor) -> Tensor:
    """Upper triangular U with H^-1 = U^T U for the inputs in this order.

    It is the inverse of the Cholesky factor taken from the other end.
    """
    backward = order.flip(0)
    factor = _factor(hessian[backward[:, None], backward], _ROUNDING)[0].flip(0, 1)
    identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, identity, upper=True).float()


def best_scale(weight: Tensor, importance: Tensor) -> Tensor:
    """The scale [N] that minimises sum_k importance[k] (w[n, k] - scale * code)^2 with the best codes in {-1, 0, +1}.

    Exact: the non-zero codes are those of the largest magnitudes, so every such prefix is tried.
    """
    magnitude, index = weight.abs().sort(dim=1, descending=True)
    weights = importance[index]
    weighted, total = (weights * magnitude).cumsum(1), weights.cumsum(1)
    best = (weighted.square() / total).argmax(1, keepdim=True)
    return (weighted.gather(1, best) / total.gather(1, best)).squeeze(1)


def descend(codes: Tensor, scales: Tensor, projected: Tensor, hessian: Tensor) -> Tensor:
    """One sweep of coordinate descent: every code in turn gets its best value given all others.

    `projected` is the target times H, here and below.
    """
    result = torch.empty_like(codes)
    for rows in _chunks(codes):
        gradient = projected[rows] - dense(codes[rows], scales[rows]) @ hessian
        for group, scale in enumerate(scales[rows].unbind(1)):
            columns = slice(group * GROUP_SIZE, (group + 1) * GROUP_SIZE)
            block, old = gradient[:, columns].t().contiguous(), codes[rows, columns].t().contiguous()
            local = hessian[columns, columns]
            new, changes = group_codes(block, scale, local, local.diagonal().reciprocal(), old)
            gradient.addmm_(changes.t(), hessian[columns], alpha=-1)
            result[rows, columns] = new.t()
    return result


def fit_scales(codes: Tensor, projected: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """The least-squares scales [N, K/128] of all groups of each row at once; negative ones flip the codes' signs."""
    scales = codes.new_empty(len(codes), codes.shape[1] // GROUP_SIZE)
    for rows in _chunks(codes):
        matrix, vector = scale_system(codes[rows], projected[rows], hessian)
        scales[rows] = torch.linalg.solve(matrix.double(), vector.double()).float()
    signs = torch.where(scales < 0, -1.0, 1.0)
    return dense(codes, signs), scales.abs()


def fit_integer_scales(codes: Tensor, scales: Tensor, projected: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Row scales [N] and group multipliers 1..127 [N, K/128] near `scales`, by coordinate descent over the multipliers.

    Rounding each scale alone costs where inputs are strongly correlated: the others can make up for its rounding.
    """
    row, group = fit_integer_groups(scales.t())
    row, group = row.clone(), group.t().float().contiguous()
    for rows in _chunks(codes):
        matrix, vector = scale_system(codes[rows], projected[rows], hessian)
        r, g = row[rows].clamp_min(1e-30), group[rows]
        for _ in range(_INTEGER_SWEEPS):
            for j in range(g.shape[1]):
                rest = vector[:, j] / r - (matrix[:, j] * g).sum(1)
                g[:, j] = (g[:, j] + rest / matrix[:, j, j]).round().clamp_(1, MAX_MULTIPLIER)
            power = (matrix @ g[..., None])[..., 0]
            r = ((g * vector).sum(1) / (g * power).sum(1)).clamp_min(1e-30)
        row[rows], group[rows] = r, g
    return row, group


def share_among_rows(
    codes: Tensor, row: Tensor, group: Tensor, projected: Tensor, hessian: Tensor, metric: Tensor, sweeps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, K], row scales [N] and multipliers [N, K/128] whose rows make up for each other's errors.

    A few rows at a time are fitted, each for itself, to what would be best for them all given the other rows, by the
    `metric` [N, N] of the outputs; they stay as they were where that does not help. As far as the metric does not see
    it, the error of each row may grow.
    """
    codes, row, group = codes.clone(), row.clone(), group.clone()
    metric = metric.clone()
    metric.diagonal().add_(METRIC_DAMPING)
    outputs = float(metric.trace().square() / metric.square().sum())
    left = projected - dense(codes, row[:, None] * group) @ hessian
    for _ in range(_SHARING * sweeps):
        for some in torch.arange(len(codes), device=codes.device).split(max(1, int(_TOGETHER * outputs))):
            own, slope = metric[some][:, some], metric[some] @ left
            wanted = projected[some] - left[some] + torch.linalg.solve(own, slope)
            new, scales = fit_scales(codes[some], wanted, hessian)
            new = descend(new, scales, wanted, hessian)
            new_row, new_group = fit_integer_scales(new, scales, wanted, hessian)
            change = dense(codes[some], row[some, None] * group[some]) - dense(new, new_row[:, None] * new_group)
            moved = change @ hessian
            if ((2 * slope + own @ moved) * change).sum() < 0:
                codes[some], row[some], group[some] = new, new_row, new_group
                left[some] += moved
    return codes, row, group


def scale_system(codes: Tensor, projected: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """The normal equations of the scales of each row: [N, G, G] and [N, G]. Groups without codes get a scale of 0."""
    groups = codes.shape[1] // GROUP_SIZE
    matrix = codes.new_empty(len(codes), groups, groups)
    for i in range(groups):
        columns = slice(i * GROUP_SIZE, (i + 1) * GROUP_SIZE)
        matrix[:, i] = ((codes[:, columns] @ hessian[columns]) * codes).unflatten(1, (groups, -1)).sum(-1)
    vector = (projected * codes).unflatten(1, (groups, -1)).sum(-1)
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    diagonal += 1e-6 * diagonal.mean(1, keepdim=True) + 1e-12
    return matrix, vector


def dense(codes: Tensor, scales: Tensor) -> Tensor:
    """Codes [N, K] times group scales [N, K/128]."""
    return (codes.unflatten(1, (scales.shape[1], -1)) * scales[..., None]).flatten(1)


def weighted_low_rank(residual: Tensor, factor: Tensor, rank: int, passes: int = 4) -> tuple[Tensor, Tensor]:
    """Up [N, r] and down [r, K] that minimise |(residual - up down) factor|, by subspace iteration."""
    weighted = residual @ factor
    generator = torch.Generator(weighted.device).manual_seed(0)
    columns = min(rank + 8, *weighted.shape)
    basis = torch.randn(weighted.shape[1], columns, generator=generator, device=weighted.device)
    for _ in range(passes):
        basis = torch.linalg.qr(weighted.t() @ torch.linalg.qr(weighted @ basis).Q).Q
    left, values, right = torch.linalg.svd(weighted @ basis, full_matrices=False)
    right = right @ basis.t()
    rank = min(rank, len(values))
    size = values[:rank].sqrt()
    down = torch.linalg.solve_triangular(factor.t(), right[:rank].t(), upper=True).t()
    return left[:, :rank] * size, down * size[:, None]
