"""What torch needs of a CUDA driver, for machines without one: streams and events that have nothing to wait for."""

import contextlib
import json
import weakref
from pathlib import Path

import torch
from ternary_flux.quantizer.files.architecture import Architecture
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Stream:
    def __init__(self, *_):
        pass

    def wait_stream(self, other: "Stream") -> None:
        assert isinstance(other, Stream)


class Event:
    def record(self, stream: Stream | None = None) -> None:
        assert stream is None or isinstance(stream, Stream)

    def synchronize(self) -> None:
        pass


def install(monkeypatch, free: int) -> None:
    """Put them in the place of torch's own; the device has `free` bytes."""
    current = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (free, free))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)


def sparse_checkpoint(path: Path, arch: Architecture) -> Path:
    """A checkpoint in bf16 whose tensors are holes: it has its full size, and takes no room on the disk."""
    header, position = {}, 0
    for name, shape in arch.shapes.items():
        stop = position + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    return path


class PeakMemory(TorchDispatchMode):
    """Bytes of the tensors on devices of this type that were alive at the same time, at most: `peak`."""

    def __init__(self, device: str):
        super().__init__()
        self.device, self.now, self.peak = device, 0, 0
        self._alive: dict[weakref.ref, int] = {}

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor that was there before."""
        storage = tensor.untyped_storage()
        reference = weakref.ref(storage, self._gone)
        if tensor.device.type == self.device and reference not in self._alive:
            self._alive[reference] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def _gone(self, reference: weakref.ref) -> None:
        self.now -= self._alive.pop(reference)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.add(value)
        return result
