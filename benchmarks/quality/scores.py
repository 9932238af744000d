"""Scores of one model of the quality benchmark: checked pictures of held-out compositions, PSNR, and velocities."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ...quantizer.files.architecture import Architecture
from ...quantizer.files.checkpoint import open_checkpoint
from ...quantizer.model.flux import Inputs
from ...quantizer.pictures.quality import HeldOut, measure
from ...quantizer.pictures.sampler import default_shift, latent_shape, noise_levels, one_by_one
from ...quantizer.pictures.states import Batch
from ..miniature import autoencoder, scenes
from ..miniature.checker import check
from ..miniature.sampling import sample
from ..miniature.text import TextEncoder

STEPS = 20
_BATCH = 96
_TRAINING_PROMPTS = 320  # of each category; few-prompt categories repeat theirs
_RESAMPLES = 1000
_TRAJECTORY_NOISE = 4  # its seed


@dataclass(frozen=True)
class Scores:
    summary: dict
    pictures: np.ndarray  # [P, seeds, H, W, 3] in 0..1
    correct: np.ndarray  # bool [P, seeds]
    examples: np.ndarray  # [6, H, W, 3]: one of each category


@dataclass(eq=False)
class Setup:
    """The miniature's parts, the held-out prompts, and the noise of every picture."""

    arch: Architecture
    text: TextEncoder
    vae: autoencoder.Autoencoder
    side: int  # of the pictures in pixels
    prompts: list[str]  # by category, the same number of each
    seeds: int
    device: torch.device

    _held_out: dict[float, HeldOut] = field(default_factory=dict, init=False)

    steps = STEPS

    @classmethod
    def load(cls, weights: Path, prompts: int, seeds: int, device: torch.device) -> "Setup":
        state = load_file(weights / "text-encoder.safetensors")
        text = TextEncoder(state["word.weight"].shape[1])
        text.load_state_dict({name: value.float() for name, value in state.items()})
        vae = autoencoder.load(load_file(weights / "autoencoder.safetensors")).to(device)
        checkpoint = open_checkpoint(weights / "flux-miniature.safetensors")
        side = int(checkpoint.metadata.get("size", 64))
        chosen = [p for category in scenes.CATEGORIES for p in scenes.prompts("held_out", category, prompts)]
        text = text.to(device).requires_grad_(False)
        return cls(checkpoint.architecture, text, vae, side, chosen, seeds, device)

    @property
    def size(self) -> tuple[int, int]:
        return self.side, self.side

    @property
    def examples(self) -> list[str]:
        """The prompts of the example pictures: the first of each category."""
        each = len(self.prompts) // len(scenes.CATEGORIES)
        return self.prompts[::each]

    def training_prompts(self) -> list[str]:
        """Seen compositions, the same number of every category."""
        return [p for c in scenes.CATEGORIES for p in scenes.prompts("train", c, _TRAINING_PROMPTS)]

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            return self.text.encode(prompts)

    def noise(self, seed: int) -> Tensor:
        """The noise of all prompts for one seed."""
        generator = torch.Generator().manual_seed(1000 + seed)
        shape = (len(self.prompts), *latent_shape(self.arch, self.size))
        return torch.randn(shape, generator=generator).to(self.device)

    def paint(self, model: Callable[..., Tensor]) -> np.ndarray:
        """Pictures [P, seeds, H, W, 3] in 0..1."""
        context, pooled = self.encode(self.prompts)
        columns = []
        for seed in range(self.seeds):
            noise, parts = self.noise(seed), []
            for start in range(0, len(self.prompts), _BATCH):
                rows = slice(start, start + _BATCH)
                latents = sample(model, context[rows], pooled[rows], noise[rows], STEPS, default_shift(self.arch))
                with torch.inference_mode():
                    parts.append(self.vae.decode(latents).clamp(0, 1).movedim(1, -1).cpu().numpy())
            columns.append(np.concatenate(parts))
        return np.stack(columns, axis=1)

    def held_out(self, teacher: Callable[..., Tensor], shift: float) -> HeldOut:
        """The teacher's own states on the path to held-out pictures, at the times of a schedule with this shift."""
        if shift not in self._held_out:
            context, pooled = self.encode(self.prompts)
            # Neighbours of a batch swap prompts: they must not be of one category.
            mixed = torch.randperm(len(self.prompts), generator=torch.Generator().manual_seed(0))[:_BATCH]
            context, pooled, latent = context[mixed], pooled[mixed], self.noise(_TRAJECTORY_NOISE)[mixed]
            levels, batches = noise_levels(STEPS, shift).tolist(), []
            for now, after in zip(levels[:-1], levels[1:], strict=True):
                t = torch.full((len(mixed),), now, device=self.device)
                velocity = teacher(latent, t, context, pooled).clone()
                batches.append(Batch(Inputs(latent, t, context, pooled), velocity))
                latent = latent + (after - now) * velocity
            self._held_out[shift] = HeldOut.of(batches, one_by_one(teacher))
        return self._held_out[shift]

    @cached_property
    def categories(self) -> np.ndarray:
        """Index of the category of each prompt."""
        return np.repeat(np.arange(len(scenes.CATEGORIES)), len(self.prompts) // len(scenes.CATEGORIES))


def evaluate(
    model: Callable[..., Tensor], setup: Setup, teacher: Callable[..., Tensor], reference: Scores | None
) -> Scores:
    """Score a model; `reference` are the teacher's scores, None for the teacher itself."""
    pictures = setup.paint(model)
    correct = np.array([[bool(check(p, text)) for p in row] for row, text in zip(pictures, setup.prompts, strict=True)])
    their = correct if reference is None else reference.correct
    accuracy = {"overall": interval(correct, setup.categories, lambda rows: correct[rows].mean())}
    for index, category in enumerate(scenes.CATEGORIES):
        accuracy[category] = interval(correct, setup.categories, lambda rows: correct[rows].mean(), index)
    ratio = interval(correct, setup.categories, lambda rows: correct[rows].mean() / max(their[rows].mean(), 1e-9))
    own = default_shift(setup.arch)
    velocity = {shift: measure(model, setup.held_out(teacher, shift)) for shift in {own, 0.0}}
    summary = {
        "accuracy": accuracy,
        "of_the_original": ratio,
        "velocity": asdict(velocity[own]) | {"detail": velocity[own].detail},
        "velocity_at_even_times": asdict(velocity[0.0]),
    }
    if reference is not None:
        noise = np.square(pictures - reference.pictures).mean((2, 3, 4))
        decibels = -10 * np.log10(np.maximum(noise, 1e-10))
        summary["psnr"] = interval(correct, setup.categories, lambda rows: decibels[rows].mean())
    each = len(setup.prompts) // len(scenes.CATEGORIES)
    return Scores(summary, pictures, correct, pictures[::each, 0])


def interval(
    correct: np.ndarray, categories: np.ndarray, value: Callable[[np.ndarray], float], category: int | None = None
) -> list[float]:
    """A value of some prompts' rows with its 95 % bootstrap interval: prompts are drawn again within their category."""
    rows = np.arange(len(correct)) if category is None else np.flatnonzero(categories == category)
    rng, groups = np.random.default_rng(0), [rows[categories[rows] == c] for c in np.unique(categories[rows])]
    draws = [value(np.concatenate([rng.choice(g, len(g)) for g in groups])) for _ in range(_RESAMPLES)]
    return [float(value(rows)), *np.quantile(draws, (0.025, 0.975)).tolist()]
