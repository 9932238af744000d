"""Bars and lines on the terminal: progress with rate and time left on stderr, what a person wants to keep on stdout."""

import sys

from tqdm import tqdm


def progress(total: int, description: str, unit: str = " weights") -> tqdm:
    """A bar that counts to `total`; call `update(n)`. Logs get a line every ten seconds instead of a moving bar."""
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

    def say(self, line: str) -> None:
        """Print a line to stdout without breaking the bar."""
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
