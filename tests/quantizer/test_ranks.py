"""Several processes on one conversion, as torchrun starts them: on CPUs, over gloo."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ternary_flux.quantizer import cli, ranks
from ternary_flux.quantizer.calibration import calibrate
from ternary_flux.quantizer.files.architecture import Architecture
from ternary_flux.quantizer.files.container import TensorFile
from ternary_flux.quantizer.pipeline.budget import Budget, plan
from ternary_flux.quantizer.pipeline.decisions import Decisions, Training
from ternary_flux.tests import builders

from . import as_rank

ARCH = Architecture(1, 128, 1, 1, 16, 16, context_dim=32, vec_dim=24, guidance=False)

SIZES = "64x64,32x64"  # every rank gets a batch of pictures


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    builders.write_flux(folder / "tiny.safetensors", ARCH)
    builders.write_conditioning(folder / "cond.safetensors", ARCH)
    return folder


def command(source: Path, output: Path, *more: str) -> list[str]:
    fixed = ["--conditioning", source / "cond.safetensors", "--size", SIZES, "--sampler-steps", 2, "--device", "cpu"]
    return [str(x) for x in ["convert", source / "tiny.safetensors", "-o", output, *fixed, "--budget", 0.01, *more]]


def together(*arguments: str, failing: int = -1) -> subprocess.CompletedProcess:
    """The command in two processes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [as_rank.__file__, str(failing), *arguments]
    return subprocess.run([*torchrun, *script], capture_output=True, text=True, timeout=300)


def test_a_process_that_is_alone():
    tensor = torch.ones(3)
    ranks.add_up([tensor])
    ranks.spread([tensor])
    ranks.wait()
    with ranks.first_alone():
        assert (ranks.rank(), ranks.world(), ranks.first(), ranks.may_speak()) == (0, 1, True, True)
    assert ranks.share([1, 2, 3]) == [1, 2, 3] and ranks.gather("a") == ["a"] and ranks.agree("b") == "b"
    assert ranks.hand_out({"a": tensor}, 0, "cpu")["a"].tolist() == [1, 1, 1]


@pytest.mark.slow
def test_two_processes_write_the_file_of_one(source, monkeypatch):
    """Pictures, velocities and codes in the same bits; what is trained up to the order of sums."""
    two, one = source / "two.safetensors", source / "one.safetensors"
    works = [Path(f"{path}.work") for path in (two, one)]
    training = Training(plan(ARCH, 21, 1 << 30, torch.device("cpu")), True, steps=4, seconds=None, accumulate=2)
    for work in works:
        Decisions(Budget(8, 48, 2, 130), training=training).save(work / "decisions.json")
    run = together(*command(source, two))
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("written;") == 1 and run.stdout.count("calibrate: velocity error") == 1
    monkeypatch.setattr(calibrate, "CalibrationSettings", as_rank.QUICK)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun lets its processes have: products are sums too
    try:
        assert cli.run(command(source, one)) == 0
    finally:
        torch.set_num_threads(threads)
    for folder in ("pictures", "velocities"):
        names = [sorted(path.name for path in (work / folder).glob("*.safetensors")) for work in works]
        assert names[0] == names[1]
        for name in names[0]:
            assert (works[0] / folder / name).read_bytes() == (works[1] / folder / name).read_bytes()
    calibrated = [TensorFile(work / "calibrated.safetensors") for work in works]
    assert calibrated[0].entries == calibrated[1].entries
    assert all((calibrated[0].bytes(key) == calibrated[1].bytes(key)).all() for key in calibrated[0].entries)
    trained = [TensorFile(path) for path in (two, one)]
    for key, entry in trained[0].entries.items():
        if entry.dtype != torch.uint8:
            torch.testing.assert_close(*(file.tensor(key).float() for file in trained), rtol=0.02, atol=1e-3)


@pytest.mark.slow
def test_the_failure_of_one_process_is_told_once(source):
    output = source / "failed.safetensors"
    run = together(*command(source, output), failing=1)
    assert run.returncode and not output.exists()
    said = [line for line in run.stderr.splitlines() if "convert: " in line]
    assert said == ["convert: broken on purpose"] and "quantizer/cli.py" not in run.stderr
    assert Path(f"{output}.work/rounded.safetensors").exists()


def test_other_commands_refuse_torchrun(source, monkeypatch, capsys):
    for name, value in (("TORCHELASTIC_RUN_ID", "none"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    assert cli.run(["round", str(source / "tiny.safetensors"), "-o", str(source / "rounded.safetensors")]) == 2
    assert "without torchrun" in capsys.readouterr().err
