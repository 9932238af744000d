"""From a dense checkpoint to a distilled ternary file in one go: round, sample, calibrate, distill, within a budget.

With a growth the most sensitive Linears are found before calibration, and get more bits.

Every choice that depends on the machine's speed is made once and kept in the work folder, so that a run that was
interrupted goes on with the same choices and writes the same file.
"""

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ..calibration import calibrate
from ..calibration.sensitivity import best_upgrades, sensitivities
from ..distillation.blockwise import BlockSettings
from ..files.atomic import write_json
from ..files.inputs import read_json
from ..files.ternary import open_ternary
from ..files.work_folder import keep_settings
from ..pictures.pool import subset
from ..pictures.quality import Quality
from ..rounding.round import round_checkpoint
from .budget import BLOCKWISE, CHOICE, Budget, Plan, budget_for, default_minutes, plan_for, settings_for
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
        self.work.check(self.target, self.overwrite)
        folder = self.work.folder
        settings = {"dense": self.work.dense.name, "rank": self.rank, "codes": self.codes, "minutes": self.budget / 60}
        settings |= {"sizes": self.work.sizes, "seed": self.work.seed, "packing": self.packing, "growth": self.growth}
        keep_settings(folder, settings)
        choices = self._choices(folder / "choices.json")
        chosen = Budget(**choices["budget"])
        self.work.pictures, self.work.states = chosen.pictures, chosen.states
        self.work.held_out = chosen.held_out
        stages = [self._stage("round", folder / "rounded.safetensors", self._round)]
        self.on_message(
            f"sampling {chosen.pictures} pictures and {chosen.states} states with the original model"
            f" ({self._left_text()})"
        )
        self.work.pool  # noqa: B018  sampled now, so that the stages' times are their own
        self.work.swapped  # noqa: B018
        precisions = self._precisions(folder / "precisions.json", choices["state_seconds"]) if self.growth else {}
        stages.append(
            self._stage(
                "calibrate", folder / "calibrated.safetensors", lambda path: self._calibrate(path, chosen, precisions)
            )
        )
        stages.append(self._stage("distill", self.target, lambda path: self._distill(path, choices)))
        return stages

    def _stage(self, name: str, file: Path, make: Callable[[Path], object]) -> Stage:
        started = time.monotonic()
        if name == "distill" or not file.exists():
            self.on_message(f"{name} ({self._left_text()})")
            make(file)
        seconds = time.monotonic() - started
        quality = self.work.quality(file)
        self.on_message(f"  {name}: velocity error {quality.error:.4f} on held-out prompts, {seconds:.0f} s")
        return Stage(name, str(file), os.path.getsize(file) / 1e6, seconds, quality)

    def _left_text(self) -> str:
        return f"about {max(0, round(self.left / 60))} min left" if self.left > 90 else "less than 2 min left"

    def _choices(self, path: Path) -> dict:
        if path.exists():
            return read_json(path, dict)
        state_seconds = self.work.time_state()
        enough = calibrate.enough_states(self.work.arch, self.work.tokens)
        prompts, steps = len(self.work.conditioning), self.work.trajectories.steps
        chosen = budget_for(self.budget, state_seconds, steps, prompts, enough, self.work.state_capacity)
        choices = {"budget": asdict(chosen), "state_seconds": state_seconds}
        write_json(path, choices)
        return choices

    def _round(self, path: Path) -> None:
        round_checkpoint(self.work.dense, path, overwrite=True)

    def _precisions(self, path: Path, state_seconds: float) -> dict[str, str]:
        """The Linears in two terms or 8 bits, by name."""
        if not path.exists():
            self.on_message(f"looking for the most sensitive Linears ({self._left_text()})")
            start = self.work.folder / "rounded.safetensors"
            file = open_ternary(start)
            count = self.work.counter("measured layers", len(file.layers))
            # Three forms of each, and half of the blocks come after it.
            states = int(CHOICE * self.budget / (1.5 * len(file.layers) * state_seconds))
            measured = sensitivities(file, self.work.teacher, subset(self.work.holdout, states), on_layer=count)
            chosen = best_upgrades(measured, int(self.growth * start.stat().st_size))
            write_json(path, {name: option.precision for name, option in chosen.items()})
        return read_json(path, dict)

    def _calibrate(self, path: Path, chosen: Budget, precisions: dict[str, str]) -> None:
        work = self.work
        states = work.trajectories.states(work.training_pictures, chosen.calibration_states, work.seed + 1)
        count = work.counter("calibrated blocks", len(work.arch.block_names))
        source = open_ternary(work.folder / "rounded.safetensors").metadata["ternary.source_sha256"]
        calibrate.calibrate(
            work.teacher,
            states,
            work.conditioning,
            path,
            work.folder / "calibrate",
            calibrate.CalibrationSettings(rank=self.rank, batch=work.teacher_batch, precisions=precisions),
            overwrite=True,
            on_block=lambda name, fit: count(1),
            sha256=source,
        )

    def _distill(self, path: Path, choices: dict) -> None:
        plan_file = self.work.folder / "choices.json"
        if "training" not in choices:
            self.work.release_teacher()
            plan, seconds = plan_for(self.work), max(0.3 * self.budget, self.left - 0.03 * self.budget)
            choices["training"] = self._training(plan, seconds, choices["state_seconds"])
            write_json(plan_file, choices)
        training = choices["training"]
        dtype = torch.bfloat16 if training["autocast"] else None
        plan = Plan(**{**training["plan"], "autocast": dtype})
        blocks = training["blocks"]
        settings = settings_for(plan, steps=training["steps"], seconds=training["seconds"])
        block_settings = BlockSettings(**blocks) if blocks else None
        if block_settings and dtype:
            block_settings = replace(block_settings, stream=dtype)

        def step(row: dict) -> None:
            if training["steps"] is None and row["total"]:
                training["steps"] = row["total"]
                write_json(plan_file, choices)
            self.work.on_progress("training steps", row["step"], row["total"] or 0)

        distill_file(
            self.work,
            self.work.folder / "calibrated.safetensors",
            path,
            settings,
            self.rank,
            training["codes"],
            self.packing,
            block_settings,
            self.overwrite,
            on_step=step,
            on_block=lambda result: self.on_message(f"  {result.name}: {result.before:.4f} -> {result.after:.4f}"),
        )

    def _training(self, plan: Plan, seconds: float, state_seconds: float) -> dict:
        """What to train and for how long."""
        codes = plan.codes if self.codes is None else self.codes and plan.codes
        blocks = None
        if not codes and self.codes is not False:
            count = len(self.work.arch.block_names)
            # A step of a block costs about four teacher forwards of the block.
            each = 4 * state_seconds * plan.batch / count
            steps = int(min(400, BLOCKWISE * seconds / count / max(each, 1e-9)))
            states = max(plan.batch, 64 // plan.batch * plan.batch)
            blocks = {"steps": steps, "batch": plan.batch, "states": states, "rank": self.rank, "eight_bit": True}
            blocks = blocks if steps >= 20 else None
            seconds *= 1 - BLOCKWISE if blocks else 1
        description = asdict(plan) | {"autocast": None}
        return {
            "codes": codes,
            "steps": None,
            "seconds": seconds,
            "blocks": blocks,
            "plan": description,
            "autocast": bool(plan.autocast),
        }


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
