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

_PARTIAL = re.compile(r"\.(?P<target>.+)\.[0-9a-f]{8}\.partial", re.DOTALL)
_HOLDER = re.compile(rb"process \d+ on ")  # how a lock's file begins
_held: dict[Path, int] = {}  # -> thread
_guard = threading.Lock()


@contextlib.contextmanager
def hold(path: str | os.PathLike) -> Iterator[None]:
    """Hold a file that will be written, or a folder, against every other run; again within a block of the same thread.

    Temporary files that killed runs left there are removed, not those that another run holds. Raises OSError, saying
    who holds it; where a file system knows no locks, nothing is held and nothing removed.
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
            _remove_below(place)
        else:
            for path in [path for path in place.parent.iterdir() if leftover(path.name, place.name)]:
                path.unlink(missing_ok=True)


def _remove_below(folder: Path) -> None:
    """What dead runs left in a folder that is held here, and in those below it that nobody holds."""
    for path in list(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            if not (path / ".lock").exists() or _remove_unheld(path / ".lock"):
                _remove_below(path)
        elif found := _PARTIAL.fullmatch(path.name):
            lock = path.with_name(f".{found['target']}.lock")
            if not lock.exists() or _remove_unheld(lock):
                path.unlink(missing_ok=True)
        elif path.name.startswith(".") and path.name.endswith(".lock") and path != folder / ".lock":
            _remove_unheld(path)


def _remove_unheld(lock: Path) -> bool:
    """Remove a lock's file that no process holds; False where one does, or where it is another program's."""
    file = open(lock, "r+b", 0)
    try:
        _lock(file)
        ours = _HOLDER.match(file.read(64)) is not None
    except OSError:
        ours = False
    if ours:
        _release(file, lock)
    else:
        file.close()
    return ours


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
