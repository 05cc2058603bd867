"""The bytes of a record, so that a receiver can check what it was sent.

    bytes 0-15   header: four little-endian 32-bit words
      word 0     bits 31-16 0xF4D1; 15-12 version 1; 11-8 kind (nvfp4 0, mxfp4 1, fp8 2, int4 3); 6 signs per rank;
                 5-4 rotation (none 0, 32 1, 128 2); 3-2 rounding (nearest 0, stochastic 1, eden 2); 1 tagged;
                 0 an element was not finite: codes and scales are 0, the record's scale is NaN
      word 1     bits 31-24 log2 of the record's elements C; 23-0 elements that are not padding
      word 2     fp32 scale g of the record, the rotation's 1/size in it
      word 3     tag, or 0
    payload      C/2 bytes, element 2j in the low nibble, 2j + 1 in the high one; fp8: C bytes
    scales       nvfp4: C/16 bytes E4M3; mxfp4: C/32 bytes E8M0; else none

Value of element i, in the rotated basis: (decode(code) * decode(scale)) * g, both products in fp32; back in the
original basis: +-1 butterflies, then the signs. Codes are those of `fp4dist.numerics.codes`.

Tag: the sum modulo 2^32 of mix(value, index) over the payload's 32-bit words (index from 0), the scale bytes (index on
from there) and header words 0, 1 and 2 (index 2^24, 2^24 + 1, 2^24 + 2). mix: v ^= index * 0x9E3779B9;
v *= 0x85EBCA6B; v ^= v >> 15; v *= 0xC2B2AE35. Each unit is mixed by a bijection, so any one changed unit changes it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp4dist.errors import WireError
from fp4dist.spec.wire import HEADER, Wire

MAGIC, VERSION = 0xF4D1, 1
KINDS = {"nvfp4": 0, "mxfp4": 1, "fp8": 2, "int4": 3}
ROUNDINGS = {"nearest": 0, "stochastic": 1, "eden": 2}
ROTATIONS = {0: 0, 32: 1, 128: 2}
NOT_FINITE, TAGGED = 1, 2
MASK = 0xFFFFFFFF
HEADER_INDEX = 1 << 24  # of header word 0 in a tag


def first_word(wire: Wire) -> int:
    """Header word 0 of a record whose elements are all finite."""
    flags = (TAGGED if wire.tag else 0) | ROUNDINGS[wire.rounding or ""] << 2 | ROTATIONS[wire.rotation or 0] << 4
    flags |= (wire.signs == "per_rank") << 6
    return MAGIC << 16 | VERSION << 12 | KINDS[wire.kind] << 8 | flags


def as_int32(word: int) -> int:
    """The int32 of the same 32 bits."""
    return word - (1 << 32) if word >= 1 << 31 else word


def assemble(payload: Tensor, scales: Tensor, g: Tensor, counts: Tensor, chunk: int, wire: Wire) -> Tensor:
    """[m, record_bytes] uint8.

    payload   [m, payload bytes] uint8;  scales  [m, scale bytes] uint8
    g         [m] fp32, NaN where something was not finite
    counts    [m] int64 elements that are not padding
    """
    m = payload.shape[0]
    header = torch.zeros((m, 4), dtype=torch.int32, device=payload.device)
    header[:, 0] = as_int32(first_word(wire))
    header[:, 0] |= g.isnan().to(torch.int32)
    header[:, 1] = (counts | (chunk.bit_length() - 1) << 24).to(torch.int32)
    header[:, 2] = torch.where(g.isnan(), 0x7FC00000, g.view(torch.int32))  # one NaN of many
    records = torch.cat((header.view(torch.uint8), payload, scales), dim=1)
    if wire.tag:
        records[:, 12:16] = as_words(tags(records, wire, chunk)).view(torch.uint8).reshape(m, 4)
    return records


def as_words(values: Tensor) -> Tensor:
    """Int64 in [0, 2^32) -> int32 of the same bits."""
    return torch.where(values >= 1 << 31, values - (1 << 32), values).to(torch.int32).contiguous()


def tags(records: Tensor, wire: Wire, chunk: int) -> Tensor:
    """[m] int64 tags in [0, 2^32) of records [m, record_bytes]."""
    words = records[:, HEADER : HEADER + wire.payload_bytes(chunk)].contiguous().view(torch.int32).to(torch.int64)
    scales = records[:, HEADER + wire.payload_bytes(chunk) :].to(torch.int64)
    header = records[:, :12].contiguous().view(torch.int32).to(torch.int64)
    total = _mixed(words, 0) + _mixed(scales, words.shape[1]) + _mixed(header, HEADER_INDEX)
    return total & MASK


def _mixed(values: Tensor, first: int) -> Tensor:
    """[m] sums of mix over [m, n] values; see the module."""
    index = torch.arange(first, first + values.shape[1], device=values.device)
    v = (values & MASK) ^ (index * 0x9E3779B9 & MASK)
    v = v * 0x85EBCA6B & MASK  # a product's low 32 bits survive the wrap of int64
    v = (v ^ v >> 15) * 0xC2B2AE35 & MASK
    return v.sum(dim=1)


def check(records: Tensor, counts: Tensor, chunk: int, wire: Wire, place: str) -> None:
    """Raise WireError for the first record [m, record_bytes] that is not what a sender with the same `wire` makes.

    counts   [m] elements expected in each;  place   text: which rank and bucket they come from
    """
    header = records[:, :HEADER].contiguous().view(torch.int32).to(torch.int64) & MASK
    foreign = header[:, 0] & (MASK ^ NOT_FINITE) != first_word(wire)
    length = header[:, 1] != counts.to(header.device) | (chunk.bit_length() - 1) << 24
    damaged = tags(records, wire, chunk) != header[:, 3] if wire.tag else torch.zeros_like(foreign)
    bad = (foreign | length | damaged).nonzero()
    if bad.numel():
        i = int(bad[0])
        words = [int(w) for w in header[i]]
        raise WireError(f"{place}, record {i} of {len(records)}: {fault(words, int(counts[i]), chunk, wire)}")


def fault(words: list[int], count: int, chunk: int, wire: Wire) -> str:
    """What is wrong with the header `words` of a record, or that its bytes do not have its tag."""
    if words[0] >> 16 != MAGIC:
        return (
            f"begins with {words[0] >> 16:#06x}, a record with {MAGIC:#06x}: the sender sends something else here;"
            " use the same comm section, code and sizes on all ranks"
        )
    if words[0] & (MASK ^ NOT_FINITE) != first_word(wire):
        return (
            f"is of format {words[0]:#010x}, expected {first_word(wire):#010x} ({wire.label()}); use the same comm"
            " section and the same version on all ranks"
        )
    if words[1] != count | (chunk.bit_length() - 1) << 24:
        return (
            f"holds {words[1] & 0xFFFFFF} of {1 << (words[1] >> 24)} elements, expected {count} of {chunk}: the ranks"
            " disagree about sizes"
        )
    return "does not have its tag: its bytes changed on the way; check links and memory of the sender and this rank"
