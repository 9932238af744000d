"""LoRAs next to a quantized weight.

Core applies a LoRA by dequantizing, adding and requantizing; on ternary weights the rounding erases it. A plain LoRA is
therefore computed beside the quantized product, exactly: y = W x + up (down x). Everything else a patch list can hold
(DoRA, LoKr, LoHa, full differences, merges) is added to the dense weight of that layer on every call.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from .compat import core

comfy = core()

# ComfyUI's: (strength, adapter or tuple, strength of the model's own weight, offset (dim, start, length), function)
Patch = tuple


class Effect:
    """What a patch list does to one Linear. This one does nothing."""

    @property
    def nbytes(self) -> int:
        """Bytes on the device of the Linear."""
        return 0

    def attach(self, module) -> None:
        """Make the Linear act so, in place of what it did before."""
        module.weight_function = _functions_of_others(module)
        module.weight_lowvram_function = None
        module.branch = None

    def __deepcopy__(self, memo):
        """Effects never change, so copies of a model share them."""
        return self


def _functions_of_others(module) -> list:
    """The functions of a Linear's weight that are neither ours nor core's way of patching an offloaded weight."""
    return [
        function
        for function in module.weight_function
        if not (isinstance(function, Effect) or getattr(function, "is_lowvram_patch", False))
    ]


class Patched:
    """Mixin of a Linear that effects act on. Hooks put another effect in the loaded one's place for a while."""

    weight_function: list  # core's: functions of the dense weight
    weight_lowvram_function = None  # core's way of patching under dynamic VRAM, which requantizes
    branch: "Branch | None" = None  # computed beside the quantized product
    effect = Effect()  # the loaded one
    effect_tag: tuple | None = None  # identifies it
    _hooked = False

    def load_effect(self, tag: tuple | None, effect: Effect) -> None:
        self.effect_tag, self.effect, self._hooked = tag, effect, False
        effect.attach(self)

    def hook_effect(self, effect: Effect) -> None:
        self._hooked = True
        effect.attach(self)

    def unhook_effect(self) -> None:
        if self._hooked:
            self.load_effect(self.effect_tag, self.effect)


@dataclass(frozen=True, eq=False)
class Part:
    """LoRAs that read the same inputs and write the same outputs, stacked along their ranks."""

    inputs: tuple[int, int] | None  # (start, length) of the inputs read; None for all
    outputs: tuple[int, int] | None  # (start, length) of the outputs written; None for all
    down: Tensor  # [rank, inputs]
    up: Tensor  # [outputs, rank], strength included


@dataclass(frozen=True, eq=False)
class Branch(Effect):
    """The low-rank side branch of one Linear."""

    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.down.nbytes + part.up.nbytes for part in self.parts)

    def attach(self, module) -> None:
        super().attach(module)
        module.branch = self

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


class DensePatches(Effect):
    """A patch list as a function of the dense weight, the form core's cast expects in `weight_function`."""

    def __init__(self, key: str, patches: Sequence[Patch]):
        self.key = key
        self.patches = list(patches)
        self.moved: dict[int, tuple[Tensor, Tensor]] = {}  # by identity: a tensor and its copy on the device

    @property
    def nbytes(self) -> int:
        return sum(_nbytes(copy) for _, copy in self.moved.values())

    def attach(self, module) -> None:
        super().attach(module)
        module.weight_function = [self, *module.weight_function]

    def to(self, device, before: Effect | None = None) -> None:
        """Keep the patches' tensors on `device`, with the copies that the Linear's effect `before` has there."""
        known = before.moved if isinstance(before, DensePatches) else {}

        def move(tensor: Tensor) -> Tensor:
            if tensor.device == device:
                return tensor
            original, copy = known.get(id(tensor), (None, None))
            if original is not tensor or copy.device != device:
                copy = tensor.to(device)
            self.moved[id(tensor)] = tensor, copy
            return copy

        self.patches = [_map_tensors(patch, move) for patch in self.patches]

    def __call__(self, weight: Tensor) -> Tensor:
        """The patched weight, computed in fp32 as core does, in the dtype of `weight`."""
        dense = weight.to(torch.float32, copy=True)
        # Only a model used as a LoRA asks for the original weight, to take the difference from it.
        original = {self.key: [(weight, None)]}
        patched = comfy.calculate_weight(self.patches, dense, self.key, original_weights=original)
        return patched.to(weight.dtype)


def _map_tensors(value, function):
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, comfy.WeightAdapterBase):
        return type(value)(value.loaded_keys, _map_tensors(value.weights, function))
    if isinstance(value, tuple | list):
        return type(value)(_map_tensors(item, function) for item in value)
    return value


def _nbytes(tensor: Tensor) -> int:
    state = getattr(tensor, "state_dict", None)
    return tensor.nbytes if state is None else sum(part.nbytes for part in state().values())


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


def build(key: str, patches: Sequence[Patch], device, dtype: torch.dtype, dense: bool = False) -> Effect:
    """What a patch list does to one quantized Linear: a Branch on `device`, DensePatches, or nothing.

    dense    forces DensePatches, for a weight that is needed dense for another reason.
    """
    if not patches:
        return Effect()
    if dense or any(refusal(patch) for patch in patches):
        return DensePatches(key, patches)
    return _branch(patches, device, dtype)


def _branch(patches: Iterable[Patch], device, dtype: torch.dtype) -> Effect:
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
    return Branch(tuple(parts)) if parts else Effect()


def warn_misfits(model, patches: Mapping, dropped: Set) -> None:
    """Say in one line which layers of a LoRA do not fit; once for a merge, whose layers core adds one by one."""
    if isinstance(next(iter(patches.values())), list):
        said = model.__dict__.setdefault("ternary_dense_reasons", set())
        if "misfit" not in said:
            said.add("misfit")
            logging.warning(
                "Ternary FLUX: layers of a merged model do not fit and are left out: made for another model"
            )
        return
    first = min(str(key if isinstance(key, str) else key[0]) for key in dropped)
    logging.warning(
        "Ternary FLUX: %d of %d layers do not fit: made for another model. The LoRA acts without them (first: %s).",
        len(dropped),
        len(patches),
        first,
    )


def warn_dense(dense: int, ternary: int) -> None:
    """Say in one line that a saved model has dense weights where this one has trits, and what loads it."""
    node = "Load Diffusion Model" if dense == ternary else "Load Ternary FLUX"
    logging.warning(
        "Ternary FLUX: %d of %d ternary layers are saved with dense weights, since their patches cannot be kept beside "
        "trits. Load the file with the node %s.",
        dense,
        ternary,
        node,
    )


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
