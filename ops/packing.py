"""Trits in bytes: planes32 (2 bits a trit, the layout the kernels read) and base3 (1.6 bits, for sharing).

planes32  A trit is 2-bit two's complement: 00 = 0, 01 = +1, 11 = -1; 10 is invalid. Byte i (0..31) of a block of 128
          inputs holds the inputs i, 32+i, 64+i, 96+i in bits 7:6, 5:4, 3:2, 1:0. Blocks are stored block-major,
          uint8 [ceil(K/128), N, 32], so that a tile of rows of one block is one contiguous run. K is padded with zeros.
base3     Byte j of a row holds the inputs 5j..5j+4 as sum (trit + 1) * 3**i: uint8 [N, ceil(K/5)], values 0..242.

The codes of a weight with two ternary terms lie side by side, int8 [N, 2 * K]. Each term is packed by itself: planes32
has all groups of the first term, then all of the second; a base3 row has the bytes of one, then those of the other.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

GROUP_SIZE = 128
PACKINGS = ("planes32", "base3")

_POWERS_OF_3 = (1, 3, 9, 27, 81)


def groups_of(inputs: int) -> int:
    """Groups of 128 that hold `inputs` inputs."""
    return -(-inputs // GROUP_SIZE)


def packed_shape(shape: tuple[int, int], packing: str, terms: int = 1) -> tuple[int, ...]:
    """Shape of the uint8 tensor that holds the trits of an [N, K] weight."""
    n, k = shape
    if packing == "planes32":
        return (terms * groups_of(k), n, 32)
    if packing == "base3":
        return (n, terms * -(-k // 5))
    raise ValueError(f"unknown packing {packing!r}; known: {', '.join(PACKINGS)}")


def pack_planes32(codes: Tensor, terms: int = 1) -> Tensor:
    """int8 [N, terms * K] of -1, 0, +1 -> uint8 [terms * ceil(K/128), N, 32]."""
    n, k = codes.shape[0], codes.shape[1] // terms
    bits = pad(codes.contiguous().view(torch.uint8).view(n, terms, k) & 3, (0, groups_of(k) * GROUP_SIZE - k))
    bits = bits.view(torch.int64).view(n, terms * groups_of(k), 4, 4)  # eight codes at a time: no shift leaves its byte
    packed = bits[:, :, 0] << 6
    packed |= bits[:, :, 1] << 4
    packed |= bits[:, :, 2] << 2
    packed |= bits[:, :, 3]
    return packed.transpose(0, 1).contiguous().view(torch.uint8)


def unpack_planes32(trits: Tensor, inputs: int) -> Tensor:
    """uint8 [terms * ceil(K/128), N, 32] -> int8 [N, terms * K] of -1, 0, +1, with K = `inputs`."""
    groups, n, _ = trits.shape
    signed = trits.view(torch.int8)
    codes = torch.empty(n, groups, 4, 32, dtype=torch.int8, device=trits.device)
    for quarter in range(4):
        codes[:, :, quarter] = ((signed << (2 * quarter)) >> 6).transpose(0, 1)
    terms = groups // groups_of(inputs)
    return codes.view(n, terms, groups_of(inputs) * GROUP_SIZE)[:, :, :inputs].reshape(n, terms * inputs)


def decode_planes32(trits: Tensor, out: Tensor) -> Tensor:
    """uint8 [G, N, 32] -> `out` [G, 128, N], inputs before outputs: a trit of 1 is 2.0 in any float dtype, 64 in int8.

    Two's complement in the top two bits of a lane is that number already, so one shift and one AND decode a whole word
    of trits into words of `out`, with no conversion. The rows are contiguous in N, so torch vectorizes both.
    """
    size = out.dtype.itemsize
    word = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    if trits.storage_offset() % size:
        trits = trits.clone()
    words = trits.view(word).transpose(1, 2).contiguous()  # [G, 32 / size, N]
    groups, count, n = words.shape
    quarter = torch.arange(4, dtype=word, device=out.device)[:, None, None, None]
    byte = torch.arange(size, dtype=word, device=out.device)[:, None]
    lanes = out.view(word).view(groups, 4, count, size, n)
    torch.bitwise_left_shift(words[:, None, :, None], 8 * (size - 1 - byte) + 2 * quarter, out=lanes)
    lanes.bitwise_and_(-1 << (8 * size - 2))
    return out


def pack_base3(codes: Tensor, terms: int = 1) -> Tensor:
    """int8 [N, terms * K] of -1, 0, +1 -> uint8 [N, terms * ceil(K/5)]."""
    n, k = codes.shape[0], codes.shape[1] // terms
    digits = pad((codes + 1).view(torch.uint8).view(n, terms, k), (0, -k % 5), value=1).view(n, -1, 5)
    packed = digits[:, :, 0].clone()
    for i in range(1, 5):
        packed += digits[:, :, i] * _POWERS_OF_3[i]
    return packed


def unpack_base3(packed: Tensor, inputs: int) -> Tensor:
    """uint8 [N, terms * ceil(K/5)] -> int8 [N, terms * K] of -1, 0, +1, with K = `inputs`."""
    values = torch.arange(256)[:, None] // torch.tensor(_POWERS_OF_3) % 3 - 1
    digits = values.to(torch.int8).to(packed.device).index_select(0, packed.flatten().int())
    n, terms = packed.shape[0], packed.shape[1] // -(-inputs // 5)
    return digits.view(n, terms, -1)[:, :, :inputs].reshape(n, terms * inputs)


def first_invalid(packed: Tensor, packing: str) -> int | None:
    """Flat index of the first byte that is no packed trits (a code 10, or a base3 value over 242); None if all are."""
    flat = packed.flatten()
    for start in range(0, flat.numel(), 1 << 24):
        chunk = flat[start : start + (1 << 24)]
        invalid = chunk & ~(chunk << 1) & 0xAA if packing == "planes32" else chunk > 242
        if invalid.any():
            return start + int(invalid.ne(0).int().argmax())
    return None
