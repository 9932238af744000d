"""Pictures that the teacher paints itself, and the noisy states on the paths to them: all the data there is.

Pictures are latents in the model's own space, painted from prompts and noise as ComfyUI's `euler` sampler does it, one
file each, so that an interrupted run continues. One half of the states are those that the sampler passed, where a
student has to be right; they are kept with the velocities that the sampler used there. The other half are z_t =
(1 - t) z_0 + t noise with fresh noise, and t evenly spread for half of them, whatever the sampler's shift: image to
image, inpainting and other schedules visit the times that it hurries through. With guidance distilled into a model,
passed and fresh states differ.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ranks
from ..files.architecture import Architecture
from ..files.container import save
from ..files.work_folder import keep_settings, open_kept
from ..model.flux import Conditions
from .conditioning import Conditioning
from .kinds import in_turn
from .sampler import (
    Velocities,
    default_shift,
    default_steps,
    draw_times,
    latent_shape,
    noise_levels,
    sample_together,
    with_control_channels,
)
from .states import LabelledStates, States

# A state to be made: of a picture, a time and the seed of fresh noise, or the number of a kept state and None
_Choice = tuple["Picture", Any, int | None]
_KEPT = 8  # states at most that are kept of the path to a picture


@dataclass(frozen=True)
class PictureSettings:
    """Which pictures to paint.

    sizes      (width, height) in pixels, taken in turn
    steps      of the sampler; None: 4 for the step-distilled schnell and klein, else 20
    shift      of the noise levels towards noise, as ComfyUI's ModelSamplingFlux counts it; None: the model's own
    guidance   values taken in turn, for models with a guidance embedding; None: 3.5 (Fill: 30)
    """

    sizes: tuple[tuple[int, int], ...] = ((1024, 1024),)
    steps: int | None = None
    shift: float | None = None
    guidance: tuple[float, ...] | None = None
    holdout: float = 0.1  # part of the prompts kept for evaluation, at least one where there are two
    seed: int = 0


@dataclass(frozen=True)
class Picture:
    """What makes one picture: everything is decided before the first is painted."""

    name: str
    prompt: int  # row of the conditioning
    shape: tuple[int, int, int]  # of the latent: channels, height, width
    seed: int  # of the noise
    guidance: float | None


def initial_noise(pictures: Iterable[Picture]) -> Tensor:
    """The noise [B, C, H, W] that each picture starts from; the same on every machine."""
    return torch.stack([torch.randn(p.shape, generator=torch.Generator().manual_seed(p.seed)) for p in pictures])


class Trajectories:
    """The teacher's pictures in a folder: planned at once, painted by `generate`, read as they are needed."""

    def __init__(
        self,
        folder: str | os.PathLike,
        arch: Architecture,
        conditioning: Conditioning,
        settings: PictureSettings,
        model: str,
    ):
        """`model` identifies the teacher (see `fingerprint`). ValueError where the folder holds other pictures."""
        self.folder, self.arch, self.conditioning, self.settings = Path(folder), arch, conditioning, settings
        self.steps = settings.steps or default_steps(arch)
        self.shift = default_shift(arch) if settings.shift is None else settings.shift
        self.shapes = [latent_shape(arch, size) for size in settings.sizes]
        held = min(max(1, round(settings.holdout * len(conditioning))), len(conditioning) // 2)
        order = torch.randperm(len(conditioning), generator=torch.Generator().manual_seed(settings.seed)).tolist()
        order[:held] = in_turn(order[:held], conditioning.prompts)
        self.rows = {"train": order[held:], "holdout": order[:held] or [0]}
        self.kept = min(_KEPT, self.steps)
        values = asdict(settings) | {"steps": self.steps, "shift": self.shift}
        values["states and velocities kept of a picture"] = _KEPT
        keep_settings(self.folder, values | {"model": model, "prompts": conditioning.fingerprint()})

    @cached_property
    def guidance(self) -> tuple[float, ...] | None:
        if not self.arch.guidance:
            return None
        return self.settings.guidance or ((30.0,) if self.arch.in_channels > 80 else (3.5,))

    def plan(self, split: str, count: int) -> list[Picture]:
        """The first `count` pictures of the `train` or the `holdout` prompts, shuffled.

        A file of prompts is often sorted by topic: few pictures would show its first topics alone. A quarter of
        held-out prompts is lettering and a quarter counting, as far as there are such.
        """
        rows, pictures = self.rows[split], []
        for i in range(count):
            lap, place = divmod(i, len(rows))
            shape = self.shapes[(i + lap) % len(self.shapes)]
            guidance = None if self.guidance is None else self.guidance[(i + lap) % len(self.guidance)]
            seed = (self.settings.seed * 1_000_003 + i) * 2 + (split == "holdout")
            pictures.append(Picture(f"{split}-{i:06d}", rows[place], shape, seed, guidance))
        return pictures

    def generate(
        self,
        velocities: Velocities,
        pictures: Sequence[Picture],
        batch: int = 8,
        together: int = 1,
        on_progress: Callable[[int], object] = lambda pictures: None,
    ) -> None:
        """Paint those of the pictures that are not there yet, `batch` at a time and so many batches together.

        Every rank paints its share of the batches, and waits for the others. `on_progress` counts all pictures. A batch
        that an interruption cut is painted again: among others a picture is not the same to the last bit. ValueError
        where a picture is not finite, or its velocities are all zero.
        """
        missing = ranks.agree({picture for picture in pictures if not self._path(picture).exists()})
        on_progress(len(pictures) - len(missing))
        levels = noise_levels(self.steps, self.shift)
        todo = ranks.share([same for same in batches(pictures, batch) if missing.intersection(same)])
        for parts in (todo[start : start + together] for start in range(0, len(todo), together)):
            wanted = [picture for part in parts for picture in part if picture in missing]
            passed = {picture: self._passed(picture) for picture in wanted}
            kept: dict[Picture, list[tuple[Tensor, Tensor]]] = {picture: [] for picture in wanted}
            noise = [initial_noise(part) for part in parts]
            path = sample_together(velocities, noise, levels, self.arch, lambda part: self.conditions(parts[part]))  # noqa: B023
            for step, (_, latents, steps) in enumerate(path):
                for part, latent, velocity in zip(parts, latents, steps, strict=False):
                    for row, picture in enumerate(part):
                        if step in passed.get(picture, ()):
                            kept[picture].append((latent[row].half(), velocity[row].half()))
            finished = {
                picture: latent[row]
                for part, latent in zip(parts, latents, strict=True)
                for row, picture in enumerate(part)
            }
            for picture in wanted:
                states, steps = zip(*kept.pop(picture), strict=True)
                tensors = {
                    "latent": finished[picture].float(),
                    "passed": torch.stack(states),
                    "velocity": torch.stack(steps),
                }
                check_painted(tensors)
                save(self._path(picture), tensors, overwrite=True)
            on_progress(len(wanted))
            missing.difference_update(wanted)
        ranks.wait()
        on_progress(len(missing))

    def conditions(self, pictures: Sequence[Picture]) -> Conditions:
        """Context, pooled vector and guidance of some pictures."""
        context, pooled = self.conditioning.batch([picture.prompt for picture in pictures])
        return Conditions(context, pooled, _guidance(pictures))

    def states(self, pictures: Sequence[Picture], count: int, seed: int = 0) -> list[States]:
        """`count` noisy states of these pictures, by size.

        Every picture in turn: one that the sampler passed, as long as there are such, then one with fresh noise.
        """
        return [self._states(chosen) for chosen in self._choose(pictures, count, seed)]

    def labelled_states(self, pictures: Sequence[Picture], count: int, seed: int = 0) -> list[LabelledStates]:
        """The same states with the velocities that the sampler had where it passed."""
        return [self._labelled(chosen) for chosen in self._choose(pictures, count, seed)]

    def _choose(self, pictures: Sequence[Picture], count: int, seed: int) -> list[list[_Choice]]:
        laps = [(number // len(pictures), number % len(pictures)) for number in range(count)]
        passed = [lap // 2 if (lap + place) % 2 == 0 and lap // 2 < self.kept else None for lap, place in laps]
        drawn = iter(draw_times(passed.count(None), self.shift, seed).tolist())
        chosen: dict[tuple[int, ...], list[_Choice]] = {}
        for number, ((_, place), turn) in enumerate(zip(laps, passed, strict=True)):
            picture = pictures[place]
            if turn is None:
                state = picture, next(drawn), (seed * 1_000_003 + number) * 2 + 1 + (1 << 40)
            else:
                state = picture, (turn + place // 2) % self.kept, None
            chosen.setdefault(picture.shape, []).append(state)
        return list(chosen.values())

    def _states(self, chosen: Sequence[_Choice]) -> States:
        pictures = [picture for picture, _, _ in chosen]
        levels = noise_levels(self.steps, self.shift).float()
        latent, times = torch.empty(len(chosen), *pictures[0].shape), torch.empty(len(chosen))
        for row, (picture, place, seed) in enumerate(chosen):
            file = open_kept(self._path(picture))
            if seed is None:
                times[row] = levels[self._passed(picture)[place]]
                latent[row] = file.tensor("passed")[place]
            else:
                noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(seed))
                times[row] = place
                torch.lerp(file.tensor("latent"), noise, times[row], out=latent[row])
        prompts = torch.tensor([picture.prompt for picture in pictures])
        return States(with_control_channels(latent, self.arch), times, prompts, _guidance(pictures))

    def _labelled(self, chosen: Sequence[_Choice]) -> LabelledStates:
        velocity = torch.zeros(len(chosen), *chosen[0][0].shape)
        known = torch.tensor([seed is None for _, _, seed in chosen])
        for row, (picture, place, seed) in enumerate(chosen):
            if seed is None:
                velocity[row] = open_kept(self._path(picture)).tensor("velocity")[place]
        return LabelledStates(self._states(chosen), velocity, known)

    def _passed(self, picture: Picture) -> list[int]:
        """Sampler steps whose states are kept of a picture: one, chosen by chance, of each of equal ranges."""
        edges = [step * self.steps // self.kept for step in range(self.kept + 1)]
        generator = torch.Generator().manual_seed(picture.seed + (1 << 41))
        chances = torch.rand(self.kept, generator=generator).tolist()
        return [low + int(x * (high - low)) for low, high, x in zip(edges[:-1], edges[1:], chances, strict=True)]

    def _path(self, picture: Picture) -> Path:
        return self.folder / f"{picture.name}.safetensors"


def batches(pictures: Sequence[Picture], size: int) -> Iterator[list[Picture]]:
    """Pictures of one shape, at most `size` at a time."""
    by_shape: dict[tuple[int, ...], list[Picture]] = {}
    for picture in pictures:
        by_shape.setdefault(picture.shape, []).append(picture)
    for same in by_shape.values():
        yield from (same[start : start + size] for start in range(0, len(same), size))


def check_painted(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError for pictures of the original, or its velocities ("velocity..."), that nothing can be learnt
    from: not finite, or velocities that are all zero.
    """
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ValueError(
            "the original paints pictures that are not finite: its weights or the prompts' encodings are damaged; "
            "download the checkpoint again, or write the conditioning file again with `embed`"
        )
    if not any(tensor.any() for key, tensor in tensors.items() if key.startswith("velocity")):
        raise ValueError(
            "the original's velocities are all zero, so there is nothing to learn from it: its checkpoint is damaged, "
            "or was never trained; download it again"
        )


def _guidance(pictures: Sequence[Picture]) -> Tensor | None:
    return None if pictures[0].guidance is None else torch.tensor([picture.guidance for picture in pictures])
