# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# Triton's own language: its functions' parameters have no types.
"""E2M1 codes as bits: packed, drawn, unpacked, and as FP8 bytes by look-up, many at once.

ASM   NVIDIA's instructions, which Triton has no words for; without it the same bits in integer arithmetic
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp4dist.kernels.triton import arithmetic as a


@triton.jit
def chosen(low, high, selector, ASM: tl.constexpr):
    """Four bytes of the eight in `low` and `high`: those that the four low nibbles of `selector` (0 to 7) name; a
    nibble with its highest bit set gives the sign bit of the byte eight times.
    """
    if ASM:
        chosen = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selector], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        chosen = selector & 0
        for i in tl.static_range(4):
            nibble = (selector >> (4 * i)) & 15
            byte = (tl.where((nibble & 4) == 0, low, high) >> ((nibble & 3) * 8)) & 0xFF
            byte = tl.where(nibble < 8, byte, (0 - (byte >> 7)) & 0xFF)
            chosen = chosen | (byte << (8 * i))
    return chosen


@triton.jit
def packed(top, y, G: tl.constexpr, E: tl.constexpr, ASM: tl.constexpr):
    """`arithmetic.pack`, in two instructions an element."""
    if ASM:
        t0, t1, t2, t3, t4, t5, t6, t7 = a.eighths(top, G, E)
        y0, y1, y2, y3, y4, y5, y6, y7 = a.eighths(a.bits(y), G, E)
        # lop3: the sign of y and the rest of t; shf: 28 bits of the word so far above the four of the next code
        word = tl.inline_asm_elementwise(
            """{
            .reg .b32 t;
            lop3.b32 t, $8, $16, 0x80000000, 0xD8;
            shr.u32 $0, t, 28;
            lop3.b32 t, $7, $15, 0x80000000, 0xD8;
            shf.l.wrap.b32 $0, t, $0, 4;
            lop3.b32 t, $6, $14, 0x80000000, 0xD8;
            shf.l.wrap.b32 $0, t, $0, 4;
            lop3.b32 t, $5, $13, 0x80000000, 0xD8;
            shf.l.wrap.b32 $0, t, $0, 4;
            lop3.b32 t, $4, $12, 0x80000000, 0xD8;
            shf.l.wrap.b32 $0, t, $0, 4;
            lop3.b32 t, $3, $11, 0x80000000, 0xD8;
            shf.l.wrap.b32 $0, t, $0, 4;
            lop3.b32 t, $2, $10, 0x80000000, 0xD8;
            shf.l.wrap.b32 $0, t, $0, 4;
            lop3.b32 t, $1, $9, 0x80000000, 0xD8;
            shf.l.wrap.b32 $0, t, $0, 4;
            }""",
            "=&r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            [t0, t1, t2, t3, t4, t5, t6, t7, y0, y1, y2, y3, y4, y5, y6, y7], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        word = a.pack(top, y, G, E)
    return word


@triton.jit
def inside(u, G: tl.constexpr, E: tl.constexpr, ASM: tl.constexpr):
    """[G] words of E bits: whether the u >= 0 of a block are at most 6, the first in the lowest bit."""
    if ASM:
        u0, u1, u2, u3, u4, u5, u6, u7 = a.eighths(u, G, E)
        # the signs of 6 - u, one after the other into the lowest bit
        words = tl.inline_asm_elementwise(
            """{
            .reg .f32 d;
            .reg .b32 t;
            sub.rn.f32 d, 0f40C00000, $8; mov.b32 t, d; shr.u32 $0, t, 31;
            sub.rn.f32 d, 0f40C00000, $7; mov.b32 t, d; shf.l.wrap.b32 $0, t, $0, 1;
            sub.rn.f32 d, 0f40C00000, $6; mov.b32 t, d; shf.l.wrap.b32 $0, t, $0, 1;
            sub.rn.f32 d, 0f40C00000, $5; mov.b32 t, d; shf.l.wrap.b32 $0, t, $0, 1;
            sub.rn.f32 d, 0f40C00000, $4; mov.b32 t, d; shf.l.wrap.b32 $0, t, $0, 1;
            sub.rn.f32 d, 0f40C00000, $3; mov.b32 t, d; shf.l.wrap.b32 $0, t, $0, 1;
            sub.rn.f32 d, 0f40C00000, $2; mov.b32 t, d; shf.l.wrap.b32 $0, t, $0, 1;
            sub.rn.f32 d, 0f40C00000, $1; mov.b32 t, d; shf.l.wrap.b32 $0, t, $0, 1;
            }""",
            "=&r,r,r,r,r,r,r,r,r", [u0, u1, u2, u3, u4, u5, u6, u7], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
        word = ~tl.sum(words << (8 * tl.arange(0, E // 8))[None, :], axis=1)
        word = word if E == 32 else word & 0xFFFF
    else:
        word = tl.sum((u <= 6.0).to(tl.int32) << tl.arange(0, E)[None, :], axis=1)
    return word


@triton.jit
def drawn(u, noise, ASM: tl.constexpr):
    """The second result of `arithmetic.stochastic` for u in [0, 6], from noise_above(...): the noise is added to the
    bits of u, or of u + 1 where u is below 1, whose upper ones then are the index. u + 1 is rounded up, so that it is
    above a threshold exactly where u is.
    """
    one = tl.where(u < 1.0, 1.0, 0.0)
    if ASM:
        moved = tl.inline_asm_elementwise("add.rp.f32 $0, $1, $2;", "=r,r,r", [u, one], tl.float32, True, 1)
    else:
        moved = u + one
        low = (u < 1.0) & (moved - 1.0 < u)  # rounded down: the difference is exact
        moved = a.floats(a.bits(moved) + low.to(tl.int32))
    return (a.bits(moved) + a.bits(one) + noise + 16777216) << 6


@triton.jit
def noise(w0, w1, w2, w3, G: tl.constexpr, E: tl.constexpr):
    """[G, E/8] noise words -> [G, E] (65535 - noise) << 6 | 31: what `arithmetic.thresholds` gives, from 2^22 - 1."""
    return (~a.noise_halves(w0, w1, w2, w3, G, E) & 0x3FFFC0) | 31


@triton.jit
def levels(exponent, stored, FP8: tl.constexpr):
    """[G] int32 twice: the FP8 bytes of E2M1's eight levels times 2^exponent, cut towards 0 below the type."""
    if FP8 == 5:
        base = (exponent + 15) << 2  # of 1.0
        low = base * 0x01010100 + 0x01FFFC00  # 0.5, 1, 1.5: 4 below, itself, 2 above
        low = tl.where(exponent > -14, low, tl.where(exponent == -14, 0x06040200, 0x03020100))
        high = base * 0x01010101 + 0x0A080604
        below = -15 - exponent
    else:
        base = (exponent + 7) << 3
        low = base * 0x01010100 + 0x03FFF800
        small = tl.where(exponent == -6, 0x0C080400, tl.where(exponent == -7, 0x06040200, 0x03020100))
        low = tl.where(exponent > -6, low, small)
        high = tl.where(exponent > -8, base * 0x01010101 + 0x14100C08, 0x0C080604)
        below = -8 - exponent
    # from there on halves of 0 1 2 3 and of 4 6 8 12
    low = tl.where(below > 0, tl.where(below == 1, 0x01010000, 0), low)
    deep = tl.where(below == 2, 0x03020101, tl.where(below == 3, 0x01010000, 0))
    high = tl.where(below > 0, tl.where(below == 1, 0x06040302, deep), high)
    return low, tl.where(stored == 255, 0x7F7F7F7F, high)  # the codes of a NaN are 7


