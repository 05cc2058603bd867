"""`python -m fp4dist.cluster simulate`: one step event by event, scaling curves, failures, checkpoint intervals."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

from fp4dist.cluster import intervals, planner, simulate_chart
from fp4dist.cluster.scaling import Case, Point, Wire, curve, failures, sizes
from fp4dist.cluster.simulate import Noise, Step
from fp4dist.cluster.topology import load_topology
from fp4dist.errors import ConfigError
from fp4dist.spec.cluster import Layout, Order, Precision
from fp4dist.spec.load import load_model

HELP = "simulate a step: jitter, stragglers, contention, scaling, failures, checkpoint intervals"
_KEYS = ("tp", "pp", "vpp", "cp", "ep", "etp", "fsdp")
_NODE_GB_S = 2.0  # that a node can write, where nothing was measured


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("--model", required=True, help="shipped name or path")
    parser.add_argument("--topology", required=True, help="shipped name or path")
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--layout", default="", help="tp=4,pp=8,vpp=8,cp=2 ...; keys left out are 1")
    parser.add_argument("--order", choices=get_args(Order), help="of ranks; default: the faster one")
    parser.add_argument("--precision", choices=get_args(Precision), default="nvfp4")
    parser.add_argument("--gbs", type=int, required=True, help="samples a step")
    parser.add_argument("--mbs", type=int, default=1, help="samples a micro-batch")
    parser.add_argument("--seq", type=int, default=8192, help="tokens of a sample")
    parser.add_argument(
        "--wire", choices=get_args(Wire), default="bf16", help="of gradients and parameters between ranks"
    )
    parser.add_argument("--jitter", type=float, default=0.0, help="relative spread of a pass's time on one rank")
    parser.add_argument("--slow-fraction", type=float, default=0.0, help="share of ranks that are slow all the time")
    parser.add_argument("--slow-factor", type=float, default=1.1, help="by which they are slow")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scaling", choices=("weak", "strong"), help="a curve from --gpus on, both wires")
    parser.add_argument("--up-to", type=int, default=100_000, help="largest job of the curve")
    parser.add_argument("--failures", action="store_true", help="what each failure leaves, and the best answer")
    parser.add_argument("--checkpoints", action="store_true", help="the interval that loses least time")
    parser.add_argument(
        "--save-s", type=float, help="measured seconds of a save; default: bytes over what can be written"
    )
    parser.add_argument("--file-system-gb-s", type=float, default=500.0, help="that all nodes together can write")
    parser.add_argument("--restart-s", type=float, help="measured seconds from a failure to the next step")
    parser.add_argument("--gpu-mtbf-hours", type=float, default=intervals.GPU_MTBF_HOURS)
    parser.add_argument("--picture", type=Path, help="timeline of the first pipeline, or the curve: .svg or .png")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print what was asked for."""
    case = _case(args)
    begin = time.perf_counter()
    step = case.step(args.gpus, args.wire)
    told: dict[str, Any] = {"gpus": args.gpus, "layout": case.layout.label(), "wire": args.wire, **_step(step)}
    told["predicted_s"] = case.predict(args.gpus).step_time_s
    told["simulated_in_s"] = round(time.perf_counter() - begin, 2)
    points: list[Point] = []
    if args.scaling:
        points = curve(case, sizes(args.gpus, args.up_to), args.scaling)
        told["scaling"] = [asdict(p) for p in points]
    if args.failures:
        told["failures"] = [asdict(o) for o in failures(case, args.gpus, args.wire, _replan)]
    if args.checkpoints:
        told["checkpoints"] = _checkpoints(args, case, step)
    if args.picture:
        simulate_chart.draw(args.picture, step, points, f"{case.model.name}, {case.layout.label()}")
    print(json.dumps(told, indent=2) if args.json else _text(told))
    return 0


