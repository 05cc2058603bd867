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
from fp4dist.kernels.triton import wire_records as r

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
        y = r.rotated(r.flipped(y, k0, k1, sign_rank, step, signs, C, RUN, ROT), C, RUN, ROT)
    y = tl.reshape(y, (G, E))
    found = a.largest(y, G, E)
    top = tl.max(a.bits(found), axis=0)
    amax = a.floats(top)
    if ROUND == 1:
        threshold = r.element_thresholds(y, place, k0, k1, rank, step, rounding, C, E)
    if ROUND == 2:
        q = tl.div_rn(found, v)
        u = tl.abs(y) * tl.where(q < a.FLT_MIN, 0.0, tl.div_rn(1.0, q))[:, None]
        level, index = a.nearest(u)
        uc = a.row_tree_sum(u * level, G, E)
        s = tl.div_rn(a.row_tree_sum(u * u, G, E), uc)
        corrected = q * tl.where(uc == 0.0, 1.0, s)
        g = tl.div_rn(tl.max(corrected, axis=0), 256.0)
        g = tl.where(g == 0.0, 1.0, g)
        noise = r.scale_words(place, k0, k1, rank, step, rounding, G)
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
            code = r.e4m3_code(u, share, ROUND) | ((a.bits(y) >> 24) & 0x80)
            words = a.words_of_bytes(code, G, E)
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
        tag = r.tag(words, stored, w0, w1, w2, M, BLOCKS, NATIVE)
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
            r.read(x, offset, count, C, RUN, P), count, tl.load(table + i * 4 + 2), record, k0, k1, rank, step,
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
        wrong = wrong | (tl.load(record + 3) != r.tag_of(record, w0, w1, w2, G, M, BLOCKS, NATIVE))
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
        y = r.flipped(r.rotated(y, C, RUN, ROT), k0, k1, tl.load(ranks), step, signs, C, RUN, ROT)
    if CHECK:
        _check(record, bad, position.to(tl.int32), count, word0, C // E, M, KIND < 2, TAG, LOG2C, NATIVE)
    for s in range(1, SOURCES):
        other = record + source_words.to(tl.int64) * s
        z = _values(other, C, E, RUN, KIND)
        if PER_RANK:
            z = r.flipped(r.rotated(z, C, RUN, ROT), k0, k1, tl.load(ranks + s), step, signs, C, RUN, ROT)
        if CHECK:
            place = s * all_records + position.to(tl.int32)
            _check(other, bad, place, count, word0, C // E, M, KIND < 2, TAG, LOG2C, NATIVE)
        y += z
    if (ROT > 1) & (not PER_RANK):
        y = r.flipped(r.rotated(y, C, RUN, ROT), k0, k1, tl.load(ranks), step, signs, C, RUN, ROT)
    if OWN:
        y += r.read(own, own_offset, count, C, RUN, P_OWN)
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
        r.write(out, offset, count, y * factor, C, RUN, P_OUT, NATIVE)


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
            mine = r.read(own, tl.load(table + i * 4 + 2) * UNIT, count, C, 16, P_OWN)
        for s in range(SOURCES):
            if OWN:
                y += tl.where(own_at == s, mine, -0.0)
            y += r.read(messages + source_elements.to(tl.int64) * s, place, count, C, 16, P)
        if OWN:
            y += tl.where(own_at >= SOURCES, mine, -0.0)
        r.write(out, offset, count, y * factor, C, 16, P_OUT, NATIVE)
