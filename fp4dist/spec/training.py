"""What a recipe does around the optimizer's step: gradient transforms, control of weights, dtypes of the state."""

from __future__ import annotations

from typing import Literal

from fp4dist.spec.frozen import frozen


@frozen
class SpikeClip:
    """SPAM (arXiv:2501.06842): where g^2 > threshold v, g <- sign(g) sqrt(threshold v), with v Adam's second moment.

    wait   steps after the start, and after each reset of the moments, without clipping
    """

    kind: Literal["spike_clip"] = "spike_clip"
    threshold: float = 5000.0
    wait: int = 20

    def __post_init__(self) -> None:
        if self.threshold <= 0 or self.wait < 0:
            raise ValueError(f"threshold = {self.threshold} must be positive and wait = {self.wait} not negative")


@frozen
class AdaClip:
    """Stable-SPAM (arXiv:2502.17055v2): M <- decay M + (1 - decay) max|g| of each tensor; entries above the
    bias-corrected M are scaled by M / max|g|.

    bias_step   the t of 1 - decay^t: since the start, or since the last reset of the moments (as released)
    """

    kind: Literal["ada_clip"] = "ada_clip"
    decay: float = 0.999
    bias_step: Literal["global", "since_reset"] = "global"

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay = {self.decay} must be in [0, 1)")


@frozen
class AdaNorm:
    """Stable-SPAM's AdaGN: each tensor's gradient gets the norm m / (sqrt(v) + eps), of bias-corrected moving
    averages of its norm n and n^2.

    decay_to   s falls from 1 to this by a cosine over the run, and multiplies norm_decay and Adam's beta1; 1: it stays
    """

    kind: Literal["ada_norm"] = "ada_norm"
    norm_decay: float = 0.7
    square_decay: float = 0.9
    eps: float = 1e-8
    decay_to: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.norm_decay < 1 and 0 <= self.square_decay < 1 and self.eps > 0 and 0 < self.decay_to <= 1):
            raise ValueError(
                f"norm_decay = {self.norm_decay} and square_decay = {self.square_decay} must be in [0, 1), eps ="
                f" {self.eps} positive, decay_to = {self.decay_to} in (0, 1]"
            )


@frozen
class MomentReset:
    """Set Adam's moments to 0 before the update of every step whose number (from 1) is a multiple of `every`.

    warmup    steps from a reset on in which the learning rate is multiplied by 1 - c, c falling from 0.99 to 0 by a
              cosine
    restart   Adam's step count, which its bias correction uses, starts anew too (Stable-SPAM); SPAM lets it go on
    """

    kind: Literal["moment_reset"] = "moment_reset"
    every: int = 500
    warmup: int = 0
    restart: bool = True

    def __post_init__(self) -> None:
        if self.every < 1 or not 0 <= self.warmup < self.every:
            raise ValueError(f"every = {self.every} must be at least 1 and warmup = {self.warmup} in [0, every)")


GradientTransform = SpikeClip | AdaClip | AdaNorm | MomentReset


@frozen
class Cage:
    """Pull weights to their quantized values (arXiv:2510.18784): e = w - Q(w) at the weights of the forward pass.

    strength   lambda at its height;  silence   share of the run in which it is 0
    schedule   linear_ramp: lambda (r - silence) / (1 - silence) with r = (step + 1) / steps; constant after the silence
    form       decoupled: w -= lr lambda e beside the update; coupled: g += lambda e before the moments
    """

    kind: Literal["cage"] = "cage"
    strength: float = 10.0
    silence: float = 0.8
    schedule: Literal["linear_ramp", "constant"] = "linear_ramp"
    form: Literal["decoupled", "coupled"] = "decoupled"

    def __post_init__(self) -> None:
        if self.strength <= 0 or not 0 <= self.silence < 1:
            raise ValueError(f"strength = {self.strength} must be positive and silence = {self.silence} in [0, 1)")


@frozen
class OsciReset:
    """Set oscillating weights to their quantized values: those with R = sum |dQ(w)| / (sum |dw| + 1e-8) of at least
    `threshold` over a window of steps (arXiv:2510.27527; as a distance ratio without pauses in AMD's ALTO).

    start       first step, or (below 1) share of the run before the first window
    every       steps from one window's begin to the next;  window   its length
    criterion   ratio, or bin_edge: those within (1 - margin) of half a step from the edge between two grid points
    share       of each weight's elements that are tracked: those nearest to a bin edge at the window's begin; 1: all
    """

    kind: Literal["osci_reset"] = "osci_reset"
    start: float = 0.66
    every: int = 200
    window: int = 50
    threshold: float = 8.0
    criterion: Literal["ratio", "bin_edge"] = "ratio"
    margin: float = 0.99
    share: float = 1.0

    def __post_init__(self) -> None:
        if self.start < 0 or (self.start >= 1 and self.start != int(self.start)):
            raise ValueError(f"start = {self.start} must be a share of the run below 1 or a whole number of steps")
        if not 1 <= self.window <= self.every:
            raise ValueError(f"window = {self.window} must be in [1, every = {self.every}]")
        if self.threshold <= 0 or not 0 < self.margin < 1 or not 0 < self.share <= 1:
            raise ValueError(
                f"threshold = {self.threshold} must be positive, margin = {self.margin} in (0, 1), share ="
                f" {self.share} in (0, 1]"
            )
        if self.share < 1 and self.criterion == "bin_edge":
            raise ValueError(
                f"share = {self.share} with criterion: bin_edge: nothing is tracked there, the weights at the window's"
                " end are looked at; leave share out"
            )


@frozen
class QRamping:
    """Oscillating weights are updated less often by more (arXiv:2502.20853): over `probe` steps of every `every` R is
    measured as in OsciReset; the period is N = min(floor(R / step_ratio) * stretch + 1, longest); such a weight
    collects its gradients for N steps, then takes one AdamW step with their mean and N times the learning rate.

    Known deviation: probes are steps of the run, with period 1; as published they are run aside and taken back.
    """

    kind: Literal["q_ramping"] = "q_ramping"
    every: int = 1000
    probe: int = 30
    step_ratio: float = 16.0
    stretch: int = 5
    longest: int = 100

    def __post_init__(self) -> None:
        if not 1 <= self.probe < self.every:
            raise ValueError(f"probe = {self.probe} must be in [1, every = {self.every})")
        if self.step_ratio <= 0 or self.stretch < 1 or self.longest < 1:
            raise ValueError(
                f"step_ratio = {self.step_ratio} must be positive, stretch = {self.stretch} and longest ="
                f" {self.longest} at least 1"
            )


WeightControl = Cage | OsciReset | QRamping

StateFormat = Literal["fp32", "bf16", "fp16", "e4m3"]


@frozen
class OptimizerState:
    """The precision that master weights and Adam's moments keep from step to step: they are rounded after each update.

    fp16 and e4m3 are scaled by a power of two for each tensor. The rounded values are held in fp32: the arithmetic of
    such a state, without its saving of memory.
    """

    master: Literal["fp32", "bf16"] = "fp32"
    exp_avg: StateFormat = "fp32"
    exp_avg_sq: StateFormat = "fp32"
