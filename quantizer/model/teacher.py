"""The dense model that is imitated: held in memory where it fits, read from its checkpoint block by block elsewhere."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TypeVar

import psutil
import torch
from torch import Tensor, nn

from ..files.checkpoint import Checkpoint
from .flux import Flux, Inputs, Tokens, make_block

_RESIDENT = 0.6  # of the free memory that a model held in it may take
_Module = TypeVar("_Module", bound=nn.Module)


class Teacher:
    """A dense FLUX for inference.

    dtype      of weights and activations; by default fp32 on a CPU and bf16 elsewhere
    resident   hold all blocks in memory; by default where they take at most 60 % of what is free
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        resident: bool | None = None,
    ):
        self.checkpoint, self.arch, self.device = checkpoint, checkpoint.architecture, torch.device(device)
        self.dtype = dtype or (torch.float32 if self.device.type == "cpu" else torch.bfloat16)
        stem = _build(Flux, replace(self.arch, depth=0, depth_single=0))
        self.stem = self._load(stem, "")
        weights = sum(n * k for n, k in self.arch.linear_shapes.values())
        fits = weights * self.dtype.itemsize < _RESIDENT * free_memory(self.device)
        keep = fits if resident is None else resident
        self._blocks = {name: self._read(name) for name in self.arch.block_names} if keep else {}

    def block(self, name: str) -> nn.Module:
        """The block of this name, on the device; it must not be changed."""
        return self._blocks.get(name) or self._read(name)

    def prepare(self, inputs: Inputs) -> Tokens:
        """The tokens before the first block; inputs on any device, in any dtype."""
        return self.stem.prepare(*inputs.to(self.device, self.dtype))

    @torch.inference_mode()
    def __call__(
        self, latent: Tensor, t: Tensor, context: Tensor, pooled: Tensor | None = None, guidance: Tensor | None = None
    ) -> Tensor:
        """The velocity, fp32; arguments as in `Flux.forward`, on any device."""
        tokens = self.prepare(Inputs(latent, t, context, pooled, guidance))
        for name in self.arch.block_names:
            tokens = self.block(name)(tokens)
        return self.stem.finish(tokens).float()

    def _read(self, name: str) -> nn.Module:
        return self._load(_build(make_block, self.arch, name), f"{name}.")

    def _load(self, module: _Module, prefix: str) -> _Module:
        names: Iterable[str] = module.state_dict()
        tensors = {name: self.checkpoint.tensor(prefix + name) for name in names}
        tensors = {name: tensor.to(self.device, self.dtype, copy=True) for name, tensor in tensors.items()}
        module.load_state_dict(tensors, assign=True)
        return module.requires_grad_(False).eval()


def _build(make: Callable[..., _Module], *arguments) -> _Module:
    with torch.device("meta"):
        return make(*arguments)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
