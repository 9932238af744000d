"""Threads that each compute alone."""

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from .interrupts import held_back


@contextlib.contextmanager
def single_threaded_pool() -> Iterator[ThreadPoolExecutor]:
    """One thread for each core, in which torch does not start threads of its own; signals wait until it ends."""
    threads = torch.get_num_threads()
    try:
        with held_back(), ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)  # threads started later take the setting made last in any thread
