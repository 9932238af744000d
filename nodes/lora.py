"""LoRAs next to a quantized weight.

Core applies a LoRA by dequantizing, adding and requantizing; on ternary weights the rounding erases it. A plain LoRA is
therefore computed beside the quantized product, exactly: y = W x + up (down x). Everything else a patch list can hold
(DoRA, LoKr, LoHa, full differences, merges) is added to the dense weight of that layer on every call.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from .compat import core

comfy = core()

# ComfyUI's: (strength, adapter or tuple, strength of the model's own weight, offset (dim, start, length), function)
Patch = tuple


@dataclass(frozen=True, eq=False)
class Part:
    """LoRAs that read the same inputs and write the same outputs, stacked along their ranks."""

    inputs: tuple[int, int] | None  # (start, length) of the inputs read; None for all
    outputs: tuple[int, int] | None  # (start, length) of the outputs written; None for all
    down: Tensor  # [rank, inputs]
    up: Tensor  # [outputs, rank], strength included


@dataclass(frozen=True, eq=False)
class Branch:
    """The low-rank side branch of one Linear."""

    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.down.nbytes + part.up.nbytes for part in self.parts)

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """Add the branch for inputs x [..., K] to y [..., N] in place."""
        for part in self.parts:
            read = x if part.inputs is None else x.narrow(-1, *part.inputs)
            written = y if part.outputs is None else y.narrow(-1, *part.outputs)
            written += linear(linear(read, part.down.to(x.dtype)), part.up.to(x.dtype))

    def factors(self, n: int, k: int) -> tuple[Tensor, Tensor]:
        """The whole branch as down [r, K] and up [N, r]."""
        downs, ups = [], []
        for part in self.parts:
            rank = part.down.shape[0]
            down, up = part.down.new_zeros(rank, k), part.up.new_zeros(n, rank)
            down.narrow(1, *(part.inputs or (0, k))).copy_(part.down)
            up.narrow(0, *(part.outputs or (0, n))).copy_(part.up)
            downs.append(down)
            ups.append(up)
        return torch.cat(downs), torch.cat(ups, 1)


class DensePatches:
    """A patch list as a function of the dense weight, the form core's cast expects in `weight_function`."""

    nbytes = 0

    def __init__(self, key: str, patches: Sequence[Patch]):
        self.key = key
        self.patches = list(patches)

    def __call__(self, weight: Tensor) -> Tensor:
        # Only a model used as a LoRA asks for the original weight, to take the difference from it.
        original = {self.key: [(weight.clone(), None)]}
        return comfy.calculate_weight(
            self.patches, weight, self.key, intermediate_dtype=weight.dtype, original_weights=original
        )


def refusal(patch: Patch) -> str | None:
    """Why a patch cannot run as a low-rank branch; None where it can."""
    _, adapter, strength_model, offset, function = patch
    if not isinstance(adapter, comfy.LoRAAdapter):
        return getattr(adapter, "name", "full difference" if isinstance(adapter, tuple) else "merged weight")
    _, _, _, mid, dora_scale, reshape = adapter.weights
    if dora_scale is not None:
        return "DoRA"
    if mid is not None or reshape is not None:
        return "LoCon or resizing LoRA"
    if strength_model != 1.0:
        return "merged weight"
    if function is not None:
        return "transformed LoRA"
    return None


def build(key: str, patches: Sequence[Patch], device, dtype: torch.dtype, dense: bool = False):
    """What a patch list does to one ternary Linear: a Branch on `device`, DensePatches, or None for nothing.

    dense    forces DensePatches, for a weight that is needed dense for another reason.
    """
    if not patches:
        return None
    if dense or any(refusal(patch) for patch in patches):
        return DensePatches(key, patches)
    return _branch(patches, device, dtype)


def _branch(patches: Iterable[Patch], device, dtype: torch.dtype) -> Branch | None:
    groups: dict[tuple, list[tuple[Tensor, Tensor]]] = {}
    for strength, adapter, _, offset, _ in patches:
        up, down, alpha = adapter.weights[:3]
        scale = strength * (1.0 if alpha is None else float(alpha) / down.shape[0])
        if scale == 0:
            continue
        span = None if offset is None else tuple(offset[1:])
        inputs = span if span and offset[0] == 1 else None
        outputs = span if span and offset[0] == 0 else None
        factors = down.flatten(1).to(device, torch.float32), up.flatten(1).to(device, torch.float32) * scale
        groups.setdefault((inputs, outputs), []).append(factors)
    parts = [
        Part(inputs, outputs, torch.cat([d for d, _ in pairs]).to(dtype), torch.cat([u for _, u in pairs], 1).to(dtype))
        for (inputs, outputs), pairs in groups.items()
    ]
    return Branch(tuple(parts)) if parts else None


def warn_once(model, patches: Iterable[Patch]) -> None:
    """Say once per model, and once per reason, that some layers run dense."""
    said = model.__dict__.setdefault("ternary_dense_reasons", set())
    for reason in {refusal(patch) for patch in patches} - {None} - said:
        said.add(reason)
        logging.warning(
            "Ternary FLUX: a %s patch cannot run beside a quantized weight; the layers it touches are expanded to "
            "dense weights on every step, which is exact but slower. Plain LoRAs do not need this.",
            reason,
        )
