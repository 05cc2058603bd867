# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# Triton's own language: its kernels' parameters have no types, branches on constants look like run-time ones.
"""Device code of `wire_programs`: elements in and out of registers, rotations, tags and noise of one record."""

from __future__ import annotations

import triton
import triton.language as tl

from fp4dist.kernels.triton import arithmetic as a

# Where the places along two dimensions are no more contiguous in one than in the other, up to 3.6 Triton gives lanes to
# the first of them, later to the last.
_FIRST = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 6))


@triton.jit
def _indices(C: tl.constexpr, E: tl.constexpr, P: tl.constexpr):
    """[G, E/P, P] or [E/P, G, P] places in a record: lanes lie along G, a thread has all vectors of its runs of E."""
    if _FIRST:
        run, part = tl.arange(0, C // E)[:, None, None], tl.arange(0, E // P)[None, :, None]
    else:
        run, part = tl.arange(0, C // E)[None, :, None], tl.arange(0, E // P)[:, None, None]
    return run * E + part * P + tl.arange(0, P)[None, None, :]


@triton.jit
def _swapped(z):
    """From the order of `_indices` to [G, E/P, P], and back."""
    if not _FIRST:
        z = tl.permute(z, (1, 0, 2))
    return z


@triton.jit
def read(x, offset, count, C: tl.constexpr, E: tl.constexpr, P: tl.constexpr):
    """[G, E] fp32 of `count` elements of x from `offset`; 0 beyond."""
    i = _indices(C, E, P)
    y = tl.reshape(_swapped(tl.load(x + offset + i, mask=i < count, other=0.0)), (C // E, E))
    if y.dtype == tl.bfloat16:  # by bits: the interpreter's cast loses subnormal numbers
        y = a.floats(y.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return y


@triton.jit
def write(out, offset, count, y, C: tl.constexpr, E: tl.constexpr, P: tl.constexpr, NATIVE: tl.constexpr):
    """`count` elements of y [G, E] to out from `offset`, rounded to nearest even where out is bf16.

    NATIVE   round by the GPU's conversion; Triton's interpreter truncates
    """
    i = _indices(C, E, P)
    z = _swapped(tl.reshape(y, (C // E, E // P, P)))
    if out.dtype.element_ty == tl.bfloat16:
        if NATIVE:
            z = z.to(tl.bfloat16)
        else:
            b = a.bits(z)
            rounded = (b + 0x7FFF + ((b >> 16) & 1)) >> 16
            z = tl.where(z != z, 0x7FC0, rounded).to(tl.int16).to(tl.bfloat16, bitcast=True)
    tl.store(out + offset + i, z, mask=i < count)


@triton.jit
def flipped(y, k0, k1, rank, step, signs, C: tl.constexpr, RUN: tl.constexpr, ROT: tl.constexpr):
    """[C/RUN, RUN] with the signs of its groups of ROT."""
    N: tl.constexpr = RUN if RUN < 32 else 32  # pyright: ignore[reportAssignmentType]
    w0, w1, w2, w3 = a.philox_of((step * 0).to(tl.uint32), k0, k1, rank, step, signs)
    i = tl.arange(0, C // N) * N % ROT
    word = tl.where(i < 32, w0, tl.where(i < 64, w1, tl.where(i < 96, w2, w3))).to(tl.int32, bitcast=True) >> (i & 31)
    j = tl.arange(0, N)
    z = a.bits(tl.reshape(y, (C // N, N))) ^ ((word[:, None] << (31 - j)[None, :]) & -2147483648)
    return tl.reshape(a.floats(z), (C // RUN, RUN))


@triton.jit
def rotated(y, C: tl.constexpr, RUN: tl.constexpr, ROT: tl.constexpr):
    """Unnormalized Hadamard of groups of ROT (32 or 128) of [C/RUN, RUN]; strides 1, 2, 4 ...

    Strides below RUN stay inside a thread; beyond, threads exchange values.
    """
    y = a.butterfly(y, C // RUN, RUN, 1)
    y = a.butterfly(y, C // RUN, RUN, 2)
    y = a.butterfly(y, C // RUN, RUN, 4)
    y = a.butterfly(y, C // RUN, RUN, 8)
    if RUN > 16:
        y = a.butterfly(y, C // RUN, RUN, 16)
    else:
        y = a.exchange(y, C // RUN, RUN, 1)
    if ROT > 32:
        if RUN > 32:
            y = a.butterfly(y, C // RUN, RUN, 32)
        else:
            y = a.exchange(y, C // RUN, RUN, 32 // RUN)
        if RUN > 64:
            y = a.butterfly(y, C // RUN, RUN, 64)
        else:
            y = a.exchange(y, C // RUN, RUN, 64 // RUN)
    return y


@triton.jit
def _mix(value, index):
    """One unit's part of a tag; uint32."""
    v = value.to(tl.uint32, bitcast=True) ^ (index.to(tl.uint32) * 0x9E3779B9)
    v = v * 0x85EBCA6B
    return ((v ^ (v >> 15)) * 0xC2B2AE35).to(tl.int32, bitcast=True)


@triton.jit
def _sum_of(mixed, NATIVE: tl.constexpr):
    """Sum of int32 modulo 2^32 along the last dimension.

    NATIVE   by the GPU's own addition; the interpreter refuses a sum of int32 that does not fit
    """
    if NATIVE:
        return tl.sum(mixed, axis=len(mixed.shape) - 1)
    return tl.sum(mixed.to(tl.int64), axis=len(mixed.shape) - 1).to(tl.int32)


@triton.jit
def tag(words, stored, w0, w1, w2, M: tl.constexpr, BLOCKS: tl.constexpr, NATIVE: tl.constexpr):
    """int32 tag of a record's payload [G, M], of its scale bytes [G] where there are BLOCKS, and of the header."""
    G: tl.constexpr = words.shape[0]
    mixed = _sum_of(_mix(words, tl.arange(0, G)[:, None] * M + tl.arange(0, M)[None, :]), NATIVE)
    if BLOCKS:
        mixed += _mix(stored, tl.arange(0, G) + G * M)
    found = _sum_of(mixed, NATIVE)
    return found + _mix(w0, w0 * 0 + 16777216) + _mix(w1, w1 * 0 + 16777217) + _mix(w2, w2 * 0 + 16777218)


@triton.jit
def tag_of(record, w0, w1, w2, G: tl.constexpr, M: tl.constexpr, BLOCKS: tl.constexpr, NATIVE: tl.constexpr):
    """The tag of a record in memory."""
    words = tl.load(record + 4 + tl.arange(0, G)[:, None] * M + tl.arange(0, M)[None, :])
    stored = tl.arange(0, G)
    if BLOCKS:
        stored = tl.load((record + 4 + G * M).to(tl.pointer_type(tl.uint8)) + stored).to(tl.int32)
    return tag(words, stored, w0, w1, w2, M, BLOCKS, NATIVE)


@triton.jit
def element_thresholds(y, number, k0, k1, rank, step, rounding, C: tl.constexpr, E: tl.constexpr):
    """[G, E] thresholds of `arithmetic.stochastic`; one counter for eight elements.

    A condition that is never true ties the counters to y, so that each thread draws what its own elements need.
    """
    index = tl.arange(0, C // E)[:, None] * (E // 8) + tl.arange(0, E // 8)[None, :]
    index = (index + number * (C // 8)).to(tl.uint32)
    index = tl.where((a.every_eighth(y, C // E, E) | 1) == 0, 0, index)
    w0, w1, w2, w3 = a.philox_of(index, k0, k1, rank, step, rounding)
    return a.thresholds(w0, w1, w2, w3, C // E, E)


@triton.jit
def scale_words(number, k0, k1, rank, step, rounding, G: tl.constexpr):
    """[G] uint32, one word a block; one counter for four blocks."""
    index = (tl.arange(0, G // 4) + number * (G // 4)).to(tl.uint32)
    w0, w1, w2, w3 = a.philox_of(index, k0, k1, rank, step, rounding)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (G,))


@triton.jit
def e4m3_code(u, threshold, ROUND: tl.constexpr):
    """|u| <= 448 -> int32 E4M3 code; threshold in (0, 1), where ROUND is 1."""
    if ROUND == 0:
        code = a.encode_e4m3(u)
    else:
        b = a.bits(u)
        steps = tl.where(u > 0.015625, 0.015625, u) * 512.0
        floor = tl.floor(steps)
        normal = u >= 0.015625
        code = tl.where(normal, (b >> 20) - (120 << 3), floor.to(tl.int32))
        distance = tl.where(normal, (b & 0xFFFFF).to(tl.float32) * 9.5367431640625e-07, steps - floor)
        code = code + (distance > threshold).to(tl.int32)
    return code
