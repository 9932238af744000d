"""The block-wise pass: every ternary block learns its teacher's outputs, from inputs that crossed the ternary prefix.

Memory holds one block of the student, one of the teacher, and the tokens between blocks (in main memory), so that codes
of a model far larger than the device can be trained. The idea is that of BRECQ (arXiv 2102.05426) and EfficientQAT
(2407.11062).
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import ranks
from ..files.checkpoint import Checkpoint
from ..files.layer import LayerPlan
from ..files.ternary import TernaryFile, open_ternary, write_ternary
from ..files.work_folder import open_kept
from ..model.flux import Flux, Tokens
from ..model.student import (
    add_low_rank,
    input_power,
    load_block,
    load_stem,
    rate_groups,
    stored_dense,
    stored_layers,
    ternary_linears,
    train_codes,
)
from ..model.teacher import Teacher
from ..model.ternary_linear import TernaryLinear
from ..pictures.pool import Pool
from .course import Course
from .optimizer import Adam, sum_gradients
from .schedule import RATES, learning_rates, schedule


@dataclass(frozen=True)
class BlockSettings:
    steps: int = 100  # of each block
    batch: int = 8
    accumulate: int = 1  # batches of which gradients are summed for one step, by all ranks together
    states: int = 64  # that cross the model together; rounded down to whole batches
    rank: int = 0
    codes: bool = True
    eight_bit: bool = False
    warmup: int = 10
    seed: int = 0
    stream: torch.dtype = torch.float32  # of the tokens between blocks
    rates: Mapping[str, float] = field(default_factory=lambda: dict(RATES))


@dataclass(frozen=True)
class BlockResult:
    """Squared error of a block's outputs relative to what the teacher's block changes, before and after training."""

    name: str
    before: float
    after: float


def block_run(start: TernaryFile, pool: Pool, settings: BlockSettings) -> dict:
    """What tells one block-wise pass from another, as JSON takes it (`work_folder.keep_settings`)."""
    said = asdict(settings) | {"stream": str(settings.stream)}
    return said | {"start": start.fingerprint, "pool": pool.fingerprint}


def train_blocks(
    start: TernaryFile,
    teacher: Teacher,
    pool: Pool,
    *,
    target: str | os.PathLike,
    folder: Path,
    settings: BlockSettings,
    device: torch.device | str = "cpu",
    on_block: Callable[[BlockResult], object] = lambda result: None,
    overwrite: bool = False,
) -> None:
    """Train block after block and write a ternary file; finished blocks are kept in `folder` and not trained again.

    Every rank has all states' tokens, and ranks share the batches of a step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ours = _prepare(load_stem(start, device), pool, settings, device)
    theirs = _prepare(teacher.stem, pool, settings, device)
    parts = []
    for name, dense in teacher.blocks():
        part = folder / f"{name}.safetensors"
        targets = _through(dense, theirs, settings.stream)
        if ranks.agree(not part.exists()):
            block = load_block(start, name, start.architecture, device)
            layers = ternary_linears(block, f"{name}.")
            result = train_block(
                name,
                block,
                layers,
                teacher=teacher.checkpoint,
                inputs=ours,
                before=theirs,
                targets=targets,
                settings=settings,
            )
            on_block(result)
            ranks.once(partial(_write_part, part, name, block, layers, start))
            del block, layers
        parts.append(open_ternary(open_kept(part)))
        ours = _through(load_block(parts[-1], name, start.architecture, device), ours, settings.stream)
        theirs = targets
    ranks.once(lambda: _assemble(target, start, parts, overwrite))


