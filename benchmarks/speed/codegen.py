"""The kernels' machine code for GPUs that are not here: registers, shared memory, spills, instructions per product.

    python -m benchmarks.speed.codegen [capability ...]

A stand-in for Triton's driver lets the product's own dispatch run on CPU tensors: every launch is compiled for the
chosen compute capability, by Triton's bundled ptxas, and recorded instead of executed.
"""

import contextlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from ternary_flux.ops import TernaryWeight
from ternary_flux.ops.backends.triton import configs, dispatch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)
MULTIPROCESSORS = {75: 68, 80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}
# Bytes of shared memory one block can have (CUDA C++ Programming Guide, technical specifications).
SHARED_MEMORY = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
_LABEL = re.compile(r"^(\.L_?\w+):")
_BRANCH = re.compile(r"BRA\b.*?(\.L_?\w+)")


@dataclass(frozen=True)
class Launch:
    """One recorded kernel launch."""

    name: str
    grid: tuple[int, int, int]
    compiled: Any  # triton.compiler.CompiledKernel


@dataclass(frozen=True)
class MachineCode:
    """What the SASS of a kernel says. The loop is the one with the most matrix instructions."""

    registers: int
    shared: int  # bytes, dynamic
    spills: int  # LDL and STL instructions
    products: Counter  # matrix instructions of the whole kernel
    loop_products: int
    loop_instructions: int

    @property
    def per_product(self) -> float:
        """Instructions of the loop for each matrix instruction in it."""
        return self.loop_instructions / max(1, self.loop_products)


class _Driver:
    """What Triton asks of its active driver, for a GPU that is not here."""

    def __init__(self, target: GPUTarget, shared_memory: int, launches: list[Launch]):
        self.target = target
        self.launches = launches
        self.shared_memory = shared_memory
        self.utils = self
        self.launcher_cls = self._launcher

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return f"{self.target.backend}-{self.target.arch}"  # Triton's key for its compiled kernels

    def get_current_stream(self, device):
        return 0

    def get_device_properties(self, device):
        return {"max_shared_mem": self.shared_memory}

    def load_binary(self, name, binary, shared, device):
        return object(), object(), 0, 0, 1024

    def _launcher(self, source, metadata):
        return lambda *args: None


@contextlib.contextmanager
def recording(chip: configs.Chip, target: GPUTarget, shared_memory: int) -> Iterator[list[Launch]]:
    """Within, Triton kernels launched on CPU tensors are compiled for `target` and listed; `dispatch` sees `chip`."""
    launches: list[Launch] = []
    before, chip_of, run = driver._active, configs.chip, triton.runtime.jit.JITFunction.run

    def record(kernel, *args, grid, warmup, **options):
        compiled = run(kernel, *args, grid=grid, warmup=False, **options)
        launches.append(Launch(kernel.__name__, (*grid, 1, 1)[:3], compiled))
        return compiled

    driver.set_active(_Driver(target, shared_memory, launches))
    setattr(configs, "chip", lambda device: chip)  # noqa: B010 - a type checker refuses the assignment
    triton.runtime.jit.JITFunction.run = record
    try:
        yield launches
    finally:
        driver._active, configs.chip, triton.runtime.jit.JITFunction.run = before, chip_of, run


def launches(capability: int, x, weight, bias=None, activations="int8") -> list[Launch]:
    """The launches of one linear on an NVIDIA GPU of a compute capability; tensors on the CPU, values unused."""
    chip = configs.nvidia(f"sm_{capability}", capability, MULTIPROCESSORS[capability])
    with recording(chip, GPUTarget("cuda", capability, 32), SHARED_MEMORY[capability]) as found:
        dispatch.linear(x, weight, bias, activations)
    return found


