"""The tables and plots of a study, from all records of a folder; what is missing is named."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fp4dist.study.plan import BASELINE, Study, fingerprint, jobs, name_of
from fp4dist.study.statistics import Arms, Cell, Difference
from fp4dist.study.training import Record


def write_report(study: Study, records: Sequence[Record], folder: Path) -> str:
    """Write table.md, results.json, gaps.png and curves.png into `folder`; returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    mine = records_of(study, records)
    found = Arms.of(mine)
    text = "\n".join([*_tables(study, found), *_order(study, found), *_missing(study, mine)]) + "\n"
    (folder / "table.md").write_text(text, encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(_results(study, found), indent=1) + "\n", encoding="utf-8")
    if mine:
        _draw_gaps(study, found, folder / "gaps.png")
        _draw_curves(study, found, folder / "curves.png")
    return text


def records_of(study: Study, records: Sequence[Record]) -> list[Record]:
    """Those of the study's runs, whichever study they were made for, after those that were made for it otherwise."""
    wanted = {job.fingerprint for job in jobs(study)}
    others = [r for r in records if r["study"] == study.name and fingerprint(r["config"]) not in wanted]
    return others + [r for r in records if fingerprint(r["config"]) in wanted]


def _groups(study: Study, found: Arms) -> list[tuple[str, int]]:
    """(model, budget) of the finished runs, smallest first."""
    return sorted({cell[:2] for cell in found.runs}, key=lambda g: (g[0], g[1]))


def _tables(study: Study, found: Arms) -> list[str]:
    lines = []
    for model, budget in _groups(study, found):
        cells = [(model, budget, name_of(arm)) for arm in study.arms]
        some = next(iter(found.runs[next(c for c in found.runs if c[:2] == (model, budget))].values()))
        ratio = some["tokens"] / some["block_parameters"]
        lines += [
            f"{model}, {some['tokens'] / 1e6:.1f}M tokens ({ratio:.1f} a block parameter), {some['device']}, torch"
            f" {some['versions']['torch']}; loss in nats on the held-out files, gaps to {BASELINE} paired by seed,"
            " 95 % by Student's t over seeds",
            "",
            "| arm | FP4 share | seeds | held-out loss | gap | published gap | ms a step | over bf16 | time to quality"
            " | peak GiB |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *[_row(study, found, cell) for cell in cells if cell in found.runs],
            "",
        ]
    return lines


def _row(study: Study, found: Arms, cell: Cell) -> str:
    runs = found.runs[cell]
    losses = found.losses(cell)
    gap = found.difference(cell, BASELINE) if cell[2] != BASELINE else None
    arm = next(a for a in study.arms if name_of(a) == cell[2])
    diverged = sum(r["diverged"] for r in runs.values())
    seconds, base = found.median(cell, "step_seconds"), found.median((*cell[:2], BASELINE), "step_seconds")
    quality, peak = found.time_to_quality(cell), found.median(cell, "peak_bytes")
    share = next(iter(runs.values()))["fp4_share"]
    cells = [
        cell[2],
        f"{share:.0%}",
        f"{len(runs)}" + (f" ({diverged} diverged)" if diverged else ""),
        f"{sum(losses.values()) / len(losses):.4f}" if losses else "",
        gap.text() if gap else "",
        f"{arm.published:.4f}" if arm.published is not None else "",
        f"{seconds * 1e3:.1f}" if seconds else "",
        f"{seconds / base:.2f}" if seconds and base and cell[2] != BASELINE else "",
        f"{quality:.2f}" if quality and cell[2] != BASELINE else "",
        f"{peak / 2**30:.1f}" if peak else "",
    ]
    return f"| {' | '.join(cells)} |"


def _order(study: Study, found: Arms) -> list[str]:
    """Each neighbour pair of the published order: the paired difference, and whether it is resolved."""
    published = {name_of(a): a.published for a in study.arms}
    lines = []
    for model, budget in _groups(study, found):
        rows = []
        for better, worse in zip(study.ordering, study.ordering[1:], strict=False):
            d = found.difference((model, budget, worse), better)
            if d is None:
                rows.append(f"| {better} < {worse} | missing | | |")
                continue
            here, there = published[better], published[worse]
            told = f"{there - here:+.4f}" if here is not None and there is not None else ""
            rows.append(f"| {better} < {worse} | {d.text()} | {told} | {verdict(d)} |")
        if rows:
            where = f"{model} at {budget / 1e6:g}M tokens"
            head = f"Published order ({study.source}) in {where}, difference of the two losses:"
            lines += [head, "", "| pair | measured | published | |", "|---|---|---|---|", *rows, ""]
    return lines