def train_block(
    name: str,
    block: nn.Module,
    layers: Mapping[str, TernaryLinear],
    *,
    teacher: Checkpoint,
    inputs: Sequence[Tokens],
    before: Sequence[Tokens],
    targets: Sequence[Tokens],
    settings: BlockSettings,
) -> BlockResult:
    """Train one student block so that `inputs` give `targets`; `before` are the teacher's tokens ahead of its block."""
    power = {stream: _power(before, targets, stream) for stream in ("img", "txt")}

    def loss(index: int) -> Tensor:
        out, wanted = block(_onto(block, inputs[index])), _onto(block, targets[index])
        return sum((getattr(out, s) - getattr(wanted, s)).square().mean() / power[s] for s in power) / len(power)

    def mean_loss() -> float:
        with torch.no_grad():
            return float(sum(loss(index) for index in range(len(inputs))) / len(inputs))

    first = mean_loss()
    if settings.rank:
        with torch.no_grad(), input_power(layers) as power_of_inputs:
            block(_onto(block, inputs[0]))
        add_low_rank(layers, teacher, settings.rank, power_of_inputs)
    if settings.codes:
        train_codes(layers, teacher)
    parameters = {name: p for name, p in block.named_parameters() if p.requires_grad}
    ranks.spread(p.data for p in parameters.values())
    groups, rates = rate_groups(parameters), learning_rates(block, settings.rates)
    optimizer = Adam(parameters, rates, eight_bit=settings.eight_bit, seed=settings.seed)
    generator, course = torch.Generator().manual_seed(settings.seed), Course([(0, 0.0, settings.steps)])
    for step in range(settings.steps):
        for parameter in parameters.values():
            parameter.grad = None
        indices = torch.randint(len(inputs), (settings.accumulate,), generator=generator).tolist()
        for index in ranks.share(indices):
            (loss(index) / settings.accumulate).backward()
        sum_gradients(parameters.values())
        optimizer.step(schedule(groups, step, course, settings.warmup))
    for parameter in parameters.values():
        parameter.grad = None
    return BlockResult(name, first, mean_loss())


@torch.no_grad()
def _prepare(stem: Flux, pool: Pool, settings: BlockSettings, device) -> list[Tokens]:
    """The tokens before the first block of a model, in main memory."""
    dtype, batches = stem.img_in.weight.dtype, []
    for index in range(max(1, settings.states // settings.batch)):
        inputs = pool.draw(index, settings.batch, settings.seed, device).inputs
        batches.append(stem.prepare(*inputs.to(device, dtype)).to("cpu", settings.stream))
    return batches


@torch.no_grad()
def _through(block: nn.Module, batches: Sequence[Tokens], dtype: torch.dtype) -> list[Tokens]:
    return [block(_onto(block, tokens)).to("cpu", dtype) for tokens in batches]


def _onto(block: nn.Module, tokens: Tokens) -> Tokens:
    """Tokens where a block's parameters are, in their dtype."""
    parameter = next(block.parameters())
    return tokens.to(parameter.device, parameter.dtype)


def _power(before: Sequence[Tokens], after: Sequence[Tokens], stream: str) -> float:
    """Mean square of what the teacher's block adds to a stream."""
    pairs = [(getattr(b, stream).float(), getattr(a, stream).float()) for b, a in zip(before, after, strict=True)]
    return max(float(sum((a - b).square().mean() for b, a in pairs) / len(pairs)), 1e-20)


def _write_part(
    path: Path, name: str, block: nn.Module, layers: Mapping[str, TernaryLinear], start: TernaryFile
) -> None:
    weights = stored_layers(start, layers, f"{name}.")
    parameters = {f"{name}.{leaf}": p for leaf, p in block.named_parameters()}
    dense = {key: t for key, t in stored_dense(start, parameters).items() if key.startswith(f"{name}.")}
    plans = {layer: LayerPlan.of(weight) for layer, weight in weights.items()}
    write_ternary(path, plans, weights.__getitem__, dense, {})


def _assemble(target, start: TernaryFile, parts: Sequence[TernaryFile], overwrite: bool) -> None:
    origin = {name: part for part in parts for name in part.layers}
    plans = {name: replace(part.layers[name], packing=start.layers[name].packing) for name, part in origin.items()}
    dense = {name: start.tensor(name) for name in start.dense}
    dense |= {name: part.tensor(name) for part in parts for name in part.dense}
    write_ternary(target, plans, lambda name: origin[name].weight(name), dense, start.metadata, overwrite=overwrite)
