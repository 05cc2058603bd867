"""Put finished runs side by side: validation losses, gap to the first run, FP4 share, speed, and a plot.

    python tools/compare_runs.py runs/bf16 runs/nvidia_nvfp4 runs/quartet2 --plot runs/compare.png

The first folder is the baseline. Prints a Markdown table; reads metrics.jsonl, layers.json and config.resolved.yaml.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Run:
    """What a run folder tells. losses and val_losses: (step, nats per token)."""

    name: str
    recipe: str
    losses: list[tuple[int, float]]
    val_losses: list[tuple[int, float]]
    tokens_per_s: float
    fp4_share: float


def read_run(folder: Path) -> Run:
    """Read one run folder; a missing file is an error that names it."""
    for name in ("metrics.jsonl", "layers.json", "config.resolved.yaml"):
        if not (folder / name).is_file():
            raise SystemExit(f"{folder}: no {name}; is it the folder of a run?")
    rows: list[dict[str, Any]] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    layers = json.loads((folder / "layers.json").read_text())
    config = yaml.safe_load((folder / "config.resolved.yaml").read_text())
    speeds = [r["tokens_per_s"] for r in rows if r.get("tokens_per_s")]
    return Run(
        name=config["run"]["name"],
        recipe=layers["recipe"],
        losses=[(r["step"], r["loss"]) for r in rows if r.get("loss") is not None],
        val_losses=[(r["step"], r["val_loss"]) for r in rows if r.get("val_loss") is not None],
        tokens_per_s=statistics.median(speeds) if speeds else 0.0,
        fp4_share=layers["fp4_share_of_block_linear_flops"],
    )


def table(runs: list[Run]) -> str:
    """A Markdown table, the first run being the baseline of the gap."""
    lines = [
        "| recipe | FP4 share | validation loss, first | last | drop | gap | tokens/s | steps whose loss differs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        (_, first), (step, last) = run.val_losses[0], run.val_losses[-1]
        gap = last - runs[0].val_losses[-1][1]
        different = sum(a != b for a, b in zip(run.losses, runs[0].losses, strict=False))
        lines.append(
            f"| {run.recipe} | {run.fp4_share:.1%} | {first:.4f} | {last:.4f} (step {step}) | {first - last:.4f}"
            f" | {gap:+.4f} | {run.tokens_per_s:,.0f} | {different} of {len(run.losses)} |"
        )
    return "\n".join(lines)


def draw(runs: list[Run], path: Path) -> None:
    """Training and validation curves, and below them each run's training loss minus the baseline's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(8, 7), sharex=True, height_ratios=[3, 1])
    baseline = dict(runs[0].losses)
    for run in runs:
        (line,) = top.plot(*zip(*run.losses, strict=True), alpha=0.35, linewidth=0.8)
        top.plot(*zip(*run.val_losses, strict=True), "o-", color=line.get_color(), label=f"{run.recipe}, validation")
        gaps = [(s, value - baseline[s]) for s, value in run.losses if s in baseline]
        bottom.plot(*zip(*gaps, strict=True), color=line.get_color(), linewidth=0.8)
    top.set_ylabel("loss (nats per token)")
    top.legend()
    bottom.set_ylabel(f"loss - {runs[0].recipe}")
    bottom.set_xlabel("step")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="run folders; the first is the baseline")
    parser.add_argument("--plot", type=Path, help="where to write the picture (PNG)")
    arguments = parser.parse_args()
    runs = [read_run(folder) for folder in arguments.folders]
    print(table(runs))
    if arguments.plot:
        draw(runs, arguments.plot)
        print(f"plot: {arguments.plot}")


if __name__ == "__main__":
    main()
