"""Element and scale codes: encode, decode, pack.

Grids are data (`ElementFormat.levels`), so one function serves every sign-magnitude grid. Codes are
sign << (bits - 1) | level index; a tie goes to the even index, which for E2M1 is the even mantissa that
`cvt.rn.satfinite.e2m1x2` chooses: .25->0 .75->1 1.25->1 1.75->2 2.5->2 3.5->4 5->4.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fp4dist.spec.formats import ElementFormat

E4M3_MAX = 448.0
E4M3_NAN = 0x7F
E4M3_MIN_NORMAL = 2.0**-6
E8M0_BIAS = 127


def encode_nearest(u: Tensor, element: ElementFormat) -> Tensor:
    """Codes of `u` (fp32, any shape) rounded to nearest, ties to the even index, saturating; uint8, one code a byte."""
    index = _interval(u.abs(), _nearest_boundaries(element), closed_right=True)
    return _with_sign(index, u, element)


def encode_stochastic(u: Tensor, element: ElementFormat, noise: Tensor) -> Tensor:
    """Codes of `u` rounded up in magnitude with probability equal to the distance from the level below.

    noise   int32/int64 in [0, 2**16), shape of u. Up iff distance > (noise + 1/2) / 2**16, exact in fp32; so an
            exact level never moves and E[value] = u to 2**-17 of a step for |u| <= element.max.
    """
    magnitude = u.abs()
    below = _interval(magnitude, element.levels[1:], closed_right=False)
    level, inverse_gap = _look_up_pairs(_levels_and_gaps(element, u.device), below).unbind(-1)
    distance = (magnitude - level) * inverse_gap
    threshold = noise.to(torch.float32) * 2.0**-16 + 2.0**-17
    return _with_sign(below + (distance > threshold), u, element)


def decode(codes: Tensor, element: ElementFormat) -> Tensor:
    """Values of codes (uint8, one code a byte) as fp32."""
    values = _code_values(element, codes.device)
    return values.index_select(0, codes.reshape(-1).to(torch.int32)).reshape(codes.shape)


def pack(codes: Tensor) -> Tensor:
    """[R, C] codes (uint8, below 16) -> [R, C/2] bytes, element 2j in the low nibble."""
    both = codes.contiguous().view(torch.int16)  # little-endian: element 2j is the low byte
    return (both | (both >> 4)).to(torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """[R, C/2] bytes -> [R, C] codes."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def decode_packed(packed: Tensor, element: ElementFormat) -> Tensor:
    """[R, C/2] bytes -> [R, C] fp32 values: one table look-up for two elements."""
    return _look_up_pairs(_pair_values(element, packed.device), packed).flatten(-2)


def encode_e4m3(x: Tensor) -> Tensor:
    """Non-negative fp32 -> E4M3fn bytes, round to nearest even, saturating at 448; NaN -> 0x7F."""
    bits = x.clamp(max=E4M3_MAX).view(torch.int32)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = torch.round(x.clamp(max=E4M3_MIN_NORMAL) * 512.0).nan_to_num().to(torch.int32)
    code = torch.where(x < E4M3_MIN_NORMAL, subnormal, normal)
    return torch.where(x.isnan(), E4M3_NAN, code).to(torch.uint8)


def encode_e4m3_stochastic(x: Tensor, noise: Tensor) -> Tensor:
    """Non-negative fp32 -> E4M3fn bytes, up with probability equal to the distance from the value below.

    noise   int64 in [0, 2**32), shape of x; its top 23 bits are the threshold, so E[value] = x exactly for normal
            results. Saturates at 448; NaN -> 0x7F.
    """
    clamped = x.clamp(max=E4M3_MAX)
    bits = clamped.view(torch.int32)
    steps = clamped.clamp(max=E4M3_MIN_NORMAL) * 512.0
    floor = torch.floor(steps).nan_to_num()
    is_normal = x >= E4M3_MIN_NORMAL
    below = torch.where(is_normal, (bits >> 20) - (120 << 3), floor.to(torch.int32))
    distance = torch.where(is_normal, (bits & 0xFFFFF).to(torch.float32) * 2.0**-20, steps - floor)
    threshold = ((noise >> 9).to(torch.float32) * 2.0 + 1.0) * 2.0**-24
    code = below + (distance > threshold)
    return torch.where(x.isnan(), E4M3_NAN, code).to(torch.uint8)


