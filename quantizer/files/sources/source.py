"""The door: a path becomes open files, whatever their number and container."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..container import Entry, FormatError, TensorFile
from ..inputs import check_regular
from .gguf import MAGIC, GgufFile
from .locate import locate


@dataclass(frozen=True)
class Source:
    """Open files that together hold a model.

    path  as it was given
    name  of the model, for people: a file's name or a folder's
    """

    path: Path
    name: str
    files: tuple[TensorFile | GgufFile, ...]

    @classmethod
    def of(cls, file: TensorFile) -> "Source":
        return cls(file.path, file.path.name, (file,))

    @cached_property
    def homes(self) -> dict[str, TensorFile | GgufFile]:
        """Key -> the file that it is in. Raises FormatError where two files have the same key."""
        homes: dict[str, TensorFile | GgufFile] = {}
        for file in self.files:
            if double := next((key for key in file.entries if key in homes), None):
                problem = f"the tensor is in {homes[double].path.name} too; download the model again"
                raise FormatError(file.path, problem, double)
            homes |= dict.fromkeys(file.entries, file)
        return homes

    @cached_property
    def entries(self) -> dict[str, Entry]:
        return {key: file.entries[key] for key, file in self.homes.items()}

    @property
    def metadata(self) -> Mapping[str, str]:
        return self.files[0].metadata

    @property
    def size(self) -> int:
        """Of all files, in bytes."""
        return sum(file.size for file in self.files)

    @property
    def gguf(self) -> bool:
        return isinstance(self.files[0], GgufFile)

    @property
    def stem(self) -> str:
        """The name without the suffix of a file."""
        return self.name if self.path.is_dir() else self.name.removesuffix(self.files[0].path.suffix)


def open_source(path: str | os.PathLike) -> Source:
    """Open what `path` means: a .safetensors or .gguf file, a part or the index of a model in parts, a folder of
    diffusers or one that holds a single model. Nothing but headers is read.

    Raises FormatError, which names what is there instead, and OSError.
    """
    location = locate(path)
    return Source(location.path, location.name, tuple(_open(file) for file in location.files))


def _open(path: Path) -> TensorFile | GgufFile:
    check_regular(path)
    with open(path, "rb") as file:
        magic = file.read(len(MAGIC))
    return GgufFile(path) if magic == MAGIC else TensorFile(path)


def rows_of(entry: Entry) -> tuple[int, int, int]:
    """A tensor's rows, and the values and bytes of one."""
    rows = entry.shape[0] if entry.shape else 1
    return rows, math.prod(entry.shape[1:]), entry.nbytes // max(rows, 1)
