"""Which precision reaches the lowest loss for a budget, by the scaling law, and where one overtakes another.

A budget is what FP8 training of N_max parameters on D_max tokens costs: memory for N_max parameters in FP8's forward
pass and the time of the run. A forward pass that is `forward` times as fast serves that many more parameters in the
same time at inference; the training time that is left buys tokens:

    N = N_max forward     D = D_max training / forward     training = 1 / ((1/3) / forward + (2/3) / backward)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fp4dist.study.law import Law


@dataclass(frozen=True, slots=True)
class Precision:
    """Formats of the forward and the backward pass with their speed over FP8 and their efficiencies."""

    name: str
    forward: float = 1.0
    backward: float = 1.0
    eff_n: float = 1.0
    eff_d: float = 1.0

    @property
    def training(self) -> float:
        """Speed of a whole step over FP8: a third of its FLOPs are forward."""
        return 1 / ((1 / 3) / self.forward + (2 / 3) / self.backward)

    def loss(self, law: Law, parameters: float, tokens: float) -> float:
        """Loss that the budget of FP8 with `parameters` and `tokens` reaches in this precision."""
        n, d = parameters * self.forward, tokens * self.training / self.forward
        return law.loss(n, d, self.eff_n, self.eff_d)


def precisions(eff_n: float, eff_d: float, forward: float = 2.0, backward: float = 2.0) -> list[Precision]:
    """forward:backward in FP8 or FP4. FP8 counts as lossless; speeds are those of FP4 GEMMs over FP8's."""
    return [
        Precision("FP8:FP8"),
        Precision("FP4:FP8", forward=forward, eff_n=eff_n),
        Precision("FP8:FP4", backward=backward, eff_d=eff_d),
        Precision("FP4:FP4", forward=forward, backward=backward, eff_n=eff_n, eff_d=eff_d),
    ]


def best(law: Law, options: Sequence[Precision], parameters: float, tokens: float) -> Precision:
    """The precision with the lowest loss."""
    return min(options, key=lambda p: p.loss(law, parameters, tokens))


def crossover(law: Law, options: Sequence[Precision], parameters: float, name: str = "FP4:FP4") -> float:
    """Tokens a parameter from which on `name` is the best one; inf: not up to 10^5; 0: always."""

    def wins(log_ratio: float) -> bool:
        return best(law, options, parameters, parameters * math.exp(log_ratio)).name == name

    low, high = 0.0, math.log(1e5)
    if not wins(high):
        return math.inf
    if wins(low):
        return 0.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if wins(middle) else (middle, high)
    return math.exp(high)
