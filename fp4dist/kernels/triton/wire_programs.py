# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# Triton's own language: its kernels' parameters have no types, branches on constants look like run-time ones.
"""Device code of the wire codec: one program encodes a record in one pass, or sums records of several senders.

A record of C elements lies in registers as [G, E], G = C / E, so that a thread holds whole runs of E elements and the
record's scale is known before a byte is written. What the bytes mean: `fp4dist.comm.records`.

KIND    0 nvfp4, 1 mxfp4, 2 fp8, 3 int4;  ROUND  0 nearest, 1 stochastic, 2 nearest with corrected scales
P       elements that a thread reads or writes at once: 16 bytes
table   int64 [number, 4]: see each kernel. Places and numbers of elements count UNIT of them: what a multiplication
        by a constant shows to the compiler can be read in vectors
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp4dist.kernels.triton import arithmetic as a

_NOISE = [
    "k0",
    "k1",
    "rank",
    "step",
    "rounding",
    "sign_rank",
    "signs",
    "word0",
    "number",
    "all_records",
    "source_words",
]


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
def _read(x, offset, count, C: tl.constexpr, E: tl.constexpr, P: tl.constexpr):
    """[G, E] fp32 of `count` elements of x from `offset`; 0 beyond."""
    i = _indices(C, E, P)
    y = tl.reshape(_swapped(tl.load(x + offset + i, mask=i < count, other=0.0)), (C // E, E))
    if y.dtype == tl.bfloat16:  # by bits: the interpreter's cast loses subnormal numbers
        y = a.floats(y.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return y


@triton.jit
def _write(out, offset, count, y, C: tl.constexpr, E: tl.constexpr, P: tl.constexpr, NATIVE: tl.constexpr):
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
def _flipped(y, k0, k1, rank, step, signs, C: tl.constexpr, RUN: tl.constexpr, ROT: tl.constexpr):
    """[C/RUN, RUN] with the signs of its groups of ROT."""
    N: tl.constexpr = RUN if RUN < 32 else 32  # pyright: ignore[reportAssignmentType]
    w0, w1, w2, w3 = a.philox_of((step * 0).to(tl.uint32), k0, k1, rank, step, signs)
    i = tl.arange(0, C // N) * N % ROT
    word = tl.where(i < 32, w0, tl.where(i < 64, w1, tl.where(i < 96, w2, w3))).to(tl.int32, bitcast=True) >> (i & 31)
    j = tl.arange(0, N)
    z = a.bits(tl.reshape(y, (C // N, N))) ^ ((word[:, None] << (31 - j)[None, :]) & -2147483648)
    return tl.reshape(a.floats(z), (C // RUN, RUN))


@triton.jit
def _rotated(y, C: tl.constexpr, RUN: tl.constexpr, ROT: tl.constexpr):
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
def _tag(words, stored, w0, w1, w2, M: tl.constexpr, BLOCKS: tl.constexpr, NATIVE: tl.constexpr):
    """int32 tag of a record's payload [G, M], of its scale bytes [G] where there are BLOCKS, and of the header."""
    G: tl.constexpr = words.shape[0]
    mixed = _sum_of(_mix(words, tl.arange(0, G)[:, None] * M + tl.arange(0, M)[None, :]), NATIVE)
    if BLOCKS:
        mixed += _mix(stored, tl.arange(0, G) + G * M)
    found = _sum_of(mixed, NATIVE)
    return found + _mix(w0, w0 * 0 + 16777216) + _mix(w1, w1 * 0 + 16777217) + _mix(w2, w2 * 0 + 16777218)


@triton.jit
def _tag_of(record, w0, w1, w2, G: tl.constexpr, M: tl.constexpr, BLOCKS: tl.constexpr, NATIVE: tl.constexpr):
    """The tag of a record in memory."""
    words = tl.load(record + 4 + tl.arange(0, G)[:, None] * M + tl.arange(0, M)[None, :])
    stored = tl.arange(0, G)
    if BLOCKS:
        stored = tl.load((record + 4 + G * M).to(tl.pointer_type(tl.uint8)) + stored).to(tl.int32)
    return _tag(words, stored, w0, w1, w2, M, BLOCKS, NATIVE)


