"""A prediction in words: breakdown, memory, rank map, codec of each axis."""

from __future__ import annotations

from fp4dist.cluster.timing import Prediction
from fp4dist.cluster.topology import Placement
from fp4dist.spec.cluster import Precision

_MEANING = {
    "gemm": "matrix products",
    "attention": "attention and scans",
    "quantize": "quantizing operands",
    "elementwise": "norms, activations, routing",
    "gaps": "between kernels",
    "tp": "tensor parallel, exposed",
    "cp": "context parallel, exposed",
    "ep": "experts' all-to-all",
    "pp": "pipeline messages, exposed",
    "bubble": "pipeline bubble",
    "imbalance": "waiting for the fullest stage",
    "dp": "gradients and weights, exposed",
    "recompute": "recomputing activations",
    "offload": "activations to and from host memory",
    "optimizer": "optimizer",
    "step": "loop, norms, stragglers",
}
_WORTH = 0.005  # of a step: what coded gradients must save to be written into a run file
_AXES = {"tp": "tensor", "cp": "context", "ep": "expert", "pp": "pipeline", "dp": "data", "data": "gradients (dp x cp)"}


def breakdown_table(found: Prediction) -> str:
    """Seconds and share by cause, the largest first."""
    rows = sorted(found.breakdown.items(), key=lambda item: -item[1])
    whole = found.step_time_s
    return "\n".join(f"  {_MEANING[k]:<36} {v:>10.4f} s  {v / whole:>6.1%}" for k, v in rows if v > 0)


def memory_table(found: Prediction) -> str:
    """GB of each part by the upper estimate."""
    m = found.memory
    names = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "reserve")
    return "\n".join(f"  {name:<12} {getattr(m, name):>8.1f} GB" for name in names if getattr(m, name) > 0)


def rank_map(placement: Placement) -> str:
    """Which group lies on which link, and the ranks of each axis's first group."""
    lines = [
        f"rank map ({placement.layout.order}): {placement.gpus} GPUs in {placement.domains} NVLink domains of"
        f" {placement.per_domain}{' at most' if placement.uneven else ''}, --segment {placement.segment}"
    ]
    for axis, words in _AXES.items():
        span = placement.span(axis)
        if span.size == 1:
            continue
        where = f"{span.inside} in a domain" + (f" x {span.across} domains" if span.across > 1 else "")
        lines.append(f"  {axis:<5} {words:<20} {span.size:>5} ranks  {where:<26} {placement.link(axis)}")
    return "\n".join(lines)


def codecs(found: Prediction, precision: Precision) -> dict[str, str]:
    """What each axis should carry, and why.

    Gradients: compressing the hop between domains pays while it is the slower one (L ranks of a group in each of R
    domains): B_inside * (R - 1) / (R * B_across * (L - 1)) > 1. Inside a domain NCCL's own bf16 reduction is faster.
    """
    placement, topology = found.placement, found.placement.topology
    data, out = placement.span("data"), {}
    if placement.span("tp").size > 1:
        out["tp"] = f"gathers carry {precision} codes, sums bf16" if precision != "bf16" else "bf16"
    if placement.span("cp").size > 1:
        out["cp"] = "bf16 (keys and values are small)"
    if placement.span("pp").size > 1:
        out["pp"] = "bf16 (hidden under computing)"
    if placement.span("ep").size > 1:
        saved = 0.5 * (1 - 0.5625 / 2) * found.breakdown.get("ep", 0.0)
        out["ep"] = f"bf16; dispatching NVFP4 codes would save {saved:.3g} s of the step"
    if data.across == 1:
        out["dp"] = "none" if data.size == 1 else "bf16 (inside one NVLink domain)"
    else:
        slower = topology.inside.gb_per_s * (data.across - 1) / (data.across * topology.across.gb_per_s)
        rho = slower / (data.inside - 1) if data.inside > 1 else float("inf")
        bf16 = found.parts.reduce_s + found.parts.gather_s
        fp4 = found.parts.reduce_fp4_s + found.parts.gather_fp4_s
        text = f"{bf16:.3g} s of traffic in bf16, {fp4:.3g} s as codes, {found.breakdown['dp']:.3g} s exposed"
        out["dp"] = f"bf16 (NVLink is the slower hop; {text})"
        if rho > 1:
            section = f"comm: {{grad_reduce: auto, topology: {topology.name}}}"
            saved = (
                f"{found.parts.reduce_saved_s:.3g} s of the step, {found.parts.reduce_saved_s / found.step_time_s:.1%}"
            )
            told = f"--write puts {section} into the run file, --comm none does not"
            if not gradients_as_codes(found, precision):
                told = f"{section} in the run file asks for it, --comm codes writes it"
            out["dp"] = f"nvfp4 between domains ({text}); gradients as codes save {saved}: {told}"
    return out


def gradients_as_codes(found: Prediction, precision: Precision) -> bool:
    """Whether a run file should have its gradients coded: for an FP4 run, where links across domains are the bound and
    what coding saves is at least half a percent of the step.
    """
    placement, topology = found.placement, found.placement.topology
    data = placement.span("data")
    if precision != "nvfp4" or data.across == 1:
        return False
    slower = topology.inside.gb_per_s * (data.across - 1) / (data.across * topology.across.gb_per_s)
    worth = found.parts.reduce_saved_s >= _WORTH * found.step_time_s
    return worth and (data.inside == 1 or slower > data.inside - 1)
