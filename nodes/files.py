"""The files that Load Ternary FLUX offers, by the names that ComfyUI gives them."""

import functools
import os
from collections.abc import Callable

import folder_paths

from ..quantizer.files.container import TensorFile
from ..quantizer.files.identity import identify

FOLDERS = ("diffusion_models", "checkpoints")  # Save Checkpoint writes into the second
EXTENSIONS = (".safetensors", ".sft")
_LONGEST_NAME = 200  # bytes; systems have 255, and files that are being written have longer names


class AnyName(list):
    """The names that a combo offers, of which ComfyUI lets every other pass: the node itself finds the file, or not."""

    def __contains__(self, name) -> bool:
        return True


def names() -> list[str]:
    """Ternary files first, then the other files of the first folder.

    A name that is in the first folder too has the other folder's name before it.
    """
    first, *others = ([name for name in folder_paths.get_filename_list(f) if _offered(name)] for f in FOLDERS)
    ternary = [name for name in first if _is(FOLDERS[0], name, "ternary")]
    for folder, listed in zip(FOLDERS[1:], others, strict=True):
        found = [name for name in listed if _is(folder, name, "ternary")]
        ternary += [f"{folder}/{name}" if name in first else name for name in found]
    return ternary + [name for name in first if name not in set(ternary)]


def dense_names() -> list[str]:
    """Dense FLUX files first, then the other files of the first folder."""
    listed = [name for name in folder_paths.get_filename_list(FOLDERS[0]) if _offered(name)]
    dense = [name for name in listed if _is(FOLDERS[0], name, "dense")]
    return dense + [name for name in listed if name not in set(dense)]


def find(name: str) -> str:
    """The path of a file; its name may come from a system with the other separator of folders."""
    for spelling in (name, name.replace("\\", "/")):
        for folder in FOLDERS:
            if _offered(spelling) and (path := folder_paths.get_full_path(folder, spelling)):
                return path
        folder, _, rest = spelling.partition("/")
        if folder in FOLDERS and _offered(rest) and (path := folder_paths.get_full_path(folder, rest)):
            return path
    raise FileNotFoundError(f"{name} is not in models/{FOLDERS[0]}; put it there and press R to refresh the node")


def stamp(path: str | os.PathLike) -> tuple[int, int, int]:
    """What changes with a file: its number on the disk, size and time."""
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns


class Watch:
    """Counts what happens to files behind the back of the nodes that read or wrote them, for their fingerprints.

    ComfyUI asks for a fingerprint before it knows inputs that come from other nodes: the file that such a node needs
    may be any that one needed before.
    """

    def __init__(self):
        self._states: dict[str, tuple | None] = {}
        self._changes = 0

    def add(self, path: str | os.PathLike) -> None:
        """A file as it is now; one that is another than before is a change, for other nodes that have it."""
        self._look(str(path))

    def changes(self) -> int:
        """How often files were replaced or lost until now."""
        for path in self._states:
            self._look(path)
        return self._changes

    def _look(self, path: str) -> None:
        try:
            now = stamp(path)
        except OSError:
            now = None
        self._changes += self._states.get(path) not in (None, now)
        self._states[path] = now


READ = Watch()


_RESERVED = frozenset(("con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))))


def state(name: str | None, find: Callable[[str], str | os.PathLike] = find) -> int | tuple | str:
    """What changes with the file of this name; None is a name that comes from another node: any that was read."""
    if name is None:
        return READ.changes()
    try:
        return stamp(find(name))
    except (OSError, ValueError):
        return "missing"


def name_problem(name: str) -> str | None:
    """Why a file cannot have this name on every system that shares models; None where it can."""
    if not name.strip() or name in (".", "..") or any(character in "/\\" for character in name):
        return f"{name or 'name'}: give the name of a file, without a folder"
    if not name.isprintable() or any(character in '<>:"|?*' for character in name):
        return f"{name!r}: a file's name may have letters, digits, blanks and most signs, but not < > : \" | ? *"
    if name.startswith(".") or name.endswith((".", " ")) or name.partition(".")[0].strip().lower() in _RESERVED:
        return f"{name}: this name is hidden or reserved on some systems; choose another"
    if len(os.fsencode(name)) > _LONGEST_NAME:
        return f"{name[:40]}...: the name is too long; {_LONGEST_NAME} bytes are the most"
    return None


def _offered(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _is(folder: str, name: str, kind: str) -> bool:
    try:
        path = folder_paths.get_full_path(folder, name)
        return path is not None and _kind(path, stamp(path)) == kind
    except (OSError, ValueError):
        return False


@functools.lru_cache(maxsize=4096)
def _kind(path: str, stamp: tuple) -> str:
    return identify(TensorFile(path)).kind
