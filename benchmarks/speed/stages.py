"""The stages of a conversion beside a plain forward of the same model: states per second, in one run.

    python -m benchmarks.speed.stages                               a narrow FLUX.1 on the CPU
    python -m benchmarks.speed.stages --device cuda --width 3072    two blocks of FLUX.1's width on a GPU
    python -m benchmarks.speed.stages --dry                         a tiny one, nothing written

The model has one double and one single block. The forward is computed as the teacher computes: in fp32 on the CPU, in
bf16 on a GPU.

A row's ratio is what a state costs there in forwards of a state: `sample` counts a state for each step of each picture,
`calibrate` counts a state once for all blocks, `train` a state for each time it is learned from. On one CPU thread the
seconds are CPU seconds, which do not depend on other programs.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from ternary_flux.benchmarks import report
from ternary_flux.benchmarks.speed.calibration_memory import architecture, write_checkpoint
from ternary_flux.benchmarks.speed.timing import clock
from ternary_flux.quantizer.calibration.calibrate import CalibrationSettings, calibrate
from ternary_flux.quantizer.distillation.distill import Distiller, DistillSettings
from ternary_flux.quantizer.files.checkpoint import open_checkpoint
from ternary_flux.quantizer.files.ternary import open_ternary
from ternary_flux.quantizer.model.flux import Flux
from ternary_flux.quantizer.model.student import load_student, ternary_linears, train_codes
from ternary_flux.quantizer.pictures import conditioning
from ternary_flux.quantizer.pipeline.workspace import Workspace

PICTURES, STEPS, BATCH = 4, 4, 4


def seconds(call: Callable[[], object], device: torch.device) -> float:
    now, wait = clock(device), torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = now()
    call()
    wait()
    return now() - start


def steps(run: Distiller, count: int) -> None:
    for _ in range(count):
        run.advance()


def measure(
    folder: Path, width: int, side: int, states: int, tokens: int, settings: CalibrationSettings, device: torch.device
) -> dict[str, dict[str, float]]:
    """By stage: states per second, and forwards that a state costs."""
    arch = replace(architecture(width), context_dim=256)
    write_checkpoint(folder / "dense.safetensors", arch)
    context = torch.randn(40, tokens, arch.context_dim)
    conditioning.write(
        folder / "cond.safetensors", [f"prompt {i}" for i in range(40)], context, torch.randn(40, arch.vec_dim)
    )
    work = Workspace(
        folder / "dense.safetensors",
        folder / "cond.safetensors",
        folder / "work",
        ((side, side),),
        STEPS,
        device=device,
    )
    work.trajectories, work.teacher  # noqa: B018  read before anything is timed
    found: dict[str, tuple[int, float]] = {}

    plain = Flux(arch)
    plain.load_state_dict({name: open_checkpoint(work.dense).tensor(name).float() for name in arch.shapes})
    plain.requires_grad_(False).to(device, work.teacher.dtype)
    timed = partial(seconds, device=device)
    found["sample"] = PICTURES * STEPS, timed(lambda: work.sample_pictures(PICTURES))
    count, pools = 8 * PICTURES, []
    found["label"] = count, timed(lambda: pools.append(work.label_states(PICTURES, count)))
    pool, held_out = pools[0], work.hold_out(2)
    precision = work.teacher.dtype
    inputs = [pool.draw(number, BATCH, 0).inputs.to(device, precision) for number in range(4)]
    plain(*inputs[0])
    found["forward"] = 4 * BATCH, timed(lambda: [plain(*batch) for batch in inputs])

    pictures = work.trajectories.plan("train", PICTURES)
    target = folder / "calibrated.safetensors"
    for name, many in (("calibrate", states), ("calibrate, 4 times the states", 4 * states)):
        given = work.trajectories.states(pictures, many, 1)
        run = partial(calibrate, work.teacher, given, work.conditioning, target=target, folder=folder / name)
        found[name] = many, timed(partial(run, settings=settings, overwrite=True))

    evaluated = sum(len(batch.inputs.t) for batch in held_out.batches)
    found["measure"] = evaluated, timed(lambda: work.measure(target, held_out))
    for name, codes in (("train", False), ("train, with codes", True)):
        student = load_student(open_ternary(target), device)
        if codes:
            train_codes(ternary_linears(student), work.teacher.checkpoint)
        plan = DistillSettings(steps=100, batch=BATCH, autocast=None if precision == torch.float32 else precision)
        run_of = Distiller(student, open_ternary(target), pool, held_out, plan)
        steps(run_of, 1)
        found[name] = 4 * BATCH, timed(partial(steps, run_of, 4))
    forward = found["forward"][1] / found["forward"][0]
    return {
        name: {"states per second": round(count / taken, 3), "forwards": round(taken / count / forward, 2)}
        for name, (count, taken) in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512, help="hidden size (default: %(default)s)")
    parser.add_argument("--side", type=int, default=256, help="of the pictures, in pixels (default: %(default)s)")
    parser.add_argument("--states", type=int, default=16, help="to calibrate on (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    parser.add_argument(
        "--results", type=Path, default=report.RESULTS, help="folder of the JSON (default: %(default)s)"
    )
    parser.add_argument("--dry", action="store_true", help="a tiny model; write nothing")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(args.threads)
    width, side, states, tokens, settings = args.width, args.side, args.states, 128, CalibrationSettings(batch=BATCH)
    if args.dry:
        width, side, states, tokens, settings = 128, 32, 2, 8, replace(settings, sweeps=0, exponents=())
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), width, side, states, tokens, settings, device)
    for name, row in rows.items():
        print(f"{name:<32}{row['states per second']:10.2f} states/s{row['forwards']:10.2f} forwards")
    if not args.dry:
        machine = report.machine(device)
        name = f"cpu-{args.threads}-threads" if device.type == "cpu" else f"{machine['gpu']}".replace(" ", "-")
        found = {"machine": machine, "width": args.width, "side": args.side, "rows": rows}
        report.write(args.results / f"stages-{name}.json", found)


if __name__ == "__main__":
    main()
