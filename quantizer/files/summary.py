"""What a file is, in words and numbers."""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from .architecture import Architecture
from .atomic import in_bytes
from .checkpoint import Checkpoint, open_checkpoint
from .identity import identify
from .layer import INT8, LayerPlan
from .metadata import stated
from .sources.source import Source, open_source
from .ternary import TernaryFile, open_ternary

_SCALES = {"integer": "row x integer group", "row": "row"}


@dataclass(frozen=True)
class Sizes:
    """Sizes of a ternary file. Bytes are of the tensors, without the header."""

    ternary_weights: int
    ternary_bytes: int  # trits, scales and low-rank parts
    int8_weights: int  # of the 8-bit Linears, which count among the dense ones too
    int8_bytes: int
    dense_weights: int  # everything else: biases, norms, dense and 8-bit Linears
    dense_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Of the ternary Linears, with scales, multipliers and low-rank factors."""
        return self.ternary_bytes * 8 / max(self.ternary_weights, 1)

    @property
    def bits_per_quantized_weight(self) -> float:
        """Of the ternary and 8-bit Linears."""
        size, weights = self.ternary_bytes + self.int8_bytes, self.ternary_weights + self.int8_weights
        return size * 8 / max(weights, 1)

    @property
    def bytes(self) -> int:
        return self.ternary_bytes + self.dense_bytes

    @property
    def bf16_bytes(self) -> int:
        """Of the same model in bf16."""
        return 2 * (self.ternary_weights + self.dense_weights)

    @property
    def ratio(self) -> float:
        return self.bf16_bytes / self.bytes


def sizes(file: TernaryFile) -> Sizes:
    beside = {f"{name}.{part}" for name in file.int8 for part in ("weight_scale", "comfy_quant")}
    dense = {name: file.file.entries[key] for name, key in file.dense.items()}
    eight_bit = [file.shapes[f"{name}.weight"] for name in file.int8]
    return Sizes(
        ternary_weights=sum(math.prod(layer.shape) for layer in file.layers.values()),
        ternary_bytes=sum(layer.nbytes for layer in file.layers.values()),
        int8_weights=sum(n * k for n, k in eight_bit),
        int8_bytes=sum(n * (k + 4) for n, k in eight_bit),
        dense_weights=sum(math.prod(entry.shape) for name, entry in dense.items() if name not in beside),
        dense_bytes=sum(entry.nbytes for entry in dense.values()),
    )


def summarize(
    path: str | os.PathLike, layers: bool = False, on_progress: Callable[[int, int], object] = lambda done, total: None
) -> list[str]:
    """Lines that say what a file or a folder is; `layers` adds one for every Linear.

    Every value of a model is looked at; `on_progress` gets the bytes read so far and those of all files. Raises
    FormatError for a damaged file, OSError.
    """
    source = open_source(path)
    identity = identify(source)
    lines = [f"{source.path}: {identity.sentence}"]
    if identity.kind == "ternary":
        lines += _ternary(open_ternary(source), layers)
    elif identity.kind == "dense":
        checkpoint = open_checkpoint(source)
        done = 0
        for piece in checkpoint.pieces():
            if piece.name:
                piece.check()
            done += len(piece.data)
            on_progress(done, source.size)
        lines += _dense(checkpoint, layers)
    else:
        lines += _tensors(source)
    return lines


def _ternary(file: TernaryFile, layers: bool) -> Iterator[str]:
    size = sizes(file)
    plans = file.layers.values()
    packings = ", ".join(sorted({plan.packing for plan in plans}))
    scales = ", ".join(sorted({_SCALES.get(plan.scales, f"{plan.scales} group") for plan in plans}))
    ranks = sorted({plan.rank for plan in plans} - {0})
    rank = f", low rank {', '.join(map(str, ranks))}" if ranks else ""
    yield _row("checked", "ternary_v1; every key, code and scale is valid, and every value is finite")
    yield _architecture(file.architecture)
    linears = f"{len(file.layers)} Linears, {size.ternary_weights / 1e6:,.1f} M weights"
    yield _row("ternary", f"{linears}, {size.bits_per_weight:.3f} bits per weight ({packings}; scales {scales}{rank})")
    if double := [plan.shape for plan in plans if plan.terms == 2]:
        count = sum(map(math.prod, double)) / 1e6
        yield _row("two terms", f"{len(double)} of these are Linears of two ternary terms, {count:,.1f} M weights")
    if scaled := sum(bool(plan.columns) for plan in plans):
        yield _row("column scales", f"{scaled} of these have a scale for each input")
    if full := sum(plan.full_precision for plan in plans):
        yield _row(
            "activations", f"{full} of these lose too much with 8 bits, and get full precision unless told not to"
        )
    dtypes = _dtypes(file.file.entries[key].dtype for key in file.dense.values())
    yield _row("dense", f"{len(file.dense)} tensors, {size.dense_weights / 1e6:,.1f} M weights ({dtypes})")
    yield from _ignored(file.ignored)
    if file.int8:
        count = size.int8_weights / 1e6
        yield _row("8 bits", f"{len(file.int8)} of these are Linears in {INT8}, {count:,.1f} M weights")
    yield _row("size", f"{in_bytes(size.bytes)}, in bf16 {in_bytes(size.bf16_bytes)}: {size.ratio:.2f} times smaller")
    errors = stated_errors(file.metadata)
    if errors:
        worst = max(errors, key=errors.get)
        mean = sum(errors.values()) / len(errors)
        yield _row("weight error", f"mean {mean:.4f}, largest {errors[worst]:.4f} in {worst}")
    known = file.file.header.checksums is not None
    yield _row("checksums", "of every tensor; `verify` compares them" if known else "none: `verify` cannot tell damage")
    labels = ("made by", "method", "settings", "source", "sha256")
    for key, label in zip(("quantizer", "method", "settings", "source", "source_sha256"), labels, strict=True):
        if value := file.metadata.get(f"ternary.{key}"):
            yield _row(label, value)
    if layers:
        yield ""
        for name, plan in file.layers.items():
            yield _layer(name, plan, errors.get(name))


def _layer(name: str, plan: LayerPlan, error: float | None) -> str:
    n, k = plan.shape
    shown = "" if error is None else f"  error {error:.4f}"
    terms = "" if plan.terms == 1 else f" in {plan.terms} terms"
    columns = ", column scales" if plan.columns else ""
    columns += ", full activations" if plan.full_precision else ""
    return f"  {name:<40} {n:>6} x {k:<6} {plan.nbytes * 8 / (n * k):.3f} bits{terms}{columns}{shown}"


def stated_errors(metadata: Mapping[str, str]) -> dict[str, float]:
    """Relative error of each layer's weight, as a ternary file's metadata has it; {} where it says nothing."""
    try:
        return {name: float(error) for name, error in stated(metadata, "ternary.weight_errors").items()}
    except (ValueError, TypeError, OverflowError):
        return {}


def _dense(checkpoint: Checkpoint, layers: bool) -> Iterator[str]:
    arch, source = checkpoint.architecture, checkpoint.source
    plans = {name: LayerPlan(shape, columns="bf16") for name, shape in arch.linear_shapes.items()}
    weights = sum(math.prod(shape) for shape in arch.shapes.values())
    ternary = sum(math.prod(plan.shape) for plan in plans.values())
    yield _row("checked", "every parameter is there, and every value is finite")
    yield _architecture(arch)
    linears = f"{ternary / 1e6:,.1f} M of them in the {len(plans)} Linears of the blocks"
    yield _row("weights", f"{weights / 1e6:,.1f} M, {linears}")
    if checkpoint.lossy:
        yield _row("rounded to", f"{checkpoint.lossy}; what that lost, a ternary file of it cannot have")
    files = f", {len(source.files)} files" if len(source.files) > 1 else ""
    yield _row("size", f"{in_bytes(source.size)} ({_dtypes(entry.dtype for entry in source.entries.values())}{files})")
    yield from _ignored(checkpoint.identity.ignored)
    after = sum(plan.nbytes for plan in plans.values()) + 2 * (weights - ternary)
    yield _row("as ternary", f"{in_bytes(after)}, {2 * weights / after:.2f} times smaller than bf16")
    if layers:
        yield ""
        for name, (n, k) in arch.linear_shapes.items():
            yield f"  {name:<40} {n:>6} x {k}"


def _ignored(count: int) -> Iterator[str]:
    if count:
        yield _row("left out", f"{count} other tensors, which are not the transformer's")


def _tensors(source: Source) -> Iterator[str]:
    yield _row("tensors", f"{len(source.entries)} ({_dtypes(entry.dtype for entry in source.entries.values())})")
    yield _row("size", in_bytes(source.size))
    yield _row("first keys", ", ".join(f"{key:.80}" for key in list(source.entries)[:3]))


def _architecture(arch: Architecture) -> str:
    blocks = f"{arch.depth} double and {arch.depth_single} single blocks, hidden size {arch.hidden}"
    return _row("base model", f"{arch.name}: {blocks}")


def _dtypes(names: Iterator[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in Counter(names).most_common())


def _row(label: str, value: str) -> str:
    return f"  {label:<13} {value}"