@triton.jit
def lost(words, below, G: tl.constexpr, E: tl.constexpr):
    """[G] how many codes of blocks that lie `below` binades under an FP8 type are no multiple of its smallest number,
    where 0.5 under the block's scale is 2^-below of it.
    """
    levels = tl.where(below == 1, 0x0A, tl.where(below == 2, 0x2E, tl.where(below == 3, 0xBE, 0xFE)))
    levels = tl.where(below > 0, levels, 0)[:, None]
    found = (levels >> (words & 7)) & 1
    for i in tl.static_range(1, 8):
        found += (levels >> ((words >> (4 * i)) & 7)) & 1
    return tl.sum(found, axis=1)


@triton.jit
def values(words, low, high, G: tl.constexpr, E: tl.constexpr, ASM: tl.constexpr):
    """[G, E/8] words of eight codes -> [G, E/4] words of four FP8."""
    index, sign = words & 0x77777777, words & -2004318072
    low, high, nothing = low[:, None], high[:, None], words & 0
    first = chosen(low, high, index, ASM)
    second = chosen(low, high, index >> 16, ASM)
    # 0x80 where the sign is set and 0x00 where not, by 0xFF and 0x80
    first = first | ((chosen(nothing + 0x80, nothing, sign, ASM) << 1) & -2139062144)
    second = second | ((chosen(nothing + 0x80, nothing, sign >> 16, ASM) << 1) & -2139062144)
    return tl.reshape(tl.join(first, second), (G, E // 4))


@triton.jit
def unpacked(words, G: tl.constexpr, ASM: tl.constexpr):
    """[G, 4] words of eight codes -> [G, 32] fp32 signed levels."""
    if ASM:
        # codes i and i + 4 as the upper four bits of two halves: sign, and the index where fp16 has its exponent, which
        # is 2^14 too small; then each half as fp32
        v0, v1, v2, v3, v4, v5, v6, v7 = tl.inline_asm_elementwise(
            """{
            .reg .b32 t, u, f;
            .reg .b16 a, b;
            mov.b32 f, 0x74007400;
            shl.b32 t, $8, 12;
            shr.u32 u, t, 3;
            and.b32 u, u, 0x0E000E00;
            lop3.b32 t, t, u, 0x80008000, 0xEC;
            mul.rn.f16x2 t, t, f;
            mov.b32 {a, b}, t;
            cvt.f32.f16 $0, a;
            cvt.f32.f16 $4, b;
            shl.b32 t, $8, 8;
            shr.u32 u, t, 3;
            and.b32 u, u, 0x0E000E00;
            lop3.b32 t, t, u, 0x80008000, 0xEC;
            mul.rn.f16x2 t, t, f;
            mov.b32 {a, b}, t;
            cvt.f32.f16 $1, a;
            cvt.f32.f16 $5, b;
            shl.b32 t, $8, 4;
            shr.u32 u, t, 3;
            and.b32 u, u, 0x0E000E00;
            lop3.b32 t, t, u, 0x80008000, 0xEC;
            mul.rn.f16x2 t, t, f;
            mov.b32 {a, b}, t;
            cvt.f32.f16 $2, a;
            cvt.f32.f16 $6, b;
            shr.u32 u, $8, 3;
            and.b32 u, u, 0x0E000E00;
            lop3.b32 t, $8, u, 0x80008000, 0xEC;
            mul.rn.f16x2 t, t, f;
            mov.b32 {a, b}, t;
            cvt.f32.f16 $3, a;
            cvt.f32.f16 $7, b;
            }""",
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r", [words],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True, pack=1,
        )  # fmt: skip
        values = a.of_eighths(v0, v1, v2, v3, v4, v5, v6, v7, G, 32)
    else:
        nibble = words[:, :, None] << (28 - 4 * tl.arange(0, 8))[None, None, :]
        values = a.e2m1_signed(tl.reshape(nibble, (G, 32)))
    return values
