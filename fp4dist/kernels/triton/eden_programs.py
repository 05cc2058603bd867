# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# Triton's own language: its kernels' parameters have no types, branches on constants look like run-time ones.
"""Device code of MS-EDEN under a post-hoc scale of the tensor (arXiv:2601.22813), with one reading of the data.

The first pass rotates, rounds to nearest codes, corrects the scale of each block of 16 and keeps it in fp32; the
largest is the tensor's. So both sides of a gradient are made from one reading. The second pass, over those scales and
the codes, three eighths of bf16's size, divides the scales by the tensor's, rounds them to E4M3 with a word of noise
each, and writes the bytes, the carrier, or both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp4dist.kernels.triton import arithmetic as a
from fp4dist.kernels.triton import chunks as c
from fp4dist.kernels.triton.noise import PLACE, global_positions

BLOCK = tl.constexpr(16)  # columns that share a scale


@triton.jit
def _under(y, q):
    """Of [B, 16] values under scales [B]: |values| / scale, levels, indices (in bits 28 to 30)."""
    u = tl.abs(y) * tl.where(q < a.FLT_MIN, 0.0, tl.div_rn(1.0, q))[:, None]
    level, index = a.nearest(u)
    return u, level, index


@triton.jit
def _error(y, level, q, B: tl.constexpr, FOUR: tl.constexpr):
    """[B] error of levels under scales [B]; FOUR 1: of squares, 2: of magnitudes, 3: the largest."""
    d = tl.abs(y) - level * q[:, None]
    if FOUR == 1:
        error = a.row_tree_sum(d * d, B, BLOCK)
    elif FOUR == 2:
        error = a.row_tree_sum(tl.abs(d), B, BLOCK)
    else:
        error = a.largest(d, B, BLOCK)
    return error


@triton.jit
def _scaled(y, v, B: tl.constexpr, FOUR: tl.constexpr):
    """Of [B, 16] rotated values: indices (in bits 28 to 30); [B] corrected scales.

    FOUR   of `_error`: each block takes its scale or 1.5 of it, whichever has the smaller error; 0: its scale
    """
    q = tl.div_rn(a.largest(y, B, BLOCK), v)
    u, level, index = _under(y, q)
    if FOUR > 0:
        u_4, level_4, index_4 = _under(y, q * 1.5)
        better = _error(y, level_4, q * 1.5, B, FOUR) < _error(y, level, q, B, FOUR)
        u = tl.where(better[:, None], u_4, u)
        level = tl.where(better[:, None], level_4, level)
        index = tl.where(better[:, None], index_4, index)
        q = tl.where(better, q * 1.5, q)
    uc = a.row_tree_sum(u * level, B, BLOCK)
    return index, q * tl.where(uc == 0.0, 1.0, tl.div_rn(a.row_tree_sum(u * u, B, BLOCK), uc))


@triton.jit
def _code(
    x, stride, qscales, outer, signs, top, codes, corrected, row, col, rows, cols, v,
    R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, ROT: tl.constexpr, SIGNED: tl.constexpr, READ: tl.constexpr,
    S: tl.constexpr, QBR: tl.constexpr, QBC: tl.constexpr, QE8M0: tl.constexpr, EVEN: tl.constexpr, FOUR: tl.constexpr,
):  # fmt: skip
    """Codes and corrected scales of the tile [R, N] at (row, col); the bits of the largest one into `top`, which only
    later launches read: its atomic is relaxed, else a program would wait until all that it has stored is in memory.
    """
    M: tl.constexpr = R // S
    B: tl.constexpr = M * N // BLOCK
    FROM: tl.constexpr = 1 if READ else M  # rows from one step to the next
    EVERY: tl.constexpr = S if READ else 1  # rows of a step
    WHOLE: tl.constexpr = ROT % E == 0
    word, scale, flips = c.words_of(
        x, stride, qscales, signs, row, col, rows, cols, R, N, E, ROT, SIGNED, READ, S, QBR, QBC, QE8M0, EVEN
    )
    largest = tl.zeros((B,), tl.int32)
    for s in range(S):  # not unrolled: rows side by side would need too many registers
        y = c.rows_of(
            x, stride, outer, word, scale, flips, s, row, col, rows, cols, R, N, E, ROT, SIGNED, READ, S, QE8M0, EVEN
        )
        y = tl.reshape(y, (B, BLOCK))
        index, found = _scaled(y, v, B, FOUR)
        at = row + s * FROM
        words = a.pack(index, y, B, BLOCK)
        c.store_runs(words, codes, at, col // 8, rows, cols // 8, M, EVERY, N // 8, E // 8, WHOLE, EVEN)
        c.store_runs(
            found, corrected, at, col // BLOCK, rows, cols // BLOCK, M, EVERY, N // BLOCK, E // BLOCK, WHOLE, EVEN
        )
        largest = tl.maximum(largest, a.magnitude_bits(found))
    tl.atomic_max(top, tl.max(largest, axis=0), sem="relaxed")


@triton.jit
def code_kernel(
    x, stride, qscales, outer, rows, cols, signs, top, codes, corrected, v,
    R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, ROT: tl.constexpr, SIGNED: tl.constexpr, READ: tl.constexpr,
    S: tl.constexpr, QBR: tl.constexpr, QBC: tl.constexpr, QE8M0: tl.constexpr, EVEN: tl.constexpr, FOUR: tl.constexpr,
):  # fmt: skip
    """Codes [rows, cols / 8] (words of eight) and corrected scales [rows, cols / 16] (fp32) of one matrix; the bits of
    the largest one into `top`, which starts at 0. Codes of what is NaN have any index but 0, and any sign.
    """
    across = tl.cdiv(cols, N)
    i = tl.program_id(0)
    _code(
        x, stride, qscales, outer, signs, top, codes, corrected, i // across * R, i % across * N, rows, cols, v,
        R, N, E, ROT, SIGNED, READ, S, QBR, QBC, QE8M0, EVEN, FOUR,
    )  # fmt: skip


@triton.jit
def code_pair_kernel(
    x, stride, words, word_stride, rows, cols, signs, top, codes, corrected, v,
    t_signs, t_top, t_codes, t_corrected, t_v,
    R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, ROT: tl.constexpr, SIGNED: tl.constexpr, S: tl.constexpr,
    FOUR: tl.constexpr, T_R: tl.constexpr, T_N: tl.constexpr, T_E: tl.constexpr, T_ROT: tl.constexpr,
    T_SIGNED: tl.constexpr, T_S: tl.constexpr, T_FOUR: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The same of x [rows, cols], and of x^T with what begins with t_. words: x, as `chunks` reads it with READ 1.

    Programs that read the same T_N x N elements follow each other: the second reading finds them in the cache.
    """
    turned, row, col = c.of_pair(tl.program_id(0), rows, cols, R, N, T_R, T_N)
    if turned:
        _code(
            words, word_stride, words, words, t_signs, t_top, t_codes, t_corrected, row, col, cols, rows, t_v,
            T_R, T_N, T_E, T_ROT, T_SIGNED, 1, T_S, 1, 16, False, EVEN, T_FOUR,
        )  # fmt: skip
    else:
        _code(
            x, stride, x, x, signs, top, codes, corrected, row, col, rows, cols, v,
            R, N, E, ROT, SIGNED, 0, S, 1, 16, False, EVEN, FOUR,
        )  # fmt: skip


