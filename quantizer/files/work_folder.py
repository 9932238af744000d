"""A folder for what is kept between runs, which belongs to one run: `settings.json` says to which."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path

from .. import ranks
from .atomic import write_json
from .container import FormatError, TensorFile
from .inputs import read_json
from .verify import verify

_STARTED = "started"  # in settings.json
_OWN = {"settings.json", "decisions.json", "pictures", "velocities", "calibrate", "blocks", "distill.json"}
_OWN |= {f"{name}.safetensors" for name in ("rounded", "calibrated", "blocks", "distill")}


def check_work_folder(folder: Path) -> None:
    """Raise ValueError for a folder with files in it that no run has kept there, and OSError for what is no folder."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; give another folder with --work")
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    settings = (folder / "settings.json", folder / "pictures" / "settings.json")
    if names - _OWN and not any(
        path.is_file() and f'"{_STARTED}"' in path.read_text("utf-8", "replace") for path in settings
    ):
        problem = f"{folder} is not empty, and no work folder ({min(names - _OWN)!r:.80} lies in it)"
        raise ValueError(f"{problem}; give a new folder with --work")


def _has_settings(folder: Path) -> bool:
    path = folder / "settings.json"
    return path.is_file() and f'"{_STARTED}"' in path.read_text("utf-8", "replace")


def open_kept(path: str | os.PathLike) -> TensorFile:
    """A safetensors file that an earlier run may have kept, every byte of it verified once by this process.

    Raises FormatError where it is damaged: it is made again where it is missing.
    """
    try:
        file = TensorFile(path)
        identity = file.status
        if identity not in _verified and verify(path):
            raise FormatError(path, "bytes differ from their checksums")
    except FormatError:
        raise FormatError(path, "the file is damaged; delete it, and give the command again") from None
    _verified.add(identity)
    return file


_verified: set[tuple[int, ...]] = set()


def keep_settings(folder: Path, settings: dict, remedy: str = "give another folder, or delete this one") -> str:
    """Write `settings.json` in the folder; ValueError where it holds others: a resumed run must be the same run.

    Returns when the run was started first, in UTC as ISO 8601 has it.
    """
    with ranks.first_alone():
        return _keep(folder / "settings.json", json.loads(json.dumps(settings)), remedy)


def _keep(path: Path, settings: dict, remedy: str) -> str:
    folder, now = path.parent, datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, settings | {_STARTED: now})
        return now
    found = read_json(path, dict, remedy=f"give another folder, or delete {folder}")
    started = str(found.pop(_STARTED, now))
    for key in settings.keys() | found.keys():
        if settings.get(key) != found.get(key):
            raise ValueError(
                f"{folder} holds the work of another run: its {key} is {found.get(key)}, not {settings.get(key)}; "
                f"{remedy}"
            )
    return started
