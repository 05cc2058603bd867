"""curves.png: the whole run in one picture, drawn from metrics.jsonl so that a resumed run shows all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fp4dist.train.metrics import read_lines


def draw_curves(metrics: Path, picture: Path, title: str) -> None:
    """Training and validation loss, learning rate, gradient norm and speed over steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_lines(metrics)
    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display and without touching pyplot's global state
    grid = figure.add_gridspec(2, 3, height_ratios=(2, 1))
    loss = figure.add_subplot(grid[0, :])
    loss.plot(*_series(lines, "loss"), linewidth=0.8, label="training")
    loss.plot(*_series(lines, "val_loss"), "o-", label="validation")
    for line in lines:
        if line.get("skipped"):
            loss.axvline(line["step"], color="tab:red", linewidth=0.6)
    loss.set_title(title)
    loss.set_ylabel("loss (nats)")
    loss.legend()
    for column, (key, name) in enumerate(
        (("lr", "learning rate"), ("grad_norm", "gradient norm"), ("tokens_per_s", "tokens/s"))
    ):
        axes = figure.add_subplot(grid[1, column])
        axes.plot(*_series(lines, key), linewidth=0.8)
        axes.set_title(name, fontsize=10)
    for axes in figure.axes:
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    tmp = picture.with_name(f".{picture.name}")
    figure.savefig(tmp, dpi=120, format="png")
    tmp.replace(picture)


def _series(lines: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return [s for s, _ in points], [v for _, v in points]
