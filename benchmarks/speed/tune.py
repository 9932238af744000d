"""Finds the fastest tiles on this GPU and writes them where the kernels' table looks (ops/backends/triton/configs.py).

    python -m benchmarks.speed.tune             FLUX.1-dev's layers; some 200 tiles on Hopper, each compiled and timed
    python -m benchmarks.speed.tune --model FLUX.2-dev --kernels int8_group
    python -m benchmarks.speed.tune --dry       two tiles on the CPU: shows that it works

The file (TERNARY_FLUX_TILES, or ternary_flux/tiles.json in the user's cache folder) counts for GPUs of this name only;
deleting it brings the built-in table back. Nothing else in the pack ever tunes.
"""

import os
import sys

if "--dry" in sys.argv:  # before Triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

import argparse  # noqa: E402
import contextlib  # noqa: E402
import subprocess  # noqa: E402
from collections.abc import Callable  # noqa: E402
from functools import partial  # noqa: E402

import torch  # noqa: E402
from ternary_flux.benchmarks.report import ROOT  # noqa: E402
from ternary_flux.benchmarks.speed import timing  # noqa: E402
from ternary_flux.benchmarks.speed.kernels import Layer, copied  # noqa: E402
from ternary_flux.benchmarks.speed.models import MODELS  # noqa: E402
from ternary_flux.ops.backends.triton import (
    backend,  # noqa: E402
    configs,  # noqa: E402
)
from ternary_flux.ops.backends.triton.configs import Chip, Tile  # noqa: E402
from ternary_flux.ops.backends.triton.linear_a8 import linear_a8  # noqa: E402
from ternary_flux.ops.backends.triton.linear_a16 import linear_a16  # noqa: E402
from ternary_flux.ops.backends.triton.quantize_rows import quantize_rows  # noqa: E402

ANY = float("inf")
LARGE_M = 4608
SMALL = [Tile(0, n, warps, stages, 16) for n, warps in ((32, 2), (64, 4), (128, 4)) for stages in (3, 5)]
LARGE = [
    Tile(m, n, warps, stages, splits, registers)
    for m, n, warps, registers in (
        *((128, 128, 8, 128), (128, 128, 8, 0), (256, 128, 8, 0), (128, 128, 4, 0), (256, 64, 4, 0), (128, 64, 4, 0)),
        *((64, 128, 4, 0), (128, 256, 8, 0)),
    )
    for stages in (3, 4)
    for splits in (1, 4)
]


def candidates(limit: float) -> list[Tile]:
    """Tiles worth trying for at most `limit` tokens."""
    if limit <= 64:
        return [Tile(int(limit), t.block_n, t.warps, t.stages, t.max_splits) for t in SMALL]
    return [tile for tile in LARGE if tile.max_splits == 1 or limit <= 1024]


def launcher(kernel: str, layer: Layer, x: torch.Tensor, chip: Chip) -> Callable[[Tile], torch.Tensor]:
    """A call of one kernel on its own copy of the weights; activations are quantized beforehand."""
    weight = copied(layer.row if kernel.endswith("row") else layer.grouped)
    y = x.new_empty(x.shape[0], layer.n)
    if kernel == "a16":
        return lambda tile: linear_a16(x, None, weight, None, None, layer.bias, y, tile, chip)
    dtype = torch.int8 if kernel.startswith("int8") else torch.float8_e4m3fn
    codes, scale = quantize_rows(x, weight.trits.shape[0] * 128, dtype)
    return lambda tile: linear_a8(codes, scale, weight, None, None, layer.bias, y, tile, chip)


def seconds(
    kernel: str, tile: Tile, work: list[tuple[int, Layer, torch.Tensor]], chip: Chip, best: list[float] | None = None
) -> list[float]:
    """Time of each layer with one tile, times how often the model has it; an infinite last one where it cannot run.

    best    the times of the best tile so far: a tile that falls behind it by a tenth is given up
    """
    times: list[float] = []
    for count, layer, x in work:
        copies = timing.copies_beyond_cache(layer.grouped.nbytes) if x.is_cuda and len(x) <= 64 else 1
        runs = [partial(launcher(kernel, layer, x, chip), tile) for _ in range(copies)]
        try:
            expected = launcher(kernel, layer, x, chip)(configs.TABLE[chip.family][kernel][0][1]).float()
            if (runs[0]().float() - expected).norm() > 1e-2 * expected.norm():
                return [*times, ANY]
            times.append(count * (timing.median_seconds(runs, replays=7)[0] if x.is_cuda else tile.block_n))
        except Exception as error:  # more shared memory than the chip has, or a compiler's refusal
            print(f"    {tile}: {type(error).__name__}")
            return [*times, ANY]
        if best is not None and sum(times) > 1.1 * sum(best[: len(times)]):
            return [*times, ANY]
    return times


