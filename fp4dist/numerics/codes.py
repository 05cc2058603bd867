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

from fp4dist.spec.formats import ElementFormat, ScaleFormat

E4M3_MAX = 448.0
E4M3_NAN = 0x7F
E4M3_MIN_NORMAL = 2.0**-6
UE5M3_NAN = 0xFF
E8M0_BIAS = 127
FEW_LEVELS = 16  # on a CPU a comparison for each of so few boundaries beats a binary search


def encode_nearest(u: Tensor, element: ElementFormat, ties: str = "even") -> Tensor:
    """Codes of `u` (fp32, any shape) rounded to nearest, saturating; uint8, one code a byte.

    ties   even: to the even index; away from 0; to_zero; up: toward +infinity
    """
    magnitude = u.abs()
    if element.mantissa is not None:
        index = _float_code(magnitude, element.mantissa, element.levels[1], element.max)
    elif ties == "up":
        away, to_zero = (_interval(magnitude, nearest_boundaries(element, t), True) for t in ("away", "to_zero"))
        index = torch.where(u < 0, to_zero, away)
    else:
        index = _interval(magnitude, nearest_boundaries(element, ties), closed_right=True)
    return _with_sign(index, u, element)


def encode_stochastic(u: Tensor, element: ElementFormat, noise: Tensor) -> Tensor:
    """Codes of `u` rounded up in magnitude with probability equal to the distance from the level below.

    noise   int32/int64 in [0, 2**16), shape of u. Up iff distance > (noise + 1/2) / 2**16, exact in fp32; so an
            exact level never moves and E[value] = u to 2**-17 of a step for |u| <= element.max.
    """
    magnitude = u.abs()
    below = _interval(magnitude, element.levels[1:], closed_right=False)
    level, inverse_gap = _look_up_pairs(levels_and_gaps(element, u.device), below).unbind(-1)
    distance = (magnitude - level) * inverse_gap
    threshold = noise.to(torch.float32) * 2.0**-16 + 2.0**-17
    return _with_sign(below + (distance > threshold), u, element)


def encode_toward(u: Tensor, toward: Tensor, element: ElementFormat) -> Tensor:
    """Codes of that neighbour of `u` on the grid that is nearer to `toward` (fp32, shape of u); a tie takes the even.

    The neighbours enclose |u|, and the sign is u's: `toward` only decides between down and up. A u on the grid, or
    beyond its end, has one neighbour alone. With toward = u this is rounding to nearest even.
    """
    magnitude = u.abs()
    below = _interval(magnitude, element.levels[1:], closed_right=False).to(torch.int32)
    level, inverse_gap = levels_and_gaps(element, u.device)[below].unbind(-1)
    middle = middles(element, u.device)[below]
    same_way = torch.where(torch.signbit(u), -toward, toward)
    up = (same_way > middle) | ((same_way == middle) & (below % 2 == 1))
    return _with_sign(below + (up & (magnitude > level) & (inverse_gap > 0)), u, element)


def decode(codes: Tensor, element: ElementFormat) -> Tensor:
    """Values of codes (uint8, one code a byte) as fp32."""
    values = _code_values(element, codes.device)
    return values.index_select(0, codes.reshape(-1).to(torch.int32)).reshape(codes.shape)


def stored(codes: Tensor, element: ElementFormat) -> Tensor:
    """[R, C] codes, one a byte -> as a BlockScaledTensor holds them: two a byte if they fit."""
    return pack(codes) if element.packed else codes


