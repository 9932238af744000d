"""The safetensors container: a validated header, a memory map of the tensors, and a streaming writer.

Layout: 8 bytes little-endian header length, the JSON header, the tensors' bytes without holes. The header precedes the
data and holds every shape, so a writer plans all tensors first and can then write them in any order and in pieces.
The header's metadata has the CRC-32 of every tensor and of the header itself, for `verify`.

Reading and writing are our own because the safetensors library writes files from tensors that are all in memory (a
ternary FLUX.1 is made in 0.7 GB from 24 GB), and because a damaged file is refused here with its key and a remedy.
"""

import contextlib
import json
import math
import mmap
import os
import struct
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from .atomic import atomic_file
from .inputs import check_regular

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# dtypes that a header may hold and torch need not know
_OTHER_BITS = {"U64": 64, "U32": 32, "U16": 16, "C64": 64, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
_BITS = {name: dtype.itemsize * 8 for name, dtype in DTYPES.items()} | _OTHER_BITS
# Headers of real models have some 100 KB and a few thousand tensors; a picture in the metadata may add megabytes.
_MAX_HEADER = 1 << 24
_MOST_TENSORS = 50_000
_MOST_BRACKETS = 4 * _MOST_TENSORS
_MOST_DIMENSIONS = 16
_ALIGNMENT = 64
_AGAIN = "download or convert the file again"  # the remedy
_CHECKSUMS = "ternary.crc32"  # the metadata's key
_FOREIGN = {
    b"GGUF": "a GGUF file",
    b"PK\x03\x04": "a PyTorch checkpoint (a zip of pickles), which can run code when it is loaded",
    b"\x80\x02": "a PyTorch checkpoint (a pickle), which can run code when it is loaded",
    b"\x80\x04": "a PyTorch checkpoint (a pickle), which can run code when it is loaded",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: download the file",
    b"<!": "a web page: the download failed",
    b"<h": "a web page: the download failed",
}


class FormatError(ValueError):
    """A file is not what it should be. The message names the file, the key where there is one, and the remedy."""

    def __init__(self, path: str | os.PathLike, problem: str, key: str | None = None):
        self.path = Path(path)
        self.key = key
        super().__init__(f"{path}: {key}: {problem}" if key else f"{path}: {problem}")


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its dtype as the header names it, and its bytes, `start` to `stop` of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Header:
    path: Path
    size: int
    metadata: dict[str, str]
    entries: dict[str, Entry]  # in file order
    checksums: str | None = None  # as JSON; see `checksums_of`


@dataclass(frozen=True)
class Checksums:
    """CRC-32 of the header without them, and of the bytes of every tensor by its key."""

    header: int
    tensors: dict[str, int]

    @property
    def text(self) -> str:
        tensors = {key: f"{value:08x}" for key, value in self.tensors.items()}
        return json.dumps({"header": f"{self.header:08x}", "tensors": tensors}, separators=(",", ":"))


def checksums_of(header: Header) -> Checksums | None:
    """The checksums that the writer of a file left in it; None where there are none. FormatError if unreadable."""
    if header.checksums is None:
        return None
    try:
        match json.loads(header.checksums):
            case {"header": str(own), "tensors": {**tensors}}:
                return Checksums(int(own, 16), {str(key): int(str(value), 16) for key, value in tensors.items()})
    except (ValueError, TypeError, RecursionError):
        pass
    raise FormatError(header.path, "the checksums cannot be read: the header is damaged; download the file again")


def header_checksum(metadata: Mapping[str, str], entries: Mapping[str, Entry]) -> int:
    """CRC-32 of what a header says, its checksums left out; tensors by name, wherever they lie."""
    tensors = {key: [entry.dtype, list(entry.shape)] for key, entry in entries.items()}
    return zlib.crc32(json.dumps([dict(metadata), tensors], sort_keys=True).encode())


def read_header(path: str | os.PathLike) -> Header:
    """Read and check a safetensors header: the tensors lie within the file, without holes or overlaps, and fill it.

    Raises FormatError, OSError.
    """
    path = Path(path)
    size = check_regular(path).st_size
    with open(path, "rb") as file:
        start = file.read(24)
        length = int.from_bytes(start[:8], "little")
        if start[8:9] != b"{":
            raise FormatError(path, _what_else(start, size))
        if length > _MAX_HEADER:
            raise FormatError(path, f"a header of {length:,} bytes is not read; {_AGAIN}")
        if 8 + length > size:
            raise FormatError(path, "the file is truncated within its header; download or convert it again")
        file.seek(8)
        header = _parse(path, file.read(length))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(path, f"the header's metadata is not a map of strings; {_AGAIN}", "__metadata__")
    checksums = metadata.pop(_CHECKSUMS, None)  # they hold for these bytes alone and are not handed on
    entries = {key: _entry(path, key, value, 8 + length) for key, value in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    _check_contiguous(path, entries, 8 + length, size)
    return Header(path, size, metadata, entries, checksums)


def _what_else(start: bytes, size: int) -> str:
    if size < 10:
        return f"the file is truncated ({size} bytes); download or convert it again"
    what = next((what for magic, what in _FOREIGN.items() if start.startswith(magic)), "no safetensors file")
    return f"this is {what}; a .safetensors file is needed"


def _parse(path: Path, text: bytes) -> dict:
    if text.count(b"{") > _MOST_BRACKETS or text.count(b"[") > _MOST_BRACKETS:
        raise FormatError(path, "a header with this many entries is not read; download or convert the file again")

    def unique(pairs):
        keys = dict(pairs)
        if len(keys) != len(pairs):
            raise FormatError(path, f"a key occurs twice in the header; {_AGAIN}")
        return keys

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(path, f"the header is not valid JSON ({error}); {_AGAIN}") from None
    if len(header) > _MOST_TENSORS:
        problem = f"a header with {len(header):,} tensors is not read; {_AGAIN}"
        raise FormatError(path, problem)
    return header


def _entry(path: Path, key: str, value: object, data_start: int) -> Entry:
    match value:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(stop)]}:
            pass
        case _:
            raise FormatError(path, f"the header's entry is not a dtype, shape and data_offsets; {_AGAIN}", key)
    if dtype not in _BITS:
        raise FormatError(path, f"unknown dtype {dtype:.32}; {_AGAIN}", key)
    if len(shape) > _MOST_DIMENSIONS or not all(type(length) is int and 0 <= length < 1 << 63 for length in shape):
        raise FormatError(path, f"invalid shape {str(shape[:_MOST_DIMENSIONS]):.200}; {_AGAIN}", key)
    if start < 0 or (stop - start) * 8 != math.prod(shape) * _BITS[dtype]:
        raise FormatError(path, f"{stop - start} bytes do not hold {dtype} {shape}; {_AGAIN}", key)
    return Entry(dtype, tuple(shape), data_start + start, data_start + stop)


