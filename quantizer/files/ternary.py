"""The file format ternary_v1: FLUX in safetensors, with the block Linears as trits.

A ternary Linear X of logical shape [N, K], the sum of P terms, 1 or 2, with G = P * ceil(K/128) groups of inputs:

    X.weight        uint8 [G, N, 32] (packing planes32) or uint8 [N, P * ceil(K/5)] (base3); see ops/packing.py
    X.weight_scale  fp32 [N], or bf16 / fp16 / fp32 [G, N]
    X.weight_group  uint8 [G, N] of 1..127, optional beside scales [N]; the scale of row n and group j is then
                    weight_scale[n] * weight_group[j, n]
    X.weight_down   bf16 [r, K], and X.weight_up bf16 [N, r], optional: W = ternary + up @ down
    X.weight_column bf16 or fp32 [K], optional: W = trits * scales * column[k] (+ up @ down)
    X.comfy_quant   uint8, JSON: {"format": "ternary_v1", "packing": ..., "group_size": 128, "shape": [N, K]}, and
                    "terms": 2 where there are two, "full_precision_matrix_mult": true where 8-bit activations lose
                    too much

Everything else is dense (fp32, fp16 or bf16) under its own name. The header's metadata informs people and is not needed
to decode. Files of the mixed profile have some Linears in ComfyUI's own 8-bit format beside the ternary ones:

    X.weight        int8 [N, K], X.weight_scale fp32 [N, 1], X.comfy_quant {"format": "int8_tensorwise"}
"""

import contextlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ...ops import TernaryWeight
from ...ops.packing import pack_base3
from ..threads import single_threaded_pool
from .architecture import Architecture, canonical, detect
from .checkpoint import Checkpoint, digest
from .checks import check_dense, check_int8, check_values, is_int8
from .container import FormatError, TensorFile, TensorWriter, checksums_of, create
from .identity import find_prefix, identify
from .layer import PARTS, SUFFIXES, Get, LayerPlan, chunks, read_plan, read_weight
from .sources.encodings import check_finite
from .sources.source import Source, open_source

_LOOKED_AT = 8  # Linears by which a file is compared with its original
_UNLIKE = 1.0  # relative error of weights; those of another model have about 1.3, ternary ones of their own 0.4 to 0.6


@dataclass(frozen=True)
class TernaryWriter:
    """Writes the planned layers and dense tensors of a ternary file, in any order; made by `create_ternary`."""

    tensors: TensorWriter
    layers: Mapping[str, LayerPlan]

    @property
    def metadata(self) -> dict[str, str]:
        """The header's metadata; values may be replaced until the end, within the room planned for them."""
        return self.tensors.metadata

    def dense(self, name: str, tensor: Tensor) -> None:
        self.tensors.write(name, tensor)

    def layer(self, name: str, weight: TernaryWeight) -> None:
        plan = self.layers[name]
        if LayerPlan.of(weight, plan.packing) != plan:
            raise ValueError(f"{name}: {LayerPlan.of(weight, plan.packing)} where {plan} was planned")
        if plan.packing == "planes32":
            self.tensors.write(f"{name}.weight", weight.trits)
        else:
            self._base3(f"{name}.weight", weight, plan)
        for field, tensor in weight.tensors.items():
            if field != "trits":
                self.tensors.write(f"{name}.{SUFFIXES[field]}", tensor)
        self.tensors.write(f"{name}.comfy_quant", plan.comfy_quant)

    def _base3(self, key: str, weight: TernaryWeight, plan: LayerPlan) -> None:
        def convert(rows: slice) -> Tensor:
            return pack_base3(weight.rows(rows.start, rows.stop).codes(), plan.terms).cpu().flatten()

        position = 0
        with single_threaded_pool() as pool:
            for packed in pool.map(convert, chunks(plan.shape)):
                self.tensors.write_bytes(key, packed.numpy(), position)
                position += len(packed)


@contextlib.contextmanager
def create_ternary(
    path: str | os.PathLike,
    layers: Mapping[str, LayerPlan],
    dense: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str],
    *,
    header_room: int = 0,
    overwrite: bool = False,
) -> Iterator[TernaryWriter]:
    """Create a ternary file atomically: all `layers` and `dense` tensors must be written before the block ends.

    `header_room`: bytes kept for metadata that is only known at the end. OSError where the file cannot be written.
    """
    plan = dict(dense)
    for name, layer in layers.items():
        plan |= {f"{name}.{part}": spec for part, spec in layer.tensors.items()}
        plan[f"{name}.comfy_quant"] = (torch.uint8, tuple(layer.comfy_quant.shape))
    with create(path, plan, metadata, header_room=header_room, overwrite=overwrite) as tensors:
        yield TernaryWriter(tensors, layers)


