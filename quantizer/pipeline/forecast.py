"""What `convert` would do on a machine, computed from sizes alone: stages, amounts, memory, bytes that are read, hours.

The same formulas decide in a real run (`budget`, `model.teacher`, `calibration`); here a described machine takes the
place of the clock. Times are those of products: a forward reaches 0.7 of the speed of a large product, as FLUX.1 [dev]
at 1024 pixels does on an H200 (docs/kernels.md), and calibration takes 0.22 ms for each input of a Linear beside its
states, as it does there at FLUX.1's width (benchmarks/results/stages-NVIDIA-H200.json).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..calibration.calibrate import calibration_memory, enough_states
from ..files.architecture import Architecture
from ..model.teacher import free_memory, place, streaming_memory
from ..pictures.sampler import latent_shape
from .budget import (
    LEAST_PICTURES,
    STATES_EACH,
    Plan,
    calibration_forwards,
    calibration_states,
    held_out_pictures,
    most_pictures,
    plan,
    sampling_seconds,
    training_memory,
)

_FORWARD = 0.7  # of the speed of a large product
_SOLVING = 0.22e-3  # seconds for each input of each Linear
_ROUNDING = 30e6  # weights in a second on two cores (docs/convert.md)
_TRAINING = 4  # forwards that a trained state costs
_CAPACITY = 1 << 18  # states that main memory holds
_KEPT = 8  # states and velocities that are kept of the path to a picture


@dataclass(frozen=True)
class Machine:
    """memory: free bytes of its device; speed: operations a second of a large product there; disk: bytes a second."""

    kind: str
    memory: int
    speed: float
    disk: float = 2e9


@dataclass(frozen=True)
class PlannedStage:
    """What a stage would do, with the bytes of device memory at its peak, and those of the original that it reads."""

    name: str
    amount: str
    memory: int
    read: float
    seconds: float


@dataclass(frozen=True)
class Forecast:
    stages: tuple[PlannedStage, ...]
    resident: bool  # the original is held in the device's memory
    passes: float  # over the blocks of the original for each state that it answers
    work: float  # bytes of the work folder
    way: Plan  # of training

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def memory(self) -> int:
        return max(stage.memory for stage in self.stages)


def this_machine(device: torch.device) -> Machine:
    """The device's free memory, and the speed of a large product there, timed for a second."""
    dtype, size = (torch.float32, 1024) if device.type == "cpu" else (torch.bfloat16, 8192)
    a = torch.randn(size, size, device=device, dtype=dtype)
    count, began = 0, time.monotonic()
    while (seconds := time.monotonic() - began) < 1 or not count:
        (a @ a)[0, 0].item()
        count += 1
    return Machine(device.type, free_memory(device), 2 * size**3 * count / seconds)


def forward_operations(arch: Architecture, text: int, image: int) -> float:
    """Additions and multiplications of a forward of one state; modulations see one token."""
    total = 0.0
    for block in arch.block_names:
        for name, (n, k) in arch.block_linears(block).items():
            seen = text if name.startswith("txt_") else image if name.startswith("img_") else text + image
            total += 2 * n * k * (1 if "mod" in name.split(".")[0] else seen)
        total += 4 * (text + image) ** 2 * arch.hidden
    return total


