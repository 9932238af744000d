"""Noisy states, their velocities, and batches of both."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.flux import Inputs
from .conditioning import Conditioning


@dataclass(frozen=True, eq=False)
class States:
    """States of one size."""

    latent: Tensor  # fp32 [S, in_channels, H, W]
    t: Tensor  # fp32 [S]
    prompt: Tensor  # int64 [S], rows of the conditioning
    guidance: Tensor | None  # fp32 [S]

    def __len__(self) -> int:
        return len(self.t)

    def rows(self, rows: slice | Tensor) -> "States":
        """Some of them."""
        guidance = None if self.guidance is None else self.guidance[rows]
        return States(self.latent[rows], self.t[rows], self.prompt[rows], guidance)

    def inputs(self, rows: slice | Tensor, conditioning: Conditioning) -> Inputs:
        """The arguments of a FLUX forward for these rows, fp32."""
        context, pooled = conditioning.batch(self.prompt[rows].tolist())
        guidance = None if self.guidance is None else self.guidance[rows]
        return Inputs(self.latent[rows], self.t[rows], context, pooled, guidance)


@dataclass(frozen=True, eq=False)
class LabelledStates:
    """States of one size and the teacher's velocities there."""

    states: States
    velocity: Tensor  # [S, out_channels, H, W]
    known: Tensor | None = None  # bool [S]: where the velocity is known; None: everywhere

    def __len__(self) -> int:
        return len(self.states)


@dataclass(frozen=True)
class Batch:
    """Some states as a forward takes them, and the teacher's velocity there."""

    inputs: Inputs
    velocity: Tensor  # [B, out_channels, H, W]

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(self.inputs.to(device), self.velocity.to(device))

    def rows(self, rows: slice | Tensor) -> "Batch":
        return Batch(self.inputs.rows(rows), self.velocity[rows])
