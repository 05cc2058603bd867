"""report.html of a run: its curves, what the monitor saw, the worst layers, what the autopilot did. One static file.

    python -m fp4dist.train.report RUN_FOLDER

No scripts and nothing from elsewhere: pictures are SVG in the page, which can be mailed as it is.
"""

from __future__ import annotations

import argparse
import html
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fp4dist.train.folder import RunFolder
from fp4dist.train.metrics import read_lines

Series = list[tuple[float, float]]
_COLOURS = ("#0057e7", "#d62d20", "#008744", "#ffa700", "#7b3fa0", "#444444")
_WORST = 12  # rows of each table of worst layers
# statistic -> (title, largest is worst, unit)
_STATISTICS: dict[str, tuple[str, bool, str]] = {
    "underflow": ("underflow", True, "share of non-zero elements that became zero"),
    "saturation": ("saturation", True, "share beyond the block's largest value"),
    "qsnr": ("QSNR", False, "dB"),
    "drift": ("amax drift", True, "log2 over the look before"),
}
_STYLE = """body{font:14px/1.4 sans-serif;margin:2em auto;max-width:70em;color:#222}
table{border-collapse:collapse;margin:.5em 0}
td,th{border:1px solid #ccc;padding:.15em .5em;text-align:right}td:first-child,th:first-child{text-align:left}
svg{background:#fafafa;margin:.3em}.row{display:flex;flex-wrap:wrap}h2{margin-top:1.5em}code{background:#f0f0f0}"""


def write_report(run: Path) -> Path:
    """Write report.html into a run folder from what lies there; returns its path."""
    folder = RunFolder(run)
    lines, looks = read_lines(folder.metrics), read_lines(folder.monitor)
    actions = read_lines(folder.autopilot)
    body = [
        f"<h1>{html.escape(run.name)}</h1>",
        _summary(folder, lines),
        "<h2>Training</h2>",
        _training(lines, actions),
        *_autopilot(actions),
        *_monitor(looks),
    ]
    head = f"<meta charset='utf-8'><title>{html.escape(run.name)}</title><style>{_STYLE}</style>"
    file = folder.path / "report.html"
    tmp = file.with_suffix(".tmp")
    page = f"<!doctype html><html><head>{head}</head><body>{''.join(body)}</body></html>\n"
    tmp.write_text(page, encoding="utf-8")
    tmp.replace(file)
    return file


def _summary(folder: RunFolder, lines: Sequence[dict[str, Any]]) -> str:
    layers = json.loads(folder.layers.read_text(encoding="utf-8")) if folder.layers.exists() else {}
    last = next((line for line in reversed(lines) if line.get("val_loss") is not None), None)
    facts = [f"recipe <b>{html.escape(str(layers.get('recipe', '?')))}</b>"]
    if "fp4_share_of_block_linear_flops" in layers:
        facts.append(f"{layers['fp4_share_of_block_linear_flops']:.1%} of block-linear FLOPs in FP4")
    facts.append(f"{max((line['step'] for line in lines), default=0)} steps")
    facts += [f"validation loss {last['val_loss']:.4f} at step {last['step']}"] if last else []
    skipped = sum(bool(line.get("skipped")) for line in lines)
    facts += [f"{skipped} steps skipped"] if skipped else []
    return f"<p>{', '.join(facts)}</p>"


def _training(lines: Sequence[dict[str, Any]], actions: Sequence[dict[str, Any]]) -> str:
    marks = [float(a["step"]) for a in actions]
    charts = [
        chart("loss (nats)", {"training": _series(lines, "loss"), "validation": _series(lines, "val_loss")}, marks),
        chart("gradient norm", {"": _series(lines, "grad_norm")}, marks, logarithmic=True),
        chart("learning rate", {"": _series(lines, "lr")}, marks),
        chart("tokens/s", {"": _series(lines, "tokens_per_s")}, marks),
    ]
    return f"<div class='row'>{''.join(charts)}</div>"


def _autopilot(actions: Sequence[dict[str, Any]]) -> list[str]:
    if not actions:
        return []
    rows = [[str(a["step"]), a["mode"], a["action"], a["cause"]] for a in actions]
    return ["<h2>Autopilot</h2>", table(["step", "mode", "action", "cause"], rows)]


def _monitor(looks: Sequence[dict[str, Any]]) -> list[str]:
    if not looks:
        return ["<h2>Monitor</h2><p>no looks: set <code>monitor: {}</code> in the run file</p>"]
    out = ["<h2>Monitor</h2>", "<div class='row'>"]
    out.append(
        chart("gradient over its noise", {"": [(k["step"], k["noise"]) for k in looks if k["noise"] is not None]})
    )
    for name, (title, _, unit) in _STATISTICS.items():
        slots = sorted({slot for look in looks for slot in _slot_names(look)})
        curves = {slot: _means(looks, slot, name) for slot in slots}
        out.append(chart(f"{title} ({unit}), mean over layers", curves))
    for name in ("zero_gradients", "oscillation"):
        out.append(chart(f"{name.replace('_', ' ')}, mean over layers", {"": _layer_means(looks, name)}))
    out += ["</div>", f"<h2>Worst layers at step {looks[-1]['step']}</h2><div class='row'>"]
    out += [_worst(looks[-1], name) for name in _STATISTICS]
    out += [_worst_layers(looks[-1], name) for name in ("zero_gradients", "oscillation")]
    listed = "".join(f"<li>{html.escape(text)}</li>" for text in looks[-1]["fallbacks"])
    out += ["</div>", f"<h2>Kernel fallbacks</h2><ul>{listed or '<li>none</li>'}</ul>"]
    return out


