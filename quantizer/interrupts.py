"""Ctrl-C, SIGTERM and SIGHUP: unwound alike, and held back while something must not be left half done."""

import _thread
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator

_ENDING = ("SIGTERM", "SIGHUP", "SIGBREAK")  # of which a system has some
_came: list[int] | None = None  # signals that came while they are held back; None where they are not


class Terminated(KeyboardInterrupt):
    """A signal that ends the process, unwound like Ctrl-C so that temporary files are removed."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


@contextlib.contextmanager
def _handled(names: Iterable[str], handler: Callable) -> Iterator[None]:
    """The handler for those of these signals that this process does not ignore (as under nohup)."""
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    previous = {}
    with contextlib.suppress(ValueError):  # handlers can be set in the main thread only
        for number in numbers:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                previous[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def at_once(message: str):
    """End the process at once, with this message, on a signal: where there is nothing to unwind yet.

    Libraries that are being imported turn KeyboardInterrupt into errors of many kinds.
    """

    def end(number: int, _) -> None:
        with contextlib.suppress(OSError):
            os.write(2, f"\n{message}\n".encode())
        os._exit(128 + number)

    return _handled(("SIGINT", *_ENDING), end)


def terminable():
    """Raise Terminated on SIGTERM and SIGHUP; further ones do not disturb the unwinding."""

    def terminate(number: int, _) -> None:
        for name in _ENDING:
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
        raise Terminated(number)

    return _handled(_ENDING, terminate)


def terminate_at_eof() -> None:
    """From now on, the end of stdin means SIGTERM: a program that started this one holds a pipe, which ends with it."""

    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 1024):  # not sys.stdin, whose lock a thread may not hold when the interpreter ends
                pass
        _thread.interrupt_main(signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def _holding() -> Iterator[list[int]]:
    """Collects the signals that come, of which a second one acts at once."""
    global _came
    came: list[int] = []

    def note(number: int, _) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    with _handled(("SIGINT", *_ENDING), note):
        _came = came
        try:
            yield came
        finally:
            _came = None


@contextlib.contextmanager
def whole_steps() -> Iterator[Callable[[], bool]]:
    """Hold back Ctrl-C, SIGTERM and SIGHUP, so that no step is half done; the function given says whether one came.

    A second signal acts at once.
    """
    with _holding() as came:
        yield lambda: bool(came)


@contextlib.contextmanager
def held_back() -> Iterator[Callable[[], None]]:
    """Hold back Ctrl-C, SIGTERM and SIGHUP until the block ends, or the function given is called, which raises them.

    Wherever threads are given work and waited for: an exception out of a signal can leave a lock of the standard
    library's pools locked, and then everything waits for ever. Inside another such block, that one decides.
    """
    if _came is not None or threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    with _holding() as came:

        def let_through() -> None:
            if came:
                raise KeyboardInterrupt if came[0] == signal.SIGINT else Terminated(came[0])

        yield let_through
        let_through()