@triton.jit
def _element_thresholds(y, number, k0, k1, rank, step, rounding, C: tl.constexpr, E: tl.constexpr):
    """[G, E] thresholds of `arithmetic.stochastic`; one counter for eight elements.

    A condition that is never true ties the counters to y, so that each thread draws what its own elements need.
    """
    index = tl.arange(0, C // E)[:, None] * (E // 8) + tl.arange(0, E // 8)[None, :]
    index = (index + number * (C // 8)).to(tl.uint32)
    index = tl.where((a.every_eighth(y, C // E, E) | 1) == 0, 0, index)
    w0, w1, w2, w3 = a.philox_of(index, k0, k1, rank, step, rounding)
    return a.thresholds(w0, w1, w2, w3, C // E, E)


@triton.jit
def _scale_words(number, k0, k1, rank, step, rounding, G: tl.constexpr):
    """[G] uint32, one word a block; one counter for four blocks."""
    index = (tl.arange(0, G // 4) + number * (G // 4)).to(tl.uint32)
    w0, w1, w2, w3 = a.philox_of(index, k0, k1, rank, step, rounding)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (G,))


@triton.jit
def _packed_bytes(codes, G: tl.constexpr, E: tl.constexpr):
    """[G, E] int32 below 256 -> [G, E/4] words."""
    even, odd = tl.split(tl.reshape(codes, (G, E // 4, 2, 2)))
    c0, c2 = tl.split(even)
    c1, c3 = tl.split(odd)
    return c0 | (c1 << 8) | (c2 << 16) | (c3 << 24)


@triton.jit
def _e4m3_code(u, threshold, ROUND: tl.constexpr):
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


@triton.jit
def _encode(
    y, count, place, record, k0, k1, rank, step, rounding, sign_rank, signs, word0, numerator, inverse_v, v, shrink,
    C: tl.constexpr, E: tl.constexpr, RUN: tl.constexpr, KIND: tl.constexpr, ROUND: tl.constexpr, ROT: tl.constexpr,
    TAG: tl.constexpr, LOG2C: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Write the record of y [C/RUN, RUN], 0 beyond `count`; place: its number among those of its message."""
    G: tl.constexpr = C // E
    M: tl.constexpr = E // 4 if KIND == 2 else E // 8
    BLOCKS: tl.constexpr = KIND < 2
    if ROT > 1:
        y = _rotated(_flipped(y, k0, k1, sign_rank, step, signs, C, RUN, ROT), C, RUN, ROT)
    y = tl.reshape(y, (G, E))
    found = a.largest(y, G, E)
    top = tl.max(a.bits(found), axis=0)
    amax = a.floats(top)
    if ROUND == 1:
        threshold = _element_thresholds(y, place, k0, k1, rank, step, rounding, C, E)
    if ROUND == 2:
        q = tl.div_rn(found, v)
        u = tl.abs(y) * tl.where(q < a.FLT_MIN, 0.0, tl.div_rn(1.0, q))[:, None]
        level, index = a.nearest(u)
        uc = a.row_tree_sum(u * level, G, E)
        s = tl.div_rn(a.row_tree_sum(u * u, G, E), uc)
        corrected = q * tl.where(uc == 0.0, 1.0, s)
        g = tl.div_rn(tl.max(corrected, axis=0), 256.0)
        g = tl.where(g == 0.0, 1.0, g)
        noise = _scale_words(place, k0, k1, rank, step, rounding, G)
        stored = a.encode_e4m3_stochastic(tl.div_rn(corrected, g), noise)
        words = a.pack(index, y, G, E, True)
    elif KIND == 0:
        s_enc = a.below(tl.div_rn(numerator, amax), a.FLT_MAX)
        s_enc = tl.where((amax == 0.0) | (s_enc == 0.0), 1.0, s_enc)
        g = tl.div_rn(1.0, s_enc)
        stored = a.encode_e4m3(found * (s_enc * inverse_v))
        multiplier = a.below(tl.div_rn(1.0, a.decode_e4m3(stored) * g), a.FLT_MAX)
        u = a.at_most(tl.abs(y * multiplier[:, None]), 6.0)
        if ROUND == 1:
            level, index = a.stochastic(u, threshold)
        else:
            level, index = a.nearest(u)
        words = a.pack(index, y, G, E, ROUND != 1)  # NaNs of any index become 0 below
    elif KIND == 1:
        stored = a.power_byte(found, 2, 0.0, 2, 0x400000)
        g = amax * 0.0 + 1.0
        multiplier = a.below(tl.div_rn(1.0, a.decode_e8m0(stored)), a.FLT_MAX)
        u = a.at_most(tl.abs(y * multiplier[:, None]), 6.0)
        if ROUND == 1:
            level, index = a.stochastic(u, threshold)
        else:
            level, index = a.nearest(u)
        words = a.pack(index, y, G, E, ROUND != 1)  # NaNs of any index become 0 below
    else:
        g = tl.div_rn(amax, v)
        g = tl.where(g == 0.0, 1.0, g)
        u = a.at_most(tl.abs(y * a.below(tl.div_rn(1.0, g), a.FLT_MAX)), v)
        stored = tl.zeros((G,), tl.int32)
        share = u
        if ROUND == 1:
            share = threshold.to(tl.float32) * 2.384185791015625e-07
        if KIND == 2:
            code = _e4m3_code(u, share, ROUND) | ((a.bits(y) >> 24) & 0x80)
            words = _packed_bytes(code, G, E)
        else:
            if ROUND == 1:
                low = tl.floor(u)
                code = low.to(tl.int32) + ((u - low) > share).to(tl.int32)
            else:
                code = a.bits(u + 12582912.0) & 0xF
            words = a.pack(code << 28, y, G, E, True)
    bad = top >= 0x7F800000
    words = tl.where(bad, 0, words)
    stored = tl.where(bad, 0, stored)
    w0 = word0 | bad.to(tl.int32)
    w1 = count | (LOG2C << 24)
    w2 = tl.where(bad, 0x7FC00000, a.bits(g * shrink))
    tl.store(record + 4 + tl.arange(0, G)[:, None] * M + tl.arange(0, M)[None, :], words)
    if BLOCKS:
        scales = (record + 4 + G * M).to(tl.pointer_type(tl.uint8))
        block = tl.arange(0, G) ^ (count >> 31)  # itself, but not seen as contiguous: threads store their own scales
        tl.store(scales + block, stored.to(tl.uint8))
    tag = w0 * 0
    if TAG:
        tag = _tag(words, stored, w0, w1, w2, M, BLOCKS, NATIVE)
    h = tl.arange(0, 4)
    tl.store(record + h, tl.where(h == 0, w0, tl.where(h == 1, w1, tl.where(h == 2, w2, tag))))


@triton.jit(do_not_specialize=_NOISE)
def encode_kernel(
    x, table, records, number, k0, k1, rank, step, rounding, sign_rank, signs, word0, numerator, inverse_v, v, shrink,
    C: tl.constexpr, E: tl.constexpr, RUN: tl.constexpr, P: tl.constexpr, KIND: tl.constexpr, ROUND: tl.constexpr,
    ROT: tl.constexpr, TAG: tl.constexpr, UNIT: tl.constexpr, WORDS: tl.constexpr, LOG2C: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """Encode `number` records. table: where the elements of each begin in x, how many, the record's number, its place
    among `records`.

    records   int32, WORDS of them a record;  numerator, inverse_v, v   of the scale rule;  shrink   1 / ROT
    """
    for turn in range(tl.cdiv(number - tl.program_id(0), tl.num_programs(0))):
        i = tl.program_id(0) + turn * tl.num_programs(0)
        offset = tl.load(table + i * 4) * UNIT
        count = tl.load(table + i * 4 + 1).to(tl.int32) * UNIT
        record = records + tl.load(table + i * 4 + 3) * WORDS
        _encode(
            _read(x, offset, count, C, RUN, P), count, tl.load(table + i * 4 + 2), record, k0, k1, rank, step,
            rounding, sign_rank, signs, word0, numerator, inverse_v, v, shrink, C, E, RUN, KIND, ROUND, ROT, TAG,
            LOG2C, NATIVE,
        )  # fmt: skip


@triton.jit
def _values(record, C: tl.constexpr, E: tl.constexpr, RUN: tl.constexpr, KIND: tl.constexpr):
    """[C/RUN, RUN] fp32 values of a record, in the basis that it is in."""
    G: tl.constexpr = C // RUN
    M: tl.constexpr = RUN // 4 if KIND == 2 else RUN // 8
    words = tl.load(record + 4 + tl.arange(0, G)[:, None, None] * M + tl.arange(0, M)[None, :, None])
    g = a.floats(tl.load(record + 2))
    if KIND == 2:
        code = tl.reshape(words << (24 - 8 * tl.arange(0, 4))[None, None, :], (G, RUN))
        magnitude = a.floats((code >> 4) & 0x07F00000) * 1.329227995784916e36
        y = a.floats(a.bits(magnitude) | (code & -2147483648)) * g
    elif KIND == 3:
        code = tl.reshape(words << (28 - 4 * tl.arange(0, 8))[None, None, :], (G, RUN))
        y = a.floats(a.bits(((code >> 28) & 7).to(tl.float32)) | (code & -2147483648)) * g
    else:
        scales = (record + 4 + G * M).to(tl.pointer_type(tl.uint8))
        byte = tl.load(scales + tl.arange(0, C // E)).to(tl.int32)
        scale = a.decode_e4m3(byte) if KIND == 0 else a.decode_e8m0(byte)
        y = tl.reshape(a.unpack(words, G, M), (C // E, E)) * scale[:, None] * g
        y = tl.reshape(y, (G, RUN))
    return y


@triton.jit
def _check(record, bad, place, count, word0, G: tl.constexpr, M: tl.constexpr, BLOCKS: tl.constexpr,
           TAG: tl.constexpr, LOG2C: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """The least `place` of a record that is not what it should be, into `bad`."""
    w0, w1, w2 = tl.load(record), tl.load(record + 1), tl.load(record + 2)
    wrong = ((w0 & -2) != word0) | (w1 != (count | (LOG2C << 24)))
    if TAG:
        wrong = wrong | (tl.load(record + 3) != _tag_of(record, w0, w1, w2, G, M, BLOCKS, NATIVE))
    if wrong:
        tl.atomic_min(bad, place)


@triton.jit
def _sum(
    record, bad, position, count, own, own_offset, ranks, all_records, source_words, k0, k1, step, signs, word0,
    C: tl.constexpr, E: tl.constexpr, RUN: tl.constexpr, P_OWN: tl.constexpr, KIND: tl.constexpr, ROT: tl.constexpr,
    SOURCES: tl.constexpr, PER_RANK: tl.constexpr, OWN: tl.constexpr, CHECK: tl.constexpr, TAG: tl.constexpr,
    LOG2C: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """[C/RUN, RUN] own + the sum of SOURCES records, turned back; the first at `record`."""
    M: tl.constexpr = E // 4 if KIND == 2 else E // 8
    y = _values(record, C, E, RUN, KIND)
    if PER_RANK:
        y = _flipped(_rotated(y, C, RUN, ROT), k0, k1, tl.load(ranks), step, signs, C, RUN, ROT)
    if CHECK:
        _check(record, bad, position.to(tl.int32), count, word0, C // E, M, KIND < 2, TAG, LOG2C, NATIVE)
    for s in range(1, SOURCES):
        other = record + source_words.to(tl.int64) * s
        z = _values(other, C, E, RUN, KIND)
        if PER_RANK:
            z = _flipped(_rotated(z, C, RUN, ROT), k0, k1, tl.load(ranks + s), step, signs, C, RUN, ROT)
        if CHECK:
            place = s * all_records + position.to(tl.int32)
            _check(other, bad, place, count, word0, C // E, M, KIND < 2, TAG, LOG2C, NATIVE)
        y += z
    if (ROT > 1) & (not PER_RANK):
        y = _flipped(_rotated(y, C, RUN, ROT), k0, k1, tl.load(ranks), step, signs, C, RUN, ROT)
    if OWN:
        y += _read(own, own_offset, count, C, RUN, P_OWN)
    return y


@triton.jit(do_not_specialize=_NOISE)
def sum_kernel(
    out, own, records, table, ranks, bad, number, all_records, source_words, k0, k1, step, signs, word0, factor,
    C: tl.constexpr, E: tl.constexpr, RUN: tl.constexpr, P_OUT: tl.constexpr, P_OWN: tl.constexpr, KIND: tl.constexpr,
    ROT: tl.constexpr, SOURCES: tl.constexpr, PER_RANK: tl.constexpr, OWN: tl.constexpr, CHECK: tl.constexpr,
    TAG: tl.constexpr, UNIT: tl.constexpr, WORDS: tl.constexpr, LOG2C: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Out = (own + sum of `number` records of SOURCES senders, turned back) * factor.

    table          where the elements of each record go in out, how many they are, where they are in own, the record's
                   place among those of a sender
    records        int32: all records of the first sender, `source_words` further those of the second ...
    ranks          int32 that the senders' signs are keyed by: one each under PER_RANK, else one for all
    bad            int32: sender * all_records + record of the first wrong one, under CHECK
    """
    for turn in range(tl.cdiv(number - tl.program_id(0), tl.num_programs(0))):
        i = tl.program_id(0) + turn * tl.num_programs(0)
        offset = tl.load(table + i * 4) * UNIT
        count = tl.load(table + i * 4 + 1).to(tl.int32) * UNIT
        position = tl.load(table + i * 4 + 3)
        y = _sum(
            records + position * WORDS, bad, position, count, own, tl.load(table + i * 4 + 2) * UNIT, ranks,
            all_records, source_words, k0, k1, step, signs, word0, C, E, RUN, P_OWN, KIND, ROT, SOURCES, PER_RANK,
            OWN, CHECK, TAG, LOG2C, NATIVE,
        )  # fmt: skip
        _write(out, offset, count, y * factor, C, RUN, P_OUT, NATIVE)


@triton.jit(do_not_specialize=[*_NOISE, "out_signs"])
def recode_kernel(
    messages, own, records, table, ranks, bad, number, all_records, source_words, k0, k1, step, signs, word0, factor,
    rank, rounding, sign_rank, out_signs, numerator, inverse_v, v, shrink,
    C: tl.constexpr, E: tl.constexpr, RUN: tl.constexpr, P_OWN: tl.constexpr, KIND: tl.constexpr, ROUND: tl.constexpr,
    ROT: tl.constexpr, SOURCES: tl.constexpr, PER_RANK: tl.constexpr, OWN: tl.constexpr, CHECK: tl.constexpr,
    TAG: tl.constexpr, UNIT: tl.constexpr, WORDS: tl.constexpr, LOG2C: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """What `sum_kernel` would write, as the records that `encode_kernel` would make of it in fp32.

    table   the number of each record, its elements, where they are in own, its place in `records` and in `messages`
    """
    for turn in range(tl.cdiv(number - tl.program_id(0), tl.num_programs(0))):
        i = tl.program_id(0) + turn * tl.num_programs(0)
        count = tl.load(table + i * 4 + 1).to(tl.int32) * UNIT
        position = tl.load(table + i * 4 + 3)
        y = _sum(
            records + position * WORDS, bad, position, count, own, tl.load(table + i * 4 + 2) * UNIT, ranks,
            all_records, source_words, k0, k1, step, signs, word0, C, E, RUN, P_OWN, KIND, ROT, SOURCES, PER_RANK,
            OWN, CHECK, TAG, LOG2C, NATIVE,
        )  # fmt: skip
        inside = tl.arange(0, C // RUN)[:, None] * RUN + tl.arange(0, RUN)[None, :] < count
        _encode(
            tl.where(inside, y * factor, 0.0), count, tl.load(table + i * 4), messages + position * WORDS, k0, k1, rank,
            step, rounding, sign_rank, out_signs, word0, numerator, inverse_v, v, shrink, C, E, RUN, KIND, ROUND, ROT,
            TAG, LOG2C, NATIVE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["number", "source_elements", "own_at"])
def plain_kernel(
    out, own, messages, table, number, source_elements, own_at, factor, C: tl.constexpr, P_OUT: tl.constexpr,
    P_OWN: tl.constexpr, P: tl.constexpr, SOURCES: tl.constexpr, OWN: tl.constexpr, UNIT: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """Out = (the sum over senders of their elements, own as number `own_at` among them) * factor, in fp32.

    table      where C elements go in out, how many they are, where they are in own, where in a sender's message
    messages   the first sender's elements, `source_elements` further those of the second ...
    """
    for turn in range(tl.cdiv(number - tl.program_id(0), tl.num_programs(0))):
        i = tl.program_id(0) + turn * tl.num_programs(0)
        offset = tl.load(table + i * 4) * UNIT
        count = tl.load(table + i * 4 + 1).to(tl.int32) * UNIT
        place = tl.load(table + i * 4 + 3) * UNIT
        y = tl.full((C // 16, 16), -0.0, tl.float32)  # -0 + x is x, for every x
        if OWN:
            mine = _read(own, tl.load(table + i * 4 + 2) * UNIT, count, C, 16, P_OWN)
        for s in range(SOURCES):
            if OWN:
                y += tl.where(own_at == s, mine, -0.0)
            y += _read(messages + source_elements.to(tl.int64) * s, place, count, C, 16, P)
        if OWN:
            y += tl.where(own_at >= SOURCES, mine, -0.0)
        _write(out, offset, count, y * factor, C, 16, P_OUT, NATIVE)
