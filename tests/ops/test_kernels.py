"""Runs kernels_interpreted.py in a process of its own, where Triton interprets kernels on the CPU."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytestmark = pytest.mark.slow


def test_kernels_in_the_interpreter(tmp_path, subtests):
    file, report = Path(__file__).with_name("kernels_interpreted.py"), tmp_path / "report.xml"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--no-header", f"--junit-xml={report}", str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=file.parents[2],
        capture_output=True,
        text=True,
    )
    assert report.is_file(), done.stdout + done.stderr
    cases = list(ElementTree.parse(report).iter("testcase"))
    for case in cases:
        with subtests.test(case.get("name")):
            problems = [part.text for part in case if part.tag in ("failure", "error")]
            assert not problems, "\n".join(problems)
    assert len(cases) > 50 and done.returncode == 0, done.stdout + done.stderr
