"""The same model with channels of very different size, as FLUX has them and the miniature has not.

Every move multiplies channels by s where they are made and divides by s where they are read, so that the function
stays the same but for fp32 rounding, and only what quantization meets changes:

- inputs of FLUX.1's qkv, mlp.0 and linear1: rows of shift and of 1 + scale in the modulation. FLUX.2's modulation has
  no biases, which the constant in 1 + scale would need
- inputs of proj and of the attention half of linear2: rows of the values, the same in the image and the text stream
- inputs of FLUX.2's mlp.2 and of the MLP half of linear2: rows of the linear half of its gate. FLUX.1's GELU allows no
  such move
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...quantizer.files.architecture import Architecture
from ...quantizer.files.checkpoint import open_checkpoint


@dataclass(frozen=True)
class Level:
    """How far channels spread: ln s is normal with the deviation `sigma`, and a few channels are larger still."""

    sigma: float
    massive: float = 1.0  # of two residual channels, the same in all blocks
    heads: float = 1.0  # the most that all values of a head are larger by
    units: float = 1.0  # of one hidden unit of an MLP in a thousand, at least one


# FLUX.1's published spread of inputs, 27 times over 3,072 channels, is a sigma of 0.49; two of its residual channels
# are massive in all blocks (black-forest-labs/flux issue 472, arXiv 2505.18584).
LEVELS = {
    "mild": Level(0.3),
    "realistic": Level(0.5, massive=32, heads=4, units=20),
    "harsh": Level(0.8, massive=100, heads=8, units=50),
}


def stress(state: Mapping[str, Tensor], arch: Architecture, level: Level, seed: int = 0) -> dict[str, Tensor]:
    """The parameters of an equal model, fp32, by BFL's names."""
    state = {name: value.float().clone() for name, value in state.items()}
    generator = torch.Generator().manual_seed(seed)
    massive = torch.randperm(arch.hidden, generator=generator)[:2]

    def spread(count: int) -> Tensor:
        s = torch.exp(level.sigma * torch.randn(count, generator=generator))
        # 1 + scale is stored as scale: below 1 it would be a difference of numbers that are nearly equal.
        return s / s.min()

    def residual() -> Tensor:
        s = spread(arch.hidden)
        s[massive] *= level.massive
        return s

    def values() -> Tensor:
        s = spread(arch.hidden).view(arch.heads, -1)
        return (s * level.heads ** torch.rand(arch.heads, 1, generator=generator)).flatten()

    def hidden() -> Tensor:
        s = spread(arch.mlp_hidden)
        s[torch.randperm(arch.mlp_hidden, generator=generator)[: max(1, arch.mlp_hidden // 1000)]] *= level.units
        return s

    everything, h = slice(None), arch.hidden
    for block in arch.block_names:
        s, value_rows = values(), slice(2 * h, 3 * h)
        if block.startswith("single_blocks."):
            first, second = f"{block}.linear1", f"{block}.linear2"
            _scale(state, [(first, value_rows)], [(second, slice(h))], s)
            if arch.version == 2:
                _scale(state, [(first, slice(3 * h + arch.mlp_hidden, None))], [(second, slice(h, None))], hidden())
            else:
                _scale_modulated(state, f"{block}.modulation.lin", 0, first, residual())
            continue
        streams = [f"{block}.img", f"{block}.txt"]
        made, read = ([(f"{stream}_attn.{part}", rows) for stream in streams]
                      for part, rows in (("qkv", value_rows), ("proj", everything)))  # fmt: skip
        _scale(state, made, read, s)
        for stream in streams:
            if arch.version == 2:
                made = [(f"{stream}_mlp.0", slice(arch.mlp_hidden, None))]
                _scale(state, made, [(f"{stream}_mlp.2", everything)], hidden())
            else:
                _scale_modulated(state, f"{stream}_mod.lin", 0, f"{stream}_attn.qkv", residual())
                _scale_modulated(state, f"{stream}_mod.lin", 3, f"{stream}_mlp.0", residual())
    return state


def write(source: Path, target: Path, level: Level, seed: int = 0) -> None:
    """A dense checkpoint in fp32 of a model equal to that of `source`."""
    checkpoint = open_checkpoint(source)
    state = {name: checkpoint.tensor(name) for name in checkpoint.names}
    save_file(stress(state, checkpoint.architecture, level, seed), target, dict(checkpoint.metadata))


Part = tuple[str, slice]  # a Linear, and some of its rows or columns


def _scale(state: dict[str, Tensor], made: list[Part], read: list[Part], s: Tensor) -> None:
    for name, rows in made:
        state[f"{name}.weight"][rows] *= s[:, None]
        if f"{name}.bias" in state:
            state[f"{name}.bias"][rows] *= s
    for name, columns in read:
        state[f"{name}.weight"][:, columns] /= s


def _scale_modulated(state: dict[str, Tensor], modulation: str, first: int, linear: str, s: Tensor) -> None:
    """The inputs shift + (1 + scale) norm(x) of a Linear; the modulation's chunks `first` and the next make them."""
    shift, scale = (slice(chunk * len(s), (chunk + 1) * len(s)) for chunk in (first, first + 1))
    _scale(state, [(modulation, shift), (modulation, scale)], [(linear, slice(None))], s)
    state[f"{modulation}.bias"][scale] += s - 1  # s (1 + scale) = 1 + (s scale + s - 1)
