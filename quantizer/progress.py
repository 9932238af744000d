"""A progress bar with rate and time left, on stderr."""

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
