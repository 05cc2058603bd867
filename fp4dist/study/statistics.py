"""Gaps between runs of one seed, their means over seeds with intervals, and what a gap costs in time."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fp4dist.study.plan import BASELINE
from fp4dist.study.training import Record

# Two-sided 95 % quantiles of Student's t by degrees of freedom; beyond them 1.96 + 2.4 / df is right to 0.2 %.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
LAST = 0.25  # of the steps: where training losses are compared
Group = tuple[str, int]  # model, budget
Cell = tuple[str, int, str]  # and arm


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
class Noise:
    """What a seed does to one run's loss beyond what it does to all arms', in nats: one deviation for every arm."""

    deviation: float
    freedom: int
    arms: int
    seeds: int

    def half(self, seeds: int) -> float:
        """Half of the 95 % interval of the difference of two arms over so many common seeds."""
        return student(self.freedom) * self.deviation * math.sqrt(2 / seeds)

    def half_of_ratio(self, ratio: float, gap: float, seeds: int) -> float:
        """Of the ratio of two gaps that share their baseline, to first order. gap   the denominator"""
        spread = math.sqrt((1 + ratio**2 + (1 - ratio) ** 2) / seeds)
        return student(self.freedom) * self.deviation * spread / abs(gap)


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

    def groups(self) -> list[Group]:
        """(model, budget) of the finished runs, smallest first."""
        return sorted({cell[:2] for cell in self.runs})

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

    def noise(self, model: str, budget: int) -> Noise | None:
        """From the arms that have several seeds in common: what is left of their losses when each arm's mean and each
        seed's mean are taken out (two-way layout without interaction). Takes the arms and seeds that leave the most
        degrees of freedom; None where there are no two arms with two seeds in common.
        """
        table = {cell[2]: self.losses(cell) for cell in self.runs if cell[:2] == (model, budget)}
        seeds = sorted({seed for losses in table.values() for seed in losses})
        best: tuple[int, list[list[float]]] = 0, []
        for size in range(2, len(seeds) + 1):
            for some in itertools.combinations(seeds, size):
                rows = [[losses[seed] for seed in some] for losses in table.values() if losses.keys() >= set(some)]
                best = max(best, ((len(rows) - 1) * (size - 1), rows), key=lambda found: found[0])
        freedom, rows = best
        if freedom < 1:
            return None
        whole = statistics.fmean(statistics.fmean(row) for row in rows)
        columns = [statistics.fmean(column) - whole for column in zip(*rows, strict=True)]
        rest = [loss - statistics.fmean(row) - c for row in rows for loss, c in zip(row, columns, strict=True)]
        deviation = math.sqrt(sum(x * x for x in rest) / freedom)
        return Noise(deviation, freedom, len(rows), len(columns))

    def late(self, cell: Cell, other: str) -> Difference | None:
        """The cell's training loss minus `other`'s in the last quarter of the steps, on the same samples: the mean over
        seeds. With one seed the interval is that over its windows of some steps: of the noise of samples and of the
        weights' short moves, not of what another seed would change.
        """
        per_seed, windows = {}, []
        second = self.runs.get((*cell[:2], other), {})
        for seed, r in self.runs.get(cell, {}).items():
            if seed not in second or r["loss"] is None or second[seed]["loss"] is None:
                continue
            there = {int(step): loss for step, loss, _ in second[seed]["curve"]}
            first = (1 - LAST) * r["steps"]
            windows = [loss - there[step] for step, loss, _ in r["curve"] if step > first and step in there]
            if windows:
                per_seed[seed] = statistics.fmean(windows)
        if not per_seed:
            return None
        means = list(per_seed.values())
        half = half_interval(means) if len(means) > 1 else half_interval(windows)
        return Difference(statistics.fmean(means), half, per_seed)

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


def student(freedom: int) -> float:
    """The two-sided 95 % quantile."""
    return STUDENT[freedom - 1] if freedom <= len(STUDENT) else 1.96 + 2.4 / freedom


def half_interval(sample: Sequence[float]) -> float:
    """Half of the 95 % interval of a sample's mean, by Student's t; NaN for one value."""
    n = len(sample)
    return student(n - 1) * statistics.stdev(sample) / math.sqrt(n) if n > 1 else math.nan
