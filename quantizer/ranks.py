"""The processes of one run, as torchrun starts them: each has a rank and takes its share of the work.

All ranks make the same decisions in the same order, and see the same work folder. Rank 0 prints, and writes what is
written once. A process that is alone is rank 0 of 1, and everything here then does nothing. Sums come in the same bits
to every rank, so that what is computed from them stays the same everywhere.
"""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

_PATIENCE = timedelta(days=7)  # torchrun sees to ranks that died; those that wait may wait for hours
_FLAT = 1 << 24  # values that are summed at a time
_Value = TypeVar("_Value")
_Function = TypeVar("_Function", bound=Callable)
_store: Any = None  # what all ranks and torchrun see


def launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _group() -> Any:
    """torch.distributed, where this process has joined others; None in one that is alone."""
    distributed = sys.modules.get("torch.distributed")
    joined = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return distributed if joined else None


def rank() -> int:
    """Known before the others are joined."""
    group = _group()
    if group is None:
        return int(os.environ.get("RANK", 0)) if launched() else 0
    return group.get_rank()


def world() -> int:
    """Number of ranks."""
    group = _group()
    return 1 if group is None else group.get_world_size()


def local() -> tuple[int, int]:
    """Rank and number of ranks on this machine."""
    return (0, 1) if _group() is None else (int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))


def first() -> bool:
    """Whether this is the rank that prints, and writes what is written once."""
    return rank() == 0


def share(items: Sequence[_Value]) -> Sequence[_Value]:
    """Those of the items that are this rank's."""
    return items[rank() :: world()]


def _among_others(function: _Function) -> _Function:
    """Raise ConnectionError where another rank has gone."""

    @functools.wraps(function)
    def call(*arguments, **named):
        try:
            return function(*arguments, **named)
        except RuntimeError as error:
            if _group() is None or "out of memory" in str(error):
                raise
            text = f"another process of this run has ended ({str(error).splitlines()[0][:200]})"
            raise ConnectionError(text) from error

    return call  # type: ignore[return-value]


@_among_others
def join() -> None:
    """Meet the other processes of a run that torchrun started. What is on CPUs goes over gloo, on GPUs over NCCL."""
    global _store
    if not launched() or _group() is not None:
        return
    import torch
    from torch import distributed

    _store, number, count = next(distributed.rendezvous("env://", timeout=_PATIENCE))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and distributed.is_nccl_available() else "gloo"
    own = distributed.PrefixStore("ranks", _store)
    distributed.init_process_group(backend, store=own, rank=number, world_size=count, timeout=_PATIENCE)


def leave() -> None:
    """End what `join` began."""
    global _store
    group, _store = _group(), None
    if group is not None:
        with contextlib.suppress(RuntimeError):  # the others may be gone
            group.destroy_process_group()


def may_speak() -> bool:
    """Whether no other rank has said yet why the run ends: the first to ask may."""
    if not launched():
        return True
    if _store is None:
        return first()
    try:
        return _store.add("spoken", 1) == 1
    except RuntimeError:  # the store went with the rank that spoke
        return False


@_among_others
def wait() -> None:
    """For all ranks to come here."""
    if world() > 1:
        gather(None)


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """Rank 0 runs the block before the others do, who find what it has made."""
    if not first():
        wait()
    yield
    if first():
        wait()


def once(make: Callable[[], object]) -> None:
    """Rank 0 does it, while the others wait."""
    if first():
        make()
    wait()


@_among_others
def agree(value: _Value, owner: int = 0) -> _Value:
    """The owner's value, on every rank."""
    if world() == 1:
        return value
    values = [value if rank() == owner else None]
    _group().broadcast_object_list(values, owner)
    return values[0]  # type: ignore[return-value]


@_among_others
def gather(value: _Value) -> list[_Value]:
    """The values of all ranks, by rank."""
    values = [value] * world()
    if world() > 1:
        _group().all_gather_object(values, value)
    return values


@_among_others
def spread(tensors: Iterable["Tensor"], owner: int = 0) -> None:
    """Give every rank the owner's values of these tensors, in place."""
    for tensor in tensors if world() > 1 else ():
        _group().broadcast(tensor, owner)


def hand_out(tensors: "Mapping[str, Tensor] | None", owner: int, device) -> "dict[str, Tensor]":
    """The owner's tensors, by name, on a device of every rank; other ranks give None."""
    import torch

    kinds = {name: (tensor.dtype, tensor.shape) for name, tensor in (tensors or {}).items()}
    handed: dict[str, Tensor] = {}
    for name, (dtype, shape) in agree(kinds, owner).items():
        own = None if tensors is None else tensors[name].to(device).contiguous()
        handed[name] = torch.empty(shape, dtype=dtype, device=device) if own is None else own
    spread(handed.values(), owner)
    return handed


@_among_others
def add_up(tensors: Sequence["Tensor"], owner: int | None = None) -> None:
    """Sum each of these tensors over the ranks, in place: on the owner (elsewhere they are used up), or on all.

    Small ones travel together, in one flat tensor for each dtype.
    """
    import torch

    if world() == 1:
        return
    for together in _flat(tensors):
        alone = len(together) == 1 and together[0].is_contiguous()
        flat = together[0].view(-1) if alone else torch.cat([tensor.flatten() for tensor in together])
        if owner is None:
            _group().all_reduce(flat)
        else:
            _group().reduce(flat, owner)
        if not alone and owner in (None, rank()):
            parts = flat.split([tensor.numel() for tensor in together])
            torch._foreach_copy_(
                list(together), [part.view_as(tensor) for part, tensor in zip(parts, together, strict=True)]
            )


def _flat(tensors: Sequence["Tensor"]) -> Iterator[list["Tensor"]]:
    """Contiguous tensors of one dtype and device, with no more than `_FLAT` values together where there are several."""
    alike: dict[tuple, list[Tensor]] = {}
    for tensor in tensors:
        alike.setdefault((tensor.dtype, tensor.device, tensor.numel() > _FLAT), []).append(tensor)
    for (_, _, large), same in alike.items():
        portion: list[Tensor] = []
        for tensor in same:
            if portion and (large or sum(t.numel() for t in portion) + tensor.numel() > _FLAT):
                yield portion
                portion = []
            portion.append(tensor)
        yield portion
