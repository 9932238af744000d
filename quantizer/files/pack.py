"""A ternary file in the other packing: the same weights, bit for bit."""

import json
import os
from collections.abc import Callable
from dataclasses import replace

from .atomic import check_target
from .container import DTYPES
from .metadata import stated
from .ternary import TernaryFile, create_ternary, open_ternary


def pack(
    source: str | os.PathLike | TernaryFile,
    target: str | os.PathLike,
    packing: str,
    *,
    overwrite: bool = False,
    on_progress: Callable[[int], object] = lambda weights: None,
) -> None:
    """Write a ternary file with its trits in `packing`, "planes32" or "base3"; all other tensors stay as they are.

    `on_progress` is called with the number of weights done since the last call. Raises FormatError, OSError, and
    ValueError where both are the same file.
    """
    file = source if isinstance(source, TernaryFile) else open_ternary(source)
    check_target(target, 0, overwrite, [file.path])
    layers = {name: replace(layer, packing=packing) for name, layer in file.layers.items()}
    entries = {name: file.file.entries[key] for name, key in file.dense.items()}
    dense = {name: (DTYPES[entry.dtype], entry.shape) for name, entry in entries.items()}
    with create_ternary(target, layers, dense, _metadata(file, packing), overwrite=overwrite) as writer:
        for name in dense:
            writer.dense(name, file.tensor(name))
        for name, layer in layers.items():
            writer.layer(name, file.weight(name))
            on_progress(layer.shape[0] * layer.shape[1])
        file.file.check_unchanged()


def _metadata(file: TernaryFile, packing: str) -> dict[str, str]:
    """The file's own, whose settings may name the packing."""
    settings = stated(file.metadata, "ternary.settings")
    if "packing" not in settings:
        return dict(file.metadata)
    return dict(file.metadata) | {"ternary.settings": json.dumps(settings | {"packing": packing})}
