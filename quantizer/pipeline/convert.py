"""From a dense checkpoint to a distilled ternary file in one go: round, sample, calibrate, distill, within a budget.

With a growth the most sensitive Linears are found before calibration, and get more bits.

Amounts follow the clock: pictures are sampled for their share of the time, calibration gets what its share pays for at
the speed that the machine has then, and training takes what is left, and looks at the clock again and again. What was
decided is kept in the work folder: a run that goes on decides the same, and writes the same file.
"""

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from .. import ranks
from ..calibration import calibrate
from ..calibration.sensitivity import best_upgrades, sensitivities
from ..distillation.blockwise import BlockSettings
from ..files.ternary import open_ternary
from ..files.work_folder import keep_settings, open_kept
from ..pictures.pool import Pool, subset
from ..pictures.quality import HeldOut, Quality
from ..rounding.round import round_checkpoint
from ..threads import leave_busy_processors
from .budget import (
    BLOCKWISE,
    CHOICE,
    LEAST_PICTURES,
    STATES_EACH,
    Budget,
    Plan,
    calibration_forwards,
    calibration_states,
    default_minutes,
    held_out_pictures,
    most_pictures,
    plan_for,
    sampling_seconds,
    settings_for,
    steps_between_evaluations,
)
from .decisions import Decisions, Training
from .distill_file import distill_file
from .workspace import Workspace

_LEAST_TRAINING, _RESERVE = 0.05, 0.02  # of the budget: where nothing is left; for the last measurement and the file


@dataclass(frozen=True)
class Amounts:
    """What to use in the place of what the time pays for; with all three, files are the same on every machine."""

    pictures: int | None = None
    calibration_states: int | None = None
    steps: int | None = None


@dataclass(frozen=True)
class FinishedStage:
    """A finished stage: its file's size and quality on held-out prompts, and the seconds it took this time."""

    name: str
    file: str
    megabytes: float
    seconds: float
    quality: Quality


