"""The orthogonal blocks a quantizer is composed of: scale rule, rounding, rotation.

A block is a dataclass here, a function in `fp4dist.numerics`, and a branch in each fast kernel. `kind` is its YAML tag.
Formulas and measured errors: each block's meaning is documented with its function in `fp4dist.numerics`.
"""

from __future__ import annotations

from typing import Literal

from fp4dist.spec.frozen import frozen

# Rounding a normal E4M3 value to nearest lowers it by at most 1/17: this much headroom and nothing clips.
E4M3_NO_CLIP = 17 / 16
# The floor rule leaves |u| < 8 = 6 * 4/3.
FLOOR_NO_CLIP = 4 / 3


@frozen
class AbsMax:
    """Block scale = block amax / (element max / headroom), stored in E4M3 under one fp32 scale per tensor.

    headroom 17/16 never clips (needed by unbiased stochastic rounding); below 1 it clips on purpose.
    budget is the largest block scale used (448 = all of E4M3; 256 leaves room for corrections).
    """

    kind: Literal["absmax"] = "absmax"
    headroom: float = 1.0
    budget: float = 448.0

    def __post_init__(self) -> None:
        if self.headroom <= 0 or not 0 < self.budget <= 448:
            raise ValueError(f"headroom = {self.headroom} must be positive and budget = {self.budget} in (0, 448]")


@frozen
class FourOverSix:
    """Try amax -> 6 and amax -> 4 for each block and keep the smaller error (arXiv:2512.02010); a tie keeps 6.

    budget 256: both s and 1.5 s must be representable, and 256, 384 is the largest such pair of E4M3.
    headroom as in AbsMax.
    """

    kind: Literal["four_over_six"] = "four_over_six"
    metric: Literal["mse", "mae", "absmax"] = "mse"
    headroom: float = 1.0
    budget: float = 256.0

    def __post_init__(self) -> None:
        if self.headroom <= 0 or not 0 < self.budget <= 448:
            raise ValueError(f"headroom = {self.headroom} must be positive and budget = {self.budget} in (0, 448]")


@frozen
class Floor:
    """OCP MX: 2^(floor(log2 amax) - 2). Clips |u| up to 8 unless headroom = 4/3 (the "3/4" rule of arXiv:2505.14669).

    headroom acts after the scale is chosen: u = x / (headroom * 2^e), and the decoded value is multiplied back.
    """

    kind: Literal["floor"] = "floor"
    headroom: float = 1.0

    def __post_init__(self) -> None:
        if self.headroom <= 0:
            raise ValueError(f"headroom = {self.headroom} must be positive")


@frozen
class Ceil:
    """2^ceil(log2(amax / 6)): the smallest power of two that never clips (arXiv:2502.20853)."""

    kind: Literal["ceil"] = "ceil"


ScaleRule = AbsMax | FourOverSix | Floor | Ceil


@frozen
class Nearest:
    """Round to nearest, ties to the even code."""

    kind: Literal["nearest"] = "nearest"


@frozen
class Stochastic:
    """Round up with probability equal to the distance: E[value] = x wherever nothing clips."""

    kind: Literal["stochastic"] = "stochastic"


@frozen
class Eden:
    """MS-EDEN (arXiv:2601.22813): nearest codes, then each block's scale is corrected by S = <u,u>/<u,c> and rounded
    stochastically in E4M3. Unbiased under a fresh rotation, with 1/16 of the random numbers of stochastic rounding.

    align   post_hoc: codes from the exact fp32 block scale, tensor scale after the fact, one pass over the data;
            pre: codes from the E4M3 block scale, as the paper's algorithm is written (two passes)
    headroom (17/16) * 0.93: a mild clip that minimizes the error; S repairs the bias
    """

    kind: Literal["eden"] = "eden"
    align: Literal["post_hoc", "pre"] = "post_hoc"
    headroom: float = 0.988125
    budget: float = 256.0

    def __post_init__(self) -> None:
        if self.headroom <= 0 or not 0 < self.budget <= 448:
            raise ValueError(f"headroom = {self.headroom} must be positive and budget = {self.budget} in (0, 448]")


Rounding = Nearest | Stochastic | Eden


@frozen
class Hadamard:
    """Rotate each group of `size` elements along the contracted dimension: butterflies on +-1, signs on the input.

    signs   none: plain Sylvester matrix; fixed: one constant sign vector for all layers and steps (`FIXED_SIGNS`);
            fresh: drawn anew for each layer, GEMM, micro-batch and step, the same for both operands
    """

    size: int = 16
    signs: Literal["none", "fixed", "fresh"] = "fixed"

    def __post_init__(self) -> None:
        if self.size not in (16, 32, 64, 128):
            raise ValueError(f"size = {self.size} must be 16, 32, 64 or 128")
        if self.signs == "fixed" and self.size > 16:
            raise ValueError(
                f"size = {self.size} with fixed signs: the published sign vector has 16 entries; use fresh"
            )
