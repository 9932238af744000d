"""Dense FLUX checkpoints: whatever they are stored in, decoded tensor by tensor, or streamed once from start to end."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path

import torch
from torch import Tensor

from .architecture import Architecture
from .container import FormatError, TensorFile
from .identity import Identity, Rows, identify
from .sources.encodings import FLOATS, Encoding
from .sources.gguf import GgufFile
from .sources.source import Source, open_source, rows_of

_PIECE = 1 << 22


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of a tensor's bytes, or (`name` None) bytes that belong to no parameter of the model.

    start   the parameter's first row here; row of the file's tensor: `row`
    """

    name: str | None
    start: int
    rows: int
    data: bytearray
    encoding: Encoding | None = None
    row: int = 0

    def values(self) -> Tensor:
        """The numbers [rows, ...]: floats as they are stored, else fp32. Raises FormatError."""
        return self.encoding.values(self.data, self.row, self.rows)

    def check(self) -> None:
        """Raise FormatError, naming the file's key, where a number is not finite."""
        self.encoding.check(self.data, self.row, self.rows)


@dataclass(frozen=True)
class Checkpoint:
    """A dense FLUX checkpoint. Names are BFL's; what else is in its files is left out."""

    source: Source
    identity: Identity

    @property
    def path(self) -> Path:
        """As it was given: a file or a folder."""
        return self.source.path

    @property
    def name(self) -> str:
        """For people: the file's or the folder's name."""
        return self.source.name

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that it is read from."""
        return tuple(file.path for file in self.source.files)

    @property
    def architecture(self) -> Architecture:
        return self.identity.architecture

    @property
    def parameters(self) -> Mapping[str, tuple[Rows, ...]]:
        return self.identity.parameters

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.parameters)

    @property
    def lossy(self) -> str:
        """What its weights were rounded to before; "" where they have 16 or 32 bits."""
        return self.identity.lossy

    @property
    def metadata(self) -> dict[str, str]:
        return dict(self.source.metadata)

    @property
    def nbytes(self) -> int:
        """Of its files."""
        return self.source.size

    def shape(self, name: str) -> tuple[int, ...]:
        return self.architecture.shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Of the numbers that `tensor` gives."""
        return reduce(torch.promote_types, (rows.encoding.dtype for rows in self.parameters[name]))

    def bits(self, name: str) -> float:
        """Bits that a number of this parameter takes in the file, without scales."""
        parts = [rows.encoding for rows in self.parameters[name]]
        stored = {e.key: e.file.entries[e.key].nbytes for e in parts}
        values = {e.key: rows_of(e.file.entries[e.key])[1] * rows_of(e.file.entries[e.key])[0] for e in parts}
        return 8 * sum(stored.values()) / sum(values.values())

    def tensor(self, name: str) -> Tensor:
        """A parameter: memory-mapped and read-only where it is stored as it is, else decoded, in fp32 or its own dtype.

        Raises FormatError where it cannot be decoded.
        """
        mapped = self._mapped(name)
        if mapped is not None:
            return mapped
        whole = torch.empty(self.shape(name), dtype=self.dtype(name))
        step = max(1, _PIECE // (2 * whole[0].numel()))
        for start in range(0, len(whole), step):
            whole[start : start + step] = self.rows(name, start, start + step)
        return whole

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a parameter, decoded as by `tensor`; no more of it is held in memory."""
        mapped = self._mapped(name)
        if mapped is not None:
            return mapped[start:stop]
        stop = min(stop, self.shape(name)[0])
        found = []
        for rows in sorted(self.parameters[name], key=lambda rows: rows.part.at):
            part, encoding = rows.part, rows.encoding
            first, last = max(start, part.at), min(stop, part.at + part.rows)
            if first < last:
                row, size = first - part.at + part.first, rows_of(encoding.file.entries[encoding.key])[2]
                data = bytearray(encoding.file.bytes(encoding.key)[row * size : (row + last - first) * size].data)
                found.append(encoding.values(data, row, last - first).to(self.dtype(name)))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _mapped(self, name: str) -> Tensor | None:
        """A parameter that is stored as it is, in the file's memory."""
        parts = self.parameters[name]
        encoding = parts[0].encoding
        if len(parts) > 1 or encoding.stored not in FLOATS or not isinstance(encoding.file, TensorFile):
            return None
        return encoding.file.tensor(encoding.key)

    def read_ahead(self, prefix: str) -> None:
        """Let the system start to read the tensors whose names have this prefix from the disk."""
        for name, parts in self.parameters.items():
            for rows in parts if name.startswith(prefix) else ():
                if isinstance(rows.encoding.file, TensorFile):
                    rows.encoding.file.read_ahead([rows.encoding.key])

    def give_back(self) -> None:
        """Let the system have the memory that tensors are mapped to."""
        for file in self.source.files:
            file.give_back()

    def check_unchanged(self) -> None:
        """Raises FormatError where one of the files was written to, or replaced, since it was opened."""
        for file in self.source.files:
            file.check_unchanged()

    @cached_property
    def _stored(self) -> dict[str, list[tuple[str, Rows]]]:
        """Key in a file -> the parameters' parts that it holds, in the order of its rows."""
        stored: dict[str, list[tuple[str, Rows]]] = {}
        for name, parts in self.parameters.items():
            for rows in parts:
                stored.setdefault(rows.encoding.key, []).append((name, rows))
        return {key: sorted(of, key=lambda item: item[1].part.first) for key, of in stored.items()}

    @property
    def order(self) -> list[str]:
        """The names, as `pieces` comes to them first."""
        keys = (key for file in self.source.files for key in file.entries)
        return list(dict.fromkeys(name for key in keys for name, _ in self._stored.get(key, ())))

    def pieces(self, size: int = _PIECE) -> Iterator[Piece]:
        """Every byte of every file once and in order, in pieces of whole rows and about `size` bytes."""
        for file in self.source.files:
            yield from self._pieces(file, size)

    def _pieces(self, file: TensorFile | GgufFile, size: int) -> Iterator[Piece]:
        position = 0
        with open(file.path, "rb") as opened:
            for key, entry in file.entries.items():
                if key not in self._stored:
                    continue
                for start in range(position, entry.start, size):
                    yield Piece(None, 0, 1, _read(opened, min(size, entry.start - start)))
                row_bytes = rows_of(entry)[2]
                for name, rows in self._stored[key]:
                    for first, count in _steps(rows.encoding, rows.part.first, rows.part.rows, size):
                        data = _read(opened, count * row_bytes)
                        yield Piece(name, rows.part.at + first - rows.part.first, count, data, rows.encoding, first)
                position = entry.stop
            for start in range(position, file.size, size):
                yield Piece(None, 0, 1, _read(opened, min(size, file.size - start)))


def _steps(encoding: Encoding, first: int, rows: int, size: int) -> Iterator[tuple[int, int]]:
    """(row, number of rows) of pieces with about `size` bytes, and as many values at most as bf16 has in them."""
    _, values, row_bytes = rows_of(encoding.file.entries[encoding.key])
    step = max(1, min(size // max(row_bytes, 1), size // max(2 * values, 1)))
    for start in range(first, first + rows, step):
        yield start, min(step, first + rows - start)


def _read(file, count: int) -> bytearray:
    data = bytearray(count)
    if file.readinto(data) != count:
        raise FormatError(file.name, "the file became shorter while it was read")
    return data


def open_checkpoint(source: str | os.PathLike | TensorFile | Source) -> Checkpoint:
    """Open a dense FLUX.1 or FLUX.2: a file or a folder in any of the forms that `sources` knows.

    `source`: its path, or the file where it is open already. Raises FormatError, naming what the file is instead where
    that can be told.
    """
    if isinstance(source, TensorFile):
        source = Source.of(source)
    elif not isinstance(source, Source):
        source = open_source(source)
    identity = identify(source)
    if identity.kind != "dense":
        raise FormatError(source.path, identity.sentence)
    return Checkpoint(source, identity)


def fingerprint(checkpoint: Checkpoint) -> str:
    """Tells checkpoints apart without reading all of them: the shapes and the middle row of every parameter.

    A merged LoRA or a fine-tune leaves the shapes and changes rows. It is the same for the same values however a file
    packs them.
    """
    hashed = hashlib.sha256()
    for name in sorted(checkpoint.names):
        middle = checkpoint.shape(name)[0] // 2
        hashed.update(f"{name} {list(checkpoint.shape(name))}".encode())
        hashed.update(checkpoint.rows(name, middle, middle + 1).float().numpy().tobytes())
    return hashed.hexdigest()[:16]


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]
