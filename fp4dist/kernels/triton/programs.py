# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# Triton's own language: its kernels' parameters have no types, branches on constants look like run-time ones.
"""Device code: what one program does with its tile [R, N] of the output orientation.

It reads the tile (or decodes it, transposed, from forward codes), rotates it in registers, finds the scales of its
blocks, and writes packed codes and scale bytes. Launched by `quantize`, with arithmetic that rounds as the reference's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp4dist.kernels.triton import arithmetic as a

# Names of parameters that change from step to step: their values must not be compiled in.
_PLACE = ["k0", "k1", "c1", "c2", "c3", "width", "row_run", "r0", "r1", "column_run", "q0", "q1"]


@triton.jit
def _tile(
    x, sr, sc, qscales, qglobal, signs, row, col, rows, cols,
    R: tl.constexpr, N: tl.constexpr, ROT: tl.constexpr, SIGNED: tl.constexpr, SRC: tl.constexpr,
    QBR: tl.constexpr, QBC: tl.constexpr, QE8M0: tl.constexpr,
):  # fmt: skip
    """[R, N] fp32 values of the tile at (row, col), rotated; 0 outside."""
    r = row + tl.arange(0, R)
    c = col + tl.arange(0, N)
    inside = (r[:, None] < rows) & (c[None, :] < cols)
    if SRC:  # element (r, c) is element (c, r) of codes [cols, rows]
        width = rows // 2
        byte = tl.load(x + c[None, :].to(tl.int64) * width + (r[:, None] >> 1), mask=inside, other=0).to(tl.int32)
        code = (byte >> ((r[:, None] & 1) * 4)) & 15
        stored = tl.load(
            qscales + (c[None, :] // QBR).to(tl.int64) * (rows // QBC) + r[:, None] // QBC, mask=inside, other=0
        ).to(tl.int32)
        scale = a.decode_e8m0(stored) if QE8M0 else a.decode_e4m3(stored)
        level = a.e2m1_value(code & 7)
        y = a.with_sign(level, code > 7) * scale * tl.load(qglobal)
        y = tl.where(inside, y, 0.0)
    else:
        y = tl.load(x + r[:, None].to(tl.int64) * sr + c[None, :].to(tl.int64) * sc, mask=inside, other=0.0)
        if y.dtype == tl.bfloat16:  # by bits: the interpreter's cast loses subnormal numbers
            y = a.floats(y.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    if ROT > 1:
        if SIGNED:
            y = y * tl.load(signs + (c % ROT))[None, :]
        y = a.butterflies(y, R, N, ROT)
    return y


@triton.jit
def amax_kernel(
    x, sr, sc, qscales, qglobal, signs, top, rows, cols,
    R: tl.constexpr, N: tl.constexpr, ROT: tl.constexpr, SIGNED: tl.constexpr, SRC: tl.constexpr,
    QBR: tl.constexpr, QBC: tl.constexpr, QE8M0: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The largest magnitude bits of the matrix, into `top`, which starts at 0. A program walks over STEPS tiles."""
    largest = tl.zeros((R,), tl.int32)
    for step in range(STEPS):
        col = (tl.program_id(1) * STEPS + step) * N
        y = _tile(
            x, sr, sc, qscales, qglobal, signs, tl.program_id(0) * R, col, rows, cols,
            R, N, ROT, SIGNED, SRC, QBR, QBC, QE8M0,
        )  # fmt: skip
        largest = tl.maximum(largest, tl.max(a.magnitude_bits(y), axis=1))
    tl.atomic_max(top, tl.max(largest, axis=0))


@triton.jit
def _outer_scale(amax, numerator):
    """(S_enc, 1 / S_enc) of the tensor's amax; see `fp4dist.numerics.scales.global_encode`."""
    s_enc = a.below(tl.div_rn(numerator, amax), a.FLT_MAX)
    s_enc = tl.where((amax == 0.0) | (s_enc == 0.0), 1.0, s_enc)
    return s_enc, tl.div_rn(1.0, s_enc)


@triton.jit
def _global(i, run, first, second):
    """Global positions of local ones: two runs of length `run` from `first` and `second`, or one run of everything."""
    return tl.where(i < run, first + i, second + i - run).to(tl.int64)


