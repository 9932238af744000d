"""What files cost at full size: seconds, memory, and bytes per second beside the disk's own speed.

    python -m benchmarks.speed.files                    FLUX.2 [klein] 4B with a fifth of its blocks
    python -m benchmarks.speed.files --full             FLUX.1 [dev], FLUX.2 [klein] 4B and FLUX.2 [dev], one by one
    python -m benchmarks.speed.files --full --models FLUX.2-dev --share 0.5     half of its blocks, on a smaller disk
    python -m benchmarks.speed.files --dry              a tiny model, without ComfyUI: nothing is written in results

Checkpoints with a model's names and shapes and random weights are written as a stream to `--folder`. Every command
that reads or writes whole files runs on them, each in a process of its own, with its input out of the system's cache.
In the same run the disk writes and reads one file with nothing in between: `of the disk` is the time in which it would
move the bytes that the command reads and writes, over the time that the command took. `peak` is the resident memory of
the process, mapped pages included.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from ternary_flux.benchmarks import comfyui
from ternary_flux.benchmarks import report as reports
from ternary_flux.benchmarks.speed.models import MODELS, TINY
from ternary_flux.quantizer.files.architecture import Architecture
from ternary_flux.quantizer.files.container import create
from torch import Tensor

FULL = ("FLUX.1-dev", "FLUX.2-klein-4B", "FLUX.2-dev")
GROUP = 128
_NOISE = 1 << 24  # random numbers that all tensors share, each from another place
_DISK_BYTES = 2 << 30
_PIECE = 1 << 24
_ROOM = 1.25  # on the disk, of the dense checkpoint: what is made of it lies beside it

LOAD = """
import sys, _pack
_pack.load()
from ternary_flux.benchmarks import comfyui
comfyui.make_importable()
from ternary_flux.nodes import loader
model = loader.load(sys.argv[1])
print(model.model_size())
"""


class Values:
    """Random bf16 tensors [*shape], made without memory beyond theirs: Gaussian, or of groups that are {-s, 0, s}."""

    def __init__(self, ternary: bool):
        self.ternary = ternary
        noise = torch.randn(_NOISE, generator=torch.Generator().manual_seed(0))
        if ternary:
            scale = noise.view(-1, GROUP).abs().mean(1, keepdim=True).bfloat16().float()
            noise = (noise.sign() * (noise.abs() > 0.6)).view(-1, GROUP).mul(scale).flatten()
        self.noise = noise.bfloat16()
        self.made = 0

    def make(self, name: str, shape: Sequence[int]) -> Tensor:
        if name.endswith("scale"):
            return torch.ones(shape, dtype=torch.bfloat16)
        self.made += 1
        count = torch.Size(shape).numel()
        start = self.made * 7919 * GROUP % _NOISE
        values = self.noise.roll(-start).repeat(-(-count // _NOISE))[:count].view(*shape)
        return values.mul_(2.0**-6)  # a power of two: groups stay {-s, 0, s}


def write_checkpoint(path: Path, arch: Architecture, ternary: bool = False) -> None:
    """A dense checkpoint with BFL's names, one tensor in memory at a time."""
    values = Values(ternary)
    with create(path, {name: (torch.bfloat16, shape) for name, shape in arch.shapes.items()}, {}) as file:
        for name, shape in arch.shapes.items():
            file.write(name, values.make(name, shape))


