"""Commands that are killed or find no room on the disk: no half files, no leftovers, one clear line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FORKS = "import _pack; _pack.load(); from ternary_flux.tests.quantizer.commands import forks; forks.main()"
# command -> times it is killed; those that take seconds less often
KILLS = {"round": 50, "export": 50, "pack": 50, "import": 50, "mixed": 8, "report": 6, "distill": 8, "calibrate": 5}


@pytest.fixture(scope="module")
def complaints():
    """Does a test of forks.py, and gives what that says; torch is imported once for all of them."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", FORKS], cwd=ROOT, env=environment, text=True, **pipes) as process:

        def ask(folder: Path, *test: object) -> str:
            print(json.dumps([str(folder), *test]), file=process.stdin, flush=True)
            said = ""
            for line in process.stdout:
                if line == "done\n":
                    return said
                said += line
            return f"{said}ended with {process.wait()}"

        yield ask


@pytest.mark.slow
@pytest.mark.parametrize("command", [*KILLS, "convert"])
def test_killed_at_random_moments(complaints, tmp_path, command):
    assert not complaints(tmp_path, "killed", command, KILLS.get(command, 2))


@pytest.mark.slow
@pytest.mark.parametrize("command", [*KILLS, "convert"])
def test_no_room_for_what_is_written(complaints, tmp_path, command):
    assert not complaints(tmp_path, "starved", command)
