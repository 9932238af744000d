"""Runs kernels_interpreted.py in a process of its own, where Triton interprets kernels on the CPU."""

import os
import subprocess
import sys
from pathlib import Path


def test_kernels_in_the_interpreter():
    file = Path(__file__).with_name("kernels_interpreted.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=file.parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
