"""Which files a path means: a file is itself, a part or an index of a checkpoint in parts means all of its parts, and a
folder means the transformer that lies in it, as diffusers and the Hugging Face cache lay it out.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..advice import command
from ..container import FormatError

SUFFIXES = (".safetensors", ".sft", ".gguf")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_PART = re.compile(r"(?P<start>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<end>\..+)")
_INDEX = re.compile(r".+\.safetensors\.index(\..+)?\.json")
_MOST_JSON = 1 << 24
_WHOLE = "download the folder transformer too, or give one of FLUX.1 or FLUX.2"
_TRANSFORMERS = ("FluxTransformer2DModel", "Flux2Transformer2DModel")


@dataclass(frozen=True)
class Location:
    """path   as it was given
    files  that hold the weights, in the order of their names
    name   of the model, for people: a file's name or a folder's
    """

    path: Path
    files: tuple[Path, ...]
    name: str


def locate(path: str | os.PathLike) -> Location:
    """The files that `path` means. Raises FormatError (naming missing parts, or what is there) and OSError."""
    path = Path(path)
    if path.is_dir():
        return _in_folder(path)
    path.stat()  # raises where there is nothing
    if path.name in ("model_index.json", "config.json"):
        return Location(path, _in_folder(path.absolute().parent).files, path.absolute().parent.name)
    if _INDEX.fullmatch(path.name):
        return Location(path, _of_index(path), path.name.partition(".")[0])
    if part := _PART.fullmatch(path.name):
        return Location(path, _of_part(path, part), f"{part['start']}{part['end']}")
    return Location(path, (path,), path.name)


def _in_folder(folder: Path) -> Location:
    name = folder.absolute().name
    if (folder / "transformer").is_dir():
        return Location(folder, _in_folder(folder / "transformer").files, name)
    if packed := sorted(
        each.name for each in visible(folder) if each.is_dir() and each.name.startswith("transformer-")
    ):
        problem = f"this folder holds a transformer in a packing of its own ({_listed(packed)})"
        raise FormatError(
            folder, f"{problem}. If it is ternary, this imports it: {command('import', folder, '-1.58bit')}"
        )
    own = [each for each in visible(folder) if each.suffix.lower() in SUFFIXES]
    if (folder / "model_index.json").is_file() and len(own) != 1:
        model = _json(folder / "model_index.json").get("_class_name")
        problem = f"this is a diffusers pipeline ({str(model):.80}) without a folder transformer"
        listed = _listed(sorted(each.name for each in own))
        raise FormatError(folder, f"{problem}; " + (f"give one of the files in it: {listed}" if own else _WHOLE))
    if snapshot := hub_snapshot(folder):
        return Location(folder, _in_folder(snapshot).files, name)
    if (folder / "config.json").is_file():
        model = _json(folder / "config.json").get("_class_name")
        if isinstance(model, str) and model not in _TRANSFORMERS:
            problem = f"these are the weights of {model:.80}; the transformer of FLUX.1 or FLUX.2 is needed"
            raise FormatError(folder, f"{problem}: give its folder")
    indices = sorted((each for each in visible(folder) if _INDEX.fullmatch(each.name)), key=_plain_first)
    files = sorted((each for each in visible(folder) if each.suffix.lower() in SUFFIXES), key=_plain_first)
    whole = [each for each in files if each.name in ("diffusion_pytorch_model.safetensors", "model.safetensors")]
    if indices and not (whole and _missing(indices[0])):  # an index may be left of what was downloaded before
        return Location(folder, _of_index(indices[0]), name)
    sets = {part["start"] + part["end"]: each for each in files if (part := _PART.fullmatch(each.name))}
    if whole or len(files) == 1:
        return Location(folder, ((whole or files)[0],), name)
    if len(sets) == 1 and all(_PART.fullmatch(each.name) for each in files):
        return Location(folder, locate(files[0]).files, name)
    if files:
        listed = _listed([each.name for each in files])
        raise FormatError(folder, f"this folder holds {len(files)} files of weights ({listed}); give one of them")
    pickles = sorted(each.name for each in visible(folder) if each.suffix.lower() in PICKLES)
    if pickles:
        problem = f"this folder holds PyTorch pickles ({_listed(pickles)}), which can run code when they are loaded"
        raise FormatError(folder, f"{problem}; get the model in .safetensors")
    raise FormatError(folder, "this folder holds no weights (.safetensors or .gguf); give a file, or a model's folder")


def hub_snapshot(folder: Path) -> Path | None:
    """What a model's folder in the cache of the Hugging Face hub means: the snapshot that was downloaded last from
    the main branch, or the only one; None where it is no such folder.
    """
    snapshots = {each.name: each for each in visible(folder / "snapshots") if each.is_dir()}
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if found := snapshots.get((folder / "refs" / "main").read_text("utf-8").strip()):
            return found
    if len(snapshots) > 1:
        listed = _listed(sorted(str(each) for each in snapshots.values()))
        raise FormatError(
            folder, f"this folder holds {len(snapshots)} snapshots of a model; give one of them: {listed}"
        )
    return next(iter(snapshots.values()), None)


def visible(folder: Path) -> Iterator[Path]:
    """What lies in a folder, if it is one, without hidden files such as those that macOS lays beside others."""
    return (each for each in (folder.iterdir() if folder.is_dir() else ()) if not each.name.startswith("."))


def _plain_first(path: Path) -> tuple[int, str]:
    """Weights without a variant's name (such as bf16) before others."""
    return path.name.partition(".safetensors")[0].count("."), path.name


def _missing(index: Path) -> bool:
    try:
        _of_index(index)
    except FormatError:
        return True
    return False


def _of_index(index: Path, asked: Path | None = None) -> tuple[Path, ...]:
    names = _json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise FormatError(index, "the index names no files; download it again", "weight_map")
    parts = sorted(set(names.values()))
    if odd := next((part for part in parts if Path(part).name != part or "\\" in part or "\0" in part), None):
        raise FormatError(index, f"the index names {odd:.80}, which is not beside it; download it again", "weight_map")
    return _present(asked or index, [index.with_name(part) for part in parts])


def _of_part(path: Path, part: re.Match) -> tuple[Path, ...]:
    for index in sorted(each for each in visible(path.absolute().parent) if _INDEX.fullmatch(each.name)):
        names = _json(index).get("weight_map")
        if isinstance(names, dict) and path.name in names.values():
            return _of_index(index, path)
    count = int(part["count"])
    if not 1 <= int(part["number"]) <= count or count > 1000:
        return (path,)
    names = (f"{part['start']}-{number:05}-of-{part['count']}{part['end']}" for number in range(1, count + 1))
    return _present(path, [path.with_name(name) for name in names])


def _present(path: Path, parts: Sequence[Path]) -> tuple[Path, ...]:
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        problem = (
            f"this is a checkpoint in {len(parts)} parts, and {_listed(missing)} is missing in {path.absolute().parent}"
        )
        raise FormatError(path, f"{problem}; download all parts into one folder")
    return tuple(parts)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _json(path: Path) -> dict:
    if path.stat().st_size > _MOST_JSON:
        raise FormatError(path, f"JSON of {path.stat().st_size:,} bytes is not read; download it again")
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise FormatError(path, f"this is not valid JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise FormatError(path, "the JSON is no object; download it again")
    return value
