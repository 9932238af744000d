"""Import a ternary model made elsewhere: one Linear at a time, nothing rounded."""

import os
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from ...ops import TernaryWeight
from ...ops.packing import groups_of, pack_planes32
from ..files import metadata
from ..files.architecture import Architecture, detect
from ..files.atomic import check_target
from ..files.container import FormatError
from ..files.hashing import hashing
from ..files.identity import find_prefix, identify, layout
from ..files.layer import SCALES, LayerPlan
from ..files.sources.encodings import FLOATS, check_finite
from ..files.sources.locate import PICKLES
from ..files.sources.names import Part, parts_shape
from ..files.ternary import create_ternary
from ..interrupts import held_back
from ..threads import single_threaded_pool
from .locate import configuration, locate
from .packagings import Packaging, packaging_of
from .tensors import PickledFile, SafetensorsFiles, Tensors

METHOD = "import"
_ROWS = 512  # converted at a time
_BASIS = re.compile(r"hadamard|rotation|rotated|convrot|quarot|spinquant|fwht", re.IGNORECASE)
_CERTAIN = 4096  # weights without a zero among them are not ternary


@dataclass(frozen=True)
class Source:
    """A ternary FLUX in another form."""

    packaging: Packaging
    architecture: Architecture
    parts: dict[str, tuple[Part, ...]]  # BFL's parameter -> the rows of the source's keys that it consists of
    files: tuple[Path, ...]

    @property
    def path(self) -> Path:
        return self.files[0]

    @property
    def title(self) -> str:
        """The name of the folder as it was downloaded, or of the file."""
        folder = self.path.parent
        if folder.name.startswith("transformer") and folder.parent.name:
            folder = folder.parent
        return folder.name if self.path.stem in ("state_dict", "diffusion_pytorch_model") else self.path.stem


@dataclass
class Summary:
    base_model: str
    packaging: str
    linears: int
    weights: int
    dense: int
    source_bytes: int
    target_bytes: int = 0
    seconds: float = 0.0
    scale_errors: dict[str, float] = field(default_factory=dict)  # of the row x integer form that int8 kernels need


def open_source(path: str | os.PathLike) -> Source:
    """Find and check a ternary model: its packaging, names and shapes; no weight is read yet.

    path: a file, or a folder as it was downloaded (see `locate`). Raises FormatError, OSError, ValueError.
    """
    files = locate(path)
    said = configuration(files)
    pickled = files[0].suffix.lower() in PICKLES
    tensors: Tensors = PickledFile(files[0]) if pickled else SafetensorsFiles(files)
    _refuse_other_basis(files, said, tensors)
    packaging = packaging_of(tensors, said)
    shapes: dict[str, tuple[int, ...]] = {f"{linear}.weight": shape for linear, shape in packaging.linears.items()}
    shapes |= {key: shape for key, shape in tensors.shapes.items() if key not in packaging.keys}
    try:
        parts = layout(shapes, find_prefix(shapes)) or {}
        architecture = detect({name: parts_shape(of, shapes) for name, of in parts.items()})
    except ValueError as error:
        problem = str(error)
        if isinstance(tensors, SafetensorsFiles):
            identity = identify(tensors.source)
            problem = problem if identity.kind in ("incomplete", "other") else identity.sentence
        raise FormatError(files[0], problem) from None
    source = Source(packaging, architecture, {name: parts[name] for name in architecture.shapes}, files)
    _check_dense(source)
    return source


def _refuse_other_basis(files: tuple[Path, ...], said: dict, tensors: Tensors) -> None:
    words = [*said, *(str(value) for value in said.values()), *tensors.shapes]
    words += [*tensors.metadata, *tensors.metadata.values()]
    if found := next((match[0] for word in words if (match := _BASIS.search(word))), None):
        problem = f"its weights are in another basis, as those of Bonsai-2 are: it speaks of {found!r}"
        raise FormatError(files[0], f"{problem}, and would decode to noise; FLUX's own basis is imported")


def _check_dense(source: Source) -> None:
    tensors, linears = source.packaging.tensors, {f"{name}.weight" for name in source.architecture.linears}
    for name, parts in source.parts.items():
        for key in dict.fromkeys(part.key for part in parts):
            if key.removesuffix(".weight") in source.packaging.linears:
                if name not in linears:
                    problem = "this tensor is packed, and FLUX's tensors outside the blocks are dense here"
                    raise FormatError(tensors.path, f"{problem}; update this pack", key)
            elif source.packaging.linears and name in linears:
                problem = f"this Linear is not packed, and those of {source.packaging.name} are"
                raise FormatError(tensors.path, f"{problem}; download it again", key)
            elif tensors.dtypes[key] not in FLOATS:
                problem = f"the tensor is {tensors.dtypes[key]}; bf16, fp16 or fp32 is needed"
                raise FormatError(tensors.path_of(key), problem, key)


