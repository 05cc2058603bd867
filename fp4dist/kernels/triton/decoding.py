# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false
# pyright: reportGeneralTypeIssues=false
# Triton's own language: its kernels' parameters have no types, branches on constants look like run-time ones.
"""Device code: codes -> the values that a GEMM multiplies, in bf16 or FP8, straight or transposed."""

from __future__ import annotations

import triton
import triton.language as tl

from fp4dist.kernels.triton import arithmetic as a
from fp4dist.kernels.triton import lanes


@triton.jit
def largest_byte_kernel(scales, top, number, B: tl.constexpr):
    """The largest E8M0 byte below 255 (NaN), into `top`, which starts at 0."""
    i = tl.program_id(0) * B + tl.arange(0, B)
    byte = tl.load(scales + i, mask=i < number, other=0).to(tl.int32)
    tl.atomic_max(top, tl.max(tl.where(byte == 255, 0, byte), axis=0), sem="relaxed")


@triton.jit
def _straight(codes, scales, row, col, rows, cols, R: tl.constexpr, N: tl.constexpr, BR: tl.constexpr,
              BC: tl.constexpr):  # fmt: skip
    """[R, N/8, 1] words of eight codes, and the bytes of their scales: a thread has whole words."""
    # the third dimension, of the codes, is there from the start: layouts do not pass through an added one
    i = tl.arange(0, R * N // 8)[:, None]
    r, w = i // (N // 8), tl.max_contiguous(i % (N // 8), (1, 1))
    inside = (row + r < rows) & (col + w * 8 < cols)
    start = codes + (row.to(tl.int64) * (cols // 8) + col // 8)
    words = tl.reshape(tl.load(start + (r * (cols // 8) + w), mask=inside, other=0), (R, N // 8, 1))
    start = scales + (row // BR).to(tl.int64) * (cols // BC)
    stored = tl.load(start + (((row % BR) + r) // BR * (cols // BC) + (col + w * 8) // BC), mask=inside, other=0)
    return words, tl.reshape(stored, (R, N // 8, 1)).to(tl.int32)


@triton.jit
def _nibbles(words, stored, R: tl.constexpr, N: tl.constexpr):
    """What `_straight` gives -> [R, N] codes in the top bits of an int32, and scale bytes."""
    nibble = words << (28 - 4 * tl.arange(0, 8))[None, None, :]
    byte = tl.broadcast_to(stored, (R, N // 8, 8))
    return tl.reshape(nibble, (R, N)), tl.reshape(byte, (R, N))


@triton.jit
def _four(codes, base, UP: tl.constexpr):
    """Four codes in the low half of a word -> four FP8 in a word, all four at once, if none is below the type's
    smallest normal number: level index i >= 2 is i << UP above `base`, which stands for 1/2.

    UP is 1 for e5m2, 2 for e4m3: the place of E2M1's one bit of mantissa in theirs.
    """
    apart = (codes & 0xFF) | ((codes & 0xFF00) << 8)
    apart = (apart | (apart << 4)) & 0x0F0F0F0F
    index = apart & 0x07070707
    some = ((index + 0x07070707) >> 3) & 0x01010101  # not 0
    more = ((index + 0x06060606) >> 3) & 0x01010101  # above 1
    value = (index << UP) - ((some - more) << UP) + some * base
    return value | ((apart & 0x08080808) << 4)


@triton.jit
def _turned(codes, scales, row, col, rows, cols, R: tl.constexpr, N: tl.constexpr, BR: tl.constexpr,
            BC: tl.constexpr, W: tl.constexpr, E: tl.constexpr):  # fmt: skip
    """The same from codes [cols, rows / 2] of the transpose, whose blocks are [BR, BC]: a thread has the codes of two
    rows and E columns.
    """
    r, c = lanes.words(R // 2, N, E, W)
    inside = (row + r * 2 < rows) & (col + c // BR * BR < cols)
    start = codes + (col.to(tl.int64) * (rows // 2) + row // 2)
    byte = tl.load(start + (c * (rows // 2) + r), mask=inside, other=0)
    byte = lanes.of_words(byte, R // 2, N, E, W).to(tl.int32)
    place = (col // BR + c // BR) * (rows // BC) + row // BC + r * 2 // BC  # tiles begin where blocks do
    stored = lanes.bytes_of_words(tl.load(scales + place, mask=inside, other=0), R // 2, N, E, W, BR)
    nibble = tl.permute(tl.join(byte << 28, byte << 24), (0, 1, 4, 2, 3))
    both = tl.permute(tl.join(stored, stored), (0, 1, 4, 2, 3))
    return tl.reshape(nibble, (R, N)), tl.reshape(both, (R, N))


@triton.jit
def _one_by_one(nibble, byte, largest, lost, R: tl.constexpr, N: tl.constexpr, FP8: tl.constexpr):
    """[R, N] codes, in the top bits -> [R, N/4] words of four FP8, cut towards 0; what this changes is counted."""
    HIGHEST: tl.constexpr = 13 if FP8 == 5 else 6
    LOWEST: tl.constexpr = -36 if FP8 == 5 else -28  # below, fp32 would drop what is to be counted
    DROP: tl.constexpr = 21 if FP8 == 5 else 20  # bits of fp32's mantissa beyond the type's
    SMALLER: tl.constexpr = 14 if FP8 == 5 else 6  # 127 - bias is as much below the 126 of `small`
    exponent = tl.maximum(byte - largest + HIGHEST, LOWEST)
    # as fp32 2^(127 - bias) too small, the type's exponent and mantissa are where fp32 has them
    small = ((nibble >> 6) & 0x01C00000) | (nibble & -2147483648)
    found = a.bits(a.floats(small) * a.floats((exponent + (127 + SMALLER)) << 23))
    code = ((found >> DROP) & 0x7F) | ((found >> 24) & 0x80)
    code = tl.where(byte == 255, 0x7F, code)
    dropped = tl.where(byte == 255, 0, tl.minimum(found & ((1 << DROP) - 1), 1))
    number = tl.sum(tl.reshape(tl.sum(tl.reshape(dropped, (R, N // 8, 8)), axis=2), (R * N // 8,)), axis=0)
    if number > 0:
        tl.atomic_add(lost, number, sem="relaxed")
    return a.words_of_bytes(code, R, N)


@triton.jit
def carrier_of_codes_kernel(
    codes, scales, shared, top, values, scale, lost, rows, cols,
    R: tl.constexpr, N: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, TURNED: tl.constexpr, W: tl.constexpr,
    E: tl.constexpr, E8M0: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Values [rows, cols] of codes, as int32 words of two bf16 or four FP8.

    FP8 0: bf16; 5: float8_e5m2, 4: float8_e4m3fn, of scales whose largest byte is at `top`: its block goes to the top
    of the type's range, what falls off the other end is cut towards 0 and counted in `lost`; `scale` becomes the factor
    of all values, of which `shared` is a part.
    """
    across = tl.cdiv(cols, N)
    row, col = tl.program_id(0) // across * R, tl.program_id(0) % across * N
    r = tl.arange(0, R)[:, None]
    if FP8 == 0:
        if TURNED:
            nibble, byte = _turned(codes, scales, row, col, rows, cols, R, N, BR, BC, W, E)
        else:
            words, stored = _straight(codes, scales, row, col, rows, cols, R, N, BR, BC)
            nibble, byte = _nibbles(words, stored, R, N)
        factor = a.decode_e8m0(byte) if E8M0 else a.decode_e4m3(byte)
        words = a.bf16_pairs(a.e2m1_signed(nibble) * factor, R, N)
        c = col // 2 + tl.arange(0, N // 2)[None, :]
        to = values + (row.to(tl.int64) * (cols // 2) + r * (cols // 2) + c)
        tl.store(to, words, mask=(row + r < rows) & (c < cols // 2))
    else:
        HIGHEST: tl.constexpr = 13 if FP8 == 5 else 6  # 6 * 2^13 is the largest value of a block at the top
        BIAS: tl.constexpr = 15 if FP8 == 5 else 7
        UP: tl.constexpr = 1 if FP8 == 5 else 2
        largest = tl.load(top)
        if (row == 0) & (col == 0):
            tl.store(scale, tl.load(shared) * (a.decode_e8m0(largest) * (2.0**-HIGHEST)))
        c = col // 4 + tl.max_contiguous(tl.arange(0, N // 4)[None, :], (1, 2))
        to = values + (row.to(tl.int64) * (cols // 4) + r * (cols // 4) + c)
        inside = (row + r < rows) & (c < cols // 4)
        if TURNED:
            nibble, byte = _turned(codes, scales, row, col, rows, cols, R, N, BR, BC, W, E)
            found = _one_by_one(nibble, byte, largest, lost, R, N, FP8)
            tl.store(to, found, mask=inside)
        else:
            words, stored = _straight(codes, scales, row, col, rows, cols, R, N, BR, BC)
            exponent = stored - largest + HIGHEST
            base = (exponent + (BIAS - 1)) << (UP + 1)
            both = tl.join(_four(words & 0xFFFF, base, UP), _four((words >> 16) & 0xFFFF, base, UP))
            both = tl.where((stored == 255)[:, :, :, None], 0x7F7F7F7F, both)
            tl.store(to, tl.reshape(both, (R, N // 4)), mask=inside)
            small = (exponent < 2 - BIAS) & ((words & 0x77777777) != 0)
            if tl.max(tl.reshape(small.to(tl.int32), (R * N // 8,)), axis=0) > 0:
                nibble, byte = _nibbles(words, stored, R, N)
                slowly = _one_by_one(nibble, byte, largest, lost, R, N, FP8)
                tl.debug_barrier()  # the words above are on their way to the same place
                tl.store(to, slowly, mask=inside)
