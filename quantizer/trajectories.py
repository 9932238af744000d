"""Pictures that the teacher paints itself, and the noisy states on the way to them: all the data there is.

Pictures are latents in the model's own space, painted from prompts and noise as ComfyUI's `euler` sampler does it, one
file each, so that an interrupted run continues. States are z_t = (1 - t) z_0 + t noise with fresh noise.
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
from .checkpoint import Checkpoint
from .conditioning import Conditioning
from .container import TensorFile, create

Velocity = Callable[..., Tensor]  # (latent, t, context, pooled, guidance) -> velocity

_UNIFORM = 0.5  # of the states have times as the sampler visits them; the rest are logit-normal
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
) -> Iterator[tuple[float, Tensor]]:
    """Euler steps from `noise` [B, C, H, W] along `levels`: each (t, latent) on the way, the picture (t = 0) last.

    `conditions`: context, pooled, guidance, as `velocity` takes them.
    """
    latent = noise
    for now, after in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
        yield now, latent
        times = torch.full((len(latent),), now, dtype=torch.float32)
        step = velocity(with_companions(latent, arch), times, *conditions)
        latent = latent + (after - now) * step.to(latent)
    yield 0.0, latent


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
        self.prompts = {"train": sorted(order[held:]), "holdout": sorted(order[:held]) or [0]}
        values = asdict(settings) | {"steps": self.steps, "shift": self.shift}
        prompts = _digest("\n".join(conditioning.prompts).encode())
        keep_settings(self.folder, values | {"model": model, "prompts": prompts})

    @cached_property
    def guidance(self) -> tuple[float, ...] | None:
        if not self.arch.guidance:
            return None
        return self.settings.guidance or ((30.0,) if self.arch.in_channels > 80 else (3.5,))

    def plan(self, split: str, count: int) -> list[Picture]:
        """The first `count` pictures of the `train` or the `holdout` prompts."""
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
            *_, (_, painted) = paint(velocity, initial_noise(same), levels, self.arch, conditions)
            if not torch.isfinite(painted).all():
                raise ValueError("the teacher paints pictures that are not finite: is the checkpoint damaged?")
            for picture, latent in zip(same, painted.float(), strict=True):
                plan = {"latent": (torch.float32, picture.shape)}
                with create(self._path(picture), plan, {}, overwrite=True) as file:
                    file.write("latent", latent)
            on_progress(len(same))

    def latents(self, pictures: Iterable[Picture]) -> Tensor:
        """Painted pictures of one size, fp32 [B, C, H, W]."""
        return torch.stack([TensorFile(self._path(picture)).tensor("latent") for picture in pictures])

    def conditions(self, pictures: Sequence[Picture]) -> tuple[Tensor | None, ...]:
        """Context, pooled vector and guidance of some pictures."""
        context, pooled = self.conditioning.batch([picture.prompt for picture in pictures])
        return context, pooled, _guidance(pictures)

    def states(self, pictures: Sequence[Picture], count: int, seed: int = 0) -> list[States]:
        """`count` noisy states of these pictures, by size: every picture in turn, times spread over their law."""
        order = [pictures[i % len(pictures)] for i in range(count)]
        times = draw_times(count, self.shift, seed)
        chosen: dict[tuple[int, ...], list[int]] = {}
        for i, picture in enumerate(order):
            chosen.setdefault(picture.shape, []).append(i)
        return [self._states([order[i] for i in rows], times[rows], seed, rows) for rows in chosen.values()]

    def _states(self, pictures: list[Picture], t: Tensor, seed: int, numbers: list[int]) -> States:
        latent = torch.empty(len(pictures), *pictures[0].shape)
        for row, (picture, number) in enumerate(zip(pictures, numbers, strict=True)):
            generator = torch.Generator().manual_seed((seed * 1_000_003 + number) * 2 + 1 + (1 << 40))
            noise = torch.randn(picture.shape, generator=generator)
            torch.lerp(self.latents([picture])[0], noise, t[row], out=latent[row])
        prompts = torch.tensor([picture.prompt for picture in pictures])
        return States(with_companions(latent, self.arch), t, prompts, _guidance(pictures))

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
    """Times fp32 [count] in (0, 1]: one half logit-normal around the shift, the other as the sampler visits them.

    Stratified: every stretch of the law gets its share, so that few states cover all times.
    """
    generator = torch.Generator().manual_seed(seed)
    u = (torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)) / count
    even = torch.arange(count) % round(1 / _UNIFORM) == 0
    odds = torch.where(even, torch.logit(u, 1e-6), torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)))
    times = torch.sigmoid(odds + shift).float()
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
        path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
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
