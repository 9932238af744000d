"""Learning rates: how far each group of parameters moves, and how that changes in the course of a run."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..model.student import rate_groups
from .course import Course

# Step sizes at the peak of the schedule. Scales move by this factor, codes by this part of their scale, everything else
# by this part of its own typical size: the same numbers mean the same in every layer and model.
RATES = {"scale": 4e-3, "code": 1.5e-3, "rank": 1e-2, "bias": 4e-3, "norm": 4e-3, "dense": 4e-3}
# Codes are trained in the first part of a run only; from there on they stay, and everything else is fitted to them. The
# gradients of codes are mostly chance, and beside low-rank factors, which can do the same, longer training does harm.
# The rate falls with the root of the length of that part: chance then moves codes as far in a long one as in a short.
_CODES_PART, _CODES_LEAST, _CODES_BESIDE_FACTORS = 0.6, 120, 300  # of the steps; steps at least; and at most
_CODES_FULL = 86  # steps up to which the rate is the full one
_FLOOR = 0.02  # of the peak: where the cosine ends
TIMED_STEPS = 12  # steps that are timed before a budget in seconds is turned into a number of steps


def schedule(groups: Mapping[str, str], step: int, course: Course, warmup: int) -> dict[str, float]:
    """Part of the learning rate of every parameter: linear warm-up, then a cosine; that of codes ends early.

    `groups` comes from `rate_groups`. The first steps do not depend on the length of the run, which may not be known
    yet (see `TIMED_STEPS`): the codes, whose rate does, rest until then.
    """
    start, total, progress = min(1.0, (step + 1) / warmup), course.total(step), course.progress(step)
    factor = start * (_FLOOR + (1 - _FLOOR) * _cosine(0.0 if step < TIMED_STEPS else progress))
    if total is None or step < TIMED_STEPS < total:
        of_codes = 0.0
    else:
        part = max(_CODES_PART * total, min(_CODES_LEAST, total))
        if "rank" in groups.values():
            part = min(part, _CODES_BESIDE_FACTORS)
        of_codes = start * _cosine(progress * total / part) * min(1.0, math.sqrt(_CODES_FULL / part))
    return {name: of_codes if group == "code" else factor for name, group in groups.items()}


def _cosine(progress: float) -> float:
    """From 1 at 0 to 0 at 1 and beyond."""
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def learning_rates(model: nn.Module, rates: Mapping[str, float]) -> dict[str, float | Tensor]:
    """Peak learning rate of every trainable parameter: the rate of its group times the parameter's own typical size.

    Scales (logarithms) and codes (units of the scale) have size 1 by construction. Channels differ in size, so every
    element of a bias has a rate of its own, by its output for inputs of unit variance (many biases are zero at the
    start), and so has every output of `up` and every input of `down`.
    """
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    groups = rate_groups(parameters)
    sizes: dict[str, float | Tensor] = {}
    for name, parameter in parameters.items():
        group = groups[name]
        if group in ("scale", "code"):
            sizes[name] = 1.0
        elif group == "bias":
            sizes[name] = _output_sizes(model.get_submodule(name.rpartition(".")[0]))
        elif group == "rank":
            sizes[name] = parameter.float().square().mean(1 if name.endswith(".up") else 0, keepdim=True).sqrt()
        else:
            sizes[name] = float(parameter.float().square().mean().sqrt())
    return {
        name: rates[groups[name]] * (size.clamp_min(1e-8) if isinstance(size, Tensor) else max(size, 1e-8))
        for name, size in sizes.items()
    }


@torch.no_grad()
def _output_sizes(layer: nn.Module) -> Tensor:
    weight = layer.weight() if callable(layer.weight) else layer.weight
    return weight.float().norm(dim=1)
