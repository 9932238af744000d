"""Makes the pack importable as `ternary_flux` in every test, and random numbers the same in every run."""

import signal
import sys
import zlib
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import _pack  # noqa: E402

_pack.load()

# What a shell starts in the background ignores Ctrl-C, and so would what the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--write-docs", action="store_true", help="write what tests make for docs: pictures, tables")


class Docs:
    """Files of the documentation that tests make."""

    def __init__(self, writing: bool):
        self.writing = writing

    def keep(self, name: str, content: bytes) -> None:
        if self.writing:
            (_pack.ROOT / name).write_bytes(content)


@pytest.fixture(scope="session")
def docs(request) -> Docs:
    return Docs(request.config.getoption("--write-docs"))


# A busy machine is slow, not wrong.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef):
    """Fixtures of modules and sessions come before `seed`: their numbers depend on their names alone."""
    if fixturedef.scope != "function":
        torch.manual_seed(zlib.crc32(fixturedef.argname.encode()))


@pytest.fixture(scope="module")
def simple_solver():
    """Calibration without the search for column scales, for tests of what is around it."""
    from ternary_flux.quantizer.calibration import calibrate

    with pytest.MonkeyPatch.context() as patch:
        simple = partial(calibrate.CalibrationSettings, exponents=(), sweeps=1)
        patch.setattr(calibrate, "CalibrationSettings", simple)
        yield
