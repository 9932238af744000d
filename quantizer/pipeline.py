"""What stages share: the teacher's pictures and states in a work folder, a plan for the device, distilling a file."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from . import conditioning
from .architecture import Architecture
from .atomic import check_target
from .blockwise import BlockResult, BlockSettings, train_blocks
from .checkpoint import open_checkpoint
from .distill import Distiller, Settings, distill
from .format import TernaryFile, open_ternary
from .rounding import METHODS
from .states import Pool, holdout_batches, to_device, training_pool
from .student import add_low_rank, input_moments, load_student, save_student, ternary_linears, train_codes
from .teacher import Teacher, free_memory
from .trajectories import Picture, Trajectories, fingerprint, latent_shape
from .trajectories import Settings as PictureSettings
from .velocity import Batch, Quality, measure, swapped_velocities

Progress = Callable[[str, int, int], object]  # (what, done, total)

STATES_EACH = 12  # states of each picture; the teacher's velocities are known already at half of them
MAX_PICTURES = 4096
_LEAST_PICTURES = 64
_MEMORY = 0.2  # of the free main memory, for states


def _silent(what: str, done: int, total: int) -> None:
    pass


def choose_device(name: str = "auto") -> torch.device:
    """ "auto" is the first CUDA device, else the CPU. Raises ValueError for a device that torch does not have."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return torch.device(name)


@dataclass(frozen=True)
class Plan:
    """How to train a model on a device.

    codes            the whole model's codes can be trained at once; otherwise block by block only
    packed           frozen codes lie in memory with 2 bits, not 8
    checkpointing    every block is computed again in the backward pass
    eight_bit        optimizer states take 8 bits
    batch            states at a time
    """

    codes: bool
    packed: bool
    checkpointing: bool
    eight_bit: bool
    batch: int
    autocast: torch.dtype | None


