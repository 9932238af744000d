"""From a dense checkpoint to a distilled ternary file in one go: round, sample, calibrate, distill, within a budget.

With a growth the most sensitive Linears are found before calibration, and get more bits.

What depends on the machine's speed is decided once and kept in the work folder, so that a run that was interrupted goes
on with the same decisions and writes the same file.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from .. import ranks
from ..calibration import calibrate
from ..calibration.sensitivity import best_upgrades, sensitivities
from ..distillation.blockwise import BlockSettings
from ..distillation.schedule import TIMED_STEPS
from ..files.ternary import open_ternary
from ..files.work_folder import keep_settings
from ..pictures.pool import Pool, subset
from ..pictures.quality import HeldOut, Quality
from ..rounding.round import round_checkpoint
from .budget import BLOCKWISE, CHOICE, Plan, budget_for, default_minutes, plan_for, settings_for
from .decisions import Decisions, Training
from .stages import distill_file
from .workspace import Workspace


@dataclass(frozen=True)
class Stage:
    """A finished stage: its file's size and quality on held-out prompts, and the seconds it took this time."""

    name: str
    file: str
    megabytes: float
    seconds: float
    quality: Quality


class Run:
    """One conversion; `run` does what is not done yet and returns a Stage for each of round, calibrate and distill."""

    def __init__(
        self,
        work: Workspace,
        target: Path,
        minutes: float | None = None,
        *,
        rank: int = 0,
        codes: bool | None = None,
        packing: str = "planes32",
        growth: float = 0.0,
        overwrite: bool = False,
        on_message: Callable[[str], object] = print,
    ):
        """`codes`: whether to train them; None: where the device's memory allows it, at once or block by block.
        `growth`: part by which the file may grow for Linears in two terms or 8 bits (see `mixed`).
        """
        self.work, self.target, self.rank, self.codes, self.packing = work, target, rank, codes, packing
        self.growth, self.overwrite, self.on_message = growth, overwrite, on_message
        weights = sum(n * k for n, k in work.arch.linear_shapes.values())
        self.budget = 60 * (default_minutes(weights) if minutes is None else minutes)
        self.started = time.monotonic()

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return self.budget - (time.monotonic() - self.started)

    def run(self) -> list[Stage]:
        work, folder = self.work, self.work.folder
        work.check(self.target, self.overwrite)
        settings = {"dense": work.dense.name, "rank": self.rank, "codes": self.codes, "minutes": self.budget / 60}
        settings |= {"sizes": work.sizes, "seed": work.seed, "packing": self.packing, "growth": self.growth}
        keep_settings(folder, settings)
        decisions = ranks.agree(Decisions.load(self._kept)) or self._decide(self._within_budget())
        budget, rounded, calibrated = (
            decisions.budget,
            folder / "rounded.safetensors",
            folder / "calibrated.safetensors",
        )

        seconds = self._timed("round", rounded, lambda: ranks.once(partial(self._round, rounded)))
        held_out = work.hold_out(budget.held_out)
        stages = [self._finished("round", rounded, seconds, held_out)]

        counts = f"{budget.pictures} pictures and {budget.states} states"
        self.on_message(f"sampling {counts} with the original model ({self._left_text()})")
        pool = work.label_states(budget.pictures, budget.states)
        if decisions.precisions is None:
            precisions = self._precisions(rounded, held_out, decisions.state_seconds) if self.growth else {}
            decisions = self._decide(replace(decisions, precisions=precisions))
        seconds = self._timed("calibrate", calibrated, lambda: self._calibrate(rounded, calibrated, decisions))
        stages.append(self._finished("calibrate", calibrated, seconds, held_out))

        seconds = self._timed("distill", None, lambda: self._distill(calibrated, decisions, pool, held_out))
        return [*stages, self._finished("distill", self.target, seconds, held_out)]

    @property
    def _kept(self) -> Path:
        return self.work.folder / "decisions.json"

    def _decide(self, decisions: Decisions) -> Decisions:
        """As rank 0 decides it."""
        decisions = ranks.agree(decisions)
        if ranks.first():
            decisions.save(self._kept)
        return decisions

    def _timed(self, name: str, file: Path | None, make: Callable[[], object]) -> float:
        """Make the file where it is missing (None: in any case); returns the seconds that it took."""
        started = time.monotonic()
        if file is None or ranks.agree(not file.exists()):
            self.on_message(f"{name} ({self._left_text()})")
            make()
        return time.monotonic() - started

    def _finished(self, name: str, file: Path, seconds: float, held_out: HeldOut) -> Stage:
        quality = self.work.measure(file, held_out)
        self.on_message(f"  {name}: velocity error {quality.error:.4f} on held-out prompts, {seconds:.0f} s")
        return Stage(name, str(file), os.path.getsize(file) / 1e6, seconds, quality)

    def _left_text(self) -> str:
        return f"about {max(0, round(self.left / 60))} min left" if self.left > 90 else "less than 2 min left"

    def _within_budget(self) -> Decisions:
        work, state_seconds = self.work, self.work.time_state()
        budget = budget_for(
            self.budget,
            state_seconds / ranks.world(),
            work.trajectories.steps,
            prompts=len(work.conditioning),
            enough=calibrate.enough_states(work.arch, work.tokens),
            capacity=work.state_capacity,
        )
        return Decisions(budget, state_seconds)

    def _round(self, target: Path) -> None:
        round_checkpoint(self.work.dense, target, overwrite=True)

    def _precisions(self, rounded: Path, held_out: HeldOut, state_seconds: float) -> dict[str, str]:
        """The Linears in two terms or 8 bits, by name."""
        self.on_message(f"looking for the most sensitive Linears ({self._left_text()})")
        file = open_ternary(rounded)
        # Three forms of each, and half of the blocks come after it.
        states = int(CHOICE * self.budget / (1.5 * len(file.layers) * state_seconds))
        batches, count = subset(held_out.batches, states), self.work.counter("measured layers", len(file.layers))
        measured = sensitivities(file, self.work.teacher, batches, on_layer=count)
        chosen = best_upgrades(measured, int(self.growth * rounded.stat().st_size))
        return {name: option.precision for name, option in chosen.items()}

    def _calibrate(self, rounded: Path, target: Path, decisions: Decisions) -> None:
        work, budget = self.work, decisions.budget
        pictures = work.trajectories.plan("train", budget.pictures)
        count = work.counter("calibrated blocks", len(work.arch.block_names))
        calibrate.calibrate(
            work.teacher,
            work.trajectories.states(pictures, budget.calibration_states, work.seed + 1),
            work.conditioning,
            target=target,
            folder=work.folder / "calibrate",
            settings=calibrate.CalibrationSettings(
                rank=self.rank, batch=work.teacher_batch, precisions=decisions.precisions
            ),
            overwrite=True,
            on_block=lambda name, fit: count(1),
            sha256=open_ternary(rounded).metadata["ternary.source_sha256"],
        )

    def _distill(self, start: Path, decisions: Decisions, pool: Pool, held_out: HeldOut) -> None:
        if decisions.training is None:
            self.work.release_teacher()
            seconds = max(0.3 * self.budget, self.left - 0.03 * self.budget)
            training = self._training(plan_for(self.work), seconds, decisions.state_seconds)
            decisions = self._decide(replace(decisions, training=training))
        training = decisions.training

        def step(row: dict) -> None:
            if training.steps is None and row["step"] == TIMED_STEPS:
                self._decide(replace(decisions, training=replace(training, steps=row["total"])))
            self.work.on_progress("training steps", row["step"], row["total"] or 0)

        distill_file(
            self.work,
            start,
            self.target,
            pool=pool,
            held_out=held_out,
            settings=settings_for(
                training.plan, steps=training.steps, seconds=training.seconds, accumulate=training.accumulate
            ),
            rank=self.rank,
            codes=training.codes,
            packing=self.packing,
            block_settings=training.blocks,
            overwrite=self.overwrite,
            on_step=step,
            on_block=lambda result: self.on_message(f"  {result.name}: {result.before:.4f} -> {result.after:.4f}"),
        )

    def _training(self, plan: Plan, seconds: float, state_seconds: float) -> Training:
        """What to train and for how long."""
        codes, blocks = plan.codes if self.codes is None else self.codes and plan.codes, None
        if not codes and self.codes is not False:
            count = len(self.work.arch.block_names)
            # A step of a block costs about four teacher forwards of the block.
            each = 4 * state_seconds * plan.batch / count
            steps = int(min(400, BLOCKWISE * seconds / count / max(each, 1e-9)))
            states = max(plan.batch, 64 // plan.batch * plan.batch)
            stream = plan.autocast or torch.float32
            if steps >= 20:
                blocks = BlockSettings(
                    steps, plan.batch, ranks.world(), states, rank=self.rank, eight_bit=True, stream=stream
                )
                seconds *= 1 - BLOCKWISE
        return Training(plan, codes, steps=None, seconds=seconds, blocks=blocks, accumulate=ranks.world())


def expectation(stages: list[Stage]) -> str:
    """The table of stages and what the last one's numbers mean for pictures."""
    lines = ["stage       velocity error   response to prompts   size"]
    for stage in stages:
        quality = stage.quality
        lines.append(f"{stage.name:<12}{quality.error:10.4f}{quality.following:18.2f}{stage.megabytes:16.1f} MB")
    error = stages[-1].quality.error
    if error < 0.03:
        meaning = "pictures should look like the original's, with small differences in detail"
    elif error < 0.15:
        meaning = "pictures should show what is asked for and lose detail; more time or --rank improves them"
    elif error < 0.4:
        meaning = "pictures will be recognisable at best; give more --budget"
    else:
        meaning = "pictures will be mostly noise; give more --budget and more prompts"
    lines.append("(velocity error: relative and squared, on prompts that were not trained on)")
    return "\n".join([*lines, f"What to expect: {meaning}."])
