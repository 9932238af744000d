"""The speed benchmarks run every path on the CPU, and say plainly what they cannot do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ternary_flux.benchmarks import comfyui
from ternary_flux.benchmarks.speed import files, gpu, transformer
from ternary_flux.quantizer import cli

ROOT = Path(__file__).resolve().parents[2]


def run(module, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_kernels(tmp_path):
    out = tmp_path / "kernels.json"
    printed = run("speed.kernels", "--dry", "--out", out)
    rows = json.loads(out.read_text())["rows"]
    assert {row["m"] for row in rows} == {20, 1}
    for row in rows:
        assert row["method"] in printed
        if "missing" in row:
            assert not row["method"].startswith(("ours", "bf16")), row
            assert "failed" not in row["missing"], row
        else:
            assert row["seconds"] is None
            bound = 0.1 if "e4m3" in row["method"] else 0.02 if "int8" in row["method"] else 2e-3
            assert row["error"] < bound or "rotated" in row["method"] or "_int_mm" in row["method"], row
    methods = {row["method"] for row in rows}
    assert {"gemlite A16W2 g128 fp16", "comfy-kitchen int8", "torch._int_mm", "ours e4m3, row scales"} <= methods


def test_files(tmp_path, monkeypatch, capsys):
    """Every command, here in this process."""

    def in_process(command):
        assert list(command[:2]) == ["-m", "quantizer"] and cli.run([str(part) for part in command[2:]]) == 0
        return 1.0, 1 << 20, ""

    out = tmp_path / "files.json"
    monkeypatch.setattr(files, "run", in_process)
    monkeypatch.setattr(files, "_NOISE", 1 << 18)
    monkeypatch.setattr(sys, "argv", ["files", "--dry", "--folder", str(tmp_path), "--out", str(out)])
    files.main()
    printed = capsys.readouterr().out
    (model,) = json.loads(out.read_text())["models"]
    rows = {row["command"]: row for row in model["rows"]}
    assert {"round", "verify", "import", "inspect", "pack to base3"} < set(rows)
    assert rows["round"]["read"] > 3 * rows["round"]["written"] > 0 == rows["verify"]["written"]
    assert rows["pack to base3"]["written"] < rows["pack to planes32"]["written"]
    assert rows["pack to planes32"]["written"] == pytest.approx(rows["round"]["written"], rel=1e-3)  # but for blanks
    assert all(command in printed for command in rows)
    assert list(tmp_path.iterdir()) == [out]


def test_a_command_is_measured_in_a_process_of_its_own():
    seconds, peak, said = files.run(["-c", "print(len(bytearray(100 << 20)))"])
    assert seconds > 0 and peak > 100 << 20 and said == f"{100 << 20}\n"
    with pytest.raises(RuntimeError, match="on purpose"):
        files.run(["-c", "raise SystemExit('on purpose')"])


@pytest.mark.slow
def test_fallback(tmp_path):
    out = tmp_path / "fallback.json"
    printed = run("speed.fallback", "--dry", "--threads", 1, "--out", out)
    report = json.loads(out.read_text())
    assert [row["tokens"] for row in report["rows"]] == [1, 20]
    for row in report["rows"]:
        methods = row["methods"]
        assert methods["dense"]["ratio"] == 1 and methods["full"]["error"] < 1e-6
        assert ("int8" in methods) == report["machine"]["int8 products"]
        assert "int8" not in methods or methods["int8"]["error"] < 0.02
    assert "full" in printed and "20 tokens" in printed


@pytest.mark.slow
@pytest.mark.parametrize("forward, modes", [("ComfyUI", ["int8"]), ("quantizer", ["bf16", "full"])])
def test_transformer(tmp_path, monkeypatch, forward, modes):
    out = tmp_path / "transformer.json"
    arguments = ["--dry", "--forward", forward, "--modes", ",".join(modes), "--out", str(out)]
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui.find()))
    monkeypatch.setattr(sys, "argv", ["transformer", *arguments])
    transformer.main()
    report = json.loads(out.read_text())
    for mode in modes:
        result = report["modes"][mode]
        assert "missing" not in result, result
        assert result["forward"] == forward
        assert result["sizes"] == {"32": {"finite": True}}


@pytest.mark.slow
def test_tune(tmp_path):
    tiles = tmp_path / "tiles.json"
    printed = run("speed.tune", "--dry", "--kernels", "int8_group", TERNARY_FLUX_TILES=str(tiles))
    assert "int8_group, up to 16 tokens" in printed
    assert set(json.loads(tiles.read_text())["cpu"]) == {"int8_group"}


@pytest.mark.slow
def test_checks(tmp_path):
    """In processes of their own, as on a GPU."""
    out = tmp_path / "kernels.json"
    assert "0 wrong" in run("speed.gpu_checks", "kernels", "--dry", "--out", out)
    rows = json.loads(out.read_text())
    assert {(row["scales"], row["rank"]) for row in rows} == {("float", 0), ("integer", 16)}
    assert all(row["right"] and row["error"] > 0 for row in rows)
    assert '"right": true' in run("speed.gpu_checks", "solver", "--dry")


WITHOUT_A_GPU = """
import json, runpy, sys
for module, *arguments in json.loads(sys.stdin.read()):
    sys.argv = [module, *arguments]
    try:
        runpy.run_path(module, run_name="__main__") if "/" in module else runpy.run_module(module, run_name="__main__")
    except SystemExit as end:
        print(json.dumps(str(end)))
"""


@pytest.mark.slow
def test_without_a_gpu_they_say_so():
    parts = [arguments for arguments, _ in gpu.PARTS.values()]
    programs = [["benchmarks.speed.gpu"], *(part[part[0] == "-m" :] for part in parts)]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_GPU],
        input=json.dumps(programs),
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(said) == len(programs) and all("CUDA" in each for each in said), said


def test_the_gpu_run_keeps_what_a_part_wrote_before_it_failed(tmp_path):
    script = tmp_path / "part.py"
    script.write_text("import sys; open(sys.argv[2], 'w').write('[1]'); sys.exit(3)")
    found = gpu.run((str(script),), 60, dict(os.environ))
    assert found["result"] == [1] and found["problem"] == "ended with code 3"


@pytest.mark.slow
def test_stages():
    printed = run("speed.stages", "--dry")
    rows = [line.rsplit(maxsplit=4)[0] for line in printed.splitlines() if line.endswith("forwards")]
    trained = ["measure", "train", "train, with codes"]
    assert rows == ["sample", "label", "forward", "calibrate", "calibrate, 4 times the states", *trained]