def write_ternary(
    path: str | os.PathLike,
    layers: Mapping[str, LayerPlan],
    weight: Callable[[str], TernaryWeight],
    dense: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    overwrite: bool = False,
) -> None:
    """Write a ternary file atomically, of layers that `weight` gives by name, one at a time, and tensors in memory."""
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in dense.items()}
    with create_ternary(path, layers, specs, metadata, overwrite=overwrite) as writer:
        for name in layers:
            writer.layer(name, weight(name))
        for name, tensor in dense.items():
            writer.dense(name, tensor)


@dataclass(frozen=True)
class TernaryFile:
    """A checked ternary file, memory-mapped. Names are BFL's, without the file's prefix."""

    file: TensorFile
    prefix: str
    layers: dict[str, LayerPlan]
    dense: dict[str, str]  # name -> key in the file

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def metadata(self) -> dict[str, str]:
        return self.file.header.metadata

    @cached_property
    def fingerprint(self) -> str:
        """Tells files apart without reading all of them: metadata, layers, and checksums or what the middle of every
        tensor holds.
        """
        said = {key: value for key, value in self.metadata.items() if key != "modelspec.date"}
        checksums = checksums_of(self.file.header)
        if checksums is not None:
            held: object = checksums.tensors
        else:
            middles = {key: self.file.bytes(key) for key in self.file.entries}
            held = {key: zlib.crc32(data[len(data) // 2 :][:4096].tobytes()) for key, data in middles.items()}
        return digest(json.dumps([said, held], sort_keys=True).encode())

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The logical shape of every parameter, as a dense checkpoint would have it."""
        shapes = {name: self.file.entries[key].shape for name, key in self.dense.items()}
        return shapes | {f"{name}.weight": layer.shape for name, layer in self.layers.items()}

    @cached_property
    def architecture(self) -> Architecture:
        """Raises FormatError where the file is not a whole FLUX transformer."""
        try:
            return detect(self.shapes)
        except ValueError as error:
            raise FormatError(self.path, str(error)) from None

    def tensor(self, name: str) -> Tensor:
        """A dense tensor, memory-mapped."""
        return self.file.tensor(self.dense[name])

    @cached_property
    def int8(self) -> tuple[str, ...]:
        """The Linears in ComfyUI's 8-bit format."""
        return tuple(name.removesuffix(".comfy_quant") for name in self.dense if name.endswith(".comfy_quant"))

    @cached_property
    def keys(self) -> set[str]:
        """The keys in the file of everything that is the model's."""
        parts = {f"{self.prefix}{name}.{part}" for name in self.layers for part in PARTS}
        return set(self.dense.values()) | (parts & self.file.entries.keys())

    @property
    def ignored(self) -> int:
        """How many other tensors the file has."""
        return len(self.file.entries) - len(self.keys)

    def parameter(self, name: str) -> Tensor:
        """A parameter as a dense tensor; ternary and 8-bit weights are decoded to fp32."""
        layer = name.removesuffix(".weight")
        if layer in self.layers and layer != name:
            return self.weight(layer).dequantize()
        return self.tensor(name).float() * self.tensor(f"{name}_scale") if layer in self.int8 else self.tensor(name)

    def weight(self, name: str) -> TernaryWeight:
        """The weight of a ternary Linear: memory-mapped, except that base3 trits are unpacked to planes32."""
        return read_weight(_tensors_of(self.file, f"{self.prefix}{name}"), self.layers[name])


def check_original(file: "TernaryFile", original: Checkpoint) -> None:
    """Raise ValueError where a ternary file cannot be made from this checkpoint: of another shape, or, unless it was
    made elsewhere and trained there, without likeness in the middle rows of some Linears.
    """
    ours, theirs = file.architecture, original.architecture
    if ours != theirs:
        raise ValueError(
            f"{file.path} is {ours.name} of {ours.hidden} channels and {ours.depth} + {ours.depth_single} blocks, and "
            f"{original.path} {theirs.name} of {theirs.hidden} channels and {theirs.depth} + {theirs.depth_single}: "
            "give the checkpoint that it was made from"
        )
    if file.metadata.get("ternary.method") in (None, "import"):
        return
    names = list(file.layers)
    wrong = power = 0.0
    for name in names[:: max(1, len(names) // _LOOKED_AT)]:
        middle = file.layers[name].shape[0] // 2
        row = original.rows(f"{name}.weight", middle, middle + 1).float()
        wrong += float((file.weight(name).rows(middle, middle + 1).dequantize() - row).square().sum())
        power += float(row.square().sum())
    if wrong > _UNLIKE**2 * power:
        raise ValueError(
            f"{file.path} was not made from {original.path}, but from a model with other weights "
            f"({file.metadata.get('ternary.source', 'unknown'):.80}): give that one"
        )


def open_ternary(source: str | os.PathLike | TensorFile | Source, check_codes: bool = True) -> TernaryFile:
    """Open a ternary file and check it: every key, dtype, shape and JSON field of the model, then (`check_codes`) every
    trit, scale and dense value. What else is in the file is counted.

    `source`: its path, or the file where it is open already. Nothing is copied. Raises FormatError naming the file, the
    key and the remedy; for another kind of file, what it is.
    """
    file = _single(source)
    prefix = find_prefix(file.entries) or ""
    keys = [key for key in file.entries if key.startswith(prefix)]
    quantized = [key.removesuffix(".comfy_quant") for key in keys if key.endswith(".comfy_quant")]
    int8 = dict.fromkeys(key for key in quantized if is_int8(file, f"{key}.comfy_quant"))
    names = [key.removeprefix(prefix) for key in quantized if key not in int8]
    if not names or (find_prefix(file.entries) is not None and identify(file).kind != "ternary"):
        raise FormatError(file.path, identify(file).sentence)
    layers = {}
    for name in names:
        key = f"{prefix}{name}"
        layers[name] = read_plan(_tensors_of(file, key), file.path, key)
    parts = {f"{prefix}{name}.{part}" for name in names for part in PARTS}
    dense = {canonical(key.removeprefix(prefix)): key for key in keys if key not in parts}
    for name in dense:
        layer, _, part = name.rpartition(".")
        if layer in layers and part != "bias":
            problem = (
                "this version knows no such part of a ternary layer, and would decode it wrongly; update this pack"
            )
            raise FormatError(file.path, problem, dense[name])
    eight_bit = {f"{key}.{part}" for key in int8 for part in ("weight", "weight_scale", "comfy_quant")}
    layers, dense = _own(layers, dense, file, eight_bit)
    floats = [key for key in dense.values() if key not in eight_bit]
    for key in floats:
        check_dense(file, key)
    for key in int8.keys() & {key.removesuffix(".comfy_quant") for key in dense.values()}:
        check_int8(file, key)
    if check_codes:
        with single_threaded_pool() as pool:
            for _ in pool.map(lambda key: check_finite(file.tensor(key), file.path, key), floats):
                pass
            for _ in pool.map(lambda name: check_values(file, f"{prefix}{name}", layers[name]), layers):
                pass
    return TernaryFile(file, prefix, layers, dense)


def _single(source: str | os.PathLike | TensorFile | Source) -> TensorFile:
    """The one file of a source. Raises FormatError for others, which are not ternary."""
    if isinstance(source, TensorFile):
        return source
    opened = source if isinstance(source, Source) else open_source(source)
    file, *others = opened.files
    if others or not isinstance(file, TensorFile):
        raise FormatError(opened.path, identify(opened).sentence)
    return file


def _own(layers: dict, dense: dict, file: TensorFile, eight_bit: set[str]) -> tuple[dict, dict]:
    """Layers and dense tensors of the model alone, where all of it is there."""
    shapes = {name: file.entries[key].shape for name, key in dense.items()}
    shapes |= {f"{name}.weight": layer.shape for name, layer in layers.items()}
    try:
        own = detect(shapes).shapes
    except ValueError:
        return layers, dense
    beside = {name for name, key in dense.items() if key in eight_bit and f"{name.rpartition('.')[0]}.weight" in own}
    layers = {name: layer for name, layer in layers.items() if f"{name}.weight" in own}
    return layers, {name: key for name, key in dense.items() if name in own or name in beside}


def _tensors_of(file: TensorFile, key: str) -> Get:
    return lambda suffix: file.tensor(f"{key}.{suffix}") if f"{key}.{suffix}" in file.entries else None
