"""Fit the planner's twelve constants and say how well they predict what they were not fitted to.

python tools/calibrate_planner.py                 print errors under the shipped constants
python tools/calibrate_planner.py --write         fit to the rows `use: fit` and write configs/calibration/fitted.yaml
python tools/calibrate_planner.py --leave-one-out also fit once without each row (about two minutes)
python tools/calibrate_planner.py --top 5         also plan every row's job and say where the published layout stands
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from fp4dist.cluster.calibrate import fit, leave_one_out, relative_error, summary
from fp4dist.cluster.constants import Constants, fitted
from fp4dist.cluster.points import Point, load_points
from fp4dist.cluster.standing import standing

OUT = Path(__file__).resolve().parents[1] / "configs" / "calibration" / "fitted.yaml"
HEADER = """\
# Written by tools/calibrate_planner.py --write from the rows `use: fit` of points.yaml; the terms of the model were
# chosen with all rows in view, the twelve numbers with those alone. Meanings: fp4dist/cluster/constants.py.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--leave-one-out", action="store_true")
    parser.add_argument("--top", type=int, default=0)
    args = parser.parse_args()
    points = load_points()
    used = [p for p in points if p.use != "note"]
    constants = fit([p for p in points if p.use == "fit"]) if args.write else fitted().constants
    left_out = leave_one_out(used) if args.leave_one_out else {}
    print_table(points, constants, left_out, args.top)
    print_summary(used, constants, left_out)
    if args.write:
        write(constants, [relative_error(p, constants) for p in used if p.use == "held"])


def print_table(points: Sequence[Point], constants: Constants, left_out: dict[str, float], top: int) -> None:
    head = "| row | use | GPUs | measured s | predicted s | error | left out |"
    print(head + (" published layout's place |" if top else ""))
    print("|---|---|---|---|---|---|---|" + ("---|" if top else ""))
    for p in points:
        seconds = p.predict(constants).step_time_s
        cells = [p.id, p.use, f"{p.gpus}", f"{p.seconds:.4g}", f"{seconds:.4g}", f"{seconds / p.seconds - 1:+.1%}"]
        cells.append(f"{left_out[p.id]:+.1%}" if p.id in left_out else "")
        if top:
            cells.append(standing(p).text())
        print("| " + " | ".join(cells) + " |")


def print_summary(used: Sequence[Point], constants: Constants, left_out: dict[str, float]) -> None:
    for kind, moe in (("dense", False), ("MoE", True)):
        for use in ("fit", "held"):
            errors = [relative_error(p, constants) for p in used if p.use == use and p.moe is moe]
            middle, worst = summary(errors)
            print(f"{kind}, {use}: {len(errors)} rows, median |error| {middle:.1%}, worst {worst:.1%}")
        if left_out:
            middle, worst = summary([left_out[p.id] for p in used if p.moe is moe])
            print(f"{kind}, leave one out: median |error| {middle:.1%}, worst {worst:.1%}")


def write(constants: Constants, held: Sequence[float]) -> None:
    sizes = sorted(abs(e) for e in held)
    lines = [f"  {f.name}: {getattr(constants, f.name):.4g}" for f in dataclasses.fields(constants)]
    error = sizes[min(len(sizes) - 1, int(0.9 * len(sizes)))]
    text = "\n".join(["constants:", *lines, f"error: {error:.3f}  # 90 % of the held rows are nearer"])
    OUT.write_text(HEADER + text + "\n", encoding="utf-8")
    print(f"wrote {OUT}")


if __name__ == "__main__":
    main()
