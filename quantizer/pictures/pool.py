"""What distillation learns from: states of the teacher's pictures and the teacher's velocities, in a fixed order."""

import hashlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from .. import ranks
from ..files.container import save
from ..files.work_folder import open_kept
from ..model.flux import Inputs
from .conditioning import Conditioning
from .kinds import kind_of
from .quality import BINS, HeldOut
from .sampler import Velocities, noise_levels, sample_together, with_control_channels
from .states import Batch, LabelledStates, States
from .trajectories import Picture, Trajectories, batches, check_painted, initial_noise

_CHUNK = 64  # states whose velocities are kept in one file
_HOLDOUT_TIMES = 10  # at most, of one held-out trajectory


@dataclass(frozen=True, eq=False)
class Pool:
    groups: Sequence[LabelledStates]
    conditioning: Conditioning

    def __len__(self) -> int:
        return sum(len(group) for group in self.groups)

    def batch(self, group: int, rows: Tensor, device: torch.device | str = "cpu") -> Batch:
        """These states of a group, fp32, on the device."""
        source = self.groups[group]
        return Batch(source.states.inputs(rows, self.conditioning), source.velocity[rows].float()).to(device)

    def draw(self, index: int, size: int, seed: int, device: torch.device | str = "cpu") -> Batch:
        """Batch number `index` of an endless sequence of epochs, each of which has every state once, in its own order.

        States left over where a group is no multiple of the batch size are others in every epoch.
        """
        counts = [max(1, len(group) // size) for group in self.groups]
        epoch, position = divmod(index, sum(counts))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        position = int(torch.randperm(sum(counts), generator=generator)[position])
        group = 0
        while position >= counts[group]:
            position -= counts[group]
            group += 1
        order = torch.randperm(len(self.groups[group]), generator=generator)
        return self.batch(group, order[position * size : (position + 1) * size], device)

    @staticmethod
    def bin(t: Tensor) -> Tensor:
        """Number of the timestep range that each t lies in."""
        return (t * BINS).long().clamp(0, BINS - 1)

    def power(self) -> Tensor:
        """The teacher's mean squared velocity in each timestep range, fp32 [10]; ranges without states get the mean."""
        sums, counts = torch.zeros(BINS), torch.zeros(BINS)
        for group in self.groups:
            places = self.bin(group.states.t)
            sums.index_add_(0, places, group.velocity.float().square().mean((1, 2, 3)))
            counts.index_add_(0, places, torch.ones(len(group)))
        return torch.where(counts > 0, sums / counts.clamp_min(1), sums.sum() / counts.sum())

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the states."""
        checksum = zlib.crc32(b"".join(group.velocity[-1].float().numpy().tobytes() for group in self.groups))
        return f"{[len(group) for group in self.groups]} {checksum:08x}"


def training_pool(
    velocities: Velocities,
    trajectories: Trajectories,
    pictures: Sequence[Picture],
    *,
    count: int,
    folder: Path,
    batch: int = 8,
    seed: int = 0,
    on_progress: Callable[[int], object] = lambda states: None,
) -> Pool:
    """`count` states of these pictures with the teacher's velocities; those not known yet are kept in `folder`.

    Every rank computes its share of what is missing, and has all of them in the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    groups = trajectories.labelled_states(pictures, count, seed)
    on_progress(sum(int(group.known.sum()) for group in groups))
    unknown = [(group, torch.nonzero(~group.known).flatten()) for group in groups]
    chunks = [(group, rows) for group, missing in unknown for rows in missing.split(_CHUNK) if len(rows)]
    paths = [folder / f"{_digest(group.states, rows)}.safetensors" for group, rows in chunks]
    missing = ranks.agree([number for number, path in enumerate(paths) if not path.exists()])
    on_progress(sum(len(rows) for number, (_, rows) in enumerate(chunks) if number not in missing))
    mine = [(chunks[number], paths[number]) for number in ranks.share(missing)]
    computed = velocities(
        group.states.inputs(part, trajectories.conditioning) for (group, rows), _ in mine for part in rows.split(batch)
    )
    for (_, rows), path in mine:
        velocity = torch.cat([next(computed).cpu() for _ in rows.split(batch)])
        save(path, {"velocity": velocity}, overwrite=True)
        on_progress(len(rows))
    ranks.wait()
    on_progress(sum(len(chunks[number][1]) for number in missing) - sum(len(rows) for (_, rows), _ in mine))
    for (group, rows), path in zip(chunks, paths, strict=True):
        group.velocity[rows] = open_kept(path).tensor("velocity").float()
    return Pool([LabelledStates(group.states, group.velocity) for group in groups], trajectories.conditioning)


def hold_out(
    velocities: Velocities, trajectories: Trajectories, count: int, *, folder: Path, batch: int = 8, together: int = 1
) -> HeldOut:
    """States on the teacher's own path to `count` pictures of held-out prompts; the velocities are kept in `folder`.

    Every batch has one time and, as far as there are that many, different prompts. `together` batches run at once.
    Every rank computes its share of what is missing, and has all of them in the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = list(batches(trajectories.plan("holdout", count), batch))
    paths = [folder / f"held-out-{count}-{batch}-{number:04d}.safetensors" for number in range(len(parts))]
    missing = ranks.share(ranks.agree([number for number, path in enumerate(paths) if not path.exists()]))
    for start in range(0, len(missing), together):
        numbers = missing[start : start + together]
        recorded = _record(velocities, trajectories, [parts[number] for number in numbers])
        for number, tensors in zip(numbers, recorded, strict=True):
            check_painted(tensors)
            save(paths[number], tensors, overwrite=True)
    ranks.wait()
    states, swapped, kinds = [], [], []
    for pictures, path in zip(parts, paths, strict=True):
        tensors = open_kept(path)
        for step, batch_of_step in _held_out_batches(trajectories, pictures, tensors.tensor):
            states.append(batch_of_step)
            swapped.append(tensors.tensor(f"swapped.{step}").clone())
            kinds.append([kind_of(trajectories.conditioning.prompts[picture.prompt]) for picture in pictures])
    return HeldOut(states, swapped, kinds)


def _recorded_steps(trajectories: Trajectories) -> range:
    return range(0, trajectories.steps, -(-trajectories.steps // _HOLDOUT_TIMES))


def _held_out_batches(
    trajectories: Trajectories, pictures: Sequence[Picture], tensor: Callable[[str], Tensor]
) -> Iterator[tuple[int, Batch]]:
    """The recorded steps of some pictures, with the states there, from the tensors of these names."""
    conditions = trajectories.conditions(pictures)
    levels = noise_levels(trajectories.steps, trajectories.shift).tolist()
    for step in _recorded_steps(trajectories):
        latent, velocity = (tensor(f"{kind}.{step}").clone() for kind in ("latent", "velocity"))
        t = torch.full((len(pictures),), levels[step])
        yield step, Batch(Inputs(latent, t, *conditions), velocity)


def _record(
    velocities: Velocities, trajectories: Trajectories, parts: Sequence[Sequence[Picture]]
) -> list[dict[str, Tensor]]:
    """Of each part, at the recorded steps of the teacher's sampling: latent, velocity, and that under other prompts."""
    arch, levels = trajectories.arch, noise_levels(trajectories.steps, trajectories.shift)
    noise = [initial_noise(pictures) for pictures in parts]
    recorded: list[dict[str, Tensor]] = [{} for _ in parts]
    path = sample_together(velocities, noise, levels, arch, lambda number: trajectories.conditions(parts[number]))
    for step, (_, latents, steps) in enumerate(path):
        if step in _recorded_steps(trajectories):
            for tensors, latent, velocity in zip(recorded, latents, steps, strict=True):
                tensors[f"latent.{step}"] = with_control_channels(latent, arch).cpu()
                tensors[f"velocity.{step}"] = velocity.cpu()
    states = [
        (tensors, step, batch)
        for tensors, pictures in zip(recorded, parts, strict=True)
        for step, batch in _held_out_batches(trajectories, pictures, dict(tensors).__getitem__)
    ]
    swapped = HeldOut.of([batch for _, _, batch in states], velocities).swapped
    for (tensors, step, _), velocity in zip(states, swapped, strict=True):
        tensors[f"swapped.{step}"] = velocity.cpu()
    return recorded


def subset(batches: Sequence[Batch], count: int) -> list[Batch]:
    """About `count` of these states, at least one, spread over the batches."""
    chosen = batches[:: max(1, -(-len(batches) // max(1, count)))]
    rows = max(1, count // len(chosen))
    return [batch.rows(slice(rows)) for batch in chosen]


def _digest(states: States, rows: slice) -> str:
    """Names a file of velocities by the states it answers, so that it is never taken for the answer to others."""
    parts = (states.latent, states.t, states.prompt, states.guidance)
    digest = hashlib.sha256()
    for part in parts:
        if part is not None:
            digest.update(part[rows].numpy().tobytes())
    return digest.hexdigest()[:24]
