"""The sha256 of files, beside other work."""

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


@contextlib.contextmanager
def hashing(files: Iterable[Path]) -> Iterator[Callable[[], str]]:
    """Computes the sha256 of the files' bytes, one after another, meanwhile; what it gives waits for the result.

    The thread ends with the block, whether it is done or not.
    """
    ended = threading.Event()

    def compute() -> str:
        digest = hashlib.sha256()
        for path in files:
            with open(path, "rb") as file:
                while not ended.is_set() and (data := file.read(1 << 20)):
                    digest.update(data)
        return digest.hexdigest()

    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(compute).result
        finally:
            ended.set()
