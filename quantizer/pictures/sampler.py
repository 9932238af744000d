"""ComfyUI's `euler` sampler for FLUX: noise levels, steps, the shape of latents and the channels of control models."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..files.architecture import Architecture
from ..model.flux import Conditions, Inputs

Velocity = Callable[..., Tensor]  # (latent, t, context, pooled, guidance) -> velocity
Velocities = Callable[[Iterable[Inputs]], Iterator[Tensor]]  # of many batches, in turn; see `Teacher.velocities`
_LARGEST = 8192  # pixels on a side
_MASK = 64  # FLUX.1-Fill's mask channels


def default_shift(arch: Architecture) -> float:
    """ComfyUI's: 1.15 for guided FLUX.1, none for schnell, 2.02 for FLUX.2."""
    if arch.version == 2:
        return 2.02
    return 1.15 if arch.guidance else 0.0


def default_steps(arch: Architecture) -> int:
    """Of the sampler: 4 for schnell and klein; a FLUX.1 without guidance that is not schnell needs more."""
    return 4 if arch.name.startswith(("FLUX.1 without guidance", "FLUX.2-klein")) else 20


def noise_levels(steps: int, shift: float) -> Tensor:
    """Noise levels [steps + 1] from 1 to 0 (float64): evenly spaced, then moved towards noise by exp(shift) in odds."""
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return even * math.exp(shift) / (1 + even * math.expm1(shift))


def one_by_one(velocity: Velocity) -> Velocities:
    """The velocities of a model that has no way of its own with many batches."""
    return lambda batches: (velocity(*inputs) for inputs in batches)


def sample(
    velocity: Velocity, noise: Tensor, levels: Tensor, arch: Architecture, conditions: Conditions
) -> Iterator[tuple[float, Tensor, Tensor | None]]:
    """Euler steps from `noise` [B, C, H, W] along `levels`: each (t, latent, velocity), and (0, picture, None) last."""
    for t, (latent,), steps in sample_together(one_by_one(velocity), [noise], levels, arch, lambda _: conditions):
        yield t, latent, steps[0] if steps else None


def sample_together(
    velocities: Velocities,
    noise: Sequence[Tensor],
    levels: Tensor,
    arch: Architecture,
    conditions: Callable[[int], Conditions],
) -> Iterator[tuple[float, list[Tensor], list[Tensor]]]:
    """`sample` for many batches at the same time: lists of latents and of velocities, the last of which is empty.

    `conditions` gives those of the batch of this number: they are as large as the latents and are not kept.
    """
    latents = list(noise)
    for now, after in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
        inputs = (
            Inputs(with_control_channels(latent, arch), torch.full((len(latent),), now), *conditions(number))
            for number, latent in enumerate(latents)
        )
        steps = [step.to(latent) for step, latent in zip(velocities(inputs), latents, strict=True)]
        yield now, latents, steps
        latents = [latent + (after - now) * step for latent, step in zip(latents, steps, strict=True)]
    yield 0.0, latents, []


def with_control_channels(latent: Tensor, arch: Architecture) -> Tensor:
    """Add the channels that inpainting and control models take: no picture, and (Fill) everything masked."""
    missing = arch.in_channels - latent.shape[1]
    if not missing:
        return latent
    zeros, ones = missing - _MASK if missing > _MASK else missing, _MASK if missing > _MASK else 0
    shape = (len(latent), 1, *latent.shape[2:])
    empty, masked = latent.new_zeros(shape).expand(-1, zeros, -1, -1), latent.new_ones(shape).expand(-1, ones, -1, -1)
    return torch.cat((latent, empty, masked), dim=1)


def draw_times(count: int, shift: float, seed: int = 0) -> Tensor:
    """Times fp32 [count] in (0, 1): half of them each as likely as any other, half logit-normal around the shift.

    Stratified: every stretch of either law gets its share, so that few states cover all times.
    """
    generator = torch.Generator().manual_seed(seed)

    def stratified(some: int) -> Tensor:
        return (torch.arange(some) + torch.rand(some, generator=generator, dtype=torch.float64)) / max(some, 1)

    around = torch.special.ndtri(stratified(count // 2).clamp(1e-6, 1 - 1e-6)) + shift
    times = torch.cat([stratified(count - len(around)), torch.sigmoid(around)]).float()
    return times[torch.randperm(count, generator=generator)].clamp(1e-3, 1)


def latent_shape(arch: Architecture, size: tuple[int, int]) -> tuple[int, int, int]:
    """Channels, height and width of the latent of a picture of (width, height) pixels."""
    pixels = arch.pixels_per_latent * arch.patch_size
    width, height = size
    if width % pixels or height % pixels or min(size) <= 0:
        raise ValueError(f"size {width}x{height}: {arch.name} takes sizes in multiples of {pixels} pixels")
    return arch.out_channels, height // arch.pixels_per_latent, width // arch.pixels_per_latent


def parse_sizes(text: str) -> tuple[tuple[int, int], ...]:
    """`1024x1024,832x1216` as (width, height) pairs."""
    try:
        pairs = [[int(side) for side in size.split("x")] for size in text.lower().split(",")]
    except ValueError:
        pairs = []
    if not pairs or any(len(pair) != 2 or min(pair) < 1 for pair in pairs):
        raise ValueError(f"sizes {text!r} are not of the form 1024x1024,832x1216 (width x height in pixels)")
    if largest := next((side for pair in pairs for side in pair if side > _LARGEST), None):
        raise ValueError(f"sizes {text!r}: {largest} pixels are too many, {_LARGEST} on a side is the most")
    return tuple((width, height) for width, height in pairs)
