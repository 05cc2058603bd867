"""How a gradient passes a quantizer of the forward GEMM."""

from __future__ import annotations

from typing import Literal

from fp4dist.spec.frozen import frozen


@frozen
class Straight:
    """Straight through: as if the quantizer were the identity."""

    kind: Literal["straight"] = "straight"


@frozen
class TrustMask:
    """Nothing passes where the quantizer clipped, judged in its rotated basis (arXiv:2502.05003, arXiv:2505.14669)."""

    kind: Literal["mask"] = "mask"


@frozen
class Dge:
    """Differentiable gradient estimator (arXiv:2501.17116): times min(|2 (z - l) / d - 1|^(1/k - 1) / k, cap), z the
    scaled value, l its lower neighbour on the grid, d their distance; nothing passes where |z| is beyond the grid.
    """

    kind: Literal["dge"] = "dge"
    k: float = 5.0
    cap: float = 3.0

    def __post_init__(self) -> None:
        if self.k < 1 or self.cap <= 0:
            raise ValueError(f"k = {self.k} must be at least 1 and cap = {self.cap} positive")


@frozen
class Lsq:
    """Learned step size (arXiv:1902.08153): the mask, and a gradient for the amax of `amax: learned`."""

    kind: Literal["lsq"] = "lsq"


Estimator = Straight | TrustMask | Dge | Lsq
