# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportGeneralTypeIssues=false
# Triton's own language: its functions' parameters have no types, branches on constants look like run-time ones.
"""Device code of `grids`: encodings of scales, rounding to any grid, what it loses. `table` as in `grid_programs`."""

from __future__ import annotations

import triton
import triton.language as tl

from fp4dist.kernels.triton import arithmetic as a


@triton.jit
def tree_sum(z, R: tl.constexpr, N: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """[R, N] -> [R/BR, N/BC] block sums, columns before rows; BR and BC up to 256."""
    z = _pairs(z, R, N, BC)
    if BR > 1:
        turned = tl.reshape(tl.permute(tl.reshape(z, (R // BR, BR, N // BC)), (0, 2, 1)), (R // BR * (N // BC), BR))
        z = tl.reshape(_pairs(turned, R // BR * (N // BC), BR, BR), (R // BR, N // BC))
    return z


@triton.jit
def _pairs(z, R: tl.constexpr, N: tl.constexpr, n: tl.constexpr):
    """[R, N] -> [R, N/n]: sums of n neighbours in a tree of adjacent pairs."""
    G: tl.constexpr = R * (N // n)
    z = tl.reshape(z, (G, n))
    if n > 128:
        z = a.pair_sum(z, G, 256)
    if n > 64:
        z = a.pair_sum(z, G, 128)
    if n > 32:
        z = a.pair_sum(z, G, 64)
    if n > 16:
        z = a.pair_sum(z, G, 32)
    if n > 8:
        z = a.pair_sum(z, G, 16)
    z = a.pair_sum(z, G, 8)
    z = a.pair_sum(z, G, 4)
    return tl.reshape(a.pair_sum(z, G, 2), (R, N // n))


@triton.jit
def float_code(x, MANTISSA: tl.constexpr, REBIAS: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr,
               TOP: tl.constexpr):  # fmt: skip
    """Non-negative fp32 -> int32 codes of a float whose smallest subnormal number is given; NaN -> TOP."""
    drop: tl.constexpr = 23 - MANTISSA
    min_normal: tl.constexpr = SMALLEST * (1 << MANTISSA)
    b = a.bits(a.below(x, LARGEST))
    normal = ((b + ((1 << (drop - 1)) - 1) + ((b >> drop) & 1)) >> drop) - (REBIAS << MANTISSA)
    steps = a.below(x, min_normal) * (1.0 / SMALLEST)
    subnormal = ((steps + 12582912.0) - 12582912.0).to(tl.int32)
    return tl.where(x != x, TOP, tl.where(x < min_normal, subnormal, normal))


@triton.jit
def decode_ue5m3(code):
    """int32 UE5M3 bytes -> fp32."""
    normal = a.floats(((code >> 3) + 112) << 23 | (code & 7) << 20)
    value = tl.where(code < 8, code.to(tl.float32) * 7.62939453125e-06, normal)
    return tl.where(code == 0xFF, float("nan"), value)


@triton.jit
def encode_scale(raw, SCALE: tl.constexpr):
    """fp32 decode scales -> what is stored of them: int32 bytes, or fp32."""
    if SCALE == 0:
        stored = a.encode_e4m3(raw)
    elif SCALE == 2:
        code = float_code(raw, 3, 112, 7.62939453125e-06, 61440.0, 0xF7)
        stored = tl.where(raw != raw, 0xFF, code)
    elif SCALE == 3:
        stored = a.encode_e4m3(a.below(tl.div_rn(1.0, raw), 240.0))
    else:
        stored = raw
    return stored


@triton.jit
def decode_scale(stored, SCALE: tl.constexpr):
    """Stored scales -> fp32."""
    if SCALE == 0:
        scale = a.decode_e4m3(stored)
    elif SCALE == 1:
        scale = a.decode_e8m0(stored)
    elif SCALE == 2:
        scale = decode_ue5m3(stored)
    elif SCALE == 3:
        scale = tl.div_rn(1.0, a.decode_e4m3(stored))
    else:
        scale = stored
    return scale


@triton.jit
def quest_step(y, factor, STD: tl.constexpr, R: tl.constexpr, N: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """[R/BR, N/BC] factor * standard deviation (or root mean square)."""
    unit = a.decode_e8m0((a.block_max_bits(y, R, N, BR, BC) >> 23) & 0xFF)
    z = y * a.spread(tl.div_rn(1.0, unit), R, N, BR, BC)
    n = tl.full((R // BR, N // BC), BR * BC, tl.float32)
    if STD:
        z = z - a.spread(tl.div_rn(tree_sum(z, R, N, BR, BC), n), R, N, BR, BC)
    return tl.sqrt_rn(tl.div_rn(tree_sum(z * z, R, N, BR, BC), n)) * factor * unit


@triton.jit
def _e2m1_nearest(a):
    """|u| -> int32 level index, ties to even, saturating; NaN -> 7."""
    step = tl.where(a < 2.0, 2.0, tl.where(a < 4.0, 1.0, 0.5))
    first = tl.where(a < 2.0, 0.0, tl.where(a < 4.0, 2.0, 4.0))
    rounded = (tl.where(a > 6.0, 6.0, a) * step + 12582912.0) - 12582912.0 + first
    return tl.where(a != a, 7, rounded.to(tl.int32))


@triton.jit
def _e2m1_stochastic(a, noise):
    """|u| <= 6 and int32 noise in [0, 2^16) -> int32 level index."""
    step = tl.where(a < 2.0, 2.0, tl.where(a < 4.0, 1.0, 0.5))
    first = tl.where(a < 2.0, 0, tl.where(a < 4.0, 2, 4))
    position = a * step
    floor = tl.floor(position)
    threshold = noise.to(tl.float32) * 1.52587890625e-05 + 7.62939453125e-06
    up = (position - floor) > threshold
    return tl.where(a != a, 7, floor.to(tl.int32) + first + up.to(tl.int32))


@triton.jit
def _e2m1_value(index):
    """Level index -> magnitude."""
    i = index.to(tl.float32)
    return tl.where(i < 4.0, i * 0.5, tl.where(i < 6.0, i - 2.0, i * 2.0 - 8.0))


@triton.jit
def entry(table, which: tl.constexpr, index):
    """Entry `index` of row `which` of the grid's table."""
    value = tl.load(table + which * 8) + tl.zeros_like(index).to(tl.float32)
    for i in tl.static_range(1, 8):
        value = tl.where(index >= i, tl.load(table + which * 8 + i), value)
    return value


@triton.jit
def _below(u, table, LAST: tl.constexpr):
    """int32 index of the level at or below |u|; NaN -> LAST."""
    index = tl.zeros_like(a.bits(u))
    for i in tl.static_range(1, 8):
        index += (u >= tl.load(table + 16 + i)).to(tl.int32)
    return tl.where(u != u, LAST, index)


@triton.jit
def nearest(u, negative, table, E2M1: tl.constexpr, FP8: tl.constexpr, TIES: tl.constexpr, LAST: tl.constexpr):
    """|u| -> int32 index to nearest. FP8: mantissa bits, 0: a table. TIES 0: to even; 1: the table's; 2: by sign."""
    if FP8 == 3:
        index = float_code(u, 3, 120, 0.001953125, 448.0, 126)
    elif FP8 == 2:
        index = float_code(u, 2, 112, 1.52587890625e-05, 57344.0, 123)
    elif E2M1 and TIES == 0:
        index = _e2m1_nearest(u)
    else:
        index = tl.zeros_like(a.bits(u))
        for i in tl.static_range(7):
            bound = tl.load(table + i)
            if TIES == 2:
                bound = tl.where(negative, tl.load(table + 8 + i), bound)
            index += (u > bound).to(tl.int32)
        index = tl.where(u != u, LAST, index)
    return index


@triton.jit
def stochastic(u, noise, table, E2M1: tl.constexpr, LAST: tl.constexpr):
    """|u| inside the grid and int32 noise in [0, 2^16) -> int32 index."""
    if E2M1:
        index = _e2m1_stochastic(u, noise)
    else:
        index = _below(u, table, LAST)
        distance = (u - entry(table, 2, index)) * entry(table, 3, index)
        threshold = noise.to(tl.float32) * 1.52587890625e-05 + 7.62939453125e-06
        index = index + (distance > threshold).to(tl.int32)
    return index


@triton.jit
def nearer_to(u, same_way, table, LAST: tl.constexpr):
    """|u| -> the neighbour nearer to `same_way`, which has the sign of u taken out."""
    index = _below(u, table, LAST)
    middle = entry(table, 4, index)
    up = (same_way > middle) | ((same_way == middle) & (index % 2 == 1))
    return index + (up & (u > entry(table, 2, index)) & (entry(table, 3, index) > 0.0)).to(tl.int32)


@triton.jit
def level_of(index, table, E2M1: tl.constexpr):
    """Index -> magnitude."""
    if E2M1:
        level = _e2m1_value(index)
    else:
        level = entry(table, 2, index)
    return level


@triton.jit
def error_of(y, index, scale, unit, table, METRIC: tl.constexpr, E2M1: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
           BR: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """[R/BR, N/BC] error of indices under decode scales; 0 mse, 1 mae, 2 absmax."""
    value = a.with_sign(level_of(index, table, E2M1), a.bits(y) < 0) * a.spread(scale, R, N, BR, BC) * unit
    d = y - value
    if METRIC == 0:
        error = tree_sum(d * d, R, N, BR, BC)
    elif METRIC == 1:
        error = tree_sum(tl.abs(d), R, N, BR, BC)
    else:
        error = a.floats(a.block_max_bits(d, R, N, BR, BC))
    return error
