"""The file format ternary_v1: FLUX in safetensors, with the block Linears as trits.

A ternary Linear X of logical shape [N, K] with P trit planes, 1 or 2, and G = P * ceil(K/128) groups of inputs:

    X.weight        uint8 [G, N, 32] (packing planes32) or uint8 [N, P * ceil(K/5)] (base3); see ops/packing.py
    X.weight_scale  fp32 [N], or bf16 / fp16 / fp32 [G, N]
    X.weight_group  uint8 [G, N] of 1..127, optional beside scales [N]; the scale of row n and group j is then
                    weight_scale[n] * weight_group[j, n]
    X.weight_down   bf16 [r, K], and X.weight_up bf16 [N, r], optional: W = ternary + up @ down
    X.comfy_quant   uint8, JSON: {"format": "ternary_v1", "packing": ..., "group_size": 128, "shape": [N, K]}, and
                    "planes": 2 where there are two

Everything else is dense (fp32, fp16 or bf16) under its own name. The header's metadata informs people and is not needed
to decode. Files of the mixed profile have some Linears in ComfyUI's own 8-bit format beside the ternary ones:

    X.weight        int8 [N, K], X.weight_scale fp32 [N, 1], X.comfy_quant {"format": "int8_tensorwise"}
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..ops import GROUP_SIZE, TernaryWeight
from ..ops.packing import (
    PACKINGS,
    blocks,
    first_invalid,
    pack_base3,
    pack_planes32,
    packed_shape,
    unpack_base3,
    unpack_planes32,
)
from ..ops.scales import MAX_MULTIPLIER
from .architecture import Architecture, canonical, detect
from .checkpoint import DENSE_DTYPES, find_prefix
from .container import DTYPE_NAMES, DTYPES, FormatError, TensorFile, TensorWriter, create

FORMAT = "ternary_v1"
INT8 = "int8_tensorwise"  # ComfyUI's name of its 8-bit format
PLANES = (1, 2)
SCALES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_REDO = "download or convert the file again"
_PARTS = ("weight", "weight_scale", "weight_group", "weight_down", "weight_up", "comfy_quant")
_ROWS = 1024  # rows converted at a time between the packings
_CHECKED = 1 << 20  # bytes checked at a time, within the caches


@dataclass(frozen=True)
class LayerPlan:
    """Which tensors a ternary Linear has in the file.

    scales: "integer" (row x integer group), "row" (row scales alone), or "bf16" / "fp16" / "fp32" (float group scales).
    rank: of the low-rank part, 0 for none. planes: trit planes, 1 or 2.
    """

    shape: tuple[int, int]
    packing: str = "planes32"
    scales: str = "integer"
    rank: int = 0
    planes: int = 1

    @classmethod
    def of(cls, weight: TernaryWeight, packing: str = "planes32") -> "LayerPlan":
        names = {dtype: name for name, dtype in SCALES.items()}
        per_row = "row" if weight.group is None else "integer"
        scales = per_row if weight.scale.ndim == 1 else names[weight.scale.dtype]
        return cls(weight.shape, packing, scales, 0 if weight.up is None else weight.up.shape[1], weight.planes)

    @property
    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Suffix -> dtype and shape, without comfy_quant."""
        n, k = self.shape
        groups = (self.planes * blocks(k), n)
        parts = {"weight": (torch.uint8, packed_shape(self.shape, self.packing, self.planes))}
        parts["weight_scale"] = (SCALES[self.scales], groups) if self.scales in SCALES else (torch.float32, (n,))
        if self.scales == "integer":
            parts["weight_group"] = (torch.uint8, groups)
        if self.rank:
            parts |= {"weight_down": (torch.bfloat16, (self.rank, k)), "weight_up": (torch.bfloat16, (n, self.rank))}
        return parts

    @property
    def comfy_quant(self) -> Tensor:
        """The JSON that says how to decode, uint8, padded with blanks to a multiple of 8 bytes."""
        fields = {"format": FORMAT, "packing": self.packing, "group_size": GROUP_SIZE, "shape": self.shape}
        text = json.dumps(fields if self.planes == 1 else fields | {"planes": self.planes})
        return torch.frombuffer(bytearray(text.ljust(-(-len(text) // 8) * 8).encode()), dtype=torch.uint8)

    @property
    def nbytes(self) -> int:
        parts = self.tensors.values()
        return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in parts) + self.comfy_quant.numel()


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
            n, row_bytes = packed_shape(plan.shape, plan.packing, plan.planes)
            for start in range(0, n, _ROWS):
                rows = pack_base3(weight.rows(start, start + _ROWS).codes(), plan.planes)
                self.tensors.write_bytes(f"{name}.weight", rows.cpu().flatten().numpy(), start * row_bytes)
        parts = {"scale": weight.scale, "group": weight.group, "down": weight.down, "up": weight.up}
        for part, tensor in parts.items():
            if tensor is not None:
                self.tensors.write(f"{name}.weight_{part}", tensor)
        self.tensors.write(f"{name}.comfy_quant", plan.comfy_quant)


@contextlib.contextmanager
def create_ternary(
    path: str | os.PathLike,
    layers: Mapping[str, LayerPlan],
    dense: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str],
    room: int = 0,
    overwrite: bool = False,
) -> Iterator[TernaryWriter]:
    """Create a ternary file atomically: all `layers` and `dense` tensors must be written before the block ends.

    `room`: bytes kept for metadata that is only known at the end. Raises OSError where the file cannot be written.
    """
    plan = dict(dense)
    for name, layer in layers.items():
        plan |= {f"{name}.{part}": spec for part, spec in layer.tensors.items()}
        plan[f"{name}.comfy_quant"] = (torch.uint8, tuple(layer.comfy_quant.shape))
    with create(path, plan, metadata, room, overwrite) as tensors:
        yield TernaryWriter(tensors, layers)


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

    def parameter(self, name: str) -> Tensor:
        """A parameter as a dense tensor; ternary and 8-bit weights are decoded to fp32."""
        layer = name.removesuffix(".weight")
        if layer in self.layers and layer != name:
            return self.weight(layer).dequantize()
        return self.tensor(name).float() * self.tensor(f"{name}_scale") if layer in self.int8 else self.tensor(name)

    def weight(self, name: str) -> TernaryWeight:
        """The weight of a ternary Linear: memory-mapped, except that base3 trits are unpacked to planes32."""
        layer = self.layers[name]
        parts = {p.removeprefix("weight_"): self.file.tensor(f"{self.prefix}{name}.{p}") for p in layer.tensors}
        trits = parts.pop("weight")
        return TernaryWeight(planes32(trits, layer), shape=layer.shape, **parts)

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor under its key of the format, as planes32: what ComfyUI's loader takes."""
        state = {name: self.tensor(name) for name in self.dense}
        for name in self.layers:
            weight = self.weight(name)
            parts = {"weight" if part == "trits" else f"weight_{part}": t for part, t in weight.tensors.items()}
            state |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
            state[f"{name}.comfy_quant"] = LayerPlan.of(weight).comfy_quant
        return state


def planes32(packed: Tensor, layer: LayerPlan) -> Tensor:
    """A layer's packed trits as planes32, uint8 [planes * ceil(K/128), N, 32]."""
    if layer.packing == "planes32":
        return packed
    n, k = layer.shape
    trits = torch.empty(packed_shape(layer.shape, "planes32", layer.planes), dtype=torch.uint8)
    for start in range(0, n, _ROWS):
        rows = slice(start, start + _ROWS)
        trits[:, rows] = pack_planes32(unpack_base3(packed[rows], k), layer.planes)
    return trits


def open_ternary(path: str | os.PathLike, check_codes: bool = True) -> TernaryFile:
    """Open a ternary file and check it: every key, dtype, shape and JSON field, then (`check_codes`) trits and scales.

    Nothing is copied. Raises FormatError naming the file, the key and the remedy.
    """
    file = TensorFile(path)
    prefix = find_prefix(file.entries)
    keys = [key for key in file.entries if key.startswith(prefix)]
    quantized = [key.removesuffix(".comfy_quant") for key in keys if key.endswith(".comfy_quant")]
    int8 = [key for key in quantized if _is_int8(file, f"{key}.comfy_quant")]
    names = [key.removeprefix(prefix) for key in quantized if key not in int8]
    if not names:
        raise FormatError(path, "this is not a ternary file: it has no .comfy_quant keys; make one with `round`")
    layers = {name: _read_layer(file, f"{prefix}{name}") for name in names}
    parts = {f"{prefix}{name}.{part}" for name in names for part in _PARTS}
    dense = {canonical(key.removeprefix(prefix)): key for key in keys if key not in parts}
    eight_bit = {f"{key}.{part}" for key in int8 for part in ("weight", "weight_scale", "comfy_quant")}
    for key in dense.values():
        if key not in eight_bit:
            _check_dense(file, key)
    for key in int8:
        _check_int8(file, key)
    if check_codes:
        for name, layer in layers.items():
            _check_values(file, f"{prefix}{name}", layer)
    return TernaryFile(file, prefix, layers, dense)


def _read_layer(file: TensorFile, key: str) -> LayerPlan:
    packing, shape, planes = _read_json(file, f"{key}.comfy_quant")
    entries = file.entries
    for part in ("weight", "weight_scale"):
        if f"{key}.{part}" not in entries:
            raise FormatError(file.path, f"the tensor is missing; {_REDO}", f"{key}.{part}")
    scale = entries[f"{key}.weight_scale"]
    scales = next((name for name, dtype in SCALES.items() if DTYPES.get(scale.dtype) == dtype), None)
    if scales is None:
        problem = f"scales of dtype {scale.dtype}; fp32, fp16 or bf16 is expected; {_REDO}"
        raise FormatError(file.path, problem, f"{key}.weight_scale")
    if len(scale.shape) == 1:
        scales = "integer" if f"{key}.weight_group" in entries else "row"
    down = entries.get(f"{key}.weight_down")
    rank = 0 if down is None or not down.shape else down.shape[0]
    plan = LayerPlan(shape, packing, scales, rank, planes)
    for part in _PARTS[:-1]:
        entry, expected = entries.get(f"{key}.{part}"), plan.tensors.get(part)
        if entry is None and expected is None:
            continue
        if entry is None or expected is None:
            problem = "is missing beside" if entry is None else "does not belong beside"
            raise FormatError(file.path, f"the tensor {problem} the layer's other tensors; {_REDO}", f"{key}.{part}")
        if (DTYPES.get(entry.dtype), entry.shape) != expected:
            dtype, shape = expected
            problem = f"{entry.dtype} {list(entry.shape)} where {DTYPE_NAMES[dtype]} {list(shape)} is expected; {_REDO}"
            raise FormatError(file.path, problem, f"{key}.{part}")
    return plan


def _read_json(file: TensorFile, key: str) -> tuple[str, tuple[int, int], int]:
    """Packing, logical shape and trit planes."""
    if file.entries[key].dtype != "U8":
        raise FormatError(file.path, f"dtype {file.entries[key].dtype} where uint8 JSON is expected; {_REDO}", key)
    try:
        fields = json.loads(file.bytes(key).tobytes())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise FormatError(file.path, f"the JSON cannot be read ({error}); {_REDO}", key) from None
    if not isinstance(fields, dict):
        raise FormatError(file.path, f"the JSON is no object; {_REDO}", key)
    version = fields.get("format")
    if version != FORMAT:
        newer = isinstance(version, str) and version.startswith("ternary_v")
        remedy = "update this pack, or convert the checkpoint again" if newer else "load it with ComfyUI's own loader"
        raise FormatError(file.path, f"format {version!r}, and this version reads {FORMAT!r}; {remedy}", key)
    if fields.get("packing") not in PACKINGS:
        problem = f"packing {fields.get('packing')!r}; known: {', '.join(PACKINGS)}; update this pack"
        raise FormatError(file.path, problem, key)
    if fields.get("group_size") != GROUP_SIZE:
        problem = f"group size {fields.get('group_size')!r}, and this version reads {GROUP_SIZE}; {_REDO}"
        raise FormatError(file.path, problem, key)
    planes = fields.get("planes", 1)
    if type(planes) is not int or planes not in PLANES:
        problem = f"{planes!r} trit planes, and this version reads {' and '.join(map(str, PLANES))}; update this pack"
        raise FormatError(file.path, problem, key)
    match fields.get("shape"):
        case [int(n), int(k)] if n > 0 and k > 0:
            return fields["packing"], (n, k), planes
    raise FormatError(file.path, f"shape {fields.get('shape')!r} is not [outputs, inputs]; {_REDO}", key)


def _check_dense(file: TensorFile, key: str) -> None:
    dtype = file.entries[key].dtype
    if DTYPES.get(dtype) in DENSE_DTYPES:
        return
    if dtype == "U8" and key.endswith(".weight"):
        problem = f"packed weights without {key.removesuffix('weight')}comfy_quant, which says how to decode them"
        raise FormatError(file.path, f"{problem}; {_REDO}", key)
    raise FormatError(file.path, f"a dense tensor of dtype {dtype}; fp32, fp16 or bf16 is expected; {_REDO}", key)


def _is_int8(file: TensorFile, key: str) -> bool:
    return file.entries[key].dtype == "U8" and f'"{INT8}"'.encode() in file.bytes(key)[:4096].tobytes()


def _check_int8(file: TensorFile, key: str) -> None:
    weight, scale = (file.entries.get(f"{key}.{part}") for part in ("weight", "weight_scale"))
    if weight is None or weight.dtype != "I8" or len(weight.shape) != 2:
        raise FormatError(file.path, f"{INT8} needs an int8 matrix here; {_REDO}", f"{key}.weight")
    if scale is None or (scale.dtype, scale.shape) != ("F32", (weight.shape[0], 1)):
        problem = f"{INT8} needs one fp32 scale for each of the {weight.shape[0]} outputs here; {_REDO}"
        raise FormatError(file.path, problem, f"{key}.weight_scale")


def _check_values(file: TensorFile, key: str, layer: LayerPlan) -> None:
    packed = file.tensor(f"{key}.weight").flatten()
    for start in range(0, packed.numel(), _CHECKED):
        invalid = first_invalid(packed[start : start + _CHECKED], layer.packing)
        if invalid is not None:
            problem = f"byte {start + invalid} holds no valid {layer.packing} code: the file is damaged; {_REDO}"
            raise FormatError(file.path, problem, f"{key}.weight")
    if _padding(file.tensor(f"{key}.weight"), layer).any():
        raise FormatError(file.path, f"the padding after the last input is not zero; {_REDO}", f"{key}.weight")
    if not file.tensor(f"{key}.weight_scale").isfinite().all():
        raise FormatError(file.path, f"a scale is not finite; {_REDO}", f"{key}.weight_scale")
    if layer.scales == "integer":
        group = file.tensor(f"{key}.weight_group")
        if int(group.min()) < 1 or int(group.max()) > MAX_MULTIPLIER:
            found = f"{int(group.min())}..{int(group.max())}"
            problem = f"multipliers {found} where 1..{MAX_MULTIPLIER} is expected; {_REDO}"
            raise FormatError(file.path, problem, f"{key}.weight_group")


def _padding(packed: Tensor, layer: LayerPlan) -> Tensor:
    """The trits after the last input of each plane, int8 [planes * N, ...]."""
    k = layer.shape[1]
    if layer.packing == "planes32":
        last = unpack_planes32(packed[blocks(k) - 1 :: blocks(k)], GROUP_SIZE)
        return last.view(-1, GROUP_SIZE)[:, (k - 1) % GROUP_SIZE + 1 :]
    last = packed.view(-1, packed.shape[1] // layer.planes)[:, -1:]
    return unpack_base3(last.contiguous(), 5)[:, (k - 1) % 5 + 1 :]
