"""What stages share: the teacher, and its pictures, states and velocities in a work folder."""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from .. import ranks
from ..files.architecture import Architecture
from ..files.atomic import check_target
from ..files.checkpoint import fingerprint, open_checkpoint
from ..files.ternary import open_ternary
from ..model.student import load_student
from ..model.teacher import Teacher, free_memory
from ..pictures import conditioning
from ..pictures.pool import Pool, hold_out, training_pool
from ..pictures.quality import HeldOut, Quality, measure
from ..pictures.sampler import latent_shape
from ..pictures.trajectories import Picture, PictureSettings, Trajectories
from .budget import LEAST_PICTURES, MAX_PICTURES, STATES_EACH

Progress = Callable[[str, int, int], object]  # (what, done, total)
_FEWEST_WITHOUT_BUDGET = 64
_MEMORY = 0.2  # of the free main memory, for states
_LOT = 0.1  # of the time for sampling, after which the clock is looked at


def _silent(what: str, done: int, total: int) -> None:
    pass


def choose_device(name: str = "auto") -> torch.device:
    """ "auto" is a CUDA device, else the CPU; of CUDA devices every rank of a machine gets its own.

    Raises ValueError for a device that torch does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    number, count = ranks.local()
    if count > 1 and name != "cpu":
        if name != "cuda" or count > torch.cuda.device_count():
            found = torch.cuda.device_count()
            raise ValueError(f"device {name!r} for {count} processes, and this machine has {found} GPUs: one for each")
        torch.cuda.set_device(number)
        name = f"cuda:{number}"
    try:
        torch.zeros(1, device=name).item()  # the device "meta" computes nothing
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return torch.device(name)


@dataclass(frozen=True)
class Workspace:
    """A teacher and its prompts, and a folder that keeps what takes time to make of them.

    Its methods `sample_pictures`, `label_states` and `hold_out` may work for hours, but once: what is there already is
    read. Its properties cost no more than reading the teacher.
    """

    dense: Path
    conditioning_file: Path
    folder: Path
    sizes: tuple[tuple[int, int], ...] = ((1024, 1024),)
    sampler_steps: int | None = None
    guidance: tuple[float, ...] | None = None
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    on_progress: Progress = _silent

    def check(self, target: Path | None, overwrite: bool, *sources: Path) -> None:
        """Raises ValueError or OSError, before anything is written, where these inputs do not fit each other, and where
        `target` cannot be written or is one of them. `sources` are further inputs.
        """
        if target is not None:
            dense = open_checkpoint(self.dense).files
            check_target(target, 0, overwrite, [*dense, self.conditioning_file, *sources])
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
        _, height, width = max(self.trajectories.shapes, key=math.prod)
        return self.conditioning.context.shape[1] + height * width // self.arch.patch_size**2

    @cached_property
    def teacher_batch(self) -> int:
        """States that the teacher runs at a time."""
        return max(1, min(64, 4096 // self.tokens))

    def _together(self, batch: int) -> int:
        """Batches that the teacher takes at once."""
        return self.teacher.placement.together(batch, self.tokens)

    @property
    def state_capacity(self) -> int:
        """States, with the teacher's velocities, that a fifth of the free main memory holds."""
        channels = self.arch.in_channels + self.arch.out_channels
        largest = max(height * width for _, height, width in self.trajectories.shapes)
        return int(_MEMORY * free_memory(torch.device("cpu"))) // (4 * channels * largest)

    def pictures_for(self, seen: int) -> int:
        """Pictures that take about a quarter of the time of training on `seen` states: 64 to 4,096 that fit the memory.

        A state costs about four of the teacher's forwards in training; a picture costs one for each step of the sampler
        and for each of its states where the velocity is not known.
        """
        affordable = seen // (self.trajectories.steps + STATES_EACH // 2)
        return min(max(_FEWEST_WITHOUT_BUDGET, affordable), MAX_PICTURES, max(1, self.state_capacity // STATES_EACH))

    def time_state(self, clock: Callable[[], float] = time.monotonic, seconds: float = 2.0) -> float:
        """Seconds of a teacher forward for one state now: the mean of three, or of as many as so many seconds allow.

        Of the slowest rank.
        """
        shape = (self.arch.in_channels, *max(self.trajectories.shapes, key=math.prod)[1:])
        size = self.teacher_batch
        context, pooled = self.conditioning.batch([0] * size)
        guidance = torch.full((size,), 3.5) if self.arch.guidance else None
        times: list[float] = []
        while len(times) < 3 or sum(times) * size < seconds:
            started = clock()
            self.teacher(torch.randn(size, *shape), torch.full((size,), 0.5), context, pooled, guidance).cpu()
            times.append((clock() - started) / size)
        return max(ranks.gather(sum(times) / len(times)))

    @cached_property
    def trajectories(self) -> Trajectories:
        settings = PictureSettings(self.sizes, self.sampler_steps, guidance=self.guidance, seed=self.seed)
        model = fingerprint(open_checkpoint(self.dense))
        return Trajectories(self.folder / "pictures", self.arch, self.conditioning, settings, model)

    def sample_pictures(self, count: int) -> list[Picture]:
        """Let the teacher sample the first `count` of its training pictures."""
        pictures = self.trajectories.plan("train", count)
        progress = self.counter("pictures", count)
        batch, together = self.teacher_batch, self._together(self.teacher_batch)
        self.trajectories.generate(self.teacher.velocities, pictures, batch, together, progress)
        return pictures

    def sample_within(self, seconds: float, most: int, clock: Callable[[], float] = time.monotonic) -> int:
        """Let the teacher sample training pictures for so long, some at least and `most` at most; returns how many.

        What is there already counts, and takes no time.
        """
        batch, together = self.teacher_batch, self._together(self.teacher_batch)
        pictures, done, expected = self.trajectories.plan("train", most), 0, 0
        lot, largest = LEAST_PICTURES, batch * together * len(self.sizes) * ranks.world()
        started = clock()

        def progress(more: int) -> None:
            nonlocal done
            done += more
            self.on_progress("pictures", done, expected and max(expected, done))

        while done < most:
            before = clock()
            self.trajectories.generate(self.teacher.velocities, pictures[done : done + lot], batch, together, progress)
            now = clock()
            expected = min(most, int(done * seconds / max(now - started, 1e-9)))
            stop = done >= LEAST_PICTURES and now - started + (now - before) / 2 > seconds
            several = int(_LOT * seconds * lot / max(now - before, 1e-9))
            stop, lot = ranks.agree((stop, min(max(several, LEAST_PICTURES), largest)))
            if stop:
                break
        return done

    def label_states(self, pictures: int, count: int) -> Pool:
        """`count` states of so many pictures with the teacher's velocities, in main memory."""
        return training_pool(
            self.teacher.velocities,
            self.trajectories,
            self.sample_pictures(pictures),
            count=count,
            folder=self.folder / "velocities",
            batch=self.teacher_batch,
            seed=self.seed,
            on_progress=self.counter("teacher velocities", count),
        )

    def hold_out(self, pictures: int) -> HeldOut:
        """States of so many pictures of held-out prompts, on the device."""
        batch = max(2, self.teacher_batch)
        held_out = hold_out(
            self.teacher.velocities,
            self.trajectories,
            pictures,
            folder=self.folder / "velocities",
            batch=batch,
            together=self._together(batch),
        )
        return held_out.to(self.device)

    def release_teacher(self) -> None:
        """Free the teacher's memory; it is read again when it is needed."""
        self.__dict__.pop("teacher", None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def measure(self, file: str | os.PathLike, held_out: HeldOut) -> Quality:
        """Quality of a ternary file."""
        return measure(load_student(open_ternary(file), self.device), held_out)
