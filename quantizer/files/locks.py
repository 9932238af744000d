"""Who writes where: a file or a work folder belongs to one run at a time, and leftovers of dead runs are removed.

A run holds an operating system's lock on a small file beside its target (in its work folder), with its process id in
it. The lock ends with the process, however that ends: what another process left behind is told from what one is at.
"""

import contextlib
import errno
import os
import platform
import re
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

_LEFTOVER = re.compile(r"\..*\.[0-9a-f]{8}\.partial|\..*\.lock", re.DOTALL)
_held: dict[Path, int] = {}  # -> thread
_guard = threading.Lock()


@contextlib.contextmanager
def hold(path: str | os.PathLike) -> Iterator[None]:
    """Hold a file that will be written, or a folder, against every other run; again within a block of the same thread.

    Temporary files that killed runs left there are removed. Raises OSError, saying who holds it; where a file system
    knows no locks, nothing is held and nothing removed.
    """
    place = Path(os.path.realpath(path))
    with _guard:
        if any(_held.get(held) == threading.get_ident() for held in (place, *place.parents)):
            mine = True
        else:
            mine, lock = False, _take(place, path)
            _held[place] = threading.get_ident()
    if mine:
        yield
        return
    try:
        if lock is not None:
            _remove_leftovers(place)
        yield
    finally:
        with _guard:
            del _held[place]
            if lock is not None:
                _release(lock, _lock_file(place))


def leftover(name: str, target: str) -> bool:
    """Whether `name` is that of a temporary file for the file `target`."""
    return re.fullmatch(rf"\.{re.escape(target)}\.[0-9a-f]{{8}}\.partial", name) is not None


def _remove_leftovers(place: Path) -> None:
    with contextlib.suppress(OSError):
        if place.is_dir():
            found = [p for p in place.rglob(".*") if _LEFTOVER.fullmatch(p.name) and p != _lock_file(place)]
        else:
            found = [p for p in place.parent.iterdir() if leftover(p.name, place.name)]
        for path in found:
            path.unlink(missing_ok=True)


def _lock_file(place: Path) -> Path:
    return place / ".lock" if place.is_dir() else place.with_name(f".{place.name}.lock")


def _take(place: Path, shown: str | os.PathLike) -> BinaryIO | None:
    path = _lock_file(place)
    while True:
        try:
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b", 0)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(shown)) from None
        try:
            _lock(file)
        except OSError as error:
            with file:
                if error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                    path.unlink(missing_ok=True)
                    return None
                holder = file.read(200).decode("utf-8", "replace").strip() or "another process"
            raise OSError(f"{shown} is being written by {holder}; wait until it ends, or end it") from None
        # The holder before may have removed the file between our opening and locking it.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            break
        file.close()
    with contextlib.suppress(OSError):
        file.truncate()
        file.write(f"process {os.getpid()} on {platform.node()} since {datetime.now():%Y-%m-%d %H:%M:%S}\n".encode())
    return file


def _release(file: BinaryIO, path: Path) -> None:
    if os.name == "nt":  # an open file cannot be removed there, and one that another process has open stays
        file.close()
        with contextlib.suppress(OSError):
            path.unlink()
        return
    with file, contextlib.suppress(OSError):
        path.unlink()


def _lock(file: BinaryIO) -> None:
    try:
        import fcntl
    except ImportError:
        import msvcrt

        file.seek(1 << 30)  # others must be able to read who holds it
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        file.seek(0)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
