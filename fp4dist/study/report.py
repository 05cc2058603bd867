"""The page of a study: its tables from all records of a folder, in words that say what they hold; what is missing."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fp4dist.study.pictures import draw
from fp4dist.study.plan import BASELINE, Arm, Study, jobs, name_of
from fp4dist.study.results import runs_of, write_results
from fp4dist.study.statistics import LAST, Arms, Cell, Difference, Group
from fp4dist.study.training import Record


def write_report(study: Study, records: Sequence[Record], folder: Path) -> str:
    """Write table.md, results.json and pictures into `folder`; returns the page. records   whole or short ones"""
    folder.mkdir(parents=True, exist_ok=True)
    mine, others = runs_of(study, records)
    found = Arms.of([*others, *mine])
    pictures = draw(study, found, folder)
    parts = [_head(study), *(line for group in found.groups() for line in _tables(study, found, group))]
    parts += [line for name in pictures for line in (f"![{name.removesuffix('.png')}]({name})", "")]
    text = "\n".join([*parts, *_missing(study, mine, others)]).rstrip() + "\n"
    (folder / "table.md").write_text(text, encoding="utf-8")
    write_results(folder / "results.json", study, _cells(study, found), [*others, *mine])
    return text


def _head(study: Study) -> str:
    """Commands, and what the columns hold."""
    return (
        f"# Study {study.name}\n\n"
        f"`python tools/study.py run {study.name} --out RECORDS` makes the records, `python tools/study.py report"
        f" {study.name} --out RECORDS --report FOLDER` this page; with `--out results.json` it is made again.\n\n"
        f"Loss: nats over the held-out files after the last step. Gap: that minus {BASELINE}'s of the same seed;"
        " intervals are 95 %, by Student's t over seeds. Pooled: half of the interval where one deviation is taken for"
        " all arms, from what is left of their losses without the means of arms and of seeds; it holds if a seed moves"
        f" all arms alike. Last quarter: the training loss minus {BASELINE}'s over the last {LAST:.0%} of the steps, on"
        " the same samples; of one seed its interval is over windows of steps: noise of samples, not of another seed."
        " FP4 share: of the FLOPs of block linears. ms a step: the median of the run's windows. Time to quality: (1 +"
        f" extra tokens) / (1 + throughput gain) against {BASELINE}, by its slope between two budgets.\n"
    )


def _reference(study: Study) -> str:
    """The arm that others' gaps are set in proportion to; empty: none."""
    return study.ordering[0] if study.ordering else ""


def _tables(study: Study, found: Arms, group: Group) -> list[str]:
    cells = [(*group, name_of(arm)) for arm in study.arms if (*group, name_of(arm)) in found.runs]
    some = next(iter(next(found.runs[c] for c in found.runs if c[:2] == group).values()))
    ratio, ref = some["tokens"] / some["block_parameters"], _reference(study)
    return [
        f"## {group[0]}, {some['tokens'] / 1e6:.1f}M tokens ({ratio:.1f} a block parameter)",
        "",
        f"{some['device']}, torch {some['torch']}.{_noise(found, group)}",
        "",
        "| arm | FP4 share | seeds | held-out loss | gap | ± pooled | last quarter | ms a step | over"
        f" {BASELINE} | time to quality | peak GiB |",
        f"|{'---|' * 11}",
        *[_row(found, cell) for cell in cells],
        "",
        *(_proportions(study, found, cells, ref) if (*group, ref) in found.runs else []),
        *_order(study, found, group),
    ]


def _noise(found: Arms, group: Group) -> str:
    """What is known of the noise of seeds."""
    noise, cells = found.noise(*group), [cell for cell in found.runs if cell[:2] == group]
    if noise is not None:
        return (
            f" Pooled from {noise.arms} arms x {noise.seeds} seeds: a run's deviation is {noise.deviation:.5f} nats,"
            f" {noise.freedom} degrees of freedom."
        )
    one = len({seed for cell in cells for seed in found.runs[cell]}) == 1
    return " **One seed: no interval here says what another seed would give.**" if one and len(cells) > 1 else ""


