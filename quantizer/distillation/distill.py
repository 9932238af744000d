"""Velocity self-distillation: a ternary model learns the teacher's velocities at states of the teacher's pictures.

Trained are, at every level, scales, biases, norms and the layers that are not ternary; with a rank the low-rank
factors; and, if asked, the codes themselves through a straight-through estimator. Every step depends on its number
alone, so that an interrupted run that resumes ends in the same bits. Ranks share the batches of a step and sum their
gradients: with any number of them, a step is the same up to the order of sums.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor

from .. import ranks
from ..files import container
from ..files.container import FormatError
from ..files.ternary import TernaryFile
from ..files.work_folder import open_kept
from ..interrupts import whole_steps
from ..model.flux import Flux
from ..model.student import as_stored, freeze_dense, rate_groups, stored_dtypes
from ..pictures.pool import Pool
from ..pictures.quality import HeldOut, Quality, measure
from ..pictures.states import Batch
from .course import Course
from .optimizer import Adam, sum_gradients
from .schedule import RATES, TIMED_STEPS, learning_rates, schedule

_FREE = ("snapshot_minutes", "steps", "seconds", "course")  # settings that do not change what a step does
_COLLAPSED = 0.5  # of the best following seen
_LOOK = 20  # steps at most after which a run of so many seconds looks at the clock again


class Collapse(ValueError):
    """The student stopped following its prompts."""


@dataclass(frozen=True)
class DistillSettings:
    """How long and how to train; `steps` or `seconds` (with evaluations) ends the run.

    `course`: the turns that a run of so many seconds made before; with `steps` too, all of them.
    """

    steps: int | None = None
    seconds: float | None = None
    course: tuple[tuple[int, float, int], ...] = ()
    batch: int = 32
    accumulate: int = 1  # batches of which gradients are summed for one step, by all ranks together
    warmup: int = 20
    average: float = 0.99  # of the exponential moving average that is evaluated and written
    evaluate_every: int = 100
    snapshot_minutes: float = 5.0
    recompute: bool = False  # recompute every block in the backward pass instead of keeping its activations
    eight_bit: bool = False
    autocast: torch.dtype | None = None
    seed: int = 0
    freeze_dense: bool = False  # the layers that are not ternary stay as they are
    rates: Mapping[str, float] = field(default_factory=lambda: dict(RATES))


class Distiller:
    """One run: the student, its optimizer, its average, and what was best so far on held-out prompts."""

    def __init__(
        self,
        model: Flux,
        start: TernaryFile,
        pool: Pool,
        held_out: HeldOut,
        settings: DistillSettings,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.clock, self.seconds = clock, settings.seconds
        self.model, self.pool, self.held_out, self.settings = model, pool, held_out, settings
        self.start, self.dtypes = start, stored_dtypes(model, start)
        if settings.freeze_dense:
            freeze_dense(model)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        ranks.spread(p.data for p in self.parameters.values())
        self.rate_groups, rates = rate_groups(self.parameters), learning_rates(model, settings.rates)
        self.optimizer = Adam(self.parameters, rates, eight_bit=settings.eight_bit, seed=settings.seed)
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.best = {name: p.to("cpu", copy=True) for name, p in self.average.items()}  # main memory: rarely used
        self.power = pool.power().to(next(model.parameters()).device)
        self.step, self.used, self.evaluation_seconds = 0, 0.0, 0.0
        self.course = Course(settings.course or ([] if settings.steps is None else [(0, 0.0, settings.steps)]))
        self._recent: list[float] = []  # seconds of steps since the course was looked at
        self._begun: float | None = None  # when the step began, or what is between two
        self.log: list[dict] = []

    @property
    def total(self) -> int | None:
        """Steps of the run, as it is known now."""
        return self.course.total(self.step)

    @property
    def due(self) -> bool:
        """Whether to evaluate after this step: regularly, unless the end comes soon, and at the end."""
        every, total = self.settings.evaluate_every, self.total
        if total is None:
            return self.step % every == 0
        return self.step == total or self.step % every == 0 and total - self.step > every // 2

    @property
    def best_error(self) -> float:
        return min((row["error"] for row in self.log), default=math.inf)

    @property
    def best_quality(self) -> Quality:
        """Of what `take_best` puts into the model, as it would be written."""
        best = min(self.log, key=lambda row: row["error"])
        return Quality(**{field.name: best[field.name] for field in fields(Quality)})

    def loss(self, batch: Batch) -> Tensor:
        """Squared velocity error relative to the teacher's mean square at that timestep, mean over the batch."""
        device = batch.velocity.device
        with torch.autocast(device.type, self.settings.autocast, enabled=self.settings.autocast is not None):
            velocity = forward(self.model, batch, self.settings.recompute)
        error = (velocity.float() - batch.velocity.float()).square().mean((1, 2, 3))
        return (error / self.power[self.pool.bin(batch.inputs.t)]).mean()

    def advance(self) -> float:
        """One step; returns its loss. Raises Collapse where it is not finite."""
        self._begun = self.clock() if self._begun is None else self._begun
        device, settings = next(iter(self.parameters.values())).device, self.settings
        numbers = range(self.step * settings.accumulate, (self.step + 1) * settings.accumulate)
        batches = (self.pool.draw(number, settings.batch, settings.seed, device) for number in ranks.share(numbers))
        loss = float(self.learn(batches))
        if not math.isfinite(loss):
            raise Collapse(f"the loss is {loss} at step {self.step}; lower the learning rates and start again")
        self.step += 1
        self._recent.append(self._pass_time())
        self._mind_the_time()
        return loss

    def _pass_time(self) -> float:
        """Seconds since the last call, which count as used; what lies between two steps belongs to the second one."""
        now = self.clock()
        seconds, self._begun = now - (now if self._begun is None else self._begun), now
        self.used += seconds
        return seconds

    def _mind_the_time(self) -> None:
        """Count the steps that fit what is left of the seconds, after the first ones and again and again."""
        if self.settings.steps is not None or self.course.knows(self.step):
            self._recent.clear()
            return
        enough = max(1, min(_LOOK, (self.total - self.step) // 4)) if self.course.legs else TIMED_STEPS
        if len(self._recent) >= enough:
            each = sum(self._recent) / len(self._recent) + self.evaluation_seconds / self.settings.evaluate_every
            left = self.seconds - self.used - self.evaluation_seconds  # of the end, besides the regular ones
            self.course.head_for(ranks.agree(self.step + max(1, int(left / max(each, 1e-9)))), self.step)
            self._recent.clear()

    def learn(self, batches: Iterable[Batch]) -> Tensor:
        """Move parameters and average by one step on these batches, this rank's, and on those of the other ranks.

        Returns the loss of all. Nothing waits for the device.
        """
        factors = schedule(self.rate_groups, self.step, self.course, self.settings.warmup)
        for name, parameter in self.parameters.items():
            # Timed steps must cost what later ones do; Adam's moments of the codes settle meanwhile.
            parameter.requires_grad_(factors[name] > 0 or self.step < TIMED_STEPS)
        total = torch.zeros((), device=self.power.device)
        for batch in batches:
            loss = self.loss(batch) / self.settings.accumulate
            loss.backward()
            total += loss.detach()
        sum_gradients(self.parameters.values(), total)
        self.optimizer.step(factors)
        for parameter in self.parameters.values():
            parameter.grad = None
        weight = 1 - min(self.settings.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            exact = [name for name, parameter in self.parameters.items() if parameter.dtype == torch.float32]
            averages, parameters = ([of[name] for name in exact] for of in (self.average, self.parameters))
            torch._foreach_lerp_(averages, parameters, weight)
            # Parameters in bf16 have averages in bf16, which would not move: those follow the parameters.
            for name in self.parameters.keys() - set(exact):
                self.average[name].copy_(self.parameters[name])
        return total

    def evaluate(self) -> Quality:
        """Quality of what would be written now; the best is kept. Raises Collapse where prompts lost influence."""
        self._pass_time()
        with as_stored(self.model, self.dtypes, self.average):
            quality = measure(self.model, self.held_out)
        self.evaluation_seconds = self._pass_time()
        best = self.best_error
        self.log.append({"step": self.step, **asdict(quality)})
        if quality.error < best:
            for name, value in self.average.items():
                self.best[name].copy_(value)
        peak = max(row["response"] * row["alignment"] for row in self.log)
        latest = [row["response"] * row["alignment"] for row in self.log[-2:]]
        if len(self.log) > 2 and max(latest) < _COLLAPSED * peak:
            raise Collapse(
                f"conditioning collapse at step {self.step}: prompts have {latest[-1]:.0%} of the influence they have "
                f"on the teacher, after {peak:.0%}. Use more and more diverse prompts, or lower learning rates"
            )
        return quality

    def take_best(self) -> None:
        """Put the best average into the model's parameters."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.best[name])

    def save(self, path: str | os.PathLike) -> None:
        """Write everything a later run needs to go on, atomically. Any number of ranks can."""
        tensors = {f"parameter.{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        tensors |= {f"adam.{name}": value for name, value in self.optimizer.state_dict().items()}
        progress = {"step": self.step, "course": self.course.legs, "used": self.used, "log": self.log}
        progress["world"] = ranks.world()
        metadata = {"progress": json.dumps(progress), "settings": self.fingerprint()}
        container.save(path, tensors, metadata, overwrite=True)

    def resume(self, path: str | os.PathLike) -> bool:
        """Go on from a snapshot if there is one that fits. Raises ValueError for one of other settings."""
        if not Path(path).exists():
            return False
        file = open_kept(path)
        if file.header.metadata.get("settings") != self.fingerprint():
            raise ValueError(f"{path} comes from a run with other settings; delete it, or use those settings again")
        damaged = FormatError(path, "its progress is damaged; delete the file and start again")
        try:
            progress = json.loads(file.header.metadata["progress"])
            step, legs, used, log = (progress[key] for key in ("step", "course", "used", "log"))
            course = Course(legs)
        except (KeyError, TypeError, ValueError, RecursionError):
            raise damaged from None
        if not (isinstance(step, int) and course.legs and isinstance(used, float) and isinstance(log, list)):
            raise damaged
        total = course.total(step)
        if self.settings.steps is not None and not self.settings.course and self.course.legs != course.legs:
            raise ValueError(f"{path} comes from a run of {total} steps; delete it, or give that number")
        if len(course.legs) > len(self.course.legs):
            self.course = course
        self.step, self.used, self.log = step, used, log
        adam = {}
        with torch.no_grad():
            for key in file.entries:
                kind, _, name = key.partition(".")
                if kind == "adam":
                    adam[name] = file.tensor(key)
                else:
                    of_kind: dict[str, Mapping[str, Tensor]] = {
                        "parameter": self.parameters,
                        "average": self.average,
                        "best": self.best,
                    }
                    of_kind[kind][name].copy_(file.tensor(key))
        self.optimizer.load_state_dict(adam)
        return True

    def fingerprint(self) -> str:
        """What must be equal for a snapshot to be continued."""
        settings = {k: v for k, v in asdict(self.settings).items() if k not in _FREE}
        shapes = {name: list(p.shape) for name, p in self.parameters.items()}
        start = {key: value for key, value in self.start.metadata.items() if key != "modelspec.date"}
        values = {"settings": settings, "parameters": shapes, "pool": self.pool.fingerprint, "start": start}
        return json.dumps(values, default=str)


def distill(
    distiller: Distiller,
    snapshot: str | os.PathLike | None = None,
    on_step: Callable[[dict], object] = lambda row: None,
    left: Callable[[], float] | None = None,
) -> None:
    """Run to the end, from `snapshot` if it exists, and leave the best student in the model.

    `on_step` gets a dict with step, total, course, loss, seconds, and after an evaluation the fields of `Quality`
    and its `detail`.
    `left`: seconds that there are for it, asked when it begins, in the place of those of the settings.
    """
    settings = distiller.settings
    if snapshot is not None:
        distiller.resume(snapshot)
    if left is not None:
        distiller.seconds = distiller.used + left()
    if not distiller.log:  # the start is a candidate too: training never makes a file worse
        distiller.evaluate()
    saved = distiller.clock()
    with whole_steps() as interrupted:
        while distiller.total is None or distiller.step < distiller.total:
            loss = distiller.advance()
            row: dict = {"step": distiller.step, "total": distiller.total, "loss": loss, "seconds": distiller.used}
            row["course"] = tuple(map(tuple, distiller.course.legs))
            if distiller.due:
                quality = distiller.evaluate()
                row |= asdict(quality) | {"detail": quality.detail}
            on_step(row)
            stop = any(ranks.gather(interrupted()))
            due = stop or distiller.clock() - saved > 60 * settings.snapshot_minutes
            if due and snapshot is not None and distiller.total is not None:
                if ranks.first():
                    distiller.save(snapshot)
                saved = distiller.clock()
            if stop:
                ranks.wait()
                raise KeyboardInterrupt
    distiller.take_best()


def forward(model: Flux, batch: Batch, recompute: bool) -> Tensor:
    """A FLUX forward, optionally with every block recomputed in the backward pass."""
    if not recompute:
        return model(*batch.inputs)
    tokens = model.prepare(*batch.inputs)
    for block in model.blocks:
        tokens = torch.utils.checkpoint.checkpoint(block, tokens, use_reentrant=False)
    return model.finish(tokens)
