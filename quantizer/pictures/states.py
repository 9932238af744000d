"""Noisy states, and batches of them with what a forward takes and the velocity that the teacher has there."""

from dataclasses import dataclass, replace

from torch import Tensor

from .conditioning import Conditioning


@dataclass(frozen=True, eq=False)
class States:
    """States of one size."""

    latent: Tensor  # fp32 [S, in_channels, H, W]
    t: Tensor  # fp32 [S]
    prompt: Tensor  # int64 [S], rows of the conditioning
    guidance: Tensor | None  # fp32 [S]
    velocity: Tensor | None = None  # fp32 [S, out_channels, H, W] where the sampler knew it, NaN elsewhere

    def __len__(self) -> int:
        return len(self.t)

    def inputs(self, rows: slice | Tensor, conditioning: Conditioning) -> tuple[Tensor | None, ...]:
        """The arguments of a FLUX forward for these rows, fp32."""
        context, pooled = conditioning.batch(self.prompt[rows])
        guidance = None if self.guidance is None else self.guidance[rows]
        return self.latent[rows], self.t[rows], context, pooled, guidance


@dataclass(frozen=True)
class Batch:
    """States of one size, their conditioning, and the teacher's velocity there."""

    latent: Tensor  # [B, C, H, W]
    t: Tensor  # [B], 0 (picture) .. 1 (noise)
    context: Tensor  # [B, T, context_dim]
    pooled: Tensor | None  # [B, vec_dim]
    guidance: Tensor | None  # [B]
    velocity: Tensor  # [B, out_channels, H, W]

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """The arguments of a FLUX forward."""
        return self.latent, self.t, self.context, self.pooled, self.guidance

    def swapped(self) -> "Batch":
        """The same states with the conditioning of their neighbour in the batch; `velocity` stays."""
        pooled = None if self.pooled is None else self.pooled.roll(1, 0)
        return replace(self, context=self.context.roll(1, 0), pooled=pooled)