def forecast(
    arch: Architecture,
    machine: Machine,
    *,
    text: int,
    sizes: Sequence[tuple[int, int]],
    steps: int,
    prompts: int,
    seconds: float,
) -> Forecast:
    """What a budget of so many seconds would pay for. `text` tokens, pictures of `sizes`, `steps` of the sampler."""
    shapes = [latent_shape(arch, size) for size in sizes]
    images = [height * width // arch.patch_size**2 for _, height, width in shapes]
    tokens, width = text + max(images), 4 if machine.kind == "cpu" else 2
    operations = sum(forward_operations(arch, text, image) for image in images) / len(images)
    compute = operations / (_FORWARD * machine.speed)
    blocks = width * sum(n * k for n, k in arch.linear_shapes.values())
    placement = place(arch, machine.memory, machine.kind, width, tokens)
    batch = max(1, min(64, 4096 // tokens))
    together = batch * placement.together(batch, tokens)
    passes = 0.0 if placement.resident else 1 / together
    each = max(compute, passes * blocks / machine.disk)
    sampled = streaming_memory(arch, width, batch * tokens, 0 if placement.resident else placement.tokens)
    sampled += blocks if placement.resident else 0

    rounding = sum(n * k for n, k in arch.linear_shapes.values()) / _ROUNDING
    stages = [PlannedStage("round", f"{len(arch.linears)} Linears", 0, blocks, rounding)]
    pictures = int(sampling_seconds(seconds, steps) / (steps * each))
    pictures = max(LEAST_PICTURES, min(most_pictures(_CAPACITY), pictures))
    held_out = held_out_pictures(pictures, prompts)

    def answered(name: str, amount: str, states: float) -> PlannedStage:
        return PlannedStage(name, amount, sampled, states * passes * blocks, states * each)

    stages += [
        answered("hold out", f"{held_out} pictures", held_out * (steps + STATES_EACH)),
        answered("sample", f"{pictures} pictures of {steps} steps", pictures * steps),
        answered("label", f"{STATES_EACH * pictures} states", pictures * STATES_EACH / 2),
    ]
    left = seconds - sum(stage.seconds for stage in stages)
    solving, forwards = _SOLVING * sum(k for _, k in arch.linear_shapes.values()), calibration_forwards(machine.kind)
    states = calibration_states(seconds, left, forwards * each, enough_states(arch, tokens), solving)
    calibrating = PlannedStage(
        "calibrate",
        f"{states} states",
        calibration_memory(arch, batch * tokens, width),
        blocks,
        forwards * states * compute + solving,
    )
    stages.append(calibrating)

    way = plan(arch, tokens, machine.memory, torch.device(machine.kind))
    step = way.batch * (_TRAINING + way.recompute) * compute
    left = max(0.05 * seconds, 0.98 * seconds - sum(stage.seconds for stage in stages))
    what = "codes and scales" if way.codes else "scales"
    amount = f"{int(left / step)} steps of {way.batch} states, {what}"
    stages.append(PlannedStage("distill", amount, training_memory(arch, tokens, way), 0, left))
    latent = arch.out_channels * sum(height * width for _, height, width in shapes) / len(shapes)
    activations = 2 * width * states * (text + sum(images) / len(images)) * arch.hidden
    codes = sum(n * k for n, k in arch.linear_shapes.values())
    others = sum(torch.Size(shape).numel() for shape in arch.shapes.values()) - codes
    # Of a picture the latent in fp32, what is kept of its path in fp16, and velocities; then what a stage keeps: tokens
    # of both models, or a snapshot of what is trained; and three ternary files.
    kept = pictures * latent * (4 + 2 * 2 * _KEPT + 4 * STATES_EACH / 2)
    work = kept + max(activations, 20 * others) + codes
    return Forecast(tuple(stages), placement.resident, passes, work, way)


def described(found: Forecast, machine: Machine) -> list[str]:
    """The forecast as lines for people."""
    device = "the device" if machine.kind == "cuda" else "main memory"
    speed = f"{machine.speed / 1e12:.3g} TFLOP/s on {machine.kind}"
    lines = [
        f"computed for {machine.memory / 1e9:.0f} GB of free memory and {speed}:",
        f"{'stage':<10} {'what':<44} {'memory':>9} {'read':>9} {'hours':>7}",
    ]
    for stage in found.stages:
        memory = f"{stage.memory / 1e9:.1f} GB" if stage.memory else "1 GB"
        read = f"{stage.read / 1e9:.0f} GB"
        lines.append(f"{stage.name:<10} {stage.amount:<44} {memory:>9} {read:>9} {stage.seconds / 3600:7.2f}")
    if found.resident:
        lines.append(f"the original is held in {device}")
    else:
        lines.append(f"the original does not fit {device}: its blocks are read once for {1 / found.passes:.0f} states")
    if found.memory > machine.memory:
        lines.append("this does not fit: smaller pictures (--size) need less")
    if not found.way.codes:
        lines.append("codes cannot be trained all at once here: block by block first, where the time allows it")
    return lines