def plan(arch: Architecture, tokens: int, free: int, device: torch.device) -> Plan:
    """What fits `free` bytes, with `tokens` (text and image) for each state.

    Trained codes cost 24 bytes a weight (latent, gradient, two moments, average, best), 12 with 8-bit moments and a
    bf16 latent; frozen ones 1 or 1/4 and the states of their scales.
    """
    weights = sum(n * k for n, k in arch.linear_shapes.values())
    largest = max(sum(n * k for n, k in arch.block_linears(block).values()) for block in arch.block_names)
    width = 2 if device.type == "cuda" else 4
    # About 40 tensors of the hidden size are kept for each token and block, and the dense weights of the blocks.
    kept = tokens * arch.hidden * 40 * width
    one_block = largest * 4 * 2 + kept
    all_blocks = weights * width + kept * len(arch.block_names)
    room = 0.85 * free
    checkpointing = 24 * weights + all_blocks + kept > room
    activations = one_block if checkpointing else all_blocks
    codes = 12 * weights + activations < room
    eight_bit = 24 * weights + activations > room
    packed = not codes and weights * 1.3 + activations > room
    used = (24 if not eight_bit else 12 if codes else 0.6 if packed else 1.3) * weights + activations - kept
    fitting = max(1, int((room - used) // max(kept, 1)))
    wanted = max(1, min(64, 1024 // tokens))
    autocast = torch.bfloat16 if device.type == "cuda" else None
    return Plan(codes, packed, checkpointing, eight_bit, min(wanted, fitting), autocast)


@dataclass
class Workshop:
    """A teacher, its conditioning, its pictures and states; everything that takes time to make is kept in `work`."""

    dense: Path
    conditioning_file: Path
    work: Path
    sizes: tuple[tuple[int, int], ...] = ((1024, 1024),)
    pictures: int = 256
    states: int = 2048
    held_out: int = 32
    sampler_steps: int | None = None
    guidance: tuple[float, ...] | None = None
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    on_progress: Progress = _silent

    def check(self, target: Path, overwrite: bool, *sources: Path) -> None:
        """Raises ValueError or OSError, before anything is written, where these inputs do not fit each other, and where
        `target` cannot be written or is one of them. `sources` are further inputs.
        """
        check_target(target, 0, overwrite, [self.dense, self.conditioning_file, *sources])
        for size in self.sizes:
            latent_shape(self.arch, size)
        self.conditioning  # noqa: B018  read, and compared with the model

    def counter(self, what: str, total: int) -> Callable[[int], None]:
        """A function that adds to what is done, and shows it."""
        done = 0

        def count(more: int) -> None:
            nonlocal done
            done += more
            self.on_progress(what, done, total)

        return count

    @cached_property
    def teacher(self) -> Teacher:
        return Teacher(open_checkpoint(self.dense), self.device)

    @cached_property
    def arch(self) -> Architecture:
        return open_checkpoint(self.dense).architecture

    @cached_property
    def conditioning(self) -> conditioning.Conditioning:
        return conditioning.read(self.conditioning_file, self.arch)

    @cached_property
    def tokens(self) -> int:
        """Of the largest size: text and image."""
        _, height, width = max(self.trajectories.shapes)
        return self.conditioning.context.shape[1] + height * width // self.arch.patch_size**2

    @cached_property
    def teacher_batch(self) -> int:
        """States that the teacher runs at a time."""
        return max(1, min(64, 4096 // self.tokens))

    @property
    def room(self) -> int:
        """States, with the teacher's velocities, that a fifth of the free main memory holds."""
        channels = self.arch.in_channels + self.arch.out_channels
        largest = max(height * width for _, height, width in self.trajectories.shapes)
        return int(_MEMORY * free_memory(torch.device("cpu"))) // (4 * channels * largest)

    def pictures_for(self, seen: int) -> int:
        """Pictures that take about a quarter of the time of training on `seen` states; 64 to 4,096 that fit `room`.

        A state costs about four of the teacher's forwards in training; a picture costs one for each step of the sampler
        and for each of its states where the velocity is not known.
        """
        affordable = seen // (self.trajectories.steps + STATES_EACH // 2)
        return min(max(_LEAST_PICTURES, affordable), MAX_PICTURES, max(1, self.room // STATES_EACH))

    def time_state(self) -> float:
        """Seconds of a teacher forward for one state: the shortest of three, or of as many as two seconds allow."""
        shape = (self.arch.in_channels, *max(self.trajectories.shapes)[1:])
        size = self.teacher_batch
        context, pooled = self.conditioning.batch([0] * size)
        guidance = torch.full((size,), 3.5) if self.arch.guidance else None
        times: list[float] = []
        while len(times) < 3 or sum(times) * size < 2:
            started = time.monotonic()
            self.teacher(torch.randn(size, *shape), torch.full((size,), 0.5), context, pooled, guidance).cpu()
            times.append((time.monotonic() - started) / size)
        return min(times)

    @cached_property
    def trajectories(self) -> Trajectories:
        settings = PictureSettings(self.sizes, self.sampler_steps, guidance=self.guidance, seed=self.seed)
        model = fingerprint(open_checkpoint(self.dense))
        return Trajectories(self.work / "pictures", self.arch, self.conditioning, settings, model)

    @property
    def training_pictures(self) -> list[Picture]:
        return self.trajectories.plan("train", self.pictures)

    def paint(self) -> None:
        """Let the teacher paint its training pictures."""
        count = self.counter("pictures", self.pictures)
        self.trajectories.generate(self.teacher, self.training_pictures, self.teacher_batch, count)

    @cached_property
    def pool(self) -> Pool:
        self.paint()
        count = self.counter("teacher velocities", self.states)
        folder = self.work / "velocities"
        pictures, batch = self.training_pictures, self.teacher_batch
        return training_pool(self.teacher, self.trajectories, pictures, self.states, folder, batch, self.seed, count)

    @cached_property
    def holdout(self) -> list[Batch]:
        """States of pictures of held-out prompts, on the device."""
        folder = self.work / "velocities"
        batches = holdout_batches(self.teacher, self.trajectories, self.held_out, folder, max(2, self.teacher_batch))
        return [to_device(batch, self.device) for batch in batches]

    @cached_property
    def swapped(self) -> list[Tensor]:
        """The teacher's velocities at the held-out states under other prompts, on the device."""
        path = self.work / "velocities" / f"swapped-{self.held_out}.pt"
        if not path.exists():
            velocities = [velocity.cpu() for velocity in swapped_velocities(self.teacher, self.holdout)]
            partial = path.with_suffix(".partial")
            torch.save(velocities, partial)
            os.replace(partial, path)
        return [velocity.to(self.device) for velocity in torch.load(path)]

    def release_teacher(self) -> None:
        """Free the teacher's memory; it is read again when it is needed."""
        self.__dict__.pop("teacher", None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def quality(self, file: str | os.PathLike) -> Quality:
        """Held-out quality of a ternary file."""
        model = load_student(open_ternary(file), self.device)
        return measure(model, self.holdout, self.swapped)


def distill_file(
    shop: Workshop,
    start: Path,
    target: Path,
    settings: Settings,
    rank: int = 0,
    codes: bool = False,
    packing: str | None = None,
    block_settings: BlockSettings | None = None,
    overwrite: bool = False,
    checkpoint: Path | None = None,
    on_step: Callable[[dict], object] = lambda row: None,
    on_block: Callable[[BlockResult], object] = lambda result: None,
) -> Distiller:
    """Distill a ternary file into another one, from a `checkpoint` (default: in the work folder) if there is one.

    The block-wise pass runs first if it has settings. Raises ValueError for a rank that the start cannot be given, and
    (Collapse) where the training went wrong.
    """
    shop.check(target, overwrite, start)
    _check_rank(open_ternary(start), rank)
    pool, holdout, swapped = shop.pool, shop.holdout, shop.swapped
    if block_settings is not None:
        block_file = shop.work / "blocks.safetensors"
        if not block_file.exists():
            folder = shop.work / "blocks"
            train_blocks(
                open_ternary(start), shop.teacher, pool, block_file, folder, block_settings, shop.device, on_block
            )
        start = block_file
    dense = shop.teacher.checkpoint
    shop.release_teacher()
    file = open_ternary(start)
    model = load_student(file, shop.device, packed=not codes and settings.checkpointing)
    layers = ternary_linears(model)
    if rank:
        with torch.no_grad(), input_moments(layers) as moments:
            for index in range(4):
                model(*pool.draw(index, settings.batch, settings.seed, shop.device).inputs)
        add_low_rank(layers, dense, rank, moments)
    if codes:
        train_codes(layers, dense, torch.bfloat16 if settings.eight_bit else torch.float32)
    distiller = Distiller(model, file, pool, holdout, swapped, settings)
    distill(distiller, checkpoint or shop.work / "distill.safetensors", on_step)
    save_student(target, model, file, described(file.metadata, distiller, rank, codes), packing, overwrite)
    return distiller


def _check_rank(start: TernaryFile, rank: int) -> None:
    """Factors from what the weights miss undo what the codes of one calibrated Linear make up for in others."""
    method, ranks = start.metadata.get("ternary.method"), {plan.rank for plan in start.layers.values()}
    if rank and method not in (None, *METHODS) and ranks == {0}:
        raise ValueError(f"{start.file.path}: {method} made it without low-rank factors; use `calibrate --rank {rank}`")


def described(metadata: dict[str, str], distiller: Distiller, rank: int, codes: bool) -> dict[str, str]:
    """The metadata of the start file, brought up to date."""
    best = min(distiller.log, key=lambda row: row["error"])
    stages = json.loads(metadata.get("ternary.settings", "{}"))
    stages["distill"] = {
        "steps": distiller.total,
        "batch": distiller.settings.batch * distiller.settings.accumulate,
        "rank": rank,
        "codes": codes,
        "states": len(distiller.pool),
        "velocity_error": round(best["error"], 5),
        "best_step": best["step"],
    }
    return dict(metadata) | {"ternary.method": "distill", "ternary.settings": json.dumps(stages)}


def settings_for(arch_plan: Plan, **changes) -> Settings:
    """Distillation settings that follow a device's plan."""
    base = Settings(
        batch=arch_plan.batch,
        checkpointing=arch_plan.checkpointing,
        eight_bit=arch_plan.eight_bit,
        autocast=arch_plan.autocast,
    )
    return replace(base, **changes)


def plan_for(shop: Workshop) -> Plan:
    """The plan for what the device has free now."""
    return plan(shop.arch, shop.tokens, free_memory(shop.device), shop.device)
