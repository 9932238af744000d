"""The mixed profile: the Linears whose ternary error hurts most become 8-bit, in ComfyUI's own format.

How much a Linear hurts is measured, not guessed: the velocities with this Linear alone in the original's weights,
against those of the model as it is.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint
from .format import INT8, LayerPlan, TernaryFile, create_ternary
from .student import load_student, ternary_linears
from .velocity import Batch


@dataclass(frozen=True)
class Sensitivity:
    """One Linear: how much the model's velocity error falls with 8 bits instead of ternary, and the bytes it costs."""

    name: str
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
    on_layer: Callable[[int], object] = lambda layers: None,
) -> list[Sensitivity]:
    """Measure every ternary Linear at these states, one after the other; the best gain for its bytes comes first."""
    model = load_student(file, device).requires_grad_(False)
    before, results = _error(model, batches), []
    for name, layer in ternary_linears(model).items():
        codes, scale = int8(teacher.tensor(f"{name}.weight").to(device))
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, _Dense(codes.float() * scale, layer.bias))
        gain = before - _error(model, batches)
        setattr(model.get_submodule(parent), leaf, layer)
        results.append(Sensitivity(name, gain, codes.numel() + 4 * len(codes) - file.layers[name].nbytes))
        on_layer(1)
    return sorted(results, key=lambda result: -result.gain / result.cost)


def choose(ranking: Sequence[Sensitivity], extra_bytes: int) -> list[str]:
    """The Linears that become 8-bit: by gain for their bytes, as long as they fit and help."""
    chosen = []
    for result in ranking:
        if result.gain > 0 and result.cost <= extra_bytes:
            chosen.append(result.name)
            extra_bytes -= result.cost
    return chosen


def write_mixed(
    path: str | os.PathLike, file: TernaryFile, teacher: Checkpoint, names: Sequence[str], overwrite: bool = False
) -> None:
    """Write the ternary file with these Linears in 8 bits from the original's weights, atomically."""
    chosen = set(names)
    if len(chosen) == len(file.layers):
        raise ValueError("no Linear would stay ternary; choose fewer, or use a plain int8 checkpoint")
    plans: Mapping[str, LayerPlan] = {name: plan for name, plan in file.layers.items() if name not in chosen}
    dense = {name: file.tensor(name) for name in file.dense}
    entry = torch.frombuffer(bytearray(json.dumps({"format": INT8}).encode()), dtype=torch.uint8)
    for name in names:
        codes, scale = int8(teacher.tensor(f"{name}.weight"))
        dense |= {f"{name}.weight": codes, f"{name}.weight_scale": scale, f"{name}.comfy_quant": entry}
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in dense.items()}
    metadata = dict(file.metadata) | {"ternary.int8": json.dumps(list(names))}
    with create_ternary(path, plans, specs, metadata, overwrite=overwrite) as writer:
        for name in plans:
            writer.layer(name, file.weight(name))
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