@triton.jit
def _words_of_noise(
    row, col, k0, k1, when, c3, width, row_run, r0, r1, column_run, q0, q1,
    M: tl.constexpr, C: tl.constexpr, ALIKE: tl.constexpr,
):  # fmt: skip
    """[M * C] uint32 words of blocks; one counter for four. ALIKE: that is, for blocks 4 i to 4 i + 3 of a row."""
    STEP: tl.constexpr = 4 if ALIKE else 1
    i = tl.arange(0, M * C // STEP)
    r = global_positions(row + i // (C // STEP), row_run, r0, r1)
    at = global_positions(col + i % (C // STEP) * STEP, column_run, q0, q1)
    block = r.to(tl.uint64) * width.to(tl.uint32) + at
    w0, w1, w2, w3 = a.philox_of((block // 4).to(tl.uint32), k0, k1, tl.load(when), tl.load(when + 1), c3)
    if ALIKE:
        word = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (M * C,))
    else:
        which = (block % 4).to(tl.int32)
        word = tl.where(which == 0, w0, tl.where(which == 1, w1, tl.where(which == 2, w2, w3)))
    return word


@triton.jit(do_not_specialize=PLACE)
def scale_kernel(
    rows, blocks, top, codes, corrected, scales, values, s_dec, budget, k0, k1, when, c3,
    width, row_run, r0, r1, column_run, q0, q1,
    M: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, CODES: tl.constexpr, CARRIER: tl.constexpr,
    ALIKE: tl.constexpr,
):  # fmt: skip
    """Bytes [rows, blocks], or the bf16 carrier [rows, 8 * blocks] (words), or both, of codes [rows, 2 * blocks]
    (words) and corrected scales [rows, blocks]. top: bits of their largest;  s_dec: becomes the tensor's decode scale.

    C   blocks of a row, of which there is a multiple, in a program
    """
    across = blocks // C
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # what the first pass wrote last is still in the cache
    row, col = program // across * M, program % across * C
    largest = tl.div_rn(a.floats(tl.minimum(tl.load(top), 0x7F800000)), budget)
    if program == 0:
        finite = a.magnitude_bits(largest) < 0x7F800000
        tl.store(s_dec, tl.where(finite, tl.where(largest == 0.0, 1.0, largest), float("nan")))
    start = row.to(tl.int64) * blocks + col
    i = tl.arange(0, M * C)
    at, inside = i // C * blocks + i % C, row + i // C < rows
    found = tl.load(corrected + start + at) if EVEN else tl.load(corrected + start + at, mask=inside, other=0.0)
    noise = _words_of_noise(row, col, k0, k1, when, c3, width, row_run, r0, r1, column_run, q0, q1, M, C, ALIKE)
    byte = a.encode_e4m3_stochastic(tl.div_rn(found, tl.where(largest == 0.0, 1.0, largest)), noise)
    if CODES:
        tl.store(scales + start + at, byte.to(tl.uint8), mask=inside)
    _of_words(
        found, byte, codes + start * 2, values + start * 8, tl.load(top) >= 0x7F800000, row, rows, blocks,
        M, C, EVEN, CODES, CARRIER,
    )  # fmt: skip


@triton.jit
def _of_words(
    found, byte, codes, values, spoilt, row, rows, blocks, M: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr,
    CODES: tl.constexpr, CARRIER: tl.constexpr,
):  # fmt: skip
    """The carrier of code words and bytes [M * C]. spoilt: some blocks' `found` may be NaN; codes of NaN are then made
    those of 6.
    """
    W: tl.constexpr = 2 * M * C
    i = tl.arange(0, W)
    r, place = i // (2 * C), tl.max_contiguous(i % (2 * C), 1)  # one word a thread, which becomes 16 bytes
    at, inside = r * (2 * blocks) + place, row + r < rows
    if CARRIER:
        words = tl.load(codes + at) if EVEN else tl.load(codes + at, mask=inside, other=0)
        scale = tl.reshape(tl.broadcast_to(a.decode_e4m3(byte)[:, None], (M * C, 2)), (W,))
        value = a.unpack(words[:, None, None], W, 1) * scale[:, None]
        to = values + (at * 4)[:, None] + tl.arange(0, 4)[None, :]
        if EVEN:
            tl.store(to, a.bf16_pairs(value, W, 8))
        else:
            tl.store(to, a.bf16_pairs(value, W, 8), mask=inside[:, None])
    if CODES and spoilt:
        lost = tl.reshape(tl.broadcast_to((found != found)[:, None], (M * C, 2)), (W,)) & inside
        words = tl.load(codes + at, mask=lost, other=0)
        some = (words | (words >> 1) | (words >> 2)) & 0x11111111  # where an index is not 0
        tl.store(codes + at, (words & ~(some * 15)) | (some * 7), mask=lost)
