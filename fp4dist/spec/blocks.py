"""The orthogonal blocks a quantizer is composed of: scale rule, rounding, rotation.

A block is a dataclass here, a function in `fp4dist.numerics`, and a branch in each fast kernel. `kind` is its YAML tag.
Formulas and measured errors: each block's meaning is documented with its function in `fp4dist.numerics`.
"""

from __future__ import annotations

from typing import Literal

from fp4dist.spec.frozen import frozen

# Rounding a normal E4M3 value to nearest lowers it by at most 1/17: this much headroom and nothing clips.
E4M3_NO_CLIP = 17 / 16
# The floor rule leaves |u| < 8 = 6 * 4/3 on E2M1.
FLOOR_NO_CLIP = 4 / 3


@frozen
class AbsMax:
    """Block scale = block amax / (element max / headroom): any scale format but powers of two.

    Under an outer scale (E4M3, UE5M3): headroom 17/16 never clips (needed by unbiased stochastic rounding); below 1 it
    clips on purpose.
    budget    the largest block scale used (448 = all of E4M3; 256 leaves room for corrections); not for fp32 scales
    nonzero   a block whose scale would round to 0 takes the smallest scale that is not 0
    """

    kind: Literal["absmax"] = "absmax"
    headroom: float = 1.0
    budget: float = 448.0
    nonzero: bool = False

    def __post_init__(self) -> None:
        if self.headroom <= 0 or self.budget <= 0:
            raise ValueError(f"headroom = {self.headroom} and budget = {self.budget} must be positive")


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
class BestOf:
    """Try the scale of AbsMax and that times each of `also`, and keep for each block the one with the least error; a
    tie keeps the earlier. With also: [3/2] it is FourOverSix.

    also      15/16 (and 17/16) reach E4M3 scales beside the one that nearest rounding took: more than half of what a
              search over all scales gains over four-over-six, at one quantization more
    metric, headroom, budget   as in FourOverSix
    """

    kind: Literal["best_of"] = "best_of"
    also: tuple[float, ...] = (3 / 2, 15 / 16)
    metric: Literal["mse", "mae", "absmax"] = "mse"
    headroom: float = 1.0
    budget: float = 256.0

    def __post_init__(self) -> None:
        if self.headroom <= 0 or not 0 < self.budget <= 448:
            raise ValueError(f"headroom = {self.headroom} must be positive and budget = {self.budget} in (0, 448]")
        if not self.also or min(self.also) <= 0 or len({1.0, *self.also}) <= len(self.also):
            raise ValueError(f"also = {list(self.also)} must be positive numbers, at least one, 1 not among them")


@frozen
class Floor:
    """2^(floor(log2 amax) - e), e the exponent of the element's maximum: OCP MX. On E2M1 it clips |u| up to 8 unless
    headroom = 4/3 (the "3/4" rule of arXiv:2505.14669).

    headroom acts after the scale is chosen: u = x / (headroom * 2^e), and the decoded value is multiplied back.
    """

    kind: Literal["floor"] = "floor"
    headroom: float = 1.0

    def __post_init__(self) -> None:
        if self.headroom <= 0:
            raise ValueError(f"headroom = {self.headroom} must be positive")


@frozen
class Ceil:
    """Powers of two, rounded up: nothing clips.

    of            ratio: 2^ceil(log2(amax / element max)), the smallest that never clips (arXiv:2502.20853; with whole
                  rows and fp32 scales the 1/s = 2^floor(log2(max / amax)) of vector-wise quantizers);
                  amax: 2^ceil(log2 amax) / element max, which puts the amax in the top half of the grid's range
                  (arXiv:2610.00053); 1 / element max is one factor for the whole tensor
    finer_below   of amax: a block whose amax is below this part of its power of two takes the next smaller one and
                  clips; 0: none does
    """

    kind: Literal["ceil"] = "ceil"
    of: Literal["ratio", "amax"] = "ratio"
    finer_below: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.finer_below <= 1 or (self.finer_below and self.of != "amax"):
            raise ValueError(f"finer_below = {self.finer_below} must be in [0, 1], and belongs to of: amax")


@frozen
class Quest:
    """Scale = factor * standard deviation of the block (arXiv:2502.05003): the one that is best for normal data; clips.

    factor     of the spread; None: 0.4870798, the optimum of E2M1
    spread     std: mean removed; rms: not (the only one of rows and tensors, whose parts lie on several ranks)
    power      for power-of-two scales: the one below (floor, as released) or the nearest in log2
    """

    kind: Literal["quest"] = "quest"
    factor: float | None = None
    spread: Literal["std", "rms"] = "std"
    power: Literal["floor", "nearest"] = "floor"
    budget: float = 256.0  # as in AbsMax

    def __post_init__(self) -> None:
        if (self.factor is not None and self.factor <= 0) or self.budget <= 0:
            raise ValueError(f"factor = {self.factor} and budget = {self.budget} must be positive")


@frozen
class Sawb:
    """Scale = clip / element max with clip = rms * sqrt(E[x^2]) - mean_abs * E[|x|], as LUQ uses for INT4; clips.

    Where the clip is not positive (all magnitudes nearly equal) the amax stands in.
    rms, mean_abs   the coefficients; None: 12.1 and 12.2, those of INT4
    """

    kind: Literal["sawb"] = "sawb"
    rms: float | None = None
    mean_abs: float | None = None

    def __post_init__(self) -> None:
        if (self.rms is None) != (self.mean_abs is None):
            raise ValueError("rms and mean_abs belong together: give both or neither")


