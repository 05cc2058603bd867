"""Gaps between runs of one seed, their means over seeds with intervals, and what a gap costs in time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fp4dist.study.plan import BASELINE
from fp4dist.study.training import Record

# Two-sided 95 % quantiles of Student's t by degrees of freedom; beyond them 1.96 + 2.4 / df is right to 0.2 %.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
Cell = tuple[str, int, str]  # model, budget, arm


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean over seeds of (a run's held-out loss - another's), in nats; half: of its 95 % interval, NaN for one seed."""

    mean: float
    half: float
    per_seed: dict[int, float]

    def text(self, digits: int = 4) -> str:
        """For a table."""
        width = f" ± {self.half:.{digits}f}" if math.isfinite(self.half) else " (one seed)"
        return f"{self.mean:+.{digits}f}{width}"


@dataclass(frozen=True, slots=True)
class Arms:
    """The finished runs by cell and seed."""

    runs: dict[Cell, dict[int, Record]]

    @classmethod
    def of(cls, records: Iterable[Record]) -> Arms:
        """Sort the records."""
        runs: dict[Cell, dict[int, Record]] = {}
        for r in records:
            runs.setdefault((r["model"], r["budget"], r["arm"]), {})[r["seed"]] = r
        return cls(runs)

    def losses(self, cell: Cell) -> dict[int, float]:
        """Seed -> final held-out loss; diverged runs have none."""
        return {seed: r["loss"] for seed, r in self.runs.get(cell, {}).items() if r["loss"] is not None}

    def difference(self, cell: Cell, other: str) -> Difference | None:
        """The cell minus arm `other` of the same model and budget, over the seeds that both have."""
        first, second = self.losses(cell), self.losses((*cell[:2], other))
        per_seed = {seed: first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())}
        if not per_seed:
            return None
        return Difference(statistics.fmean(per_seed.values()), half_interval(list(per_seed.values())), per_seed)

    def median(self, cell: Cell, field: str) -> float | None:
        """Of a field over the cell's runs."""
        values = [r[field] for r in self.runs.get(cell, {}).values() if r[field] is not None]
        return statistics.median(values) if values else None

    def slope(self, model: str, budget: int) -> float | None:
        """The derivative of bf16's loss by ln tokens, from its runs at `budget` and at the nearest other one."""
        others = [b for m, b, arm in self.runs if m == model and arm == BASELINE and b != budget]
        here = self.losses((model, budget, BASELINE))
        for other in sorted(others, key=lambda b: abs(math.log(b / budget))):
            there = self.losses((model, other, BASELINE))
            found = [(here[s] - there[s]) / math.log(budget / other) for s in here.keys() & there.keys()]
            if found and statistics.fmean(found) < 0:
                return statistics.fmean(found)
        return None

    def time_to_quality(self, cell: Cell) -> float | None:
        """(1 + extra tokens) / (1 + throughput gain) against bf16: below 1 the arm reaches bf16's loss sooner.

        Extra tokens are those that lower bf16's loss by the gap, along its slope at this budget: a short extrapolation
        in ln tokens, which flatters arms with a large gap.
        """
        gap, slope = self.difference(cell, BASELINE), self.slope(*cell[:2])
        mine, base = self.median(cell, "step_seconds"), self.median((*cell[:2], BASELINE), "step_seconds")
        if gap is None or slope is None or not mine or not base:
            return None
        return math.exp(gap.mean / -slope) * mine / base


def half_interval(sample: Sequence[float]) -> float:
    """Half of the 95 % interval of a sample's mean, by Student's t; NaN for one value."""
    n = len(sample)
    if n < 2:
        return math.nan
    quantile = STUDENT[n - 2] if n - 2 < len(STUDENT) else 1.96 + 2.4 / (n - 1)
    return quantile * statistics.stdev(sample) / math.sqrt(n)
