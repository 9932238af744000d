"""A ternary file back as a dense checkpoint, for verification and for other tools."""

import os
from collections.abc import Callable

import torch

from .atomic import check_target
from .container import create
from .metadata import TITLE
from .ternary import TernaryFile, open_ternary

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_CHUNK = 1 << 22  # weights dequantized at a time


def export_checkpoint(
    source: str | os.PathLike | TernaryFile,
    target: str | os.PathLike,
    *,
    dtype: torch.dtype = torch.bfloat16,
    overwrite: bool = False,
    on_progress: Callable[[int], object] = lambda weights: None,
) -> None:
    """Write every parameter in `dtype` under its BFL name; a low-rank part is added to its weight.

    `on_progress` is called with the number of weights done since the last call. Raises FormatError, OSError, and
    ValueError where both are the same file.
    """
    file = source if isinstance(source, TernaryFile) else open_ternary(source)
    check_target(target, 0, overwrite, [file.path])
    eight_bit = {f"{name}.{part}" for name in file.int8 for part in ("weight_scale", "comfy_quant")}
    plan = {name: (dtype, shape) for name, shape in file.shapes.items() if name not in eight_bit}
    metadata = {key: value.removesuffix(TITLE) for key, value in file.metadata.items() if key.startswith("modelspec.")}
    with create(target, plan, metadata | {"ternary.exported_from": file.path.name}, overwrite=overwrite) as writer:
        for name in file.dense.keys() - eight_bit:
            writer.write(name, file.parameter(name).to(dtype))
        for name, layer in file.layers.items():
            weight = file.weight(name)
            n, k = layer.shape
            step = max(1, _CHUNK // k)
            for start in range(0, n, step):
                rows = weight.rows(start, start + step).dequantize(dtype).contiguous().flatten().view(torch.uint8)
                writer.write_bytes(f"{name}.weight", rows.numpy(), start * k * dtype.itemsize)
                on_progress(rows.numel() // dtype.itemsize)
        file.file.check_unchanged()
