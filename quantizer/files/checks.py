"""Refusing damaged tensors of a ternary file: dense and 8-bit ones by dtype and shape, ternary ones by every value."""

from torch import Tensor

from ...ops import GROUP_SIZE
from ...ops.packing import first_invalid, groups_of, unpack_base3, unpack_planes32
from ...ops.scales import MAX_MULTIPLIER
from .container import FormatError, TensorFile
from .layer import INT8, REDO, LayerPlan
from .sources.encodings import FLOATS, check_finite

_CHECKED = 1 << 20  # bytes checked at a time, within the caches


def check_dense(file: TensorFile, key: str) -> None:
    dtype = file.entries[key].dtype
    if dtype in FLOATS:
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
    for part in ("weight_down", "weight_up"):
        if layer.rank:
            check_finite(file.tensor(f"{key}.{part}"), file.path, f"{key}.{part}")
    for suffix in ("weight_scale", "weight_column"):
        if suffix in layer.tensors and not file.tensor(f"{key}.{suffix}").isfinite().all():
            raise FormatError(file.path, f"a scale is not finite; {REDO}", f"{key}.{suffix}")
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
