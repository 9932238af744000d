"""The terminal: bars with rate and time left on stderr, what a person keeps on stdout, nothing that breaks it."""

import contextlib
import json
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from . import ranks

if TYPE_CHECKING:
    from tqdm import tqdm

_LONGEST = 2000  # characters of a message


def program() -> str:
    """The command as it was typed: what a person can type again."""
    script = Path(sys.argv[0] or ".")
    if script.name == "__main__.py":
        return f"{_interpreter()} -m {sys.modules['__main__'].__package__ or 'quantizer'}"
    if script.is_dir():
        return f"{_interpreter()} {script}"
    return "ternary-flux" if script.stem == "ternary-flux" else f"{_interpreter()} -m quantizer"


def _interpreter() -> str:
    """`python` where that is this one."""
    name = Path(sys.executable).stem
    found = shutil.which(name)
    return name if found and os.path.abspath(found) == os.path.abspath(sys.executable) else sys.executable


def printable(text: str) -> str:
    """Text from files and names as one line that a terminal shows and does not obey."""
    return "".join(
        c if c.isprintable() or unicodedata.category(c) == "Zs" else c.encode("unicode_escape").decode() for c in text
    )


def message(error: BaseException) -> str:
    """An error as one line of bounded length; its type where it says nothing."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{printable(str(error.filename))}: {error.strerror}"
    else:
        text = str(error)
    text = printable(re.sub(r"\s*[\r\n]\s*", " ", text.strip()))
    if len(text) > _LONGEST:
        text = f"{text[: 3 * _LONGEST // 4]} ... {text[-_LONGEST // 4 :]}"
    return text or type(error).__name__


def say(*lines: str) -> None:
    """Print lines to stdout, above a bar that is there, with what a terminal would obey escaped."""
    tqdm = sys.modules.get("tqdm")  # without it there are no bars
    for line in lines if ranks.first() else ():
        if tqdm is None:
            print(printable(line))
        else:
            tqdm.tqdm.write(printable(line), file=sys.stdout)
    sys.stdout.flush()


class _Lenient:
    """A stream that shows as much as it can: no character that it cannot encode, no closed pipe and no full disk behind
    it makes a finished conversion fail.
    """

    def __init__(self, stream: TextIO | None):
        self._stream = stream or open(os.devnull, "w", encoding="utf-8")

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError):
            self._give_up()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._give_up()

    def _give_up(self) -> None:
        """Send the rest, and what is buffered, nowhere."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        self._stream = open(os.devnull, "w", encoding="utf-8")

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


@contextlib.contextmanager
def lenient() -> Iterator[None]:
    """stdout and stderr that never raise."""
    with contextlib.redirect_stdout(_Lenient(sys.stdout)), contextlib.redirect_stderr(_Lenient(sys.stderr)):
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()


def progress(total: int | None, description: str, unit: str = " weights") -> "tqdm":
    """A bar that counts to `total`; call `update(n)`. Logs get a line every ten seconds instead of a moving bar."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        unit_scale=True,
        smoothing=0.1,
        mininterval=0.1 if terminal else 10,
        ascii=not terminal,
        dynamic_ncols=terminal,
        disable=not ranks.first(),
    )


class Bars:
    """One bar at a time, and lines above it; `show` opens a new bar where the stage's name is another."""

    def __init__(self):
        self.bar: tqdm | None = None
        self.what = ""

    def __enter__(self) -> "Bars":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def show(self, what: str, done: int, total: int) -> None:
        """`done` of `total`; a total of 0 is not known yet."""
        if self.bar is None or what != self.what:
            self.close()
            self.what, self.bar = what, progress(total or None, what, " ")
        if total and self.bar.total != total:
            self.bar.total = total
        self.bar.update(done - self.bar.n)
        if done == total:
            self.close()

    def say(self, *lines: str) -> None:
        say(*lines)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class Events(Bars):
    """The same for programs: a JSON object in each line of stdout, {"stage", "done", "total"} or {"message"}."""

    def show(self, what: str, done: int, total: int) -> None:
        self._print({"stage": what, "done": done, "total": total})

    def say(self, *lines: str) -> None:
        for line in lines:
            self._print({"message": line})

    def _print(self, event: dict) -> None:
        if ranks.first():
            sys.stdout.write(json.dumps(event) + "\n")
            sys.stdout.flush()
