"""What fits: training into a device's memory, and pictures, states and calibration into the minutes."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ..distillation.distill import DistillSettings
from ..files.architecture import Architecture
from ..model.teacher import free_memory

if TYPE_CHECKING:
    from .workspace import Workspace

_PICTURES, _CALIBRATION, CHOICE = 0.2, 0.2, 0.1  # shares of the budget; pictures with their states
LEAST_PICTURES = 16
_SMALL_MODEL = 100e6  # weights
BLOCKWISE = 0.4  # of the training time, where the codes cannot be trained all at once
STATES_EACH = 12  # states of each picture; the teacher's velocities are known already at half of them
MAX_PICTURES = 4096


@dataclass(frozen=True)
class Budget:
    """How much of everything the time pays for; None: not decided yet."""

    pictures: int | None
    states: int | None
    held_out: int  # pictures
    calibration_states: int | None = None


def default_minutes(weights: int) -> float:
    """15 minutes for models that train on a CPU, 4 hours for real ones."""
    return 15 if weights < _SMALL_MODEL else 240


def sampling_seconds(seconds: float, steps: int) -> float:
    """The part of a budget for pictures of so many sampler steps; velocities of their states take more beside it."""
    return _PICTURES * seconds * steps / (steps + STATES_EACH / 2)


def most_pictures(capacity: int) -> int:
    """`capacity`: states that main memory holds."""
    return max(LEAST_PICTURES, min(MAX_PICTURES, capacity // STATES_EACH))


def held_out_pictures(pictures: int, prompts: int) -> int:
    """How many to measure on, beside about so many to learn from."""
    return max(2, min(32, pictures // 8, max(1, prompts // 10)))


def calibration_forwards(device: str) -> int:
    """Forwards that calibration costs for each state: parts of blocks run again, and moments are summed in fp32.

    Measured before the original went through each block only once. On a CPU 5 on the miniature and 9 with 512 channels
    at 256 pixels; on an H200, where forwards are in bf16, 83 at FLUX.1's width and 1024 pixels (docs/kernels.md).
    """
    return 8 if device == "cpu" else 80


def calibration_states(seconds: float, left: float, each: float, enough: int, solving: float) -> int:
    """States to calibrate on, of a budget of which so many seconds are left.

    `each`: seconds of calibrating on one more. `solving`: seconds that choosing codes and scales takes, however many
    states there are. States get what is left of calibration's share, and at least half of that time: few states spoil
    what takes long.
    """
    share = min(_CALIBRATION * seconds, left / 2)
    return int(min(enough, max(32, max(share - solving, solving / 2) / each)))


@dataclass(frozen=True)
class Plan:
    """How to train a model on a device.

    codes            the whole model's codes can be trained at once; otherwise block by block only
    packed           frozen codes lie in memory with 2 bits, not 8
    recompute        every block is computed again in the backward pass
    eight_bit        optimizer states take 8 bits
    batch            states at a time
    """

    codes: bool
    packed: bool
    recompute: bool
    eight_bit: bool
    batch: int
    autocast: torch.dtype | None


# How to train, from what is fastest to what takes least: codes, packed, recompute, eight_bit.
_WAYS = [
    (True, False, False, False),
    (True, False, True, False),
    (True, False, True, True),
    (False, False, False, False),
    (False, False, True, False),
    (False, False, True, True),
    (False, True, True, True),
]
_USED = 0.85  # of the free memory
_EVALUATING, _LEAST_BETWEEN = 0.05, 20  # part of the forwards of training that evaluations may take; steps
# Of a training step. In 40 CPU seconds more and smaller steps led the miniature further: 16 states with 24 tokens to a
# velocity error of 0.053, 42 to 0.061; in 150 seconds it was 0.0335 to 0.0356.
_STEP_TOKENS = 400


def plan(arch: Architecture, tokens: int, free: int, device: torch.device) -> Plan:
    """The best way that fits `free` bytes, with `tokens` (text and image) for each state; the last one where none does.

    See `training_memory`.
    """
    wanted = max(1, min(64, _STEP_TOKENS // tokens))
    autocast = torch.bfloat16 if device.type == "cuda" else None
    for way in _WAYS:
        chosen = Plan(*way, batch=1, autocast=autocast)
        if training_memory(arch, tokens, chosen) <= _USED * free:
            break
    for batch in range(2, wanted + 1):
        larger = replace(chosen, batch=batch)
        if training_memory(arch, tokens, larger) > _USED * free:
            break
        chosen = larger
    return chosen


def training_memory(arch: Architecture, tokens: int, way: Plan) -> int:
    """Bytes at the peak of a training step (the best parameters so far lie in main memory).

    A trained value has the value itself, its average, two moments and a gradient, all in fp32; moments can take 8 bits
    and codes bf16. Then a frozen code takes 1 byte or 1/4, and a scale has its starting value too. Every block keeps
    its weights for the backward pass as they were multiplied, and some 40 values of the hidden size for each token.
    """
    width = 4 if way.autocast is None else way.autocast.itemsize
    blocks = [sum(n * k for n, k in arch.block_linears(block).values()) for block in arch.block_names]
    codes, scales = sum(blocks), sum(n * -(-k // 128) for n, k in arch.linear_shapes.values())
    others = sum(torch.Size(shape).numel() for shape in arch.shapes.values()) - codes
    moments = 2.1 if way.eight_bit else 8.0
    trained = (others + scales) * (12 + moments) + 4 * scales
    if way.codes:
        trained += codes * (3 * (2 if way.eight_bit else 4) + moments)
    else:
        trained += codes * (0.25 if way.packed else 1)
    token = way.batch * tokens * arch.hidden * width
    weights = width + (1 if way.packed else 0)
    if way.recompute:
        computed = token * len(blocks) + weights * max(blocks)
    else:
        computed = 40 * token * len(blocks) + weights * codes
    return int(trained + computed + 56 * token + 4 * max(n * k for n, k in arch.linear_shapes.values()))


def steps_between_evaluations(held_out: int, batch: int) -> int:
    """Of training on so many states at a time, so that measuring on so many held-out ones takes a small part of it.

    A step costs about four forwards of each of its states, an evaluation two of each held-out one.
    """
    return max(_LEAST_BETWEEN, round(2 * held_out / (_EVALUATING * 4 * batch)))


def settings_for(arch_plan: Plan, **changes) -> DistillSettings:
    """Distillation settings that follow a device's plan."""
    base = DistillSettings(
        batch=arch_plan.batch,
        recompute=arch_plan.recompute,
        eight_bit=arch_plan.eight_bit,
        autocast=arch_plan.autocast,
    )
    return replace(base, **changes)


def plan_for(work: "Workspace") -> Plan:
    """The plan for what the device has free now."""
    return plan(work.arch, work.tokens, free_memory(work.device), work.device)
