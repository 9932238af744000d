"""The GGUF container: its header, read here within bounds; blocks of quantized values, decoded by the `gguf` library.

Layout (little-endian): "GGUF", version, number of tensors and of metadata fields, the fields, a description of each
tensor, padding, and the tensors' bytes, each at a multiple of the alignment.
"""

import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..container import Entry, FormatError, MappedFile
from ..inputs import check_regular

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MOST_TENSORS, _MOST_FIELDS, _MOST_STRINGS = 50_000, 10_000, 1_000_000
_AGAIN = "download the file again"


@dataclass(frozen=True)
class Blocks:
    """How values of a type lie in a row: `values` of them in `size` bytes, with fp16 factors at the bytes `factors`."""

    number: int
    values: int
    size: int
    factors: tuple[int, ...] = ()


TYPES = {
    "F32": Blocks(0, 1, 4),
    "F16": Blocks(1, 1, 2),
    "Q4_0": Blocks(2, 32, 18, (0,)),
    "Q4_1": Blocks(3, 32, 20, (0, 2)),
    "Q5_0": Blocks(6, 32, 22, (0,)),
    "Q5_1": Blocks(7, 32, 24, (0, 2)),
    "Q8_0": Blocks(8, 32, 34, (0,)),
    "Q8_1": Blocks(9, 32, 36, (0, 2)),
    "Q2_K": Blocks(10, 256, 84, (80, 82)),
    "Q3_K": Blocks(11, 256, 110, (108,)),
    "Q4_K": Blocks(12, 256, 144, (0, 2)),
    "Q5_K": Blocks(13, 256, 176, (0, 2)),
    "Q6_K": Blocks(14, 256, 210, (208,)),
    "IQ2_XXS": Blocks(16, 256, 66, (0,)),
    "IQ2_XS": Blocks(17, 256, 74, (0,)),
    "IQ3_XXS": Blocks(18, 256, 98, (0,)),
    "IQ1_S": Blocks(19, 256, 50, (0,)),
    "IQ4_NL": Blocks(20, 32, 18, (0,)),
    "IQ3_S": Blocks(21, 256, 110, (0,)),
    "IQ2_S": Blocks(22, 256, 82, (0,)),
    "IQ4_XS": Blocks(23, 256, 136, (0,)),
    "I8": Blocks(24, 1, 1),
    "I16": Blocks(25, 1, 2),
    "I32": Blocks(26, 1, 4),
    "I64": Blocks(27, 1, 8),
    "F64": Blocks(28, 1, 8),
    "IQ1_M": Blocks(29, 256, 56),
    "BF16": Blocks(30, 1, 2),
    "TQ1_0": Blocks(34, 256, 54, (52,)),
    "TQ2_0": Blocks(35, 256, 66, (64,)),
}
_NAMES = {blocks.number: name for name, blocks in TYPES.items()}