def _check_contiguous(path: Path, entries: Mapping[str, Entry], position: int, size: int) -> None:
    for key, entry in entries.items():
        if entry.start != position:
            raise FormatError(path, f"the tensor overlaps another or leaves a hole; {_AGAIN}", key)
        position = entry.stop
    if position > size:
        short = next(key for key, entry in entries.items() if entry.stop > size)
        message = f"the file is truncated: it has {size:,} of {position:,} bytes; download or convert it again"
        raise FormatError(path, message, short)
    if position < size:
        raise FormatError(path, f"{size - position:,} bytes follow the last tensor; {_AGAIN}")


class MappedFile:
    """A file in memory, which must stay what it was when it was opened."""

    path: Path
    entries: Mapping[str, Entry]
    status: tuple[int, ...]  # changes when the file is written to or replaced

    @cached_property
    def ends(self) -> Mapping[str, Sequence[str]]:
        """What precedes the last full stop of a key -> what follows it, in all keys."""
        ends: dict[str, list[str]] = {}
        for key in self.entries:
            start, _, end = key.rpartition(".")
            ends.setdefault(start, []).append(end)
        return ends

    def _open_map(self, path: str | os.PathLike) -> None:
        with open(path, "rb") as file:
            self.status = _status(os.fstat(file.fileno()))
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def check_unchanged(self) -> None:
        """Raises FormatError where the file was written to, or replaced, since it was opened."""
        try:
            status = _status(os.stat(self.path))
        except FileNotFoundError:  # what is mapped is as it was
            return
        if status != self.status:
            raise self._changed()

    def bytes(self, key: str) -> np.ndarray:
        """The tensor's bytes, uint8."""
        entry = self.entries[key]
        self._check_length(entry)
        return np.frombuffer(self._map, np.uint8, entry.nbytes, entry.start)

    def give_back(self) -> None:
        """Let the system have the memory of what was read, which is read again where it is needed; nothing changes."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def _check_length(self, entry: Entry) -> None:
        """Reading a map beyond the end of a file that became shorter ends the process."""
        if self._map.size() < entry.stop:
            raise self._changed()

    def _changed(self) -> FormatError:
        return FormatError(self.path, "the file changed while it was read; wait until it is complete and start again")


class TensorFile(MappedFile):
    """A safetensors file, memory-mapped. Tensors share the map's memory, are read-only, and keep it alive."""

    def __init__(self, path: str | os.PathLike):
        self.header = read_header(path)
        self.path, self.entries = self.header.path, self.header.entries
        self._open_map(path)
        if len(self._map) != self.header.size:
            raise self._changed()

    @property
    def size(self) -> int:
        """Of the file, in bytes."""
        return self.header.size

    @property
    def metadata(self) -> dict[str, str]:
        return self.header.metadata

    def read_ahead(self, keys: Iterable[str]) -> None:
        """Let the system start to read these tensors from the disk, where it takes such requests."""
        if hasattr(mmap, "MADV_WILLNEED"):
            for entry in (self.entries[key] for key in keys):
                start = entry.start - entry.start % mmap.PAGESIZE
                self._map.madvise(mmap.MADV_WILLNEED, start, entry.stop - start)

    def tensor(self, key: str) -> Tensor:
        entry = self.entries[key]
        if entry.dtype not in DTYPES:
            raise FormatError(self.path, f"dtype {entry.dtype} is not supported", key)
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        self._check_length(entry)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            flat = torch.frombuffer(self._map, dtype=torch.uint8, count=entry.nbytes, offset=entry.start)
        if entry.start % DTYPES[entry.dtype].itemsize:
            flat = flat.clone()
        return flat.view(DTYPES[entry.dtype]).view(entry.shape)


