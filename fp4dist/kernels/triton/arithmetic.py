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
    value = floats(code << 20) * 1.329227995784916e36  # exponent and mantissa where fp32 has them, 2^120 too small
    return tl.where(code == 0x7F, float("nan"), value)


@triton.jit
def decode_e8m0(byte):
    """int32 E8M0 bytes -> fp32."""
    value = floats(tl.where(byte == 0, 0x00400000, byte << 23))
    return tl.where(byte == 255, float("nan"), value)


@triton.jit
def power_byte(found, RULE: tl.constexpr, finer, exponent, mantissa):
    """int32 E8M0 byte for a block's amax (or step). RULE 1 floor, 2 ceil, 3 ceil of amax, 4 quest below,
    5 quest nearest.

    exponent, mantissa   those of the grid's largest level
    """
    b = bits(found)
    own, rest = (b >> 23) & 0xFF, b & 0x7FFFFF
    if RULE == 1:
        byte = own - exponent
    elif RULE == 2:
        byte = own - exponent + (rest > mantissa).to(tl.int32)
    elif RULE == 3:
        byte = own + (rest > 0).to(tl.int32)
    elif RULE == 4:
        byte = own
    else:
        byte = own + (rest > 0x3504F3).to(tl.int32)
    byte = tl.where(own == 255, 255, tl.minimum(tl.maximum(byte, 0), 254))
    if RULE == 3:
        share = found * tl.div_rn(1.0, decode_e8m0(byte))
        byte = byte - ((share < finer) & (byte > 0)).to(tl.int32)
    return byte


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
def block_max_bits(z, R: tl.constexpr, N: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """[R, N] -> [R/BR, N/BC] largest magnitude bits of each block."""
    return tl.max(tl.max(tl.reshape(magnitude_bits(z), (R // BR, BR, N // BC, BC)), axis=3), axis=1)


@triton.jit
def spread(values, R: tl.constexpr, N: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """[R/BR, N/BC] -> [R, N]: each block's value at its elements."""
    wide = tl.broadcast_to(values[:, None, :, None], (R // BR, BR, N // BC, BC))
    return tl.reshape(wide, (R, N))


@triton.jit
def e2m1_signed(nibble):
    """int32 whose top four bits are an E2M1 code -> fp32 value, -0 included."""
    level = (nibble >> 6) & 0x01C00000  # exponent and mantissa where fp32 has them, 2^126 too small
    return floats(level | (nibble & -2147483648)) * 8.507059173023462e37


@triton.jit
def nearest(u):
    """U in [0, 7) -> (level of E2M1, int32 with its index in bits 28 to 30), ties to even.

    Adding p (2^22 + 3), p = 2^floor(log2 max(u, 1)), rounds to the step p/2 of u's binade; what is then the number of
    steps in the low bits and the exponent above sum up to the index. A NaN gives a NaN and no particular index.
    """
    p = floats(tl.maximum(bits(u), 0x3F800000) & 0x7F800000)
    rounded = tl.fma(p, 4194307.0, u)
    return tl.fma(p, -4194307.0, rounded), bits(rounded) * 0x10000040


@triton.jit
def stochastic(u, threshold):
    """U in [0, 6] and (noise << 6 | 32) -> as `nearest`: up if u is above the lower level by more than (noise + 1/2) /
    2^16 of a step.

    Below 1 the step is that of [1, 2), so 1 is added there: then a step is always the upper half of a mantissa, and
    the level below with the threshold under it is the exact value that u is compared with.
    """
    one = tl.where(u < 1.0, 1.0, 0.0)
    b = bits(u + one)
    below = b & -4194304
    step = tl.where(u > floats(below | threshold) - one, 4194304, 0)
    return floats(below + step) - one, (b + bits(one) + step + 16777216) << 6


@triton.jit
def noise_halves(w0, w1, w2, w3, G: tl.constexpr, E: tl.constexpr):
    """[G, E/8] noise words -> [G, E] int32 with 16 bits of noise from bit 6 on, and others around them."""
    j0 = tl.join(w0 << 6, w0 >> 10)
    j1 = tl.join(w1 << 6, w1 >> 10)
    j2 = tl.join(w2 << 6, w2 >> 10)
    j3 = tl.join(w3 << 6, w3 >> 10)
    halves = tl.permute(tl.join(tl.join(j0, j2), tl.join(j1, j3)), (0, 1, 3, 4, 2))  # word, then half
    return tl.reshape(halves, (G, E)).to(tl.int32)


@triton.jit
def thresholds(w0, w1, w2, w3, G: tl.constexpr, E: tl.constexpr):
    """[G, E/8] noise words -> [G, E] thresholds of `stochastic`."""
    return (noise_halves(w0, w1, w2, w3, G, E) & 0x3FFFC0) | 32


@triton.jit
def halves(z, G: tl.constexpr, n: tl.constexpr):
    """[G, n] -> its first and its last n/2 columns."""
    return tl.split(tl.permute(tl.reshape(z, (G, 2, n // 2)), (0, 2, 1)))


@triton.jit
def largest(y, G: tl.constexpr, E: tl.constexpr):
    """[G, E] -> [G] max |y|, NaN where one is; E = 16 or 32."""
    z = tl.abs(y)
    if E == 32:
        a, b = halves(z, G, 32)
        z = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    a, b = halves(z, G, 16)
    z = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    a, b = halves(z, G, 8)
    z = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    a, b = halves(z, G, 4)
    z = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    a, b = halves(z, G, 2)
    return tl.reshape(tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL), (G,))


@triton.jit
def at_most(x, limit):
    """min(x, limit) in one instruction, NaN stays."""
    return tl.minimum(x, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def pack(top, y, G: tl.constexpr, E: tl.constexpr, CLEAR: tl.constexpr = False):
    """[G, E] int32 with level indices in bits 28 to 30, and the values whose signs they take -> [G, E/8] words of 8
    codes, the first one lowest. CLEAR: bit 31 is 0 already.
    """
    return _words((top if CLEAR else top & 0x7FFFFFFF) | (bits(y) & -2147483648), G, E)


@triton.jit
def packed(level, G: tl.constexpr, E: tl.constexpr):
    """[G, E] signed levels of E2M1 -> words as those of `pack`; of a NaN anything."""
    # as subnormal numbers of fp32, 2^126 smaller, they have their index in bits 22 to 24, and only the sign beside it
    return _words(bits(level * 1.1754943508222875e-38) * 65, G, E)


@triton.jit
def fourths(x, G: tl.constexpr, E: tl.constexpr):
    """[G, E] -> the first, second, third and fourth elements of every four, each [G, E/4]."""
    even, odd = tl.split(tl.reshape(x, (G, E // 4, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def words_of_bytes(byte, G: tl.constexpr, E: tl.constexpr):
    """[G, E] int32 below 256 -> [G, E/4] words of four, the first one lowest."""
    b0, b1, b2, b3 = fourths(byte, G, E)
    return b0 | (b1 << 8) | (b2 << 16) | (b3 << 24)


@triton.jit
def eighths(x, G: tl.constexpr, E: tl.constexpr):
    """[G, E] -> the first, second ... eighth elements of every eight, each [G, E/8]."""
    even, odd = tl.split(tl.reshape(x, (G, E // 8, 2, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    x0, x4 = tl.split(x0)
    x1, x5 = tl.split(x1)
    x2, x6 = tl.split(x2)
    x3, x7 = tl.split(x3)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def of_eighths(x0, x1, x2, x3, x4, x5, x6, x7, G: tl.constexpr, E: tl.constexpr):
    """The reverse of `eighths`."""
    low = tl.join(tl.join(x0, x4), tl.join(x2, x6))  # [G, E/8, 4s bit, 2s bit]
    high = tl.join(tl.join(x1, x5), tl.join(x3, x7))
    return tl.reshape(tl.join(low, high), (G, E))


@triton.jit
def _words(code, G: tl.constexpr, E: tl.constexpr):
    """[G, E] int32 codes in the top four bits -> [G, E/8] words of 8, the first one lowest."""
    c0, c1, c2, c3, c4, c5, c6, c7 = eighths(code.to(tl.uint32, bitcast=True), G, E)
    word = c7 >> 28
    word = (word << 4) | (c6 >> 28)
    word = (word << 4) | (c5 >> 28)
    word = (word << 4) | (c4 >> 28)
    word = (word << 4) | (c3 >> 28)
    word = (word << 4) | (c2 >> 28)
    word = (word << 4) | (c1 >> 28)
    return ((word << 4) | (c0 >> 28)).to(tl.int32, bitcast=True)


@triton.jit
def bf16_pairs(value, G: tl.constexpr, E: tl.constexpr):
    """[G, E] fp32 that bf16 holds exactly -> [G, E/2] words of two bf16."""
    low, high = tl.split(tl.reshape(bits(value), (G, E // 2, 2)))
    return ((low >> 16) & 0xFFFF) | (high & -65536)


@triton.jit
def rotate(y, G: tl.constexpr, E: tl.constexpr, SIZE: tl.constexpr):
    """Unnormalized Hadamard of groups of SIZE (16 to 128) columns of [G, E], rows side by side; strides 1, 2, 4 ...

    Strides below E stay inside a thread; beyond, threads exchange values.
    """
    y = butterfly(y, G, E, 1)
    y = butterfly(y, G, E, 2)
    y = butterfly(y, G, E, 4)
    y = butterfly(y, G, E, 8)
    if (SIZE > 16) & (E > 16):
        y = butterfly(y, G, E, 16)
    if (SIZE > 16) & (E == 16):
        y = exchange(y, G, E, 1)
    if SIZE > 32:
        y = exchange(y, G, E, 32 // E)
    if SIZE > 64:
        y = exchange(y, G, E, 64 // E)
    return y


@triton.jit
def exchange(y, G: tl.constexpr, E: tl.constexpr, k: tl.constexpr):
    """One stage of stride k * E: chunk i and chunk i + k become their sum and their difference.

    A thread has one of the two: the integer sum of the two bit patterns, less its own, is the other (one shuffle).
    """
    z = tl.reshape(y, (G // (2 * k), 2, k * E))
    b = bits(z)
    other = floats(tl.sum(b, axis=1)[:, None, :] - b)
    sign = tl.where(tl.arange(0, 2) == 0, 1.0, -1.0)[None, :, None]
    return tl.reshape(tl.fma(z, sign, other), (G, E))


@triton.jit
def rows_rotated(y, R: tl.constexpr, N: tl.constexpr, SIZE: tl.constexpr):
    """Unnormalized Hadamard of groups of SIZE (16 or 32) rows of [R, N], in any shape of as many elements."""
    y = exchange(y, R, N, 1)
    y = exchange(y, R, N, 2)
    y = exchange(y, R, N, 4)
    y = exchange(y, R, N, 8)
    if SIZE == 32:
        y = exchange(y, R, N, 16)
    return y


@triton.jit
def over_rows(values, R: tl.constexpr, M: tl.constexpr, BR: tl.constexpr):
    """[R/BR, M] -> [R * M]: each block's value at its BR rows."""
    return tl.reshape(tl.broadcast_to(values[:, None, :], (R // BR, BR, M)), (R * M,))


@triton.jit
def philox_of(index, k0, k1, c1, c2, c3):
    """Four uint32 words for uint32 counters; key and the counter's other words are the int32s of the same bits."""
    c0, c1, c2, c3 = index, c1.to(tl.uint32), c2.to(tl.uint32), c3.to(tl.uint32)
    k0, k1 = k0.to(tl.uint32), k1.to(tl.uint32)
    for _ in tl.static_range(10):
        p0, p1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, p1.to(tl.uint32)
        c2, c3 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, p0.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def unpack(words, G: tl.constexpr, M: tl.constexpr):
    """[G, M, 1] words of eight codes -> [G, 8 M] fp32 signed levels."""
    return e2m1_signed(tl.reshape(words << (28 - 4 * tl.arange(0, 8))[None, None, :], (G, M * 8)))


@triton.jit
def every_eighth(y, G: tl.constexpr, E: tl.constexpr):
    """[G, E] -> [G, E/8] int32 bits of each eighth element."""
    first, _ = tl.split(tl.reshape(bits(y), (G, E // 8, 2, 2, 2)))
    first, _ = tl.split(first)
    first, _ = tl.split(first)
    return first
