"""Calibration: ternary codes and scales that do well on the model's own activations, block after block.

Two streams of the same states run through the model: one through the teacher's blocks, one through the blocks that are
ternary already. Each Linear is quantized on the inputs it really gets in the second stream, towards its outputs in the
first. Only one block, its two copies and one pair of second moments are in memory; activations lie in mapped files.

Among several ranks each has its share of the states; the moments of a Linear meet on one of them, which solves it and
hands out packed codes.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...ops import GROUP_SIZE, TernaryWeight
from ...ops.weight import TENSORS
from .. import ranks
from ..files import metadata, precision
from ..files.architecture import Architecture
from ..files.atomic import check_target, write_json
from ..files.checkpoint import Checkpoint
from ..files.container import FormatError, TensorFile, save
from ..files.hashing import hashing
from ..files.layer import LayerPlan
from ..files.precision import int8_tensors
from ..files.ternary import create_ternary
from ..files.work_folder import keep_settings, open_kept
from ..model.flux import Part, linear_of, parts_of
from ..model.teacher import Teacher
from ..pictures.conditioning import Conditioning
from ..pictures.states import States
from . import columns, gptq
from .gptq import LayerFit
from .moments import Moments
from .sensitivity import rounded
from .statistics import InputSums, LayerStatistics, needs_full_precision, watched
from .streams import Streams

_COMPUTED = 64  # values of the hidden size at most for a token of either stream


@dataclass(frozen=True)
class CalibrationSettings:
    """How to quantize. `batch` states run at a time; `rank` > 0 adds low-rank factors to every ternary Linear.

    `exponents` of column scales that are tried for every Linear beside none (see `columns`).
    `freeze_dense`: whether the final Linear, which stays dense, stays as it is too.
    `precisions`: name -> "two-terms" or "int8" of Linears that are not to be ternary (see `mixed`).
    """

    rank: int = 0
    damping: float = gptq.DAMPING
    sweeps: int = gptq.SWEEPS
    batch: int = 8
    packing: str = "planes32"
    precisions: Mapping[str, str] = field(default_factory=dict)
    exponents: tuple[float, ...] = columns.EXPONENTS
    freeze_dense: bool = False


@dataclass(frozen=True)
class BlockFit:
    """One block. `drift`: relative difference (not squared) of image and text tokens to the teacher's after it."""

    layers: dict[str, LayerFit]
    statistics: dict[str, LayerStatistics]
    img_drift: float
    txt_drift: float


def calibrate(
    teacher: Teacher,
    states: Sequence[States],
    conditioning: Conditioning,
    *,
    target: str | os.PathLike,
    folder: str | os.PathLike,
    settings: CalibrationSettings | None = None,
    identity: Mapping[str, object] | None = None,
    overwrite: bool = False,
    on_block: Callable[[str, BlockFit], object] = lambda name, fit: None,
    sha256: str | None = None,
) -> dict[str, BlockFit]:
    """Quantize all block Linears of the teacher and write a ternary file.

    `states` are noisy states of the teacher's pictures (`Trajectories.states`). Finished blocks are kept in the folder
    `folder`, and a run that was interrupted continues with the next one and writes the same file; `identity` tells runs
    apart (ValueError where the folder belongs to another). `on_block` is called after every block. The fits, by block,
    are also written to `fits.json` there. `sha256` of the teacher's file saves reading it once more.
    """
    settings = settings or CalibrationSettings()
    check_target(target, 0, overwrite, teacher.checkpoint.files)
    folder = Path(folder)
    started = keep_settings(folder, asdict(settings) | dict(identity or {}))
    fits: dict[str, BlockFit] = {}

    def write() -> None:
        write_json(folder / "fits.json", {name: asdict(block) for name, block in fits.items()})
        _assemble(
            teacher.checkpoint,
            folder,
            target,
            settings=settings,
            fits=fits,
            final=final,
            started=started,
            overwrite=overwrite,
            sha256=digest(),
        )

    hashed = hashing(teacher.checkpoint.files) if ranks.first() and sha256 is None else nullcontext(lambda: sha256)
    with hashed as digest:
        with torch.inference_mode():
            with Streams(teacher, states, conditioning, folder / "activations", settings.batch) as streams:
                for name, block in teacher.blocks():
                    fits[name] = _calibrate_block(name, block, streams, folder / f"{name}.safetensors", settings)
                    on_block(name, fits[name])
                final = {} if settings.freeze_dense else _refit_final(streams)
        ranks.once(write)
    return fits


