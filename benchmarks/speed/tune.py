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
from collections.abc import Callable  # noqa: E402
from functools import partial  # noqa: E402

import torch  # noqa: E402
from ternary_flux.benchmarks.speed import timing  # noqa: E402
from ternary_flux.benchmarks.speed.kernels import MODELS, Layer, copied  # noqa: E402
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
    Tile(m, n, warps, stages, splits)
    for m, n, warps in ((64, 128, 4), (128, 64, 4), (128, 128, 4), (128, 128, 8), (256, 128, 8), (128, 256, 8))
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
        return lambda tile: linear_a16(x, weight, None, None, layer.bias, y, tile, chip)
    dtype = torch.int8 if kernel.startswith("int8") else torch.float8_e4m3fn
    codes, scale = quantize_rows(x, weight.trits.shape[0] * 128, dtype)
    return lambda tile: linear_a8(codes, scale, weight, None, None, layer.bias, y, tile, chip)


def seconds(kernel: str, tile: Tile, work: list[tuple[int, Layer, torch.Tensor]], chip: Chip) -> float:
    """Time of all the layers with one tile, each counted as often as the model has it; infinite where it cannot run."""
    total = 0.0
    for count, layer, x in work:
        copies = timing.copies_beyond_cache(layer.grouped.nbytes) if x.is_cuda and len(x) <= 64 else 1
        runs = [partial(launcher(kernel, layer, x, chip), tile) for _ in range(copies)]
        try:
            expected = launcher(kernel, layer, x, chip)(configs.TABLE[chip.family][kernel][0][1]).float()
            if (runs[0]().float() - expected).norm() > 1e-2 * expected.norm():
                return ANY
            total += count * (timing.median_seconds(runs, replays=7)[0] if x.is_cuda else tile.block_n)
        except Exception as error:  # more shared memory than the chip has, or a compiler's refusal
            print(f"    {tile}: {type(error).__name__}")
            return ANY
    return total


def shapes(model: str, m: float, dry: bool) -> list[tuple[int, int, int]]:
    """(count, n, k) of the layers that meet `m` tokens: modulation for few, the streams for many."""
    if dry:
        return [(1, 72, 256)]
    found: dict[tuple[int, int], int] = {}
    for name, shape in MODELS[model].linear_shapes.items():
        if ("mod" in name) == (m <= 16) or MODELS[model].version == 2 and m <= 16:
            found[shape] = found.get(shape, 0) + 1
    return [(count, n, k) for (n, k), count in found.items()]


def tune(kernel: str, model: str, chip: Chip, device: str, dtype: torch.dtype, dry: bool) -> tuple:
    entries = []
    for limit, current in configs.table(chip)[kernel]:
        m = int(min(limit, LARGE_M)) if not dry else int(min(limit, 20))
        work = []
        for count, n, k in shapes(model, limit, dry):
            layer = Layer.random(n, k, device, dtype, True)
            work.append((count, layer, torch.randn(m, k, device=device).to(dtype)))
        tiles = [current, *(tile for tile in candidates(limit) if tile != current)][: 2 if dry else None]
        times = {tile: seconds(kernel, tile, work, chip) for tile in tiles}
        best = min(times, key=times.get)
        gain = "not timed" if dry else f"{times[current] / times[best]:.2f}x as fast as the current tile"
        bucket = "more tokens" if limit == ANY else f"up to {limit} tokens"
        print(f"  {kernel}, {bucket}: {best}, {gain}", flush=True)
        entries.append((limit, best))
    return tuple(entries)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="FLUX.1-dev", choices=MODELS)
    parser.add_argument("--kernels", default="", help="comma separated (default: all that this GPU has)")
    parser.add_argument("--dry", action="store_true", help="on the CPU, nothing timed")
    options = parser.parse_args()
    device, dtype = ("cpu", torch.float16) if options.dry else ("cuda", torch.bfloat16)
    if reason := backend.unavailable(torch.device(device)):
        sys.exit(f"the kernels cannot run here: {reason}")
    chip = configs.chip(torch.device(device))
    available = [k for k in configs.KERNELS if k == "a16" or k.split("_")[0] in chip.formats]
    kernels = options.kernels.split(",") if options.kernels else available
    if unknown := [kernel for kernel in kernels if kernel not in available]:
        parser.error(f"no kernel {unknown[0]} on {chip.name}, expected some of {', '.join(available)}")
    print(f"tuning {chip.name} ({chip.family})")
    for kernel in kernels:
        entries = tune(kernel, options.model, chip, device, dtype, options.dry)
        path = configs.write_user_table(chip.name, {kernel: entries})
    print(f"written: {path}")


if __name__ == "__main__":
    main()
