"""The mixed profile: the Linears whose ternary error hurts most get two terms, or 8 bits in ComfyUI's own format.

How much a Linear hurts is measured, not guessed: the velocity error of the original with this Linear alone as it is in
the ternary file, less the error with this Linear alone in the other precision. In the ternary model itself such gains
cannot be seen: its Linears make up for each other's errors, and one that becomes better alone makes the whole worse. So
the choice comes before calibration, which fits the Linears that stay ternary to those that do not.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import ranks
from ..files.checkpoint import Checkpoint
from ..files.layer import LayerPlan
from ..files.precision import PRECISIONS, int8, int8_tensors, metadata, precisions_of
from ..files.summary import stated_errors
from ..files.ternary import TernaryFile, write_ternary
from ..model.flux import Tokens, linear_of
from ..model.teacher import Teacher
from ..pictures.states import Batch
from ..rounding.two_terms import two_terms


@dataclass(frozen=True)
class Sensitivity:
    """One Linear in one precision: how much less it adds to the original's velocity error, and the bytes it adds."""

    name: str
    precision: str
    gain: float
    cost: int


@torch.no_grad()
def sensitivities(
    file: TernaryFile,
    teacher: Teacher,
    batches: Sequence[Batch],
    *,
    precisions: Sequence[str] = PRECISIONS,
    on_layer: Callable[[int], object] = lambda layers: None,
) -> list[Sensitivity]:
    """Measure every Linear of one term in each of these precisions at these states, one after the other.

    Every rank measures its share of the Linears, and gets all results.
    """
    results: list[Sensitivity] = []
    names, count = teacher.arch.block_names, 0
    tokens = [teacher.prepare(batch.inputs) for batch in batches]
    for number, block_name in enumerate(names, 1):
        block = teacher.block(block_name)
        for name in teacher.arch.block_linears(block_name):
            full = f"{block_name}.{name}"
            if full not in file.layers or file.layers[full].terms > 1:
                continue
            count += 1
            if (count - 1) % ranks.world() != ranks.rank():
                continue
            linear, plan = linear_of(block, name), file.layers[full]
            after = _changed(block, linear, file.weight(full).dequantize(), tokens)
            ternary = _error(teacher, after, names[number:], batches)
            for precision in precisions:
                after = _changed(block, linear, rounded(linear.weight, precision), tokens)
                gain = ternary - _error(teacher, after, names[number:], batches)
                results.append(Sensitivity(full, precision, gain, _size(plan, precision) - plan.nbytes))
            on_layer(1)
        tokens = [block(each) for each in tokens]
    return [result for found in ranks.gather(results) for result in found]


def _changed(block: nn.Module, linear: nn.Linear, weight: Tensor, tokens: Sequence[Tokens]) -> list[Tokens]:
    """The tokens after the block with another weight in this Linear of it."""
    kept, linear.weight = linear.weight, nn.Parameter(weight.to(linear.weight), requires_grad=False)
    try:
        return [block(each) for each in tokens]
    finally:
        linear.weight = kept


def _error(teacher: Teacher, tokens: Sequence[Tokens], blocks: Sequence[str], batches: Sequence[Batch]) -> float:
    """Squared velocity error, relative, that the teacher ends in from these tokens before these blocks."""
    for name in blocks:
        block = teacher.block(name)
        tokens = [block(each) for each in tokens]
    wrong = power = 0.0
    for each, batch in zip(tokens, batches, strict=True):
        velocity = batch.velocity.float()
        wrong += float((teacher.stem.finish(each).float() - velocity).square().sum())
        power += float(velocity.square().sum())
    return wrong / power


def rounded(weight: Tensor, precision: str) -> Tensor:
    """A weight [N, K] with the values, fp32, that it has in this precision."""
    if precision == "int8":
        codes, scale = int8(weight)
        return codes.float() * scale
    return two_terms(weight)[0].dequantize()


def _size(plan: LayerPlan, precision: str) -> int:
    """Bytes of the Linear of this plan in this precision."""
    n, k = plan.shape
    return n * k + 4 * n if precision == "int8" else LayerPlan(plan.shape, plan.packing, terms=2).nbytes


def best_upgrades(measured: Sequence[Sensitivity], extra_bytes: int) -> dict[str, Sensitivity]:
    """What becomes of which Linear: step after step the change that gains most for the bytes it adds, while one fits.

    A step takes a Linear from one term to another precision, or on from two terms to 8 bits.
    """
    chosen: dict[str, Sensitivity] = {}
    while True:
        steps = []
        for option in measured:
            now = chosen.get(option.name, Sensitivity(option.name, "ternary", 0.0, 0))
            gain, cost = option.gain - now.gain, option.cost - now.cost
            if gain > 0 and cost <= extra_bytes:
                steps.append((gain / max(cost, 1), cost, option))
        if not steps:
            return chosen
        _, cost, best = max(steps, key=lambda step: step[0])
        chosen[best.name] = best
        extra_bytes -= cost


def write_mixed(
    path: str | os.PathLike,
    file: TernaryFile,
    teacher: Checkpoint,
    precisions: Mapping[str, str],
    *,
    overwrite: bool = False,
) -> None:
    """Write the ternary file with these Linears, from the original's weights, in other precisions (name -> precision).

    Atomic. Raises ValueError where no Linear would stay in trits.
    """
    plans = {name: plan for name, plan in file.layers.items() if precisions.get(name) != "int8"}
    if not plans:
        raise ValueError("no Linear would stay ternary; choose fewer, or use a plain int8 checkpoint")
    weights, errors = {}, stated_errors(file.metadata)
    for name in (name for name, precision in precisions.items() if precision == "two-terms"):
        weights[name], errors[name] = two_terms(teacher.tensor(f"{name}.weight"))
        plans[name] = LayerPlan.of(weights[name], file.layers[name].packing)
    dense = {name: file.tensor(name) for name in file.dense} | int8_tensors(teacher, precisions)
    errors = {name: round(errors[name], 4) for name in plans if name in errors}
    described = dict(file.metadata) | metadata(precisions_of(file) | dict(precisions))
    described["ternary.weight_errors"] = json.dumps(errors)
    write_ternary(
        path, plans, lambda name: weights.get(name) or file.weight(name), dense, described, overwrite=overwrite
    )
