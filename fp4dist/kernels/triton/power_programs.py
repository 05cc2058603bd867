# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# Triton's own language: its kernels' parameters have no types, branches on constants look like run-time ones.
"""Device code: E2M1 under power-of-two block scales, written at once as codes, as FP8 or bf16 values, and as mask bits.

An FP8 value is code * 2^(block exponent + shift). The shift is remembered: it puts the largest scale of the matrix that
was quantized here before `HEADROOM` binades below the top of the type. A second, small launch of the same kernel
(`again`) looks whether that was right. Where a block lies above the top, or elements below the bottom are lost, it
writes everything anew under the shift of this very matrix; what is lost then, no shift can hold. So neither values nor
counts depend on what was remembered. FP8 values without codes take a shorter way at first (`power_values`); where a
block is unusual for it, all is written anew likewise.

    memory   int32[8], zeros at first and between matrices but for the first:
             0 largest scale byte of the matrix before; 1 of this one; 2 not 0: the remembered shift does not hold it
             3 elements lost in the last matrix; 4 programs of `again` that are done; 5 elements that these have lost
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp4dist.kernels.triton import arithmetic as a
from fp4dist.kernels.triton import power_bits as bits
from fp4dist.kernels.triton import power_reads as reads
from fp4dist.kernels.triton import power_values as quick
from fp4dist.kernels.triton import programs as p
from fp4dist.kernels.triton.noise import PLACE, global_positions

MEMORY = 8  # numbers
HEADROOM = tl.constexpr(3)  # binades by which a matrix's largest scale may grow until it is written twice


@triton.jit
def _store_values(words, values, row, col, rows, cols, R: tl.constexpr, N: tl.constexpr, EVEN: tl.constexpr):
    """[G, E/4] words of four FP8 -> values [rows, cols / 4]."""
    r = tl.arange(0, R)[:, None]
    c = col // 4 + tl.arange(0, N // 4)[None, :]
    to = values + (row.to(tl.int64) * (cols // 4) + r * (cols // 4) + c)
    if EVEN:
        tl.store(to, tl.reshape(words, (R, N // 4)))
    else:
        tl.store(to, tl.reshape(words, (R, N // 4)), mask=(row + r < rows) & (c < cols // 4))


@triton.jit
def _counters(y, row, col, width, row_run, r0, r1, column_run, q0, q1, R: tl.constexpr, N: tl.constexpr,
              E: tl.constexpr, S: tl.constexpr):  # fmt: skip
    """[G, E/8] counters of the noise of every S-th row; see `programs._thresholds`."""
    r = global_positions(row + tl.arange(0, R) * S, row_run, r0, r1)
    c = global_positions(col // 8 + tl.arange(0, N // 8), column_run, q0, q1)
    index = tl.reshape(r[:, None] * width.to(tl.uint32) + c[None, :], (R * N // E, E // 8))
    return tl.where((a.every_eighth(y, R * N // E, E) | 1) == 0, 0, index)


@triton.jit
def _step(y, amax, factor, STD: tl.constexpr, R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, BR: tl.constexpr):
    """[G] factor * standard deviation (or nth mean square) of blocks: `programs._quest_step` without divisions."""
    exponent = (a.bits(amax) >> 23) & 0xFF
    z = y * a.decode_e8m0(254 - exponent)[:, None]
    if STD:
        z = z - (p._block_sum(z, R, N, E, BR) * (1.0 / (BR * E)))[:, None]
    return tl.sqrt_rn(p._block_sum(z * z, R, N, E, BR) * (1.0 / (BR * E))) * factor * a.decode_e8m0(exponent)


@triton.jit
def _quantized(
    y, factor, before, finer, row, col, k0, k1, when, c3, width, row_run, r0, r1, column_run, q0, q1,
    R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, BR: tl.constexpr, RULE: tl.constexpr, ROUND: tl.constexpr,
    STD: tl.constexpr, CLIPS: tl.constexpr, S: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """([G, E/8] words of eight codes, [G] scale bytes, [G, E] |u| before saturation, [G, E] levels, [G] whether a block
    has any code but zeros).
    """
    G: tl.constexpr = R * N // E
    amax = p._block_amax(y, R, N, E, BR)
    found = amax
    if RULE >= 4:
        found = _step(y, amax, factor, STD, R, N, E, BR) + 1e-8
    stored = a.power_byte(found, RULE, finer, 2, 0x400000)  # of 6
    multiplier = a.decode_e8m0(254 - stored)
    if RULE == 3:
        multiplier = a.below(multiplier * 6.0, a.FLT_MAX)
    z = y * before if RULE == 1 else y
    full = tl.abs(z) * multiplier[:, None]
    u = a.at_most(full, 6.0) if CLIPS else full
    if ROUND == 1:
        index = tl.reshape(_counters(y, row, col, width, row_run, r0, r1, column_run, q0, q1, R, N, E, S), (G, E // 8))
        w0, w1, w2, w3 = a.philox_of(index, k0, k1, tl.load(when), tl.load(when + 1), c3)
        top = bits.drawn(u, bits.noise(w0, w1, w2, w3, G, E), ASM)
        level = a.e2m1_signed(top & 0x7FFFFFFF)
    else:
        level, top = a.nearest(u)
    words = bits.packed(top, y, G, E, ASM)
    words = tl.where((stored != 255)[:, None], words, 0x77777777)  # a NaN has no sign
    if ROUND == 1:
        some = tl.max(words & 0x77777777, axis=1) != 0
    else:  # by the largest element, so that words that nobody asks for need not be made
        some = (amax * before if RULE == 1 else amax) * multiplier > 0.25
    return words, stored, full, level, some


@triton.jit
def _written(
    y, largest, count, codes, scales, values, inside, row, col, rows, cols, noisy_row, noisy_col, before, finer, factor,
    k0, k1, when, c3, width, row_run, r0, r1, column_run, q0, q1,
    R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, BR: tl.constexpr, RULE: tl.constexpr, ROUND: tl.constexpr,
    STD: tl.constexpr, CLIPS: tl.constexpr, S: tl.constexpr, EVEN: tl.constexpr, CODES: tl.constexpr,
    CARRIER: tl.constexpr, MASK: tl.constexpr, ASM: tl.constexpr, AGAIN: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """Quantize and write [R * N / E, E] values of a tile at (row, col) of [rows, cols]; the place of its noise is every
    S-th row from noisy_row on. Returns [G] scale bytes, 0 for NaN, and 256 less them where a block is not all zeros,
    else 0: the largest of either tell which binades the matrix spans. If AGAIN, what is lost is counted instead.
    """
    G: tl.constexpr = R * N // E
    words, stored, full, level, some = _quantized(
        y, factor, before, finer, noisy_row, noisy_col, k0, k1, when, c3, width, row_run, r0, r1, column_run, q0, q1,
        R, N, E, BR, RULE, ROUND, STD, CLIPS, S, ASM,
    )  # fmt: skip
    if MASK and not AGAIN:
        bit = tl.where(stored == 255, 0, bits.inside(full, G, E, ASM))
        p._store_scales(bit, inside, row, col, rows, cols, R, N, E, 1, EVEN)
    if CODES and not AGAIN:
        p._store_codes(words, codes, row, col, rows, cols, R, N, EVEN)
        p._store_scales(stored, scales, row, col, rows, cols, R, N, E, BR, EVEN)
    byte = tl.where(stored == 255, 0, stored)
    deep = byte & 0
    if (CARRIER == 5) | (CARRIER == 4) | SPREAD:
        deep = tl.where(some & (stored != 255), 256 - stored, 0)
    if CARRIER == 16:
        p._store_carrier(level, y, a.decode_e8m0(stored), values, row, col, rows, cols, R, N, E, EVEN)
    if (CARRIER == 5) | (CARRIER == 4):
        HIGHEST: tl.constexpr = 13 if CARRIER == 5 else 6
        LOWEST: tl.constexpr = -15 if CARRIER == 5 else -8
        exponent = stored - largest + HIGHEST
        first, second = bits.levels(exponent, stored, CARRIER)
        _store_values(bits.values(words, first, second, G, E, ASM), values, row, col, rows, cols, R, N, EVEN)
        if AGAIN:
            number = tl.sum(bits.lost(words, LOWEST - exponent, G, E), axis=0)
            if number > 0:
                tl.atomic_add(count, number, sem="relaxed")
    return byte, deep


@triton.jit
def _written_quickly(
    y, largest, values, row, col, rows, cols, noisy_row, noisy_col, before, k0, k1, when, c3, width, row_run, r0, r1,
    column_run, q0, q1,
    R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, BR: tl.constexpr, RULE: tl.constexpr, ROUND: tl.constexpr,
    S: tl.constexpr, EVEN: tl.constexpr, CARRIER: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """`_written` of FP8 values alone, without codes: right unless the second result is above `UNUSUAL`."""
    G: tl.constexpr = R * N // E
    HIGHEST: tl.constexpr = 13 if CARRIER == 5 else 6
    LOWEST: tl.constexpr = -15 if CARRIER == 5 else -8
    found = p._block_amax(y, R, N, E, BR)
    stored = quick.byte_of(found, RULE)
    shift = quick.shift_of(largest, HIGHEST) * (6.0 if RULE == 3 else before)
    unit = quick.unit_of(stored, largest, LOWEST, HIGHEST)[:, None]
    if ROUND == 1:
        counters = _counters(y, noisy_row, noisy_col, width, row_run, r0, r1, column_run, q0, q1, R, N, E, S)
        key = k0, k1, tl.load(when), tl.load(when + 1), c3
        words = quick.drawn(y, shift, unit, tl.reshape(counters, (G, E // 8)), key, G, E, CARRIER, ASM)
    else:
        words = quick.bytes_of(quick.nearest(y * shift, unit, y, ASM), G, E, CARRIER, ASM)
    _store_values(words, values, row, col, rows, cols, R, N, EVEN)
    return quick.spans(found, stored)


@triton.jit
def _tile(
    tile, largest, count, x, stride, qscales, qglobal, back, nth, rows, cols, table, signs, codes, scales, values,
    inside, memory, shared, factor_of, spread, before, finer, factor, k0, k1, when, c3, width, row_run, r0, r1,
    column_run, q0, q1,
    R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, BR: tl.constexpr, ROT: tl.constexpr, SIGNED: tl.constexpr,
    RULE: tl.constexpr, ROUND: tl.constexpr, STD: tl.constexpr, CLIPS: tl.constexpr, READ: tl.constexpr,
    P: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr, QBR: tl.constexpr, QBC: tl.constexpr, QE8M0: tl.constexpr,
    BACK: tl.constexpr, FLIPS: tl.constexpr, UNIT: tl.constexpr, CODES: tl.constexpr, CARRIER: tl.constexpr,
    MASK: tl.constexpr, ASM: tl.constexpr, AGAIN: tl.constexpr, SPREAD: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """Tile number `tile` of `power_kernel`. largest: the scale byte at the top of the FP8 type;  count: of losses."""
    G: tl.constexpr = R * N // E
    NARROW: tl.constexpr = (CARRIER == 5) | (CARRIER == 4)
    PLAIN: tl.constexpr = NARROW and RULE <= 3 and not (CODES or CLIPS)
    QUICK: tl.constexpr = PLAIN and not AGAIN
    across = tl.cdiv(cols, N)
    row, col = tile // across * R, tile % across * N
    if SPREAD:  # early: nobody waits for it; a value of before costs an atomic in vain
        seen_top, seen_depth = tl.load(spread), tl.load(spread + 1)
    if READ == 4:
        words, scale = reads.held_codes(x, stride, qscales, row, col, rows, cols, R, N, W)
        byte = tl.zeros((G // 8,), tl.int32)
        deep = tl.zeros((G // 8,), tl.int32)
        if QUICK:
            for i in range(4):
                low, high = reads.two_rows(words, scale, i, ASM)
                for half in tl.static_range(2):
                    y = high if half else low
                    if not UNIT:
                        y = y * tl.load(qglobal)
                    at = i + 4 * half
                    # [rows, cols] is [rows / 8, 8 cols], too
                    more, deeper = _written_quickly(
                        y, largest, values, row // 8, at * cols + col, rows // 8, cols * 8, row + at, col, before, k0,
                        k1, when, c3, width, row_run, r0, r1, column_run, q0, q1,
                        R // 8, N, E, BR, RULE, ROUND, 8, EVEN, CARRIER, ASM,
                    )  # fmt: skip
                    byte, deep = tl.maximum(byte, more), tl.maximum(deep, deeper)
        else:
            for i in range(8):
                y = a.e2m1_signed(words << (28 - 4 * i)) * scale
                if not UNIT:
                    y = y * tl.load(qglobal)
                more, deeper = _written(
                    y, largest, count, codes, scales, values, inside, row // 8, i * cols + col, rows // 8, cols * 8,
                    row + i, col, before, finer, factor, k0, k1, when, c3, width, row_run, r0, r1, column_run, q0, q1,
                    R // 8, N, E, BR, RULE, ROUND, STD, CLIPS, 8, EVEN, CODES, CARRIER, MASK, ASM, AGAIN, SPREAD,
                )  # fmt: skip
                byte, deep = tl.maximum(byte, more), tl.maximum(deep, deeper)
    else:
        if READ == 3:
            y = reads.turned_codes(
                x, stride, qscales, qglobal, back, table, signs, row, col, rows, cols, R, N, EVEN, FLIPS, SIGNED,
                ASM, QUICK,
            )  # fmt: skip
            y = a.rotate(y, G, E, ROT)
        elif READ <= 1 and LINE > 0 and not AGAIN:
            y = reads.columns(x, LINE, row, col, R, N, E, P, W) if READ else reads.rows(x, LINE, row, col, R, N, E, P)
            y = p._rotated(y, signs, R, N, E, ROT, SIGNED)
        else:
            y = p._tile(
                x, stride, qscales, qglobal, signs, row, col, rows, cols,
                R, N, E, ROT, SIGNED, READ, P, W, EVEN, QBR, QBC, QE8M0, BACK, back, nth,
            )  # fmt: skip
        if QUICK:
            byte, deep = _written_quickly(
                y, largest, values, row, col, rows, cols, row, col, before, k0, k1, when, c3, width, row_run, r0, r1,
                column_run, q0, q1, R, N, E, BR, RULE, ROUND, 1, EVEN, CARRIER, ASM,
            )  # fmt: skip
        else:
            byte, deep = _written(
                y, largest, count, codes, scales, values, inside, row, col, rows, cols, row, col, before, finer, factor,
                k0, k1, when, c3, width, row_run, r0, r1, column_run, q0, q1,
                R, N, E, BR, RULE, ROUND, STD, CLIPS, 1, EVEN, CODES, CARRIER, MASK, ASM, AGAIN, SPREAD,
            )  # fmt: skip
    HIGHEST: tl.constexpr = 13 if CARRIER == 5 else 6
    LOWEST: tl.constexpr = -15 if CARRIER == 5 else -8
    if NARROW:  # noqa: SIM102 (a constant, and a condition at run time)
        if tile == 0:
            tl.store(factor_of, tl.load(shared) * (a.decode_e8m0(tl.minimum(largest, 254)) * (2.0**-HIGHEST)))
    if NARROW and not AGAIN:
        flushed = HIGHEST - LOWEST + 256 - largest  # what is deeper does not fit
        limit = tl.minimum(flushed, quick.UNUSUAL) if QUICK else flushed
        known, deepest = tl.load(memory + 1), limit
        if SPREAD:
            known, deepest = tl.minimum(known, seen_top), tl.minimum(limit, seen_depth)
    elif SPREAD:
        known, deepest = seen_top, seen_depth
    if (NARROW and not AGAIN) or SPREAD:
        news = (byte > known) | (deep > deepest)
        if tl.max(news.to(tl.int32), axis=0) > 0:  # of few tiles
            top, depth = tl.max(byte, axis=0), tl.max(deep, axis=0)
            if NARROW and not AGAIN:
                tl.atomic_max(memory + 1, top, sem="relaxed")
                if (top > largest) | (depth > limit):
                    tl.atomic_add(count, 1, sem="relaxed")
            if SPREAD:  # noqa: SIM102 (a constant, and a condition at run time)
                if (not QUICK) or depth <= quick.UNUSUAL:  # else it is told when it is written again
                    tl.atomic_max(spread, top, sem="relaxed")
                    tl.atomic_max(spread + 1, depth, sem="relaxed")


@triton.jit
def _matrix(
    program, tile,
    x, stride, qscales, qglobal, back, nth, rows, cols, table, signs, codes, scales, values, inside, memory, shared,
    factor_of, lost, spread, before, finer, factor, k0, k1, when, c3, width, row_run, r0, r1, column_run, q0, q1,
    R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, BR: tl.constexpr, ROT: tl.constexpr, SIGNED: tl.constexpr,
    RULE: tl.constexpr, ROUND: tl.constexpr, STD: tl.constexpr, CLIPS: tl.constexpr, READ: tl.constexpr,
    P: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr, QBR: tl.constexpr, QBC: tl.constexpr, QE8M0: tl.constexpr,
    BACK: tl.constexpr, FLIPS: tl.constexpr, UNIT: tl.constexpr, CODES: tl.constexpr, CARRIER: tl.constexpr,
    MASK: tl.constexpr, ASM: tl.constexpr, AGAIN: tl.constexpr, SPREAD: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """Tile number `tile` of a matrix, or if AGAIN what program number `program` does of it; see `power_kernel`."""
    if AGAIN:
        wrong, top = tl.load(memory + 2), tl.load(memory + 1)
        end = tl.where(wrong != 0, tl.cdiv(rows, R) * tl.cdiv(cols, N), 0)
        for tile in range(program, end, tl.num_programs(0)):
            _tile(
                tile, top, memory + 5, x, stride, qscales, qglobal, back, nth, rows, cols, table,
                signs, codes, scales, values, inside, memory, shared, factor_of, spread, before, finer, factor, k0, k1,
                when, c3, width, row_run, r0, r1, column_run, q0, q1, R, N, E, BR, ROT, SIGNED, RULE, ROUND, STD, CLIPS,
                READ, P, W, EVEN, QBR, QBC, QE8M0, BACK, FLIPS, UNIT, CODES, CARRIER, MASK, ASM, AGAIN, SPREAD, LINE,
            )  # fmt: skip
        if wrong == 0:  # the one that is there waits for nobody
            if program == 0:
                tl.store(memory, top)
                tl.store(memory + 1, 0)
                tl.store(memory + 3, 0)
        else:
            tl.debug_barrier()
            if tl.atomic_add(memory + 4, 1) == tl.num_programs(0) - 1:  # the last: for the next matrix
                tl.atomic_xchg(memory, tl.atomic_xchg(memory + 1, 0))
                count = tl.atomic_xchg(memory + 5, 0)
                tl.store(memory + 2, 0)
                tl.store(memory + 3, count)
                tl.store(memory + 4, 0)
                tl.atomic_max(lost, count)
    else:
        largest = tl.minimum(tl.load(memory) + HEADROOM, 254) if (CARRIER == 5) | (CARRIER == 4) else 0
        _tile(
            tile, largest, memory + 2, x, stride, qscales, qglobal, back, nth, rows, cols, table, signs,
            codes, scales, values, inside, memory, shared, factor_of, spread, before, finer, factor, k0, k1, when, c3,
            width, row_run, r0, r1, column_run, q0, q1, R, N, E, BR, ROT, SIGNED, RULE, ROUND, STD, CLIPS, READ, P, W,
            EVEN, QBR, QBC, QE8M0, BACK, FLIPS, UNIT, CODES, CARRIER, MASK, ASM, AGAIN, SPREAD, LINE,
        )  # fmt: skip


@triton.jit(do_not_specialize=PLACE)
def power_kernel(
    x, stride, qscales, qglobal, back, nth, rows, cols, table, signs, codes, scales, values, inside, memory, shared,
    factor_of, lost, spread, before, finer, factor, k0, k1, when, c3, width, row_run, r0, r1, column_run, q0, q1,
    R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, BR: tl.constexpr, ROT: tl.constexpr, SIGNED: tl.constexpr,
    RULE: tl.constexpr, ROUND: tl.constexpr, STD: tl.constexpr, CLIPS: tl.constexpr, READ: tl.constexpr,
    P: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr, QBR: tl.constexpr, QBC: tl.constexpr, QE8M0: tl.constexpr,
    BACK: tl.constexpr, FLIPS: tl.constexpr, UNIT: tl.constexpr, CODES: tl.constexpr, CARRIER: tl.constexpr,
    MASK: tl.constexpr, ASM: tl.constexpr, AGAIN: tl.constexpr, SPREAD: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """Tiles of one matrix: codes and scale bytes if CODES, values if CARRIER (16: bf16; 5, 4: e5m2, e4m3), a bit for
    each element that is not clipped if MASK. RULE and ROUND: of `programs._side`. LINE: the stride of a matrix of
    whole tiles, or 0.

    shared      [] fp32 that all values have as a factor;  factor_of   it becomes that of the FP8 values
    lost        [] int32, becomes the most elements lost so far
    spread      if SPREAD: [2] int32, become the largest scale byte so far, and 256 less the smallest of a block that is
                not all zeros
    """
    _matrix(
        tl.program_id(0), tl.program_id(0),
        x, stride, qscales, qglobal, back, nth, rows, cols, table, signs, codes, scales, values, inside, memory,
        shared, factor_of, lost, spread, before, finer, factor, k0, k1, when, c3, width, row_run, r0, r1, column_run,
        q0, q1,
        R, N, E, BR, ROT, SIGNED, RULE, ROUND, STD, CLIPS, READ, P, W, EVEN, QBR, QBC, QE8M0, BACK, FLIPS, UNIT, CODES,
        CARRIER, MASK, ASM, AGAIN, SPREAD, LINE,
    )  # fmt: skip


@triton.jit(do_not_specialize=[*PLACE, *(f"{name}_2" for name in PLACE)])
def power_pair_kernel(
    x, stride, qscales, qglobal, back, nth, rows, cols, table, signs, codes, scales, values, inside, memory, shared,
    factor_of, lost, spread, before, finer, factor, k0, k1, when, c3, width, row_run, r0, r1, column_run, q0, q1,
    x_2, stride_2, qscales_2, qglobal_2, back_2, root_2, rows_2, cols_2, table_2, signs_2, codes_2, scales_2, values_2,
    inside_2, memory_2, shared_2, factor_of_2, lost_2, spread_2, before_2, finer_2, factor_2, k0_2, k1_2, when_2, c3_2,
    width_2, row_run_2, r0_2, r1_2, column_run_2, q0_2, q1_2,
    R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, BR: tl.constexpr, ROT: tl.constexpr, SIGNED: tl.constexpr,
    RULE: tl.constexpr, ROUND: tl.constexpr, STD: tl.constexpr, CLIPS: tl.constexpr, READ: tl.constexpr,
    P: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr, QBR: tl.constexpr, QBC: tl.constexpr, QE8M0: tl.constexpr,
    BACK: tl.constexpr, FLIPS: tl.constexpr, UNIT: tl.constexpr, CODES: tl.constexpr, CARRIER: tl.constexpr,
    MASK: tl.constexpr, ASM: tl.constexpr, AGAIN: tl.constexpr, SPREAD: tl.constexpr, LINE: tl.constexpr,
    R_2: tl.constexpr, N_2: tl.constexpr, E_2: tl.constexpr, BR_2: tl.constexpr, ROT_2: tl.constexpr,
    SIGNED_2: tl.constexpr, RULE_2: tl.constexpr, ROUND_2: tl.constexpr, STD_2: tl.constexpr, CLIPS_2: tl.constexpr,
    READ_2: tl.constexpr, P_2: tl.constexpr, W_2: tl.constexpr, EVEN_2: tl.constexpr, QBR_2: tl.constexpr,
    QBC_2: tl.constexpr, QE8M0_2: tl.constexpr, BACK_2: tl.constexpr, FLIPS_2: tl.constexpr, UNIT_2: tl.constexpr,
    CODES_2: tl.constexpr, CARRIER_2: tl.constexpr, MASK_2: tl.constexpr, ASM_2: tl.constexpr, SPREAD_2: tl.constexpr,
    LINE_2: tl.constexpr,
):  # fmt: skip
    """A matrix and its transpose: a program makes a tile of either from the same part of the memory, which it reads
    from a cache the second time. Parameters are those of `power_kernel`, twice; R = N_2, N = R_2.
    """
    program = tl.program_id(0)
    across = tl.cdiv(cols, N)
    _matrix(
        program, program,
        x, stride, qscales, qglobal, back, nth, rows, cols, table, signs, codes, scales, values, inside, memory,
        shared, factor_of, lost, spread, before, finer, factor, k0, k1, when, c3, width, row_run, r0, r1, column_run,
        q0, q1,
        R, N, E, BR, ROT, SIGNED, RULE, ROUND, STD, CLIPS, READ, P, W, EVEN, QBR, QBC, QE8M0, BACK, FLIPS, UNIT, CODES,
        CARRIER, MASK, ASM, AGAIN, SPREAD, LINE,
    )  # fmt: skip
    _matrix(
        program, program % across * tl.cdiv(cols_2, N_2) + program // across,
        x_2, stride_2, qscales_2, qglobal_2, back_2, root_2, rows_2, cols_2, table_2, signs_2, codes_2, scales_2,
        values_2, inside_2, memory_2, shared_2, factor_of_2, lost_2, spread_2, before_2, finer_2, factor_2, k0_2, k1_2,
        when_2, c3_2, width_2, row_run_2, r0_2, r1_2, column_run_2, q0_2, q1_2,
        R_2, N_2, E_2, BR_2, ROT_2, SIGNED_2, RULE_2, ROUND_2, STD_2, CLIPS_2, READ_2, P_2, W_2, EVEN_2, QBR_2, QBC_2,
        QE8M0_2, BACK_2, FLIPS_2, UNIT_2, CODES_2, CARRIER_2, MASK_2, ASM_2, AGAIN, SPREAD_2, LINE_2,
    )  # fmt: skip