def _case(args: argparse.Namespace) -> Case:
    try:
        noise = Noise(
            jitter=args.jitter, slow_fraction=args.slow_fraction, slow_factor=args.slow_factor, seed=args.seed
        )
        layout = Layout(**_sizes(args.layout), micro_batch=args.mbs)
    except ValueError as e:
        raise ConfigError(f"simulate: {e}") from e
    case = Case(
        model=load_model(args.model),
        topology=load_topology(args.topology),
        layout=layout,
        precision=args.precision,
        gbs=args.gbs,
        seq=args.seq,
        noise=noise,
    )
    orders = (args.order,) if args.order else get_args(Order)
    tried = [replace(case, layout=replace(layout, order=order)) for order in orders]
    best = min(tried, key=lambda c: c.predict(args.gpus).step_time_s)
    return replace(best, layout=best.predict(args.gpus).layout)  # with the recomputation that it needs


def _sizes(text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        key, sign, value = part.partition("=")
        if key.strip() not in _KEYS or not sign or not value.strip().isdigit():
            raise ConfigError(f"--layout {part!r}: expected key=number with a key of {', '.join(_KEYS)}")
        found[key.strip()] = int(value)
    return found


def _step(step: Step) -> dict[str, float]:
    return {
        "step_s": step.step_s,
        "busy": step.busy,
        "bubble_s": step.bubble_s,
        "exposed_s": step.exposed_s,
        "events": step.events,
    }


def _replan(case: Case, gpus: int) -> Layout | None:
    """The planner's best for what is left."""
    job = planner.Job(
        model=case.model, topology=case.topology, gpus=gpus, gbs=case.gbs, seq=case.seq, precision=case.precision
    )
    ranked = planner.plan(job).ranked
    return ranked[0].quick.layout if ranked else None


def _checkpoints(args: argparse.Namespace, case: Case, step: Step) -> dict[str, float]:
    """Interval, its steps, and the share of time that does useful work."""
    size = case.predict(args.gpus).parts.checkpoint_bytes * args.gpus
    rate = min(args.file_system_gb_s, _NODE_GB_S * args.gpus / case.topology.host.gpus) * 1e9
    save = args.save_s if args.save_s is not None else size / rate
    restart = args.restart_s if args.restart_s is not None else intervals.restart_s(args.gpus)
    mtbf = intervals.job_mtbf_s(args.gpus, args.gpu_mtbf_hours)
    best = intervals.daly(save, mtbf)
    return {
        "mtbf_h": mtbf / 3600,
        "save_s": save,
        "restart_s": restart,
        "every_s": best,
        "every_steps": max(1, round(best / step.step_s)),
        "young_s": intervals.young(save, mtbf),
        "goodput": intervals.goodput(best, save, restart, mtbf),
    }


def _text(told: dict[str, Any]) -> str:
    lines = [
        f"{told['gpus']} GPUs, {told['layout']}, wire {told['wire']}: step {told['step_s']:.3f} s (planner"
        f" {told['predicted_s']:.3f} s), busy {told['busy']:.1%}, bubble {told['bubble_s']:.3f} s, exposed"
        f" {told['exposed_s']:.3f} s; {told['events']} events in {told['simulated_in_s']} s"
    ]
    lines += [
        f"  {p['gpus']:>7d} GPUs  batch {p['gbs']:>7d}  {p['wire']:4s}  {p['step_s']:8.3f} s  {p['tokens_per_s']:12.4g}"
        f" tokens/s  {p['efficiency']:6.1%}"
        for p in told.get("scaling", [])
    ]
    lines += [f"  {o['failure']:20s} {o['share']:6.1%}  {o['answer']}" for o in told.get("failures", [])]
    if found := told.get("checkpoints"):
        lines.append(
            f"  save every {found['every_s']:.0f} s ({found['every_steps']} steps): an interruption every"
            f" {found['mtbf_h']:.1f} h, {found['save_s']:.0f} s to save, {found['restart_s']:.0f} s to restart, goodput"
            f" {found['goodput']:.1%}"
        )
    return "\n".join(lines)
