"""Step time and memory of one layout.

  python -m fp4dist.cluster predict --model llama3_405b --topology gb200_nvl72 --gpus 512 \\
    --layout tp=4,pp=8,vpp=8,cp=2 --precision nvfp4 --gbs 1152 --mbs 1 --seq 8192 --json
"""

from __future__ import annotations

import argparse
import json
from typing import Any, get_args

from fp4dist.cluster.arguments import add_job, job_of, parse_layout
from fp4dist.cluster.memory import advice
from fp4dist.cluster.precision import policy
from fp4dist.cluster.shapes import shape_of
from fp4dist.cluster.tables import breakdown_table, memory_table, rank_map
from fp4dist.cluster.timing import Prediction, predict
from fp4dist.spec.cluster import Order, Recompute

HELP = "step time and memory of one layout"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The job, the layout, and how to print."""
    add_job(parser)
    parser.add_argument("--layout", default="", help="tp=4,pp=8,vpp=8,cp=2,ep=1,etp=1,fsdp=1; default of each: 1")
    parser.add_argument("--mbs", type=int, default=1, help="samples of a rank and forward pass")
    parser.add_argument("--order", choices=get_args(Order), help="of ranks; default: the faster")
    parser.add_argument("--recompute", choices=get_args(Recompute), help="default: as little as fits")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the prediction."""
    job = job_of(args)
    found = predict(
        job.model,
        job.topology,
        job.gpus,
        parse_layout(args.layout, args.mbs),
        precision=job.precision,
        recipe=job.recipe,
        gbs=job.gbs,
        seq=job.seq,
        order=args.order,
        recompute=args.recompute,
    )
    rules = policy(job.precision, job.recipe, job.model.num_layers, job.topology.gpu)
    shape = shape_of(job.model)
    mend = "" if found.memory.fits else advice(shape, found.placement, rules, gbs=job.gbs, seq=job.seq)
    print(json.dumps(as_json(found, mend)) if args.json else as_text(found, mend))
    return 0


def verdict(found: Prediction) -> str:
    """fits: by the upper estimate; tight: by the lower one alone; no."""
    return "fits" if found.memory.fits else "tight" if found.lean.fits else "no"


def as_json(found: Prediction, mend: str) -> dict[str, Any]:
    """What --json prints; seconds, GB = 1e9 bytes, model TFLOP/s with causal attention."""
    layout = found.layout
    return {
        "step_time_s": found.step_time_s,
        "tflops_per_gpu": found.tflops_per_gpu,
        "tokens_per_s_per_gpu": found.tokens_per_s_per_gpu,
        "memory_gb": found.memory.total,
        "memory_low_gb": found.lean.total,
        "memory_capacity_gb": found.memory.capacity,
        "fits": verdict(found),
        "advice": mend,
        "error_90": found.error,
        "breakdown": found.breakdown,
        "memory": {name: getattr(found.memory, name) for name in MEMORY_PARTS},
        "layout": {
            **{k: getattr(layout, k) for k in ("tp", "pp", "vpp", "cp", "ep", "etp", "fsdp")},
            "dp": layout.dp(found.placement.gpus),
            "micro_batch": layout.micro_batch,
            "micro_batches": found.parts.micro_batches,
            "order": layout.order,
            "engine": layout.engine,
            "recompute": layout.recompute,
            "recomputed_layers": layout.recomputed,
            "offload": layout.offload,
        },
        "placement": {
            "domains": found.placement.domains,
            "gpus_per_domain": found.placement.per_domain,
            "links": {axis: found.placement.link(axis) for axis in ("tp", "cp", "ep", "pp", "dp")},
        },
        "warnings": list(found.placement.warnings),
    }


MEMORY_PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "reserve")


def as_text(found: Prediction, mend: str) -> str:
    """For people."""
    layout, low, high = found.layout, found.step_time_s * (1 - found.error), found.step_time_s * (1 + found.error)
    offload = f", offload {layout.offload:.0%}" if layout.offload else ""
    lines = [
        f"{layout.label()}, dp {layout.dp(found.placement.gpus)}, {found.parts.micro_batches} micro-batches, recompute"
        f" {layout.recompute}{offload}",
        f"step {found.step_time_s:.4g} s ({low:.4g} to {high:.4g}, as near as 90 % of rows left out of the fit)",
        f"{found.tflops_per_gpu:.0f} TFLOP/s and {found.tokens_per_s_per_gpu:.0f} tokens/s a GPU",
        "",
        breakdown_table(found),
        "",
        memory_table(found),
        f"memory: {verdict(found)}, {found.lean.total:.0f} to {found.memory.total:.0f} GB of"
        f" {found.memory.capacity:.0f}",
        *([f"  {mend}"] if mend else []),
        "",
        rank_map(found.placement),
    ]
    return "\n".join([*lines, *(f"warning: {w}" for w in found.placement.warnings)])
