"""The machine code of the product's own launches, compiled here for GPUs that are not: no spills, matrix instructions,
shared memory within the chip, and few instructions around each product."""

import re

import pytest
import torch
from ternary_flux.benchmarks.speed import codegen

pytestmark = pytest.mark.codegen

# (compute capability, case of benchmarks.speed.codegen, matrix instruction, most loop instructions for each of them)
EXPECTED = [
    (80, "a8 row", "IMMA.16832.S8", 2.3),
    (80, "a16 group, 16 tokens", "HMMA.16816.F32.BF16", 12),
    (80, "a16 group, 16 tokens, columns", "HMMA.16816.F32.BF16", 12),
    (86, "a8 group", "IMMA.16832.S8", 2.3),
    (89, "a8 row", "IMMA.16832.S8", 2.3),
    (89, "a8 group, rank 16", "IMMA.16832.S8", 2.3),
    (89, "a8 group, 512 tokens", "IMMA.16832.S8", 3.3),
    (89, "a8 group, 16 tokens", "IMMA.16832.S8", 12.5),
    (89, "a16 group, 1024 tokens", "HMMA.16816.F32.BF16", 5),
    (89, "a16 group, 1024 tokens, columns", "HMMA.16816.F32.BF16", 5),
    (90, "a8 row", "IGMMA", 26),
    (90, "a8 group, rank 16", "IGMMA", 38),
    (90, "a8 group, 16 tokens", "IGMMA", 26),
    (90, "e4m3 row", "QGMMA", 36),
    (90, "e4m3 group", "QGMMA", 64),
    (90, "a16 group, 1024 tokens", "HGMMA", 31),
    (90, "a16 group, 64 tokens, columns", "HGMMA", 38),
    (100, "e4m3 row", "UTCQMMA", None),
    (100, "a16 group, 16 tokens", "(UTC)?HMMA", None),
    (100, "a16 group, 64 tokens, columns", "(UTC)?HMMA", None),
    (120, "a8 row", "IMMA.16832.S8", 3),
]


# Measured to be the fastest on an H200 nevertheless.
SPILLS = {(90, "a16 group, 1024 tokens"): 18}


@pytest.mark.parametrize("capability, case, product, budget", EXPECTED, ids=lambda value: str(value).replace(" ", "-"))
def test_machine_code(capability, case, product, budget):
    for launch in codegen.case(capability, case):
        code = codegen.machine_code(launch)
        assert code.spills <= SPILLS.get((capability, case), 0), launch.name
        assert code.registers <= 255
        assert code.shared <= codegen.SHARED_MEMORY[capability]
        if launch.name.startswith("_linear"):
            assert any(re.match(product, name) for name in code.products), code.products
            assert code.loop_products > 0
            assert budget is None or code.per_product <= budget, code


@pytest.mark.parametrize("case", ["a8 group", "e4m3 group", "a16 group, 16 tokens"])
def test_group_scales_are_copied_ahead(case):
    """Loads of single bytes cannot be, and cost a third of the time on an H200."""
    code = next(launch for launch in codegen.case(90, case) if launch.name.startswith("_linear")).compiled.asm["ptx"]
    assert "cp.async" in code and not re.search(r"ld\.global\S*\.[bsu]8\b", code)


def test_launches_are_those_of_the_product():
    """FLUX.1's modulation: quantize, split product, sum of the splits; grids cover the output."""
    x, weight = torch.empty(1, 3072, dtype=torch.bfloat16), codegen.sample_weight(9216, 3072)
    names = [(launch.name, launch.grid) for launch in codegen.launches(89, x, weight)]
    assert [name for name, _ in names] == ["_quantize_rows", "_linear_a8", "_reduce_splits"]
    assert names[0][1] == (1, 1, 1) and names[1][1][0] == 9216 // 128 and names[1][1][1] > 1


def test_compiled_kernels_are_few():
    """Layer shapes, token counts and splits are run-time arguments: one bucket of M compiles once for a whole model."""
    compiled = set()
    for n, k in [(9216, 3072), (3072, 3072), (12288, 3072), (3072, 12288)]:
        for m in (4608, 4096, 2000):
            x, weight = torch.empty(m, k, dtype=torch.bfloat16), codegen.sample_weight(n, k, grouped=False)
            found = codegen.launches(89, x, weight)
            compiled.update(launch.compiled.hash for launch in found if launch.name == "_linear_a8")
    assert len(compiled) == 1


