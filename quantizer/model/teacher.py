"""The dense model that is imitated: held in memory where it fits, read from its checkpoint block by block elsewhere.

A model that does not fit is read once for many states: all of them cross one block before any crosses the next, and the
next block is read and copied while the device computes.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

import psutil
import torch
from torch import Tensor, nn

from .. import ranks
from ..files.architecture import Architecture
from ..files.checkpoint import Checkpoint
from ..files.sources.encodings import check_finite
from .flux import Flux, Inputs, Tokens, make_block
from .staging import Staging

_RESIDENT = 0.6  # of the free memory that a model held in it may take
_USED = 0.85  # of the free memory that a model that is read block by block may take
# Tokens that hide the reading of a block. A token costs as many operations as the block has bytes in bf16, so with this
# many the disk may be as slow as operations per second / tokens: 0.6 GB/s beside 165 TFLOP/s. On a CPU, few: what is
# under way is lost when a run is interrupted.
_HIDING = {"cuda": 1 << 18, "cpu": 1 << 14}
_COMPUTED = 28  # values of the hidden size at most that a block computes for a token at the same time
_Module = TypeVar("_Module", bound=nn.Module)


@dataclass(frozen=True)
class Placement:
    """How a teacher lies in memory.

    resident   all blocks are held
    tokens     that cross a block together where they are not; at least one batch does
    """

    resident: bool
    tokens: int

    def together(self, batch: int, tokens: int) -> int:
        """Batches of so many states with so many tokens each that share one reading of the blocks."""
        return 1 if self.resident else max(1, self.tokens // (batch * tokens))


def place(arch: Architecture, free: int, device: str, width: int, batch_tokens: int = 4608) -> Placement:
    """What fits `free` bytes of a device ("cuda", "cpu") with weights and activations of `width` bytes.

    `batch_tokens`: of the largest batch.
    """
    if sum(_block_sizes(arch)) * width < _RESIDENT * free:
        return Placement(True, 0)
    left = _USED * free - streaming_memory(arch, width, batch_tokens, 0)
    return Placement(False, min(_HIDING.get(device, _HIDING["cpu"]), max(0, int(left // (arch.hidden * width)))))


def streaming_memory(arch: Architecture, width: int, batch_tokens: int, tokens: int) -> int:
    """Bytes at the peak while so many tokens cross a model that is read block by block."""
    sizes = _block_sizes(arch)
    stem = sum(torch.Size(shape).numel() for shape in arch.shapes.values()) - sum(sizes)
    return width * (stem + 2 * max(sizes) + arch.hidden * (_COMPUTED * batch_tokens + tokens))


def _block_sizes(arch: Architecture) -> list[int]:
    return [sum(n * k for n, k in arch.block_linears(block).values()) for block in arch.block_names]


class Teacher:
    """A dense FLUX for inference.

    dtype       of weights and activations; by default fp32 on a CPU and bf16 elsewhere
    placement   by default what fits the free memory
    bytes_read  of the checkpoint, so far
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        placement: Placement | None = None,
    ):
        self.checkpoint, self.arch, self.device = checkpoint, checkpoint.architecture, torch.device(device)
        self.dtype = dtype or (torch.float32 if self.device.type == "cpu" else torch.bfloat16)
        self.bytes_read = 0
        self._checked: set[str] = set()
        self._staging = Staging(self.device) if self.device.type == "cuda" else None
        free = free_memory(self.device)
        self.placement = placement or place(self.arch, free, self.device.type, self.dtype.itemsize)
        stem = _build(Flux, replace(self.arch, depth=0, depth_single=0))
        self.stem = self._load(stem, "")
        self._blocks = {name: self._read(name) for name in self.arch.block_names} if self.placement.resident else {}

    def block(self, name: str) -> nn.Module:
        """The block of this name, on the device; it must not be changed."""
        return self._blocks.get(name) or self._read(name)

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """Every block, in forward order. The next is read from the disk while one is used."""
        for name, after in pairwise([*self.arch.block_names, self.arch.block_names[0]]):
            block = self.block(name)
            if not self._blocks:
                self.checkpoint.read_ahead(f"{after}.")
            yield name, block
            del block

    @torch.inference_mode()
    def prepare(self, inputs: Inputs) -> Tokens:
        """The tokens before the first block; inputs on any device, in any dtype."""
        return self.stem.prepare(*inputs.to(self.device, self.dtype))

    def __call__(
        self, latent: Tensor, t: Tensor, context: Tensor, pooled: Tensor | None = None, guidance: Tensor | None = None
    ) -> Tensor:
        """The velocity, fp32, on the device; arguments as in `Flux.forward`, on any device."""
        (velocity,) = self.velocities([Inputs(latent, t, context, pooled, guidance)])
        return velocity

    def velocities(self, batches: Iterable[Inputs]) -> Iterator[Tensor]:
        """The velocity of every batch, fp32, on the device.

        As many batches as the placement says are taken and cross the blocks together; more are taken when their
        velocities have been.
        """
        together: list[Tokens] = []
        count = 0
        for batch in batches:
            tokens = self.prepare(batch)
            if together and (self.placement.resident or count + tokens.count > self.placement.tokens):
                yield from self._cross(together)
                together, count = [], 0
            together.append(tokens)
            count += tokens.count
            del tokens
        if together:
            yield from self._cross(together)

    @torch.inference_mode()
    def _cross(self, together: list[Tokens]) -> list[Tensor]:
        """The velocities that some tokens become; the list is emptied."""
        computed: list[torch.cuda.Event] = []
        for _, block in self.blocks():
            for place, tokens in enumerate(together):
                together[place] = block(tokens)
            if self._staging is not None and not self.placement.resident:
                # While the device computes, the host copies the next block, but only when the last but one is done
                # with: two blocks are in memory at the same time, not three.
                computed.append(torch.cuda.Event())
                computed[-1].record()
                if len(computed) > 1:
                    computed.pop(0).synchronize()
        velocities = [self.stem.finish(tokens).float() for tokens in together]
        together.clear()
        return velocities

    def _read(self, name: str) -> nn.Module:
        return self._load(_build(make_block, self.arch, name), f"{name}.")

    def _load(self, module: _Module, prefix: str) -> _Module:
        names: Iterable[str] = module.state_dict()
        tensors = {name: self.checkpoint.tensor(prefix + name) for name in names}
        self.bytes_read += sum(tensor.nbytes for tensor in tensors.values())
        with torch.inference_mode(False):
            if self._staging is None:
                copies = {name: tensor.to(self.device, self.dtype, copy=True) for name, tensor in tensors.items()}
            else:
                copies = {name: self._staging.copy(tensor, self.dtype) for name, tensor in tensors.items()}
                self._staging.join()
            if prefix not in self._checked:  # a model that is read again and again is checked once
                for name, tensor in copies.items():
                    check_finite(tensor, self.checkpoint.path, prefix + name)
                self._checked.add(prefix)
            module.load_state_dict(copies, assign=True)
            return module.requires_grad_(False).eval()


def _build(make: Callable[..., _Module], *arguments) -> _Module:
    with torch.device("meta"):
        return make(*arguments)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated; of main memory, this rank's part."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // ranks.local()[1]
