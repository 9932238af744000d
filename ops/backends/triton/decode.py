"""Packed trits to matrix operands, in registers.

A trit is 2-bit two's complement. In the top two bits of a lane it is a number: +-64 in int8, +-2 in e4m3, fp16 and
bf16. Byte i of a planes32 block holds inputs i, 32+i, 64+i, 96+i in bits 7:6, 5:4, 3:2, 1:0, so a byte tile
[rows, 32] decodes into four operand tiles [rows, 32] of consecutive inputs.

Each function has an inline-PTX form for NVIDIA, working on four bytes at a time, and a portable form for other vendors
and Triton's interpreter. Triton's own lowering of byte shifts costs 2 to 6 times the instructions.

The PTX comes in by default arguments: Triton compares every global that a kernel uses at every launch.
"""

import triton
import triton.language as tl

# 3 shifts and 4 ANDs for 16 trits.
PLANES8_PTX = tl.constexpr("""{
    .reg .b32 a, b, c;
    shl.b32 a, $4, 2;
    shl.b32 b, $4, 4;
    shl.b32 c, $4, 6;
    and.b32 $0, $4, 0xC0C0C0C0;
    and.b32 $1, a, 0xC0C0C0C0;
    and.b32 $2, b, 0xC0C0C0C0;
    and.b32 $3, c, 0xC0C0C0C0;
}""")

# A code selects one of the bytes 0, +g, -, -g of $5: PRMT looks up four codes at once. After the masks every nibble is
# a code; e holds planes 2 and 0, o holds planes 3 and 1, interleaved.
PLANES8_SCALED_PTX = tl.constexpr("""{
    .reg .b32 e, o, h, a, b;
    shr.u32 e, $4, 2;
    and.b32 e, e, 0x33333333;
    and.b32 o, $4, 0x33333333;
    shr.u32 h, e, 16;
    prmt.b32 a, $5, 0, e;
    prmt.b32 b, $5, 0, h;
    prmt.b32 $0, a, b, 0x7531;
    prmt.b32 $2, a, b, 0x6420;
    shr.u32 h, o, 16;
    prmt.b32 a, $5, 0, o;
    prmt.b32 b, $5, 0, h;
    prmt.b32 $1, a, b, 0x7531;
    prmt.b32 $3, a, b, 0x6420;
}""")

# 2 PRMT put two bytes into the top halves of a register's 16-bit lanes, then as PLANES8.
PLANES16_PTX = tl.constexpr("""{
    .reg .b32 l, h, a, b;
    prmt.b32 l, $8, 0, 0x1404;
    prmt.b32 h, $8, 0, 0x3424;
    and.b32 $0, l, 0xC000C000;
    and.b32 $1, h, 0xC000C000;
    shl.b32 a, l, 2;
    shl.b32 b, h, 2;
    and.b32 $2, a, 0xC000C000;
    and.b32 $3, b, 0xC000C000;
    shl.b32 a, l, 4;
    shl.b32 b, h, 4;
    and.b32 $4, a, 0xC000C000;
    and.b32 $5, b, 0xC000C000;
    shl.b32 a, l, 6;
    shl.b32 b, h, 6;
    and.b32 $6, a, 0xC000C000;
    and.b32 $7, b, 0xC000C000;
}""")


@triton.jit
def planes8(trits, PTX: tl.constexpr, CODE: tl.constexpr = PLANES8_PTX):
    """uint8 [..., 32] -> four int8 [..., 32] of 0 and +-64; bitcast to e4m3 they are 0 and +-2."""
    if PTX:
        return tl.inline_asm_elementwise(
            CODE,
            "=r,=r,=r,=r,r",
            [trits],
            dtype=(tl.int8, tl.int8, tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        byte = trits.to(tl.int8, bitcast=True)
        top = tl.full((1, 1), -64, tl.int8)
        return byte & top, (byte << 2) & top, (byte << 4) & top, (byte << 6) & top


@triton.jit
def planes8_scaled(trits, multiplier, PTX: tl.constexpr, CODE: tl.constexpr = PLANES8_SCALED_PTX):
    """uint8 [rows, 32] and integers 1..127 [rows] -> four int8 [rows, 32] of 0 and +-multiplier."""
    g = multiplier.to(tl.int32)[:, None]
    if PTX:
        return tl.inline_asm_elementwise(
            CODE,
            "=r,=r,=r,=r,r,r,r,r,r",
            [trits, (g << 8) | ((256 - g) << 24)],
            dtype=(tl.int8, tl.int8, tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        byte, g8 = trits.to(tl.int8, bitcast=True), g.to(tl.int8)
        return (byte >> 6) * g8, ((byte << 2) >> 6) * g8, ((byte << 4) >> 6) * g8, ((byte << 6) >> 6) * g8


@triton.jit
def planes16(trits, DTYPE: tl.constexpr, PTX: tl.constexpr, CODE: tl.constexpr = PLANES16_PTX):
    """uint8 [..., 32] -> four fp16 or bf16 [..., 32] of 0 and +-2."""
    if PTX:
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            CODE,
            "=r,=r,=r,=r,=r,=r,=r,=r,r",
            [trits],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True,
            pack=4,
        )
    else:
        lane = trits.to(tl.uint16) << 8
        top = tl.full((1, 1), 0xC000, tl.uint16)
        w0, w1, w2, w3 = lane & top, (lane << 2) & top, (lane << 4) & top, (lane << 6) & top
    return (
        w0.to(DTYPE, bitcast=True),
        w1.to(DTYPE, bitcast=True),
        w2.to(DTYPE, bitcast=True),
        w3.to(DTYPE, bitcast=True),
    )


@triton.jit
def join_planes(w0, w1, w2, w3):
    """Four tiles [rows, 32] -> [rows, 128], inputs in order. Costs nothing in registers of a wgmma operand."""
    ROWS: tl.constexpr = w0.shape[0]
    low = tl.reshape(tl.permute(tl.join(w0, w1), (0, 2, 1)), (ROWS, 64))
    high = tl.reshape(tl.permute(tl.join(w2, w3), (0, 2, 1)), (ROWS, 64))
    return tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (ROWS, 128))
