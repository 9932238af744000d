"""Progress bars for work in several stages: one bar at a time, and lines above it."""

import sys

from tqdm import tqdm

from .progress import progress


class Bars:
    """Use as a context manager; `show` opens a new bar where the stage's name is another."""

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
