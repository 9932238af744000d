"""Ctrl-C and SIGTERM: unwound alike, and held back while something must not be left half done."""

import contextlib
import signal
from collections.abc import Callable, Iterator


class Terminated(KeyboardInterrupt):
    """SIGTERM, unwound like Ctrl-C so that temporary files are removed."""


@contextlib.contextmanager
def terminable():
    def terminate(*_):
        raise Terminated

    try:
        previous = signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def whole_steps() -> Iterator[Callable[[], bool]]:
    """Hold back Ctrl-C and SIGTERM, so that a step is never half done; the function given says whether one came.

    A second signal acts at once.
    """
    came, previous = [], {}

    def note(number: int, frame) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    with contextlib.suppress(ValueError):  # handlers can be set in the main thread only
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, note)
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
