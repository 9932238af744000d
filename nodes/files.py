"""The files that Load Ternary FLUX offers, by the names that ComfyUI gives them."""

import functools
import os
import unicodedata
from collections.abc import Callable

import folder_paths

from ..quantizer.files.container import TensorFile
from ..quantizer.files.identity import identify

FOLDERS = ("diffusion_models", "checkpoints")  # Save Checkpoint writes into the second
EXTENSIONS = (".safetensors", ".sft")
_LONGEST = 200  # bytes, of the 255 that file systems take: numbers, endings and temporary names are added
# Microsoft, "Naming Files, Paths, and Namespaces"
_FORBIDDEN = '<>:"|?*'
_DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{port}{number}" for port in ("COM", "LPT") for number in range(10))}


class AnyName(list):
    """The names that a combo offers, of which ComfyUI lets every other pass: the node itself finds the file, or not."""

    def __contains__(self, name) -> bool:
        return True


def names() -> list[str]:
    """Ternary files first, then the other files of the first folder.

    A name that both folders have is the first one's file; the second one's has its folder in front.
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
        first, _, rest = spelling.partition("/")
        places = [(folder, spelling) for folder in FOLDERS] + [(first, rest)] * (first in FOLDERS)
        for folder, inside in places:
            if _offered(inside) and (path := folder_paths.get_full_path(folder, inside)):
                return path
    raise FileNotFoundError(f"{name} is not in models/{FOLDERS[0]}; put it there and press R to refresh the node")


def stamp(path: str | os.PathLike) -> tuple[int, int, int]:
    """What changes with a file: its number on the disk, size and time."""
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns


def name_problem(name: str) -> str | None:
    """Why a file or folder of this name cannot be made on every system that ComfyUI runs on; None where it can."""
    shown = repr(name if len(name) < 40 else f"{name[:40]}...")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        return f"{shown}: names of files have no control characters"
    if found := [character for character in _FORBIDDEN if character in name]:
        return f"{shown}: names of files on Windows have no {' '.join(found)}"
    if name.split(".")[0].strip().upper() in _DEVICES:
        return f"{shown} is the name of a device on Windows: give another"
    if name.endswith((".", " ")):
        return f"{shown}: names of files on Windows do not end with a dot or a blank"
    if len(name.encode()) > _LONGEST:
        return f"{shown}: {len(name.encode())} bytes are too many for the name of a file, {_LONGEST} are the most"
    return None


class Watch:
    """Files that nodes read or wrote, and how many changes of them were found.

    Whether a node runs again is asked before the values of its links are known: every file stands for one whose name is
    such a value.
    """

    def __init__(self):
        self._stamps: dict[str, tuple[int, int, int] | None] = {}  # None: it is gone
        self._changes = 0

    def add(self, path: str | os.PathLike) -> None:
        self._look(str(path))

    def changes(self) -> int:
        """How often a file was found deleted or with other content, until now."""
        for path in self._stamps:
            self._look(path)
        return self._changes

    def _look(self, path: str) -> None:
        try:
            now = stamp(path)
        except OSError:
            now = None
        self._changes += self._stamps.get(path) not in (None, now)
        self._stamps[path] = now


READ = Watch()


def state(name: str | None, find: Callable[[str], str | os.PathLike] = find):
    """What changes with the file of this name; None is a name that comes from another node."""
    if name is None:
        return READ.changes()
    try:
        return stamp(find(name))
    except (OSError, ValueError):
        return "missing"


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
