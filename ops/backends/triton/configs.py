"""The tile a kernel runs with: a static table by chip family, kernel and number of tokens. Nothing is tuned in a call.

`python -m benchmarks.speed.tune` measures on the machine at hand and writes its winners to a JSON file, which takes
precedence for GPUs of the same name. The entries of sm_90 are such winners; the others were chosen from machine code
(registers, shared memory, instructions per product; docs/kernels.md), not from timings.
"""

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

KERNELS = ("int8_row", "int8_group", "e4m3_row", "e4m3_group", "a16")


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own is a compiled function, which costs microseconds a call on the host."""
    return -(-a // b)


@dataclass(frozen=True)
class Tile:
    """Outputs of one program, its warps, the depth of its load pipeline, and into how many parts K may be split."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    max_splits: int = 1
    registers: int = 0  # the most of a thread, where fewer than the compiler takes let more programs run at once

    GROUP_M: ClassVar[int] = 8  # rows of tiles that run together
    MIN_BLOCKS: ClassVar[int] = 4  # a split gets at least this many blocks of 128 inputs

    def tiles(self, m: int, n: int) -> int:
        """Programs that cover an [m, n] output."""
        return ceil_div(m, self.block_m) * ceil_div(n, self.block_n)

    def split(self, m: int, n: int, blocks: int, chip: "Chip") -> tuple[int, int]:
        """(splits, blocks of 128 inputs in each) for an [m, n] output."""
        programs = chip.multiprocessors * (4 if self.block_m <= 64 else 2)  # as many as run at once
        wanted = min(self.max_splits, programs // self.tiles(m, n), blocks // self.MIN_BLOCKS)
        each = ceil_div(blocks, max(1, wanted))
        return ceil_div(blocks, each), each

    @functools.cached_property
    def options(self) -> dict[str, int]:
        """Launch options of Triton's."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options | {"maxnreg": self.registers} if self.registers else options


@dataclass(frozen=True)
class Chip:
    """What dispatch needs to know about a device."""

    name: str
    family: str  # key of TABLE
    multiprocessors: int
    ptx: bool  # inline PTX; False on other vendors and in Triton's interpreter
    wide: tuple[str, ...]  # operands with wgmma or tcgen05 products, which take K = 128 at once; mma.sync takes 32
    formats: tuple[str, ...]  # activations, fastest first
    products: bool = True  # whether Triton compiles products to matrix instructions


# Per kernel: (largest M, tile), ascending; the last has no limit. a16 above its last entry dequantizes.
_SMALL = ((16, Tile(16, 128, 4, 4, 16)), (32, Tile(32, 64, 4, 5, 8)), (64, Tile(64, 64, 4, 4, 8)))
_SMALL_A16 = ((16, Tile(16, 128, 4, 4, 16)), (32, Tile(32, 64, 4, 4, 8)), (64, Tile(64, 64, 4, 3, 8)))
_ANY = float("inf")
TABLE: dict[str, dict[str, tuple[tuple[float, Tile], ...]]] = {
    "sm_75": {"a16": ()},  # RTX 20, GTX 16, T4: dequantize only
    "sm_80": {  # A100, A30: 163 KB of shared memory
        "int8_row": (*_SMALL, (512, Tile(128, 128, 4, 3, 4)), (_ANY, Tile(128, 128, 4, 3))),
        "int8_group": (*_SMALL, (512, Tile(128, 64, 4, 3, 4)), (_ANY, Tile(256, 128, 8, 3))),
        "a16": (*_SMALL_A16, (1024, Tile(64, 128, 4, 3))),
    },
    "sm_86": {  # RTX 30, 40 and 50, A10, L4, L40: 99 KB
        "int8_row": (*_SMALL, (512, Tile(128, 128, 4, 3, 4)), (_ANY, Tile(128, 128, 4, 3))),
        "int8_group": (*_SMALL, (512, Tile(128, 64, 4, 3, 4)), (_ANY, Tile(256, 128, 8, 3))),
        "a16": (*_SMALL_A16, (1024, Tile(64, 128, 4, 2))),
    },
    "sm_90": {  # H100, H200: 227 KB; measured on an H200 (benchmarks/results/tiles-NVIDIA-H200.json)
        "int8_row": (
            *((16, Tile(16, 64, 4, 5, 16)), (32, Tile(32, 64, 4, 5, 8)), (64, Tile(64, 64, 4, 4, 8))),
            (_ANY, Tile(128, 128, 8, 3, 1, 128)),
        ),
        "int8_group": (
            *((16, Tile(16, 128, 4, 3, 16)), (32, Tile(32, 128, 4, 3, 16)), (64, Tile(64, 128, 4, 5, 16))),
            (_ANY, Tile(128, 128, 4, 4)),
        ),
        "e4m3_row": (
            *((16, Tile(16, 64, 4, 5, 16)), (32, Tile(32, 64, 4, 5, 8)), (64, Tile(64, 64, 4, 4, 8))),
            *((512, Tile(64, 128, 4, 3)), (_ANY, Tile(128, 256, 8, 4))),
        ),
        "e4m3_group": (
            *((16, Tile(16, 128, 4, 3, 16)), (32, Tile(32, 128, 4, 3, 16)), (64, Tile(64, 64, 4, 3, 16))),
            (_ANY, Tile(64, 128, 4, 3)),
        ),
        "a16": (
            *((16, Tile(16, 128, 4, 3, 16)), (32, Tile(32, 128, 4, 3, 16)), (64, Tile(64, 128, 4, 3, 16))),
            (1024, Tile(128, 128, 4, 3)),
        ),
    },
    "sm_100": {  # B200: 227 KB, and tensor memory
        "int8_row": (*_SMALL, (512, Tile(128, 128, 4, 3, 4)), (_ANY, Tile(128, 128, 4, 3))),
        "int8_group": (*_SMALL, (512, Tile(128, 64, 4, 3, 4)), (_ANY, Tile(256, 128, 8, 3))),
        "e4m3_row": (*_SMALL, (_ANY, Tile(128, 128, 8, 4, 4))),
        "e4m3_group": (*_SMALL, (_ANY, Tile(128, 128, 8, 4, 4))),
        "a16": (*_SMALL_A16, (1024, Tile(128, 128, 8, 3, 2))),
    },
    "portable": {  # other vendors, Triton's interpreter
        "int8_row": ((16, Tile(16, 64, 4, 2, 4)), (_ANY, Tile(64, 64, 4, 2))),
        "int8_group": ((16, Tile(16, 64, 4, 2, 4)), (_ANY, Tile(64, 64, 4, 2))),
        "e4m3_row": ((16, Tile(16, 64, 4, 2, 4)), (_ANY, Tile(64, 64, 4, 2))),
        "e4m3_group": ((16, Tile(16, 64, 4, 2, 4)), (_ANY, Tile(64, 64, 4, 2))),
        "a16": ((16, Tile(16, 64, 4, 2, 4)), (256, Tile(64, 64, 4, 2))),
    },
}


def nvidia(name: str, capability: int, multiprocessors: int) -> Chip:
    """The chip of a compute capability such as 89 (7.5 or newer)."""
    if capability == 75:
        return Chip(name, "sm_75", multiprocessors, True, (), ("full",), products=False)
    family = {80: "sm_80", 90: "sm_90", 100: "sm_100", 103: "sm_100"}.get(capability, "sm_86")
    wide, formats = (), ("int8", "full")
    if family == "sm_90":
        wide, formats = ("int8", "e4m3", "a16"), ("int8", "e4m3", "full")
    if family == "sm_100":
        wide, formats = ("e4m3", "a16"), ("e4m3", "int8", "full")  # int8 has no tcgen05 products there
    return Chip(name, family, multiprocessors, True, wide, formats)


@functools.cache
def chip(device: torch.device) -> Chip:
    """The chip behind `device`; asked once a device."""
    if device.type == "cuda" and torch.version.hip is None:
        properties = torch.cuda.get_device_properties(device)
        return nvidia(properties.name, properties.major * 10 + properties.minor, properties.multi_processor_count)
    processors = 1
    if device.type != "cpu":
        processors = getattr(torch.get_device_module(device).get_device_properties(device), "multi_processor_count", 1)
    return Chip(device.type, "portable", processors, False, (), ("int8", "full"))


def tile(chip: Chip, kernel: str, m: int) -> Tile | None:
    """The tile for m tokens; None where the kernel has no entry for so many."""
    for limit, choice in table(chip)[kernel]:
        if m <= limit:
            return choice
    return None


@functools.cache
def table(chip: Chip) -> dict[str, tuple[tuple[float, Tile], ...]]:
    """The table of a chip, with the user's tuned entries for GPUs of this name in place of the built-in ones."""
    return {**TABLE[chip.family], **read_user_table().get(chip.name, {})}


def user_path() -> Path:
    """The JSON file of `tune`: TERNARY_FLUX_TILES, or ternary_flux/tiles.json in the user's cache folder."""
    if path := os.environ.get("TERNARY_FLUX_TILES"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ternary_flux" / "tiles.json"


def read_user_table() -> dict[str, dict[str, tuple[tuple[float, Tile], ...]]]:
    """{GPU name: {kernel: entries}} of the user's file; {} without one. Raises ValueError naming file and entry."""
    path = user_path()
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
        return {name: {kernel: _entries(kernel, rows) for kernel, rows in of.items()} for name, of in content.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}; delete the file or run `python -m benchmarks.speed.tune` again") from error


def write_user_table(name: str, entries: dict[str, tuple[tuple[float, Tile], ...]]) -> Path:
    """Put the entries of one GPU into the user's file, keeping those of other GPUs."""
    path = user_path()
    content = json.loads(path.read_text()) if path.is_file() else {}
    rows = {kernel: [_row(limit, tile) for limit, tile in of] for kernel, of in entries.items()}
    content[name] = {**content.get(name, {}), **rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1))
    temporary.replace(path)
    table.cache_clear()
    return path


def _row(limit: float, t: Tile) -> list:
    values = [t.block_m, t.block_n, t.warps, t.stages, t.max_splits, t.registers]
    return [None if limit == _ANY else limit, values]


def _entries(kernel: str, rows: list) -> tuple[tuple[float, Tile], ...]:
    if kernel not in KERNELS:
        raise ValueError(f"unknown kernel {kernel!r}, expected one of {', '.join(KERNELS)}")
    entries = []
    for limit, values in rows:
        if len(values) != 6 or not all(isinstance(v, int) and v >= (i < 5) for i, v in enumerate(values)):
            raise ValueError(f"{kernel}: {values} is not [block_m, block_n, warps, stages, splits, registers]")
        entries.append((_ANY if limit is None else limit, Tile(*values)))
    if kernel != "a16" and (not entries or entries[-1][0] != _ANY):
        raise ValueError(f"{kernel}: the last entry must have no limit (null)")
    return tuple(entries)
