"""What a run decides from the speed and memory of its machine: once, so that it goes on with the same after a stop."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..distillation.blockwise import BlockSettings
from ..files.atomic import write_json
from ..files.inputs import read_json
from .budget import Budget, Plan


@dataclass(frozen=True)
class Training:
    """What to train and for how long: so many steps, or seconds.

    course       how the steps followed the time so far (see `Course`); with `steps` all of it
    accumulate   batches for each step, one for each rank where the run began
    """

    plan: Plan
    codes: bool
    steps: int | None
    seconds: float | None
    blocks: BlockSettings | None = None  # of a first pass by blocks
    accumulate: int = 1
    course: tuple[tuple[int, float, int], ...] = ()


@dataclass(frozen=True)
class Decisions:
    """None: not decided yet.

    began           seconds of the budget that were used when sampling began
    spent           seconds of the budget that earlier processes used
    precisions      Linears in two terms or 8 bits, by name
    """

    budget: Budget
    began: float | None = None
    spent: float = 0.0
    precisions: Mapping[str, str] | None = None
    training: Training | None = None

    def save(self, path: Path) -> None:
        """Atomically, as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, _plain(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> "Decisions | None":
        """What `save` wrote; None where nothing is decided. Raises ValueError where the file is damaged."""
        if not path.exists():
            return None
        try:
            return cls._of(read_json(path, dict))
        except (KeyError, TypeError, AttributeError, ValueError):
            raise ValueError(f"{path} is damaged; delete it") from None

    @classmethod
    def _of(cls, values: dict) -> "Decisions":
        budget, training = Budget(**values.pop("budget")), values.pop("training")
        if training is not None:
            plan, blocks = training.pop("plan"), training.pop("blocks")
            plan = Plan(**plan | {"autocast": _dtype(plan["autocast"])})
            if blocks is not None:
                blocks = BlockSettings(**blocks | {"stream": _dtype(blocks["stream"])})
            course = tuple((int(step), float(progress), int(total)) for step, progress, total in training.pop("course"))
            training = Training(plan=plan, blocks=blocks, course=course, **training)
        return cls(budget, training=training, **values)


def _plain(value):
    """With dtypes by name."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)
