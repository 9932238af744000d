"""Which files a path means: a transformer's weights, alone or within a pipeline as it is downloaded."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from ..files.container import FormatError

_NAMES = ("state_dict.pt", "diffusion_pytorch_model.safetensors")
_INDEX = "diffusion_pytorch_model.safetensors.index.json"
_CONFIGS = ("config.json", "quantization_config.json")


def locate(path: str | os.PathLike) -> tuple[Path, ...]:
    """The file with the weights, or its shards in order.

    `path`: that file, an index.json, one of the shards, the transformer's folder, or the folder of a pipeline. Raises
    OSError where there are no weights, FormatError where shards are missing, ValueError where there is a choice.
    """
    path = Path(path)
    if not path.is_dir():
        if path.name.endswith(".index.json"):
            return _shards(path)
        index = path.parent / _INDEX
        return _shards(index) if "-of-" in path.name and index.is_file() else (path,)
    found = list(dict.fromkeys(_weights_in(path)))
    if not found:
        raise FileNotFoundError(
            f"{path} holds no transformer: no {', '.join(_NAMES)} or index.json, there or in a folder transformer*; "
            "give the downloaded folder or the file with the weights"
        )
    if len(found) > 1:
        choices = ", ".join(str(choice) for choice in found)
        raise ValueError(f"{path} holds several transformers; give one of them: {choices}")
    return _shards(found[0]) if found[0].name == _INDEX else (found[0],)


def _weights_in(folder: Path) -> Iterator[Path]:
    """Of the folder, of those of transformers in it, and of downloads in a hub's cache."""
    for pattern in (".", "transformer*", "snapshots/*", "snapshots/*/transformer*"):
        for place in [folder] if pattern == "." else sorted(folder.glob(pattern)):
            yield from [place / name for name in (*_NAMES, _INDEX) if (place / name).is_file()][:1]


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise FormatError(index, "the index has no weight_map of keys and files; download it again") from None
    if any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise FormatError(index, "the index names files outside its folder; download it again")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise FormatError(
            index, f"{len(missing)} of {len(names)} shards are missing, {missing[0]} first; download them"
        )
    return tuple(index.parent / name for name in names)


def configuration(files: tuple[Path, ...]) -> dict:
    """What the JSON files beside the weights say, in one dictionary. Raises FormatError where one cannot be read."""
    said = {}
    for name in _CONFIGS:
        path = files[0].parent / name
        if not path.is_file():
            continue
        try:
            fields = json.loads(path.read_text("utf-8"))
        except (ValueError, RecursionError) as error:
            raise FormatError(path, f"the JSON cannot be read ({error}); download it again") from None
        if isinstance(fields, dict):
            said |= fields
    return said
