#!/usr/bin/env python
"""Fit the scaling law of low precision, say how good each method is, and where which precision is the best.

    python tools/scaling_law.py quartet                              # the published runs; constants, intervals, regions
    python tools/scaling_law.py quartet --without 430M,800M          # the same without the two largest models
    python tools/scaling_law.py runs/study/results.json              # our own study's
    python tools/scaling_law.py quartet --predict 7e9:1e12           # best precision for FP8's budget of 7B, 1T tokens

Stage 1 fits the constants to the bf16 runs, stage 2 an efficiency to each method: in N for those that quantize the
forward pass alone, in D for backward alone, both for the others. Intervals: 95 % of --bootstrap resamplings of the bf16
runs, with stage 2 repeated for each. Regions use --efficiencies (default: what the paper gives for its method) and
--speeds, FP4 over FP8 of the forward and the backward GEMMs. Writes law.json, fit.png and regions.png into --out.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fp4dist.errors import DataError, Fp4DistError
from fp4dist.study.law import CONSTANTS, Efficiency, Fit, Law, Point, bootstrap, efficiency, fit, interval
from fp4dist.study.points import FULL, Method, load_losses, study_points
from fp4dist.study.precision import Precision, best, crossover, precisions

SIZES = (1e8, 1e9, 1e10, 1e11)
Fitted = tuple[Efficiency, list[Efficiency]]  # under the best law, and under the bootstrap's
Crossing = tuple[float, tuple[float, float] | None]  # tokens a parameter, and their interval


def main() -> int:
    """Command line."""
    args = _parse()
    try:
        source, laws, points = _points(args)
        if args.law not in ("fitted", *laws):
            raise DataError(f"--law {args.law}: {args.losses} has {', '.join(('fitted', *laws))}")
        found = fit(points[FULL])
        drawn = bootstrap(points[FULL], found.law, args.bootstrap, args.seed) if args.bootstrap else []
        methods = {m: _efficiencies(found.law, drawn, m, own) for m, own in points.items() if m != FULL}
    except (Fp4DistError, OSError) as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return 2
    laws = {"fitted": found.law, **laws}
    options = precisions(*args.efficiencies, *args.speeds)
    regions = {name: _crossings(law, drawn if name == "fitted" else [], options) for name, law in laws.items()}
    lines = [f"source: {source}", *_constants(found, drawn, laws), *_methods(methods), *_regions(regions, options)]
    lines += [_prediction(laws, options, *budget) for budget in args.predict]
    print("\n".join(lines))
    args.out.mkdir(parents=True, exist_ok=True)
    results = _results(source, found, drawn, methods, regions)
    (args.out / "law.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    _draw_fit(found.law, points, args.out / "fit.png")
    _draw_regions(laws[args.law], options, args.out / "regions.png")
    return 0


def _parse() -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=rest, formatter_class=raw)
    parser.add_argument("losses", help="a file of losses, the name of a shipped one, or a study's results.json")
    parser.add_argument("--without", default=[], type=lambda text: text.split(","), help="sizes to leave out")
    parser.add_argument("--bootstrap", type=int, default=400, help="resamplings; 0: no intervals")
    parser.add_argument("--seed", type=int, default=0, help="of the resampling")
    parser.add_argument("--efficiencies", type=_pair, default=(0.65, 0.95), help="eff_N,eff_D of FP4 for the regions")
    parser.add_argument("--speeds", type=_pair, default=(2.0, 2.0), help="of FP4 over FP8: forward,backward")
    parser.add_argument("--law", default="fitted", help="whose regions are drawn: fitted, or a law of the file")
    parser.add_argument(
        "--predict", action="append", type=_budget, default=[], metavar="N:D", help="a budget; repeatable"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/scaling_law"), help="folder of results")
    return parser.parse_args()


def _pair(text: str) -> tuple[float, float]:
    first, second = map(float, text.split(","))
    return first, second


def _budget(text: str) -> tuple[float, float]:
    parameters, tokens = map(float, text.split(":"))
    return parameters, tokens


def _points(args: argparse.Namespace) -> tuple[str, dict[str, Law], dict[Method, list[Point]]]:
    if args.losses.endswith(".json"):
        return args.losses, {}, study_points(Path(args.losses))
    file, points = load_losses(args.losses, tuple(args.without))
    return file.source, {name: Law(**constants) for name, constants in file.laws.items()}, points


def _efficiencies(law: Law, drawn: list[Law], method: Method, points: list[Point]) -> Fitted:
    """(stage 2 under the best law, and under each of the bootstrap's)."""
    which = "n" if method[1] == FULL[1] else "d" if method[0] == FULL[0] else "both"
    return efficiency(law, points, which), [efficiency(other, points, which) for other in drawn[:100]]


def _constants(found: Fit, drawn: list[Law], laws: dict[str, Law]) -> list[str]:
    worst = max(abs(r) for r in found.residuals)
    lines = [
        f"stage 1: {len(found.residuals)} runs, cost {found.cost:.5e}, largest residual {worst:.4f} nats",
        "",
        f"| constant | {' | '.join(laws)} | 95 % |",
        f"|---|{'---|' * (len(laws) + 1)}",
    ]
    for name in CONSTANTS:
        values = " | ".join(f"{getattr(law, name):.4g}" for law in laws.values())
        low, high = interval([getattr(law, name) for law in drawn]) if drawn else (math.nan, math.nan)
        lines.append(f"| {name} | {values} | {low:.3g} to {high:.3g} |")
    return [*lines, ""]


def _methods(methods: dict[Method, Fitted]) -> list[str]:
    lines = ["| forward | backward | eff_N | 95 % | eff_D | 95 % |", "|---|---|---|---|---|---|"]
    for (forward, backward), (one, drawn) in methods.items():
        cells = [forward, backward]
        for name in ("eff_n", "eff_d"):
            value = getattr(one, name)
            free = value != 1.0
            low, high = interval([getattr(e, name) for e in drawn]) if drawn and free else (math.nan, math.nan)
            cells += [f"{value:.3f}" if free else "", f"{low:.3f} to {high:.3f}" if math.isfinite(low) else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""] if methods else []


def _crossings(law: Law, drawn: list[Law], options: list[Precision]) -> list[Crossing]:
    """By size, with the interval of the bootstrap's laws where there are some."""
    ends = [interval([crossover(other, options, n) for other in drawn]) if drawn else None for n in SIZES]
    return [(crossover(law, options, n), e) for n, e in zip(SIZES, ends, strict=True)]


def _regions(regions: dict[str, list[Crossing]], options: list[Precision]) -> list[str]:
    both = options[-1]
    lines = [
        f"tokens a parameter from which {both.name} is the best precision, eff {both.eff_n:g}/{both.eff_d:g}, FP4"
        f" {both.forward:g}/{both.backward:g} times as fast as FP8 in forward/backward:",
        "",
        f"| constants | {' | '.join(f'N = {n:.0e}' for n in SIZES)} |",
        f"|---|{'---|' * len(SIZES)}",
    ]
    for name, row in regions.items():
        lines.append(f"| {name} | {' | '.join(f'{value:.1f}' for value, _ in row)} |")
        if all(ends is not None for _, ends in row):
            lines.append(f"| {name}, 95 % | {' | '.join(f'{e[0]:.0f} to {e[1]:.0f}' for _, e in row if e)} |")
    return [*lines, ""]


def _prediction(laws: dict[str, Law], options: list[Precision], parameters: float, tokens: float) -> str:
    lines = [f"the budget of FP8 with {parameters:.3g} parameters and {tokens:.3g} tokens:"]
    for name, law in laws.items():
        winner = best(law, options, parameters, tokens)
        losses = ", ".join(f"{p.name} {p.loss(law, parameters, tokens):.4f}" for p in options)
        lines.append(f"  {name}: {winner.name} ({losses})")
    return "\n".join(lines)


def _results(
    source: str, found: Fit, drawn: list[Law], methods: dict[Method, Fitted], regions: dict[str, list[Crossing]]
) -> dict[str, Any]:
    efficiencies = []
    for (forward, backward), (one, others) in methods.items():
        ends = {name: interval([getattr(e, name) for e in others]) for name in ("eff_n", "eff_d")} if others else None
        efficiencies.append({"forward": forward, "backward": backward, **asdict(one), "intervals": ends})
    return {
        "source": source,
        "law": asdict(found.law),
        "cost": found.cost,
        "residuals": found.residuals,
        "intervals": {c: interval([getattr(law, c) for law in drawn]) for c in CONSTANTS} if drawn else None,
        "efficiencies": efficiencies,
        "regions": {name: dict(zip(map(str, SIZES), row, strict=True)) for name, row in regions.items()},
    }


def _draw_fit(law: Law, points: dict[Method, list[Point]], file: Path) -> None:
    """bf16's runs and the fitted curves, loss over tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for number, size in enumerate(sorted({p.parameters for p in points[FULL]})):
        own = [p for p in points[FULL] if p.parameters == size]
        ends = min(p.tokens for p in own) * 0.8, max(p.tokens for p in own) * 1.25
        grid = [ends[0] * (ends[1] / ends[0]) ** (i / 50) for i in range(51)]
        axes.plot(grid, [law.loss(size, d) for d in grid], color=f"C{number}", linewidth=0.9)
        axes.plot([p.tokens for p in own], [p.loss for p in own], "o", color=f"C{number}", label=f"{size / 1e6:.0f}M")
    axes.set_xscale("log")
    axes.set_xlabel("tokens")
    axes.set_ylabel("final loss (nats)")
    axes.set_title("bf16 runs and the fitted law")
    axes.grid(alpha=0.3)
    axes.legend(title="parameters")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _draw_regions(law: Law, options: list[Precision], file: Path) -> None:
    """The best precision over model size and tokens a parameter."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = [10 ** (7.5 + 4.5 * i / 80) for i in range(81)]
    ratios = [10 ** (0.5 + 3 * i / 80) for i in range(81)]
    names = [p.name for p in options]
    grid = [[names.index(best(law, options, n, n * r).name) for n in sizes] for r in ratios]
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    levels = [i - 0.5 for i in range(len(names) + 1)]
    axes.contourf(sizes, ratios, grid, levels=levels, colors=[f"C{i}" for i in range(len(names))], alpha=0.5)
    present = {i for row in grid for i in row}
    axes.legend(
        handles=[pyplot.Rectangle((0, 0), 1, 1, color=f"C{i}", alpha=0.5) for i in sorted(present)],
        labels=[f"{names[i]} (forward:backward)" for i in sorted(present)],
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("parameters of FP8's budget")
    axes.set_ylabel("its tokens a parameter")
    axes.set_title("precision with the lowest predicted loss")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
