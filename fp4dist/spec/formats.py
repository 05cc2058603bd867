"""Number systems: an element grid, a scale format, a block. Policy (how to choose scales) is in `blocks`.

Source: OCP Microscaling v1.0 (mxfp4), arXiv:2509.25149 appendix B (nvfp4).
"""

from __future__ import annotations

from typing import Literal

from fp4dist.spec.frozen import frozen


@frozen
class ElementFormat:
    """A sign-magnitude grid: code = sign << (bits - 1) | index into `levels`."""

    name: str
    bits: int
    levels: tuple[float, ...]  # magnitudes, ascending, starting with 0

    def __post_init__(self) -> None:
        if len(self.levels) > 2 ** (self.bits - 1):
            raise ValueError(f"{len(self.levels)} levels do not fit {self.bits} bits with a sign")
        if self.levels[0] != 0 or list(self.levels) != sorted(set(self.levels)):
            raise ValueError(f"levels {self.levels} must start with 0 and ascend")

    @property
    def max(self) -> float:
        """Largest magnitude."""
        return self.levels[-1]


@frozen
class ScaleFormat:
    """How a block's decode scale is stored: one byte."""

    name: Literal["e4m3", "e8m0"]
    max: float


E2M1 = ElementFormat(name="e2m1", bits=4, levels=(0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))
E4M3 = ScaleFormat(name="e4m3", max=448.0)
E8M0 = ScaleFormat(name="e8m0", max=2.0**127)


@frozen
class Format:
    """A block-scaled number system: value = element x block scale x outer scale."""

    name: str
    element: ElementFormat
    scale: ScaleFormat
    block: tuple[int, int]  # rows x columns that share a scale; columns run along the contracted dimension
    outer: Literal["none", "tensor"]  # fp32 scale above the block scales

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
FORMATS: dict[str, Format] = {f.name: f for f in (NVFP4, MXFP4)}
