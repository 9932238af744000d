"""Whether a file is still what its writer wrote: every byte is read and compared with the checksums in the header."""

import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from ..interrupts import held_back
from .container import Entry, FormatError, checksums_of, header_checksum, read_header
from .identity import identify

HEADER = "the header"
_PIECE = 1 << 20  # bytes read at a time: within the caches


def verify(path: str | os.PathLike, on_progress: Callable[[int], object] = lambda size: None) -> list[str]:
    """What does not agree with its checksum: keys of tensors, and HEADER; none in a whole file.

    `on_progress` is called with the number of bytes done since the last call. Raises FormatError where the file is not
    safetensors, truncated, or without checksums; OSError.
    """
    header = read_header(path)
    checksums = checksums_of(header)
    if checksums is None:
        problem = "the file has no checksums, so nothing says whether it is whole"
        remedy = "`inspect` checks that it can be read"
        if identify(path).kind == "ternary":
            remedy += "; `pack` writes a copy that has them"
        raise FormatError(path, f"{problem} (an older version of this pack wrote it, or another program); {remedy}")
    damaged = []
    if header_checksum(header.metadata, header.entries) != checksums.header:
        damaged.append(HEADER)
    damaged += [key for key in checksums.tensors if key not in header.entries]
    threads = os.cpu_count()  # crc32 and reading let other ones run
    with held_back() as let_through, ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda entry: _checksum(path, entry), header.entries.values())
        for (key, entry), value in zip(header.entries.items(), found, strict=True):
            if value != checksums.tensors.get(key):
                damaged.append(key)
            on_progress(entry.nbytes)
            let_through()
    return damaged


def _checksum(path: str | os.PathLike, entry: Entry) -> int | None:
    """CRC-32 of a tensor's bytes, None where they end early."""
    value, left = 0, entry.nbytes
    buffer = memoryview(bytearray(min(_PIECE, left)))
    with open(path, "rb", buffering=0) as file:
        file.seek(entry.start)
        while left:
            count = file.readinto(buffer[:left])
            if not count:
                return None
            value = zlib.crc32(buffer[:count], value)
            left -= count
    return value