def compile_tiles(kernel: str, model: str, chip: Chip, part: int, parts: int) -> None:
    """Launch every part-th tile once on every shape, so that Triton's cache has its code."""
    for limit, current in configs.table(chip)[kernel]:
        m = int(min(limit, LARGE_M))
        tiles = [current, *(tile for tile in candidates(limit) if tile != current)][part::parts]
        for _, n, k in shapes(model, limit, False):
            layer = Layer.random(n, k, "cuda", torch.bfloat16, True)
            run = launcher(kernel, layer, torch.randn(m, k, device="cuda").bfloat16(), chip)
            for tile in tiles:
                with contextlib.suppress(Exception):  # the timing says why
                    run(tile)
    torch.cuda.synchronize()


def compile_in_processes(kernels: list[str], model: str) -> None:
    """Compile all candidates on all cores; compiling is most of the time of tuning."""
    parts = min(16, os.cpu_count() or 1)
    command = [sys.executable, "-m", "benchmarks.speed.tune", "--model", model, "--kernels", ",".join(kernels)]
    running = [subprocess.Popen([*command, "--compile", f"{part}/{parts}"], cwd=ROOT) for part in range(parts)]
    for process in running:
        process.wait()


def shapes(model: str, m: float, dry: bool) -> list[tuple[int, int, int]]:
    """(count, n, k) of the layers that meet `m` tokens: modulation for few, the streams for many."""
    if dry:
        return [(1, 72, 256)]
    found: dict[tuple[int, int], int] = {}
    for name, shape in MODELS[model].linear_shapes.items():
        if ("mod" in name) == (m <= 16) or MODELS[model].version == 2 and m <= 16:
            found[shape] = found.get(shape, 0) + 1
    layers = [(count, n, k) for (n, k), count in found.items()]
    return sorted(layers, key=lambda layer: -layer[0] * layer[1] * layer[2])  # what decides comes first


def tune(kernel: str, model: str, chip: Chip, device: str, dtype: torch.dtype, dry: bool) -> tuple:
    entries = []
    for limit, current in configs.table(chip)[kernel]:
        m = int(min(limit, LARGE_M)) if not dry else int(min(limit, 20))
        work = []
        for count, n, k in shapes(model, limit, dry):
            layer = Layer.random(n, k, device, dtype, True)
            work.append((count, layer, torch.randn(m, k, device=device).to(dtype)))
        tiles = [current, *(tile for tile in candidates(limit) if tile != current)][: 2 if dry else None]
        times: dict[Tile, list[float]] = {}
        best = current
        for tile in tiles:
            times[tile] = seconds(kernel, tile, work, chip, times.get(best))
            if sum(times[tile]) < sum(times[best]):
                best = tile
        gain = "not timed" if dry else f"{sum(times[current]) / sum(times[best]):.2f}x as fast as the current tile"
        bucket = "more tokens" if limit == ANY else f"up to {limit} tokens"
        print(f"  {kernel}, {bucket}: {best}, {gain}", flush=True)
        entries.append((limit, best))
    return tuple(entries)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="FLUX.1-dev", choices=MODELS)
    parser.add_argument("--kernels", default="", help="comma separated (default: all that this GPU has)")
    parser.add_argument("--dry", action="store_true", help="on the CPU, nothing timed")
    parser.add_argument("--compile", metavar="I/N", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device, dtype = ("cpu", torch.float16) if options.dry else ("cuda", torch.bfloat16)
    if reason := backend.unavailable(torch.device(device)):
        sys.exit(f"the kernels cannot run here: {reason}")
    chip = configs.chip(torch.device(device))
    available = [k for k in configs.KERNELS if k == "a16" or k.split("_")[0] in chip.formats]
    kernels = options.kernels.split(",") if options.kernels else available
    if unknown := [kernel for kernel in kernels if kernel not in available]:
        parser.error(f"no kernel {unknown[0]} on {chip.name}, expected some of {', '.join(available)}")
    if options.compile:
        part, parts = map(int, options.compile.split("/"))
        for kernel in kernels:
            compile_tiles(kernel, options.model, chip, part, parts)
        return
    if not options.dry:
        compile_in_processes(kernels, options.model)
    print(f"tuning {chip.name} ({chip.family})", flush=True)
    for kernel in kernels:
        entries = tune(kernel, options.model, chip, device, dtype, options.dry)
        path = configs.write_user_table(chip.name, {kernel: entries})
    print(f"written: {path}")


if __name__ == "__main__":
    main()
