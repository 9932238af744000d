"""Packing is exact for every shape, and what it stores is the documented layout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ternary_flux.ops import packing

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 700))
PACKERS = {
    "planes32": (packing.pack_planes32, packing.unpack_planes32),
    "base3": (packing.pack_base3, packing.unpack_base3),
}


def random_codes(shape, seed=0):
    return torch.randint(-1, 2, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", packing.PACKINGS)
@given(shape=SHAPES, seed=st.integers(0, 2**31), terms=st.integers(1, 2))
@settings(max_examples=60)
def test_round_trip(name, shape, seed, terms):
    pack, unpack = PACKERS[name]
    codes = random_codes((shape[0], terms * shape[1]), seed)
    packed = pack(codes, terms)
    assert packed.dtype == torch.uint8 and packed.is_contiguous()
    assert tuple(packed.shape) == packing.packed_shape(shape, name, terms)
    assert torch.equal(unpack(packed, shape[1]), codes)
    assert packing.first_invalid(packed, name) is None


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0, 1])
def test_decode_planes32(dtype, offset):
    """Inputs before outputs, a trit of 1 as 2.0 or 64; the trits may be rows of a tensor at any address."""
    codes = random_codes((20, 384))
    storage = torch.cat((torch.zeros(offset, dtype=torch.uint8), packing.pack_planes32(codes).flatten()))
    trits = storage[offset:].view(3, 20, 32)[:, 3:16]
    decoded = packing.decode_planes32(trits, torch.empty(3, 128, 13, dtype=dtype))
    one = 64 if dtype == torch.int8 else 2
    assert torch.equal(decoded.view(384, 13).t(), one * codes[3:16].to(dtype))


def test_planes32_layout():
    """Byte i of a block holds inputs i, 32+i, 64+i, 96+i from the top bits down; the second block follows all rows."""
    codes = torch.zeros(2, 130, dtype=torch.int8)
    codes[1, 3], codes[1, 35], codes[1, 67], codes[1, 99] = 1, -1, 0, 1
    codes[0, 128] = -1
    packed = packing.pack_planes32(codes)
    assert packed[0, 1, 3] == 0b01_11_00_01
    assert packed[1, 0, 0] == 0b11_00_00_00
    assert packed.count_nonzero() == 2


def test_planes32_top_bits_are_the_number():
    """The documented decode: a code moved to the top of a lane is +-64 as int8 and +-2 as fp8 and fp16."""
    top = packing.pack_planes32(torch.tensor([[1, -1]], dtype=torch.int8))[0, 0, :2] & 0xC0
    assert top.view(torch.int8).tolist() == [64, -64]
    assert top.view(torch.float8_e4m3fn).float().tolist() == [2, -2]
    assert top.view(torch.float8_e5m2).float().tolist() == [2, -2]
    assert (top.to(torch.int16) << 8).view(torch.float16).tolist() == [2, -2]
    assert (top.to(torch.int16) << 8).view(torch.bfloat16).tolist() == [2, -2]


def test_base3_layout():
    packed = packing.pack_base3(torch.tensor([[1, -1, 0, 1, -1, 1]], dtype=torch.int8))
    assert packed.tolist() == [[2 + 0 * 3 + 1 * 9 + 2 * 27 + 0 * 81, 2 + 3 + 9 + 27 + 81]]


def test_terms_are_packed_one_after_the_other():
    first, second = random_codes((3, 200), 1), random_codes((3, 200), 2)
    codes = torch.cat([first, second], 1)
    apart = [packing.pack_planes32(first), packing.pack_planes32(second)]
    assert torch.equal(packing.pack_planes32(codes, 2), torch.cat(apart))
    apart = [packing.pack_base3(first), packing.pack_base3(second)]
    assert torch.equal(packing.pack_base3(codes, 2), torch.cat(apart, 1))


@pytest.mark.parametrize("position", [0, 31, 100])
@pytest.mark.parametrize("bad", [0b10_00_00_00, 0b01_10_11_00, 0b00_00_00_10])
def test_planes32_invalid_code_is_found(position, bad):
    packed = packing.pack_planes32(random_codes((4, 128)))
    packed.view(-1)[position] = bad
    assert packing.first_invalid(packed, "planes32") == position


def test_every_byte_is_judged_by_its_codes():
    for byte in range(256):
        codes = [(byte >> shift) & 3 for shift in (6, 4, 2, 0)]
        one = torch.tensor([byte], dtype=torch.uint8)
        assert (packing.first_invalid(one, "planes32") is None) == (2 not in codes)
        assert (packing.first_invalid(one, "base3") is None) == (byte <= 242)