def decode_e4m3(codes: Tensor) -> Tensor:
    """E4M3fn bytes -> fp32."""
    return _e4m3_values(codes.device)[codes.to(torch.int32)]


def decode_e8m0(codes: Tensor) -> Tensor:
    """E8M0 bytes -> fp32: 2**(byte - 127), 255 is NaN."""
    exponent = codes.to(torch.int32)
    bits = torch.where(exponent == 0, 0x00400000, exponent << 23)
    return torch.where(exponent == 255, float("nan"), bits.view(torch.float32))


def _interval(magnitude: Tensor, boundaries: tuple[float, ...], closed_right: bool) -> Tensor:
    """uint8 number of boundaries below `magnitude` (or at it, unless closed on the right); NaN counts all.

    On a CPU a comparison for each of the few boundaries is several times as fast as a binary search.
    """
    if magnitude.is_cuda:
        edges = _edges(boundaries, magnitude.device)
        return torch.bucketize(magnitude.contiguous(), edges, right=not closed_right, out_int32=True).to(torch.uint8)
    index = torch.full_like(magnitude, len(boundaries), dtype=torch.uint8)
    for edge in boundaries:
        under = magnitude <= edge if closed_right else magnitude < edge
        index -= under.view(torch.uint8)
    return index


@lru_cache(maxsize=64)
def _edges(boundaries: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(boundaries, dtype=torch.float32, device=device)


def _look_up_pairs(table: Tensor, index: Tensor) -> Tensor:
    """[n, 2] fp32 table, index [...] uint8 -> [..., 2]: each pair moves as one 64-bit word."""
    words = table.view(torch.float64).flatten()
    found = words.index_select(0, index.reshape(-1).to(torch.int32))
    return found.view(torch.float32).reshape(*index.shape, 2)


def _with_sign(index: Tensor, u: Tensor, element: ElementFormat) -> Tensor:
    return index | torch.signbit(u).view(torch.uint8) * 2 ** (element.bits - 1)


@lru_cache(maxsize=64)
def _nearest_boundaries(element: ElementFormat) -> tuple[float, ...]:
    """Index = number of boundaries strictly below |u|: midpoints, moved one ulp down where a tie must go up."""
    levels = np.array(element.levels, dtype=np.float32)
    mids = (levels[:-1] + levels[1:]) / np.float32(2)
    tie_goes_up = np.arange(len(mids)) % 2 == 1  # from odd index i to the even index i + 1
    down = np.nextafter(mids, np.float32(0))
    return tuple(float(b) for b in np.where(tie_goes_up, down, mids))


@lru_cache(maxsize=64)
def _levels_and_gaps(element: ElementFormat, device: torch.device) -> Tensor:
    """[levels, 2]: each level and 1 / (its distance to the next)."""
    levels = torch.tensor(element.levels, dtype=torch.float32)
    inverse = torch.cat((1.0 / (levels[1:] - levels[:-1]), torch.zeros(1)))  # at the top level nothing is above
    return torch.stack((levels, inverse), dim=-1).to(device)


@lru_cache(maxsize=64)
def _code_values(element: ElementFormat, device: torch.device) -> Tensor:
    half = torch.zeros(2 ** (element.bits - 1))
    half[: len(element.levels)] = torch.tensor(element.levels)
    return torch.cat((half, -half)).to(device)


@lru_cache(maxsize=64)
def _pair_values(element: ElementFormat, device: torch.device) -> Tensor:
    values = _code_values(element, torch.device("cpu"))
    byte = torch.arange(256)
    return torch.stack((values[byte & 15], values[byte >> 4]), dim=-1).to(device)


@lru_cache(maxsize=64)
def _e4m3_values(device: torch.device) -> Tensor:
    code = torch.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    magnitude = torch.where(
        exponent == 0, mantissa * 2.0**-9, (8.0 + mantissa) * torch.exp2(exponent.to(torch.float32) - 10)
    )
    value = torch.where(code >= 128, -magnitude, magnitude)
    return torch.where((code & 127) == E4M3_NAN, float("nan"), value).to(torch.float32).to(device)