class Run:
    """One conversion; `run` does what is not done yet and returns each FinishedStage: round, calibrate and distill."""

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
        freeze_dense: bool = False,
        amounts: Amounts | None = None,
        overwrite: bool = False,
        clock: Callable[[], float] = time.monotonic,
        on_message: Callable[[str], object] = print,
    ):
        """`codes`: whether to train them; None: where the device's memory allows it, at once or block by block.
        `freeze_dense`: whether the layers that are not ternary stay as they are.
        `growth`: part by which the file may grow for Linears in two terms or 8 bits (see `mixed`).
        `amounts`: what not to decide by the clock.
        """
        self.work, self.target, self.rank, self.codes, self.packing = work, target, rank, codes, packing
        self.growth, self.overwrite, self.on_message = growth, overwrite, on_message
        self.freeze_dense = freeze_dense
        self.amounts = amounts or Amounts()
        weights = sum(n * k for n, k in work.arch.linear_shapes.values())
        self.budget = 60 * (default_minutes(weights) if minutes is None else minutes)
        self.clock, self.started, self.spent = clock, clock(), 0.0
        self.threads = torch.get_num_threads()

    @property
    def used(self) -> float:
        """Seconds of the budget, in this process and in earlier ones."""
        return self.spent + self.clock() - self.started

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return self.budget - self.used

    def run(self) -> list[FinishedStage]:
        work, folder = self.work, self.work.folder
        work.check(self.target, self.overwrite)
        settings = {"dense": work.dense.name, "rank": self.rank, "codes": self.codes, "minutes": self.budget / 60}
        settings |= {"sizes": work.sizes, "seed": work.seed, "packing": self.packing, "growth": self.growth}
        settings |= {"freeze_dense": True} if self.freeze_dense else {}
        keep_settings(folder, settings | {key: value for key, value in asdict(self.amounts).items() if value})
        kept = ranks.agree(Decisions.load(self._kept))
        self.spent = kept.spent if kept else 0.0
        self.decisions = kept or Decisions(self._first_budget())
        try:
            return self._stages()
        finally:
            if ranks.first():
                replace(self.decisions, spent=self.used).save(self._kept)

    def _stages(self) -> list[FinishedStage]:
        work, folder = self.work, self.work.folder
        rounded, calibrated = folder / "rounded.safetensors", folder / "calibrated.safetensors"
        seconds = self._timed("round", rounded, lambda: ranks.once(partial(self._round, rounded)))
        self._share_processors()
        held_out = work.hold_out(self.decisions.budget.held_out)
        stages = [self._finished("round", rounded, seconds, work.measure(rounded, held_out))]

        pool = self._sample()
        if self.decisions.precisions is None:
            self._decide(precisions=self._precisions(rounded, held_out) if self.growth else {})
        seconds = self._timed("calibrate", calibrated, lambda: self._calibrate(rounded, calibrated))
        stages.append(self._finished("calibrate", calibrated, seconds, work.measure(calibrated, held_out)))

        self._begin("distill")
        started = time.monotonic()
        quality = self._distill(calibrated, pool, held_out)
        return [*stages, self._finished("distill", self.target, time.monotonic() - started, quality)]

    @property
    def _kept(self) -> Path:
        return self.work.folder / "decisions.json"

    def _decide(self, **changes) -> None:
        """As rank 0 decides it."""
        self.decisions = ranks.agree(replace(self.decisions, spent=self.used, **changes))
        if ranks.first():
            self.decisions.save(self._kept)

    def _decide_amounts(self, **changes) -> Budget:
        self._decide(budget=replace(self.decisions.budget, **changes))
        return self.decisions.budget

    def _begin(self, name: str) -> None:
        self._say(name)
        self._share_processors()

    def _timed(self, name: str, file: Path, make: Callable[[], object]) -> float:
        """Make the file where it is missing; returns the seconds that it took."""
        started = time.monotonic()
        if ranks.agree(not file.exists()):
            self._begin(name)
            make()
        else:
            open_kept(file)
        return time.monotonic() - started

    def _share_processors(self) -> None:
        """Before every stage, and at every evaluation of a long one: other programs come and go."""
        if self.work.device.type == "cpu":
            leave_busy_processors(self.threads)

    def _finished(self, name: str, file: Path, seconds: float, quality: Quality) -> FinishedStage:
        self.on_message(f"  {name}: velocity error {quality.error:.4f} on held-out prompts, {seconds:.0f} s")
        return FinishedStage(name, str(file), os.path.getsize(file) / 1e6, seconds, quality)

    def _say(self, message: str) -> None:
        """With the time that is left, unless the amounts are fixed and take the time that they take."""
        if not all(asdict(self.amounts).values()):
            minutes = f"about {round(self.left / 60)} min left" if self.left > 90 else "less than 2 min left"
            message = f"{message} ({minutes})"
        self.on_message(message)

    def _first_budget(self) -> Budget:
        """Only how many to measure on, for about as many pictures as the machine seems to be fast enough for."""
        pictures, steps = self.amounts.pictures, self.work.trajectories.steps
        if pictures is None:
            each = steps * self._state_seconds() / ranks.world()
            expected = int(sampling_seconds(self.budget, steps) / each)
            pictures = max(LEAST_PICTURES, min(most_pictures(self.work.state_capacity), expected))
        return Budget(None, None, held_out_pictures(pictures, len(self.work.conditioning)))

    def _sample(self) -> Pool:
        """Pictures for their share of the time, and the teacher's velocities at states of them."""
        work, budget = self.work, self.decisions.budget
        if budget.pictures is None:
            if self.decisions.began is None:
                self._decide(began=self.used)
            self._say("sampling pictures with the original model")
            self._share_processors()
            pictures = self.amounts.pictures
            if pictures is None:
                end = self.decisions.began + sampling_seconds(self.budget, work.trajectories.steps)
                most = most_pictures(work.state_capacity)
                pictures = work.sample_within(end - self.used, most, self.clock)
            budget = self._decide_amounts(pictures=pictures, states=STATES_EACH * pictures)
        self._say(f"  {budget.pictures} pictures, {budget.states} states")
        return work.label_states(budget.pictures, budget.states)

    def _round(self, target: Path) -> None:
        round_checkpoint(self.work.dense, target, overwrite=True)

    def _precisions(self, rounded: Path, held_out: HeldOut) -> dict[str, str]:
        """The Linears in two terms or 8 bits, by name."""
        self._say("looking for the most sensitive Linears")
        file = open_ternary(rounded)
        # Three forms of each, and half of the blocks come after it.
        state_seconds = self._state_seconds()
        states = int(CHOICE * self.budget / (1.5 * len(file.layers) * state_seconds))
        batches, count = subset(held_out.batches, states), self.work.counter("measured layers", len(file.layers))
        measured = sensitivities(file, self.work.teacher, batches, on_layer=count)
        chosen = best_upgrades(measured, int(self.growth * rounded.stat().st_size))
        return {name: option.precision for name, option in chosen.items()}

    def _calibrate(self, rounded: Path, target: Path) -> None:
        work, budget = self.work, self.decisions.budget
        if budget.calibration_states is None:
            states = self.amounts.calibration_states
            if states is None:
                each = calibration_forwards(work.device.type) * self._state_seconds() / ranks.world()
                solving = calibrate.time_solving(work.arch, work.device, self.clock) / ranks.world()
                enough = calibrate.enough_states(work.arch, work.tokens)
                states = calibration_states(self.budget, self.left, each, enough, solving)
            budget = self._decide_amounts(calibration_states=states)
        pictures = work.trajectories.plan("train", budget.pictures)
        count = work.counter("calibrated blocks", len(work.arch.block_names))
        calibrate.calibrate(
            work.teacher,
            work.trajectories.states(pictures, budget.calibration_states, work.seed + 1),
            work.conditioning,
            target=target,
            folder=work.folder / "calibrate",
            settings=calibrate.CalibrationSettings(
                rank=self.rank,
                batch=work.teacher_batch,
                precisions=self.decisions.precisions,
                freeze_dense=self.freeze_dense,
            ),
            overwrite=True,
            on_block=lambda name, fit: count(1),
            sha256=open_ternary(rounded).metadata["ternary.source_sha256"],
        )

    def _distill(self, start: Path, pool: Pool, held_out: HeldOut) -> Quality:
        """Returns the quality of the file that it writes."""
        if self.decisions.training is None:
            self.work.release_teacher()
            self._decide(training=self._training(plan_for(self.work), self._to_train()))
        training = self.decisions.training
        measured = sum(len(batch.inputs.t) for batch in held_out.batches)

        def step(row: dict) -> None:
            if row["course"] != self.decisions.training.course:
                self._decide(training=replace(training, course=row["course"]))
            self.work.on_progress("training steps", row["step"], row["total"] or 0)
            if "error" in row:
                self._share_processors()

        distiller = distill_file(
            self.work,
            start,
            self.target,
            pool=pool,
            held_out=held_out,
            settings=settings_for(
                training.plan,
                steps=training.steps,
                course=training.course,
                accumulate=training.accumulate,
                evaluate_every=steps_between_evaluations(measured, training.plan.batch * training.accumulate),
                freeze_dense=self.freeze_dense,
            ),
            rank=self.rank,
            codes=training.codes,
            packing=self.packing,
            block_settings=training.blocks,
            overwrite=self.overwrite,
            left=self._to_train,
            clock=self.clock,
            on_step=step,
            on_block=lambda result: self.on_message(f"  {result.name}: {result.before:.4f} -> {result.after:.4f}"),
        )
        self._decide(training=replace(self.decisions.training, steps=distiller.total))
        return distiller.best_quality

    def _state_seconds(self) -> float:
        """Of a teacher forward of one state now; timing takes a hundredth of the budget at most, or three forwards."""
        return self.work.time_state(self.clock, min(2.0, 0.01 * self.budget))

    def _to_train(self) -> float:
        """Seconds for training: what is left, and some where nothing is."""
        return max(_LEAST_TRAINING * self.budget, self.left - _RESERVE * self.budget)

    def _training(self, plan: Plan, seconds: float) -> Training:
        """What to train and for how long."""
        codes, blocks = plan.codes if self.codes is None else self.codes and plan.codes, None
        if not codes and self.codes is not False:
            count = len(self.work.arch.block_names)
            # A step of a block costs about four teacher forwards of the block.
            each = 4 * self._state_seconds() * plan.batch / count
            steps = int(min(400, BLOCKWISE * seconds / count / max(each, 1e-9)))
            states = max(plan.batch, 64 // plan.batch * plan.batch)
            stream = plan.autocast or torch.float32
            if steps >= 20:
                blocks = BlockSettings(
                    steps, plan.batch, ranks.world(), states, rank=self.rank, eight_bit=True, stream=stream
                )
        return Training(plan, codes, self.amounts.steps, seconds=None, blocks=blocks, accumulate=ranks.world())


def expectation(stages: list[FinishedStage]) -> str:
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
