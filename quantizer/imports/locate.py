"""Which files a path means: as for dense models, and a transformer in a folder of its own packaging, as downloaded."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from ..files.container import FormatError
from ..files.sources.locate import PICKLES, hub_snapshot, visible
from ..files.sources.locate import locate as locate_dense

_STATE = "state_dict.pt"
_CONFIGS = ("config.json", "quantization_config.json")


def locate(path: str | os.PathLike) -> tuple[Path, ...]:
    """The file with the weights, or its parts in order.

    path: that file, an index or one of the parts, the transformer's folder, that of a pipeline, or one of the hub's
    cache. Raises OSError where there are no weights, FormatError where parts are missing, ValueError where there is a
    choice.
    """
    path = Path(path)
    if not path.is_dir():
        return (path,) if path.suffix.lower() in PICKLES else locate_dense(path).files
    found = list(_with_weights(path))
    if not found:
        raise FileNotFoundError(
            f"{path} holds no transformer: no {_STATE} or .safetensors, there or in a folder transformer*; "
            "give the downloaded folder or the file with the weights"
        )
    if len(found) > 1:
        choices = ", ".join(str(choice) for choice in found)
        raise ValueError(f"{path} holds several transformers; give one of them: {choices}")
    state = found[0] / _STATE
    return (state,) if state.is_file() else locate_dense(found[0]).files


def _with_weights(folder: Path) -> Iterator[Path]:
    """The folder itself and those of transformers in it; of a model in a hub's cache, its snapshot's."""
    folder = hub_snapshot(folder) or folder
    for place in (folder, *sorted(each for each in visible(folder) if each.name.startswith("transformer"))):
        if place.is_dir() and any(each.name == _STATE or ".safetensors" in each.name for each in visible(place)):
            yield place


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
