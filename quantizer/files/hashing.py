"""The sha256 of files, computed while something else is done with them."""

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path


@contextlib.contextmanager
def hashing(files: Iterable[Path]) -> Iterator[Callable[[], str]]:
    """Computes the sha256 of the files' bytes, one after another, meanwhile; what it gives waits for the result.

    The thread ends with the block, done or not. Waiting takes no lock that an interrupt could leave locked.
    """
    ended, results, errors = threading.Event(), [], []

    def compute() -> None:
        digest = hashlib.sha256()
        try:
            for path in files:
                with open(path, "rb") as file:
                    while not ended.is_set() and (data := file.read(1 << 20)):
                        digest.update(data)
            results.append(digest.hexdigest())
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=compute, daemon=True)

    def result() -> str:
        while thread.is_alive():
            thread.join(0.1)
        for error in errors:
            raise error
        return results[0]

    thread.start()
    try:
        yield result
    finally:
        ended.set()
        thread.join()
