"""Pictures of the simulator: who computes what when, and scaling curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fp4dist.cluster.scaling import Point
from fp4dist.cluster.simulate import Span, Step

_FORWARD, _BACKWARD = "#4878a8", "#e1812c"
_DRAWN = 4000  # passes; more are no longer told apart


def draw(path: Path, step: Step, points: Sequence[Point], title: str) -> None:
    """A scaling curve if there are points, else the timeline; the file's ending says the format."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot()
    if points:
        _curves(axes, points)
    else:
        _timeline(axes, step.spans[:_DRAWN], step.step_s)
    axes.set_title(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _timeline(axes: Axes, spans: Sequence[Span], step_s: float) -> None:
    """One row a stage; deeper colours are later chunks."""
    stages = 1 + max(s.stage for s in spans)
    chunks = 1 + max(s.what.chunk for s in spans)
    for stage in range(stages):
        own = [s for s in spans if s.stage == stage]
        bars = [(s.begin_s, s.end_s - s.begin_s) for s in own]
        colors = [_FORWARD if s.what.forward else _BACKWARD for s in own]
        shades = [0.4 + 0.6 * (s.what.chunk + 1) / chunks for s in own]
        drawn = axes.broken_barh(bars, (stage - 0.4, 0.8), facecolors=colors, edgecolors="white", linewidth=0.2)
        drawn.set_alpha(shades)
    axes.set(xlabel="seconds", ylabel="pipeline stage", ylim=(stages - 0.5, -0.5), xlim=(0, step_s))
    axes.plot([], [], color=_FORWARD, linewidth=6, label="forward")
    axes.plot([], [], color=_BACKWARD, linewidth=6, label="backward")
    axes.legend(loc="lower right")


def _curves(axes: Axes, points: Sequence[Point]) -> None:
    for wire, color in (("bf16", _FORWARD), ("fp4", _BACKWARD)):
        own = [p for p in points if p.wire == wire]
        axes.plot([p.gpus for p in own], [100 * p.efficiency for p in own], "o-", color=color, label=f"{wire} wire")
    axes.set(xscale="log", xlabel="GPUs", ylabel="tokens/s/GPU, % of the smallest job")
    axes.grid(alpha=0.3)
    axes.legend()