def verdict(d: Difference) -> str:
    """Whether a difference that was expected to be positive is."""
    if not math.isfinite(d.half):
        return "one seed: no interval"
    if abs(d.mean) <= d.half:
        return "not resolved"
    return "holds" if d.mean > 0 else "reversed"


def _missing(study: Study, records: Sequence[Record]) -> list[str]:
    """Runs of the study without a record, and records whose configurations differ beside what the study varies."""
    done, wanted = {fingerprint(r["config"]) for r in records}, {job.fingerprint for job in jobs(study)}
    missing = [job.name for job in jobs(study) if job.fingerprint not in done]
    lines = [f"Missing: {len(missing)} of {len(jobs(study))} runs: {', '.join(missing)}"] if missing else []
    others = sorted(r["run"] for r in records if fingerprint(r["config"]) not in wanted)
    lines += [f"Not of the study as it is now: {', '.join(others)}"] if others else []
    for what, values in (("device", {r["device"] for r in records}), ("data", {_data(r) for r in records})):
        lines += [f"Attention: the runs differ in {what}: {', '.join(sorted(values))}"] if len(values) > 1 else []
    return lines


def _data(r: Record) -> str:
    return json.dumps(r["config"]["data"], sort_keys=True)


def _results(study: Study, found: Arms) -> dict[str, Any]:
    """The table's numbers as data, for further scripts."""
    rows = []
    for cell, runs in sorted(found.runs.items()):
        gap = found.difference(cell, BASELINE)
        rows.append(
            {
                "model": cell[0], "budget": cell[1], "arm": cell[2], "losses": found.losses(cell),
                "gap": gap.mean if gap else None,
                "half": gap.half if gap and math.isfinite(gap.half) else None,
                "step_seconds": found.median(cell, "step_seconds"), "peak_bytes": found.median(cell, "peak_bytes"),
                "time_to_quality": found.time_to_quality(cell),
                "fp4_share": next(iter(runs.values()))["fp4_share"],
                "block_parameters": next(iter(runs.values()))["block_parameters"],
                "tokens": next(iter(runs.values()))["tokens"],
            }
        )  # fmt: skip
    return {"study": study.name, "cells": rows}


def _draw_gaps(study: Study, found: Arms, file: Path) -> None:
    """Each arm's gap with its interval, seeds as dots; a panel for each model and budget."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = [g for g in _groups(study, found) if any(c[:2] == g and c[2] != BASELINE for c in found.runs)]
    if not groups:
        return
    names = [name_of(a) for a in study.arms if name_of(a) != BASELINE]
    figure, panels = pyplot.subplots(
        1, len(groups), figsize=(6 * len(groups), 1.5 + 0.3 * len(names)), squeeze=False, sharey=True
    )
    for axes, group in zip(panels[0], groups, strict=True):
        for place, name in enumerate(reversed(names)):
            gap = found.difference((*group, name), BASELINE)
            if gap is None:
                continue
            width = gap.half if math.isfinite(gap.half) else 0.0
            axes.errorbar(gap.mean, place, xerr=width, fmt="o", color="C0", capsize=3, markersize=4)
            axes.plot(list(gap.per_seed.values()), [place] * len(gap.per_seed), ".", color="C1", markersize=4)
        axes.axvline(0.0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(names)), list(reversed(names)), fontsize="small")
        axes.set_title(f"{group[0]}, {group[1] / 1e6:g}M tokens", fontsize="small")
        axes.set_xlabel(f"held-out loss - {BASELINE}'s (nats)")
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _draw_curves(study: Study, found: Arms, file: Path) -> None:
    """Training loss minus bf16's of the same seed, over steps, mean over seeds; a panel for each model and budget."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = _groups(study, found)
    figure, panels = pyplot.subplots(1, len(groups), figsize=(6 * len(groups), 4), squeeze=False)
    for axes, group in zip(panels[0], groups, strict=True):
        base = {s: {int(p[0]): p[1] for p in r["curve"]} for s, r in found.runs.get((*group, BASELINE), {}).items()}
        for name in (name_of(a) for a in study.arms if name_of(a) != BASELINE):
            points: dict[int, list[float]] = {}
            for seed, r in found.runs.get((*group, name), {}).items():
                for step, loss, _ in r["curve"]:
                    if int(step) in base.get(seed, {}):
                        points.setdefault(int(step), []).append(loss - base[seed][int(step)])
            if points:
                axes.plot(points.keys(), [sum(v) / len(v) for v in points.values()], linewidth=0.9, label=name)
        axes.axhline(0.0, color="black", linewidth=0.8)
        axes.set_title(f"{group[0]}, {group[1] / 1e6:g}M tokens", fontsize="small")
        axes.set_xlabel("step")
        axes.set_ylabel(f"training loss - {BASELINE}'s (nats)")
        axes.set_ylim(-0.05, 0.3)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
