"""Number systems: an element grid, a scale format, a block. Policy (how to choose scales) is in `blocks`.

Each of the three has named presets, and a file may spell out what has none:

    format: nvfp4
    format: {element: e1m2, scale: fp32, block: [1, 16]}
    format: {element: {name: thirds, bits: 4, levels: [0, 1, 3, 9]}, scale: fp32, block: tensor}

Sources: OCP Microscaling v1.0 (mxfp4, mxfp8), arXiv:2509.25149 appendix B (nvfp4), arXiv:2609.02846 (ue5m3),
arXiv:2112.10769 (log grids), Sun et al., NeurIPS 2020 (radix4).
"""

from __future__ import annotations

import math
from typing import Literal

from fp4dist.spec.frozen import frozen

Block = tuple[int, int] | Literal["row", "tensor"]
Outer = tuple[int, int] | Literal["none", "row", "tensor"]
PACKED_BITS = 4  # elements of at most this many bits are stored two a byte, wider ones one a byte


@frozen
class ElementFormat:
    """A sign-magnitude grid: code = sign << (bits - 1) | index into `levels`.

    mantissa   number of mantissa bits of a binary float whose codes are its levels in order; None: any list of levels
    """

    name: str
    bits: int
    levels: tuple[float, ...]  # magnitudes, ascending, starting with 0
    mantissa: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits = {self.bits} must be in [2, 8]")
        if len(self.levels) > 2 ** (self.bits - 1):
            raise ValueError(f"{len(self.levels)} levels do not fit {self.bits} bits with a sign")
        if len(self.levels) < 2 or self.levels[0] != 0 or list(self.levels) != sorted(set(self.levels)):
            raise ValueError(f"levels {self.levels} must start with 0 and ascend")
        if self.mantissa is not None and self.levels != _float_levels(self.mantissa, self.levels[1], len(self.levels)):
            raise ValueError(f"levels of {self.name} are not those of a float with {self.mantissa} mantissa bits")

    @property
    def max(self) -> float:
        """Largest magnitude."""
        return self.levels[-1]

    @property
    def exponent(self) -> int:
        """floor(log2(max))."""
        return math.frexp(self.max)[1] - 1

    @property
    def packed(self) -> bool:
        """Whether two codes share a byte."""
        return self.bits <= PACKED_BITS

    @classmethod
    def from_name(cls, name: str) -> ElementFormat:
        """The preset called `name`."""
        return ELEMENTS[name]

    @staticmethod
    def names() -> tuple[str, ...]:
        """Names of all presets."""
        return tuple(ELEMENTS)


@frozen
class ScaleFormat:
    """How a block's decode scale is stored.

    e4m3, ue5m3   one byte, 3 mantissa bits, under an outer scale; max is the largest stored value
    e8m0          one byte, a power of two
    e4m3_inverse  one byte, the encoder's multiplier: the decode scale is its reciprocal; max is that of the multiplier
    fp32          four bytes
    """

    name: Literal["e4m3", "ue5m3", "e8m0", "e4m3_inverse", "fp32"]
    max: float

    @property
    def needs_range(self) -> bool:
        """Whether the format's own range is short, so that an outer scale makes room."""
        return self.name in ("e4m3", "ue5m3", "e4m3_inverse")

    @property
    def bf16_exact(self) -> bool:
        """Whether element * scale has at most the 8 significant bits of bf16, for every element here."""
        return self.name in ("e4m3", "ue5m3", "e8m0")

    @classmethod
    def from_name(cls, name: str) -> ScaleFormat:
        """The preset called `name`."""
        return SCALES[name]

    @staticmethod
    def names() -> tuple[str, ...]:
        """Names of all presets."""
        return tuple(SCALES)