def _row(found: Arms, cell: Cell) -> str:
    runs, losses = found.runs[cell], found.losses(cell)
    baseline = cell[2] == BASELINE
    gap, late = (None, None) if baseline else (found.difference(cell, BASELINE), found.late(cell, BASELINE))
    diverged, noise = sum(r["diverged"] for r in runs.values()), found.noise(*cell[:2])
    seconds, base = found.median(cell, "step_seconds"), found.median((*cell[:2], BASELINE), "step_seconds")
    quality, peak = found.time_to_quality(cell), found.median(cell, "peak_bytes")
    cells = [
        cell[2],
        f"{next(iter(runs.values()))['fp4_share']:.0%}",
        f"{len(runs)}" + (f" ({diverged} diverged)" if diverged else ""),
        f"{sum(losses.values()) / len(losses):.4f}" if losses else "",
        gap.text() if gap else "",
        f"{noise.half(len(gap.per_seed)):.4f}" if gap and noise else "",
        late.text() if late else "",
        f"{seconds * 1e3:.1f}" if seconds else "",
        f"{seconds / base:.2f}" if seconds and base and not baseline else "",
        f"{quality:.2f}" if quality and not baseline else "",
        f"{peak / 2**30:.1f}" if peak else "",
    ]
    return f"| {' | '.join(cells)} |"


def _proportions(study: Study, found: Arms, cells: Sequence[Cell], ref: str) -> list[str]:
    """Gaps and step times over those of the reference arm, beside the published gaps' ratios."""
    published, group = {name_of(a): a.published for a in study.arms}, cells[0][:2]
    whole, other = published.get(ref), found.median((*group, ref), "step_seconds")
    lines = []
    for cell in cells:
        there, mine = published[cell[2]], found.median(cell, "step_seconds")
        if cell[2] == BASELINE or found.difference(cell, BASELINE) is None:
            continue
        told = f"{there:.4f}" if there is not None else ""
        part = f"{there / whole:.2f}" if there is not None and whole else ""
        time = f"{mine / other:.2f}" if mine and other else ""
        lines.append(f"| {cell[2]} | {_ratio(found, cell, ref)} | {told} | {part} | {time} |")
    head = f"| arm | gap over {ref}'s | published gap | over {ref}'s | step time over {ref}'s |"
    return [head, "|---|---|---|---|---|", *lines, ""] if len(lines) > 1 else []


def _ratio(found: Arms, cell: Cell, ref: str) -> str:
    """The gap over the reference arm's of the same seeds, where that is more than its noise."""
    mine, base = found.difference(cell, BASELINE), found.difference((*cell[:2], ref), BASELINE)
    if mine is None or base is None or not (common := sorted(mine.per_seed.keys() & base.per_seed.keys())):
        return ""
    whole = sum(base.per_seed[seed] for seed in common) / len(common)
    value, noise = sum(mine.per_seed[seed] for seed in common) / len(common) / whole, found.noise(*cell[:2])
    if whole <= (noise.half(len(common)) if noise is not None else 0.0):
        return "not resolved"
    if noise is None or cell[2] == ref:
        return f"{value:.2f}"
    return f"{value:.2f} ± {noise.half_of_ratio(value, whole, len(common)):.2f}"


