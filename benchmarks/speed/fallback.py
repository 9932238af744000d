"""The torch fallback beside a dense Linear, for FLUX.1's layers: what a machine without the kernels pays.

    python -m benchmarks.speed.fallback                         fp32 on the CPU; JSON in benchmarks/results
    python -m benchmarks.speed.fallback --threads 1             the same in CPU seconds of one thread
    python -m benchmarks.speed.fallback --device mps --dtype float16
    python -m benchmarks.speed.fallback --dry                   one small layer, nothing written

Every round multiplies once by the dense weight and once by each form of the ternary one. A ratio is that of two times
of the same round, and what is printed is the median over the rounds, so that other programs on the machine slow both.
They slow the fallback more: its threads wait for one another several times in a product, a dense product's once. With
one thread nothing waits, and its CPU seconds do not depend on other programs.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from ternary_flux.benchmarks import report as reports
from ternary_flux.benchmarks.speed.timing import clock
from ternary_flux.ops import TernaryWeight, ternary_linear
from ternary_flux.ops.backends import eager
from torch import Tensor
from torch.nn.functional import linear as dense_linear

# (outputs, inputs, tokens): modulations see one token, the others 256 of a picture of 256 px, 512 of text, or both.
LAYERS = {
    "double modulation": (18432, 3072, (1,)),
    "single modulation": (9216, 3072, (1,)),
    "double qkv": (9216, 3072, (256, 512)),
    "double mlp.0": (12288, 3072, (1, 64, 256, 512, 768)),
    "double mlp.2": (3072, 12288, (256, 512)),
    "single linear1": (21504, 3072, (64, 768)),
    "single linear2": (3072, 15360, (64, 768)),
}
DRY = {"small": (300, 400, (1, 20))}


def random_weight(n: int, k: int, device: torch.device) -> TernaryWeight:
    codes = torch.randint(-1, 2, (n, k), dtype=torch.int8)
    group = torch.randint(40, 128, (-(-k // 128), n), dtype=torch.uint8)
    return TernaryWeight.from_codes(codes, torch.rand(n) * 1e-4 + 1e-4, group).to(device)


def seconds(call, device: torch.device) -> tuple[float, Tensor]:
    now = clock(device)
    start = now()
    y = call()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return now() - start, y


def measure(n: int, k: int, tokens: int, device: torch.device, dtype: torch.dtype, rounds: int) -> dict[str, dict]:
    """By name ("dense" and the activations offered here): median seconds, median ratio to dense, error against fp64.

    The error is of the first 512 outputs.
    """
    weight, x = random_weight(n, k, device), torch.randn(tokens, k).to(device, dtype)
    exact = x.cpu().double() @ weight.rows(0, 512).to("cpu").dequantize(torch.float64).t()
    dense = weight.dequantize(dtype)
    calls: dict[str, Callable[[], Tensor]] = {"dense": lambda: dense_linear(x, dense)}
    for activations in eager.formats(device):
        calls[activations] = partial(ternary_linear, x, weight, None, activations, "eager")
    times, errors = {name: [] for name in calls}, {}
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            elapsed, y = seconds(call, device)
            if round_:
                times[name].append(elapsed)
            else:  # the first warms up
                errors[name] = ((y[:, :512].cpu().double() - exact).norm() / exact.norm()).item()
    return {
        name: {
            "seconds": statistics.median(found),
            "ratio": statistics.median(a / b for a, b in zip(found, times["dense"], strict=True)),
            "error": errors[name],
        }
        for name, found in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.fallback", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, help="of torch (default: as torch chooses)")
    parser.add_argument("--rounds", type=int, default=9, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="JSON file (default: a name from the settings, in benchmarks/results)")
    parser.add_argument("--dry", action="store_true", help="one small layer, one round, nothing written unless --out")
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    if options.threads:
        torch.set_num_threads(options.threads)
    rounds = 1 if options.dry else max(1, options.rounds)
    report = {"machine": reports.machine(device), "dtype": options.dtype, "rounds": rounds, "rows": []}
    print(json.dumps(report["machine"]))
    torch.manual_seed(0)
    out = options.out
    if out is None and not options.dry:
        out = reports.RESULTS / f"fallback-{device.type}-{options.dtype}-{torch.get_num_threads()}-threads.json"
    for layer, (n, k, of_tokens) in (DRY if options.dry else LAYERS).items():
        for tokens in of_tokens:
            found = measure(n, k, tokens, device, dtype, rounds)
            report["rows"].append({"layer": layer, "n": n, "k": k, "tokens": tokens, "methods": found})
            cells = (f"{name} {1e3 * m['seconds']:.1f} ms, {m['ratio']:.2f}x" for name, m in found.items())
            print(f"{layer:18} {n:6} x {k:<6} {tokens:4} tokens: {' | '.join(cells)}", flush=True)
            reports.write(out, report)


if __name__ == "__main__":
    main()
