# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# Triton's own language: its functions' parameters have no types.
"""Device code: E2M1 under power-of-two block scales as FP8 values without codes, for the usual matrix.

Everything is done in the units of the FP8 type: a value is multiplied with the matrix' shift once, rounded to the grid
under its block's scale there, and converted. All of this is exact, and so the same as by codes, where no block is
flushed, saturated, not finite or near the end of fp32: see `UNUSUAL`. A tile with any other block says so, and its
matrix is written again by codes.

ASM   NVIDIA's instructions, which Triton has no words for; without it the same bits in integer arithmetic
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp4dist.kernels.triton import arithmetic as a
from fp4dist.kernels.triton import power_bits as bits

# 256 less the scale byte of a block: above, its smallest elements may be subnormal in fp32, or it is not finite
UNUSUAL = tl.constexpr(226)


@triton.jit
def byte_of(found, RULE: tl.constexpr):
    """`arithmetic.power_byte` of a block's amax for rules 1 to 3, no scale finer, 6 the largest level."""
    b = a.bits(found)
    own = b >> 23  # it is no negative number
    if RULE == 1:
        byte = own - 2
    elif RULE == 2:
        byte = (b + 0x3FFFFF >> 23) - 2  # one more where its mantissa is above that of 6
    else:
        byte = tl.minimum(b + 0x7FFFFF >> 23, 254)
    return tl.where(own == 255, 255, tl.maximum(byte, 0))


@triton.jit
def spans(found, stored):
    """([G] scale bytes, 0 for blocks that are not finite; [G] 256 less them, 0 for zeros, and more for such)."""
    b = a.bits(found)
    finite = b < 0x7F800000
    return tl.where(finite, stored, 0), tl.where(b == 0, 0, tl.where(finite, 256 - stored, 512))


@triton.jit
def shift_of(largest, HIGHEST: tl.constexpr):
    """2^shift that gives the scale byte `largest` the exponent HIGHEST. Where it is cut off, all blocks are unusual."""
    return a.decode_e8m0(tl.minimum(HIGHEST + 254 - largest, 240))


@triton.jit
def unit_of(stored, largest, LOWEST: tl.constexpr, HIGHEST: tl.constexpr):
    """[G] fp32 2^exponent of the scale bytes; at least 2^LOWEST, for blocks of zeros."""
    return a.floats((tl.maximum(stored - largest + HIGHEST, LOWEST) + 127) << 23)


