import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from ternary_flux.quantizer.calibration.sensitivity import write_mixed
from ternary_flux.quantizer.cli import COMMANDS, run
from ternary_flux.quantizer.files.checkpoint import open_checkpoint
from ternary_flux.quantizer.files.ternary import open_ternary
from ternary_flux.quantizer.rounding.round import round_checkpoint
from ternary_flux.tests.quantizer import synthetic

ROOT = Path(__file__).resolve().parents[3]


def command(*arguments, **options) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, **pipes, **options)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return synthetic.write(tmp_path_factory.mktemp("source") / "flux.safetensors")


def test_from_checkpoint_to_export(source, tmp_path, capsys):
    ternary, dense = tmp_path / "ternary.safetensors", tmp_path / "dense.safetensors"
    assert run(["round", str(source), "-o", str(ternary)]) == 0
    said = capsys.readouterr()
    assert "not expected to make good pictures" in said.out and "calibrate" in said.out and "weights" in said.err
    assert run(["inspect", str(ternary), "--layers"]) == 0
    assert "ternary FLUX" in capsys.readouterr().out
    assert run(["export", str(ternary), "-o", str(dense), "--dtype", "fp32"]) == 0
    assert open_checkpoint(dense).dtype("img_in.weight") == torch.float32
    assert run(["inspect", str(dense)]) == 0
    assert "this is FLUX.1, not ternary" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense.safetensors", "ternary.safetensors"]


def test_mistakes_are_one_line_and_code_2(source, tmp_path, capsys):
    def mistake(*arguments):
        assert run([str(argument) for argument in arguments]) == 2
        said = capsys.readouterr()
        lines = said.err.strip().splitlines()
        assert len(lines) == 1 and not said.out, said
        return lines[0]

    target, mine = tmp_path / "out.safetensors", tmp_path / "mine.safetensors"
    mine.write_bytes(b"mine")
    assert mistake("round", tmp_path / "none", "-o", target) == f"round: {tmp_path / 'none'}: No such file or directory"
    assert "no safetensors file" in mistake("round", ROOT / "pyproject.toml", "-o", target)
    (tmp_path / "folder").mkdir()
    assert "this folder holds no weights" in mistake("round", tmp_path / "folder", "-o", target)
    (tmp_path / "folder").rmdir()
    assert "is a folder" in mistake("round", source, "-o", tmp_path)
    assert "does not exist" in mistake("round", source, "-o", tmp_path / "no" / "x")
    assert "--force" in mistake("round", source, "-o", mine)
    assert "the output is an input" in mistake("round", source, "-o", source, "--force")
    assert "this is FLUX.1, not ternary" in mistake("export", source, "-o", target)
    assert "truncated" in mistake("inspect", mine)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.safetensors"]
    assert run(["round", str(source), "-o", str(mine), "--force"]) == 0
    assert open_ternary(mine).layers


@pytest.mark.parametrize(
    "command, start, output, options",
    [
        ("convert", "dense", "dense", []),
        ("convert", "dense", "cond", []),
        ("calibrate", "dense", "dense", []),
        ("calibrate", "dense", "ternary", ["--like", "ternary"]),
        ("distill", "ternary", "ternary", ["--teacher", "dense"]),
        ("distill", "ternary", "dense", ["--teacher", "dense"]),
        ("mixed", "ternary", "dense", ["--teacher", "dense"]),
    ],
)
def test_no_command_replaces_what_it_reads(source, tmp_path, monkeypatch, capsys, command, start, output, options):
    monkeypatch.chdir(tmp_path)
    Path("dense").write_bytes(source.read_bytes())
    round_checkpoint("dense", "ternary")
    if "--like" in options:
        file = open_ternary("ternary")
        write_mixed("mixed", file, open_checkpoint("dense"), {next(iter(file.layers)): "two-terms"})
        Path("mixed").replace("ternary")
    Path("cond").write_bytes(b"prompts")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    shared = ["--conditioning", "cond", "--device", "cpu", "--force"]
    assert run([command, start, "-o", output, *options, *shared]) == 2
    assert f"{output}: the output is an input" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "option, value, wanted",
    [
        ("--rank", "-1", "a whole number from 0"),
        ("--sampler-steps", "0", "a whole number from 1"),
        ("--budget", "0", "a number above 0"),
        ("--budget", "nan", "a number above 0"),
        ("--budget", "1e300", "a number above 0 (a billion at most)"),
        ("--growth", "-0.1", "a number above 0 and below 1"),
        ("--growth", "1", "a number above 0 and below 1"),
        ("--guidance", "inf", "a number from 0 to 1000"),
        ("--seed", "-1", "a whole number from 0 to 2,147,483,647"),
        ("--seed", "2147483648", "a whole number from 0 to 2,147,483,647"),
        ("--tflops", "1e300", "a number above 0"),
        ("--device-memory", "1E400", "a size"),
        ("--device-memory", "GB", "a size"),
    ],
)
def test_numbers_out_of_bounds(capsys, option, value, wanted):
    with pytest.raises(SystemExit) as stop:
        run(["convert", "in", "-o", "out", "--conditioning", "cond", option, value])
    assert stop.value.code == 2
    assert f"argument {option}: {value} is not {wanted}" in capsys.readouterr().err


