"""One ternary Linear as it is stored: which tensors it has, the JSON that says how to decode them, and reading both.

Files and state dicts are read by the same functions, from a `Get`: what gives the Linear's tensor for a suffix of its
key ("weight", "weight_scale", ..., "comfy_quant"), or None where there is none.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...ops import GROUP_SIZE, TernaryWeight
from ...ops.packing import PACKINGS, groups_of, pack_planes32, packed_shape, unpack_base3
from ..threads import single_threaded_pool
from .container import DTYPE_NAMES, FormatError

FORMAT = "ternary_v1"
INT8 = "int8_tensorwise"  # ComfyUI's name of its 8-bit format
TERMS = (1, 2)
FULL_PRECISION = "full_precision_matrix_mult"  # as ComfyUI names it
FIELDS = ("format", "packing", "group_size", "shape", "terms", FULL_PRECISION)  # of the JSON
SCALES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Field of TernaryWeight -> suffix of its key
SUFFIXES = {
    "trits": "weight",
    "scale": "weight_scale",
    "group": "weight_group",
    "down": "weight_down",
    "up": "weight_up",
    "column": "weight_column",
}
PARTS = (*SUFFIXES.values(), "comfy_quant")
REDO = "download or convert the file again"
_CHUNK = 1 << 20  # weights converted at a time between the packings, within the caches

Get = Callable[[str], Tensor | None]


@dataclass(frozen=True)
class LayerPlan:
    """Which tensors a ternary Linear has in the file.

    scales: "integer" (row x integer group), "row" (row scales alone), or "bf16" / "fp16" / "fp32" (float group scales).
    rank: of the low-rank part, 0 for none. terms: ternary matrices that are added, 1 or 2. columns: dtype of the column
    scales, "bf16" or "fp32", or "" for none. full_precision: as in `TernaryWeight`.
    """

    shape: tuple[int, int]
    packing: str = "planes32"
    scales: str = "integer"
    rank: int = 0
    terms: int = 1
    columns: str = ""
    full_precision: bool = False

    @classmethod
    def of(cls, weight: TernaryWeight, packing: str = "planes32") -> "LayerPlan":
        names = {dtype: name for name, dtype in SCALES.items()}
        per_row = "row" if weight.group is None else "integer"
        scales = per_row if weight.scale.ndim == 1 else names[weight.scale.dtype]
        rank = 0 if weight.up is None else weight.up.shape[1]
        columns = "" if weight.column is None else names[weight.column.dtype]
        return cls(weight.shape, packing, scales, rank, weight.terms, columns, weight.full_precision)

    @property
    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Suffix -> dtype and shape, without comfy_quant."""
        n, k = self.shape
        groups = (self.terms * groups_of(k), n)
        parts = {"weight": (torch.uint8, packed_shape(self.shape, self.packing, self.terms))}
        parts["weight_scale"] = (SCALES[self.scales], groups) if self.scales in SCALES else (torch.float32, (n,))
        if self.scales == "integer":
            parts["weight_group"] = (torch.uint8, groups)
        if self.rank:
            parts |= {"weight_down": (torch.bfloat16, (self.rank, k)), "weight_up": (torch.bfloat16, (n, self.rank))}
        if self.columns:
            parts["weight_column"] = (SCALES[self.columns], (k,))
        return parts

    @property
    def comfy_quant(self) -> Tensor:
        """The JSON that says how to decode, uint8, padded with blanks to a multiple of 8 bytes."""
        fields = {"format": FORMAT, "packing": self.packing, "group_size": GROUP_SIZE, "shape": self.shape}
        fields |= {"terms": self.terms} if self.terms > 1 else {}
        text = json.dumps(fields | ({FULL_PRECISION: True} if self.full_precision else {}))
        return torch.frombuffer(bytearray(text.ljust(-(-len(text) // 8) * 8).encode()), dtype=torch.uint8)

    @property
    def nbytes(self) -> int:
        parts = self.tensors.values()
        return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in parts) + self.comfy_quant.numel()


def read_plan(get: Get, where: str | os.PathLike, key: str) -> LayerPlan:
    """How a ternary Linear is stored, after every tensor and JSON field was checked (not the values of tensors).

    Raises FormatError, which names `where` and the tensor below `key`.
    """
    packing, shape, terms, full_precision = _read_json(get("comfy_quant"), where, f"{key}.comfy_quant")
    for suffix in ("weight", "weight_scale"):
        if get(suffix) is None:
            raise FormatError(where, f"the tensor is missing; {REDO}", f"{key}.{suffix}")
    scale = get("weight_scale")
    scales = next((name for name, dtype in SCALES.items() if scale.dtype == dtype), None)
    if scales is None:
        problem = f"scales of dtype {_named(scale.dtype)}; fp32, fp16 or bf16 is expected; {REDO}"
        raise FormatError(where, problem, f"{key}.weight_scale")
    if scale.ndim == 1:
        scales = "row" if get("weight_group") is None else "integer"
    down = get("weight_down")
    rank = 0 if down is None or not down.ndim else down.shape[0]
    column = get("weight_column")
    columns = "" if column is None else "bf16" if column.dtype == torch.bfloat16 else "fp32"
    plan = LayerPlan(shape, packing, scales, rank, terms, columns, full_precision)
    for suffix in SUFFIXES.values():
        tensor, expected = get(suffix), plan.tensors.get(suffix)
        if tensor is None and expected is None:
            continue
        if tensor is None or expected is None:
            problem = "is missing beside" if tensor is None else "does not belong beside"
            raise FormatError(where, f"the tensor {problem} the layer's other tensors; {REDO}", f"{key}.{suffix}")
        if (tensor.dtype, tuple(tensor.shape)) != expected:
            found, wanted = (f"{_named(dtype)} {list(s)}" for dtype, s in ((tensor.dtype, tensor.shape), expected))
            raise FormatError(where, f"{found} where {wanted} is expected; {REDO}", f"{key}.{suffix}")
    return plan


def read_weight(get: Get, plan: LayerPlan) -> TernaryWeight:
    """The weight of a Linear stored as planned; it shares its tensors' memory, except that base3 trits are unpacked."""
    parts = {field: get(suffix) for field, suffix in SUFFIXES.items() if suffix in plan.tensors}
    trits = planes32(parts.pop("trits"), plan)
    return TernaryWeight(trits, shape=plan.shape, full_precision=plan.full_precision, **parts)


def _named(dtype: torch.dtype) -> str:
    return DTYPE_NAMES.get(dtype, str(dtype))


def _read_json(entry: Tensor, where: str | os.PathLike, key: str) -> tuple[str, tuple[int, int], int, bool]:
    """Packing, logical shape, number of terms, and whether activations are to stay in full precision."""
    if entry.dtype != torch.uint8:
        raise FormatError(where, f"dtype {_named(entry.dtype)} where uint8 JSON is expected; {REDO}", key)
    try:
        fields = json.loads(entry.cpu().numpy().tobytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(where, f"the JSON cannot be read ({error}); {REDO}", key) from None
    if not isinstance(fields, dict):
        raise FormatError(where, f"the JSON is no object; {REDO}", key)
    version = fields.get("format")
    if version != FORMAT:
        newer = isinstance(version, str) and version.startswith("ternary_v")
        remedy = "update this pack, or convert the checkpoint again" if newer else "load it with ComfyUI's own loader"
        raise FormatError(where, f"format {version!r}, and this version reads {FORMAT!r}; {remedy}", key)
    if unknown := sorted(fields.keys() - set(FIELDS)):
        problem = f"the field {unknown[0]!r} is unknown to this version, which would decode the layer wrongly"
        raise FormatError(where, f"{problem}; update this pack", key)
    if fields.get("packing") not in PACKINGS:
        problem = f"packing {fields.get('packing')!r}; known: {', '.join(PACKINGS)}; update this pack"
        raise FormatError(where, problem, key)
    if fields.get("group_size") != GROUP_SIZE:
        problem = f"group size {fields.get('group_size')!r}, and this version reads {GROUP_SIZE}; {REDO}"
        raise FormatError(where, problem, key)
    terms = fields.get("terms", 1)
    if type(terms) is not int or terms not in TERMS:
        problem = f"{terms!r} terms, and this version reads {' and '.join(map(str, TERMS))}; update this pack"
        raise FormatError(where, problem, key)
    full_precision = fields.get(FULL_PRECISION, False)
    if type(full_precision) is not bool:
        raise FormatError(where, f"{FULL_PRECISION} is {full_precision!r}, not true or false; {REDO}", key)
    match fields.get("shape"):
        case [int(n), int(k)] if n > 0 and k > 0:
            return fields["packing"], (n, k), terms, full_precision
    raise FormatError(where, f"shape {fields.get('shape')!r} is not [outputs, inputs]; {REDO}", key)


def planes32(packed: Tensor, layer: LayerPlan) -> Tensor:
    """A layer's packed trits as planes32, uint8 [terms * ceil(K/128), N, 32]."""
    if layer.packing == "planes32":
        return packed
    # Threads do not inherit the inference mode, outside of which its tensors cannot be written to.
    trits = np.empty(packed_shape(layer.shape, "planes32", layer.terms), np.uint8)

    def convert(rows: slice) -> None:
        trits[:, rows] = pack_planes32(unpack_base3(packed[rows], layer.shape[1]), layer.terms).cpu().numpy()

    with single_threaded_pool() as pool:
        for _ in pool.map(convert, chunks(layer.shape)):
            pass
    return torch.from_numpy(trits)


def chunks(shape: tuple[int, int]) -> list[slice]:
    """The rows of a weight [N, K], as many at a time as are converted between the packings at once."""
    n, k = shape
    step = max(1, _CHUNK // k)
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]
