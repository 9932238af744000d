"""Refusing damaged ternary files: every key, dtype, shape and JSON field, then every code and scale."""

import json

from torch import Tensor

from ...ops import GROUP_SIZE
from ...ops.packing import PACKINGS, first_invalid, groups_of, unpack_base3, unpack_planes32
from ...ops.scales import MAX_MULTIPLIER
from .checkpoint import DENSE_DTYPES
from .container import DTYPE_NAMES, DTYPES, FormatError, TensorFile
from .layer import FORMAT, INT8, PARTS, SCALES, TERMS, LayerPlan

REDO = "download or convert the file again"
_CHECKED = 1 << 20  # bytes checked at a time, within the caches


def read_layer(file: TensorFile, key: str) -> LayerPlan:
    packing, shape, terms = _read_json(file, f"{key}.comfy_quant")
    entries = file.entries
    for part in ("weight", "weight_scale"):
        if f"{key}.{part}" not in entries:
            raise FormatError(file.path, f"the tensor is missing; {REDO}", f"{key}.{part}")
    scale = entries[f"{key}.weight_scale"]
    scales = next((name for name, dtype in SCALES.items() if DTYPES.get(scale.dtype) == dtype), None)
    if scales is None:
        problem = f"scales of dtype {scale.dtype}; fp32, fp16 or bf16 is expected; {REDO}"
        raise FormatError(file.path, problem, f"{key}.weight_scale")
    if len(scale.shape) == 1:
        scales = "integer" if f"{key}.weight_group" in entries else "row"
    down = entries.get(f"{key}.weight_down")
    rank = 0 if down is None or not down.shape else down.shape[0]
    plan = LayerPlan(shape, packing, scales, rank, terms)
    for part in PARTS[:-1]:
        entry, expected = entries.get(f"{key}.{part}"), plan.tensors.get(part)
        if entry is None and expected is None:
            continue
        if entry is None or expected is None:
            problem = "is missing beside" if entry is None else "does not belong beside"
            raise FormatError(file.path, f"the tensor {problem} the layer's other tensors; {REDO}", f"{key}.{part}")
        if (DTYPES.get(entry.dtype), entry.shape) != expected:
            dtype, shape = expected
            problem = f"{entry.dtype} {list(entry.shape)} where {DTYPE_NAMES[dtype]} {list(shape)} is expected; {REDO}"
            raise FormatError(file.path, problem, f"{key}.{part}")
    return plan


def _read_json(file: TensorFile, key: str) -> tuple[str, tuple[int, int], int]:
    """Packing, logical shape and terms."""
    if file.entries[key].dtype != "U8":
        raise FormatError(file.path, f"dtype {file.entries[key].dtype} where uint8 JSON is expected; {REDO}", key)
    try:
        fields = json.loads(file.bytes(key).tobytes())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise FormatError(file.path, f"the JSON cannot be read ({error}); {REDO}", key) from None
    if not isinstance(fields, dict):
        raise FormatError(file.path, f"the JSON is no object; {REDO}", key)
    version = fields.get("format")
    if version != FORMAT:
        newer = isinstance(version, str) and version.startswith("ternary_v")
        remedy = "update this pack, or convert the checkpoint again" if newer else "load it with ComfyUI's own loader"
        raise FormatError(file.path, f"format {version!r}, and this version reads {FORMAT!r}; {remedy}", key)
    if fields.get("packing") not in PACKINGS:
        problem = f"packing {fields.get('packing')!r}; known: {', '.join(PACKINGS)}; update this pack"
        raise FormatError(file.path, problem, key)
    if fields.get("group_size") != GROUP_SIZE:
        problem = f"group size {fields.get('group_size')!r}, and this version reads {GROUP_SIZE}; {REDO}"
        raise FormatError(file.path, problem, key)
    terms = fields.get("terms", 1)
    if type(terms) is not int or terms not in TERMS:
        problem = f"{terms!r} terms, and this version reads {' and '.join(map(str, TERMS))}; update this pack"
        raise FormatError(file.path, problem, key)
    match fields.get("shape"):
        case [int(n), int(k)] if n > 0 and k > 0:
            return fields["packing"], (n, k), terms
    raise FormatError(file.path, f"shape {fields.get('shape')!r} is not [outputs, inputs]; {REDO}", key)


def check_dense(file: TensorFile, key: str) -> None:
    dtype = file.entries[key].dtype
    if DTYPES.get(dtype) in DENSE_DTYPES:
        return
    if dtype == "U8" and key.endswith(".weight"):
        problem = f"packed weights without {key.removesuffix('weight')}comfy_quant, which says how to decode them"
        raise FormatError(file.path, f"{problem}; {REDO}", key)
    raise FormatError(file.path, f"a dense tensor of dtype {dtype}; fp32, fp16 or bf16 is expected; {REDO}", key)


def is_int8(file: TensorFile, key: str) -> bool:
    return file.entries[key].dtype == "U8" and f'"{INT8}"'.encode() in file.bytes(key)[:4096].tobytes()


def check_int8(file: TensorFile, key: str) -> None:
    weight, scale = (file.entries.get(f"{key}.{part}") for part in ("weight", "weight_scale"))
    if weight is None or weight.dtype != "I8" or len(weight.shape) != 2:
        raise FormatError(file.path, f"{INT8} needs an int8 matrix here; {REDO}", f"{key}.weight")
    if scale is None or (scale.dtype, scale.shape) != ("F32", (weight.shape[0], 1)):
        problem = f"{INT8} needs one fp32 scale for each of the {weight.shape[0]} outputs here; {REDO}"
        raise FormatError(file.path, problem, f"{key}.weight_scale")


def check_values(file: TensorFile, key: str, layer: LayerPlan) -> None:
    packed = file.tensor(f"{key}.weight").flatten()
    for start in range(0, packed.numel(), _CHECKED):
        invalid = first_invalid(packed[start : start + _CHECKED], layer.packing)
        if invalid is not None:
            problem = f"byte {start + invalid} holds no valid {layer.packing} code: the file is damaged; {REDO}"
            raise FormatError(file.path, problem, f"{key}.weight")
    if _padding(file.tensor(f"{key}.weight"), layer).any():
        raise FormatError(file.path, f"the padding after the last input is not zero; {REDO}", f"{key}.weight")
    if not file.tensor(f"{key}.weight_scale").isfinite().all():
        raise FormatError(file.path, f"a scale is not finite; {REDO}", f"{key}.weight_scale")
    if layer.scales == "integer":
        group = file.tensor(f"{key}.weight_group")
        if int(group.min()) < 1 or int(group.max()) > MAX_MULTIPLIER:
            found = f"{int(group.min())}..{int(group.max())}"
            problem = f"multipliers {found} where 1..{MAX_MULTIPLIER} is expected; {REDO}"
            raise FormatError(file.path, problem, f"{key}.weight_group")


def _padding(packed: Tensor, layer: LayerPlan) -> Tensor:
    """The trits after the last input of each term, int8 [terms * N, ...]."""
    k = layer.shape[1]
    if layer.packing == "planes32":
        last = unpack_planes32(packed[groups_of(k) - 1 :: groups_of(k)], GROUP_SIZE)
        return last.view(-1, GROUP_SIZE)[:, (k - 1) % GROUP_SIZE + 1 :]
    last = packed.view(-1, packed.shape[1] // layer.terms)[:, -1:]
    return unpack_base3(last.contiguous(), 5)[:, (k - 1) % 5 + 1 :]
