# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportGeneralTypeIssues=false
# Triton's own language: its kernels' parameters have no types, branches on constants look like run-time ones.
"""Device code of `grids`: any element grid of at most eight levels, or FP8; any scale format; statistics before scales.

A program owns a tile [R, N] of whole blocks, rotation groups and outer tiles. Grids come as a table of [5, 8] fp32, in
rows: what |u| must exceed for the next index, the same for negative u, levels, 1 / distance to the next level, middles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp4dist.kernels.triton import arithmetic as a
from fp4dist.kernels.triton.grid_rounding import (
    decode_scale,
    encode_scale,
    error_of,
    float_code,
    level_of,
    nearer_to,
    nearest,
    quest_step,
    stochastic,
    tree_sum,
)
from fp4dist.kernels.triton.noise import PLACE, element_noise, scale_noise
from fp4dist.kernels.triton.signs import flip

VARYING = [*PLACE, "noise_width", "noise_run", "n0", "n1"]
# Constants of the kernels' parameters, which must be literal there.
GIVEN, ABSMAX, FLOOR, CEIL, CEIL_AMAX, QUEST_BELOW, QUEST_NEAREST, FOUR_OVER_SIX, EDEN = range(9)  # RULE
E4M3, E8M0, UE5M3, INVERSE, FP32 = range(5)  # SCALE
NONE, ONE, ROWS, TILES = range(4)  # OUTER
TO_NEAREST, STOCHASTIC, TOWARD = range(3)  # ROUND


@triton.jit
def _butterflies(y, R: tl.constexpr, N: tl.constexpr, SIZE: tl.constexpr):
    """Unnormalized Hadamard of groups of SIZE (16 to 128) columns, strides 1, 2, 4 ..."""
    y = a.butterfly(y, R, N, 1)
    y = a.butterfly(y, R, N, 2)
    y = a.butterfly(y, R, N, 4)
    y = a.butterfly(y, R, N, 8)
    if SIZE > 16:
        y = a.butterfly(y, R, N, 16)
    if SIZE > 32:
        y = a.butterfly(y, R, N, 32)
    if SIZE > 64:
        y = a.butterfly(y, R, N, 64)
    return y


@triton.jit
def load_tile(x, sr, sc, signs, row, col, rows, cols, R: tl.constexpr, N: tl.constexpr, ROT: tl.constexpr,
              SIGNED: tl.constexpr):  # fmt: skip
    """[R, N] fp32 values of a matrix of any strides, rotated; 0 outside."""
    r = row + tl.arange(0, R)
    c = col + tl.arange(0, N)
    inside = (r[:, None] < rows) & (c[None, :] < cols)
    y = tl.load(x + r[:, None].to(tl.int64) * sr + c[None, :].to(tl.int64) * sc, mask=inside, other=0.0)
    if y.dtype == tl.bfloat16:  # by bits: the interpreter's cast loses subnormal numbers
        y = a.floats(y.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    if SIGNED:
        y = a.floats(a.bits(y) ^ flip(c, signs, ROT)[None, :])
    if ROT > 1:
        y = _butterflies(y, R, N, ROT)
    return y


@triton.jit
def largest_kernel(
    x, sr, sc, signs, top, rows, cols, R: tl.constexpr, N: tl.constexpr, ROT: tl.constexpr,
    SIGNED: tl.constexpr, STEPS: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    """Largest magnitude bits of every row, or of the matrix, into `top`, which starts at 0. STEPS tiles a program."""
    row = tl.program_id(0) * R
    found = tl.zeros((R,), tl.int32)
    for step in range(STEPS):
        col = (tl.program_id(1) * STEPS + step) * N
        y = load_tile(x, sr, sc, signs, row, col, rows, cols, R, N, ROT, SIGNED)
        found = tl.maximum(found, tl.max(a.magnitude_bits(y), axis=1))
    if BY_ROW:
        r = row + tl.arange(0, R)
        tl.atomic_max(top + r, found, mask=r < rows, sem="relaxed")
    else:
        tl.atomic_max(top, tl.max(found, axis=0), sem="relaxed")


@triton.jit
def _outer(found, outer, outers, numerator, row, col, rows, cols, R: tl.constexpr, N: tl.constexpr, BR: tl.constexpr,
           BC: tl.constexpr, OUTER: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """S_enc of every block [R/BR, N/BC] of amaxes `found`; the decoder's scales go to `outers`."""
    m: tl.constexpr = R // BR
    n: tl.constexpr = N // BC
    if OUTER == 0:
        s_enc = tl.full((m, n), 1.0, tl.float32)
    elif OUTER == 1:
        amax = tl.load(outer)
        one, decoder = encode_outer(amax, numerator)
        if (row == 0) & (col == 0):
            tl.store(outers, decoder)
        s_enc = tl.full((m, n), 1.0, tl.float32) * one
    elif OUTER == 2:
        r = row + tl.arange(0, m)
        one, decoder = encode_outer(tl.load(outer + r, mask=r < rows, other=1.0), numerator)
        if col == 0:
            tl.store(outers + r, decoder, mask=r < rows)
        s_enc = tl.broadcast_to(one[:, None], (m, n))
    else:
        k: tl.constexpr = N // TILE
        top = tl.max(tl.reshape(a.magnitude_bits(found), (m, k, TILE // BC)), axis=2)
        one, decoder = encode_outer(a.floats(tl.minimum(top, 0x7F800000)), numerator)
        r, c = row + tl.arange(0, m), col // TILE + tl.arange(0, k)
        inside = (r[:, None] < rows) & (c[None, :] < cols // TILE)
        tl.store(outers + r[:, None].to(tl.int64) * (cols // TILE) + c[None, :], decoder, mask=inside)
        s_enc = tl.reshape(tl.broadcast_to(one[:, :, None], (m, k, TILE // BC)), (m, n))
    return s_enc


@triton.jit
def encode_outer(amax, numerator):
    """(S_enc, 1 / S_enc or NaN); see `fp4dist.numerics.scales.global_encode`."""
    s_enc = a.below(tl.div_rn(numerator, amax), a.FLT_MAX)
    s_enc = tl.where((amax == 0.0) | (s_enc == 0.0), 1.0, s_enc)
    finite = (a.bits(amax) & 0x7FFFFFFF) < 0x7F800000
    return s_enc, tl.where(finite, tl.div_rn(1.0, s_enc), float("nan"))


@triton.jit
def _store_codes(code, codes, stride, row, col, rows, cols, R: tl.constexpr, N: tl.constexpr, PACKED: tl.constexpr):
    """Bytes of codes [R, N], two a byte if PACKED, into rows of `stride` bytes."""
    r = row + tl.arange(0, R)
    if PACKED:
        low, high = tl.split(tl.reshape(code, (R, N // 2, 2)))
        c = col // 2 + tl.arange(0, N // 2)
        inside = (r[:, None] < rows) & (c[None, :] < cols // 2)
        byte = low | high << 4
    else:
        c = col + tl.arange(0, N)
        inside = (r[:, None] < rows) & (c[None, :] < cols)
        byte = code
    tl.store(codes + r[:, None].to(tl.int64) * stride + c[None, :], byte.to(tl.uint8), mask=inside)


@triton.jit
def _store_scales(stored, scales, row, col, rows, cols, R: tl.constexpr, N: tl.constexpr, BR: tl.constexpr,
                  BC: tl.constexpr):  # fmt: skip
    r = row // BR + tl.arange(0, R // BR)
    c = col // BC + tl.arange(0, N // BC)
    inside = (r[:, None] < rows // BR) & (c[None, :] < cols // BC)
    target = scales + r[:, None].to(tl.int64) * (cols // BC) + c[None, :]
    tl.store(target, stored.to(scales.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def grid_kernel(
    x, sr, sc, toward, tr, tc, signs, given, given_stride, outer, table, codes, stride, scales, outers, rows,
    cols, numerator, inverse_v, v, before, after, finer, factor, exponent, mantissa,
    k0, k1, when, c3, width, row_run, r0, r1, column_run, q0, q1, noise_width, noise_run, n0, n1,
    R: tl.constexpr, N: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, ROT: tl.constexpr, SIGNED: tl.constexpr,
    RULE: tl.constexpr, SCALE: tl.constexpr, OUTER: tl.constexpr, TILE: tl.constexpr, NONZERO: tl.constexpr,
    STD: tl.constexpr, METRIC: tl.constexpr, GROUP: tl.constexpr, ROUND: tl.constexpr, E2M1: tl.constexpr,
    FP8: tl.constexpr, TIES: tl.constexpr, LAST: tl.constexpr, SIGN: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Codes, scales and outer scales of one matrix. The constants are named at the top of this file.

    given    [rows] or [] fp32 multipliers (RULE GIVEN);  outer   amax of the tensor or of rows (OUTER ONE, ROWS)
    v        what a block's amax maps to;  numerator   budget * v;  before, after   factors of x and of 1 / scale
    LAST     index of the largest level;  SIGN   the sign bit of a code
    noise_*  PLACE of the blocks, for EDEN's scales
    """
    row, col = tl.program_id(0) * R, tl.program_id(1) * N
    y = load_tile(x, sr, sc, signs, row, col, rows, cols, R, N, ROT, SIGNED)
    negative = a.bits(y) < 0
    largest = tl.load(table + 16 + LAST) if FP8 == 0 else (448.0 if FP8 == 3 else 57344.0)
    z = y * before
    if RULE == 0:
        r = row + tl.arange(0, R)
        multiplier = tl.load(given + r * given_stride, mask=r < rows, other=0.0)
        wide = tl.broadcast_to(multiplier[:, None], (R, N))
    else:
        if (RULE == 5) | (RULE == 6):
            found = quest_step(y, factor, STD, R, N, BR, BC) + 1e-8
        else:
            found = a.floats(a.block_max_bits(y, R, N, BR, BC))
        if SCALE == 1:
            stored = a.power_byte(found, RULE - 1, finer, exponent, mantissa)
            multiplier = a.below(tl.div_rn(1.0, a.decode_e8m0(stored)) * after, a.FLT_MAX)
        elif SCALE == 4:
            step = tl.div_rn(found, v)
            finite = (a.bits(step) & 0x7FFFFFFF) < 0x7F800000
            stored = tl.where(step == 0.0, 1.0, tl.where(finite, step, float("nan")))
            multiplier = a.below(tl.div_rn(1.0, stored), a.FLT_MAX)
        else:
            s_enc = _outer(found, outer, outers, numerator, row, col, rows, cols, R, N, BR, BC, OUTER, TILE)
            unit = tl.div_rn(1.0, s_enc)
            raw = found * (s_enc * inverse_v)
            if OUTER == 0:
                raw = tl.where((a.bits(found) & 0x7FFFFFFF) < 0x7F800000, raw, float("nan"))
            stored = encode_scale(raw, SCALE)
            if NONZERO:
                stored = tl.maximum(stored, 1)
            scale = decode_scale(stored, SCALE)
            multiplier = a.below(tl.div_rn(1.0, scale * unit), a.FLT_MAX)
        if RULE == 8:
            multiplier = tl.where(stored == 0, 0.0, multiplier)
        wide = a.spread(multiplier, R, N, BR, BC)
    if RULE == 8:
        u = z * wide
        index = nearest(tl.abs(u), negative, table, E2M1, FP8, TIES, LAST)
        c = a.with_sign(level_of(index, table, E2M1), negative)
        n: tl.constexpr = BC if GROUP == 0 else GROUP
        uc = tree_sum(u * c, R, N, 1, n)
        s = tl.div_rn(tree_sum(u * u, R, N, 1, n), uc)
        s = tl.reshape(tl.broadcast_to(tl.where(uc == 0.0, 1.0, s)[:, :, None], (R, N // n, n // BC)), (R, N // BC))
        word = scale_noise(
            row, col // BC, k0, k1, when, c3, noise_width, row_run, r0, r1, noise_run, n0, n1, R, N // BC
        )
        stored = a.encode_e4m3_stochastic(scale * s, word)
        u = tl.abs(u)
    else:
        u = a.below(tl.abs(z * wide), largest)
        if ROUND == 1:
            noise = element_noise(row, col, k0, k1, when, c3, width, row_run, r0, r1, column_run, q0, q1, R, N)
            index = stochastic(u, noise, table, E2M1, LAST)
        elif ROUND == 2:
            t = load_tile(toward, tr, tc, signs, row, col, rows, cols, R, N, ROT, SIGNED) * before * wide
            t = tl.where(t < -largest, -largest, a.below(t, largest))
            index = nearer_to(u, tl.where(negative, -t, t), table, LAST)
        else:
            index = nearest(u, negative, table, E2M1, FP8, TIES, LAST)
    if RULE == 7:
        stored_4 = encode_scale(raw * 1.5, SCALE)
        scale_4 = decode_scale(stored_4, SCALE)
        multiplier = a.below(tl.div_rn(1.0, scale_4 * unit), a.FLT_MAX)
        u_4 = a.below(tl.abs(y * a.spread(multiplier, R, N, BR, BC)), largest)
        index_4 = nearest(u_4, negative, table, E2M1, FP8, TIES, LAST)
        units = a.spread(unit, R, N, BR, BC)
        error_4 = error_of(y, index_4, scale_4, units, table, METRIC, E2M1, R, N, BR, BC)
        better = error_4 < error_of(y, index, scale, units, table, METRIC, E2M1, R, N, BR, BC)
        stored = tl.where(better, stored_4, stored)
        index = tl.where(a.spread(better.to(tl.int32), R, N, BR, BC) != 0, index_4, index)
    code = index | tl.where(negative & (u == u), SIGN, 0)  # a NaN has no sign
    _store_codes(code, codes, stride, row, col, rows, cols, R, N, PACKED)
    if RULE != 0:
        _store_scales(stored, scales, row, col, rows, cols, R, N, BR, BC)


@triton.jit
def decode_kernel(
    codes, stride, scales, factors, table, out, rows, cols, block_rows, block_columns, factor_rows, factor_columns,
    R: tl.constexpr, N: tl.constexpr, G: tl.constexpr, SCALE: tl.constexpr, SCALED: tl.constexpr,
    FACTORED: tl.constexpr, E2M1: tl.constexpr, FP8: tl.constexpr, SIGN: tl.constexpr, PACKED: tl.constexpr,
    OUT: tl.constexpr,
):  # fmt: skip
    """Values of codes [rows, cols], times their block scale if SCALED, times their factor if FACTORED.

    OUT   0: fp32;  1: bf16 (exact values alone);  2: E4M3;  3: E5M2, both exact and of unscaled levels alone
    G     columns that are known to share a scale and a factor
    """
    r = tl.program_id(0) * R + tl.arange(0, R)
    c = tl.program_id(1) * N + tl.arange(0, N)
    inside = (r[:, None] < rows) & (c[None, :] < cols)
    if PACKED:
        half = tl.program_id(1) * (N // 2) + tl.arange(0, N // 2)
        within = (r[:, None] < rows) & (half[None, :] < cols // 2)
        byte = tl.load(codes + r[:, None].to(tl.int64) * stride + half[None, :], mask=within, other=0).to(tl.int32)
        code = tl.reshape(tl.join(byte & 15, byte >> 4), (R, N))
    else:
        code = tl.load(codes + r[:, None].to(tl.int64) * stride + c[None, :], mask=inside, other=0).to(tl.int32)
    index = code & (SIGN - 1)
    if FP8 == 3:
        level = a.decode_e4m3(index)
    elif FP8 == 2:
        normal = a.floats(((index >> 2) + 112) << 23 | (index & 3) << 21)
        level = tl.where(index < 4, index.to(tl.float32) * 1.52587890625e-05, normal)
    else:
        level = level_of(index, table, E2M1)
    value = a.with_sign(level, (code & SIGN) != 0)
    g = (tl.program_id(1) * (N // G) + tl.arange(0, N // G)) * G
    near = (r[:, None] < rows) & (g[None, :] < cols)
    if SCALED:
        at = (r[:, None] // block_rows).to(tl.int64) * (cols // block_columns) + g[None, :] // block_columns
        stored = tl.load(scales + at, mask=near, other=0)
        scale = decode_scale(stored if SCALE == 4 else stored.to(tl.int32), SCALE)
        value = value * a.spread(scale, R, N, 1, G)
    place = out + r[:, None].to(tl.int64) * cols + c[None, :]
    if FACTORED:
        at = (r[:, None] // factor_rows).to(tl.int64) * (cols // factor_columns) + g[None, :] // factor_columns
        value = value * a.spread(tl.load(factors + at, mask=near, other=0.0), R, N, 1, G)
    if OUT == 0:
        tl.store(place, value, mask=inside)
    elif OUT == 1:
        word = (a.bits(value) >> 16).to(tl.int16)  # nothing is cut
        tl.store(place, word.to(tl.bfloat16, bitcast=True), mask=inside)
    else:
        sign = tl.where(a.bits(value) < 0, 128, 0)
        magnitude = tl.abs(value)
        byte = a.encode_e4m3(magnitude) if OUT == 2 else float_code(magnitude, 2, 112, 1.52587890625e-05, 57344.0, 123)
        tl.store(place, (byte | sign).to(tl.uint8), mask=inside)
