"""What coding has done to a reduction, measured against the exact one, and the guard that acts on it.

With g_i the gradient of rank i, S their exact sum and Q the sum that the coded reduction gave,

    nmse        |Q - S|^2 / |S|^2
    one_shot    |Q - S|^2 / sum |g_i|^2, which is the wire's own error while the ranks' roundings are independent
    bias        <Q, S> / <S, S> - 1: a shrinking (or growing) gradient
    cosine      <Q, S> / (|Q| |S|)
    correlation mean over pairs of <g_i, g_j>, in units of the mean |g_i|^2: near 1 averaging no longer removes errors
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fp4dist.comm.codec import Noise, roundtrip
from fp4dist.spec.communication import Band
from fp4dist.spec.wire import Wire

_SAMPLE = 2**16


@dataclass(frozen=True, slots=True)
class Finding:
    """One comparison; see the module. `step` is the clock's, `what` the bucket, `expected` the wire's own error."""

    what: str
    step: int
    nmse: float
    one_shot: float
    bias: float
    cosine: float
    correlation: float
    expected: float

    def why_outside(self, band: Band) -> str | None:
        """What leaves the band; None inside of it. A gradient of zeros, or one that is not finite as it was, is inside:
        the step is judged by its norm, and what coding did to it cannot be told.
        """
        if math.isnan(self.nmse):
            return None
        if math.isinf(self.nmse):
            return "the exact result is finite, the coded one is not"
        if self.one_shot > band.nmse * self.expected:
            return f"error {self.one_shot:.2e} is over {band.nmse:g} times the wire's own {self.expected:.2e}"
        if self.cosine < band.cosine:
            return f"cosine {self.cosine:.4f} is under {band.cosine:g}"
        if abs(self.bias) > band.bias:
            return f"bias {self.bias:+.4f} is over {band.bias:g}"
        return None

    def badness(self, band: Band) -> tuple[bool, float]:
        """By which the worst of several copies is found: outside of the band, then the error, least without one."""
        return self.why_outside(band) is not None, -1.0 if math.isnan(self.one_shot) else self.one_shot

    def text(self) -> str:
        """The numbers in one line."""
        return (
            f"{self.what}: NMSE {self.nmse:.2e} (one rank's {self.one_shot:.2e}, the wire's own {self.expected:.2e}),"
            f" bias {self.bias:+.4f}, cosine {self.cosine:.5f}, gradient correlation {self.correlation:+.3f}"
        )


def compare(
    what: str, step: int, coded: Tensor, exact: Tensor, own: Tensor, wire: Wire, group: Any, *, mean: bool, cut: bool
) -> Finding:
    """A Finding, equal on every rank of `group`; a collective call.

    coded, exact   what the two reductions gave this rank: its part of the result (`cut`) or all of it, on every rank
    own            what this rank had put in
    mean           the reductions averaged
    """
    size = dist.get_world_size(group)
    difference, share = coded.double() - exact.double(), 1.0 if cut else 1.0 / size
    e, q = exact.double(), coded.double()
    sums = torch.stack([(difference @ difference) * share, (e @ e) * share, (q @ e) * share, (q @ q) * share,
                        own.double().square().sum()])  # fmt: skip
    dist.all_reduce(sums, group=group)
    error, square, product, coded_square, alone = sums.tolist()
    scale = float(size * size) if mean else 1.0  # of |sum|^2 over |result|^2
    if math.isfinite(square) and math.isfinite(alone) and not math.isfinite(error):  # coding alone has lost it
        error = math.inf
    nothing = not square > 0 or not alone > 0 or not (math.isfinite(square) and math.isfinite(alone))
    lost = nothing or not math.isfinite(error)
    return Finding(
        what=what,
        step=step,
        nmse=math.nan if nothing else error / square,
        one_shot=math.nan if nothing else scale * error / alone,
        bias=math.nan if lost else product / square - 1,
        cosine=math.nan if lost else product / math.sqrt(square * coded_square) if coded_square > 0 else 0.0,
        correlation=math.nan if nothing or size == 1 else (scale * square - alone) / ((size - 1) * alone),
        expected=own_error(wire),
    )


@cache
def own_error(wire: Wire) -> float:
    """NMSE of one coding of a normal vector, measured once on the CPU with fixed noise."""
    x = torch.randn(_SAMPLE, generator=torch.Generator().manual_seed(0))
    error = roundtrip(x, wire, Noise(seed=0, step=0, bucket=0)).double() - x
    return float(error.square().sum() / x.double().square().sum())
