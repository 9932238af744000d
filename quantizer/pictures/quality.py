"""How well a model's velocities follow the teacher's: relative error by timestep, and response to the conditioning."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ranks
from .sampler import Velocities
from .states import Batch

BINS = 10  # of the timestep, equally wide


@dataclass(frozen=True)
class Quality:
    """Velocities compared with the teacher's.

    error           sum |v - v_teacher|^2 / sum |v_teacher|^2
    by_timestep     the same for each of 10 equal ranges of t, from t = 0; None where there is no state
    response        length of what another prompt changes, |v(c1) - v(c2)|, relative to the teacher's
    alignment       cosine between what another prompt changes here and in the teacher
    """

    error: float
    by_timestep: list[float | None]
    response: float
    alignment: float

    @property
    def following(self) -> float:
        """Projection of the response on the teacher's: 1 follows prompts as the teacher does, 0 ignores them."""
        return self.response * self.alignment


Model = Callable[..., Tensor]


@dataclass(frozen=True)
class HeldOut:
    """States that nothing is trained on, with the teacher's velocities under their own prompts and under others."""

    batches: Sequence[Batch]
    swapped: Sequence[Tensor]  # of each batch, under the prompts of the neighbours in it

    @classmethod
    @torch.no_grad()
    def of(cls, batches: Sequence[Batch], velocities: Velocities) -> "HeldOut":
        return cls(batches, list(velocities(batch.inputs.swapped() for batch in batches)))

    def to(self, device: torch.device | str) -> "HeldOut":
        return HeldOut([batch.to(device) for batch in self.batches], [velocity.to(device) for velocity in self.swapped])


@torch.no_grad()
def measure(model: Model, held_out: HeldOut) -> Quality:
    """Compare a model with the teacher at held-out states, of which every rank takes its share."""
    error, power = torch.zeros(BINS, dtype=torch.float64), torch.zeros(BINS, dtype=torch.float64)
    own_square = their_square = product = 0.0
    for batch, their_swapped in ranks.share(list(zip(held_out.batches, held_out.swapped, strict=True))):
        own, their = model(*batch.inputs).float(), batch.velocity.float()
        places = (batch.inputs.t * BINS).long().clamp_(0, BINS - 1).cpu()
        error.index_add_(0, places, (own - their).square().sum((1, 2, 3)).cpu().double())
        power.index_add_(0, places, their.square().sum((1, 2, 3)).cpu().double())
        own_change = own - model(*batch.inputs.swapped()).float()
        their_change = their - their_swapped.float()
        own_square += float(own_change.square().sum())
        their_square += float(their_change.square().sum())
        product += float((own_change * their_change).sum())
    changes = torch.tensor([own_square, their_square, product], dtype=torch.float64)
    ranks.add_up([error, power, changes])
    own_square, their_square, product = changes.tolist()
    return Quality(
        error=float(error.sum() / power.sum()),
        by_timestep=[e / p if p else None for e, p in zip(error.tolist(), power.tolist(), strict=True)],
        response=(own_square / max(their_square, 1e-30)) ** 0.5,
        alignment=product / max(own_square * their_square, 1e-30) ** 0.5,
    )
