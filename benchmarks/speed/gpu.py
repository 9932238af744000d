"""Everything there is to measure on a GPU, in one command of nine minutes: right first, then fast.

    python -m benchmarks.speed.gpu [--out FILE] [--again]

Checks the kernels against float64, calibrate's solver against torch, the nodes in a real ComfyUI and the quantizer
against the CPU; measures the tiles, the layers beside bf16 and other packs, and a whole FLUX.1 [dev] step. Prints as it
goes and writes one JSON after every part; a run that was interrupted goes on with the parts that are missing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from ternary_flux.benchmarks import report as reports
from ternary_flux.benchmarks.report import RESULTS, ROOT

LAYERS = ("benchmarks.speed.kernels", "--models", "FLUX.1-dev")

# Name: (arguments of python, seconds). What is read later comes first.
PARTS: dict[str, tuple[tuple[str, ...], int]] = {
    "kernels are right": (("-m", "benchmarks.speed.gpu_checks", "kernels"), 60),
    "solver is right": (("-m", "benchmarks.speed.gpu_checks", "solver"), 30),
    "nodes are right": (("tests/nodes/on_gpu.py",), 60),
    "nodes are right, dynamic VRAM": (("tests/nodes/on_gpu.py", "--dynamic"), 60),
    "tiles": (("-m", "benchmarks.speed.tune"), 120),
    "layers": (("-m", *LAYERS, "--tokens", "4608,1024,64,1", "--skip", "gemlite"), 90),
    "transformer": (("-m", "benchmarks.speed.transformer", "--sizes", "1024,512"), 100),
    "quantizer on both devices": (("-m", "benchmarks.speed.gpu_checks", "quantizer"), 120),
    "layers with gemlite": (("-m", *LAYERS, "--tokens", "4608", "--only", "gemlite"), 60),
}
TOTAL = 540  # seconds; the last parts are left out where the others took longer


def run(arguments: tuple[str, ...], seconds: float, environment: dict[str, str]) -> dict:
    """Run one part; what it wrote, also where it failed or ran out of time."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "part.json"
        command = [sys.executable, *arguments]
        if "benchmarks.speed.tune" in arguments:
            out = Path(environment["TERNARY_FLUX_TILES"])
        else:
            command += ["--out", str(out)]
        started = time.monotonic()
        try:
            code = subprocess.run(command, cwd=ROOT, env=environment, timeout=seconds).returncode
            problem = f"ended with code {code}" if code else None
        except subprocess.TimeoutExpired:
            problem = f"stopped after {seconds:.0f} s"
        found: dict = {"seconds": round(time.monotonic() - started, 1)}
        if problem:
            found["problem"] = problem
        if out.is_file():
            found["result"] = json.loads(out.read_text())
        return found


def commit() -> str | None:
    """The pack's commit, with a plus sign where files differ from it; None outside a repository."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/gpu-NAME.json)")
    parser.add_argument("--again", action="store_true", help="measure every part again")
    parser.add_argument("--commit", default=commit(), help="what the results belong to (default: git's)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device")
    machine = reports.machine("cuda")
    out = options.out or RESULTS / f"gpu-{str(machine['gpu']).replace(' ', '-')}.json"
    report = {"machine": machine, "commit": options.commit, "parts": {}}
    if out.is_file() and not options.again:
        before = json.loads(out.read_text())
        if (before["machine"], before["commit"]) == (machine, options.commit):
            report = before
    environment = {**os.environ, "TERNARY_FLUX_TILES": str(out.with_suffix(".tiles.json"))}
    started = time.monotonic()
    for name, (arguments, seconds) in PARTS.items():
        if "result" in report["parts"].get(name, {}) and "problem" not in report["parts"][name]:
            print(f"{name}: measured already", flush=True)
            continue
        left = TOTAL - (time.monotonic() - started)
        if left < 20:
            print(f"{name}: left for another run of this command", flush=True)
            continue
        print(f"\n{name}, at most {min(seconds, left):.0f} s", flush=True)
        report["parts"][name] = run(arguments, min(seconds, left), environment)
        if problem := report["parts"][name].get("problem"):
            print(f"{name}: {problem}", flush=True)
        reports.write(out, report)
    print(f"\nwritten: {out}")


if __name__ == "__main__":
    main()
