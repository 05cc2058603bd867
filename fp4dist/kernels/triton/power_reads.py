# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# Triton's own language: its functions' parameters have no types.
"""Device code: tiles of E2M1 codes and of transposed matrices, read so that a thread holds blocks of 32 columns.

QUICK   `power_values` follows: exact but in blocks that it calls unusual
ASM     NVIDIA's instructions, which Triton has no words for; without it the same bits in integer arithmetic
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp4dist.kernels.triton import arithmetic as a
from fp4dist.kernels.triton import lanes
from fp4dist.kernels.triton import power_bits as bits
from fp4dist.kernels.triton import programs as p

AHEAD = tl.constexpr(True)  # whether all of a tile is asked for before its first part is waited for


@triton.jit
def turned_codes(
    x, stride, qscales, qglobal, back, table, signs, row, col, rows, cols, R: tl.constexpr, N: tl.constexpr,
    EVEN: tl.constexpr, FLIPS: tl.constexpr, SIGNED: tl.constexpr, ASM: tl.constexpr, QUICK: tl.constexpr,
):  # fmt: skip
    """[R * N / 32, 32] fp32 values of the transpose of codes x [cols, rows / 2] with E8M0 scales of 32 along rows,
    turned back from a rotation of 32 along rows (which has signs if FLIPS), and with the signs of one of 32 along
    columns if SIGNED.

    A thread decodes 32 codes of a row of x, whose scale it shares and whose rotation it can turn back alone; then the
    tile is turned as a whole. `table` [32] holds 1 / 32; that it is read so that a thread has all of it is what makes
    Triton give a thread 32 columns.
    """
    G: tl.constexpr = R * N // 32
    column = lanes.runs(G, 32, 4)[1]
    factor = tl.load(table + column)
    if SIGNED:  # after the first rotation, not before: then zeros, too, have the reference's signs
        factor = a.floats(a.bits(factor) ^ ((tl.load(signs) >> column) << 31))
    factor = lanes.of_runs(factor, G, 32)
    run, place = lanes.runs(G, 4, 4)
    t, b = run // (R // 32), run % (R // 32)
    at = x + (col.to(tl.int64) * stride + row // 8) + (t * stride + b * 4 + place)
    scale_at = qscales + (col.to(tl.int64) * (rows // 32) + row // 32)
    scale_at += tl.arange(0, N)[None, :] * (rows // 32) + tl.arange(0, R // 32)[:, None]
    if EVEN:
        words, stored = tl.load(at), tl.load(scale_at)
    else:
        words = tl.load(at, mask=(col + t < cols) & (row + b * 32 < rows), other=0)
        inside = (col + tl.arange(0, N)[None, :] < cols) & (row + tl.arange(0, R // 32)[:, None] * 32 < rows)
        stored = tl.load(scale_at, mask=inside, other=0)
    scale = tl.reshape(a.decode_e8m0(stored.to(tl.int32)), (G,))
    common = tl.load(qglobal)
    words = tl.reshape(tl.permute(tl.reshape(words, (N, R // 32, 4)), (1, 0, 2)), (G, 4))
    if QUICK:  # one product: where it is not exact but for the rounding of the last one, the tile is unusual
        y = small(words, G, ASM) * (scale * (common * 16384.0))[:, None]
    else:
        y = bits.unpacked(words, G, ASM) * scale[:, None] * common
    y = tl.permute(tl.reshape(a.rotate(y, G, 32, 32), (R // 32, N, 32)), (0, 2, 1))
    y = tl.reshape(y, (R * N // 32, 32)) * factor
    if FLIPS:
        word = tl.load(back) >> tl.arange(0, 32)
        word = tl.broadcast_to(word[None, :, None], (R // 32, 32, N // 32))
        y = a.floats(a.bits(y) ^ (tl.reshape(word, (G,)) << 31)[:, None])
    return y


@triton.jit
def held_codes(x, stride, qscales, row, col, rows, cols, R: tl.constexpr, N: tl.constexpr, W: tl.constexpr):
    """[R * N / 256, 32] twice: words of the eight codes that 8 rows of the transpose have at 32 columns each, from
    codes x [cols, rows / 2], and their E8M0 scales, of 32 along rows, in fp32.
    """
    G: tl.constexpr = R // 8 * N // 32
    words = p._turned(x, stride, row, col, rows, cols, R, N, 32, 8, W, True)
    r, c = lanes.words(R // 8, N, 32, W)
    start = qscales + (col.to(tl.int64) * (rows // 32) + row // 32)
    stored = lanes.of_words(tl.load(start + (c * (rows // 32) + r // 4)), R // 8, N, 32, W).to(tl.int32)
    return tl.reshape(words, (G, 32)), a.decode_e8m0(tl.reshape(stored, (G, 32)))


@triton.jit
def small(words, G: tl.constexpr, ASM: tl.constexpr):
    """[G, 4] words of eight codes -> [G, 32] fp32 signed levels times 2^-14."""
    if ASM:
        # bytes of e5m2, which are the upper halves of fp16, 2^14 too small, of the even codes and of the odd ones
        v0, v1, v2, v3, v4, v5, v6, v7 = tl.inline_asm_elementwise(
            """{ .reg .b32 t, u, v;
            .reg .b16 a, b;
            shl.b32 t, $8, 1; and.b32 t, t, 0x0E0E0E0E; shl.b32 u, $8, 4; lop3.b32 t, t, u, 0x80808080, 0xF8;
            shr.u32 u, $8, 3; and.b32 u, u, 0x0E0E0E0E; lop3.b32 u, u, $8, 0x80808080, 0xF8;
            prmt.b32 v, t, 0, 0x1404; mov.b32 {a, b}, v; cvt.f32.f16 $0, a; cvt.f32.f16 $2, b;
            prmt.b32 v, t, 0, 0x3424; mov.b32 {a, b}, v; cvt.f32.f16 $4, a; cvt.f32.f16 $6, b;
            prmt.b32 v, u, 0, 0x1404; mov.b32 {a, b}, v; cvt.f32.f16 $1, a; cvt.f32.f16 $3, b;
            prmt.b32 v, u, 0, 0x3424; mov.b32 {a, b}, v; cvt.f32.f16 $5, a; cvt.f32.f16 $7, b; }""",
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r", [words],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True, pack=1,
        )  # fmt: skip
        values = a.of_eighths(v0, v1, v2, v3, v4, v5, v6, v7, G, 32)
    else:
        values = bits.unpacked(words, G, ASM) * (1.0 / 16384.0)
    return values


@triton.jit
def columns(x, LINE: tl.constexpr, row, col, R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, P: tl.constexpr,
            W: tl.constexpr):  # fmt: skip
    """[G, E] fp32 of a matrix whose rows are contiguous, as words of P = 2 bf16: `programs._tile` without additions.

    LINE words from one column to the next: a thread has one address, and its loads have distances.
    """
    i = tl.arange(0, R // P * N)
    r, c = lanes.words(R // P, N, E, W)
    run = i // (R // P * (N // E))  # of a thread's own columns
    start = x + (col.to(tl.int64) * LINE + row // P)
    word = tl.load(start + ((c - run) * LINE + r) + run * LINE)
    if AHEAD:
        tl.debug_barrier()
    word = lanes.of_words(word, R // P, N, E, W)
    word = tl.permute(tl.join(word << 16, word & -65536), (0, 1, 4, 2, 3))
    return a.floats(tl.reshape(word, (R * N // E, E)))


@triton.jit
def two_rows(words, scale, i, ASM: tl.constexpr):
    """fp32 values of codes i and i + 4 (i below 4) of words of eight, under scales: exact unless a block of them is
    unusual.
    """
    if ASM:
        # as the upper four bits of two halves: sign, and the index where fp16 has its exponent, which is 2^14 too small
        low, high = tl.inline_asm_elementwise(
            """{ .reg .b32 t, u;
            .reg .b16 a, b;
            shl.b32 t, $2, $3; shr.u32 u, t, 3; and.b32 u, u, 0x0E000E00; lop3.b32 t, t, u, 0x80008000, 0xEC;
            mov.b32 {a, b}, t; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; }""",
            "=&r,=r,r,r", [words, 12 - 4 * i], dtype=(tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
        low, high = low * (scale * 16384.0), high * (scale * 16384.0)
    else:
        low, high = a.e2m1_signed(words << (28 - 4 * i)) * scale, a.e2m1_signed(words << (12 - 4 * i)) * scale
    return low, high


@triton.jit
def rows(x, LINE: tl.constexpr, row, col, R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, P: tl.constexpr):
    """[G, E] fp32 of a matrix of bf16 or fp32 whose columns are contiguous: `programs._rows` of whole tiles.

    LINE elements from one row to the next.
    """
    run, place = lanes.runs(R * N // E, E, P)
    r, c = run // (N // E), run % (N // E) * E + place
    y = tl.load(x + (row.to(tl.int64) * LINE + col) + (r * LINE + c))
    if AHEAD:
        tl.debug_barrier()
    y = lanes.of_runs(y, R * N // E, E)
    if y.dtype == tl.bfloat16:  # by bits: the interpreter's cast loses subnormal numbers
        y = a.floats(y.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return y
