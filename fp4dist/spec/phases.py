"""When a phase of a recipe starts by itself, and what it does to the learning rate."""

from __future__ import annotations

from typing import Literal

from fp4dist.spec.frozen import frozen


@frozen
class GradNoise:
    """When the gradient no longer stands out of its quantization noise (arXiv:2505.19115): |g| / |g_q - g| under
    `below` (in root mean squares; sqrt 3 by the paper), measured on one micro-batch run twice, with and without
    quantized backward operands.

    every      steps between measurements;  after   first step measured
    momentum   of the moving average that is compared
    """

    kind: Literal["grad_noise"] = "grad_noise"
    below: float = 1.7320508
    every: int = 100
    after: int = 0
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if self.below <= 0 or self.every < 1 or self.after < 0 or not 0 <= self.momentum < 1:
            raise ValueError(
                f"below = {self.below} must be positive, every = {self.every} at least 1, after = {self.after} not"
                f" negative, momentum = {self.momentum} in [0, 1)"
            )


@frozen
class Manual:
    """When someone asks for it: `python -m fp4dist.train.phase RUN_FOLDER NAME`, at the next step."""

    kind: Literal["manual"] = "manual"


Trigger = GradNoise | Manual


@frozen
class LrShape:
    """The learning rate from a phase's start on, in place of the run's schedule: warm-up, then decay to the run's end.

    warmup     steps, or (below 1) share of the phase
    begin      where the warm-up begins: zero, or the rate of the step before the phase
    peak, end  in units of optim.lr
    decay      of the rest: cosine, linear or constant (at peak)
    """

    warmup: float = 0
    begin: Literal["zero", "current"] = "zero"
    peak: float = 1.0
    end: float = 0.0
    decay: Literal["cosine", "linear", "constant"] = "cosine"

    def __post_init__(self) -> None:
        if self.warmup < 0 or (self.warmup >= 1 and self.warmup != int(self.warmup)):
            raise ValueError(f"warmup = {self.warmup} must be a share of the phase below 1 or a whole number of steps")
        if self.peak <= 0 or self.end < 0:
            raise ValueError(f"peak = {self.peak} must be positive and end = {self.end} not negative")
