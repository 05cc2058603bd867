# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# Triton's own language: its kernels' parameters have no types, branches on constants look like run-time ones.
"""Device code of MS-EDEN under a post-hoc scale of the tensor (arXiv:2601.22813), in two passes over the data.

The first pass finds the largest corrected block scale, which is the tensor's: it rotates and looks for the largest
value of each tile, and then corrects scales only in tiles whose largest value can lead to it. The second rotates again,
rounds to nearest codes, corrects the scale of each block of 16, divides it by the tensor's and rounds it to E4M3, one
word of noise each. So nothing large travels through memory between the passes, and both sides of a gradient are made
from one reading in each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp4dist.kernels.triton import arithmetic as a
from fp4dist.kernels.triton import chunks as c
from fp4dist.kernels.triton.noise import PLACE

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
    """Of [B, 16] rotated values: levels, indices (in bits 28 to 30), |values| / scale; [B] corrected scales.

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
    return level, index, u, q * tl.where(uc == 0.0, 1.0, tl.div_rn(a.row_tree_sum(u * u, B, BLOCK), uc))


@triton.jit
def _positions(i, run, first, second):
    """uint32 global positions of local ones: two runs of length `run` from `first` and `second`, or one of all."""
    return tl.where(i < run, first + i, second + i - run).to(tl.uint32)


