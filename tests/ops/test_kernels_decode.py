"""The inline PTX of ops/backends/triton/decode.py, run by an emulator of its five instructions, against the packing."""

import re

import pytest
import torch
from ternary_flux.ops.backends.triton import decode
from ternary_flux.ops.packing import pack_planes32

MASK = 0xFFFFFFFF


def prmt(a, b, selector):
    """Four bytes chosen from the eight of b:a; bit 3 of a choice repeats the chosen byte's sign."""
    source = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    out = 0
    for lane in range(4):
        choice = selector >> 4 * lane & 15
        byte = source[choice & 7]
        if choice & 8:
            byte = 255 if byte & 128 else 0
        out |= byte << 8 * lane
    return out


OPERATIONS = {
    "shl.b32": lambda a, count: a << count & MASK,
    "shr.u32": lambda a, count: a >> count,
    "and.b32": lambda a, b: a & b,
    "prmt.b32": prmt,
}


def run_ptx(code, inputs, outputs):
    """Execute one block; `inputs` are the values of the operands that follow the outputs $0..$(outputs - 1)."""
    registers = {f"${outputs + i}": value for i, value in enumerate(inputs)}
    for statement in re.split(r"[;\n{}]", code.value):
        if not (words := statement.replace(",", " ").split()) or words[0] == ".reg":
            continue
        operation, target, *sources = words
        registers[target] = OPERATIONS[operation](*(registers[s] if s in registers else int(s, 0) for s in sources))
    return [registers[f"${i}"] for i in range(outputs)]


def packed_registers(count=200):
    """Random trits [count, 4 planes, 4 lanes] and the 32-bit registers that hold their bytes."""
    codes = torch.randint(-1, 2, (count, 4, 4), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    block = torch.zeros(count, 4, 32, dtype=torch.int8)
    block[:, :, :4] = codes
    packed = pack_planes32(block.view(count, 128))[0, :, :4].contiguous()
    return codes.tolist(), [int.from_bytes(bytes(row), "little") for row in packed.tolist()]


def int8_lanes(register):
    return [int.from_bytes([byte], "little", signed=True) for byte in register.to_bytes(4, "little")]


def test_planes8():
    for codes, register in zip(*packed_registers(), strict=True):
        planes = run_ptx(decode.PLANES8_PTX, [register], 4)
        assert [int8_lanes(plane) for plane in planes] == [[64 * trit for trit in row] for row in codes]


def test_planes8_are_e4m3_numbers():
    values = torch.tensor([64, 0, -64], dtype=torch.int8).view(torch.float8_e4m3fn)
    assert values.tolist() == [2.0, 0.0, -2.0]


def test_planes8_scaled():
    for i, (codes, register) in enumerate(zip(*packed_registers(), strict=True)):
        g = i % 127 + 1
        table = (g << 8 | (256 - g) << 24) & MASK
        planes = run_ptx(decode.PLANES8_SCALED_PTX, [register, table], 4)
        assert [int8_lanes(plane) for plane in planes] == [[g * trit for trit in row] for row in codes]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_planes16(dtype):
    for codes, register in zip(*packed_registers(), strict=True):
        halves = run_ptx(decode.PLANES16_PTX, [register], 8)
        lanes = torch.tensor([list(half.to_bytes(4, "little")) for half in halves], dtype=torch.uint8).view(dtype)
        assert lanes.view(4, 4).tolist() == [[2.0 * trit for trit in row] for row in codes]