def test_column_scales_leave_the_loops_of_other_kernels_alone():
    """8-bit kernels get inputs that were scaled as they were quantized; tiles of many tokens on sm_90 have no room."""
    for x, capability, activations, kernel in (
        (torch.empty(4608, 3072, dtype=torch.bfloat16), 89, "int8", "_linear_a8"),
        (torch.empty(1024, 3072, dtype=torch.bfloat16), 90, "full", "_linear_a16"),
    ):
        hashes = set()
        for column in (False, True):
            weight = codegen.sample_weight(3072, 3072, column=column)
            found = codegen.launches(capability, x, weight, None, activations)
            hashes.update(launch.compiled.hash for launch in found if launch.name == kernel)
        assert len(hashes) == 1


@pytest.mark.parametrize("column", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype, conversion", [(torch.int8, ""), (torch.float8_e4m3fn, "cvt.rn.satfinite.e4m3x2.f32")])
def test_quantize_rows(dtype, conversion, column):
    """16-byte loads and stores, no local memory, and hardware rounding to e4m3."""
    from ternary_flux.ops.backends.triton.quantize_rows import quantize_rows

    chip = codegen.configs.nvidia("", 90, 132)
    target = codegen.GPUTarget("cuda", 90, 32)
    with codegen.recording(chip, target, codegen.SHARED_MEMORY[90]) as found:
        column = None if column is None else torch.empty(15360, dtype=column)
        quantize_rows(torch.empty(4, 15360, dtype=torch.bfloat16), 15360, dtype, column)
    ptx = found[0].compiled.asm["ptx"]
    assert conversion in ptx
    assert re.search(r"ld\.global\S*\.v4\.b32", ptx) and re.search(r"st\.global\S*\.v[24]\.b32", ptx)
    assert codegen.machine_code(found[0]).spills == 0


def test_dequantize():
    from ternary_flux.ops.backends.triton.dequantize import dequantize

    chip = codegen.configs.nvidia("", 90, 132)
    target = codegen.GPUTarget("cuda", 90, 32)
    for up, column in ((False, False), (True, False), (False, True), (True, True)):
        weight = codegen.sample_weight(3072, 3072, rank=16, column=column)
        up, down = (weight.up, weight.down) if up else (None, None)
        with codegen.recording(chip, target, codegen.SHARED_MEMORY[90]) as found:
            dequantize(weight, down, up, torch.empty(3072, 3072, dtype=torch.bfloat16), chip)
        code = codegen.machine_code(found[0])
        assert code.spills == 0 and bool(code.products) == (up is not None)


@pytest.mark.parametrize("dtype, rank", [(torch.float16, 16), (torch.bfloat16, 0), (torch.float32, 0)])
def test_turing_only_dequantizes(dtype, rank):
    """Triton has no matrix instructions there: torch multiplies, bf16 in fp32, and the low-rank branch apart."""
    x, weight = torch.ones(40, 3072, dtype=dtype), codegen.sample_weight(256, 3072, rank=rank)
    (launch,) = codegen.launches(75, x, weight, torch.zeros(256, dtype=dtype), "full")
    code = codegen.machine_code(launch)
    assert launch.name == "_dequantize" and code.spills == 0 and not code.products
    assert code.shared <= codegen.SHARED_MEMORY[75]
    assert "bf16" not in launch.compiled.asm["ptx"]
    with pytest.raises(ValueError, match="sm_75 has no kernel for int8 activations"):
        codegen.launches(75, x, weight)


def test_portable_branch_compiles_for_amd():
    """The portable decode, to AMD's assembly: matrix instructions, nothing kept in scratch memory."""
    chip = codegen.configs.Chip("AMD", "portable", 104, False, (), ("int8", "full"))
    weight = codegen.sample_weight(3072, 3072)
    target = codegen.GPUTarget("hip", "gfx942", 64)
    with codegen.recording(chip, target, 64 << 10) as found:
        codegen.dispatch.linear(torch.empty(4096, 3072, dtype=torch.bfloat16), weight, None, "int8")
    code = next(launch for launch in found if launch.name == "_linear_a8").compiled.asm["amdgcn"]
    assert re.search(r"v_mfma_i32_\d+x\d+x\d+_?i8", code)
    assert re.search(r"\.private_segment_fixed_size:\s*0\b", code)


@pytest.mark.parametrize("capability", [75, 90, 120])
@pytest.mark.parametrize("descent", [False, True])
def test_group_codes(capability, descent):
    """The block of a program stays in the registers of one warp."""
    from ternary_flux.ops.backends.triton.group_codes import group_codes

    chip = codegen.configs.nvidia("", capability, codegen.MULTIPROCESSORS[capability])
    target = codegen.GPUTarget("cuda", capability, 32)
    block = torch.empty(128, 3072)
    with codegen.recording(chip, target, codegen.SHARED_MEMORY[capability]) as found:
        group_codes(block, torch.empty(3072), torch.empty(128, 128), torch.empty(128), block if descent else None)
    code = codegen.machine_code(found[0])
    assert code.spills == 0 and code.registers <= 168 and found[0].compiled.metadata.num_warps == 1
