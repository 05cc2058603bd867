"""The conversion instructions of PTX, from the text of the PTX ISA (9.1, `cvt`), on bit patterns: for verification.

Written after that text alone and shared with nothing here: `numerics.codes` defines what this package computes, this
module what the machine is documented to. Inputs are the bits of fp32 numbers, results packed words as the instruction
writes them.

What the text leaves open about `cvt.rs`: that the eight random bits meet the eight highest discarded bits, and which of
a pair's two bytes belongs to which operand (taken as for .f16x2: the first operand's is in the upper half of rbits).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

RANDOM_BITS = 8  # for each operand of cvt.rs...e2m1x4
# Lowest bit of what a, b, e, f are given: the upper bytes of both halves of rbits for a and b, the lower for e and f
BYTES_OF = (24, 8, 16, 0)
_HIDDEN, _FRACTION, _SIGN = 1 << 23, (1 << 23) - 1, 1 << 31
_INFINITY = 0x7F800000
Rounding = Literal["rn", "rs"]


@dataclass(frozen=True, slots=True)
class _Target:
    """A destination format: its bits, the exponent of its smallest normal number, its largest code and its NaN."""

    mantissa: int
    lowest: int
    sign: int
    largest: int
    largest_bits: int  # the same as fp32
    nan: int


_E2M1 = _Target(mantissa=1, lowest=0, sign=8, largest=7, largest_bits=0x40C00000, nan=7)  # NaN: positive MAX_NORM
_E4M3 = _Target(mantissa=3, lowest=-6, sign=0x80, largest=0x7E, largest_bits=0x43E00000, nan=0x7F)


def bits_of(x: Tensor) -> Tensor:
    """fp32 numbers -> int64 bit patterns in [0, 2**32)."""
    return x.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def cvt_rn_satfinite_e2m1x2(a: Tensor, b: Tensor) -> Tensor:
    """cvt.rn.satfinite.e2m1x2.f32 d, a, b: the byte d, a in its upper four bits."""
    return (_narrow(a, _E2M1) << 4) | _narrow(b, _E2M1)


def cvt_rs_satfinite_e2m1x4(a: Tensor, b: Tensor, e: Tensor, f: Tensor, rbits: Tensor) -> Tensor:
    """cvt.rs.satfinite.e2m1x4.f32 d, {a, b, e, f}, rbits: 16 bits, a highest. sm_100a and sm_103a alone have it."""
    word = torch.zeros_like(a)
    for operand, lowest in zip((a, b, e, f), BYTES_OF, strict=True):
        word = (word << 4) | _narrow(operand, _E2M1, (rbits >> lowest) & ((1 << RANDOM_BITS) - 1))
    return word


def cvt_rn_satfinite_e4m3x2(a: Tensor, b: Tensor) -> Tensor:
    """cvt.rn.satfinite.e4m3x2.f32 d, a, b: 16 bits, a in the upper eight; a NaN is 0x7f."""
    return (_narrow(a, _E4M3) << 8) | _narrow(b, _E4M3)


def cvt_satfinite_ue8m0x2(a: Tensor, b: Tensor, rounding: Literal["rz", "rp"]) -> Tensor:
    """cvt.{rz,rp}.satfinite.ue8m0x2.f32 d, a, b, of numbers that are not negative: 16 bits, a in the upper eight."""
    return (_exponent(a, rounding) << 8) | _exponent(b, rounding)


def _narrow(bits: Tensor, target: _Target, noise: Tensor | None = None) -> Tensor:
    """The code of a sign, an exponent and a few bits of mantissa: to nearest even, or by the carry of random bits.

    The significand is an integer; `dropped` of its bits lie below the destination's last place. What stays, counted in
    that place, is the code but for the exponent's offset, because a carry out of the mantissa raises the exponent.
    """
    magnitude = bits & (_SIGN - 1)
    field = magnitude >> 23
    significand = torch.where(field > 0, _HIDDEN, 0) | (magnitude & _FRACTION)
    exponent = torch.clamp(field, min=1) - 127
    kept_exponent = torch.clamp(exponent, min=target.lowest)
    dropped = torch.clamp(23 - target.mantissa + kept_exponent - exponent, max=60)
    kept = significand >> dropped
    rest = significand - (kept << dropped)
    if noise is None:
        half = torch.ones_like(rest) << (dropped - 1)
        up = (rest > half) | ((rest == half) & (kept % 2 == 1))
    else:
        up = (rest >> (dropped - RANDOM_BITS)) + noise >= 1 << RANDOM_BITS
    code = ((kept_exponent - target.lowest) << target.mantissa) + kept + up
    code = torch.where(magnitude > target.largest_bits, target.largest, code)
    signed = code | torch.where(bits >= _SIGN, target.sign, 0)
    return torch.where(magnitude > _INFINITY, target.nan, signed)


def _exponent(bits: Tensor, rounding: Literal["rz", "rp"]) -> Tensor:
    """UE8M0 holds 2^-127 to 2^127 and no zero: 0 and what is below the least give 0, what is above the largest 254."""
    field, fraction = bits >> 23, bits & _FRACTION
    up = torch.zeros_like(field)
    if rounding == "rp":  # a subnormal is above 2^-127 where its fraction exceeds half of the smallest normal number
        up = torch.where(field > 0, fraction > 0, fraction > _HIDDEN // 2).to(torch.int64)
    return torch.where(bits > _INFINITY, 255, torch.clamp(field + up, max=254))
