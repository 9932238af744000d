"""Command lines that are offered to people: whole, with every path in quotes, so that they run as they are."""

import os
import re
import shlex
from pathlib import Path


def command(name: str, path: Path, ending: str, *more: str) -> str:
    """The command `name` that makes a file beside `path` of it, with `ending` in its name; `more` follows."""
    path = path.absolute()
    target = path.with_name(f"{model_name(path)}{ending}.safetensors")
    return " ".join(("python -m quantizer", name, quoted(path), "-o", quoted(target), *more))


def model_name(path: Path) -> str:
    """What to call a file that is made of `path`: the file's name, or the folder's of a model in parts."""
    path = path.absolute()
    if path.is_dir():
        return path.parent.name if path.name == "transformer" else path.name
    if path.suffix == ".json" or re.fullmatch(r".+-\d{5}-of-\d{5}\..+", path.name):
        return model_name(path.parent)
    return path.stem


def quoted(path: Path) -> str:
    """A path as a shell takes it, always in quotes."""
    text = str(path)
    if os.name != "nt" and not text.isprintable():
        return f"$'{''.join(map(_escaped, text))}'"
    if os.name == "nt" or not any(character in text for character in '"$`\\!'):
        return f'"{text}"'
    return shlex.quote(text)


def _escaped(character: str) -> str:
    """As it is written between $' and ', by its bytes where it cannot be seen."""
    if character in "'\\":
        return f"\\{character}"
    return character if character.isprintable() else "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))
