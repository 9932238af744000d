"""On a GPU: every kernel against float64, calibrate's solver against torch, and the quantizer beside the CPU's run.

python -m benchmarks.speed.gpu_checks kernels|solver|quantizer      prints what is wrong, or a line a device
python -m benchmarks.speed.gpu_checks kernels|solver --dry          tiny ones in Triton's interpreter, nothing timed
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

DRY = "--dry" in sys.argv
if DRY:  # before Triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from ternary_flux.benchmarks.report import ROOT  # noqa: E402
from ternary_flux.benchmarks.speed import timing  # noqa: E402
from ternary_flux.ops import GROUP_SIZE, TernaryWeight, group_codes, ternary_linear  # noqa: E402
from ternary_flux.ops.codes import group_codes_in_torch  # noqa: E402
from torch import Tensor  # noqa: E402

DEVICE = torch.device("cpu" if DRY else "cuda")
DTYPES = (torch.float16,) if DRY else (torch.bfloat16, torch.float16)  # the interpreter multiplies bf16 wrongly
SHAPES = [(1, 384, 1100), (7, 3072, 3072), (16, 18432, 3072), (33, 201, 300), (64, 3072, 12288), (65, 3072, 3072),
          (300, 1000, 4096), (1025, 3072, 15360), (4608, 3072, 3072)]  # fmt: skip
# scales, rank, terms, column scales
FORMS = [("row", 0, 1, False), ("integer", 0, 1, False), ("float", 0, 1, False), ("integer", 16, 1, False),
         ("integer", 0, 2, False), ("row", 5, 2, False), ("integer", 0, 1, True), ("integer", 16, 2, True)]  # fmt: skip
if DRY:
    SHAPES, FORMS = [(1, 43, 300), (20, 40, 256)], FORMS[2:4]
BOUNDS = {"full": 1e-2, "int8": 2e-3, "e4m3": 1e-2}


def random_weight(n: int, k: int, scales: str, rank: int, terms: int, columns: bool) -> TernaryWeight:
    groups = terms * -(-k // 128)
    codes = torch.randint(-1, 2, (n, terms * k), dtype=torch.int8, device=DEVICE)
    row, group = torch.rand(n, device=DEVICE) * 0.01 + 1e-3, None
    if scales == "integer":
        group = torch.randint(1, 128, (groups, n), dtype=torch.uint8, device=DEVICE)
    if scales == "float":
        row = (torch.rand(groups, n, device=DEVICE) * 0.01 + 1e-3).to(torch.bfloat16)
    down = (torch.randn(rank, k, device=DEVICE) * 0.1).bfloat16() if rank else None
    up = (torch.randn(n, rank, device=DEVICE) * 0.1).bfloat16() if rank else None
    column = (torch.randn(k, device=DEVICE) * 0.7).exp().bfloat16() if columns else None
    return TernaryWeight.from_codes(codes, row, group, down=down, up=up, terms=terms, column=column)


def quantized(x: Tensor, activations: str, column: Tensor | None) -> Tensor:
    """The activations that an 8-bit kernel sees, float64, without their column scales."""
    from ternary_flux.ops.backends.triton.quantize_rows import quantize_rows

    dtype = torch.int8 if activations == "int8" else torch.float8_e4m3fn
    codes, scale = quantize_rows(x, -(-x.shape[1] // 128) * 128, dtype, column)
    seen = codes[:, : x.shape[1]].double() * scale.double()[:, None]
    return seen if column is None else seen / column.double()


def kernels() -> list[dict]:
    """Relative error against float64 of the product the kernel was asked for (its own quantized activations).

    Each form of weights has a process of its own: compiling takes most of the time.
    """
    from ternary_flux.ops.backends.triton import backend as triton
    from ternary_flux.ops.backends.triton import configs

    print(f"triton: {triton.unavailable(DEVICE) or 'available'}; {configs.chip(DEVICE)}", flush=True)
    command = [sys.executable, "-m", "benchmarks.speed.gpu_checks", "kernels", *(["--dry"] if DRY else [])]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}.json" for number in range(len(FORMS))]
        running = [
            subprocess.Popen([*command, "--form", str(number), "--out", str(file)], cwd=ROOT)
            for number, file in enumerate(files)
        ]
        if any([process.wait() for process in running]):
            sys.exit("kernels: a process failed")
        rows = [row for file in files for row in json.loads(file.read_text())]
    wrong = sum(not row["right"] for row in rows)
    print(f"kernels: {len(rows)} cases, {wrong} wrong", flush=True)
    return rows


def kernels_of_form(scales: str, rank: int, terms: int, columns: bool) -> list[dict]:
    from ternary_flux.ops.backends.triton import backend as triton

    rows = []
    for m, n, k in SHAPES:
        weight = random_weight(n, k, scales, rank, terms, columns)
        low_rank = 0.0 if weight.up is None else weight.up.double() @ weight.down.double()
        ternary = replace(weight, down=None, up=None).dequantize(torch.float32).double()
        for dtype, activations in itertools.product(DTYPES, triton.formats(DEVICE)):
            if activations == "int8" and scales == "float":
                continue
            x, bias = torch.randn(m, k, device=DEVICE).to(dtype), torch.randn(n, device=DEVICE).to(dtype)
            row = {"m": m, "n": n, "k": k, "scales": scales, "rank": rank, "terms": terms, "columns": columns}
            row |= {"dtype": str(dtype).removeprefix("torch."), "activations": activations}
            try:
                y = ternary_linear(x, weight, bias, activations, "triton")
                seen = x.double() if activations == "full" else quantized(x, activations, weight.column)
                expected = seen @ ternary.t() + bias.double()
                if rank:
                    expected += x.double() @ low_rank.t()
                row["error"] = float((y.double() - expected).norm() / expected.norm())
                again = ternary_linear(x, weight, bias, activations, "triton")
                row["repeats"] = bool(torch.equal(y, again))
            except Exception as error:  # one broken kernel must not hide the others
                row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            bound = BOUNDS[activations] * (2 if rank else 1)
            row["right"] = "failed" not in row and row["error"] < bound and row["repeats"]
            if not row["right"]:
                print(json.dumps(row), flush=True)
            rows.append(row)
    return rows


def solver() -> list[dict]:
    """`ops.group_codes`: its kernel beside the loops in torch, in the coordinates that calibrate gives it."""
    rows = []
    for n, descent in itertools.product((40,) if DRY else (3072, 12288, 21504), (False, True)):
        block, scales = torch.randn(GROUP_SIZE, n, device=DEVICE), torch.rand(n, 24, device=DEVICE) + 0.5
        weights = torch.randn(GROUP_SIZE, GROUP_SIZE, device=DEVICE) * 0.05
        factors = torch.rand(GROUP_SIZE, device=DEVICE) + 0.5
        old = torch.randint(-1, 2, block.shape, device=DEVICE).float() if descent else None
        given = scales[:, 3], weights, factors, old
        codes, expected = group_codes(block.clone(), *given)[0], group_codes_in_torch(block.clone(), *given)[0]
        row = {"outputs": n, "descent": descent, "equal": float((codes == expected).float().mean())}
        for name, function in (("kernel", group_codes), ("torch", group_codes_in_torch)) if not DRY else ():
            row[name] = timing.median_seconds([partial(function, block.clone(), *given)], replays=5)[0]
        row["right"] = row["equal"] > 0.999  # a tie that rounds the other way is passed on
        print(f"group_codes: {json.dumps(row)}", flush=True)
        rows.append(row)
    return rows


def quantizer() -> list[dict]:
    """The miniature calibrated and distilled with the same amounts on the GPU and on the CPU."""
    from ternary_flux.benchmarks import miniature
    from ternary_flux.benchmarks.quality import run as quality
    from ternary_flux.benchmarks.quality.scores import Setup
    from ternary_flux.quantizer.files.ternary import open_ternary

    scale = quality.Scale(prompts=2, seeds=1, pictures=96, states=1152, steps=100, calibration_states=512)
    rows, codes = [], {}
    for name in (DEVICE.type, "cpu"):
        device = torch.device(name)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            setup = Setup.load(miniature.FLUX1, scale.prompts, scale.seeds, device)
            work = quality.workspace(folder, setup, device, miniature.FLUX1)
            started = time.perf_counter()
            states = quality.Trained(work.label_states(scale.pictures, scale.states), work.hold_out(24))
            row: dict = {"device": name, "seconds": {"pictures and velocities": time.perf_counter() - started}}
            recipes = quality.recipes(scale, work, states)
            for label in ("calibrated", "distilled: scales", "distilled: codes"):
                path = folder / f"{label.replace(': ', '-')}.safetensors"
                started = time.perf_counter()
                recipes[label](path)
                row["seconds"][label] = time.perf_counter() - started
                row[label] = work.measure(path, states.held_out).error
            file = open_ternary(folder / "calibrated.safetensors")
            codes[name] = {layer: file.weight(layer).codes() for layer in file.layers}
            rows.append(row)
            print(json.dumps(row), flush=True)
    same = [float((codes["cpu"][layer] == codes[DEVICE.type][layer]).float().mean()) for layer in codes["cpu"]]
    rows.append({"codes equal on both devices": sum(same) / len(same), "least in a layer": min(same)})
    print(json.dumps(rows[-1]), flush=True)
    return rows


if __name__ == "__main__":
    checks = {"kernels": kernels, "solver": solver, "quantizer": quantizer}
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.gpu_checks", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=checks)
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--dry", action="store_true", help="on the CPU, nothing timed")
    parser.add_argument("--form", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not DRY and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device. Use --dry to run the kernels on the CPU")
    torch.manual_seed(0)
    found = checks[options.what]() if options.form is None else kernels_of_form(*FORMS[options.form])
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))
