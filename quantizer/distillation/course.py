"""How many steps a run has: as many as its time pays for, which is looked at again while it runs.

The schedule of learning rates goes by progress, from 0 to 1. A run of so many steps goes there evenly. One of so many
seconds turns wherever its machine has become slower or faster: from there on it goes evenly to 1 at another last step,
and the progress up to there stays what it was. All turns together are the course of a run, and a run that is given
the course of another takes the same steps.
"""

from collections.abc import Iterable
from typing import NamedTuple

_WORTH_A_TURN = 0.1  # of the steps that are left


class Leg(NamedTuple):
    """From `step` on, progress goes evenly from `progress` to 1 at the step `total`."""

    step: int
    progress: float
    total: int


class Course:
    """The legs of a run, in order; none while its first steps are timed."""

    def __init__(self, legs: Iterable[tuple[int, float, int]] = ()):
        self.legs = [Leg(int(step), float(progress), int(total)) for step, progress, total in legs]

    def total(self, step: int) -> int | None:
        """How many steps the run has, as it is known at this one."""
        leg = self._leg(step)
        return None if leg is None else leg.total

    def progress(self, step: int) -> float:
        """0 at the first step, 1 after the last one."""
        leg = self._leg(step)
        if leg is None:
            return 0.0
        return leg.progress + (1 - leg.progress) * (step - leg.step) / max(1, leg.total - leg.step)

    def knows(self, step: int) -> bool:
        """Whether a turn at this step or a later one was made already."""
        return bool(self.legs) and self.legs[-1].step >= step

    def head_for(self, total: int, step: int) -> None:
        """Turn at this step, where the last one is to be another by so much that it matters."""
        known = self.total(step)
        if known is None:
            self.legs.append(Leg(0, 0.0, total))
        elif abs(total - known) > max(1, _WORTH_A_TURN * (known - step)):
            self.legs.append(Leg(step, self.progress(step), total))

    def _leg(self, step: int) -> Leg | None:
        begun = [leg for leg in self.legs if leg.step <= step]
        return begun[-1] if begun else None
