"""Round a whole checkpoint: one pass over the source file, in pieces, with bounded memory."""

import hashlib
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..files import metadata
from ..files.atomic import check_target
from ..files.checkpoint import Checkpoint, Piece, open_checkpoint
from ..files.container import FormatError
from ..files.layer import LayerPlan
from ..files.sources.encodings import NOT_FINITE, check_finite
from ..files.ternary import TernaryWriter, create_ternary
from ..interrupts import held_back
from ..threads import single_threaded_pool
from .columns import column_scales
from .one_term import Matrix, Rows, round_rows

_IN_FLIGHT = 8  # pieces of 4 MB that are read ahead of the rounding


@dataclass(frozen=True)
class Summary:
    base_model: str
    source: str  # its name
    lossy: str  # what the source's weights were rounded to before, "" for nothing
    ignored: int  # tensors of the source that are not the model's
    errors: dict[str, float]  # ternary Linear -> relative error of its weight
    weights: int  # in the ternary Linears
    source_bytes: int
    target_bytes: int
    seconds: float

    @property
    def mean_error(self) -> float:
        return sum(self.errors.values()) / len(self.errors)


def round_checkpoint(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    packing: str = "planes32",
    method: str = "least-squares",
    overwrite: bool = False,
    on_progress: Callable[[int], object] = lambda weights: None,
) -> Summary:
    """Round every block Linear of a dense FLUX and write a ternary file; the other parameters become bf16.

    Least squares round with column scales that give the columns of each weight equal norms.
    `on_progress` is called with the number of weights done since the last call. Raises FormatError for an unsuitable
    source, OSError for an unwritable target, ValueError where both are the same file; nothing is left behind then, nor
    after KeyboardInterrupt.
    """
    started = time.monotonic()
    checkpoint = open_checkpoint(source)
    check_target(target, 0, overwrite, checkpoint.files)
    arch = checkpoint.architecture
    columns = "bf16" if method == "least-squares" else ""
    layers = {name: LayerPlan(shape, packing, columns=columns) for name, shape in arch.linear_shapes.items()}
    names = {f"{layer}.weight" for layer in layers}
    dense = {name: (torch.bfloat16, checkpoint.shape(name)) for name in checkpoint.names if name not in names}

    def header(errors: dict[str, float], **sha256: str) -> dict[str, str]:
        settings = {"packing": packing}
        name, lossy = Path(checkpoint.name), checkpoint.lossy
        return metadata.build(
            arch, name, checkpoint.metadata, method=method, settings=settings, errors=errors, lossy=lossy, **sha256
        )

    with create_ternary(
        target,
        layers,
        dense,
        header(dict.fromkeys(layers, 0.0)),
        header_room=metadata.header_room(arch),
        overwrite=overwrite,
    ) as writer:
        one_pass = _Pass(checkpoint, writer, method, on_progress)
        one_pass.run()
        checkpoint.check_unchanged()
        errors = {name: one_pass.errors[name] for name in layers}
        writer.metadata.update(header(errors, sha256=one_pass.digest.hexdigest()))
    weights = sum(n * k for n, k in arch.linear_shapes.values())
    sizes = checkpoint.nbytes, os.path.getsize(target)
    source, seconds = checkpoint.identity, time.monotonic() - started
    return Summary(arch.name, checkpoint.name, source.lossy, source.ignored, errors, weights, *sizes, seconds)


class _Lazy:
    """A matrix of a checkpoint, decoded a few rows at a time."""

    def __init__(self, checkpoint: Checkpoint, name: str):
        self.checkpoint, self.name, self.shape = checkpoint, name, checkpoint.shape(name)

    def split(self, count: int) -> Iterator[torch.Tensor]:
        for start in range(0, self.shape[0], count):
            yield self.checkpoint.rows(self.name, start, start + count)


