"""How the bytes of a stored tensor become numbers: floats as they are, fp8, scaled fp8 and int8, and GGUF's blocks.

Scaled tensors have their factor beside them, one for the tensor or one for each row: under `X.scale_weight` (older fp8
checkpoints, which also hold a tensor `scaled_fp8`), or under `X.weight_scale` with a JSON that names the format, as the
tensor `X.comfy_quant` or as an entry of `_quantization_metadata` in the header.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..container import DTYPES, FormatError, TensorFile
from .gguf import TYPES, GgufFile, decode

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FP8 = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
_SCALES = ("weight_scale", "scale_weight")  # decoded here
# What else may lie beside a weight; other names like these change what it is worth, in ways that are not known here.
_HARMLESS = ("weight", "bias", "input_scale", "scale_input", "comfy_quant", "scaled_fp8", "alpha", "lora_scale")
_CHANGES = re.compile("scale|zero|quant|absmax|svd|smooth|outlier|codebook")
_SHORT = {"F8_E4M3": "fp8 (e4m3)", "F8_E5M2": "fp8 (e5m2)", "I8": "int8"}
_MOST_JSON = 1 << 16
_CHECKED = 1 << 22  # values looked at together


@dataclass(frozen=True)
class Encoding:
    """How the tensor `key` of `file` is decoded, a few rows at a time.

    stored  its dtype or type as the file names it, or as the JSON beside it does
    scale   the key of its factor, if it has one
    """

    file: TensorFile | GgufFile
    key: str
    stored: str
    scale: str | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the decoded values."""
        return FLOATS.get(self.stored, torch.float32)

    @property
    def lossy(self) -> str | None:
        """What the numbers were rounded to, for people; None where they are floats of 16 or 32 bits."""
        if self.stored in FLOATS:
            return None
        name = f"GGUF {self.stored}" if isinstance(self.file, GgufFile) else _SHORT[self.stored]
        return f"{name} with scales" if self.scale and self.stored != "I8" else name

    @cached_property
    def factor(self) -> Tensor | None:
        """fp32 [1, 1] or [rows, 1]. Raises FormatError where it is not finite, or of another shape."""
        if self.scale is None:
            return None
        shape, rows = self.file.entries[self.scale].shape, self.file.entries[self.key].shape[0]
        factor = self.file.tensor(self.scale)
        if factor.dtype not in FLOATS.values() or factor.numel() not in (1, rows) or len(shape) > 2:
            problem = f"{self.file.entries[self.scale].dtype} {list(shape)} is no scale of a tensor or of its rows"
            raise FormatError(self.file.path, f"{problem}; give the original checkpoint", self.scale)
        factor = factor.float().reshape(-1, 1)
        if not factor.isfinite().all():
            raise FormatError(self.file.path, NOT_FINITE, self.scale)
        return factor

    def values(self, data, start: int, rows: int) -> Tensor:
        """The numbers [rows, ...] of `rows` rows from `start`, whose bytes are `data`; floats share its memory.

        Raises FormatError where they cannot be decoded.
        """
        shape = self.file.entries[self.key].shape
        if self.stored in FLOATS:
            return torch.frombuffer(data, dtype=FLOATS[self.stored]).view(rows, *shape[1:])
        if isinstance(self.file, GgufFile):
            blocks = np.frombuffer(data, np.uint8).reshape(rows, -1)
            return decode(blocks, self.stored, self.file.path, self.key).view(rows, *shape[1:])
        values = torch.frombuffer(data, dtype=DTYPES[self.stored]).view(rows, *shape[1:]).float()
        if self.factor is None:
            return values
        factor = self.factor if len(self.factor) == 1 else self.factor[start : start + rows]
        return values * factor.view(-1, *[1] * (len(shape) - 1))

    def check(self, data, start: int, rows: int) -> None:
        """Raise FormatError, by key, where a number is not finite. GGUF's blocks are finite where their factors are."""
        blocks = TYPES[self.stored] if isinstance(self.file, GgufFile) and self.stored not in FLOATS else None
        if blocks is None:
            check_finite(self.values(data, start, rows), self.file.path, self.key)
            return
        fields = np.frombuffer(data, np.uint8).reshape(-1, blocks.size)
        for byte in blocks.factors:
            factors = np.ascontiguousarray(fields[:, byte : byte + 2]).view(np.float16)
            check_finite(torch.from_numpy(factors), self.file.path, self.key)


