"""A folder for what is kept between runs, which belongs to one run: `settings.json` says to which."""

import json
from pathlib import Path

from .. import ranks
from .atomic import write_json
from .inputs import read_json


def keep_settings(folder: Path, settings: dict) -> None:
    """Write `settings.json` in the folder; ValueError where it holds others: a resumed run must be the same run."""
    with ranks.first_alone():
        _keep(folder / "settings.json", json.loads(json.dumps(settings)))


def _keep(path: Path, settings: dict) -> None:
    folder = path.parent
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
        return
    found = read_json(path, dict, remedy=f"give another folder, or delete {folder}")
    for key in settings.keys() | found.keys():
        if settings.get(key) != found.get(key):
            raise ValueError(
                f"{folder} holds the work of another run: its {key} is {found.get(key)}, not {settings.get(key)}; "
                "give another folder, or delete this one"
            )