class _Pass:
    """Reads in this thread, hashes in a second, rounds in one thread for each core, and writes in this one again."""

    def __init__(self, checkpoint: Checkpoint, writer: TernaryWriter, method: str, on_progress: Callable):
        self.checkpoint = checkpoint
        self.writer = writer
        self.method = method
        self.on_progress = on_progress
        self.digest = hashlib.sha256()
        self.columns: dict[str, Future] = {}  # column scales of layers that are not done
        self.matrices: dict[str, Matrix] = {}  # layers of which some rows are done
        self.errors: dict[str, float] = {}

    def run(self) -> None:
        waiting: deque[tuple[Piece, Future, Future]] = deque()
        order = iter([layer for name in self.checkpoint.order if (layer := self._layer(name)) is not None])
        with held_back() as let_through, ThreadPoolExecutor(1) as hasher, single_threaded_pool() as rounders:
            self._find_columns(next(order, None), rounders)
            begun = set()
            for piece in self.checkpoint.pieces():
                hashed = hasher.submit(self.digest.update, piece.data)
                layer = self._layer(piece.name)
                if layer is not None and layer not in begun:
                    begun.add(layer)
                    self._find_columns(next(order, None), rounders)  # ahead of its rows, which need them
                waiting.append((piece, rounders.submit(self._convert, piece), hashed))
                if len(waiting) > _IN_FLIGHT:
                    self._finish(*waiting.popleft())
                let_through()
            while waiting:
                self._finish(*waiting.popleft())

    def _find_columns(self, layer: str | None, rounders: Executor) -> None:
        if layer is not None and self.writer.layers[layer].columns:
            self.columns[layer] = rounders.submit(column_scales, _Lazy(self.checkpoint, f"{layer}.weight"))

    def _layer(self, name: str | None) -> str | None:
        """The ternary Linear whose weight this is."""
        layer = (name or "").removesuffix(".weight")
        return layer if layer != name and layer in self.writer.layers else None

    def _convert(self, piece: Piece) -> list[tuple[int, Rows]] | np.ndarray | None:
        """The rounded rows of a ternary layer, or the bf16 bytes of a dense tensor."""
        if piece.name is None:
            return None
        values, key = piece.values().view(piece.rows, -1), piece.encoding.key
        layer = self._layer(piece.name)
        if layer is None:
            values = values.bfloat16()
            check_finite(values, self.checkpoint.path, key)
            return values.flatten().view(torch.uint8).numpy()
        column = self.columns[layer].result().float().numpy() if layer in self.columns else None
        step = Matrix.chunk_rows(self.writer.layers[layer].shape)
        try:
            with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is refused
                return [
                    (piece.start + start, round_rows(values[start : start + step].float().numpy(), self.method, column))
                    for start in range(0, piece.rows, step)
                ]
        except ValueError:
            raise FormatError(self.checkpoint.path, NOT_FINITE, key) from None

    def _finish(self, piece: Piece, converted: Future, hashed: Future) -> None:
        hashed.result()
        result = converted.result()
        if piece.name is None:
            return
        layer = self._layer(piece.name)
        if layer is None:
            self.writer.tensors.write_bytes(piece.name, result, len(result) // piece.rows * piece.start)
            return
        plan = self.writer.layers[layer]
        if layer not in self.matrices:
            column = self.columns[layer].result() if layer in self.columns else None
            self.matrices[layer] = Matrix(plan.shape, column=column)
        matrix = self.matrices[layer]
        for start, rows in result:
            matrix.put(start, rows)
        self.on_progress(piece.rows * plan.shape[1])
        if not matrix.missing:
            if not math.isfinite(matrix.error):
                problem = "its values are too large for weights: the file is damaged; download it again"
                raise FormatError(self.checkpoint.path, problem, piece.encoding.key)
            self.writer.layer(layer, matrix.weight)
            self.errors[layer] = matrix.error
            del self.matrices[layer]
            self.checkpoint.give_back()
            self.columns.pop(layer, None)