@triton.jit
def _words_of_noise(
    found, row, col, k0, k1, when, c3, width, row_run, r0, r1, column_run, q0, q1,
    M: tl.constexpr, EVERY: tl.constexpr, N: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """[M * N / 16] uint32 words of the blocks of rows row, row + EVERY, ...; one counter for four blocks.

    PAIRS   neighbours 2 i and 2 i + 1 have one counter: it is drawn once for both
    A condition that is never true ties the counters to `found`, so that each thread draws what its own blocks need.
    """
    STEP: tl.constexpr = 2 if PAIRS else 1
    C: tl.constexpr = N // BLOCK // STEP
    c1, c2 = tl.load(when), tl.load(when + 1)
    i = tl.arange(0, M * C)
    r = _positions(row + i // C * EVERY, row_run, r0, r1)
    at = _positions(col // BLOCK + i % C * STEP, column_run, q0, q1)
    block = r.to(tl.uint64) * width.to(tl.uint32) + at
    counter = (block // 4).to(tl.uint32)
    if PAIRS:
        tie, _ = tl.split(tl.reshape(a.bits(found), (M * C, 2)))
    else:
        tie = a.bits(found)
    counter = tl.where((tie | 1) == 0, 0, counter)
    w0, w1, w2, w3 = a.philox_of(counter, k0, k1, c1, c2, c3)
    which = (block % 4).to(tl.int32)
    if PAIRS:
        word = tl.reshape(tl.join(tl.where(which == 0, w0, w2), tl.where(which == 0, w1, w3)), (M * N // BLOCK,))
    else:
        word = tl.where(which == 0, w0, tl.where(which == 1, w1, tl.where(which == 2, w2, w3)))
    return word


@triton.jit
def _written(
    y, divisor, codes, scales, values, row, col, rows, cols, v, k0, k1, when, c3, width, row_run, r0, r1, column_run,
    q0, q1, M: tl.constexpr, EVERY: tl.constexpr, N: tl.constexpr, CODES: tl.constexpr, CARRIER: tl.constexpr,
    PAIRS: tl.constexpr, EVEN: tl.constexpr, FOUR: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """Codes and bytes, or the carrier, of M * N rotated values, of rows row, row + EVERY, ..."""
    B: tl.constexpr = M * N // BLOCK
    y = tl.reshape(y, (B, BLOCK))
    level, index, u, found = _scaled(y, v, B, FOUR)
    noise = _words_of_noise(
        found, row, col, k0, k1, when, c3, width, row_run, r0, r1, column_run, q0, q1, M, EVERY, N, PAIRS
    )
    byte = a.encode_e4m3_stochastic(tl.div_rn(found, divisor), noise)
    if CARRIER:
        signed = a.floats(a.bits(level * a.decode_e4m3(byte)[:, None]) | (a.bits(y) & -2147483648))
        words = a.bf16_pairs(signed, B, BLOCK)
        c.store(words, values, row, col // 2, rows, cols // 2, M, EVERY, N // 2, EVEN)
    if CODES:
        if CAREFUL:
            index, y = tl.where(u == u, index, 0x70000000), tl.where(u == u, y, 0.0)
        c.store(a.pack(index, y, B, BLOCK), codes, row, col // 8, rows, cols // 8, M, EVERY, N // 8, EVEN)
        c.store(byte.to(tl.uint8), scales, row, col // BLOCK, rows, cols // BLOCK, M, EVERY, N // BLOCK, EVEN)


@triton.jit
def _walk(
    x, stride, qscales, outer, signs, top, codes, scales, values, row, col, rows, cols, v, budget, k0, k1, when, c3,
    width, row_run, r0, r1, column_run, q0, q1, WRITES: tl.constexpr,
    R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, ROT: tl.constexpr, SIGNED: tl.constexpr, READ: tl.constexpr,
    S: tl.constexpr, QBR: tl.constexpr, QBC: tl.constexpr, QE8M0: tl.constexpr, EVEN: tl.constexpr,
    FOUR: tl.constexpr, CODES: tl.constexpr, CARRIER: tl.constexpr, PAIRS: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """Over the tile [R, N] at (row, col): write it, or only [] int32 the largest bits of its corrected scales."""
    M: tl.constexpr = R // S
    FROM: tl.constexpr = 1 if READ else M  # rows from one step to the next
    EVERY: tl.constexpr = S if READ else 1  # rows of a step
    word, scale, flips = c.words_of(
        x, stride, qscales, signs, row, col, rows, cols, R, N, E, ROT, SIGNED, READ, S, QBR, QBC, QE8M0, EVEN
    )
    if WRITES:
        most = tl.div_rn(a.floats(tl.minimum(tl.load(top), 0x7F800000)), budget)
        divisor = tl.where(most == 0.0, 1.0, most)
    largest = tl.zeros((M * N // BLOCK,), tl.int32)
    for s in range(S):  # not unrolled: rows side by side would need too many registers
        y = c.rows_of(
            x, stride, outer, word, scale, flips, s, row, col, rows, cols, R, N, E, ROT, SIGNED, READ, S, QE8M0, EVEN
        )
        if WRITES:
            _written(
                y, divisor, codes, scales, values, row + s * FROM, col, rows, cols, v, k0, k1, when, c3, width,
                row_run, r0, r1, column_run, q0, q1, M, EVERY, N, CODES, CARRIER, PAIRS, EVEN, FOUR, CAREFUL,
            )  # fmt: skip
        else:
            _, _, _, found = _scaled(tl.reshape(y, (M * N // BLOCK, BLOCK)), v, M * N // BLOCK, FOUR)
            largest = tl.maximum(largest, a.magnitude_bits(found))
    return tl.max(largest, axis=0)


@triton.jit
def largest_kernel(
    x, stride, qscales, outer, signs, top, tiles, rows, cols,
    R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, ROT: tl.constexpr, SIGNED: tl.constexpr, READ: tl.constexpr,
    S: tl.constexpr, QBR: tl.constexpr, QBC: tl.constexpr, QE8M0: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Largest magnitude bits of rotated values: of each tile into `tiles`, of all into `top[4]`, which starts at 0."""
    i, across = tl.program_id(0), tl.cdiv(cols, N)
    found = c.largest_of(
        x, stride, qscales, outer, signs, i // across * R, i % across * N, rows, cols,
        R, N, E, ROT, SIGNED, READ, S, QBR, QBC, QE8M0, EVEN,
    )  # fmt: skip
    tl.store(tiles + i, found)
    tl.atomic_max(top + 4, found)


@triton.jit
def largest_pair_kernel(
    x, stride, words, word_stride, rows, cols, signs, top, tiles, t_signs, t_top, t_tiles,
    R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, ROT: tl.constexpr, SIGNED: tl.constexpr, S: tl.constexpr,
    T_R: tl.constexpr, T_N: tl.constexpr, T_E: tl.constexpr, T_ROT: tl.constexpr, T_SIGNED: tl.constexpr,
    T_S: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The same of x [rows, cols], and of x^T with what begins with t_; see `chunks.of_pair`."""
    turned, row, col = c.of_pair(tl.program_id(0), rows, cols, R, N, T_R, T_N)
    if turned:
        found = c.largest_of(
            words, word_stride, words, words, t_signs, row, col, cols, rows, T_R, T_N, T_E, T_ROT, T_SIGNED, 1, T_S,
            1, 16, False, EVEN,
        )  # fmt: skip
        tl.store(t_tiles + row // T_R * tl.cdiv(rows, T_N) + col // T_N, found, mask=(row < cols) & (col < rows))
        tl.atomic_max(t_top + 4, found)
    else:
        found = c.largest_of(
            x, stride, x, x, signs, row, col, rows, cols, R, N, E, ROT, SIGNED, 0, S, 1, 16, False, EVEN
        )
        tl.store(tiles + row // R * tl.cdiv(cols, N) + col // N, found, mask=(row < rows) & (col < cols))
        tl.atomic_max(top + 4, found)


@triton.jit
def correct_kernel(
    x, stride, qscales, outer, signs, top, tiles, rows, cols, v, least, most, TILES: tl.constexpr,
    R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, ROT: tl.constexpr, SIGNED: tl.constexpr, READ: tl.constexpr,
    S: tl.constexpr, QBR: tl.constexpr, QBC: tl.constexpr, QE8M0: tl.constexpr, EVEN: tl.constexpr, FOUR: tl.constexpr,
):  # fmt: skip
    """Bits of the largest corrected scale of one matrix into `top`, which starts at 0. A program looks at TILES tiles,
    and corrects the scales of those whose largest value can still lead to it.

    least, most   what a corrected scale is above and below, over that of its block's amax
    """
    across = tl.cdiv(cols, N)
    number = tl.cdiv(rows, R) * across
    reached = a.magnitude_bits(tl.div_rn(a.floats(tl.load(top + 4)), v) * least)
    for step in range(TILES):
        i = tl.program_id(0) + step * tl.num_programs(0)
        value = tl.load(tiles + i, mask=i < number, other=0)
        possible = a.magnitude_bits(tl.div_rn(a.floats(value), v) * most)
        if (possible >= reached) & (i < number):
            found = _walk(
                x, stride, qscales, outer, signs, top, top, top, top, i // across * R, i % across * N, rows, cols, v,
                v, 0, 0, top, 0, 0, 0, 0, 0, 0, 0, 0, False, R, N, E, ROT, SIGNED, READ, S, QBR, QBC, QE8M0, EVEN,
                FOUR, False, False, False, False,
            )  # fmt: skip
            tl.atomic_max(top, found)


@triton.jit
def _write(
    x, stride, qscales, outer, signs, top, codes, scales, values, s_dec, row, col, rows, cols, v, budget, k0, k1,
    when, c3, width, row_run, r0, r1, column_run, q0, q1,
    R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, ROT: tl.constexpr, SIGNED: tl.constexpr, READ: tl.constexpr,
    S: tl.constexpr, QBR: tl.constexpr, QBC: tl.constexpr, QE8M0: tl.constexpr, EVEN: tl.constexpr,
    FOUR: tl.constexpr, CODES: tl.constexpr, CARRIER: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """One tile of the second pass; the first one also stores S_dec."""
    bits = tl.load(top)
    if (row == 0) & (col == 0):
        most = tl.div_rn(a.floats(tl.minimum(bits, 0x7F800000)), budget)
        finite = (a.bits(most) & 0x7FFFFFFF) < 0x7F800000
        tl.store(s_dec, tl.where(finite, tl.where(most == 0.0, 1.0, most), float("nan")))
    if CODES & (bits >= 0x7F800000):  # something is NaN, or Inf
        _walk(
            x, stride, qscales, outer, signs, top, codes, scales, values, row, col, rows, cols, v, budget, k0, k1,
            when, c3, width, row_run, r0, r1, column_run, q0, q1, True,
            R, N, E, ROT, SIGNED, READ, S, QBR, QBC, QE8M0, EVEN, FOUR, CODES, CARRIER, PAIRS, True,
        )  # fmt: skip
    else:
        _walk(
            x, stride, qscales, outer, signs, top, codes, scales, values, row, col, rows, cols, v, budget, k0, k1,
            when, c3, width, row_run, r0, r1, column_run, q0, q1, True,
            R, N, E, ROT, SIGNED, READ, S, QBR, QBC, QE8M0, EVEN, FOUR, CODES, CARRIER, PAIRS, False,
        )  # fmt: skip


@triton.jit(do_not_specialize=PLACE)
def write_kernel(
    x, stride, qscales, outer, rows, cols, signs, top, codes, scales, values, s_dec, v, budget, k0, k1, when, c3,
    width, row_run, r0, r1, column_run, q0, q1,
    R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, ROT: tl.constexpr, SIGNED: tl.constexpr, READ: tl.constexpr,
    S: tl.constexpr, QBR: tl.constexpr, QBC: tl.constexpr, QE8M0: tl.constexpr, EVEN: tl.constexpr,
    FOUR: tl.constexpr, CODES: tl.constexpr, CARRIER: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Codes [rows, cols / 8] (words) and bytes [rows, cols / 16], or the bf16 carrier [rows, cols / 2] (words), or all,
    of one matrix whose largest corrected scale's bits are in `top`; the tensor's decode scale into `s_dec`.
    """
    across = tl.cdiv(cols, N)
    i = tl.num_programs(0) - 1 - tl.program_id(0)  # what the first pass read last is still in the cache
    _write(
        x, stride, qscales, outer, signs, top, codes, scales, values, s_dec, i // across * R, i % across * N, rows,
        cols, v, budget, k0, k1,
        when, c3, width, row_run, r0, r1, column_run, q0, q1,
        R, N, E, ROT, SIGNED, READ, S, QBR, QBC, QE8M0, EVEN, FOUR, CODES, CARRIER, PAIRS,
    )  # fmt: skip


@triton.jit(do_not_specialize=[*PLACE, *("t_" + name for name in PLACE)])
def write_pair_kernel(
    x, stride, words, word_stride, rows, cols, signs, top, codes, scales, values, s_dec, v, budget, k0, k1, when, c3,
    width, row_run, r0, r1, column_run, q0, q1, t_signs, t_top, t_codes, t_scales, t_values, t_s_dec, t_v, t_budget,
    t_k0, t_k1, t_when, t_c3, t_width, t_row_run, t_r0, t_r1, t_column_run, t_q0, t_q1,
    R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, ROT: tl.constexpr, SIGNED: tl.constexpr, S: tl.constexpr,
    FOUR: tl.constexpr, CODES: tl.constexpr, CARRIER: tl.constexpr, PAIRS: tl.constexpr, T_R: tl.constexpr,
    T_N: tl.constexpr, T_E: tl.constexpr, T_ROT: tl.constexpr, T_SIGNED: tl.constexpr, T_S: tl.constexpr,
    T_FOUR: tl.constexpr, T_CODES: tl.constexpr, T_CARRIER: tl.constexpr, T_PAIRS: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """The same of x [rows, cols], and of x^T with what begins with t_. words: x, as `_word_chunks` reads it.

    Programs that read the same T_N x N elements follow each other: the second reading finds them in the cache.
    """
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # what the first pass read last is still in the cache
    turned, row, col = c.of_pair(program, rows, cols, R, N, T_R, T_N)
    if turned:
        _write(
            words, word_stride, words, words, t_signs, t_top, t_codes, t_scales, t_values, t_s_dec,
            row, col, cols, rows, t_v, t_budget, t_k0, t_k1, t_when, t_c3, t_width, t_row_run,
            t_r0, t_r1, t_column_run, t_q0, t_q1, T_R, T_N, T_E, T_ROT, T_SIGNED, 1, T_S, 1, 16, False, EVEN, T_FOUR,
            T_CODES, T_CARRIER, T_PAIRS,
        )  # fmt: skip
    else:
        _write(
            x, stride, x, x, signs, top, codes, scales, values, s_dec, row, col, rows, cols, v, budget, k0,
            k1, when, c3, width, row_run, r0, r1, column_run, q0, q1, R, N, E, ROT, SIGNED, 0, S, 1, 16, False, EVEN,
            FOUR, CODES, CARRIER, PAIRS,
        )  # fmt: skip