def _float_levels(mantissa: int, smallest: float, number: int) -> tuple[float, ...]:
    """The first `number` magnitudes of a binary float with subnormals, 0 included."""
    steps = 2**mantissa
    return tuple(smallest * (i if i < steps else (steps + i % steps) * 2.0 ** (i // steps - 1)) for i in range(number))


def _log_levels(number: int) -> tuple[float, ...]:
    """0, 1, 2, 4 ... with `number` powers of two."""
    return (0.0, *(2.0**i for i in range(number)))


def _log_grid(number: int) -> ElementFormat:
    """7 powers of two and 0 fit 4 bits with a sign; more need a wider code."""
    return ElementFormat(name=f"log{number}", bits=max(4, number.bit_length() + 1), levels=_log_levels(number))


E2M1 = ElementFormat(name="e2m1", bits=4, levels=(0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))
E1M2 = ElementFormat(name="e1m2", bits=4, levels=(0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5))
E3M0 = ElementFormat(name="e3m0", bits=4, levels=(0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0))
INT4 = ElementFormat(name="int4", bits=4, levels=(0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0))
INT2 = ElementFormat(name="int2", bits=2, levels=(0.0, 1.0))
RADIX4_EVEN = ElementFormat(name="radix4_even", bits=4, levels=(0.0, *(4.0**i for i in range(-3, 4))))
RADIX4_ODD = ElementFormat(name="radix4_odd", bits=4, levels=(0.0, *(2 * 4.0**i for i in range(-3, 4))))
FP8_E4M3 = ElementFormat(name="e4m3", bits=8, levels=_float_levels(3, 2.0**-9, 127), mantissa=3)
FP8_E5M2 = ElementFormat(name="e5m2", bits=8, levels=_float_levels(2, 2.0**-16, 124), mantissa=2)
ELEMENTS: dict[str, ElementFormat] = {
    e.name: e
    for e in (E2M1, E1M2, E3M0, INT4, INT2, RADIX4_EVEN, RADIX4_ODD, FP8_E4M3, FP8_E5M2, *map(_log_grid, range(3, 16)))
}
LOG7 = ELEMENTS["log7"]

E4M3 = ScaleFormat(name="e4m3", max=448.0)
UE5M3 = ScaleFormat(name="ue5m3", max=61440.0)
E8M0 = ScaleFormat(name="e8m0", max=2.0**127)
E4M3_INVERSE = ScaleFormat(name="e4m3_inverse", max=240.0)  # Gaudi's E4M3 ends at 240
FP32 = ScaleFormat(name="fp32", max=float.fromhex("0x1.fffffep127"))
SCALES: dict[str, ScaleFormat] = {s.name: s for s in (E4M3, UE5M3, E8M0, E4M3_INVERSE, FP32)}


@frozen
class Format:
    """A block-scaled number system: value = element x block scale x outer scale."""

    name: str = ""
    element: ElementFormat
    scale: ScaleFormat
    block: (
        Block  # rows x columns that share a scale (columns run along the contracted dimension), or a whole row, tensor
    )
    outer: Outer = "none"  # fp32 scale above the block scales: of tiles of rows x columns, of a row, of the tensor

    @property
    def title(self) -> str:
        """The preset's name, or what the format is made of."""
        return self.name or f"{self.element.name}/{self.scale.name}"

    @classmethod
    def from_name(cls, name: str) -> Format:
        """The preset called `name`."""
        return FORMATS[name]

    @staticmethod
    def names() -> tuple[str, ...]:
        """Names of all presets."""
        return tuple(FORMATS)


NVFP4 = Format(name="nvfp4", element=E2M1, scale=E4M3, block=(1, 16), outer="tensor")
MXFP4 = Format(name="mxfp4", element=E2M1, scale=E8M0, block=(1, 32), outer="none")
UE5M3_FP4 = Format(name="ue5m3_fp4", element=E2M1, scale=UE5M3, block=(1, 16), outer="tensor")
FP4_ROW = Format(name="fp4_row", element=E2M1, scale=FP32, block="row")
INT4_TENSOR = Format(name="int4", element=INT4, scale=FP32, block="tensor")
LOG7_TENSOR = Format(name="log7", element=LOG7, scale=FP32, block="tensor")
MXFP8 = Format(name="mxfp8", element=FP8_E4M3, scale=E8M0, block=(1, 32))
FP8_E4M3_TENSOR = Format(name="fp8_e4m3", element=FP8_E4M3, scale=FP32, block="tensor")
FP8_E5M2_TENSOR = Format(name="fp8_e5m2", element=FP8_E5M2, scale=FP32, block="tensor")
FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        NVFP4, MXFP4, UE5M3_FP4, FP4_ROW, INT4_TENSOR, LOG7_TENSOR, MXFP8, FP8_E4M3_TENSOR, FP8_E5M2_TENSOR,
    )
}  # fmt: skip
