"""Pictures that the teacher paints itself, and the noisy states on the way to them: all the data there is.

Pictures are latents in the model's own space, painted from prompts and noise as ComfyUI's `euler` sampler does it, one
file each, so that an interrupted run continues. One half of the states are those that the sampler passed, where a
student has to be right; they are kept with the velocities that the sampler used there. The other half are z_t =
(1 - t) z_0 + t noise with fresh noise and logit-normal t, which cover the times and places that other samplers visit.
With guidance distilled into a model, the two differ.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from .architecture import Architecture
from .atomic import write_json
from .checkpoint import Checkpoint
from .conditioning import Conditioning
from .container import TensorFile, create

Velocity = Callable[..., Tensor]  # (latent, t, context, pooled, guidance) -> velocity

_KEPT = 8  # states at most that are kept of the way to a picture
_MASK = 64  # FLUX.1-Fill's mask channels


@dataclass(frozen=True)
class Settings:
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


def default_shift(arch: Architecture) -> float:
    """ComfyUI's: 1.15 for guided FLUX.1, none for schnell, 2.02 for FLUX.2."""
    if arch.version == 2:
        return 2.02
    return 1.15 if arch.guidance else 0.0


def default_steps(arch: Architecture) -> int:
    return 4 if arch.name == "FLUX.1-schnell" or arch.name.startswith("FLUX.2-klein") else 20


def noise_levels(steps: int, shift: float) -> Tensor:
    """Noise levels [steps + 1] from 1 to 0 (float64): evenly spaced, then moved towards noise by exp(shift) in odds."""
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return even * math.exp(shift) / (1 + even * math.expm1(shift))


def paint(
    velocity: Velocity, noise: Tensor, levels: Tensor, arch: Architecture, conditions: Sequence[Tensor | None]
) -> Iterator[tuple[float, Tensor, Tensor | None]]:
    """Euler steps from `noise` [B, C, H, W] along `levels`: each (t, latent, velocity), and (0, picture, None) last.

    `conditions`: context, pooled, guidance, as `velocity` takes them.
    """
    latent = noise
    for now, after in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
        times = torch.full((len(latent),), now, dtype=torch.float32)
        step = velocity(with_companions(latent, arch), times, *conditions).to(latent)
        yield now, latent, step
        latent = latent + (after - now) * step
    yield 0.0, latent, None


def with_companions(latent: Tensor, arch: Architecture) -> Tensor:
    """Add the channels that inpainting and control models take: no picture, and (Fill) everything masked."""
    missing = arch.in_channels - latent.shape[1]
    if not missing:
        return latent
    zeros, ones = missing - _MASK if missing > _MASK else missing, _MASK if missing > _MASK else 0
    shape = (len(latent), 1, *latent.shape[2:])
    empty, masked = latent.new_zeros(shape).expand(-1, zeros, -1, -1), latent.new_ones(shape).expand(-1, ones, -1, -1)
    return torch.cat((latent, empty, masked), dim=1)


def initial_noise(pictures: Iterable[Picture]) -> Tensor:
    """The noise [B, C, H, W] that each picture starts from; the same on every machine."""
    return torch.stack([torch.randn(p.shape, generator=torch.Generator().manual_seed(p.seed)) for p in pictures])


