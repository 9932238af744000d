"""The mixed profile: the Linears whose ternary error hurts most get two trit planes, or 8 bits in ComfyUI's own format.

How much a Linear hurts is measured, not guessed: the velocities with this Linear alone in another kind, made from the
original's weights, against those of the model as it is.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint
from .format import INT8, LayerPlan, TernaryFile, create_ternary
from .inspection import stated_errors
from .planes import two_planes
from .student import load_student, ternary_linears
from .velocity import Batch

KINDS = ("planes", "int8")  # two trit planes, or 8 bits


@dataclass(frozen=True)
class Sensitivity:
    """One Linear in one kind: how much the model's velocity error falls with it alone, and the bytes it adds."""

    name: str
    kind: str
    gain: float
    cost: int


def int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric rounding of [N, K] to int8 with one scale a row: int8 [N, K] and fp32 [N, 1]."""
    weight = weight.float()
    scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
    return (weight / scale).round_().to(torch.int8), scale


@torch.no_grad()
def sensitivities(
    file: TernaryFile,
    teacher: Checkpoint,
    batches: Sequence[Batch],
    device: torch.device | str = "cpu",
    kinds: Sequence[str] = KINDS,
    on_layer: Callable[[int], object] = lambda layers: None,
) -> list[Sensitivity]:
    """Measure every Linear of one trit plane in each of these kinds at these states, one after the other."""
    model = load_student(file, device).requires_grad_(False)
    before, results = _error(model, batches), []
    for name, layer in ternary_linears(model).items():
        dense, plan = teacher.tensor(f"{name}.weight").to(device), file.layers[name]
        parent, _, leaf = name.rpartition(".")
        for kind in kinds:
            if kind == "int8":
                codes, scale = int8(dense)
                weight, size = codes.float() * scale, codes.numel() + 4 * len(codes)
            else:
                weight = two_planes(dense)[0].to(device).dequantize()
                size = LayerPlan(plan.shape, plan.packing, planes=2).nbytes
            setattr(model.get_submodule(parent), leaf, _Dense(weight, layer.bias))
            results.append(Sensitivity(name, kind, before - _error(model, batches), size - plan.nbytes))
        setattr(model.get_submodule(parent), leaf, layer)
        on_layer(1)
    return results


def choose(measured: Sequence[Sensitivity], extra_bytes: int) -> dict[str, Sensitivity]:
    """What becomes of which Linear: step after step the change that gains most for the bytes it adds, while one fits.

    A step takes a Linear from one trit plane to another kind, or on from two planes to 8 bits.
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
    kinds: Mapping[str, str],
    overwrite: bool = False,
) -> None:
    """Write the ternary file with these Linears in other kinds (name -> kind), made from the original's weights.

    Atomic. Raises ValueError where no Linear would stay in trits.
    """
    names = [name for name, kind in kinds.items() if kind == "int8"]
    if len(names) == len(file.layers):
        raise ValueError("no Linear would stay ternary; choose fewer, or use a plain int8 checkpoint")
    weights, errors = {}, stated_errors(file)
    for name in kinds.keys() - set(names):
        weights[name], errors[name] = two_planes(teacher.tensor(f"{name}.weight"))
    plans = {name: plan for name, plan in file.layers.items() if name not in names}
    plans |= {name: LayerPlan.of(weight, file.layers[name].packing) for name, weight in weights.items()}
    dense = {name: file.tensor(name) for name in file.dense}
    entry = torch.frombuffer(bytearray(json.dumps({"format": INT8}).encode()), dtype=torch.uint8)
    for name in names:
        codes, scale = int8(teacher.tensor(f"{name}.weight"))
        dense |= {f"{name}.weight": codes, f"{name}.weight_scale": scale, f"{name}.comfy_quant": entry}
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in dense.items()}
    metadata = dict(file.metadata) | {
        "ternary.mixed": json.dumps(dict(kinds)),
        "ternary.weight_errors": json.dumps({name: round(errors[name], 4) for name in plans if name in errors}),
    }
    with create_ternary(path, plans, specs, metadata, overwrite=overwrite) as writer:
        for name in plans:
            writer.layer(name, weights.get(name) or file.weight(name))
        for name, tensor in dense.items():
            writer.dense(name, tensor)


class _Dense(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def _error(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Squared velocity error relative to the teacher's velocities."""
    error = power = 0.0
    for batch in batches:
        error += float((model(*batch.inputs) - batch.velocity).square().sum())
        power += float(batch.velocity.square().sum())
    return error / power
