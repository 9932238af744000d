"""Work folders: what may be used as one, what lies in it of other runs, and damaged files that were kept."""

import json
import os
import subprocess
import sys

import pytest
import torch
from ternary_flux.quantizer.files import container, locks, work_folder

_HOLD = "import fcntl, sys; file = open(sys.argv[1], 'wb'); fcntl.flock(file, fcntl.LOCK_EX); print(); sys.stdin.read()"


def _partial(folder, name: str):
    path = folder / f".{name}.0123abcd.partial"
    path.write_bytes(b"half")
    return path


@pytest.mark.skipif(os.name == "nt", reason="a lock is on a part of a file there")
def test_a_folder_is_cleaned_of_dead_runs_and_not_of_living_ones(tmp_path):
    (tmp_path / "below").mkdir()
    dead, held = _partial(tmp_path, "dead.safetensors"), _partial(tmp_path / "below", "held.safetensors")
    stale, foreign = tmp_path / ".stale.lock", tmp_path / ".other-program.lock"
    stale.write_text("process 1 on here since 2026-01-01 00:00:00\n")
    foreign.touch()
    lock = tmp_path / "below" / ".held.safetensors.lock"
    with subprocess.Popen([sys.executable, "-c", _HOLD, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with locks.hold(tmp_path):
            assert not dead.exists() and not stale.exists()
            assert held.exists() and lock.exists() and foreign.exists()
        other.stdin.close()


def test_a_folder_with_other_files_is_no_work_folder(tmp_path):
    work_folder.check_work_folder(tmp_path / "new")
    work_folder.check_work_folder(tmp_path)
    (tmp_path / "holiday.png").touch()
    with pytest.raises(ValueError, match=r"no work folder \('holiday.png' lies in it\)"):
        work_folder.check_work_folder(tmp_path)
    (tmp_path / "pictures").mkdir()
    work_folder.keep_settings(tmp_path / "pictures", {"size": 1})
    work_folder.check_work_folder(tmp_path)
    with pytest.raises(NotADirectoryError):
        work_folder.check_work_folder(tmp_path / "holiday.png")


def test_a_damaged_kept_file_is_refused(tmp_path):
    path = tmp_path / "block.safetensors"
    container.save(path, {"codes": torch.arange(64, dtype=torch.uint8)}, {"fits": json.dumps({})})
    assert work_folder.open_kept(path).tensor("codes")[3] == 3
    with open(path, "r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"x")
    with pytest.raises(container.FormatError, match=r"damaged; delete it, and give the command again"):
        work_folder.open_kept(path)
