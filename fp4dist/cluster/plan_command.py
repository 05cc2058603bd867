"""The fastest layouts of a job, why they are, where their ranks lie, and a run file for the best one.

python -m fp4dist.cluster plan --model llama3_405b --topology gb200_nvl72 --gpus 512 --precision nvfp4 --gbs 1152
python -m fp4dist.cluster plan --model tiny --topology cpu --gpus 4 --gbs 8 --recipe bf16 --write runs/plan.yaml
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fp4dist.cluster.arguments import add_job, job_of, parse_layout
from fp4dist.cluster.explain import why, why_not
from fp4dist.cluster.memory import advice
from fp4dist.cluster.pictures import draw_racks, draw_timeline
from fp4dist.cluster.planner import Job, Plan, enough_gpus, plan
from fp4dist.cluster.precision import policy
from fp4dist.cluster.predict_command import as_json, verdict
from fp4dist.cluster.run_file import write_run
from fp4dist.cluster.shapes import shape_of
from fp4dist.cluster.tables import breakdown_table, codecs, gradients_as_codes, memory_table, rank_map
from fp4dist.cluster.timing import Prediction
from fp4dist.spec.cluster import Layout

HELP = "the fastest layouts of a job, and a run file"
NOTHING_FITS = 3  # exit status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The job, how much to print, what to write."""
    add_job(parser)
    parser.add_argument("--top", type=int, default=5, help="layouts to list")
    parser.add_argument("--fix", default="", metavar="LAYOUT", help="dimensions that are decided: tp=4,pp=8,cp=2")
    parser.add_argument("--why", nargs="?", const="", metavar="LAYOUT", help="explain the choice, or why not tp=8,pp=4")
    parser.add_argument("--mbs", type=int, default=1, help="micro-batch of --why LAYOUT")
    parser.add_argument("--write", type=Path, metavar="RUN.yaml", help="write the run file of the best runnable layout")
    parser.add_argument(
        "--comm",
        choices=("auto", "codes", "none"),
        default="auto",
        help="comm: of the run file: gradients as codes where an FP4 run gains 0.5 %% by it (auto), always, or never",
    )
    parser.add_argument("--base", help="run whose data, optimizer and length the run file takes")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="draw timeline and rack map as SVG and PNG")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Plan, print, write."""
    job = job_of(args, args.fix)
    found = plan(job)
    chosen = found.chosen
    if chosen is None:
        print(nothing_fits(found))
        return NOTHING_FITS
    if args.json:
        rows = [
            {**as_json(c.quick, ""), "rank": i, "sure_step_time_s": c.sure.step_time_s if c.sure else None}
            for i, c in enumerate(found.ranked[: args.top], 1)
        ]
        print(json.dumps({"chosen": as_json(chosen, ""), "ranked": rows, "dropped": found.dropped}))
    else:
        print(report(found, chosen, args.top))
    if args.why is not None:
        print("\n".join(["", *explanation(job, chosen, args.why, args.mbs)]))
    if args.pictures:
        for path in (*draw_timeline(chosen, args.pictures), *draw_racks(chosen.placement, args.pictures)):
            print(f"wrote {path}")
    if args.write:
        _write(args, found)
    return 0


def explanation(job: Job, chosen: Prediction, layout: str, micro_batch: int) -> list[str]:
    """Of the choice, or of a layout that was not chosen."""
    return why_not(job, chosen, parse_layout(layout, micro_batch)) if layout else why(job, chosen)


def _write(args: argparse.Namespace, found: Plan) -> None:
    best = found.runnable
    if best is None:
        print("no run file: no layout of the list comes out even for our engines (layers by pp * vpp, heads by tp)")
        return
    if found.chosen is not None and found.chosen.layout != best.layout:
        print(f"{found.chosen.layout.label()} does not come out even for our engines (chunks of pp * vpp, heads by tp)")
    rules = policy(found.job.precision, found.job.recipe, found.job.model.num_layers, found.job.topology.gpu)
    coded = args.comm == "codes" or (args.comm == "auto" and gradients_as_codes(best, rules.wire))
    write_run(args.write, found.job, best, args.base, args.recipe, args.topology if coded else None)
    saved = f"; gradients as codes (comm:) save {best.parts.reduce_saved_s:.3g} s of them" if coded else ""
    print(f"wrote {args.write}: {best.layout.label()}, {best.step_time_s:.4g} s{saved}")


def report(found: Plan, chosen: Prediction, top: int) -> str:
    """The list, and everything about the chosen layout."""
    job = found.job
    word = job.precision or (job.recipe.name if job.recipe else "")
    lines = [
        f"{job.model.name} on {job.gpus} GPUs of {job.topology.name}, {word}, {job.gbs} x {job.seq} tokens a step",
        f"  {'':>3} {'layout':<34} {'step s':>9} {'TF/GPU':>7} {'GB':>5}  memory",
    ]
    for number, choice in enumerate(found.ranked[:top], 1):
        p = choice.quick
        how = verdict(p) + recomputed(p.layout)
        if (sure := choice.sure) is not None and sure is not p:
            how += f"; surely {sure.step_time_s:.4g} s: {sure.layout.label()}{recomputed(sure.layout)}"
        lines.append(
            f"  {number:>3} {p.layout.label():<34} {p.step_time_s:>9.4g} {p.tflops_per_gpu:>7.0f}"
            f" {p.memory.total:>5.0f}  {how}"
        )
    lines += [f"  dropped: {count} layouts: {reason}" for reason, count in found.dropped.items()]
    lines += [
        "",
        f"chosen (surely fits; spanning domains must gain 10 %): {chosen.layout.label()}, {chosen.step_time_s:.4g} s",
    ]
    lines += [
        breakdown_table(chosen),
        "",
        memory_table(chosen),
        "",
        rank_map(chosen.placement),
        "",
        "codec of each axis",
    ]
    rules = policy(job.precision, job.recipe, job.model.num_layers, job.topology.gpu)
    lines += [f"  {axis}: {text}" for axis, text in codecs(chosen, rules.wire).items()]
    return "\n".join([*lines, *(f"warning: {w}" for w in chosen.placement.warnings)])


def recomputed(layout: Layout) -> str:
    """, full recompute of 25 % of the layers; empty for none."""
    text = "" if layout.recompute == "none" else f", {layout.recompute} recompute"
    text += f" of {layout.recomputed:.0%} of the layers" if layout.recomputed < 1 else ""
    return text + (f", {layout.offload:.0%} offloaded" if layout.offload else "")


def nothing_fits(found: Plan) -> str:
    """By how much, and what would make it fit."""
    job, near = found.job, found.closest
    if near is None:
        reasons = "; ".join(f"{count} layouts: {reason}" for reason, count in found.dropped.items())
        return f"no layout of {job.gpus} GPUs divides the job ({reasons or 'bare weights exceed the memory'})"
    rules = policy(job.precision, job.recipe, job.model.num_layers, job.topology.gpu)
    mend = advice(shape_of(job.model), near.placement, rules, gbs=job.gbs, seq=job.seq)
    more = enough_gpus(job)
    mend += f"; a layout surely fits on {more} GPUs" if more else "; no number of these GPUs that was tried is enough"
    return (
        f"nothing fits: the nearest, {near.layout.label()}, needs {near.lean.total:.0f} to {near.memory.total:.0f} GB"
        f" of {near.memory.capacity:.0f}: {near.lean.missing:.0f} to {near.memory.missing:.0f} too many\n"
        f"{memory_table(near)}\n  {mend}"
    )
