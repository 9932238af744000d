"""Every way to run FLUX's linear layers with ternary weights, side by side with dense bf16 and other packs.

    python -m benchmarks.speed.kernels                          everything; JSON in benchmarks/results
    python -m benchmarks.speed.kernels --models FLUX.1-dev --tokens 4608,1
    python -m benchmarks.speed.kernels --dry                    tiny shapes on the CPU: each path runs, nothing is timed

A time is the median of CUDA-graph replays, with enough copies of the weights that they do not stay in the L2 cache. The
error beside it is |y - y64| / |y64 - bias|: y64 multiplies the unquantized activations by the ternary weight in fp64
(fp32 on a GPU), so 8-bit methods show their activation rounding. Peers that are not installed say so.
"""

import os
import sys

if "--dry" in sys.argv:  # before Triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

import argparse  # noqa: E402
import json  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from ternary_flux.benchmarks import report as reports  # noqa: E402
from ternary_flux.benchmarks.speed import timing  # noqa: E402
from ternary_flux.benchmarks.speed.models import MODELS  # noqa: E402
from ternary_flux.ops import TernaryWeight  # noqa: E402
from ternary_flux.ops.backends.triton import (  # noqa: E402
    backend,  # noqa: E402
    configs,
    dispatch,
)
from ternary_flux.ops.backends.triton.linear_a8 import linear_a8  # noqa: E402
from ternary_flux.ops.backends.triton.linear_a16 import linear_a16  # noqa: E402
from ternary_flux.ops.backends.triton.quantize_rows import quantize_rows  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.functional import linear as dense_linear  # noqa: E402

TOKENS = (4608, 4096, 1024, 512, 64, 16, 1)
BASELINE = "bf16 F.linear"


class Unavailable(Exception):
    """Why a method cannot run here."""


