"""Small inputs: that a path is a file at all, and text and JSON that name their file where they are damaged."""

import codecs
import json
import os
import stat
from pathlib import Path
from typing import Any


def check_regular(path: str | os.PathLike, wanted: str = "a .safetensors or .gguf file") -> os.stat_result:
    """What the system knows of a regular file. Raises OSError for a folder, device or pipe, which reading would block,
    and where there is nothing.
    """
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(f"{path} is a folder; give {wanted}")
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"{path} is a device or a pipe; give {wanted}")
    return status


def read_text(path: str | os.PathLike, wanted: str = "a text file") -> str:
    """A text file in UTF-8, with a byte order mark or without. ValueError, with the line, for another encoding."""
    check_regular(path, wanted)
    data = Path(path).read_bytes()
    for mark in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        if data.startswith(mark):
            raise ValueError(f"{path}: the text is in UTF-{8 * len(mark)}, and UTF-8 is needed; save it again as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}: line {line} is not in UTF-8; save the file again as UTF-8") from None
    if "\0" in text:
        raise ValueError(f"{path}: there are zero bytes in it: it is no text, or not in UTF-8; save it again as UTF-8")
    return text


def read_json(path: str | os.PathLike, *kept: type, remedy: str = "delete it, and give the command again") -> Any:
    """The JSON value of a file, of one of the types `kept`. ValueError, naming the file, where it is damaged."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, kept):
        raise ValueError(f"{path} is damaged; {remedy}")
    return value