class GgufFile(MappedFile):
    """A GGUF file, memory-mapped. `entries` have torch's order of dimensions, and the type's name as their dtype.

    Raises FormatError where the header is damaged or of another version, and OSError.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        check_regular(self.path)
        self._open_map(path)
        self.size = len(self._map)
        reader = _Reader(self.path, self._map)
        version, tensors, fields = reader.unpack("<IQQ")
        if version not in _VERSIONS:
            raise FormatError(
                path, f"GGUF of version {version}; versions 2 and 3 are read; convert it with newer tools"
            )
        if tensors > _MOST_TENSORS or fields > _MOST_FIELDS:
            raise FormatError(path, f"a header with {tensors:,} tensors and {fields:,} fields is not read; {_AGAIN}")
        self.fields: dict[str, object] = {}
        for _ in range(fields):
            name = reader.string()
            self.fields[name] = reader.value(*reader.unpack("<I"))
        self.entries = self._entries(reader, tensors)

    @property
    def architecture(self) -> str:
        """What the file says that it is, such as "flux"; "" where it says nothing."""
        found = self.fields.get("general.architecture", "")
        return found if isinstance(found, str) else ""

    @property
    def metadata(self) -> dict[str, str]:
        """The fields that have a place in the metadata of safetensors."""
        names = {"general.name": "modelspec.title", "general.license": "modelspec.license"}
        names |= {"general.author": "modelspec.author"}
        return {to: value for name, to in names.items() if isinstance(value := self.fields.get(name), str)}

    def _entries(self, reader: "_Reader", count: int) -> dict[str, Entry]:
        found = []
        for _ in range(count):
            name = reader.string()
            (dimensions,) = reader.unpack("<I")
            if dimensions > 8:
                raise FormatError(self.path, f"a tensor with {dimensions} dimensions; {_AGAIN}", name)
            *shape, number, offset = reader.unpack(f"<{dimensions}QIQ")
            found.append((name, tuple(reversed(shape)), number, offset))
        alignment = self.fields.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= 1 << 20:
            raise FormatError(self.path, f"alignment {alignment!r}; {_AGAIN}", "general.alignment")
        start = -(-reader.position // alignment) * alignment
        entries: dict[str, Entry] = {}
        for name, shape, number, offset in found:
            if name in entries:
                raise FormatError(self.path, f"the name occurs twice; {_AGAIN}", name)
            if number not in _NAMES:
                raise FormatError(self.path, f"values of the unknown type {number}; update this pack", name)
            kind = _NAMES[number]
            blocks = TYPES[kind]
            if math.prod(shape) and shape[-1] % blocks.values:
                raise FormatError(self.path, f"rows of {shape[-1]} values in blocks of {blocks.values}; {_AGAIN}", name)
            stop = start + offset + math.prod(shape) // blocks.values * blocks.size
            if stop > self.size:
                problem = f"the file is truncated: it has {self.size:,} bytes and the tensor ends at {stop:,}"
                raise FormatError(self.path, f"{problem}; {_AGAIN}", name)
            entries[name] = Entry(kind, shape, start + offset, stop)
        entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
        last = 0
        for name, entry in entries.items():
            if entry.start < last:
                raise FormatError(self.path, f"the tensor overlaps another; {_AGAIN}", name)
            last = entry.stop
        return entries


class _Reader:
    """Takes the header apart from its start to its end."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.position, self.strings = path, data, len(MAGIC), 0

    def unpack(self, layout: str) -> tuple:
        start, self.position = self.position, self.position + struct.calcsize(layout)
        if self.position > len(self.data):
            raise FormatError(self.path, f"the file is truncated within its header; {_AGAIN}")
        return struct.unpack_from(layout, self.data, start)

    def skip(self, count: int) -> None:
        self.position += count
        self.unpack("<")

    def string(self) -> str:
        (length,) = self.unpack("<Q")
        start, self.position = self.position, self.position + length
        if self.position > len(self.data) or length > 1 << 20:
            raise FormatError(self.path, f"the header holds a string of {length:,} bytes; {_AGAIN}")
        return self.data[start : self.position].decode("utf-8", "replace")

    def value(self, kind: int) -> object:
        """A field's value; arrays are passed over, and None."""
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.unpack(f"<{_SCALARS[kind]}")[0]
        if kind != _ARRAY:
            raise FormatError(self.path, f"the header holds a field of the unknown type {kind}; {_AGAIN}")
        inner, length = self.unpack("<IQ")
        if inner in _SCALARS:
            self.skip(length * struct.calcsize(f"<{_SCALARS[inner]}"))
            return None
        self.strings += length
        if inner != _STRING or self.strings > _MOST_STRINGS:
            raise FormatError(self.path, f"the header holds {length:,} values of type {inner} in a field; {_AGAIN}")
        for _ in range(length):
            self.skip(*self.unpack("<Q"))
        return None


def decode(data: np.ndarray, kind: str, path: Path, key: str) -> Tensor:
    """Rows of blocks, uint8 [rows, bytes], as fp32 [rows, values], by the `gguf` library. Raises FormatError."""
    try:
        import gguf
    except ImportError:
        problem = f"{kind} values are decoded by the Python package gguf, which is not installed: pip install gguf"
        raise FormatError(path, problem, key) from None
    try:
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is refused by those who need numbers
            values = gguf.dequantize(data, gguf.GGMLQuantizationType(TYPES[kind].number))
    except (NotImplementedError, ValueError):
        problem = f"the installed gguf package does not decode {kind}; update it (pip install -U gguf)"
        raise FormatError(path, f"{problem} or give another version of the model", key) from None
    return torch.from_numpy(values)
