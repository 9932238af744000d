"""What benchmarks write: where results lie, the machine that they were measured on, and JSON."""

import json
import os
import platform
from pathlib import Path

import torch
from ternary_flux.ops.backends import eager

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def machine(device: torch.device | str) -> dict:
    """What the numbers belong to."""
    found: dict = {"torch": torch.__version__}
    if torch.device(device).type == "cuda":
        import triton

        properties = torch.cuda.get_device_properties(device)
        return found | {
            "triton": triton.__version__,
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "cuda": torch.version.cuda or f"hip {torch.version.hip}",
        }
    names = Path("/proc/cpuinfo")
    lines = names.read_text().splitlines() if names.is_file() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    found |= {"processor": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if hasattr(os, "getloadavg"):
        found["load at the start"] = os.getloadavg()[0]
    return found | {"device": str(device), "int8 products": "int8" in eager.formats(torch.device(device))}


def write(path: Path | None, report: object) -> None:
    """Write a report, as far as it goes; nowhere without a path."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
