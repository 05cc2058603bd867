"""The pictures of a study: gaps with intervals, gap against step time, losses and their differences over the steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fp4dist.study.plan import BASELINE, Study, name_of
from fp4dist.study.statistics import Arms, Cell, Group


def draw(study: Study, found: Arms, folder: Path) -> list[str]:
    """Write gaps.png, cost.png, losses.png and curves.png, a panel for each model and budget; returns those written."""
    names = [name_of(arm) for arm in study.arms]
    whole = found.groups()
    compared = [
        g for g in whole if any(c[:2] == g and found.difference(c, BASELINE) for c in found.runs if c[2] != BASELINE)
    ]
    timed = [g for g in compared if found.median((*g, BASELINE), "step_seconds")]
    pictures: list[tuple[str, list[Group], float, Callable[..., None]]] = [
        ("gaps.png", compared, 1.5 + 0.3 * len(names), _gaps),
        ("cost.png", timed, 4.0, _cost),
        ("losses.png", whole, 4.0, _losses),
        ("curves.png", compared, 4.0, _curves),
    ]
    for file, groups, height, panel in pictures:
        if groups:
            _write(folder / file, groups, height, panel, found, names)
    return [file for file, groups, _, _ in pictures if groups]


def _write(
    file: Path, groups: list[Group], height: float, panel: Callable[..., None], found: Arms, names: list[str]
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(groups), figsize=(6 * len(groups), height), squeeze=False, layout="constrained"
    )
    for axes, group in zip(panels[0], groups, strict=True):
        axes.set_title(f"{group[0]}, {group[1] / 1e6:g}M tokens", fontsize="small")
        axes.grid(alpha=0.3)
        panel(axes, found, group, names)
    figure.savefig(file, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _half(found: Arms, cell: Cell) -> float:
    """Of the gap's interval: by its own seeds, else pooled, else zero."""
    gap, noise = found.difference(cell, BASELINE), found.noise(*cell[:2])
    if gap is None or math.isfinite(gap.half):
        return gap.half if gap is not None else 0.0
    return noise.half(len(gap.per_seed)) if noise is not None else 0.0


def _gaps(axes: Any, found: Arms, group: Group, names: list[str]) -> None:
    """Each arm's gap with its interval, seeds as dots, the last quarter's training gap as a cross."""
    shown = [n for n in reversed(names) if n != BASELINE and found.difference((*group, n), BASELINE) is not None]
    for place, name in enumerate(shown):
        cell = (*group, name)
        gap, late = found.difference(cell, BASELINE), found.late(cell, BASELINE)
        assert gap is not None
        axes.errorbar(gap.mean, place, xerr=_half(found, cell), fmt="o", color="C0", capsize=3, markersize=4)
        if len(gap.per_seed) > 1:
            axes.plot(list(gap.per_seed.values()), [place] * len(gap.per_seed), ".", color="C1", markersize=4)
        if late is not None:
            axes.plot(late.mean, place, "x", color="C7", markersize=4)
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(shown)), shown, fontsize="small")
    axes.set_xlabel(f"held-out loss - {BASELINE}'s (nats); x: training loss, last quarter")


def _cost(axes: Any, found: Arms, group: Group, names: list[str]) -> None:
    """Gap over step time: what lies below and to the left of an arm is better than it."""
    base = found.median((*group, BASELINE), "step_seconds")
    for name in names:
        cell = (*group, name)
        gap, seconds = found.difference(cell, BASELINE), found.median(cell, "step_seconds")
        if name == BASELINE or gap is None or not seconds or not base:
            continue
        axes.errorbar(seconds / base, gap.mean, yerr=_half(found, cell), fmt="o", color="C0", capsize=3, markersize=4)
        axes.annotate(name, (seconds / base, gap.mean), xytext=(4, 4), textcoords="offset points", fontsize="x-small")
    axes.plot(1.0, 0.0, "s", color="black", markersize=4)
    axes.margins(x=0.15)
    axes.set_xlabel(f"step time over {BASELINE}'s")
    axes.set_ylabel(f"gap to {BASELINE} (nats)")


def _losses(axes: Any, found: Arms, group: Group, names: list[str]) -> None:
    """Training loss over the steps, mean over seeds, and held-out losses as dots."""
    for number, name in enumerate(names):
        runs = found.runs.get((*group, name), {}).values()
        curve = _mean({int(s): loss for s, loss, _ in r["curve"]} for r in runs)
        dots = _mean({h["step"]: h["loss"] for h in r["held_out"]} for r in runs)
        if curve:
            colour = f"C{number % 10}"
            axes.plot(curve.keys(), curve.values(), color=colour, linewidth=0.9, label=name)
            axes.plot(dots.keys(), dots.values(), "o", color=colour, markersize=3)
    axes.set_xscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (nats); dots: held out")
    axes.legend(fontsize="x-small")


def _curves(axes: Any, found: Arms, group: Group, names: list[str]) -> None:
    """Training loss minus the baseline's of the same seed over the steps, mean over seeds; held-out losses as dots."""
    base, seen = found.runs.get((*group, BASELINE), {}), []
    for number, name in enumerate(names):
        pairs = [(r, base[seed]) for seed, r in found.runs.get((*group, name), {}).items() if seed in base]
        curve = _mean(
            _less({int(s): x for s, x, _ in r["curve"]}, {int(s): x for s, x, _ in b["curve"]}) for r, b in pairs
        )
        dots = _mean(
            _less({h["step"]: h["loss"] for h in r["held_out"]}, {h["step"]: h["loss"] for h in b["held_out"]})
            for r, b in pairs
        )
        if name != BASELINE and curve:
            colour = f"C{number % 10}"
            axes.plot(curve.keys(), curve.values(), color=colour, linewidth=0.9, label=name)
            axes.plot(dots.keys(), dots.values(), "o", color=colour, markersize=3)
            seen += list(curve.values())[len(curve) // 4 :]
    axes.axhline(0.0, color="black", linewidth=0.8)
    if known := [x for x in seen if math.isfinite(x)]:  # what the first steps do is off the picture
        axes.set_ylim(min(-0.02, *known) - 0.01, max(0.02, *known) + 0.01)
    axes.set_xlabel("step")
    axes.set_ylabel(f"training loss - {BASELINE}'s (nats); dots: held out")
    axes.legend(fontsize="x-small")


def _mean(series: Any) -> dict[int, float]:
    """Step -> mean over those of the series that have it."""
    points: dict[int, list[float]] = {}
    for one in series:
        for step, value in one.items():
            points.setdefault(step, []).append(value)
    return {step: sum(values) / len(values) for step, values in sorted(points.items())}


def _less(mine: dict[int, float], base: dict[int, float]) -> dict[int, float]:
    return {step: value - base[step] for step, value in mine.items() if step in base}
