"""Two pictures of a layout: what a step's time goes to, and which ranks lie where. SVG and PNG."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from fp4dist.cluster.timing import Prediction
from fp4dist.cluster.topology import Placement

_CELLS = 12  # micro-batches and domains that are drawn; the rest is said in words
_FORWARD, _BACKWARD, _OTHER = "#4c78a8", "#72b7b2", "#e45756"
_SUFFIXES = (".svg", ".png")


def draw_timeline(found: Prediction, folder: Path) -> list[Path]:
    """The pipeline of one step (first micro-batches, 1F1B) and below it the step's seconds by cause."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[3, 1])
    _pipeline(above, found)
    _causes(below, found)
    figure.suptitle(f"{found.layout.label()}: {found.step_time_s:.4g} s a step (model)")
    return _save(figure, folder / "timeline")


def draw_racks(placement: Placement, folder: Path) -> list[Path]:
    """Domains side by side, a cell a GPU in its node, coloured by pipeline stage, numbered by data-parallel rank."""
    from matplotlib.figure import Figure

    shown = min(placement.domains, _CELLS)
    figure = Figure(figsize=(max(4.0, 1.6 * shown), 7), layout="constrained")
    axes = figure.subplots(1, shown, squeeze=False)[0]
    for domain, axis in enumerate(axes):
        _domain(axis, placement, domain)
    more = f"; {placement.domains - shown} more like these" if placement.domains > shown else ""
    figure.suptitle(f"{placement.gpus} GPUs, {placement.layout.label()}, {placement.layout.order}{more}")
    return _save(figure, folder / "racks")


def _save(figure: Any, stem: Path) -> list[Path]:
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_suffix(suffix) for suffix in _SUFFIXES]
    for path in paths:
        figure.savefig(path, dpi=120)
    return paths


def coordinates(placement: Placement, rank: int) -> dict[str, int]:
    """Place of a rank on each axis of the dense grid."""
    layout = placement.layout
    dp = layout.dp(placement.gpus)
    sizes = {"tp": layout.tp, "cp": layout.cp, "dp": dp, "pp": layout.pp}
    keys = ("tp", "cp", "pp", "dp") if layout.order == "tp-cp-ep-pp-dp" else ("tp", "cp", "dp", "pp")
    out: dict[str, int] = {}
    for key in keys:
        rank, out[key] = divmod(rank, sizes[key])
    return out


def schedule(stages: int, micro_batches: int, forward: float, backward: float) -> list[list[tuple[float, float, bool]]]:
    """1F1B: for each stage its passes as (start, seconds, whether forward), each after what it needs."""
    order = [_passes(stage, stages, micro_batches) for stage in range(stages)]
    done: dict[tuple[int, int, bool], float] = {}
    out: list[list[tuple[float, float, bool]]] = [[] for _ in range(stages)]
    free = [0.0] * stages
    while any(order):
        for stage in range(stages):
            while order[stage]:
                number, is_forward = order[stage][0]
                source = (stage - 1, number, True) if is_forward else (stage + 1, number, False)
                first = stage == 0 if is_forward else stage == stages - 1
                if not first and source not in done:
                    break
                start = max(free[stage], 0.0 if first else done[source])
                length = forward if is_forward else backward
                free[stage] = done[stage, number, is_forward] = start + length
                out[stage].append((start, length, is_forward))
                order[stage].pop(0)
    return out


def _passes(stage: int, stages: int, micro_batches: int) -> list[tuple[int, bool]]:
    warm = min(stages - stage - 1, micro_batches)
    out = [(i, True) for i in range(warm)]
    for i in range(micro_batches - warm):
        out += [(warm + i, True), (i, False)]
    return out + [(i, False) for i in range(micro_batches - warm, micro_batches)]


def _pipeline(axis: Any, found: Prediction) -> None:
    parts, layout = found.parts, found.layout
    forward, backward = parts.chunk_forward_s * layout.vpp, parts.chunk_backward_s * layout.vpp
    shown = min(parts.micro_batches, max(_CELLS, layout.pp))
    for stage, passes in enumerate(schedule(layout.pp, shown, forward, backward)):
        for is_forward, colour in ((True, _FORWARD), (False, _BACKWARD)):
            bars = [(start, length) for start, length, kind in passes if kind is is_forward]
            axis.broken_barh(bars, (stage - 0.4, 0.8), facecolors=colour, edgecolor="white", linewidth=0.5)
    axis.set_ylabel("pipeline stage")
    axis.invert_yaxis()
    axis.set_xlabel("seconds")
    chunks = f", drawn without its {layout.vpp} interleaved chunks" if layout.vpp > 1 else ""
    axis.set_title(f"forward blue, backward green; first {shown} of {parts.micro_batches} micro-batches{chunks}")


def _causes(axis: Any, found: Prediction) -> None:
    rows = sorted(found.breakdown.items(), key=lambda item: -item[1])
    edges = [0.0]
    for _, seconds in rows:
        edges.append(edges[-1] + seconds)
    for index, ((cause, seconds), (left, _)) in enumerate(zip(rows, pairwise(edges), strict=True)):
        axis.barh(0, seconds, left=left, color=f"C{index % 10}", edgecolor="white")
        if seconds > 0.06 * found.step_time_s:
            axis.text(
                left + seconds / 2, 0, f"{cause}\n{seconds / found.step_time_s:.0%}", ha="center", va="center", size=8
            )
    axis.set_yticks([])
    axis.set_xlabel("seconds of a step by cause")


def _domain(axis: Any, placement: Placement, domain: int) -> None:
    node = placement.topology.host.gpus
    first = domain * placement.per_domain
    ranks = range(first, min(first + placement.per_domain, placement.gpus))
    nodes = placement.topology.nodes_per_domain
    for index, rank in enumerate(ranks):
        at = coordinates(placement, rank)
        colour = f"C{at['pp'] % 10}"
        axis.add_patch(_cell(index % node, index // node, colour))
        axis.text(index % node + 0.5, index // node + 0.5, f"{at['dp']}", ha="center", va="center", size=6)
    for spare in range(-(-len(ranks) // node), nodes):
        for column in range(node):
            axis.add_patch(_cell(column, spare, "#dddddd"))
    axis.set_xlim(0, node)
    axis.set_ylim(nodes, 0)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(f"domain {domain}", size=8)
    axis.set_xlabel("colour: stage\nnumber: dp rank", size=6)


def _cell(column: int, row: int, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column + 0.05, row + 0.08), 0.9, 0.84, facecolor=colour, edgecolor="none", alpha=0.75)