@dataclass
class Layer:
    """One Linear [n, k] with the same trits in every form a method needs."""

    n: int
    k: int
    device: str
    dtype: torch.dtype
    bias: Tensor | None
    row: TernaryWeight
    grouped: TernaryWeight

    @classmethod
    def random(cls, n: int, k: int, device: str, dtype: torch.dtype, bias: bool) -> "Layer":
        g = torch.Generator(device).manual_seed(n + k)
        codes = torch.randint(-1, 2, (n, k), dtype=torch.int8, device=device, generator=g)
        scale = torch.rand(n, device=device, generator=g) * 0.01 + 0.005
        group = torch.randint(40, 128, (-(-k // 128), n), dtype=torch.uint8, device=device, generator=g)
        row = TernaryWeight.from_codes(codes, scale)
        grouped = TernaryWeight(row.trits, scale / 127, (n, k), group)
        offset = (torch.randn(n, device=device, generator=g) * 0.1).to(dtype) if bias else None
        return cls(n, k, device, dtype, offset, row, grouped)


# A method takes a layer and returns (the TernaryWeight it multiplies by, bytes of weight it reads, x -> y). Each call
# allocates another copy of the weights.
Method = Callable[[Layer], tuple[TernaryWeight, int, Callable[[Tensor], Tensor]]]


def copied(weight: TernaryWeight) -> TernaryWeight:
    return TernaryWeight(
        weight.trits.clone(), weight.scale.clone(), weight.shape, None if weight.group is None else weight.group.clone()
    )


def dense(layer: Layer):
    weight = layer.row.dequantize(layer.dtype)
    return layer.row, weight.nbytes, lambda x: dense_linear(x, weight, layer.bias)


def ours(layer: Layer, activations: str, grouped: bool):
    """The product's own path, activation quantization included."""
    formats = backend.formats(torch.device(layer.device))
    if activations not in formats and layer.device != "cpu":
        raise Unavailable(f"no {activations} kernel on this GPU, only {', '.join(formats)}")
    weight = copied(layer.grouped if grouped else layer.row)
    return weight, weight.nbytes, lambda x: backend.linear(x, weight, layer.bias, activations)


def ours_product_only(layer: Layer):
    """The int8 kernel without the quantization of its activations, which are prepared on the first call."""
    weight = copied(layer.grouped)
    chip = configs.chip(torch.device(layer.device))
    prepared: dict[int, tuple[Tensor, Tensor]] = {}

    def run(x: Tensor) -> Tensor:
        if x.data_ptr() not in prepared:
            prepared[x.data_ptr()] = quantize_rows(x, weight.trits.shape[0] * 128)
        codes, scale = prepared[x.data_ptr()]
        y = x.new_empty(x.shape[0], layer.n)
        tile = configs.tile(chip, "int8_group", x.shape[0])
        return linear_a8(codes, scale, weight, None, None, layer.bias, y, tile, chip)

    return weight, weight.nbytes, run


def ours_fused_a16(layer: Layer):
    """linear_a16 whatever the number of tokens, where the product would dequantize."""
    weight = copied(layer.grouped)
    chip = configs.chip(torch.device(layer.device))

    def run(x: Tensor) -> Tensor:
        tile = configs.tile(chip, "a16", x.shape[0]) or configs.table(chip)["a16"][-1][1]
        return linear_a16(x, None, weight, None, None, layer.bias, x.new_empty(x.shape[0], layer.n), tile, chip)

    return weight, weight.nbytes, run


def ours_dense(layer: Layer):
    """dequantize and torch's matmul whatever the number of tokens."""
    weight = copied(layer.grouped)
    chip = configs.chip(torch.device(layer.device))
    return weight, weight.nbytes, lambda x: dispatch.dense_product(x, weight, layer.bias, chip)


def int_mm(layer: Layer):
    """torch._int_mm with our quantization before and a torch epilogue after."""
    codes = layer.row.codes()

    def run(x: Tensor) -> Tensor:
        if x.is_cuda and x.shape[0] <= 16:
            raise Unavailable("torch._int_mm needs more than 16 tokens")
        q, scale = quantize_rows(x, layer.k)
        y = torch._int_mm(q, codes.t()) * (scale[:, None] * layer.row.scale)
        return (y if layer.bias is None else y + layer.bias).to(x.dtype)

    return layer.row, codes.nbytes, run


def scaled_mm(layer: Layer):
    """torch._scaled_mm, e4m3 with a scale a row, with our quantization before."""
    if layer.device == "cpu" or torch.cuda.get_device_capability() < (8, 9):
        raise Unavailable("torch._scaled_mm needs compute capability 8.9")
    codes = layer.row.codes().to(torch.float8_e4m3fn)
    scale = layer.row.scale[None]

    def run(x: Tensor) -> Tensor:
        q, token_scale = quantize_rows(x, layer.k, torch.float8_e4m3fn)
        y = torch._scaled_mm(q, codes.t(), token_scale[:, None], scale, out_dtype=torch.bfloat16)
        return y if layer.bias is None else y + layer.bias

    return layer.row, codes.nbytes, run


def comfy_kitchen(layer: Layer, rotate: bool):
    kitchen = _import("comfy_kitchen")
    codes, scale = layer.row.codes(), layer.row.scale[:, None].contiguous()
    run = partial(kitchen.int8_linear, convrot=rotate)  # a rotation needs rotated weights: its error means nothing here
    return layer.row, codes.nbytes, lambda x: run(x, codes, scale, layer.bias, x.dtype)


def gemlite_a16w2(layer: Layer):
    gemlite = _import("gemlite.core")
    module = gemlite.GemLiteLinearTriton(
        2,
        group_size=128,
        in_features=layer.k,
        out_features=layer.n,
        input_dtype=gemlite.DType.FP16,
        output_dtype=gemlite.DType.FP16,
    )
    scales = layer.grouped.group_scales().t().contiguous().half()
    module.pack((layer.row.codes() + 1).to(torch.uint8), scales, 1, None, packing_bitwidth=8)

    def run(x: Tensor) -> Tensor:
        y = module(x.half())
        return y if layer.bias is None else y + layer.bias

    return layer.grouped, layer.grouped.nbytes, run


def gemlite_a8w158(layer: Layer):
    helper = _import("gemlite.helper")
    mean = layer.row.scale.mean()  # it knows one scale a layer
    build = helper.A8W158_INT_dynamic(device=layer.device, dtype=layer.dtype)
    module = build.from_weights(layer.row.codes().to(layer.dtype), mean)
    weight = TernaryWeight(layer.row.trits, mean.expand(layer.n).contiguous(), layer.row.shape)

    def run(x: Tensor) -> Tensor:
        y = module(x)
        return y if layer.bias is None else y + layer.bias

    return weight, layer.row.nbytes, run


METHODS: dict[str, Method] = {
    BASELINE: dense,
    "ours int8, group scales": partial(ours, activations="int8", grouped=True),
    "ours int8, row scales": partial(ours, activations="int8", grouped=False),
    "ours int8, group, product only": ours_product_only,
    "ours e4m3, group scales": partial(ours, activations="e4m3", grouped=True),
    "ours e4m3, row scales": partial(ours, activations="e4m3", grouped=False),
    "ours full, group scales": partial(ours, activations="full", grouped=True),
    "ours full, fused kernel": ours_fused_a16,
    "ours full, dequantize + matmul": ours_dense,
    "gemlite A16W2 g128 fp16": gemlite_a16w2,
    "gemlite A8W158": gemlite_a8w158,
    "comfy-kitchen int8": partial(comfy_kitchen, rotate=False),
    "comfy-kitchen int8, rotated": partial(comfy_kitchen, rotate=True),
    "torch._int_mm": int_mm,
    "torch._scaled_mm e4m3": scaled_mm,
}


def _import(name: str):
    try:
        return __import__(name, fromlist=["_"])
    except ImportError:
        raise Unavailable(f"{name.split('.')[0]} is not installed") from None
    except Exception as error:
        raise Unavailable(f"{name.split('.')[0]} cannot be imported: {_short(error)}") from error


def layers(models: list[str], dry: bool) -> Iterator[tuple[str, str, int, int, bool, bool]]:
    """(model, layer, n, k, has bias, is modulation), without repeating a shape within a model."""
    if dry:
        yield "tiny", "linear", 72, 256, True, False
        return
    for model in models:
        arch, seen = MODELS[model], set()
        for block in ("double_blocks.0", "single_blocks.0"):
            for name, (n, k) in arch.block_linears(block).items():
                if name.startswith("txt_") or (n, k, "mod" in name) in seen:
                    continue
                seen.add((n, k, "mod" in name))
                yield model, f"{block.split('_')[0]} {name}", n, k, arch.bias, "mod" in name


def measure(method: Method, layer: Layer, x: Tensor) -> dict:
    """seconds (None on the CPU) and error of one method, or why it could not run."""
    try:
        weight, nbytes, run = method(layer)
        exact = torch.float32 if x.is_cuda else torch.float64
        expected = x.to(exact) @ weight.dequantize().to(exact).t()
        size = expected.norm()
        if layer.bias is not None:
            expected += layer.bias
        error = ((run(x) - expected).norm() / size).item()
        del expected
        if not x.is_cuda:
            return {"seconds": None, "error": error}
        copies = timing.copies_beyond_cache(nbytes) if x.shape[0] <= 64 else 1
        runs = [run, *(method(layer)[2] for _ in range(copies - 1))]
        seconds, graph = timing.median_seconds([partial(run, x) for run in runs])
        return {"seconds": seconds, "error": error, "bytes": nbytes, "graph": graph}
    except Unavailable as reason:
        return {"missing": str(reason)}
    except Exception as error:  # a peer's failure must not end the run
        return {"missing": f"failed: {_short(error)}"}


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]


def line(name: str, row: dict, base: float | None, m: int, n: int, k: int, peak: dict[str, float]) -> str:
    if "missing" in row:
        return f"  {name:34} {row['missing']}"
    if row["seconds"] is None:
        return f"  {name:34} {'dry':>10} {'':25} error {row['error']:.5f}"
    seconds = row["seconds"]
    if m <= 64:  # bound by memory
        rate = (row["bytes"] + 2 * m * (n + k)) / seconds
        speed = f"{rate / 1e9:7.0f} GB/s {rate / peak['bytes']:5.0%}"
    else:
        rate = 2 * m * n * k / seconds
        speed = f"{rate / 1e12:5.0f} TFLOP/s {rate / peak['bf16']:4.0%}"
    note = "" if row["graph"] else "  (no CUDA graph: includes launch gaps)"
    return f"  {name:34} {seconds * 1e6:8.1f} us {base / seconds:6.2f}x {speed:>18} error {row['error']:.5f}{note}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="comma separated (default: %(default)s)")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="comma separated (default: %(default)s)")
    parser.add_argument("--only", default="", help="methods whose name contains this text, besides the baseline")
    parser.add_argument("--skip", default="", help="leave out methods whose name contains this text")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/kernels-GPU.json)")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU, nothing timed")
    options = parser.parse_args()
    unknown = [name for name in options.models.split(",") if name not in MODELS]
    if unknown:
        parser.error(f"unknown model {unknown[0]}, expected some of {', '.join(MODELS)}")
    device, dtype, tokens = "cuda", torch.bfloat16, [int(m) for m in options.tokens.split(",")]
    if options.dry:  # Triton's interpreter multiplies bf16 wrongly
        device, dtype, tokens = "cpu", torch.float16, [20, 1]
    elif reason := backend.unavailable(torch.device("cuda", 0)):
        sys.exit(f"the kernels cannot run here: {reason}. Use --dry to run every path on the CPU")
    peak = {} if options.dry else timing.ceilings()
    report: dict = {"machine": reports.machine(device), "ceilings": peak, "rows": []}
    print(json.dumps(report["machine"]))
    for name, value in peak.items():
        print(f"ceiling {name}: {value / 1e12:.2f} T/s")
    out = options.out
    if out is None and not options.dry:
        out = reports.RESULTS / f"kernels-{report['machine']['gpu'].replace(' ', '-')}.json"
    torch.manual_seed(0)
    for model, label, n, k, bias, modulation in layers(options.models.split(","), options.dry):
        layer = Layer.random(n, k, device, dtype, bias)
        for m in tokens:
            if modulation and m > 64:
                continue
            print(f"\n{model} {label}: {m} tokens, {n} x {k}")
            x = torch.randn(m, k, device=device).to(dtype)
            base = None
            for name, method in METHODS.items():
                if name != BASELINE and (options.only not in name or options.skip and options.skip in name):
                    continue
                row = measure(method, layer, x)
                base = base or row.get("seconds")
                report["rows"].append({"model": model, "layer": label, "m": m, "n": n, "k": k, "method": name, **row})
                print(line(name, row, base, m, n, k, peak), flush=True)
            reports.write(out, report)
    if out is not None:
        print(f"\nwritten: {out}")


if __name__ == "__main__":
    main()
