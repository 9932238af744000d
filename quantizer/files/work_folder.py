"""A folder for what is kept between runs, which belongs to one run: `settings.json` says to which."""

import json
from datetime import UTC, datetime
from pathlib import Path

from .. import ranks
from .atomic import write_json
from .inputs import read_json

_STARTED = "started"  # in settings.json


def keep_settings(folder: Path, settings: dict) -> str:
    """Write `settings.json` in the folder; ValueError where it holds others: a resumed run must be the same run.

    Returns when the run was started first, in UTC as ISO 8601 has it.
    """
    with ranks.first_alone():
        return _keep(folder / "settings.json", json.loads(json.dumps(settings)))


def _keep(path: Path, settings: dict) -> str:
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
                "give another folder, or delete this one"
            )
    return started
