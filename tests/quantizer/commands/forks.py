"""The command in children of a process that has torch already: dozens of runs that can be killed or starved.

`main` does one test after the other, says what went wrong (nothing where all is well), then DONE. The children are
forked while there is one thread.
"""

import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from ternary_flux.quantizer import cli
from ternary_flux.quantizer.calibration import calibrate, gptq  # noqa: F401  the children need not import them
from ternary_flux.quantizer.commands import convert, distill, export, import_, mixed, pack, report  # noqa: F401
from ternary_flux.quantizer.files.container import TensorFile
from ternary_flux.quantizer.files.export import export_checkpoint
from ternary_flux.quantizer.pictures import conditioning
from ternary_flux.quantizer.pipeline import convert as pipeline  # noqa: F401
from ternary_flux.quantizer.pipeline.workspace import Workspace
from ternary_flux.quantizer.report import page  # noqa: F401
from ternary_flux.quantizer.rounding.round import round_checkpoint
from ternary_flux.tests.quantizer import as_rank, synthetic

DONE = "done"
COMMON = "--size 64x64 --sampler-steps 2 --device cpu --conditioning".split()


def inputs(folder: Path) -> None:
    """dense, rounded, elsewhere (dense, of ternary values) and cond: what commands read."""
    arch = synthetic.FLUX1
    synthetic.write(folder / "dense.safetensors")
    round_checkpoint(folder / "dense.safetensors", folder / "rounded.safetensors")
    round_checkpoint(folder / "dense.safetensors", folder / "plain.safetensors", method="absmean")
    export_checkpoint(folder / "plain.safetensors", folder / "elsewhere.safetensors")
    context, pooled = torch.randn(8, 5, arch.context_dim), torch.randn(8, arch.vec_dim)
    conditioning.write(folder / "cond.safetensors", [f"prompt {i}" for i in range(8)], context, pooled)


def commands(folder: Path, output: Path) -> dict[str, list]:
    """The arguments of every command that writes `output`."""
    dense, rounded, cond = (folder / f"{name}.safetensors" for name in ("dense", "rounded", "cond"))
    teacher = ["--teacher", dense, *COMMON, cond]
    return {
        "round": ["round", dense, "-o", output],
        "export": ["export", rounded, "-o", output],
        "pack": ["pack", rounded, "-o", output, "--packing", "base3"],
        "import": ["import", folder / "elsewhere.safetensors", "-o", output],
        "calibrate": ["calibrate", dense, "-o", output, *COMMON, cond, "--pictures", 6, "--states", 8, "--sweeps", 1],
        "mixed": ["mixed", rounded, "-o", output, *teacher, "--pictures", 2, "--precisions", "int8"],
        "distill": ["distill", rounded, "-o", output, *teacher, "--pictures", 6, "--states", 12, "--held-out", 2]
        + ["--steps", 4, "--evaluate-every", 2, "--batch", 4, "--snapshot-minutes", 1e-9, "--resume"],
        "convert": ["convert", dense, "-o", output, *COMMON, cond, "--budget", 0.02],
        "report": ["report", f"rounded={rounded}", "-o", output.with_suffix(""), *teacher]
        + ["--pictures", 2, "--held-out", 2],
    }


def fork(arguments: Iterable, prepare: Callable[[], object] = lambda: None, log: Path = Path(os.devnull)) -> int:
    """Start the command in a child, whose output goes to `log`; returns its process id."""
    child = os.fork()
    if child:
        return child
    try:
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        prepare()
        os._exit(cli.run([str(argument) for argument in arguments]))
    except KeyboardInterrupt:  # before or after the run
        os._exit(cli.INTERRUPTED)
    except BaseException:  # what a person would see
        import traceback

        traceback.print_exc()
        os._exit(1)