def sample_weight(n: int, k: int, grouped: bool = True, rank: int = 0, column: bool = False) -> TernaryWeight:
    """A weight of zeros, for compilation."""
    blocks = -(-k // 128)
    return TernaryWeight(
        torch.zeros(blocks, n, 32, dtype=torch.uint8),
        torch.zeros(n),
        (n, k),
        torch.ones(blocks, n, dtype=torch.uint8) if grouped else None,
        torch.zeros(rank, k, dtype=torch.bfloat16) if rank else None,
        torch.zeros(n, rank, dtype=torch.bfloat16) if rank else None,
        torch.ones(k, dtype=torch.bfloat16) if column else None,
    )


def machine_code(launch: Launch) -> MachineCode:
    """Disassemble a launch that was compiled for NVIDIA."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(launch.compiled.asm["cubin"])
        file.flush()
        sass = _output("nvdisasm", "-c", file.name)
        usage = _output("cuobjdump", "-res-usage", file.name)
    labels, instructions, lines = {}, [], []
    for line in sass.splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label.group(1)] = len(instructions)
        elif instruction := _INSTRUCTION.match(line):
            instructions.append(instruction.group(1))
            lines.append(line)
    loop_products = loop_instructions = 0
    for end, line in enumerate(lines):
        branch = _BRANCH.search(line)
        start = labels.get(branch.group(1), end + 1) if branch else end + 1
        if start <= end:
            products = sum(map(_is_product, instructions[start : end + 1]))
            if products > loop_products:
                loop_products, loop_instructions = products, end + 1 - start
    return MachineCode(
        int(re.search(r"REG:(\d+)", usage).group(1)),
        launch.compiled.metadata.shared,
        sum(name.startswith(("LDL", "STL")) for name in instructions),
        Counter(name for name in instructions if _is_product(name)),
        loop_products,
        loop_instructions,
    )


def _is_product(name: str) -> bool:
    return "MMA" in name and not name.startswith(("WARP", "UTCBAR"))


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout


CASES: dict[str, dict] = {
    "a8 row": dict(m=4608, grouped=False),
    "a8 group": dict(m=4608),
    "a8 group, rank 16": dict(m=4608, rank=16),
    "a8 group, 512 tokens": dict(m=512),
    "a8 group, 16 tokens": dict(m=16),
    "e4m3 row": dict(m=4608, grouped=False, activations="e4m3"),
    "e4m3 group": dict(m=4608, activations="e4m3"),
    "a16 group, 16 tokens": dict(m=16, activations="full"),
    "a16 group, 1024 tokens": dict(m=1024, activations="full"),
    "a16 group, 16 tokens, columns": dict(m=16, activations="full", column=True),
    "a16 group, 64 tokens, columns": dict(m=64, activations="full", column=True),
    "a16 group, 1024 tokens, columns": dict(m=1024, activations="full", column=True),
    "dequantize group, rank 16": dict(m=4608, rank=16, activations="full", dtype=torch.float16),
}


def case(capability: int, name: str) -> list[Launch]:
    """The launches of a named case: FLUX.1's linear2, by default in bf16, with bias."""
    settings = dict(CASES[name])
    activations = settings.pop("activations", "int8")
    dtype = settings.pop("dtype", torch.bfloat16)
    x = torch.empty(settings.pop("m"), 15360, dtype=dtype)
    weight = sample_weight(3072, 15360, **settings)
    return launches(capability, x, weight, torch.zeros(3072, dtype=dtype), activations)


def main() -> None:
    import sys

    capabilities = [int(argument) for argument in sys.argv[1:]] or CAPABILITIES
    print(f"{'chip':8}{'case':34}{'kernel':16}{'grid':>12}{'regs':>6}{'smem KB':>9}{'spills':>8}{'loop':>6}"
          f"{'MMA':>5}{'instr/MMA':>11}  products")  # fmt: skip
    for capability in capabilities:
        for name in CASES:
            if CASES[name].get("activations", "int8") not in configs.nvidia("", capability, 1).formats:
                continue
            for launch in case(capability, name):
                code = machine_code(launch)
                grid = "x".join(map(str, launch.grid[:2]))
                print(f"sm_{capability:<5}{name:34}{launch.name.strip('_'):16}{grid:>12}{code.registers:6}"
                      f"{code.shared / 1024:9.1f}{code.spills:8}{code.loop_instructions:6}{code.loop_products:5}"
                      f"{code.per_product:11.2f}  {dict(code.products)}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
