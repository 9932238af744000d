"""How many threads compute, together or each alone."""

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import torch

from .interrupts import held_back

_LOOK_SECONDS = 0.3


@contextlib.contextmanager
def single_threaded_pool() -> Iterator[ThreadPoolExecutor]:
    """One thread for each core, in which torch does not start threads of its own; signals wait until it ends."""
    threads = torch.get_num_threads()
    try:
        with held_back(), ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)  # threads started later take the setting made last in any thread


def leave_busy_processors(most: int) -> int:
    """Let torch compute with as many threads, `most` and at least one, as other programs leave processors free.

    The threads of a product wait for one another, and where one of them has no processor, for its next turn: beside a
    program that used one of two processors, training steps of a small model with two threads took twice as long as with
    one. Call it while this process does nothing else; returns the number of threads.
    """
    if most > 1:
        count = psutil.cpu_count() or 1
        busy = count * psutil.cpu_percent(_LOOK_SECONDS) / 100
        most = max(1, min(most, round(count - busy)))
        torch.set_num_threads(most)
    return most
