"""Command lines that are offered to people: whole, with every path in quotes, so that they run as they are."""

import os
import shlex
from pathlib import Path


def command(name: str, path: Path, ending: str, *more: str) -> str:
    """The command `name` that makes a file beside `path` of it, with `ending` in its name; `more` follows."""
    path = path.absolute()
    stem = path.name if path.is_dir() else path.stem
    target = path.with_name(f"{stem}{ending}.safetensors")
    return " ".join(("python -m quantizer", name, quoted(path), "-o", quoted(target), *more))


def quoted(path: Path) -> str:
    """A path as a shell takes it, always in quotes."""
    text = str(path)
    if os.name == "nt" or not any(character in text for character in '"$`\\!'):
        return f'"{text}"'
    return shlex.quote(text)