def enough_states(arch: Architecture, tokens: int) -> int:
    """States with `tokens` tokens each that give the largest Linear 32 tokens for each of its inputs; at least 256."""
    inputs = max(k for _, k in arch.linear_shapes.values())
    return max(256, -(-32 * inputs // tokens))


def time_solving(arch: Architecture, device: torch.device, clock: Callable[[], float] = time.monotonic) -> float:
    """Seconds of choosing the codes and scales of all Linears, by those of one; they go by the number of inputs."""
    (n, k), _ = Counter(arch.linear_shapes.values()).most_common(1)[0]
    seconds = 0.0
    for _ in range(1 if device.type == "cpu" else 2):  # at first a GPU's kernels are compiled
        weight, moments = torch.randn(n, k, device=device), Moments(n, k, device)
        moments.add(torch.randn(1, 2 * k, k, device=device))
        moments.round()
        started = clock()
        _solve(weight, torch.zeros(n, device=device), moments, CalibrationSettings(), terms=1)
        seconds = clock() - started
    return seconds * sum(inputs for _, inputs in arch.linear_shapes.values()) / k


def calibration_memory(arch: Architecture, tokens: int, width: int) -> int:
    """Bytes at the peak of a block's calibration, `tokens` at a time, with weights of `width` bytes.

    In memory are the block and its copy, the moments of the Linears of a tier (in fp64 until they are complete), and
    what solving one of them takes: five matrices of its inputs and a dozen of its weights, or fewer of the former and
    more of the latter.
    """
    peak = 0
    for block in {name.split(".")[0]: name for name in arch.block_names}.values():
        shapes = arch.block_linears(block)
        held = 2 * width * sum(n * k for n, k in shapes.values()) + _COMPUTED * width * arch.hidden * tokens
        tiers: dict[str, list[tuple[int, int]]] = {}
        for name, shape in shapes.items():
            tiers.setdefault(name.removeprefix("img_").removeprefix("txt_"), []).append(shape)
        for tier in tiers.values():
            collected = sum(16 * k * k + 4 * n * k for n, k in tier)
            n, k = tier[0]
            groups = -(-k // GROUP_SIZE)
            solving = 4 * max(5 * k * k + 6 * n * k, 4 * k * k + 11 * n * k + 5 * n * groups**2)
            others = sum(8 * k * k + 4 * n * k for n, k in tier[1:])
            peak = max(peak, held + max(collected, others + solving))
    return peak


def _calibrate_block(
    name: str, dense: nn.Module, streams: Streams, path: Path, settings: CalibrationSettings
) -> BlockFit:
    student = deepcopy(dense)
    precisions = {
        linear: settings.precisions.get(f"{name}.{linear}", "ternary")
        for linear in streams.teacher.arch.block_linears(name)
    }
    for linear, chosen in precisions.items():
        if chosen == "int8":
            weight = linear_of(student, linear).weight
            weight.copy_(rounded(weight, chosen))
    kept = ranks.agree(path.exists())
    results: dict[str, gptq.Solution] = _load_block(path, student) if kept else {}
    sums: dict[str, InputSums] = {}
    parts = parts_of(dense)
    for part in parts:
        if not kept:
            last = name == streams.teacher.arch.block_names[-1] and part == parts[-1]
            results |= _solve_part(part, dense, student, streams, settings, precisions, last)
            if part == parts[-1] and ranks.first():
                _save_block(path, results)
        here = [linear for tier in part.tiers for linear in tier.linears if linear in results]
        with watched(student, {linear: results[linear].weight for linear in here}) as watching:
            img_drift, txt_drift = streams.advance(dense, student, part)
        sums |= watching
    ranks.add_up([tensor for collected in sums.values() for tensor in collected.tensors])
    layers = {linear: solution.fit for linear, solution in results.items()}
    statistics = {
        linear: collected.of(linear_of(dense, linear).weight, results[linear].weight)
        for linear, collected in sums.items()
    }
    return BlockFit(layers, statistics, img_drift, txt_drift)


def _solve_part(
    part: Part,
    dense: nn.Module,
    student: nn.Module,
    streams: Streams,
    settings: CalibrationSettings,
    precisions: Mapping[str, str],
    last: bool,
) -> dict[str, gptq.Solution]:
    """Ternary weights of the Linears in a part of a block, tier after tier; the student has them from then on."""
    results: dict[str, gptq.Solution] = {}
    for tier in part.tiers:
        linears = tuple(linear for linear in tier.linears if precisions[linear] != "int8")
        if not linears:
            continue
        owners = {linear: number % ranks.world() for number, linear in enumerate(linears)}  # all of one size
        collected = streams.moments(dense, student, part, replace(tier, linears=linears), last)
        for linear, owner in owners.items():
            collected[linear].collect(owner)
        solved = {}
        for linear, owner in owners.items():
            moments = collected.pop(linear)
            if owner == ranks.rank():
                module, terms = linear_of(student, linear), 2 if precisions[linear] == "two-terms" else 1
                solved[linear] = _solve(module.weight, module.bias, moments, settings, terms)
            del moments
        for linear, owner in owners.items():
            module = linear_of(student, linear)
            results[linear] = _hand_out(solved.get(linear), owner, module)
            _apply(module, results[linear].weight, results[linear].bias)
    return results


def _refit_final(streams: Streams) -> dict[str, Tensor]:
    """The final Linear as the blocks' errors want it, by name: what they have in common is made up for there."""
    moments = streams.last_moments()
    moments.collect(0)
    if not ranks.first():
        return {}
    linear = streams.teacher.stem.final_layer.linear
    weight, bias = gptq.refit(linear.weight, linear.bias, moments)
    parts = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    return {f"final_layer.linear.{part}": tensor.bfloat16() for part, tensor in parts.items()}


def _solve(
    weight: Tensor, bias: Tensor | None, moments: Moments, settings: CalibrationSettings, terms: int
) -> gptq.Solution:
    """With the column scales that seem to leave the smallest error of the outputs, or none."""
    error = partial(gptq.rough_error, centred=bias is not None)
    weight = weight.to(moments.second)
    column, exponent = columns.choose(weight, moments, error, settings.exponents)
    rank = settings.rank if terms == 1 else 0
    solution = gptq.solve(
        weight, bias, moments, rank=rank, damping=settings.damping, sweeps=settings.sweeps, terms=terms, column=column
    )
    return replace(solution, fit=replace(solution.fit, exponent=exponent))


def _described(block: BlockFit, linear: str) -> dict[str, float | None]:
    """What a file says about one Linear."""
    fit = block.layers[linear]
    error = {"output_error": fit.output_error, "effective_rank": fit.effective_rank, "column_exponent": fit.exponent}
    return asdict(block.statistics[linear]) | error


def _hand_out(solution: gptq.Solution | None, owner: int, linear: nn.Linear) -> gptq.Solution:
    """What the owner has solved, on every rank: packed codes, scales and the bias."""
    if ranks.world() == 1:
        return solution
    tensors = fit = None
    if solution is not None:
        tensors = solution.weight.tensors | ({} if solution.bias is None else {"bias": solution.bias})
        fit = solution.fit
    parts: dict[str, Any] = dict(ranks.hand_out(tensors, owner, linear.weight.device))
    fit = ranks.agree(fit, owner)
    bias = parts.pop("bias", None)
    return gptq.Solution(TernaryWeight(shape=(linear.out_features, linear.in_features), **parts), bias, fit)


def _apply(linear: nn.Module, weight: TernaryWeight, bias: Tensor | None) -> None:
    """Give a dense Linear the values it will have as a ternary one."""
    linear.weight.copy_(weight.dequantize(torch.float32))
    if bias is not None:
        linear.bias.copy_(bias.bfloat16())


def _save_block(path: Path, results: Mapping[str, gptq.Solution]) -> None:
    tensors = {}
    for linear, solution in results.items():
        tensors |= {f"{linear}.{part}": tensor for part, tensor in solution.weight.tensors.items()}
        if solution.bias is not None:
            tensors[f"{linear}.bias"] = solution.bias.bfloat16()
    fits = json.dumps({linear: asdict(solution.fit) for linear, solution in results.items()})
    save(path, tensors, {"fits": fits}, overwrite=True)


def _load_block(path: Path, student: nn.Module) -> dict[str, gptq.Solution]:
    file = open_kept(path)
    try:
        fits = {linear: LayerFit(**fit) for linear, fit in json.loads(file.header.metadata["fits"]).items()}
    except (KeyError, TypeError):
        raise FormatError(path, "another version of this pack wrote it; delete the work folder") from None
    results = {}
    for linear, fit in fits.items():
        module = linear_of(student, linear)
        weight, bias = _read_layer(file, linear, (module.out_features, module.in_features))
        results[linear] = gptq.Solution(weight.to(module.weight.device), bias, fit)
        _apply(module, results[linear].weight, bias)
    return results


def _read_layer(file: TensorFile, linear: str, shape: tuple[int, int]) -> tuple[TernaryWeight, Tensor | None]:
    parts: dict[str, Any] = {part: file.tensor(key) for part in TENSORS if (key := f"{linear}.{part}") in file.entries}
    bias = file.tensor(f"{linear}.bias") if f"{linear}.bias" in file.entries else None
    return TernaryWeight(shape=shape, **parts), bias


def _assemble(
    checkpoint: Checkpoint,
    folder: Path,
    target: str | os.PathLike,
    *,
    settings: CalibrationSettings,
    fits: dict[str, BlockFit],
    final: Mapping[str, Tensor],
    started: str,
    sha256: str,
    overwrite: bool = False,
) -> None:
    """Put the finished blocks, the `final` Linear and the checkpoint's other tensors (as bf16) into a ternary file."""
    arch = checkpoint.architecture
    given = {**int8_tensors(checkpoint, settings.precisions), **final}
    files = {block: open_kept(folder / f"{block}.safetensors") for block in arch.block_names}

    def read(block: str, linear: str) -> tuple[TernaryWeight, Tensor | None]:
        weight, bias = _read_layer(files[block], linear, arch.block_linears(block)[linear])
        noise, error = fits[block].statistics[linear].int8_noise, fits[block].layers[linear].output_error
        return replace(weight, full_precision=needs_full_precision(noise, error)), bias

    layers = [(block, linear) for block in arch.block_names for linear in fits[block].layers]
    plan = {f"{block}.{linear}": LayerPlan.of(read(block, linear)[0], settings.packing) for block, linear in layers}
    weights = {f"{name}.weight" for name in arch.linears}
    dense = {name: (torch.bfloat16, checkpoint.shape(name)) for name in checkpoint.names if name not in weights}
    dense |= {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in given.items()}
    errors = {f"{block}.{name}": r.weight_error for block, b in fits.items() for name, r in b.layers.items()}
    shown = {"packing": settings.packing, "rank": settings.rank, "damping": settings.damping}
    source, lossy = Path(checkpoint.name), checkpoint.lossy
    header = metadata.build(
        arch, source, checkpoint.metadata, method="calibrate", settings=shown, errors=errors, sha256=sha256, lossy=lossy
    )
    header |= precision.metadata(settings.precisions)
    header |= metadata.statistics({f"{block}.{name}": _described(fits[block], name) for block, name in layers})
    header["modelspec.date"] = started  # the same after an interruption
    with create_ternary(target, plan, dense, header, overwrite=overwrite) as writer:
        for block, linear in layers:
            weight, bias = read(block, linear)
            writer.layer(f"{block}.{linear}", weight)
            if bias is not None:
                writer.dense(f"{block}.{linear}.bias", bias)
                del dense[f"{block}.{linear}.bias"]
        for name in dense:
            tensor = given.get(name)
            writer.dense(name, checkpoint.tensor(name).bfloat16() if tensor is None else tensor)
        checkpoint.check_unchanged()
