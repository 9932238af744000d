"""Timing: medians of CUDA-graph replays, what a GPU reaches in plain copies and products, and the clock for a CPU."""

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch

REPLAYS = 20
GRAPH_SECONDS = 0.01


def median_seconds(calls: Sequence[Callable[[], object]], replays: int = REPLAYS) -> tuple[float, bool]:
    """(median time of one call, whether it ran from a CUDA graph; what cannot be captured is launched call by call).

    The calls run in turn: give several that read different weights where a single one would stay in the L2 cache.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in (*calls, *calls):
            call()
        stream.synchronize()

        def once():
            for call in calls:
                call()

        rounds = max(1, min(200, math.ceil(GRAPH_SECONDS / max(_elapsed(once, stream), 1e-5))))

        def many():
            for _ in range(rounds):
                once()

        run, captured = many, True
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                many()
            run = graph.replay
            run()
        except RuntimeError:
            run, captured = many, False
            torch.cuda.synchronize()
        seconds = statistics.median(_elapsed(run, stream) for _ in range(replays))
    return seconds / (rounds * len(calls)), captured


def _elapsed(run: Callable[[], object], stream: torch.cuda.Stream) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record(stream)
    run()
    end.record(stream)
    end.synchronize()
    return start.elapsed_time(end) / 1000


def copies_beyond_cache(nbytes: int) -> int:
    """How many weights of this size no longer fit in the L2 cache together."""
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(1, min(64, math.ceil(2 * cache / max(1, nbytes))))


def _seconds(call: Callable[[], object]) -> float:
    return median_seconds([call])[0]


def ceilings() -> dict[str, float]:
    """Measured on this chip: bytes/s of a large copy (read plus write), FLOP/s of 8192-cubed products."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    found = {"bytes": 2 * source.nbytes / _seconds(lambda: target.copy_(source))}
    size = 8192
    a = torch.randn(size, size, device="cuda").bfloat16()
    found["bf16"] = 2 * size**3 / _seconds(lambda: a @ a.t())
    codes = torch.randint(-127, 128, (size, size), dtype=torch.int8, device="cuda")
    found["int8 (torch._int_mm)"] = 2 * size**3 / _seconds(lambda: torch._int_mm(codes, codes.t()))
    if torch.cuda.get_device_capability() >= (8, 9):
        e4m3, one = a.to(torch.float8_e4m3fn), torch.ones((), device="cuda")
        product = lambda: torch._scaled_mm(e4m3, e4m3.t(), one, one, out_dtype=torch.bfloat16)  # noqa: E731
        found["e4m3 (torch._scaled_mm)"] = 2 * size**3 / _seconds(product)
    return found


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds; of the CPU where one thread computes there, which do not depend on other programs."""
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