@frozen
class MseSearch:
    """Try `steps` + 1 scales from that of AbsMax down to `lowest` of it, evenly, keep for each block the one with the
    least squared error; a tie keeps the larger. Costs as many quantizations.
    """

    kind: Literal["mse_search"] = "mse_search"
    steps: int = 100
    lowest: float = 0.2
    budget: float = 448.0

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.lowest < 1 or self.budget <= 0:
            raise ValueError(
                f"steps = {self.steps} must be at least 1, lowest = {self.lowest} in (0, 1),"
                f" budget = {self.budget} positive"
            )


ScaleRule = AbsMax | FourOverSix | BestOf | Floor | Ceil | Quest | Sawb | MseSearch


@frozen
class Nearest:
    """Round to nearest. ties: to the even code (hardware), away from 0, to_zero, or up (toward +infinity)."""

    kind: Literal["nearest"] = "nearest"
    ties: Literal["even", "away", "to_zero", "up"] = "even"


@frozen
class Stochastic:
    """Round up with probability equal to the distance: E[value] = x wherever nothing clips.

    On a grid of powers of two this is logarithmic stochastic rounding with stochastic underflow (arXiv:2112.10769).
    samples   independent draws whose products are averaged: their number divides the variance, multiplies the GEMM
    """

    kind: Literal["stochastic"] = "stochastic"
    samples: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.samples <= 16:
            raise ValueError(f"samples = {self.samples} must be in [1, 16]")


@frozen
class Eden:
    """MS-EDEN (arXiv:2601.22813): nearest codes, then each block's scale is corrected by S = <u,u>/<u,c> and rounded
    stochastically in E4M3. Unbiased under a fresh rotation, with 1/16 of the random numbers of stochastic rounding.

    align   post_hoc: codes from the exact fp32 block scale, tensor scale after the fact, one pass over the data;
            pre: codes from the E4M3 block scale, as the paper's algorithm is written (two passes)
    headroom (17/16) * 0.93: a mild clip that minimizes the error; S repairs the bias
    four_over_six   codes under the scale or under 1.5 of it, whichever has the smaller error by this metric (a tie
            keeps the scale); S repairs the bias of that choice, too
    group   whose elements share S: those of a block; or of a rotation's group, <u,u>/<u,c> summed over scaled
            values, which counts its blocks alike and so is not quite unbiased (a released simulation)
    truncate   mantissa bits of the block scale that are kept before codes are made, the rest cut off (released
            kernels); 0: all of them
    """

    kind: Literal["eden"] = "eden"
    align: Literal["post_hoc", "pre"] = "post_hoc"
    four_over_six: Literal["none", "mse", "mae", "absmax"] = "none"
    group: Literal["block", "rotation"] = "block"
    truncate: int = 0
    headroom: float = 0.988125
    budget: float = 256.0

    def __post_init__(self) -> None:
        if self.headroom <= 0 or not 0 < self.budget <= 448:
            raise ValueError(f"headroom = {self.headroom} must be positive and budget = {self.budget} in (0, 448]")
        if not 0 <= self.truncate < 23:
            raise ValueError(f"truncate = {self.truncate} must be in [0, 23), the bits of an fp32 mantissa")
        if self.truncate and self.align == "pre":
            raise ValueError(
                "truncate cuts the fp32 block scale of align: post_hoc; that of align: pre is E4M3 already"
            )


@frozen
class Ema:
    """Of a weight's two neighbours on the grid take the one nearer to the weight's moving average (Q-EMA,
    arXiv:2502.20853); sign and scale are the weight's own.

    decay   w_ema <- decay w_ema + (1 - decay) w after each optimizer step
    after   steps before which it is nearest rounding
    """

    kind: Literal["ema"] = "ema"
    decay: float = 0.998
    after: int = 10

    def __post_init__(self) -> None:
        if not 0 < self.decay < 1 or self.after < 0:
            raise ValueError(f"decay = {self.decay} must be in (0, 1) and after = {self.after} not negative")


Rounding = Nearest | Stochastic | Eden | Ema


@frozen
class Hadamard:
    """Rotate each group of `size` elements along the contracted dimension: butterflies on +-1, signs on the input.

    signs   none: plain Sylvester matrix; fixed: one constant sign vector for all layers and steps;
            fresh: drawn anew for each layer, GEMM, micro-batch and step, the same for both operands
    mask    the constant sign vector, for signs: fixed: bit i set where the sign of element i of a group is -1;
            None: the published one, which has 16 entries (0xD7E8)
    """

    size: int = 16
    signs: Literal["none", "fixed", "fresh"] = "fixed"
    mask: int | None = None

    def __post_init__(self) -> None:
        if self.size not in (16, 32, 64, 128):
            raise ValueError(f"size = {self.size} must be 16, 32, 64 or 128")
        if self.mask is not None and (self.signs != "fixed" or not 0 <= self.mask < 2**self.size):
            raise ValueError(f"mask = {self.mask:#x} needs signs: fixed and at most {self.size} bits")
        if self.signs == "fixed" and self.size > 16 and self.mask is None:
            raise ValueError(
                f"size = {self.size} with fixed signs: the published sign vector has 16 entries; use fresh,"
                " or give all signs as mask"
            )
