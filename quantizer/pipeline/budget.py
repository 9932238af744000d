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
_SMALL_MODEL = 100e6  # weights
BLOCKWISE = 0.4  # of the training time, where the codes cannot be trained all at once
STATES_EACH = 12  # states of each picture; the teacher's velocities are known already at half of them
MAX_PICTURES = 4096


@dataclass(frozen=True)
class Budget:
    """How much of everything the time pays for."""

    pictures: int
    states: int
    held_out: int  # pictures
    calibration_states: int = 0


def default_minutes(weights: int) -> float:
    """15 minutes for models that train on a CPU, 4 hours for real ones."""
    return 15 if weights < _SMALL_MODEL else 240


def budget_for(seconds: float, state_seconds: float, steps: int, *, prompts: int, enough: int, capacity: int) -> Budget:
    """What so many seconds pay for.

    `state_seconds`: of a teacher forward of one state; `steps` of its sampler; `enough` states for calibration;
    `capacity`: states that main memory holds.
    """

    def affordable(share: float, each: float, least: int, most: int) -> int:
        return int(min(most, max(least, share * seconds / each)))

    most = max(16, min(MAX_PICTURES, capacity // STATES_EACH))
    pictures = affordable(_PICTURES, state_seconds * (steps + STATES_EACH / 2), 16, most)
    held_out = max(2, min(32, pictures // 8, max(1, prompts // 10)))
    # Calibration runs the block's Linears about eight times for each state.
    calibration = affordable(_CALIBRATION, 16 * state_seconds, 32, enough)
    return Budget(pictures, STATES_EACH * pictures, held_out, calibration)


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
    available = 0.85 * free
    recompute = 24 * weights + all_blocks + kept > available
    activations = one_block if recompute else all_blocks
    codes = 12 * weights + activations < available
    eight_bit = 24 * weights + activations > available
    packed = not codes and weights * 1.3 + activations > available
    used = (24 if not eight_bit else 12 if codes else 0.6 if packed else 1.3) * weights + activations - kept
    fitting = max(1, int((available - used) // max(kept, 1)))
    wanted = max(1, min(64, 1024 // tokens))
    autocast = torch.bfloat16 if device.type == "cuda" else None
    return Plan(codes, packed, recompute, eight_bit, min(wanted, fitting), autocast)


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
