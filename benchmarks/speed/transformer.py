"""One whole transformer step of FLUX with random ternary weights: seconds, memory and cold start, beside dense bf16.

    python -m benchmarks.speed.transformer                  FLUX.1-dev at 512, 1024 and 2048 pixels
    python -m benchmarks.speed.transformer --model FLUX.2-klein-4B --sizes 1024
    python -m benchmarks.speed.transformer --dry            a tiny model on the CPU: every path runs, nothing is timed

Each mode runs in its own process with an empty Triton cache: `cold` is its first step, compilation included, at the
first size; `step` is the median of later ones, launched as ComfyUI does (no CUDA graph); `peak` is what torch's
allocator held, weights included. The forward is ComfyUI's with this pack's Linear where ComfyUI is at hand
(COMFYUI_PATH, the ComfyUI this pack is installed in, or the copy of `make test`), else the quantizer's equivalent one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from ternary_flux.benchmarks import report as reports
from ternary_flux.benchmarks.speed.models import MODELS, TINY
from ternary_flux.ops import TernaryWeight, resolve, ternary_linear
from ternary_flux.quantizer.files.architecture import Architecture
from torch import Tensor, nn

MODES = ("bf16", "int8", "e4m3", "full")
TEXT_TOKENS = 512
STEPS = 10


class TernaryLinear(nn.Module):
    """The Linear of our own forward."""

    def __init__(self, weight: TernaryWeight, bias: Tensor | None, activations: str):
        super().__init__()
        self.weight, self.bias = weight, bias
        self.choice = resolve(weight.device, activations)

    def forward(self, x: Tensor) -> Tensor:
        return ternary_linear(x, self.weight, self.bias, self.choice.activations, self.choice.backend.NAME)


def random_weight(n: int, k: int, device: str) -> TernaryWeight:
    """Random trits (never the invalid code) and scales that keep activations in range."""
    blocks = -(-k // 128)
    nibbles = torch.tensor([0b0000, 0b0001, 0b0011, 0b0100, 0b0101, 0b0111, 0b1100, 0b1101, 0b1111], device=device)
    draw = torch.randint(0, 81, (blocks, n, 32), dtype=torch.uint8, device=device).int()
    trits = (nibbles[draw // 9] << 4 | nibbles[draw % 9]).to(torch.uint8)
    scale = torch.full((n,), (1.5 / k) ** 0.5 / 80, device=device)
    group = torch.randint(40, 121, (blocks, n), dtype=torch.uint8, device=device)
    return TernaryWeight(trits, scale, (n, k), group)


def random_dense(name: str, shape: tuple[int, ...], device: str, dtype: torch.dtype) -> Tensor:
    if len(shape) == 1:
        return (torch.ones if "norm" in name else torch.zeros)(shape, device=device, dtype=dtype)
    return torch.randn(shape, device=device, dtype=dtype) * shape[-1] ** -0.5


def find_comfyui() -> Path | None:
    """Put ComfyUI on sys.path if it is here; nothing is downloaded."""
    from ternary_flux.benchmarks import comfyui

    here = os.environ.get("COMFYUI_PATH") or comfyui.CACHE.is_dir() or comfyui.ROOT.parent.name == "custom_nodes"
    path = comfyui.find() if here else None
    if path is not None and str(path) not in sys.path:
        sys.path.insert(0, str(path))
    return path


def build_comfyui(arch: Architecture, mode: str, device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """ComfyUI's Flux, loaded from a random state dict through this pack's Linear, or core's for bf16."""
    if device == "cpu":
        import comfy.cli_args

        comfy.cli_args.args.cpu = True
    import comfy.model_detection
    import comfy.ops
    from comfy.ldm.flux.model import Flux
    from ternary_flux.nodes.linear import operations
    from ternary_flux.quantizer.files.layer import LayerPlan

    shapes = {name: torch.empty(shape, device="meta") for name, shape in arch.shapes.items()}
    config = comfy.model_detection.detect_unet_config(shapes, "")
    ops = comfy.ops.disable_weight_init
    if mode != "bf16":
        ops = operations(dtype, torch.device(device), mode)
    model = Flux(**config, device="meta" if mode == "bf16" else device, dtype=dtype, operations=ops)
    state = {}
    for name, shape in arch.shapes.items():
        layer = name.removesuffix(".weight")
        if mode == "bf16" or layer not in arch.linear_shapes or layer == name:
            name = name.replace("_norm.scale", "_norm.weight")  # as ComfyUI's loader renames them
            state[name] = random_dense(name, shape, device, dtype)
            continue
        weight = random_weight(*arch.linear_shapes[layer], device)
        state |= {
            name: weight.trits,
            f"{name}_scale": weight.scale,
            f"{name}_group": weight.group,
            f"{layer}.comfy_quant": LayerPlan.of(weight).comfy_quant,
        }
    missing, unexpected = model.load_state_dict(state, strict=False, assign=mode == "bf16")
    if missing or unexpected:
        raise RuntimeError(f"ComfyUI's Flux did not load: missing {missing[:3]}, unexpected {unexpected[:3]}")
    return lambda latent, t, context, pooled, guidance: model(latent, t, context, pooled, guidance)