def _order(study: Study, found: Arms, group: Group) -> list[str]:
    """Each neighbour pair of the published order: the paired difference, and whether it is resolved."""
    published = {name_of(a): a.published for a in study.arms}
    noise, rows = found.noise(*group), []
    if sum((*group, name) in found.runs for name in study.ordering) < 2:
        return []
    for better, worse in zip(study.ordering, study.ordering[1:], strict=False):
        d = found.difference((*group, worse), better)
        if d is None:
            rows.append(f"| {better} < {worse} | missing | | | | |")
            continue
        here, there = published[better], published[worse]
        told = f"{there - here:+.4f}" if here is not None and there is not None else ""
        half = noise.half(len(d.per_seed)) if noise is not None else math.nan
        pooled = f"{half:.4f}" if noise is not None else ""
        word = verdict(d.mean, d.half)
        word += f"; pooled: {verdict(d.mean, half)}" if noise is not None else ""
        rows.append(
            f"| {better} < {worse} | {d.text()} | {pooled} | {_late(found, group, better, worse)} | {told} | {word} |"
        )
    if not rows:
        return []
    known = {name: d.mean for name in study.ordering if (d := found.difference((*group, name), BASELINE)) is not None}
    return [
        f"Published order ({study.source}): {' < '.join(study.ordering)}; measured:"
        f" {' < '.join(sorted(known, key=known.__getitem__))}. Differences of the two losses:",
        "",
        "| pair | measured | ± pooled | last quarter | published | |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
    ]


def _late(found: Arms, group: Group, better: str, worse: str) -> str:
    late = found.late((*group, worse), better)
    return late.text() if late is not None else ""


def verdict(mean: float, half: float) -> str:
    """Whether a difference that was expected to be positive is."""
    if not math.isfinite(half):
        return "one seed: not known"
    if abs(mean) <= half:
        return "not resolved"
    return "holds" if mean > 0 else "reversed"


def _missing(study: Study, mine: Sequence[Record], others: Sequence[Record]) -> list[str]:
    """Runs of the study without a record, and records whose configurations differ beside what the study varies."""
    done = {r["run"] for r in mine}
    missing = [job.name for job in jobs(study) if job.name not in done]
    lines = [f"Missing: {len(missing)} of {len(jobs(study))} runs: {', '.join(missing)}", ""] if missing else []
    strange = sorted(r["run"] for r in others)
    lines += [f"Not of the study as it is now: {', '.join(strange)}", ""] if strange else []
    runs = [*mine, *others]
    kinds = (
        ("device", {r["device"] for r in runs}),
        ("torch", {r["torch"] for r in runs}),
        ("data", {_data(r) for r in runs}),
    )
    for what, values in kinds:
        if len(values) > 1:
            lines += [f"Attention: the runs differ in {what}: {', '.join(sorted(values))}", ""]
    return lines


def _data(r: Record) -> str:
    return json.dumps(r["data"], sort_keys=True)


def _cells(study: Study, found: Arms) -> list[dict[str, Any]]:
    """The table's numbers as data, for further scripts."""
    arms = {name_of(arm): arm for arm in study.arms}
    return [_cell(found, cell, arms.get(cell[2])) for cell in sorted(found.runs)]


def _cell(found: Arms, cell: Cell, arm: Arm | None) -> dict[str, Any]:
    gap, late, noise = found.difference(cell, BASELINE), found.late(cell, BASELINE), found.noise(*cell[:2])
    some = next(iter(found.runs[cell].values()))
    return {
        "model": cell[0],
        "budget": cell[1],
        "arm": cell[2],
        "losses": found.losses(cell),
        "gap": gap.mean if gap else None,
        "half": _finite(gap),
        "half_pooled": noise.half(len(gap.per_seed)) if gap and noise else None,
        "late_gap": late.mean if late else None,
        "late_half": _finite(late),
        "published": arm.published if arm is not None else None,
        "step_seconds": found.median(cell, "step_seconds"),
        "peak_bytes": found.median(cell, "peak_bytes"),
        "time_to_quality": found.time_to_quality(cell),
        "fp4_share": some["fp4_share"],
        "block_parameters": some["block_parameters"],
        "tokens": some["tokens"],
    }


def _finite(d: Difference | None) -> float | None:
    return d.half if d is not None and math.isfinite(d.half) else None
