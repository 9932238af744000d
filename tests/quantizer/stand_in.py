"""A CUDA device for machines without one: streams and events that have nothing to wait for, and one that computes."""

import contextlib
import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch
from ternary_flux.quantizer.files.architecture import Architecture
from torch.overrides import TorchFunctionMode
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


CUDA = torch.device("cuda", 0)
_run_backward = torch.autograd.Variable._execution_engine.run_backward  # what torch.autograd.backward calls
_MAY_MIX = {"aten::copy_", "aten::_foreach_copy_", "aten::set_"}
_INDEXED = {"aten::index", "aten::index_put", "aten::index_put_"}  # indices may lie in main memory


class Generator(torch.Generator):
    """One that says which device it is of."""

    def __new__(cls, device: torch.device | str = "cpu"):
        made = super().__new__(cls, "cpu")
        made.place = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:
        return self.place


class Device(TorchFunctionMode):
    """Within the block there is a device "cuda", which computes on the CPU.

    Tensors are ordinary ones; those on the device are the ones whose storage is known to be. As on a real one, tensors
    of two devices do not mix, nothing on it becomes an array of numpy, generators are of the device that they are used
    on, and a copy to it that is not waited for comes from pinned memory. `copies` counts those.
    """

    def __init__(self, monkeypatch, free: int):
        super().__init__()
        self.copies = 0
        self._kernels = _Kernels(self)
        self._storages: dict[int, weakref.ref] = {}
        self._pinned: dict[int, weakref.ref] = {}
        install(monkeypatch, free)
        monkeypatch.setattr(torch, "Generator", Generator)
        device_of = torch.Tensor.device.__get__
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(self.has))
        monkeypatch.setattr(torch.Tensor, "device", property(lambda t: CUDA if self.has(t) else device_of(t)))
        autocast = torch.autocast
        monkeypatch.setattr(torch, "autocast", lambda device, *more, **named: autocast("cpu", *more, **named))

    def __enter__(self):
        self._kernels.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._kernels.__exit__(*error)

    def has(self, tensor: torch.Tensor) -> bool:
        return not tensor.is_meta and tensor.untyped_storage()._cdata in self._storages

    def put(self, tensor: torch.Tensor, here: bool = True) -> None:
        """Say where a tensor lies."""
        self._note(self._storages, tensor, here)

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned

    @staticmethod
    def _note(places: dict[int, weakref.ref], tensor: torch.Tensor, there: bool) -> None:
        storage = tensor.untyped_storage()
        number = storage._cdata
        if not there:
            places.pop(number, None)
        elif number not in places:
            places[number] = weakref.ref(storage, lambda _: places.pop(number, None))

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name == "__get__":
            return function(*args)
        kwargs = dict(kwargs or {})
        first = args[0] if args and isinstance(args[0], torch.Tensor) and not args[0].is_meta else None
        if first is not None:
            if name == "backward":
                ones = torch.ones_like(first)
                super().__enter__()  # what is recomputed runs on the device too
                try:
                    return _run_backward((first,), (ones,), False, False, (), True, accumulate_grad=True)
                finally:
                    super().__exit__(None, None, None)
            if name in ("numpy", "__array__") and self.has(first):
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
            if name in ("to", "cpu"):
                return self._moved(first, name, args[1:], kwargs)
        device, pinned = kwargs.pop("device", None), kwargs.pop("pin_memory", False)
        if pinned:
            self._note(self._pinned, result := function(*args, **kwargs), True)
            return result
        if device is None:
            return function(*args, **kwargs)
        device = torch.device(device)
        if device.type == "meta":
            return function(*args, device=device, **kwargs)
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type != device.type:
            raise RuntimeError(f"Expected a '{device.type}' device type for generator")
        result = function(*args, **kwargs)
        self.put(result, device.type == "cuda")
        return result

    def _moved(self, tensor: torch.Tensor, name: str, args: tuple, kwargs: dict) -> torch.Tensor:
        if name == "cpu":
            device, dtype = torch.device("cpu"), None
        elif args and isinstance(args[0], torch.Tensor):
            device, dtype = CUDA if self.has(args[0]) else torch.device("cpu"), args[0].dtype
        else:
            copy = kwargs.pop("copy", False)
            device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
            kwargs = {"copy": copy}
        if device is not None and device.type == "meta":
            return tensor.to(device, dtype)
        here = self.has(tensor)
        target = here if device is None else device.type == "cuda"
        copy = kwargs.get("copy", False) or target != here
        moved = tensor.to(dtype or tensor.dtype, copy=copy)
        self.put(moved, target)
        return moved


class _Kernels(TorchDispatchMode):
    """Where the results of kernels lie, and whether their arguments lie together."""

    def __init__(self, device: Device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function._schema.name
        given = args[:1] if name in _INDEXED else (args, kwargs)
        tensors = list(_tensors(given))
        here = [self.device.has(tensor) for tensor in tensors]
        if any(here) and name not in _MAY_MIX:
            strangers = [t for t, on in zip(tensors, here, strict=True) if not on and t.dim()]
            if strangers:
                raise RuntimeError(f"Expected all tensors to be on the same device: {name}, {strangers[0].shape}")
            generator = kwargs.get("generator")
            if generator is not None and generator.device.type != "cuda":
                raise RuntimeError("Expected a 'cuda' device type for generator")
        if name == "aten::copy_" and here == [True, False]:
            waits = not (kwargs.get("non_blocking") or args[2:3] == (True,))
            if not waits and not self.device.is_pinned(tensors[1]):
                raise RuntimeError("a copy that is not waited for, from memory that is not pinned")
            self.device.copies += not waits
        result = function(*args, **kwargs)
        # The backward pass makes tensors of its own, like the gradients that it runs on.
        on_device = any(here) or (not tensors and torch._C._current_graph_task_id() != -1)
        if on_device and name not in _MAY_MIX:
            for value in _tensors(result):
                self.device.put(value)
        return result


def _tensors(value) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if not value.is_meta:
            yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