def build_own(arch: Architecture, mode: str, device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """The quantizer's Flux with ternary Linears in its blocks."""
    from ternary_flux.quantizer.model.flux import Flux

    with torch.device("meta"):
        model = Flux(arch)
    if mode != "bf16":
        for name, shape in arch.linear_shapes.items():
            parent, _, leaf = name.rpartition(".")
            bias = torch.zeros(shape[0], device=device, dtype=dtype) if f"{name}.bias" in arch.shapes else None
            setattr(model.get_submodule(parent), leaf, TernaryLinear(random_weight(*shape, device), bias, mode))
    state = {name: random_dense(name, tuple(p.shape), device, dtype) for name, p in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model


def inputs(arch: Architecture, pixels: int, device: str, dtype: torch.dtype) -> tuple:
    side = pixels // arch.pixels_per_latent
    return (
        torch.randn(1, arch.in_channels, side, side, device=device, dtype=dtype),
        torch.full((1,), 0.7, device=device, dtype=dtype),
        torch.randn(1, TEXT_TOKENS if device != "cpu" else 8, arch.context_dim, device=device, dtype=dtype),
        None if arch.vec_dim is None else torch.randn(1, arch.vec_dim, device=device, dtype=dtype),
        torch.full((1,), 3.5, device=device, dtype=dtype) if arch.guidance else None,
    )


@torch.no_grad()
def work(arch: Architecture, forward: str, mode: str, sizes: list[int], device: str, dtype: torch.dtype) -> dict:
    """Everything measured in one mode; on the CPU only that it runs."""
    cuda = device == "cuda"
    if mode != "bf16" and (choice := resolve(device, mode)).activations != mode:
        return {"missing": choice.reason}
    if cuda:
        torch.randn(256, 256, device=device).bfloat16().matmul(torch.randn(256, 256, device=device).bfloat16())
    result: dict = {"forward": forward, "sizes": {}}
    try:
        step = {"ComfyUI": build_comfyui, "quantizer": build_own}[forward](arch, mode, device, dtype)
        result["weights"] = torch.cuda.memory_allocated() if cuda else None
        for pixels in sizes:
            arguments = inputs(arch, pixels, device, dtype)
            if not cuda:
                result["sizes"][pixels] = {"finite": bool(step(*arguments).isfinite().all())}
                continue
            torch.cuda.reset_peak_memory_stats()
            seconds = [_seconds(lambda: step(*arguments)) for _ in range(STEPS + 2)]  # noqa: B023 - called at once
            result.setdefault("cold", seconds[0])
            result["sizes"][pixels] = {
                "step": statistics.median(seconds[2:]),
                "peak": torch.cuda.max_memory_allocated(),
                "finite": bool(step(*arguments).isfinite().all()),
            }
    except torch.OutOfMemoryError:
        result["missing"] = "does not fit in this GPU's memory"
    return result


def _seconds(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(mode: str, model: str, forward: str, sizes: list[int], dry: bool) -> dict:
    """`work` in a process of its own with an empty Triton cache."""
    command = [sys.executable, "-m", "benchmarks.speed.transformer", "--worker", mode, "--model", model]
    command += ["--forward", forward, "--sizes", ",".join(map(str, sizes)), *(["--dry"] if dry else [])]
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TRITON_CACHE_DIR": cache} | ({"TRITON_INTERPRET": "1"} if dry else {})
        done = subprocess.run(command, env=environment, cwd=reports.ROOT, capture_output=True, text=True)
    if done.returncode:
        return {"missing": "failed: " + (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def line(mode: str, pixels: str, found: dict, result: dict, baseline: dict) -> str:
    if "step" not in found:
        return f"{mode:6}{pixels:>6} px   dry, finite: {found['finite']}"
    step, peak = found["step"], found["peak"]
    row = f"{mode:6}{pixels:>6} px {step:8.4f} s/step   peak {peak / 1e9:6.2f} GB"
    row += f"   weights {result['weights'] / 1e9:5.2f} GB"
    if base := baseline.get("sizes", {}).get(pixels):
        row += f"   {base['step'] / step:5.2f}x bf16, memory 1/{base['peak'] / peak:.1f}"
    return row + ("" if found["finite"] else "   NOT FINITE")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.transformer", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="FLUX.1-dev", choices=MODELS)
    parser.add_argument("--sizes", default="1024,512,2048", help="pixels, comma separated (default: %(default)s)")
    parser.add_argument("--modes", default=",".join(MODES), help="comma separated (default: %(default)s)")
    parser.add_argument("--forward", choices=("ComfyUI", "quantizer"), help="default: ComfyUI where it is at hand")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/transformer-GPU.json)")
    parser.add_argument("--dry", action="store_true", help="a tiny model on the CPU, nothing timed")
    parser.add_argument("--worker", choices=MODES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    forward = "ComfyUI" if options.forward != "quantizer" and find_comfyui() else "quantizer"
    if options.forward == "ComfyUI" != forward:
        parser.error("no ComfyUI here: set COMFYUI_PATH")
    sizes = [32] if options.dry else [int(size) for size in options.sizes.split(",")]
    if options.worker:
        arch, device, dtype = MODELS[options.model], "cuda", torch.bfloat16
        if options.dry:
            arch, device, dtype = TINY, "cpu", torch.float16
        print(json.dumps(work(arch, forward, options.worker, sizes, device, dtype)))
        return
    if not options.dry and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device. Use --dry to run every path on the CPU")
    report: dict = {
        "machine": reports.machine("cpu" if options.dry else "cuda"),
        "model": "tiny" if options.dry else options.model,
        "modes": {},
    }
    print(json.dumps(report["machine"]))
    out = options.out
    if out is None and not options.dry:
        out = reports.RESULTS / f"transformer-{options.model}-{report['machine']['gpu'].replace(' ', '-')}.json"
    for mode in options.modes.split(","):
        result = report["modes"][mode] = measure(mode, options.model, forward, sizes, options.dry)
        for pixels, found in result.get("sizes", {}).items():
            print(line(mode, pixels, found, result, report["modes"].get("bf16", {})), flush=True)
        if "cold" in result:
            print(f"{mode:6} cold start: first step {result['cold']:.2f} s ({result['forward']} forward)")
        if "missing" in result:
            print(f"{mode:6} {result['missing']}", flush=True)
        reports.write(out, report)
    if out is not None:
        print(f"written: {out}")


if __name__ == "__main__":
    main()
