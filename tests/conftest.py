"""Makes the pack importable as `ternary_flux` in every test, and random numbers the same in every run."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import _pack  # noqa: E402

_pack.load()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