def _slot_names(look: dict[str, Any]) -> set[str]:
    return {slot for found in look["linears"].values() for slot, numbers in found.items() if isinstance(numbers, dict)}


def _values(look: dict[str, Any], slot: str, name: str) -> list[tuple[str, float]]:
    """(path, value)."""
    found = ((path, numbers.get(slot, {}).get(name)) for path, numbers in look["linears"].items())
    return [(path, value) for path, value in found if value is not None]


def _means(looks: Sequence[dict[str, Any]], slot: str, name: str) -> Series:
    points = [(look["step"], [v for _, v in _values(look, slot, name)]) for look in looks]
    return [(float(step), sum(values) / len(values)) for step, values in points if values]


def _layer_means(looks: Sequence[dict[str, Any]], name: str) -> Series:
    points = [(k["step"], [f[name] for f in k["linears"].values() if f.get(name) is not None]) for k in looks]
    return [(float(step), sum(values) / len(values)) for step, values in points if values]


def _worst(look: dict[str, Any], name: str) -> str:
    title, largest, _ = _STATISTICS[name]
    rows = [(value, path, slot) for slot in sorted(_slot_names(look)) for path, value in _values(look, slot, name)]
    key: Callable[[tuple[float, str, str]], float] = lambda row: -abs(row[0]) if largest else row[0]  # noqa: E731
    shown = [[path, slot, f"{value:.4g}"] for value, path, slot in sorted(rows, key=key)[:_WORST]]
    return f"<div><b>{title}</b>{table(['layer', 'slot', title], shown)}</div>" if shown else ""


def _worst_layers(look: dict[str, Any], name: str) -> str:
    found = [(numbers[name], path) for path, numbers in look["linears"].items() if numbers.get(name) is not None]
    shown = [[path, f"{value:.4g}"] for value, path in sorted(found, reverse=True)[:_WORST]]
    title = name.replace("_", " ")
    return f"<div><b>{title}</b>{table(['layer', title], shown)}</div>" if shown else ""


def _series(lines: Sequence[dict[str, Any]], key: str) -> Series:
    return [(float(line["step"]), float(line[key])) for line in lines if line.get(key) is not None]


# ---------- drawing


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table of texts."""
    top = "".join(f"<th>{html.escape(text)}</th>" for text in head)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(text)}</td>' for text in row)}</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"


def chart(title: str, curves: dict[str, Series], marks: Sequence[float] = (), *, logarithmic: bool = False) -> str:
    """An SVG of curves over steps. marks   steps with a vertical line;  logarithmic   values, if all are positive"""
    curves = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in curves.items()}
    points = [p for series in curves.values() for p in series]
    if not points:
        return ""
    logarithmic = logarithmic and min(y for _, y in points) > 0
    if logarithmic:
        curves = {name: [(x, math.log10(y)) for x, y in series] for name, series in curves.items()}
        points = [p for series in curves.values() for p in series]
    x0, x1 = min(x for x, _ in points), max(x for x, _ in points)
    y0, y1 = min(y for _, y in points), max(y for _, y in points)
    x1, y1 = (x1 if x1 > x0 else x0 + 1), (y1 if y1 > y0 else y0 + max(abs(y0), 1e-9) * 0.1)
    width, height, left, top, bottom = 440, 220, 58, 22, 22

    def place(x: float, y: float) -> str:
        across = left + (x - x0) / (x1 - x0) * (width - left - 8)
        return f"{across:.1f},{top + (y1 - y) / (y1 - y0) * (height - top - bottom):.1f}"

    parts = [f"<svg width='{width}' height='{height}' font-size='11'><text x='8' y='14'>{html.escape(title)}</text>"]
    for i in range(4):
        y = y0 + (y1 - y0) * i / 3
        spot = place(x0, y).split(",")[1]
        label = 10**y if logarithmic else y
        parts.append(f"<line x1='{left}' x2='{width - 8}' y1='{spot}' y2='{spot}' stroke='#ddd'/>")
        parts.append(f"<text x='{left - 4}' y='{spot}' text-anchor='end'>{label:.3g}</text>")
    for mark in (m for m in marks if x0 <= m <= x1):
        spot = place(mark, y0).split(",")[0]
        parts.append(
            f"<line x1='{spot}' x2='{spot}' y1='{top}' y2='{height - bottom}' stroke='#d62d20' stroke-dasharray='3'/>"
        )
    for number, (name, series) in enumerate(curves.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        thinned = series[:: max(1, len(series) // 800)]
        spots = " ".join(place(x, y) for x, y in thinned)
        parts.append(f"<polyline points='{spots}' fill='none' stroke='{colour}' stroke-width='1.2'/>")
        parts += [
            f"<circle cx='{s.split(',')[0]}' cy='{s.split(',')[1]}' r='2' fill='{colour}'/>" for s in spots.split()
        ][:40]
        if name:
            spot = f"x='{width - 10}' y='{top + 12 * number + 8}' text-anchor='end' fill='{colour}'"
            parts.append(f"<text {spot}>{html.escape(name)}</text>")
    parts.append(f"<text x='{left}' y='{height - 6}'>{x0:g}</text>")
    parts.append(f"<text x='{width - 8}' y='{height - 6}' text-anchor='end'>step {x1:g}</text></svg>")
    return "".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m fp4dist.train.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run_folder", type=Path)
    folder = parser.parse_args(argv).run_folder
    if not RunFolder(folder).metrics.is_file():
        print(f"{folder}: no metrics.jsonl; give the folder of a run", file=sys.stderr)
        return 2
    print(write_report(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