def _status(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@dataclass
class TensorWriter:
    """Writes the planned tensors of a safetensors file, in any order; made by `create`."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: dict[str, str]  # may be completed until the end, within the room that `create` was given
    file: BinaryIO
    written: dict[str, int] = field(default_factory=dict)
    checksums: dict[str, int] = field(default_factory=dict)
    ahead: dict[str, dict[int, Any]] = field(default_factory=dict)  # pieces that wait for those before them

    def write(self, key: str, data: Tensor | np.ndarray) -> None:
        """Write a whole tensor; its dtype and shape must be the planned ones."""
        entry = self.entries[key]
        tensor = torch.from_numpy(data) if isinstance(data, np.ndarray) else data
        if tensor.dtype != DTYPES[entry.dtype] or tuple(tensor.shape) != entry.shape:
            given, planned = f"{tensor.dtype} {list(tensor.shape)}", f"{entry.dtype} {list(entry.shape)}"
            raise ValueError(f"{key}: {given} where {planned} was planned")
        self.write_bytes(key, tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())

    def write_bytes(self, key: str, data, offset: int = 0) -> None:
        """Write a piece of a tensor, `offset` bytes from its start. A piece ahead of its turn is held until then."""
        if offset < self.written.get(key, 0):
            raise ValueError(f"{key}: byte {offset} was written already")
        ahead = self.ahead.setdefault(key, {})
        ahead[offset] = data
        while (piece := ahead.pop(self.written.get(key, 0), None)) is not None:
            self.file.seek(self.entries[key].start + self.written.get(key, 0))
            self.file.write(piece)
            self.written[key] = self.written.get(key, 0) + len(piece)
            self.checksums[key] = zlib.crc32(piece, self.checksums.get(key, 0))


def size_of(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * math.prod(shape)


@contextlib.contextmanager
def create(
    path: str | os.PathLike,
    plan: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str],
    *,
    header_room: int = 0,
    overwrite: bool = False,
) -> Iterator[TensorWriter]:
    """Create a safetensors file atomically; the planned tensors must all be written before the block ends.

    Tensors start at multiples of 64 bytes as far as their sizes allow. `header_room` bytes are for metadata that is
    only known at the end. Raises OSError where there is no space, or where the file exists and `overwrite` is false.
    """
    order = sorted(plan, key=lambda key: -math.gcd(size_of(*plan[key]), _ALIGNMENT))
    offsets, position = {}, 0
    for key in order:
        dtype, shape = plan[key]
        offsets[key] = Entry(DTYPE_NAMES[dtype], tuple(shape), position, position + size_of(dtype, shape))
        position = offsets[key].stop
    unknown = Checksums(0, dict.fromkeys(offsets, 0)).text
    header = _header_bytes(offsets, _in_utf8(metadata) | {_CHECKSUMS: unknown}, header_room)
    if len(header) > _MAX_HEADER:
        largest = max(metadata, key=lambda key: len(metadata[key]))
        problem = f"the header would have {len(header):,} bytes, and {_MAX_HEADER:,} are read"
        raise ValueError(f"{path}: {problem}; most are metadata, of which {largest!r:.80} is the largest")
    data_start = len(header)
    entries = {key: Entry(e.dtype, e.shape, e.start + data_start, e.stop + data_start) for key, e in offsets.items()}
    with atomic_file(path, data_start + position, overwrite) as file:
        writer = TensorWriter(Path(path), entries, dict(metadata), file)
        yield writer
        for key, entry in entries.items():
            if writer.written.get(key, 0) != entry.nbytes:
                raise ValueError(f"{path}: {key}: {writer.written.get(key, 0)} of {entry.nbytes} bytes were written")
        checksums = {key: writer.checksums.get(key, 0) for key in offsets}
        final = _in_utf8(writer.metadata)
        found = Checksums(header_checksum(final, entries), checksums).text
        header = _header_bytes(offsets, final | {_CHECKSUMS: found}, 0)
        if len(header) > data_start:
            raise ValueError(f"{path}: the metadata outgrew its room by {len(header) - data_start} bytes")
        file.seek(0)
        file.write(struct.pack("<Q", data_start - 8) + header[8:].ljust(data_start - 8))


def save(
    path: str | os.PathLike,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write tensors that are in memory as a safetensors file, atomically. Raises OSError as `create`."""
    plan = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with create(path, plan, metadata or {}, overwrite=overwrite) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor)


def _in_utf8(metadata: Mapping[str, str]) -> dict[str, str]:
    """Names of files may hold bytes that no text has, which other readers of the format refuse: those, escaped."""
    return {key: value.encode("utf-8", "backslashreplace").decode() for key, value in metadata.items()}


def _header_bytes(entries: Mapping[str, Entry], metadata: Mapping[str, str], header_room: int) -> bytes:
    tensors = {
        key: {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (entry.start, entry.stop)}
        for key, entry in entries.items()
    }
    whole = {"__metadata__": dict(metadata), **tensors}
    text = json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode() + b" " * header_room
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