NOT_FINITE = "holds values that are not finite (NaN or infinite): the file is damaged; download it again"


def finite(values: Tensor) -> bool:
    """Whether all of [...] are finite."""
    flat = values.reshape(-1)
    for start in range(0, flat.numel(), _CHECKED):
        least, most = flat[start : start + _CHECKED].aminmax()
        if not (least.isfinite() and most.isfinite()):
            return False
    return True


def check_finite(values: Tensor, path, key: str) -> None:
    if not finite(values):
        raise FormatError(path, NOT_FINITE, key)


def encoding_of(file: TensorFile | GgufFile, key: str, layers: Mapping[str, object]) -> Encoding | str:
    """How a tensor is decoded, or the name of a format that is not. `layers`: the file's `stated_layers`."""
    entry = file.entries[key]
    if isinstance(file, GgufFile):
        decodable = entry.dtype in FLOATS or TYPES[entry.dtype].values > 1
        return Encoding(file, key, entry.dtype) if decodable else entry.dtype
    layer = key.removesuffix(".weight")
    said = stated_format(file, layer, layers) if layer != key else None
    if isinstance(said, str):
        return said
    beside = file.ends.get(layer, ()) if layer != key else ()
    scales = sorted(end for end in beside if end in _SCALES or (end not in _HARMLESS and _CHANGES.search(end)))
    stated = said is not None or entry.dtype in _FP8.values()
    if len(scales) > stated or not set(scales) <= set(_SCALES):
        return f"{entry.dtype} with {' and '.join(scales)} beside it"
    if said is None and entry.dtype in FLOATS:
        return Encoding(file, key, entry.dtype)
    scale = f"{layer}.{scales[0]}" if scales else None
    if said is None:
        return Encoding(file, key, entry.dtype, scale) if entry.dtype in _FP8.values() else entry.dtype
    name = said["format"]
    stored = _FP8.get(name, "I8")
    if scale is None:
        raise FormatError(file.path, f"the scale of {name} is missing beside it; download the file again", key)
    if entry.dtype not in (stored, "U8" if name in _FP8 else stored):
        raise FormatError(file.path, f"{entry.dtype} where {name} is stated; download the file again", key)
    return Encoding(file, key, stored, scale)


def stated_layers(file: TensorFile | GgufFile) -> Mapping[str, object]:
    """What the header says of the format of Linears, by their names. Raises FormatError where it is damaged."""
    key = "_quantization_metadata"
    if key not in file.metadata:
        return {}
    said = _json(file, key, file.metadata[key])
    layers = said.get("layers") if isinstance(said, Mapping) else None
    if not isinstance(layers, Mapping):
        raise FormatError(file.path, "the JSON names no layers; download the file again", key)
    return layers


def stated_format(file: TensorFile | GgufFile, layer: str, layers: Mapping[str, object]) -> Mapping | str | None:
    """What a Linear's JSON says of its format: the JSON where it is decoded here, else the format's name; None if none.

    Raises FormatError where the JSON is damaged.
    """
    key = f"{layer}.comfy_quant"
    if key in file.entries:
        if file.entries[key].nbytes > _MOST_JSON:
            raise FormatError(file.path, f"{file.entries[key].nbytes:,} bytes of JSON; download the file again", key)
        said = _json(file, key, file.bytes(key).tobytes())
    else:
        said = next((layers[name] for name in (layer, _unprefixed(layer)) if name in layers), None)
    if said is None:
        return None
    if not isinstance(said, Mapping) or not isinstance(said.get("format"), str):
        raise FormatError(file.path, "the JSON names no format; download the file again", key)
    parameters = said.get("params") if isinstance(said.get("params"), Mapping) else {}
    if said.get("convrot", parameters.get("convrot", False)):
        return f"{said['format']} with convrot"
    return said if said["format"] in (*_FP8, "int8_tensorwise") else said["format"]


def _unprefixed(layer: str) -> str:
    start = min((at for name in ("double_blocks.", "single_blocks.") if (at := layer.find(name)) >= 0), default=0)
    return layer[start:]


def _json(file: TensorFile | GgufFile, key: str, text: bytes | str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(file.path, f"the JSON cannot be read ({error}); download the file again", key) from None
