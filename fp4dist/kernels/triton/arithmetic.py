# pyright: basic, reportArgumentType=false, reportGeneralTypeIssues=false
# Triton's own language: its functions' parameters have no types.
"""What every Triton kernel shares: encodings in integer arithmetic, Philox, butterflies, sums in the reference's order.

Kernels are launched with `enable_fp_fusion=False` and divide by `div_rn`, so each operation rounds once, as in
`fp4dist.numerics`, whose docstrings say what the functions of the same names compute.
"""

from __future__ import annotations

import triton
import triton.language as tl

FLT_MAX = tl.constexpr(3.4028234663852886e38)
FLT_MIN = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def bits(x):
    """fp32 -> int32."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def floats(i):
    """int32 -> fp32."""
    return i.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def below(x, limit):
    """min(x, limit), NaN stays."""
    return tl.where(x > limit, limit, x)


@triton.jit
def magnitude_bits(x):
    """int32 whose order is that of |x|, NaN above all."""
    return bits(x) & 0x7FFFFFFF


@triton.jit
def encode_e4m3(x):
    """Non-negative fp32 -> int32 E4M3 codes, nearest even, saturating at 448, NaN -> 0x7F."""
    b = bits(tl.where(x > 448.0, 448.0, x))
    normal = ((b + 0x7FFFF + ((b >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = bits(tl.where(x > 0.015625, 0.015625, x) * 512.0 + 8388608.0) & 0xFF
    return tl.where(x != x, 0x7F, tl.where(x < 0.015625, subnormal, normal))


@triton.jit
def encode_e4m3_stochastic(x, word):
    """Non-negative fp32 and uint32 noise -> int32 E4M3 codes, up with the distance's probability."""
    clamped = tl.where(x > 448.0, 448.0, x)
    b = bits(clamped)
    steps = tl.where(clamped > 0.015625, 0.015625, clamped) * 512.0
    floor = tl.floor(steps)
    normal = x >= 0.015625
    code = tl.where(normal, (b >> 20) - (120 << 3), floor.to(tl.int32))
    distance = tl.where(normal, (b & 0xFFFFF).to(tl.float32) * 9.5367431640625e-07, steps - floor)
    threshold = ((word >> 9).to(tl.float32) * 2.0 + 1.0) * 5.9604644775390625e-08
    return tl.where(x != x, 0x7F, code + (distance > threshold).to(tl.int32))


@triton.jit
def decode_e4m3(code):
    """int32 E4M3 codes below 128 -> fp32."""
    normal = floats(((code >> 3) + 120) << 23 | (code & 7) << 20)
    value = tl.where(code < 8, code.to(tl.float32) * 0.001953125, normal)
    return tl.where(code == 0x7F, float("nan"), value)


@triton.jit
def decode_e8m0(byte):
    """int32 E8M0 bytes -> fp32."""
    value = floats(tl.where(byte == 0, 0x00400000, byte << 23))
    return tl.where(byte == 255, float("nan"), value)


@triton.jit
def e2m1_nearest(a):
    """|u| -> int32 level index, ties to even, saturating; NaN -> 7."""
    step = tl.where(a < 2.0, 2.0, tl.where(a < 4.0, 1.0, 0.5))
    first = tl.where(a < 2.0, 0.0, tl.where(a < 4.0, 2.0, 4.0))
    rounded = (tl.where(a > 6.0, 6.0, a) * step + 12582912.0) - 12582912.0 + first
    return tl.where(a != a, 7, rounded.to(tl.int32))


@triton.jit
def e2m1_stochastic(a, noise):
    """|u| <= 6 and int32 noise in [0, 2^16) -> int32 level index."""
    step = tl.where(a < 2.0, 2.0, tl.where(a < 4.0, 1.0, 0.5))
    first = tl.where(a < 2.0, 0, tl.where(a < 4.0, 2, 4))
    position = a * step
    floor = tl.floor(position)
    threshold = noise.to(tl.float32) * 1.52587890625e-05 + 7.62939453125e-06
    up = (position - floor) > threshold
    return tl.where(a != a, 7, floor.to(tl.int32) + first + up.to(tl.int32))


@triton.jit
def e2m1_value(index):
    """Level index -> magnitude."""
    i = index.to(tl.float32)
    return tl.where(i < 4.0, i * 0.5, tl.where(i < 6.0, i - 2.0, i * 2.0 - 8.0))


@triton.jit
def with_sign(level, negative):
    """Level >= 0 with the sign bit where `negative`, -0 included, which `-level` (0 - level) would lose."""
    return floats(bits(level) | tl.where(negative, -2147483648, 0))


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Four uint32 words of Philox-4x32-10; counters and keys uint32."""
    for _ in tl.static_range(10):
        h0, l0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        h1, l1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def butterfly(y, R: tl.constexpr, N: tl.constexpr, h: tl.constexpr):
    """One stage of stride h along the columns of [R, N]."""
    a, b = tl.split(tl.permute(tl.reshape(y, (R, N // (2 * h), 2, h)), (0, 1, 3, 2)))
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (R, N))


@triton.jit
def butterflies(y, R: tl.constexpr, N: tl.constexpr, SIZE: tl.constexpr):
    """Unnormalized Hadamard of groups of SIZE (16 to 128) columns, strides 1, 2, 4 ..."""
    y = butterfly(y, R, N, 1)
    y = butterfly(y, R, N, 2)
    y = butterfly(y, R, N, 4)
    y = butterfly(y, R, N, 8)
    if SIZE > 16:
        y = butterfly(y, R, N, 16)
    if SIZE > 32:
        y = butterfly(y, R, N, 32)
    if SIZE > 64:
        y = butterfly(y, R, N, 64)
    return y


@triton.jit
def pair_sum(z, G: tl.constexpr, n: tl.constexpr):
    """[G, n] -> [G, n/2]: adjacent pairs added."""
    a, b = tl.split(tl.reshape(z, (G, n // 2, 2)))
    return a + b


@triton.jit
def row_tree_sum(z, G: tl.constexpr, n: tl.constexpr):
    """[G, n] -> [G]: sums in a tree of adjacent pairs; n = 16 or 32."""
    if n == 32:
        z = pair_sum(z, G, 32)
    z = pair_sum(z, G, 16)
    z = pair_sum(z, G, 8)
    z = pair_sum(z, G, 4)
    return tl.reshape(pair_sum(z, G, 2), (G,))


@triton.jit
def block_tree_sum(z, R: tl.constexpr, N: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """[R, N] -> [R/BR, N/BC] block sums, columns before rows."""
    sums = tl.reshape(row_tree_sum(tl.reshape(z, (R * N // BC, BC)), R * N // BC, BC), (R, N // BC))
    if BR > 1:
        turned = tl.reshape(tl.permute(tl.reshape(sums, (R // BR, BR, N // BC)), (0, 2, 1)), (R // BR * (N // BC), BR))
        sums = tl.reshape(row_tree_sum(turned, R // BR * (N // BC), BR), (R // BR, N // BC))
    return sums


@triton.jit
def block_max_bits(z, R: tl.constexpr, N: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """[R, N] -> [R/BR, N/BC] largest magnitude bits of each block."""
    return tl.max(tl.max(tl.reshape(magnitude_bits(z), (R // BR, BR, N // BC, BC)), axis=3), axis=1)


@triton.jit
def spread(values, R: tl.constexpr, N: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """[R/BR, N/BC] -> [R, N]: each block's value at its elements."""
    wide = tl.broadcast_to(values[:, None, :, None], (R // BR, BR, N // BC, BC))
    return tl.reshape(wide, (R, N))