def pack(codes: Tensor) -> Tensor:
    """[R, C] codes (uint8, below 16) -> [R, C/2] bytes, element 2j in the low nibble."""
    both = codes.contiguous().view(torch.int16)  # little-endian: element 2j is the low byte
    return (both | (both >> 4)).to(torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """[R, C/2] bytes -> [R, C] codes."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def decode_stored(codes: Tensor, element: ElementFormat) -> Tensor:
    """Inverse of `stored`, as fp32 values."""
    return decode_packed(codes, element) if element.packed else decode(codes, element)


def decode_packed(packed: Tensor, element: ElementFormat) -> Tensor:
    """[R, C/2] bytes -> [R, C] fp32 values: one table look-up for two elements."""
    return _look_up_pairs(_pair_values(element, packed.device), packed).flatten(-2)


def encode_e4m3(x: Tensor) -> Tensor:
    """Non-negative fp32 -> E4M3fn bytes, round to nearest even, saturating at 448; NaN -> 0x7F."""
    code = _float_code(x, 3, 2.0**-9, E4M3_MAX)
    return torch.where(x.isnan(), E4M3_NAN, code).to(torch.uint8)


def encode_ue5m3(x: Tensor) -> Tensor:
    """Non-negative fp32 -> UE5M3 bytes (bias 15, no sign), round to nearest even, saturating at 61440; NaN -> 0xFF."""
    code = _float_code(x, 3, 2.0**-17, 61440.0)
    return torch.where(x.isnan(), UE5M3_NAN, code).to(torch.uint8)


def _float_code(x: Tensor, mantissa: int, smallest: float, largest: float) -> Tensor:
    """Non-negative fp32 -> int32 codes of a binary float with subnormals, to nearest even, saturating at `largest`.

    smallest   its smallest subnormal, a power of two. NaN saturates.
    """
    drop, min_normal = 23 - mantissa, smallest * 2**mantissa
    bits = x.clamp(max=largest).view(torch.int32)
    rebias = (127 + round(np.log2(min_normal)) - 1) << mantissa  # fp32's exponent field of min_normal becomes 1
    normal = ((bits + ((1 << drop - 1) - 1) + ((bits >> drop) & 1)) >> drop) - rebias
    subnormal = torch.round(x.clamp(max=min_normal) * (1.0 / smallest)).nan_to_num().to(torch.int32)
    top = (int(np.float32(largest).view(np.int32)) >> drop) - rebias
    return torch.where(x < min_normal, subnormal, normal).clamp_(max=top)


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


def encode_scale(x: Tensor, scale: ScaleFormat) -> Tensor:
    """Non-negative fp32 decode scales -> what a BlockScaledTensor stores of them; bytes are rounded to nearest.

    fp32 scales stay; e4m3_inverse keeps 1/x, at most scale.max. e8m0 is chosen by its exponent (`scales`), not here.
    """
    if scale.name == "e4m3":
        return encode_e4m3(x)
    if scale.name == "ue5m3":
        return encode_ue5m3(x)
    if scale.name == "e4m3_inverse":
        return encode_e4m3((torch.ones_like(x) / x).clamp(max=scale.max))
    if scale.name == "fp32":
        return x
    raise ValueError(f"{scale.name} scales have no rounding of their own")


def decode_scale(stored: Tensor, scale: ScaleFormat) -> Tensor:
    """Stored scales -> fp32 decode scales."""
    if scale.name == "e4m3":
        return decode_e4m3(stored)
    if scale.name == "e8m0":
        return decode_e8m0(stored)
    if scale.name == "ue5m3":
        return _ue5m3_values(stored.device)[stored.to(torch.int32)]
    if scale.name == "e4m3_inverse":
        multiplier = decode_e4m3(stored)
        return torch.ones_like(multiplier) / multiplier
    return stored


def _interval(magnitude: Tensor, boundaries: tuple[float, ...], closed_right: bool) -> Tensor:
    """uint8 number of boundaries below `magnitude` (or at it, unless closed on the right); NaN counts all.

    On a CPU a comparison for each of the few boundaries is several times as fast as a binary search.
    """
    if magnitude.is_cuda or len(boundaries) > FEW_LEVELS:
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
    """A NaN has no sign: which one arithmetic gives it depends on the machine."""
    negative = torch.signbit(u) & (u == u)
    return index.to(torch.uint8) | negative.view(torch.uint8) * 2 ** (element.bits - 1)


@lru_cache(maxsize=64)
def nearest_boundaries(element: ElementFormat, ties: str) -> tuple[float, ...]:
    """Index = number of boundaries strictly below |u|: midpoints, moved one ulp down where a tie must go up."""
    levels = np.array(element.levels, dtype=np.float32)
    mids = (levels[:-1] + levels[1:]) / np.float32(2)
    odd = np.arange(len(mids)) % 2 == 1  # from odd index i to the even index i + 1
    tie_goes_up = {"even": odd, "away": True, "to_zero": False}[ties]
    down = np.nextafter(mids, np.float32(0))
    return tuple(float(b) for b in np.where(tie_goes_up, down, mids))


@lru_cache(maxsize=64)
def levels_and_gaps(element: ElementFormat, device: torch.device) -> Tensor:
    """[levels, 2]: each level and 1 / (its distance to the next)."""
    levels = torch.tensor(element.levels, dtype=torch.float32)
    inverse = torch.cat((1.0 / (levels[1:] - levels[:-1]), torch.zeros(1)))  # at the top level nothing is above
    return torch.stack((levels, inverse), dim=-1).to(device)


@lru_cache(maxsize=64)
def middles(element: ElementFormat, device: torch.device) -> Tensor:
    """[levels]: halfway from each level to the next; the last has none."""
    levels = torch.tensor(element.levels, dtype=torch.float32)
    return torch.cat(((levels[:-1] + levels[1:]) * 0.5, levels[-1:])).to(device)


@lru_cache(maxsize=64)
def _code_values(element: ElementFormat, device: torch.device) -> Tensor:
    half = torch.zeros(2 ** (element.bits - 1))
    half[: len(element.levels)] = torch.tensor(element.levels)
    return torch.cat((half, -half)).to(device)


@lru_cache(maxsize=64)
def _pair_values(element: ElementFormat, device: torch.device) -> Tensor:
    values = torch.zeros(16)  # a nibble that is no code of the element decodes to 0
    values[: 2**element.bits] = _code_values(element, torch.device("cpu"))
    byte = torch.arange(256)
    return torch.stack((values[byte & 15], values[byte >> 4]), dim=-1).to(device)


@lru_cache(maxsize=64)
def _ue5m3_values(device: torch.device) -> Tensor:
    """256 values; 61440 is code 0xF7, the codes above it count on and 0xFF is NaN."""
    code = torch.arange(256)
    exponent, mantissa = code >> 3, code & 7
    scaled = (8.0 + mantissa) * torch.exp2(exponent.to(torch.float32) - 18)
    value = torch.where(exponent == 0, mantissa * 2.0**-17, scaled)
    return torch.where(code == UE5M3_NAN, float("nan"), value).to(torch.float32).to(device)


@lru_cache(maxsize=64)
def _e4m3_values(device: torch.device) -> Tensor:
    code = torch.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    magnitude = torch.where(
        exponent == 0, mantissa * 2.0**-9, (8.0 + mantissa) * torch.exp2(exponent.to(torch.float32) - 10)
    )
    value = torch.where(code >= 128, -magnitude, magnitude)
    return torch.where((code & 127) == E4M3_NAN, float("nan"), value).to(torch.float32).to(device)