@triton.jit
def _words(index, k0, k1, c1, c2, c3):
    """Four uint32 words for uint32 counters; everything else as the int32 of the same bits."""
    zero = tl.zeros_like(index)
    return a.philox(
        index, zero + c1.to(tl.uint32), zero + c2.to(tl.uint32), zero + c3.to(tl.uint32), zero + k0.to(tl.uint32),
        zero + k1.to(tl.uint32),
    )  # fmt: skip


@triton.jit
def _element_noise(row, col, k0, k1, c1, c2, c3, width, row_run, r0, r1, column_run, q0, q1,
                   R: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """[R, N] int32 in [0, 2^16); one counter for eight elements of a row."""
    r = _global(row + tl.arange(0, R), row_run, r0, r1)
    c = _global(col // 8 + tl.arange(0, N // 8), column_run, q0, q1)
    w0, w1, w2, w3 = _words((r[:, None] * width + c[None, :]).to(tl.uint32), k0, k1, c1, c2, c3)
    j0 = tl.join(w0 & 0xFFFF, w0 >> 16)
    j1 = tl.join(w1 & 0xFFFF, w1 >> 16)
    j2 = tl.join(w2 & 0xFFFF, w2 >> 16)
    j3 = tl.join(w3 & 0xFFFF, w3 >> 16)
    halves = tl.permute(tl.join(tl.join(j0, j2), tl.join(j1, j3)), (0, 1, 3, 4, 2))  # word, then half
    return tl.reshape(halves, (R, N)).to(tl.int32)


@triton.jit
def _errors(y, index, scale, unit, METRIC: tl.constexpr, R: tl.constexpr, N: tl.constexpr, BR: tl.constexpr,
            BC: tl.constexpr):  # fmt: skip
    """[R/BR, N/BC] error of level indices under decode scales."""
    level = a.e2m1_value(index)
    value = a.with_sign(level, a.bits(y) < 0) * a.spread(scale, R, N, BR, BC) * unit
    d = y - value
    if METRIC == 0:
        error = a.block_tree_sum(d * d, R, N, BR, BC)
    elif METRIC == 1:
        error = a.block_tree_sum(tl.abs(d), R, N, BR, BC)
    else:
        error = a.floats(a.block_max_bits(d, R, N, BR, BC))
    return error


@triton.jit
def _power_byte(found, RULE: tl.constexpr, finer):
    """int32 exponent + 127 of the power of two for a block's amax (or step). RULE 1 floor, 2 ceil, 3 ceil of amax,
    4 quest below, 5 quest nearest.
    """
    b = a.bits(found)
    exponent, mantissa = (b >> 23) & 0xFF, b & 0x7FFFFF
    if RULE == 1:
        byte = exponent - 2
    elif RULE == 2:
        byte = exponent - 2 + (mantissa > 0x400000).to(tl.int32)
    elif RULE == 3:
        byte = exponent + (mantissa > 0).to(tl.int32)
    elif RULE == 4:
        byte = exponent
    else:
        byte = exponent + (mantissa > 0x3504F3).to(tl.int32)
    byte = tl.where(exponent == 255, 255, tl.minimum(tl.maximum(byte, 0), 254))
    if RULE == 3:
        share = found * tl.div_rn(1.0, a.decode_e8m0(byte))
        byte = byte - ((share < finer) & (byte > 0)).to(tl.int32)
    return byte


@triton.jit
def _quest_step(y, factor, STD: tl.constexpr, R: tl.constexpr, N: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """[R/BR, N/BC] factor * standard deviation (or root mean square)."""
    exponent = (a.block_max_bits(y, R, N, BR, BC) >> 23) & 0xFF
    unit = a.decode_e8m0(exponent)
    z = y * a.spread(tl.div_rn(1.0, unit), R, N, BR, BC)
    n = tl.full((R // BR, N // BC), BR * BC, tl.float32)
    if STD:
        z = z - a.spread(tl.div_rn(a.block_tree_sum(z, R, N, BR, BC), n), R, N, BR, BC)
    return tl.sqrt_rn(tl.div_rn(a.block_tree_sum(z * z, R, N, BR, BC), n)) * factor * unit


@triton.jit
def _store(index, y, u, stored, codes, scales, row, col, rows, cols,
           R: tl.constexpr, N: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """Pack codes two a byte, and write the bytes of the scales."""
    code = index | tl.where((a.bits(y) < 0) & (u == u), 8, 0)  # a NaN has no sign
    low, high = tl.split(tl.reshape(code, (R, N // 2, 2)))
    r = row + tl.arange(0, R)
    c = col // 2 + tl.arange(0, N // 2)
    inside = (r[:, None] < rows) & (c[None, :] < cols // 2)
    tl.store(codes + r[:, None].to(tl.int64) * (cols // 2) + c[None, :], (low | high << 4).to(tl.uint8), mask=inside)
    r = row // BR + tl.arange(0, R // BR)
    c = col // BC + tl.arange(0, N // BC)
    inside = (r[:, None] < rows // BR) & (c[None, :] < cols // BC)
    if stored.dtype == tl.float32:
        tl.store(scales + r[:, None].to(tl.int64) * (cols // BC) + c[None, :], stored, mask=inside)
    else:
        tl.store(scales + r[:, None].to(tl.int64) * (cols // BC) + c[None, :], stored.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=_PLACE)
def quantize_kernel(
    x, sr, sc, qscales, qglobal, signs, outer, codes, scales, top, rows, cols, numerator, inverse_v, v, before, finer,
    factor, k0, k1, c1, c2, c3, width, row_run, r0, r1, column_run, q0, q1,
    R: tl.constexpr, N: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, ROT: tl.constexpr, SIGNED: tl.constexpr,
    RULE: tl.constexpr, METRIC: tl.constexpr, ROUND: tl.constexpr, STD: tl.constexpr, NONZERO: tl.constexpr,
    SRC: tl.constexpr, QBR: tl.constexpr, QBC: tl.constexpr, QE8M0: tl.constexpr,
):  # fmt: skip
    """RULE 0: E4M3 of the block's amax; 6: the better of it and 1.5 of it; 1 to 5: `_power_byte`; 7: MS-EDEN, whose
    corrected scales stay fp32 here, their largest bits go to `top`. ROUND 0: nearest, 1: stochastic.
    outer: the tensor's amax, under E4M3 scales, whose decode scale goes to `top`.
    """
    row, col = tl.program_id(0) * R, tl.program_id(1) * N
    y = _tile(x, sr, sc, qscales, qglobal, signs, row, col, rows, cols, R, N, ROT, SIGNED, SRC, QBR, QBC, QE8M0)
    if RULE == 7:
        q = tl.div_rn(a.floats(a.block_max_bits(y, R, N, BR, BC)), v)
        u = y * a.spread(tl.where(q < a.FLT_MIN, 0.0, tl.div_rn(1.0, q)), R, N, BR, BC)
        index = a.e2m1_nearest(tl.abs(u))
        level = a.e2m1_value(index)
        c = a.with_sign(level, a.bits(y) < 0)
        uc = a.block_tree_sum(u * c, R, N, BR, BC)
        s = tl.div_rn(a.block_tree_sum(u * u, R, N, BR, BC), uc)
        corrected = q * tl.where(uc == 0.0, 1.0, s)
        _store(index, y, u, corrected, codes, scales, row, col, rows, cols, R, N, BR, BC)
        tl.atomic_max(top, tl.max(tl.max(a.magnitude_bits(corrected), axis=1), axis=0))
    else:
        if (RULE == 0) | (RULE == 6):
            amax = tl.load(outer)
            s_enc, unit = _outer_scale(amax, numerator)
            if (row == 0) & (col == 0):
                tl.store(top, tl.where((a.bits(amax) & 0x7FFFFFFF) < 0x7F800000, unit, float("nan")))
            raw = a.floats(a.block_max_bits(y, R, N, BR, BC)) * (s_enc * inverse_v)
            stored = a.encode_e4m3(raw)
            if NONZERO:
                stored = tl.maximum(stored, 1)
            scale = a.decode_e4m3(stored)
            multiplier = a.below(tl.div_rn(1.0, scale * unit), a.FLT_MAX)
        else:
            if RULE >= 4:
                found = _quest_step(y, factor, STD, R, N, BR, BC) + 1e-8
            else:
                found = a.floats(a.block_max_bits(y, R, N, BR, BC))
            stored = _power_byte(found, RULE, finer)
            multiplier = tl.div_rn(1.0, a.decode_e8m0(stored))
            if RULE == 3:
                multiplier = multiplier * 6.0
            multiplier = a.below(multiplier, a.FLT_MAX)
        z = y * before if RULE == 1 else y
        u = a.below(tl.abs(z * a.spread(multiplier, R, N, BR, BC)), 6.0)
        if ROUND == 1:
            index = a.e2m1_stochastic(
                u, _element_noise(row, col, k0, k1, c1, c2, c3, width, row_run, r0, r1, column_run, q0, q1, R, N)
            )
        else:
            index = a.e2m1_nearest(u)
        if RULE == 6:
            stored_4 = a.encode_e4m3(raw * 1.5)
            scale_4 = a.decode_e4m3(stored_4)
            multiplier = a.below(tl.div_rn(1.0, scale_4 * unit), a.FLT_MAX)
            index_4 = a.e2m1_nearest(a.below(tl.abs(y * a.spread(multiplier, R, N, BR, BC)), 6.0))
            better = _errors(y, index_4, scale_4, unit, METRIC, R, N, BR, BC) < _errors(
                y, index, scale, unit, METRIC, R, N, BR, BC
            )
            stored = tl.where(better, stored_4, stored)
            index = tl.where(a.spread(better.to(tl.int32), R, N, BR, BC) != 0, index_4, index)
        _store(index, y, u, stored, codes, scales, row, col, rows, cols, R, N, BR, BC)


@triton.jit(do_not_specialize=_PLACE)
def round_scales_kernel(
    corrected, s_dec, scales, number, blocks, k0, k1, c1, c2, c3, width, row_run, r0, r1, column_run, q0, q1,
    B: tl.constexpr,
):  # fmt: skip
    """fp32 block scales / S_dec -> E4M3 bytes, stochastically; one word of noise for each block."""
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    r = _global((i // blocks).to(tl.int32), row_run, r0, r1)
    c = _global((i % blocks).to(tl.int32), column_run, q0, q1)
    block = r * width + c
    w0, w1, w2, w3 = _words((block // 4).to(tl.uint32), k0, k1, c1, c2, c3)
    which = (block % 4).to(tl.int32)
    word = tl.where(which == 0, w0, tl.where(which == 1, w1, tl.where(which == 2, w2, w3)))
    value = tl.div_rn(tl.load(corrected + i, mask=i < number, other=0.0), tl.load(s_dec))
    tl.store(scales + i, a.encode_e4m3_stochastic(value, word).to(tl.uint8), mask=i < number)


@triton.jit
def carrier_kernel(
    codes, scales, out, rows, cols, R: tl.constexpr, N: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    E8M0: tl.constexpr,
):  # fmt: skip
    """Codes and scales -> bf16 code * scale."""
    r = tl.program_id(0) * R + tl.arange(0, R)
    half = tl.program_id(1) * (N // 2) + tl.arange(0, N // 2)
    inside = (r[:, None] < rows) & (half[None, :] < cols // 2)
    byte = tl.load(codes + r[:, None].to(tl.int64) * (cols // 2) + half[None, :], mask=inside, other=0).to(tl.int32)
    code = tl.reshape(tl.join(byte & 15, byte >> 4), (R, N))
    block = tl.program_id(1) * (N // BC) + tl.arange(0, N // BC)
    within = (r[:, None] < rows) & (block[None, :] < cols // BC)
    stored = tl.load(scales + (r[:, None] // BR).to(tl.int64) * (cols // BC) + block[None, :], mask=within, other=0)
    scale = a.decode_e8m0(stored.to(tl.int32)) if E8M0 else a.decode_e4m3(stored.to(tl.int32))
    level = a.e2m1_value(code & 7)
    value = a.with_sign(level, code > 7) * a.spread(scale, R, N, 1, BC)
    word = (a.bits(value) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)  # exact: nothing is cut
    c = tl.program_id(1) * N + tl.arange(0, N)
    tl.store(out + r[:, None].to(tl.int64) * cols + c[None, :], word, mask=(r[:, None] < rows) & (c[None, :] < cols))
