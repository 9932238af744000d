"""Whatever breaks: kills, full disks, closed pipes, inputs that are no files or change, and two runs for one target."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ternary_flux.quantizer.rounding.round import round_checkpoint
from ternary_flux.tests.quantizer import synthetic

ROOT = Path(__file__).resolve().parents[3]
FORKS = (
    "import sys, _pack; _pack.load(); from ternary_flux.tests.quantizer.commands import forks; "
    "forks.main(*sys.argv[1:])"
)
# command -> times it is killed; those that take seconds less often
KILLS = {"round": 50, "export": 50, "pack": 50, "import": 50, "mixed": 8, "report": 6, "distill": 8, "calibrate": 5}


def python(*arguments, **options) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | options.pop("env", {})
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "timeout": 300} | options
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, **options)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return synthetic.write(tmp_path_factory.mktemp("source") / "flux.safetensors")


@pytest.fixture(scope="module")
def ternary(source) -> Path:
    target = source.with_name("ternary.safetensors")
    round_checkpoint(source, target)
    return target


@pytest.mark.slow
@pytest.mark.parametrize("command", [*KILLS, "convert"])
def test_killed_at_random_moments(tmp_path, command):
    done = python("-c", FORKS, tmp_path, "killed", command, KILLS.get(command, 2))
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", [*KILLS, "convert"])
def test_no_room_for_what_is_written(tmp_path, command):
    done = python("-c", FORKS, tmp_path, "starved", command)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr
