"""Which amax a scale of the whole tensor is made from: the tensor's own, or one that a controller keeps between steps.

A controller sees the amax of every tensor that it scales, takes the maximum over a step's micro-batches and all ranks,
and decides after the step; so what it keeps is the same on every rank and is saved with the run. Of gradients it keeps
the amax in units of the mean loss over all data-parallel ranks, so that a run may go on in another layout.
"""

from __future__ import annotations

from typing import Literal

from fp4dist.spec.frozen import frozen


@frozen
class Current:
    """The tensor's own amax, now."""

    kind: Literal["current"] = "current"


@frozen
class Hold:
    """The amax of the step at which it was last looked at, for `steps` steps (arXiv:2609.02846): no dependence on a
    global maximum within a step. The first step looks at each tensor's own.
    """

    kind: Literal["hold"] = "hold"
    steps: int = 50

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps = {self.steps} must be at least 1")


@frozen
class Hindsight:
    """A moving average of the amax of the steps before (arXiv:2112.10769, eq. 18):
    m <- (1 - momentum) amax + momentum m.

    It clips where the present amax is larger. The first step takes each tensor's own.
    """

    kind: Literal["hindsight"] = "hindsight"
    momentum: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum = {self.momentum} must be in [0, 1)")


@frozen
class GradScale:
    """A power of two S for each tensor (Sun et al., NeurIPS 2020): S amax above the grid's largest level halves it, at
    most half of that level doubles it; the tensor is quantized as S x and clips while S adapts.

    level       the largest level that S aims at; both phases of a radix-4 pair share S, so it is that of the even grid
    lookahead   apply the rule to the present amax before it is used, instead of after the step
    start       S of the first step; None: the power of two that fits the first tensor
    """

    kind: Literal["grad_scale"] = "grad_scale"
    level: float = 64.0
    lookahead: bool = False
    start: float | None = None

    def __post_init__(self) -> None:
        if self.level <= 0 or (self.start is not None and self.start <= 0):
            raise ValueError(f"level = {self.level} and start = {self.start} must be positive")


@frozen
class Learned:
    """An amax that is trained (LSQ, arXiv:1902.08153): the clip of one tensor, with a gradient of its own and AdamW.

    lr      learning rate of log(amax), relative to the run's present one
    start   in units of the first step's mean |x| times sqrt of the grid's largest level, LSQ's initial value
    """

    kind: Literal["learned"] = "learned"
    lr: float = 1.0
    start: float = 2.0

    def __post_init__(self) -> None:
        if self.lr < 0 or self.start <= 0:
            raise ValueError(f"lr = {self.lr} must not be negative and start = {self.start} must be positive")


Statistic = Current | Hold | Hindsight | GradScale | Learned