@triton.jit
def nearest(z, unit, y, ASM: tl.constexpr):
    """The level of the E2M1 grid of `unit` nearest to z, ties to even, with the sign of y. |z| < 7 units, z = -0 or +0
    only where y is.

    p is the larger of z's and the unit's power of two; adding 3 * 2^21 p rounds to its half, the grid's step.
    """
    top = a.floats(a.bits(tl.maximum(tl.abs(z), unit)) & 0x7F800000)
    rounded = tl.fma(top, 6291456.0, z)
    if ASM:  # -0 for 0, to which adding next to nothing of z gives z's sign, by no integer instruction
        level = tl.inline_asm_elementwise(
            "{ .reg .f32 t; fma.rm.f32 t, $1, 0fCAC00000, $2; fma.rn.f32 $0, $3, 0f2B800000, t; }",
            "=r,r,r,r", [top, rounded, z], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        level = a.with_sign(tl.abs(tl.fma(top, -6291456.0, rounded)), a.bits(y) < 0)
    return level


@triton.jit
def drawn(y, shift, unit, counters, key, G: tl.constexpr, E: tl.constexpr, FP8: tl.constexpr, ASM: tl.constexpr):
    """[G, E/4] words of four FP8 bytes of [G, E] y, rounded by noise of [G, E/8] counters: eight columns after the
    other, because a thread has no room for more noise.
    """
    if E > 8:
        y0, y1 = a.halves(y, G, E)
        c0, c1 = a.halves(counters, G, E // 8)
        first = drawn(y0, shift, unit, c0, key, G, E // 2, FP8, ASM)
        second = drawn(y1, shift, unit, c1, key, G, E // 2, FP8, ASM)
        words = tl.reshape(tl.permute(tl.join(first, second), (0, 2, 1)), (G, E // 4))
    else:
        k0, k1, c1, c2, c3 = key
        w0, w1, w2, w3 = a.philox_of(counters, k0, k1, c1, c2, c3)
        words = bytes_of(_stochastic(y, shift, unit, w0, w1, w2, w3, G, E, ASM), G, E, FP8, ASM)
    return words


@triton.jit
def _stochastic(y, shift, unit, w0, w1, w2, w3, G: tl.constexpr, E: tl.constexpr, ASM: tl.constexpr):
    """`arithmetic.stochastic` of y * shift on the grid of `unit`, with its sign, from [G, E/8] noise words.

    Where the product is below the unit, that is added; the sum is rounded up: then it is above a threshold exactly
    where the product is. |y * shift| <= 6 units.
    """
    if ASM:
        even, odd = tl.split(tl.reshape(y, (G, E // 2, 2)))
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (G, E // 2))
        # dp2a: less 64 times the noise, which is either half of a word
        even, odd = tl.inline_asm_elementwise(
            """{ .reg .f32 u, o, m, n; .reg .b32 t;
            neg.f32 n, $4;
            abs.f32 u, $2; mul.rn.f32 u, u, $3;
            set.lt.f32.f32 o, u, $4;
            fma.rp.f32 m, o, $4, u; mov.b32 t, m;
            dp2a.lo.u32.s32 t, $6, 0xC0, t; add.s32 t, t, 4194271; and.b32 t, t, 0xFFC00000; mov.b32 m, t;
            fma.rn.f32 m, o, n, m; mov.b32 t, m;
            lop3.b32 t, t, $2, 0x80000000, 0xF8; mov.b32 $0, t;
            abs.f32 u, $5; mul.rn.f32 u, u, $3;
            set.lt.f32.f32 o, u, $4;
            fma.rp.f32 m, o, $4, u; mov.b32 t, m;
            dp2a.lo.u32.s32 t, $6, 0xC000, t; add.s32 t, t, 4194271; and.b32 t, t, 0xFFC00000; mov.b32 m, t;
            fma.rn.f32 m, o, n, m; mov.b32 t, m;
            lop3.b32 t, t, $5, 0x80000000, 0xF8; mov.b32 $1, t; }""",
            "=&r,=&r,r,r,r,r,r", [even, shift, tl.broadcast_to(unit, (G, E // 2)), odd, words],
            dtype=(tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
        level = tl.reshape(tl.join(even, odd), (G, E))
    else:
        u = tl.abs(y * shift)
        one = tl.where(u < unit, 1.0, 0.0)
        moved = u + one * unit
        low = (one > 0.0) & (moved - unit < u)  # rounded down: the difference is exact
        total = a.bits(moved) + low.to(tl.int32) + bits.noise(w0, w1, w2, w3, G, E)
        level = a.with_sign(tl.fma(one, -unit, a.floats(total & -4194304)), a.bits(y) < 0)
    return level


@triton.jit
def bytes_of(level, G: tl.constexpr, E: tl.constexpr, FP8: tl.constexpr, ASM: tl.constexpr):
    """[G, E] fp32 that an FP8 type holds -> [G, E/4] words of four."""
    v0, v1, v2, v3 = a.fourths(level, G, E)
    if ASM and FP8 == 5:
        words = tl.inline_asm_elementwise(
            """{ .reg .b16 a, b;
            cvt.rn.satfinite.e5m2x2.f32 a, $2, $1; cvt.rn.satfinite.e5m2x2.f32 b, $4, $3; mov.b32 $0, {a, b}; }""",
            "=r,r,r,r,r", [v0, v1, v2, v3], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    elif ASM:
        words = tl.inline_asm_elementwise(
            """{ .reg .b16 a, b;
            cvt.rn.satfinite.e4m3x2.f32 a, $2, $1; cvt.rn.satfinite.e4m3x2.f32 b, $4, $3; mov.b32 $0, {a, b}; }""",
            "=r,r,r,r,r", [v0, v1, v2, v3], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        words = _byte(v0, FP8) | (_byte(v1, FP8) << 8) | (_byte(v2, FP8) << 16) | (_byte(v3, FP8) << 24)
    return words


@triton.jit
def _byte(value, FP8: tl.constexpr):
    """int32 byte of a value that the FP8 type holds."""
    MANTISSA: tl.constexpr = 2 if FP8 == 5 else 3
    BIAS: tl.constexpr = 15 if FP8 == 5 else 7
    b = a.magnitude_bits(value)
    smallest = 2.0 ** (1 - BIAS)
    tiny = (tl.abs(value) * (2.0 ** (BIAS - 1 + MANTISSA))).to(tl.int32)  # steps of the subnormal numbers
    code = tl.where(tl.abs(value) < smallest, tiny, (b >> (23 - MANTISSA)) - ((127 - BIAS) << MANTISSA))
    return (code & 0x7F) | ((a.bits(value) >> 24) & 0x80)
