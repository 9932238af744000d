"""Tensors of safetensors files and of PyTorch checkpoints, read when they are asked for and never all at once."""

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..files.container import DTYPE_NAMES, DTYPES, FormatError, TensorFile
from ..files.sources.source import Source

_HELD = 1 << 26  # mapped bytes that may stay in memory
_OTHER = {"U32": torch.uint8, "U16": torch.uint8}  # given as bytes


class Tensors(Protocol):
    """Named tensors; `dtypes` are as safetensors names them."""

    path: Path  # the first file

    @property
    def metadata(self) -> Mapping[str, str]: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def dtypes(self) -> Mapping[str, str]: ...

    def path_of(self, key: str) -> Path:
        """The file that has a tensor."""

    def tensor(self, key: str) -> Tensor:
        """A whole tensor."""

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """The rows start..stop of a tensor."""

    def release(self) -> None:
        """Give back what is mapped; the tensors that were given must not be used after it."""


class SafetensorsFiles:
    """One safetensors file, or the parts of one model."""

    def __init__(self, paths: tuple[Path, ...]):
        self.path = paths[0]
        self.source = Source(paths[0], paths[0].name, tuple(TensorFile(path) for path in paths))
        self.metadata = self.source.metadata
        self.shapes = {key: entry.shape for key, entry in self.source.entries.items()}
        self.dtypes = {key: entry.dtype for key, entry in self.source.entries.items()}

    def path_of(self, key: str) -> Path:
        return self.source.homes[key].path

    def tensor(self, key: str) -> Tensor:
        """A copy of a tensor. Unsigned integers of 16 and 32 bits come as the bytes of their last dimension."""
        shape = self.shapes[key]
        return self.rows(key, 0, shape[0]) if shape else self.source.homes[key].tensor(key).clone()

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """A copy of the rows start..stop of a tensor, read with no trace in the mapped memory."""
        file = self.source.homes[key]
        entry = file.entries[key]
        if entry.dtype not in _OTHER and entry.dtype not in DTYPES:
            raise FormatError(file.path, f"dtype {entry.dtype} is not supported; download it again", key)
        row = entry.nbytes // max(entry.shape[0], 1)
        data = bytearray(max(stop - start, 0) * row)
        if not data:
            return torch.empty(max(stop - start, 0), *entry.shape[1:], dtype=DTYPES.get(entry.dtype, torch.uint8))
        with open(file.path, "rb", buffering=0) as source:
            source.seek(entry.start + start * row)
            if source.readinto(data) != len(data):
                raise FormatError(file.path, "the file became shorter while it was read", key)
        if entry.dtype in _OTHER:
            return torch.frombuffer(data, dtype=torch.uint8).view(stop - start, *entry.shape[1:-1], -1)
        return torch.frombuffer(data, dtype=DTYPES[entry.dtype]).view(stop - start, *entry.shape[1:])

    def release(self) -> None:
        """Nothing is held."""


class PickledFile:
    """A checkpoint of torch.save that is a dictionary of tensors; only tensors are loaded, and mapped."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.metadata: dict[str, str] = {}
        self._state: dict[str, Tensor] | None = None
        self._given = 0
        state = self._load()
        self.shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
        self.dtypes = {key: DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)) for key, tensor in state.items()}

    def path_of(self, key: str) -> Path:
        return self.path

    def tensor(self, key: str) -> Tensor:
        """A tensor, mapped until `release`."""
        tensor = self._load()[key]
        self._given += tensor.nbytes
        return tensor

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        return self.tensor(key)[start:stop]

    def release(self) -> None:
        """Give the mapped memory back where it has become much; it is mapped again when a tensor is asked for."""
        if self._given > _HELD:
            self._state, self._given = None, 0

    def _load(self) -> dict[str, Tensor]:
        if self._state is None:
            self._state = _load(self.path)
        return self._state


def _load(path: Path) -> dict[str, Tensor]:
    with open(path, "rb"):  # a missing file is an OSError
        pass
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        problem = "it holds more than tensors, which may run any program, and is not loaded"
        raise FormatError(path, f"{problem}; give a file of tensors alone") from None
    except (RuntimeError, ValueError, EOFError, KeyError, AttributeError, TypeError, IndexError, OSError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise FormatError(path, f"no PyTorch checkpoint that can be read ({reason}); download it again") from None
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_meta
        for key, tensor in state.items()
    ):
        raise FormatError(path, "the checkpoint is no dictionary of tensors; give the transformer's state_dict")
    return dict(state)
