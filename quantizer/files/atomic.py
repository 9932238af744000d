"""Files that appear whole or not at all: written beside their place under a temporary name, flushed, then renamed."""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO


def check_target(
    path: str | os.PathLike, size: int = 0, overwrite: bool = False, sources: Iterable[str | os.PathLike] = ()
) -> Path:
    """The path, if a file of `size` bytes can be written there and it is none of the `sources` that it is made from.

    Raises OSError, or ValueError where it is, naming the path and what to do.
    """
    path = Path(path)
    if path.exists() and any(os.path.exists(source) and path.samefile(source) for source in sources):
        raise ValueError(f"{path}: the output is an input; choose another name")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist; create it or choose another place")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another name or give --force to replace it")
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise OSError(f"{path} needs {size / 1e9:.2f} GB and {path.parent} has {free / 1e9:.2f} GB free")
    return path


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike, size: int = 0, overwrite: bool = False) -> Iterator[BinaryIO]:
    """Open a binary file for writing (and reading) that takes the name `path` when the block ends without an exception.

    After an exception, Ctrl-C included, the temporary file is gone and `path` is as it was. `size` is the space that
    the file will need.
    """
    path = check_target(path, size, overwrite)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(temporary, "xb+") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        check_target(path, 0, overwrite)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_json(path: str | os.PathLike, value) -> None:
    """Write `value` as JSON, in the place of what is there."""
    with atomic_file(path, overwrite=True) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # a folder cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
