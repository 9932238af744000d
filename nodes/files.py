"""The files that Load Ternary FLUX offers, by the names that ComfyUI gives them."""

import functools
import os

import folder_paths

from ..quantizer.files.container import TensorFile
from ..quantizer.files.identity import identify

FOLDERS = ("diffusion_models", "checkpoints")  # Save Checkpoint writes into the second
EXTENSIONS = (".safetensors", ".sft")


def names() -> list[str]:
    """Ternary files first, then the other files of the first folder."""
    first, *others = ([name for name in folder_paths.get_filename_list(f) if _offered(name)] for f in FOLDERS)
    ternary = [name for name in first if _is(FOLDERS[0], name, "ternary")]
    for folder, listed in zip(FOLDERS[1:], others, strict=True):
        ternary += [name for name in listed if name not in first and _is(folder, name, "ternary")]
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
    raise FileNotFoundError(f"{name} is not in models/{FOLDERS[0]}; put it there and press R to refresh the node")


def stamp(path: str | os.PathLike) -> tuple[int, int, int]:
    """What changes with a file: its number on the disk, size and time."""
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns


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
