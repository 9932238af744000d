"""How well a model's velocities follow the teacher's: relative error, fine detail, and response to the conditioning."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import ranks
from .detail import detail, predicted
from .sampler import Velocities
from .states import Batch

BINS = 10  # of the timestep, equally wide


@dataclass(frozen=True)
class Quality:
    """Velocities compared with the teacher's.

    error               sum |v - v_teacher|^2 / sum |v_teacher|^2
    by_timestep         the same for each of 10 equal ranges of t, from t = 0; None where there is no state
    response            length of what another prompt changes, |v(c1) - v(c2)|, relative to the teacher's
    alignment           cosine between what another prompt changes here and in the teacher
    detail_by_timestep  energy of fine detail in the pictures that velocities lead to, relative to the teacher's:
                        below 1 where the model blurs, which its error hardly shows
    by_kind             the error for each kind of prompts that there is (see `kinds`)
    """

    error: float
    by_timestep: list[float | None]
    response: float
    alignment: float
    detail_by_timestep: list[float | None]
    by_kind: Mapping[str, float]

    @property
    def detail(self) -> float:
        """Mean over the timesteps."""
        known = [ratio for ratio in self.detail_by_timestep if ratio is not None]
        return sum(known) / len(known)

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
    kinds: Sequence[Sequence[str]] = field(default=())  # of each batch, the kinds of its prompts; () where not known

    @classmethod
    @torch.no_grad()
    def of(cls, batches: Sequence[Batch], velocities: Velocities) -> "HeldOut":
        return cls(batches, list(velocities(batch.inputs.swapped() for batch in batches)))

    def to(self, device: torch.device | str) -> "HeldOut":
        swapped = [velocity.to(device) for velocity in self.swapped]
        return HeldOut([batch.to(device) for batch in self.batches], swapped, self.kinds)


@torch.no_grad()
def measure(model: Model, held_out: HeldOut) -> Quality:
    """Compare a model with the teacher at held-out states, of which every rank takes its share."""
    of_time = torch.zeros(4, BINS, dtype=torch.float64)  # squares of errors and velocities; detail, ours and theirs
    names = sorted({kind for kinds in held_out.kinds for kind in kinds})
    of_kind = torch.zeros(2, len(names), dtype=torch.float64)
    changes = torch.zeros(3, dtype=torch.float64)
    kinds = held_out.kinds or [()] * len(held_out.batches)
    for batch, their_swapped, kinds_here in ranks.share(
        list(zip(held_out.batches, held_out.swapped, kinds, strict=True))
    ):
        own, their, t = model(*batch.inputs).float(), batch.velocity.float(), batch.inputs.t
        squares = [x.square().sum((1, 2, 3)) for x in (own - their, their)]
        details = [detail(predicted(batch.inputs.latent, velocity, t)) for velocity in (own, their)]
        values = torch.stack([*squares, *details]).cpu().double()
        of_time.index_add_(1, (t * BINS).long().clamp_(0, BINS - 1).cpu(), values)
        if kinds_here:
            of_kind.index_add_(1, torch.tensor([names.index(kind) for kind in kinds_here]), values[:2])
        own_change = own - model(*batch.inputs.swapped()).float()
        their_change = their - their_swapped.float()
        products = own_change.square(), their_change.square(), own_change * their_change
        changes += torch.stack([product.sum() for product in products]).cpu()
    ranks.add_up([of_time, of_kind, changes])
    (error, power, ours, theirs), (own_square, their_square, product) = of_time, changes.tolist()
    return Quality(
        error=float(error.sum() / power.sum()),
        by_timestep=_ratios(error, power),
        response=(own_square / max(their_square, 1e-30)) ** 0.5,
        alignment=product / max(own_square * their_square, 1e-30) ** 0.5,
        detail_by_timestep=_ratios(ours, theirs),
        by_kind=dict(zip(names, (of_kind[0] / of_kind[1]).tolist(), strict=True)),
    )


def _ratios(values: Tensor, whole: Tensor) -> list[float | None]:
    return [a / b if b else None for a, b in zip(values.tolist(), whole.tolist(), strict=True)]
