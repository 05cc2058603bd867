"""Operands in parts: what is taken out of a matrix before it is quantized, and in which precision it stays.

The value of an operand is the sum of its parts, and a GEMM multiplies sums:

    (A + a) (B + b)^T = A B^T + a (B + b)^T + A b^T

A B^T runs in FP4, the rest are side GEMMs of rank k or of few elements, in high precision. Parts are taken out of the
operand in its original basis, the split first; a rotation then acts on what is left and on what was taken out.
"""

from __future__ import annotations

from typing import Literal

from fp4dist.spec.frozen import frozen

Precision = Literal["bf16", "e4m3", "mxfp8"]  # of a side part: the model's own dtype, or FP8 (tensor or 1x32 scales)


@frozen
class Mean:
    """Take out the mean over tokens of every column (arXiv:2603.10444): x = 1 mu^T + r; r is quantized.

    quantize   round mu with the operand's own format, too, as published; false keeps it in high precision
    """

    kind: Literal["mean"] = "mean"
    quantize: bool = True


@frozen
class LowRank:
    """Take out the best rank-r part (arXiv:2509.00404): x = U S V^T + r by power iterations; r is quantized.

    rank         of the side GEMM
    iterations   power iterations with QR, from a fixed start
    quantize     round U and V with the operand's own format
    """

    kind: Literal["lowrank"] = "lowrank"
    rank: int = 8
    iterations: int = 2
    quantize: bool = True

    def __post_init__(self) -> None:
        if self.rank < 1 or self.iterations < 1:
            raise ValueError(f"rank = {self.rank} and iterations = {self.iterations} must be at least 1")


Split = Mean | LowRank


@frozen
class Occ:
    """Outlier clamping and compensation (arXiv:2501.17116): clamp to the alpha and 1 - alpha quantiles, and keep the
    sparse rest, which meets the other operand's quantized value.

    alpha        upper quantile by nearest rank (an element of the logical row or tensor); the lower one has as many
                 elements below it as that has above
    per          row (a token) or tensor
    compensate   false drops what was clamped, as the released code does
    precision    of the rest
    """

    kind: Literal["occ"] = "occ"
    alpha: float = 0.99
    per: Literal["row", "tensor"] = "row"
    compensate: bool = True
    precision: Precision = "bf16"

    def __post_init__(self) -> None:
        if not 0.5 < self.alpha < 1:
            raise ValueError(f"alpha = {self.alpha} must be in (0.5, 1)")


@frozen
class TopK:
    """Keep the k largest magnitudes of each group of a row exact (Stable-SPAM's FP4); a tie keeps the first."""

    kind: Literal["topk"] = "topk"
    k: int = 2
    group: int = 256
    precision: Precision = "bf16"

    def __post_init__(self) -> None:
        if not 1 <= self.k < self.group:
            raise ValueError(f"k = {self.k} must be at least 1 and below group = {self.group}")


@frozen
class Channels:
    """Some input channels of a linear in higher precision in both operands (arXiv:2510.27527, OutControl): those with
    the largest norm over `collect` steps after step `after`; chosen once. In wgrad these rows of x meet dY in the same
    precision; an FP8 block keeps its place among all channels, of which it scales the chosen ones.

    share      of all input channels, rounded up to a multiple of `multiple`
    """

    kind: Literal["channels"] = "channels"
    share: float = 0.1
    multiple: int = 128
    after: int = 500
    collect: int = 50
    precision: Precision = "mxfp8"

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share = {self.share} must be in (0, 1)")
        if self.multiple < 1 or self.after < 0 or self.collect < 1:
            raise ValueError(
                f"multiple = {self.multiple} and collect = {self.collect} must be at least 1, after = {self.after} not"
                " negative"
            )


@frozen
class HotResidual:
    """Multiply the rounding error of the hottest input channels as well (arXiv:2602.02047): Y += (x_H - Q(x)_H) W_H^T.

    share      of all input channels, rounded up to a multiple of `multiple`; those with the largest norm
    every      steps after which they are chosen anew, from the step before; 0: once, after the first step
    """

    kind: Literal["hot_residual"] = "hot_residual"
    share: float = 0.1
    multiple: int = 16
    every: int = 100

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or self.multiple < 1 or self.every < 0:
            raise ValueError(
                f"share = {self.share} must be in (0, 1), multiple = {self.multiple} at least 1, every = {self.every}"
                " not negative"
            )


Outlier = Occ | TopK | Channels | HotResidual