def test_outputs_that_are_no_files(source, tmp_path, capsys):
    for output in (f"{tmp_path}/new/", ""):
        with pytest.raises(SystemExit):
            run(["round", str(source), "-o", output])
        assert "give the name of a file to write" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(["inspect", ""])
    assert "the name is empty" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_broken_package_is_one_line(monkeypatch, tmp_path, capsys):
    broken = Mock(side_effect=ImportError("libcudnn.so.9: cannot open shared object file"))
    monkeypatch.setattr("ternary_flux.quantizer.files.summary.summarize", broken)
    assert run(["inspect", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "a package cannot be imported (libcudnn.so.9" in said and "doctor says more" in said


def test_what_is_for_the_plan_alone(capsys):
    assert run(["convert", "in", "-o", "out", "--conditioning", "cond", "--device-memory", "24GB"]) == 2
    assert "--device-memory and --tflops describe another GPU to --plan" in capsys.readouterr().err


def test_names_are_printed_as_they_are(tmp_path, capsys):
    assert run(["inspect", f"{tmp_path}/two  blanks\tand\nlines"]) == 2
    assert f"{tmp_path}/two  blanks\\tand\\nlines: No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. GPU 0 has 2 GiB")])
def test_too_little_memory_is_one_line(tmp_path, monkeypatch, capsys, error):
    monkeypatch.setattr("ternary_flux.quantizer.files.summary.summarize", Mock(side_effect=error))
    assert run(["inspect", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("inspect: not enough memory (") and "close other programs" in said
    assert "GPU 0" not in said


def test_folders_in_the_place_of_files(source, tmp_path, capsys):
    assert run(["verify", str(tmp_path)]) == 2
    assert f"{tmp_path} is a folder; give a .safetensors file" in capsys.readouterr().err
    more = ["--teacher", str(source), "--conditioning", "cond", "--work", str(tmp_path / "typo")]
    assert run(["report", "-o", str(tmp_path / "page"), *more]) == 2
    assert f"{tmp_path / 'typo'}: there is no such folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_values_that_are_not_finite_name_the_tensor(tmp_path, capsys):
    state = synthetic.tensors()
    state["single_blocks.1.linear1.weight"][3, 4] = float("nan")
    path = tmp_path / "flux.safetensors"
    synthetic.save_file(state, path)
    assert run(["round", str(path), "-o", str(tmp_path / "out.safetensors")]) == 2
    expected = f"{path}: single_blocks.1.linear1.weight: holds values that are not finite"
    assert expected in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]


def test_help_imports_nothing_heavy():
    code = "import sys, _pack; _pack.load(); from ternary_flux.quantizer import cli\n"
    code += "for argv in (['--help'], ['round', '--help'], ['inspect', '--help'], ['export', '--help']):\n"
    code += "    try: cli.run(argv)\n    except SystemExit as stop: assert stop.code == 0\n"
    code += "assert not {'torch', 'numpy', 'safetensors', 'tqdm'} & set(sys.modules)"
    process = command("-c", code)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert all(name in out for name in COMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize("stop, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_nothing_and_the_next_one_works(tmp_path, stop, code):
    source = synthetic.write(tmp_path / "flux.safetensors", replace(synthetic.FLUX1, hidden=1024))
    target = tmp_path / "out.safetensors"
    target.write_bytes(b"older")
    process = command("-m", "quantizer", "round", source, "-o", target, "--force")
    while process.poll() is None and not list(tmp_path.glob(".out*.partial")):
        time.sleep(0.005)
    process.send_signal(stop)
    _, err = process.communicate()
    assert process.returncode == code, err
    assert "nothing was written" in err and "Traceback" not in err
    assert target.read_bytes() == b"older" and sorted(tmp_path.iterdir()) == [source, target]
    round_checkpoint(source, target, overwrite=True)
    assert open_ternary(target).architecture.hidden == 1024


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    code = """
import resource, sys, _pack; _pack.load()
from ternary_flux.quantizer.rounding.round import round_checkpoint
for source in sys.argv[2:]:
    round_checkpoint(source, sys.argv[1], overwrite=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""
    small = synthetic.write(tmp_path / "small.safetensors", replace(synthetic.FLUX1, hidden=1024, depth_single=1))
    large = synthetic.write(tmp_path / "large.safetensors", replace(synthetic.FLUX1, hidden=1024, depth_single=4))
    process = command("-c", code, tmp_path / "out.safetensors", small, large)
    out, err = process.communicate()
    assert process.returncode == 0, err
    first, second = map(int, out.split())
    growth = large.stat().st_size - small.stat().st_size
    assert growth > 90e6 and second - first < growth / 2 and second < 2**31