def forget(path: Path) -> None:
    """Take a file out of the system's cache, where the system can."""
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_speed(folder: Path, size: int) -> dict[str, float]:
    """Bytes per second of one file that is written (and reached the disk) and read, with nothing in between."""
    path, piece = folder / "disk", os.urandom(min(size, _PIECE))
    start = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for _ in range(size // len(piece)):
            file.write(piece)
        os.fsync(file.fileno())
    written = time.perf_counter() - start
    forget(path)
    buffer = bytearray(len(piece))
    start = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    read = time.perf_counter() - start
    size = path.stat().st_size
    path.unlink()
    return {"read": size / read, "write": size / written}


def run(command: Sequence[object]) -> tuple[float, int, str]:
    """Seconds, peak resident bytes and output of a process; RuntimeError with what it said where it fails."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=comfyui.ROOT,
        env=os.environ | {"COMFYUI_PATH": str(comfyui.find())},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{said[-4000:]}")
    return seconds, usage.ru_maxrss * (1 if platform.system() == "Darwin" else 1024), said


def measure(name: str, command: Sequence[object], reads: Path, writes: Path | None, disk: dict[str, float]) -> dict:
    """One row: a command that reads a file from the disk and may write another."""
    forget(reads)
    seconds, peak, _ = run(command)
    read, written = reads.stat().st_size, writes.stat().st_size if writes else 0
    ideal = read / disk["read"] + written / disk["write"]
    row: dict = {"command": name, "seconds": seconds, "peak": peak, "read": read, "written": written}
    row |= {"bytes per second": (read + written) / seconds, "of the disk": ideal / seconds}
    speed = f"{row['bytes per second'] / 1e9:5.2f} GB/s, {row['of the disk']:6.1%} of the disk"
    print(f"  {name:24} {seconds:7.1f} s, {speed}, peak {peak / 1e9:.2f} GB", flush=True)
    return row


def measure_model(arch: Architecture, folder: Path, disk: dict[str, float], host: bool = True) -> list[dict]:
    """Every command on one model; what is no longer needed is deleted, so that one dense file lies there at a time."""
    dense, rounded, shared, unpacked, imported = (
        folder / f"{name}.safetensors" for name in ("dense", "rounded", "shared", "unpacked", "imported")
    )
    command = ("-m", "quantizer")
    start = time.perf_counter()
    write_checkpoint(dense, arch)
    print(f"  a checkpoint of {dense.stat().st_size / 1e9:.2f} GB in {time.perf_counter() - start:.0f} s", flush=True)
    rows = [
        measure("inspect, dense", [*command, "inspect", dense], dense, None, disk),
        measure("round", [*command, "round", dense, "-o", rounded], dense, rounded, disk),
    ]
    dense.unlink()
    to_share = [*command, "pack", rounded, "--packing", "base3", "-o", shared]
    rows += [
        measure("inspect", [*command, "inspect", rounded], rounded, None, disk),
        measure("verify", [*command, "verify", rounded], rounded, None, disk),
        measure("pack to base3", to_share, rounded, shared, disk),
        *([measure("load in ComfyUI", ["-c", LOAD, rounded], rounded, None, disk)] if host else []),
    ]
    rounded.unlink()
    to_load = [*command, "pack", shared, "--packing", "planes32", "-o", rounded]
    rows += [
        measure("pack to planes32", to_load, shared, rounded, disk),
        *([measure("load in ComfyUI, base3", ["-c", LOAD, shared], shared, None, disk)] if host else []),
    ]
    rounded.unlink()
    shared.unlink()
    write_checkpoint(unpacked, arch, ternary=True)
    rows.append(measure("import", [*command, "import", unpacked, "-o", imported], unpacked, imported, disk))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.files", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="whole models")
    parser.add_argument("--models", help=f"comma separated, of {', '.join(MODELS)}")
    parser.add_argument("--share", type=float, help="of a model's blocks (default: 1 with --full, else 0.2)")
    parser.add_argument("--folder", type=Path, help="where the files are written (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="JSON file (default: a name from the models, in benchmarks/results)")
    parser.add_argument("--dry", action="store_true", help="a tiny model, nothing written unless --out")
    args = parser.parse_args()
    models = args.models.split(",") if args.models else list(FULL) if args.full else ["FLUX.2-klein-4B"]
    if unknown := [name for name in models if name not in MODELS]:
        parser.error(f"unknown model {unknown[0]}, expected some of {', '.join(MODELS)}")
    share = args.share or (1.0 if args.full else 0.2)
    known = {"tiny": TINY} if args.dry else {name: shrunk(MODELS[name], share) for name in models}
    out = args.out
    if out is None and not args.dry:
        out = reports.RESULTS / f"files-{'-'.join(known)}{'' if share == 1 else f'-{share:g}'}.json"
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="ternary-flux-files-") as made:
        folder = Path(made)
        for name, arch in known.items():
            need = _ROOM * 2 * sum(torch.Size(shape).numel() for shape in arch.shapes.values())
            if need > (free := shutil.disk_usage(folder).free):
                problem = f"{name} needs {need / 1e9:.0f} GB in {folder.parent}, where {free / 1e9:.0f} GB are free"
                parser.error(f"{problem}; give another --folder, or --share 0.5 for half of its blocks")
        disk = disk_speed(folder, 1 << 20 if args.dry else _DISK_BYTES)
        report: dict = {"machine": reports.machine("cpu"), "disk": disk, "models": []}
        print(json.dumps(report["machine"]))
        print(f"disk: reads {disk['read'] / 1e9:.2f} GB/s, writes {disk['write'] / 1e9:.2f} GB/s")
        for name, arch in known.items():
            blocks = {"double": arch.depth, "single": arch.depth_single}
            print(f"{name}, {arch.depth} double and {arch.depth_single} single blocks", flush=True)
            report["models"].append(
                {"model": name, "blocks": blocks, "rows": measure_model(arch, folder, disk, not args.dry)}
            )
            for file in folder.iterdir():
                file.unlink()
            reports.write(out, report)


def shrunk(arch: Architecture, share: float) -> Architecture:
    """A model with this share of its blocks, at least one of each kind."""
    counts = {name: max(1, round(getattr(arch, name) * share)) for name in ("depth", "depth_single")}
    return replace(arch, **counts)


if __name__ == "__main__":
    main()