def wait(child: int) -> int:
    """The exit code of a child."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def leftovers(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob(".*") if path.name.endswith((".partial", ".lock"))]


def tensors(path: Path) -> dict[str, bytes] | list[str]:
    """What must be equal of two outputs: the bytes of every tensor (of a report, the names of its files)."""
    if path.suffix == "":
        return sorted(found.name for found in path.iterdir())
    file = TensorFile(path)
    return {key: file.bytes(key).tobytes() for key in file.entries}


def killed(folder: Path, name: str, times: int) -> None:
    """Kill or interrupt a command at so many moments: no file or a whole one, no leftovers after an undisturbed run."""
    inputs(folder)
    places = [folder / place / "out.safetensors" for place in ("whole", "killed")]
    whole, target = (path.with_suffix("") if name == "report" else path for path in places)
    for place in places:
        place.parent.mkdir()
    log, took, rng = folder / "log", 5.0, random.Random(name)
    if name != "convert":
        started = time.monotonic()
        if wait(fork(commands(folder, places[0])[name], log=log)):
            print("an undisturbed run failed:", log.read_text())
            return
        took = time.monotonic() - started
    again = commands(folder, places[1])[name]
    for number in range(times):
        child, moment = fork([*again, "--force"] if target.exists() else again, log=log), rng.uniform(0, 1.1 * took)
        time.sleep(moment)
        # Asked to end, it may not wait for ever for a thread; before it has begun it cannot be asked.
        end = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)[number % 3 if moment > 0.05 else 0]
        os.kill(child, end)
        if wait(child) not in (0, -end, cli.INTERRUPTED, 128 + signal.SIGTERM):
            print(f"run {number} failed:", log.read_text()[-2000:])
        if target.is_file():
            TensorFile(target)
            if number % 2:
                target.unlink()
        log.write_text("")
    if code := wait(fork([*again, "--force"], log=log)):
        print(f"the run after the kills ended with {code}:", log.read_text()[-2000:])
    elif name != "convert" and tensors(target) != tensors(whole):  # `convert` chooses by the time it has
        print("the file is another one than without the kills")
    if found := leftovers(folder / "killed"):
        print("left behind:", found)


def starved(folder: Path, name: str) -> None:
    """No room on the disk, at different points: one line that names a file, code 2, and the old file as it was."""
    inputs(folder)
    output = folder / "out" / "out.safetensors"
    output.parent.mkdir()
    target = output.with_suffix("") / "report.html" if name == "report" else output
    arguments = [*commands(folder, output)[name], "--force"]
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(b"older")
    log, codes, enough = folder / "log", [], 200_000 if name == "report" else 600_000
    for limit in (1, 5000, 60_000, 200_000, 600_000):
        log.write_text("")
        room = limit

        def starve(room=room):
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.dup2(writer, 2)
            starve()
            os._exit(cli.run([str(argument) for argument in arguments]))
        os.close(writer)
        with open(reader, encoding="utf-8") as stream:
            said = stream.read()
        codes.append(wait(child))
        lines = [line for line in said.replace("\r", "\n").splitlines() if line.startswith(f"{name}: ")]
        if codes[-1] == 0 and limit >= enough:
            break
        if codes[-1] != 2 or len(lines) != 1 or "Traceback" in said:
            print(f"{limit} bytes: code {codes[-1]}, {said[-2000:]!r}")
        elif str(folder) not in lines[0] or ".partial" in lines[0]:
            print(f"{limit} bytes: which file? {lines[0]}")
        if target.read_bytes() != b"older":
            print(f"{limit} bytes: the old file is gone")
        if found := leftovers(folder / "out"):
            print(f"{limit} bytes: left behind {found}")


def main() -> None:
    """For every line of stdin, [folder, test, arguments...] in JSON, one of this module's tests in an empty folder."""
    torch.set_num_threads(1)
    # What is solved, and how long it would take, is not what breaks.
    calibrate.CalibrationSettings = as_rank.QUICK
    Workspace.time_state = lambda *_: 1e-3
    for line in sys.stdin:
        folder, test, *arguments = json.loads(line)
        torch.manual_seed(0)
        globals()[test](Path(folder), *arguments)
        print(DONE, flush=True)
