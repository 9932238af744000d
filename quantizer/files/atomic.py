"""Files that appear whole or not at all: written beside their place under a temporary name, flushed, then renamed."""

import contextlib
import errno
import io
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from .locks import hold


def check_target(
    path: str | os.PathLike, size: int = 0, overwrite: bool = False, sources: Iterable[str | os.PathLike] = ()
) -> Path:
    """The path, if a file of `size` bytes can be written there and it is none of the `sources` that it is made from.

    A link is followed. Raises OSError, or ValueError where it is a source, naming the path and what to do.
    """
    path = Path(path)
    place = Path(os.path.realpath(path))
    if path.exists() and any(os.path.exists(source) and path.samefile(source) for source in sources):
        raise ValueError(f"{path}: the output is an input; choose another name")
    if place.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file")
    if place.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    if place.exists() and not place.is_file():
        raise OSError(f"{path} is a device or a pipe; give the name of a file")
    if not place.parent.is_dir():
        raise FileNotFoundError(f"the folder {place.parent} does not exist; create it or choose another place")
    if place.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another name or give --force to replace it")
    check_space(place.parent, size, f"{path} needs")
    return path


def check_space(folder: str | os.PathLike, size: int, what: str) -> None:
    """Raises OSError where a folder's disk has no room for so many bytes; `what` begins its message."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(f"{what} {in_bytes(size)} and {folder} has {in_bytes(free)} free")


def in_bytes(count: int) -> str:
    """A number of bytes for people, in decimal units."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def reserve(file: BinaryIO, size: int) -> None:
    """Give a new file its size with the space on the disk, so that no later write to it, mapped or not, finds none.

    Raises OSError. Sparse files, of which a write through a map ends the process where the disk is full, are what
    `truncate` makes.
    """
    if not size:
        return
    if os.name == "nt":  # files are not sparse there
        file.truncate(size)
        return
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
    block = bytes(1 << 20)
    for start in range(0, size, len(block)):
        file.write(block[: size - start])
    file.flush()
    file.seek(0)


class _Shown(io.FileIO):
    """A file whose errors name what it will be called, not what it is called for now."""

    def __init__(self, path: Path, shown: str):
        self._shown = shown
        with _named(shown):
            super().__init__(path, "xb+")

    def write(self, data) -> int:
        with _named(self._shown):
            return super().write(data)

    def truncate(self, size: int | None = None) -> int:
        with _named(self._shown):
            return super().truncate(size)


@contextlib.contextmanager
def _named(shown: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), shown) from None


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike, size: int = 0, overwrite: bool = False) -> Iterator[BinaryIO]:
    """Open a binary file for writing (and reading) that takes the name `path` when the block ends without an exception.

    After an exception, Ctrl-C included, the temporary file is gone and `path` is as it was; a temporary file that a
    killed run left is removed. `size` is the space that the file will need; it is reserved. Through a link, the file
    that it leads to is written. Raises OSError, with `path` as its file name.
    """
    shown = str(check_target(path, size, overwrite))
    place = Path(os.path.realpath(path))
    with hold(path):
        temporary = place.with_name(f".{place.name}.{secrets.token_hex(4)}.partial")
        try:
            with io.BufferedRandom(_Shown(temporary, shown)) as file:
                with _named(shown):
                    reserve(file, size)
                yield file
                with _named(shown):
                    file.flush()
                    os.fsync(file.fileno())
            check_target(path, 0, overwrite)
            with _named(shown):
                os.replace(temporary, place)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(place.parent)


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