class Trajectories:
    """The teacher's pictures in a folder: planned at once, painted by `generate`, read as they are needed."""

    def __init__(
        self, folder: str | os.PathLike, arch: Architecture, conditioning: Conditioning, settings: Settings, model: str
    ):
        """`model` identifies the teacher (see `fingerprint`). ValueError where the folder holds other pictures."""
        self.folder, self.arch, self.conditioning, self.settings = Path(folder), arch, conditioning, settings
        self.steps = settings.steps or default_steps(arch)
        self.shift = default_shift(arch) if settings.shift is None else settings.shift
        self.shapes = [latent_shape(arch, size) for size in settings.sizes]
        held = min(max(1, round(settings.holdout * len(conditioning))), len(conditioning) // 2)
        order = torch.randperm(len(conditioning), generator=torch.Generator().manual_seed(settings.seed)).tolist()
        self.prompts = {"train": order[held:], "holdout": order[:held] or [0]}
        self.kept = min(_KEPT, self.steps)
        values = asdict(settings) | {"steps": self.steps, "shift": self.shift}
        values["states and velocities kept of a picture"] = _KEPT
        prompts = _digest("\n".join(conditioning.prompts[i] for i in order).encode())
        keep_settings(self.folder, values | {"model": model, "prompts": prompts})

    @cached_property
    def guidance(self) -> tuple[float, ...] | None:
        if not self.arch.guidance:
            return None
        return self.settings.guidance or ((30.0,) if self.arch.in_channels > 80 else (3.5,))

    def plan(self, split: str, count: int) -> list[Picture]:
        """The first `count` pictures of the `train` or the `holdout` prompts, which come in an order of chance.

        A file of prompts is often sorted by topic: few pictures would show its first topics alone.
        """
        prompts, pictures = self.prompts[split], []
        for i in range(count):
            lap, place = divmod(i, len(prompts))
            shape = self.shapes[(i + lap) % len(self.shapes)]
            guidance = None if self.guidance is None else self.guidance[(i + lap) % len(self.guidance)]
            seed = (self.settings.seed * 1_000_003 + i) * 2 + (split == "holdout")
            pictures.append(Picture(f"{split}-{i:06d}", prompts[place], shape, seed, guidance))
        return pictures

    def generate(
        self,
        velocity: Velocity,
        pictures: Sequence[Picture],
        batch: int = 8,
        on_progress: Callable[[int], object] = lambda pictures: None,
    ) -> None:
        """Paint those of the pictures that are not there yet, `batch` at a time. `on_progress` counts all of them."""
        todo = [picture for picture in pictures if not self._path(picture).exists()]
        on_progress(len(pictures) - len(todo))
        levels = noise_levels(self.steps, self.shift)
        for same in batches(todo, batch):
            conditions = self.conditions(same)
            way = list(paint(velocity, initial_noise(same), levels, self.arch, conditions))
            for row, picture in enumerate(same):
                passed = [way[step][1:] for step in self._passed(picture)]
                tensors = {
                    "latent": way[-1][1][row].float(),
                    "passed": torch.stack([latent[row] for latent, _ in passed]).half(),
                    "velocity": torch.stack([velocities[row] for _, velocities in passed]).half(),
                }
                if not all(tensor.isfinite().all() for tensor in tensors.values()):
                    raise ValueError("the teacher paints pictures that are not finite: is the checkpoint damaged?")
                plan = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
                with create(self._path(picture), plan, {}, overwrite=True) as file:
                    for name, tensor in tensors.items():
                        file.write(name, tensor)
            on_progress(len(same))

    def conditions(self, pictures: Sequence[Picture]) -> tuple[Tensor | None, ...]:
        """Context, pooled vector and guidance of some pictures."""
        context, pooled = self.conditioning.batch([picture.prompt for picture in pictures])
        return context, pooled, _guidance(pictures)

    def states(self, pictures: Sequence[Picture], count: int, seed: int = 0, velocities: bool = False) -> list[States]:
        """`count` noisy states of these pictures, by size; on request with the velocities that the sampler knew.

        Every picture in turn: one that the sampler passed, as long as there are such, then one with fresh noise.
        """
        laps = [(number // len(pictures), number % len(pictures)) for number in range(count)]
        passed = [lap // 2 if (lap + place) % 2 == 0 and lap // 2 < self.kept else None for lap, place in laps]
        drawn = iter(draw_times(passed.count(None), self.shift, seed).tolist())
        chosen: dict[tuple[int, ...], list[tuple]] = {}
        for number, ((_, place), turn) in enumerate(zip(laps, passed, strict=True)):
            picture = pictures[place]
            if turn is None:
                state = picture, next(drawn), (seed * 1_000_003 + number) * 2 + 1 + (1 << 40)
            else:
                state = picture, (turn + place // 2) % self.kept, None
            chosen.setdefault(picture.shape, []).append(state)
        return [self._states(states, velocities) for states in chosen.values()]

    def _states(self, chosen: Sequence[tuple[Picture, float | int, int | None]], velocities: bool) -> States:
        """States of one size from (picture, time, seed of fresh noise) or (picture, number of a kept state, None)."""
        pictures = [picture for picture, _, _ in chosen]
        levels = noise_levels(self.steps, self.shift).float()
        latent, times = torch.empty(len(chosen), *pictures[0].shape), torch.empty(len(chosen))
        velocity = torch.full_like(latent, math.nan) if velocities else None
        for row, (picture, place, seed) in enumerate(chosen):
            file = TensorFile(self._path(picture))
            if seed is None:
                times[row] = levels[self._passed(picture)[place]]
                latent[row] = file.tensor("passed")[place]
                if velocity is not None:
                    velocity[row] = file.tensor("velocity")[place]
            else:
                noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(seed))
                times[row] = place
                torch.lerp(file.tensor("latent"), noise, times[row], out=latent[row])
        prompts = torch.tensor([picture.prompt for picture in pictures])
        return States(with_companions(latent, self.arch), times, prompts, _guidance(pictures), velocity)

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


def draw_times(count: int, shift: float, seed: int = 0) -> Tensor:
    """Logit-normal times fp32 [count] in (0, 1) around the shift.

    Stratified: every stretch of the law gets its share, so that few states cover all times.
    """
    generator = torch.Generator().manual_seed(seed)
    u = (torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)) / max(count, 1)
    times = torch.sigmoid(torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)) + shift).float()
    return times[torch.randperm(count, generator=generator)].clamp(1e-3, 1)


def latent_shape(arch: Architecture, size: tuple[int, int]) -> tuple[int, int, int]:
    """Channels, height and width of the latent of a picture of (width, height) pixels."""
    pixels = arch.pixels_per_latent * arch.patch_size
    width, height = size
    if width % pixels or height % pixels or min(size) <= 0:
        raise ValueError(f"size {width}x{height}: {arch.name} paints sizes in multiples of {pixels} pixels")
    return arch.out_channels, height // arch.pixels_per_latent, width // arch.pixels_per_latent


def parse_sizes(text: str) -> tuple[tuple[int, int], ...]:
    """`1024x1024,832x1216` as (width, height) pairs."""
    try:
        sizes = tuple(tuple(int(side) for side in size.split("x")) for size in text.lower().split(","))
    except ValueError:
        sizes = ()
    if not sizes or any(len(size) != 2 for size in sizes):
        raise ValueError(f"sizes {text!r} are not of the form 1024x1024,832x1216 (width x height in pixels)")
    return sizes


def fingerprint(checkpoint: Checkpoint) -> str:
    """Tells checkpoints apart without reading all of them: the header and the dense tensors at both ends."""
    entries = sorted((name, list(checkpoint.entry(name).shape)) for name in checkpoint.names)
    ends = (checkpoint.tensor(name).float() for name in ("img_in.weight", "final_layer.linear.weight"))
    return _digest(json.dumps(entries).encode(), *(end.numpy().tobytes() for end in ends))


def keep_settings(folder: Path, settings: dict) -> None:
    """Write `settings.json` in the folder; ValueError where it holds others: a resumed run must be the same run."""
    path = folder / "settings.json"
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    for key in settings.keys() | found.keys():
        if settings.get(key) != found.get(key):
            raise ValueError(
                f"{folder} holds the work of another run: its {key} is {found.get(key)}, not {settings.get(key)}; "
                "give another folder, or delete this one"
            )


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def _guidance(pictures: Sequence[Picture]) -> Tensor | None:
    return None if pictures[0].guidance is None else torch.tensor([picture.guidance for picture in pictures])
