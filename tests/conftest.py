"""Makes the pack importable as `ternary_flux` in every test."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import _pack  # noqa: E402

_pack.load()
