# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# Triton's own language: its kernels' parameters have no types, branches on constants look like run-time ones.
"""Device code: what one program does with its tile [R, N] of the output orientation.

It reads the tile (or decodes it, transposed, from forward codes) so that a thread holds whole blocks of E columns,
rotates them, finds the scales of its blocks, and writes packed codes with scale bytes, a bf16 carrier, or both. Tiles
are [G, E] in registers, G = R * N / E blocks in row-major order. Arithmetic rounds as the reference's.

READ  0: rows of a matrix whose columns are contiguous; 1: one whose rows are (x^T); 2: codes of the transpose
P     elements along the contiguous dimension that a thread reads at once: a vector (READ 0), or a word (1, 2)
W     threads side by side along the contiguous dimension (READ 1, 2); the others of a warp lie along the blocks
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp4dist.kernels.triton import arithmetic as a
from fp4dist.kernels.triton import chunks, lanes
from fp4dist.kernels.triton.noise import PLACE, global_positions
from fp4dist.kernels.triton.signs import word_of


@triton.jit
def _bf16(i):
    """int32 with bf16 bits in its low half (and anything above) -> fp32."""
    return a.floats(i << 16)


@triton.jit
def _rows(x, stride, row, col, rows, cols, R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, P: tl.constexpr,
          EVEN: tl.constexpr):  # fmt: skip
    """[G, E] fp32 of a matrix with contiguous columns; 0 outside."""
    run, place = lanes.runs(R * N // E, E, P)
    r, c = run // (N // E), run % (N // E) * E + place
    start = x + (row.to(tl.int64) * stride + col)
    if EVEN:
        y = tl.load(start + (r * stride + c))
    else:
        y = tl.load(start + (r * stride + c), mask=(row + r < rows) & (col + c < cols), other=0.0)
    y = lanes.of_runs(y, R * N // E, E)
    if y.dtype == tl.bfloat16:  # by bits: the interpreter's cast loses subnormal numbers
        y = _bf16(y.to(tl.int16, bitcast=True).to(tl.int32))
    return y


@triton.jit
def _turned(x, stride, row, col, rows, cols, R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, P: tl.constexpr,
            W: tl.constexpr, EVEN: tl.constexpr, LINE: tl.constexpr = 0):  # fmt: skip
    """[R/P/W, W, N/E, E] words of P elements of a matrix with contiguous rows; 0 outside.

    x points to words; stride counts words; LINE as `chunks._word_chunks` has it
    """
    r, c = lanes.words(R // P, N, E, W)
    start = x + (col.to(tl.int64) * stride + row // P)
    if LINE > 0:
        run = tl.arange(0, R // P * N) // (R // P * (N // E))  # of a thread's own columns
        word = tl.load(start + ((c - run) * LINE + r) + run * LINE)
    elif EVEN:
        word = tl.load(start + (c * stride + r))
    else:
        word = tl.load(start + (c * stride + r), mask=(row + r * P < rows) & (col + c < cols), other=0)
    return lanes.of_words(word, R // P, N, E, W)


@triton.jit
def _decoded(
    x, stride, qscales, qglobal, back, nth, row, col, rows, cols, R: tl.constexpr, N: tl.constexpr, E: tl.constexpr,
    W: tl.constexpr, EVEN: tl.constexpr, QBR: tl.constexpr, QBC: tl.constexpr, QE8M0: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """[G, E] fp32 values of the transpose of codes x [cols, rows / 2] with scales of blocks [QBR, QBC].

    BACK   size (at most 32) of the rotation that they are turned back from, 1 for none;  back  its signs;
    nth    1 / BACK
    """
    byte = _turned(x, stride, row, col, rows, cols, R, N, E, 2, W, EVEN).to(tl.int32)
    r, c = lanes.words(R // 2, N, E, W)
    place = (col // QBR + c // QBR) * (rows // QBC) + row // QBC + r * 2 // QBC  # two rows of a byte share a block
    if EVEN:
        stored = tl.load(qscales + place)
    else:
        stored = tl.load(qscales + place, mask=(row + r * 2 < rows) & (col + c < cols), other=0)
    stored = lanes.bytes_of_words(stored, R // 2, N, E, W, QBR)
    scale = a.decode_e8m0(stored) if QE8M0 else a.decode_e4m3(stored)
    nearly = tl.join(a.e2m1_signed(byte << 28) * scale, a.e2m1_signed(byte << 24) * scale)
    nearly = tl.reshape(tl.permute(nearly, (0, 1, 4, 2, 3)), (R * N // E, E))
    y = nearly * tl.load(qglobal)
    if BACK > 1:
        y = tl.reshape(a.rows_rotated(y, R, N, BACK), (R * N // E, E)) * nth
        i = tl.reshape(tl.broadcast_to(((row + tl.arange(0, R)) % BACK)[:, None], (R, N // E)), (R * N // E,))
        y = a.floats(a.bits(y) ^ ((tl.load(back) >> i) << 31)[:, None])
    return y


@triton.jit
def _tile(
    x, stride, qscales, qglobal, signs, row, col, rows, cols,
    R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, ROT: tl.constexpr, SIGNED: tl.constexpr, READ: tl.constexpr,
    P: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr, QBR: tl.constexpr, QBC: tl.constexpr, QE8M0: tl.constexpr,
    BACK: tl.constexpr = 1, back=0, nth=1.0, LINE: tl.constexpr = 0,
):  # fmt: skip
    """[G, E] fp32 values of the tile at (row, col), rotated; 0 outside. LINE: of `_turned`, or 0."""
    if READ == 0:
        y = _rows(x, stride, row, col, rows, cols, R, N, E, P, EVEN)
    elif READ == 1:
        word = _turned(x, stride, row, col, rows, cols, R, N, E, P, W, EVEN, LINE)
        if P == 2:
            word = tl.permute(tl.join(word << 16, word & -65536), (0, 1, 4, 2, 3))
            y = a.floats(tl.reshape(word, (R * N // E, E)))
        else:
            y = tl.reshape(word, (R * N // E, E))
            if y.dtype == tl.bfloat16:
                y = _bf16(y.to(tl.int16, bitcast=True).to(tl.int32))
    else:
        y = _decoded(
            x, stride, qscales, qglobal, back, nth, row, col, rows, cols, R, N, E, W, EVEN, QBR, QBC, QE8M0, BACK
        )
    return _rotated(y, signs, R, N, E, ROT, SIGNED)


@triton.jit
def _rotated(y, signs, R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, ROT: tl.constexpr, SIGNED: tl.constexpr):
    """[G, E] fp32 in the basis of the codes."""
    if ROT > 1:
        if SIGNED:
            i = tl.arange(0, R * N // E) % (N // E) * E % ROT
            word = word_of(i, signs, ROT) >> (i & 31)
            j = tl.arange(0, E) % ROT  # where a rotation is smaller than a block
            y = a.floats(a.bits(y) ^ ((word[:, None] << (31 - j)[None, :]) & -2147483648))
        y = a.rotate(y, R * N // E, E, ROT)
    return y


@triton.jit
def amax_kernel(
    x, stride, qscales, qglobal, back, nth, rows, cols, signs, top,
    R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, ROT: tl.constexpr, SIGNED: tl.constexpr, READ: tl.constexpr,
    P: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr, QBR: tl.constexpr, QBC: tl.constexpr, QE8M0: tl.constexpr,
    BACK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The largest magnitude bits of the matrix, into `top`, which starts at 0. A program walks over STEPS tiles."""
    strips = tl.cdiv(cols, N * STEPS)
    row = tl.program_id(0) // strips * R
    found = tl.zeros((R * N // E,), tl.int32)
    for step in range(STEPS):
        col = (tl.program_id(0) % strips * STEPS + step) * N
        y = _tile(
            x, stride, qscales, qglobal, signs, row, col, rows, cols,
            R, N, E, ROT, SIGNED, READ, P, W, EVEN, QBR, QBC, QE8M0, BACK, back, nth,
        )  # fmt: skip
        found = tl.maximum(found, a.bits(a.largest(y, R * N // E, E)))
    tl.atomic_max(top, tl.max(found, axis=0), sem="relaxed")


@triton.jit
def _outer_scale(amax, numerator):
    """(S_enc, 1 / S_enc) of the tensor's amax; see `fp4dist.numerics.scales.global_encode`."""
    s_enc = a.below(tl.div_rn(numerator, amax), a.FLT_MAX)
    s_enc = tl.where((amax == 0.0) | (s_enc == 0.0), 1.0, s_enc)
    return s_enc, tl.div_rn(1.0, s_enc)


@triton.jit
def _thresholds(y, row, col, k0, k1, when, c3, width, row_run, r0, r1, column_run, q0, q1,
                R: tl.constexpr, N: tl.constexpr, E: tl.constexpr):  # fmt: skip
    """[G, E] thresholds; one counter for eight elements of a row.

    A condition that is never true ties the counters to y, so that each thread draws what its own elements need.
    """
    r = global_positions(row + tl.arange(0, R), row_run, r0, r1)
    c = global_positions(col // 8 + tl.arange(0, N // 8), column_run, q0, q1)
    index = tl.reshape(r[:, None] * width.to(tl.uint32) + c[None, :], (R * N // E, E // 8))
    index = tl.where((a.every_eighth(y, R * N // E, E) | 1) == 0, 0, index)
    w0, w1, w2, w3 = a.philox_of(index, k0, k1, tl.load(when), tl.load(when + 1), c3)
    return a.thresholds(w0, w1, w2, w3, R * N // E, E)


@triton.jit
def _error(y, level, scale, unit, METRIC: tl.constexpr, R: tl.constexpr, N: tl.constexpr, E: tl.constexpr,
           BR: tl.constexpr):  # fmt: skip
    """[G] error of levels under decode scales [G]."""
    d = tl.abs(y) - level * scale[:, None] * unit
    if METRIC == 0:
        error = _block_sum(d * d, R, N, E, BR)
    elif METRIC == 1:
        error = _block_sum(tl.abs(d), R, N, E, BR)
    else:
        error = _block_amax(d, R, N, E, BR)
    return error


@triton.jit
def _block_amax(y, R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, BR: tl.constexpr):
    """[G] max |y| of the block that each of G chunks belongs to, NaN (as bits above all) where one is."""
    found = a.largest(y, R * N // E, E)
    if BR > 1:
        rows = tl.max(tl.reshape(a.magnitude_bits(found), (R // BR, BR, N // E)), axis=1)
        found = a.floats(a.over_rows(rows, R, N // E, BR))
    return found


@triton.jit
def _block_sum(z, R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, BR: tl.constexpr):
    """[G] sums of blocks, columns before rows."""
    total = a.row_tree_sum(z, R * N // E, E)
    if BR > 1:
        turned = tl.reshape(tl.permute(tl.reshape(total, (R // BR, BR, N // E)), (0, 2, 1)), (R // BR * (N // E), BR))
        sums = tl.reshape(a.row_tree_sum(turned, R // BR * (N // E), BR), (R // BR, N // E))
        total = a.over_rows(sums, R, N // E, BR)
    return total


@triton.jit
def _store_codes(words, codes, row, col, rows, cols, R: tl.constexpr, N: tl.constexpr, EVEN: tl.constexpr):
    """[G, E/8] words of eight codes -> codes [rows, cols / 8] of the same words."""
    r = row + tl.arange(0, R)[:, None]
    c = col // 8 + tl.arange(0, N // 8)[None, :]
    to = codes + (row.to(tl.int64) * (cols // 8) + (r - row) * (cols // 8) + c)
    if EVEN:
        tl.store(to, tl.reshape(words, (R, N // 8)))
    else:
        tl.store(to, tl.reshape(words, (R, N // 8)), mask=(r < rows) & (c < cols // 8))


@triton.jit
def _store_scales(stored, scales, row, col, rows, cols, R: tl.constexpr, N: tl.constexpr, E: tl.constexpr,
                  BR: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    """[G] int32 scale bytes (or fp32 scales) -> scales [rows / BR, cols / E]."""
    stored = tl.reshape(stored, (R, N // E))
    if BR > 1:
        stored = tl.max(tl.reshape(stored, (R // BR, BR, N // E)), axis=1)  # all rows of a block have the same
    r = tl.arange(0, R // BR)[:, None]
    c = col // E + tl.arange(0, N // E)[None, :]
    to = scales + (row.to(tl.int64) // BR * (cols // E) + r * (cols // E) + c)
    value = stored.to(scales.dtype.element_ty)
    if EVEN:
        tl.store(to, value)
    else:
        tl.store(to, value, mask=(row // BR + r < rows // BR) & (c < cols // E))


@triton.jit
def _store_carrier(level, y, scale, values, row, col, rows, cols, R: tl.constexpr, N: tl.constexpr, E: tl.constexpr,
                   EVEN: tl.constexpr):  # fmt: skip
    """[G, E] levels with the signs of y times decode scales [G] -> values [rows, cols / 2] words of two bf16."""
    signed = a.floats(a.bits(level * scale[:, None]) | (a.bits(y) & -2147483648))
    _store_values(signed, values, row, col, rows, cols, R, N, E, EVEN)


@triton.jit
def _store_values(value, values, row, col, rows, cols, R: tl.constexpr, N: tl.constexpr, E: tl.constexpr,
                  EVEN: tl.constexpr):  # fmt: skip
    """[G, E] fp32 that bf16 holds exactly -> values [rows, cols / 2] words of two bf16."""
    words = tl.reshape(a.bf16_pairs(value, R * N // E, E), (R, N // 2))
    r = tl.arange(0, R)[:, None]
    c = col // 2 + tl.arange(0, N // 2)[None, :]
    to = values + (row.to(tl.int64) * (cols // 2) + r * (cols // 2) + c)
    if EVEN:
        tl.store(to, words)
    else:
        tl.store(to, words, mask=(row + r < rows) & (c < cols // 2))


@triton.jit
def _side(
    x, stride, qscales, qglobal, back, nth, signs, outer, codes, scales, values, top, row, col, rows, cols,
    numerator, inverse_v, k0, k1, when, c3, width, row_run, r0, r1, column_run, q0, q1,
    R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, BR: tl.constexpr, ROT: tl.constexpr, SIGNED: tl.constexpr,
    RULE: tl.constexpr, METRIC: tl.constexpr, ROUND: tl.constexpr, NONZERO: tl.constexpr,
    READ: tl.constexpr, P: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr, QBR: tl.constexpr, QBC: tl.constexpr,
    QE8M0: tl.constexpr, BACK: tl.constexpr, CODES: tl.constexpr, CARRIER: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """Quantize one tile under E4M3 scales. RULE 0: of the block's amax; else the best of it and its products with the
    bytes of RULE, in 16ths. ROUND 0: nearest, 1: stochastic. outer: bits of the tensor's amax;  top: becomes its decode
    scale;  CARRIER: in bf16.
    """
    G: tl.constexpr = R * N // E
    y = _tile(
        x, stride, qscales, qglobal, signs, row, col, rows, cols,
        R, N, E, ROT, SIGNED, READ, P, W, EVEN, QBR, QBC, QE8M0, BACK, back, nth, LINE,
    )  # fmt: skip
    amax = a.floats(tl.minimum(tl.load(outer) & 0x7FFFFFFF, 0x7F800000))
    s_enc, unit = _outer_scale(amax, numerator)
    if (row == 0) & (col == 0):
        tl.store(top, tl.where(a.bits(amax) < 0x7F800000, unit, float("nan")))
    raw = _block_amax(y, R, N, E, BR) * (s_enc * inverse_v)
    stored = a.encode_e4m3(raw)
    if NONZERO:
        stored = tl.maximum(stored, 1)
    scale = a.decode_e4m3(stored)
    multiplier = a.below(tl.div_rn(1.0, scale * unit), a.FLT_MAX)
    u = a.at_most(tl.abs(y * multiplier[:, None]), 6.0)
    if ROUND == 1:
        noise = _thresholds(y, row, col, k0, k1, when, c3, width, row_run, r0, r1, column_run, q0, q1, R, N, E)
        level, _ = a.stochastic(u, noise)
    else:
        level, _ = a.nearest(u)
    if RULE > 0:
        error = _error(y, level, scale, unit, METRIC, R, N, E, BR)
        for i in tl.static_range(4):
            if RULE >> 8 * i > 0:
                stored_i = a.encode_e4m3(raw * ((RULE >> 8 * i & 255) / 16))
                scale_i = a.decode_e4m3(stored_i)
                multiplier = a.below(tl.div_rn(1.0, scale_i * unit), a.FLT_MAX)
                level_i, _ = a.nearest(a.at_most(tl.abs(y * multiplier[:, None]), 6.0))
                error_i = _error(y, level_i, scale_i, unit, METRIC, R, N, E, BR)
                better = error_i < error
                error = tl.where(better, error_i, error)
                stored = tl.where(better, stored_i, stored)
                scale = tl.where(better, scale_i, scale)
                level = tl.where(better[:, None], level_i, level)
    level = a.floats(a.bits(level) | (a.bits(y) & -2147483648))
    if CODES:
        words = a.packed(level, G, E)
        words = tl.where((scale == scale)[:, None], words, 0x77777777)  # a NaN has no sign
        _store_codes(words, codes, row, col, rows, cols, R, N, EVEN)
        _store_scales(stored, scales, row, col, rows, cols, R, N, E, BR, EVEN)
    if CARRIER:
        _store_values(level * scale[:, None], values, row, col, rows, cols, R, N, E, EVEN)


@triton.jit(do_not_specialize=PLACE)
def quantize_kernel(
    x, stride, qscales, qglobal, back, nth, rows, cols, signs, outer, codes, scales, values, top,
    numerator, inverse_v, k0, k1, when, c3, width, row_run, r0, r1, column_run, q0, q1,
    R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, BR: tl.constexpr, ROT: tl.constexpr, SIGNED: tl.constexpr,
    RULE: tl.constexpr, METRIC: tl.constexpr, ROUND: tl.constexpr, NONZERO: tl.constexpr,
    READ: tl.constexpr, P: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr, QBR: tl.constexpr, QBC: tl.constexpr,
    QE8M0: tl.constexpr, BACK: tl.constexpr, CODES: tl.constexpr, CARRIER: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """One tile of one matrix; see `_side`."""
    across = tl.cdiv(cols, N)
    _side(
        x, stride, qscales, qglobal, back, nth, signs, outer, codes, scales, values, top,
        tl.program_id(0) // across * R, tl.program_id(0) % across * N, rows, cols, numerator, inverse_v,
        k0, k1, when, c3, width, row_run, r0, r1, column_run, q0, q1,
        R, N, E, BR, ROT, SIGNED, RULE, METRIC, ROUND, NONZERO, READ, P, W, EVEN, QBR, QBC, QE8M0, BACK, CODES,
        CARRIER, LINE,
    )  # fmt: skip


_BOTH = [*PLACE, *("t_" + name for name in PLACE)]


@triton.jit(do_not_specialize=_BOTH)
def pair_kernel(
    x, stride, words, word_stride, rows, cols,
    signs, outer, codes, scales, values, top, numerator, inverse_v, k0, k1, when,
    c3, width, row_run, r0, r1, column_run, q0, q1,
    t_signs, t_outer, t_codes, t_scales, t_values, t_top, t_numerator, t_inverse_v,
    t_k0, t_k1, t_when, t_c3, t_width, t_row_run, t_r0, t_r1, t_column_run, t_q0, t_q1,
    R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, BR: tl.constexpr, ROT: tl.constexpr, SIGNED: tl.constexpr,
    RULE: tl.constexpr, METRIC: tl.constexpr, ROUND: tl.constexpr, NONZERO: tl.constexpr, P:
    tl.constexpr, W: tl.constexpr, CODES: tl.constexpr, CARRIER: tl.constexpr,
    T_R: tl.constexpr, T_N: tl.constexpr, T_E: tl.constexpr, T_BR: tl.constexpr, T_ROT: tl.constexpr, T_SIGNED:
    tl.constexpr, T_RULE: tl.constexpr, T_METRIC: tl.constexpr, T_ROUND: tl.constexpr,
    T_NONZERO: tl.constexpr, T_P: tl.constexpr, T_W: tl.constexpr, T_CODES: tl.constexpr, T_CARRIER: tl.constexpr,
    EVEN: tl.constexpr, T_LINE: tl.constexpr,
):  # fmt: skip
    """Tiles of x [rows, cols], and of x^T with what begins with t_; see `_side`. words: x, as `_turned` reads it."""
    turned, row, col = chunks.of_pair(tl.program_id(0), rows, cols, R, N, T_R, T_N)
    if turned:
        _side(
            words, word_stride, words, words, 0, 1.0, t_signs, t_outer, t_codes, t_scales, t_values,
            t_top, row, col, cols, rows, t_numerator, t_inverse_v, t_k0, t_k1,
            t_when, t_c3, t_width, t_row_run, t_r0, t_r1, t_column_run, t_q0, t_q1, T_R, T_N, T_E, T_BR, T_ROT,
            T_SIGNED, T_RULE, T_METRIC, T_ROUND, T_NONZERO, 1, T_P, T_W, EVEN, 1, 16, False, 1, T_CODES,
            T_CARRIER, T_LINE,
        )  # fmt: skip
    else:
        _side(
            x, stride, x, x, 0, 1.0, signs, outer, codes, scales, values, top, row, col, rows, cols,
            numerator, inverse_v, k0, k1, when, c3, width, row_run, r0, r1, column_run,
            q0, q1, R, N, E, BR, ROT, SIGNED, RULE, METRIC, ROUND, NONZERO, 0, P, W, EVEN, 1, 16, False, 1,
            CODES, CARRIER, 0,
        )  # fmt: skip


@triton.jit
def pair_amax_kernel(
    x, stride, words, word_stride, rows, cols, signs, top, t_signs, t_top,
    R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, ROT: tl.constexpr, SIGNED: tl.constexpr, P: tl.constexpr,
    W: tl.constexpr, T_R: tl.constexpr, T_N: tl.constexpr, T_E: tl.constexpr, T_ROT: tl.constexpr,
    T_SIGNED: tl.constexpr, T_P: tl.constexpr, T_W: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The largest magnitude bits of x and of x^T after their rotations, into `top` and `t_top`, which start at 0."""
    turned, row, col = chunks.of_pair(tl.program_id(0), rows, cols, R, N, T_R, T_N)
    if turned:
        y_t = _tile(
            words, word_stride, words, words, t_signs, row, col, cols, rows, T_R, T_N, T_E,
            T_ROT, T_SIGNED, 1, T_P, T_W, EVEN, 1, 16, False,
        )  # fmt: skip
        tl.atomic_max(t_top, tl.max(a.bits(a.largest(y_t, T_R * T_N // T_E, T_E)), axis=0), sem="relaxed")
    else:
        y = _tile(x, stride, x, x, signs, row, col, rows, cols, R, N, E, ROT, SIGNED, 0, P, W, EVEN, 1, 16, False, 1)
        tl.atomic_max(top, tl.max(a.bits(a.largest(y, R * N // E, E)), axis=0), sem="relaxed")