def import_model(
    source: str | os.PathLike | Source,
    target: str | os.PathLike,
    *,
    packing: str = "planes32",
    overwrite: bool = False,
    on_progress: Callable[[int], object] = lambda weights: None,
) -> Summary:
    """Write a ternary model made elsewhere as a ternary file; codes, scales and dense tensors keep their values.

    Scales keep their dtype, except that fp32 scales which are bf16 numbers become bf16; dense tensors keep theirs.
    `on_progress` is called with the number of weights done since the last call. Raises FormatError where a Linear is
    not exactly ternary or a value not finite, OSError, and ValueError where both are the same file.
    """
    started = time.monotonic()
    source = source if isinstance(source, Source) else open_source(source)
    check_target(target, 0, overwrite, source.files)
    arch, tensors = source.architecture, source.packaging.tensors
    layers = {name: LayerPlan(shape, packing, _scale_name(source, name)) for name, shape in arch.linear_shapes.items()}
    weights = {f"{name}.weight" for name in layers}
    dense = {
        name: (_common(FLOATS[tensors.dtypes[part.key]] for part in source.parts[name]), shape)
        for name, shape in arch.shapes.items()
        if name not in weights
    }
    summary = Summary(
        arch.name,
        source.packaging.name,
        len(layers),
        sum(n * k for n, k in arch.linear_shapes.values()),
        len(dense),
        sum(path.stat().st_size for path in source.files),
    )
    with held_back() as let_through, hashing(source.files) as digest:
        with create_ternary(target, layers, dense, _metadata(source, packing), overwrite=overwrite) as writer:
            for name in dense:
                writer.dense(name, _dense(source, name))
                tensors.release()
                let_through()
            with single_threaded_pool() as pool:
                for name, plan in layers.items():
                    weight = _weight(source, name, plan, pool, on_progress)
                    summary.scale_errors[name] = weight.with_integer_groups()[1]
                    writer.layer(name, weight)
                    tensors.release()
                    let_through()
            writer.metadata["ternary.source_sha256"] = digest()
    summary.target_bytes, summary.seconds = os.path.getsize(target), time.monotonic() - started
    return summary


def _metadata(source: Source, packing: str) -> dict[str, str]:
    theirs = {"modelspec.title": source.title} | dict(source.packaging.tensors.metadata)
    settings = {"packaging": source.packaging.name, "packing": packing}
    return metadata.build(source.architecture, source.path, theirs, method=METHOD, settings=settings, errors={})


def _common(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The smallest dtype that holds the values of all of these."""
    return reduce(torch.promote_types, dtypes)


def _scale_name(source: Source, name: str) -> str:
    linears = [part.key.removesuffix(".weight") for part in source.parts[f"{name}.weight"]]
    dtype = _common(source.packaging.scale_dtype(linear) for linear in linears)
    return next(scales for scales, found in SCALES.items() if found == dtype)


def _dense(source: Source, name: str) -> Tensor:
    tensors, parts = source.packaging.tensors, source.parts[name]
    for key in dict.fromkeys(part.key for part in parts):
        check_finite(tensors.tensor(key), tensors.path_of(key), key)
    if len(parts) == 1:
        return tensors.tensor(parts[0].key)
    in_order = sorted(parts, key=lambda part: part.at)
    return torch.cat([tensors.rows(part.key, part.first, part.first + part.rows) for part in in_order])


def _weight(source: Source, name: str, plan: LayerPlan, pool: Executor, on_progress: Callable) -> TernaryWeight:
    """A ternary Linear with the rows of its parts, one below the other."""
    n, k = plan.shape
    trits = torch.empty(groups_of(k), n, 32, dtype=torch.uint8)
    scale = torch.empty(groups_of(k), n, dtype=SCALES[plan.scales])

    def convert(linear: str, start: int, stop: int, position: int) -> tuple[int, int]:
        """Puts some rows in their place; returns how many weights they are and how many of them zeros."""
        codes, scales = source.packaging.rows(linear, start, stop)
        place = slice(position, position + stop - start)
        trits[:, place], scale[:, place] = pack_planes32(codes), scales.t()
        return codes.numel(), codes.numel() - int(codes.count_nonzero())

    pieces = [
        (part.key.removesuffix(".weight"), part.first + i, part.first + min(i + _ROWS, part.rows), part.at + i)
        for part in source.parts[f"{name}.weight"]
        for i in range(0, part.rows, _ROWS)
    ]
    zeros = 0
    for count, empty in pool.map(lambda piece: convert(*piece), pieces):
        zeros += empty
        on_progress(count)
    if not zeros and n * k >= _CERTAIN:
        key = source.parts[f"{name}.weight"][0].key
        problem = "no weight is zero: this is a binary (1-bit) model, such as Bonsai Image's binary variant"
        raise FormatError(source.path, f"{problem}; ternary models are imported; download the ternary variant", key)
    return TernaryWeight(trits, scale, plan.shape)
