"""Why a layout was chosen, or not: one dimension changed at a time, everything else as near as it can be kept."""

from __future__ import annotations

import dataclasses
from typing import Any

from fp4dist.cluster.memory import advice
from fp4dist.cluster.planner import Job, predict_layout
from fp4dist.cluster.precision import policy
from fp4dist.cluster.shapes import shape_of
from fp4dist.cluster.timing import Prediction
from fp4dist.errors import ConfigError
from fp4dist.spec.cluster import Layout

_DIMENSIONS = ("tp", "pp", "vpp", "cp", "ep", "etp", "fsdp", "micro_batch")
_LARGEST_CAUSES = 3
_SAME = 0.01  # relative: the model does not see such differences


def why(job: Job, chosen: Prediction) -> list[str]:
    """For each dimension of the chosen layout: what its half and its double would do."""
    lines = [f"{chosen.layout.label()}: {chosen.step_time_s:.4g} s, {chosen.memory.total:.0f} GB"]
    for key in (k for k in _DIMENSIONS if k not in ("ep", "etp") or job.model.moe is not None):
        value = getattr(chosen.layout, key)
        tried = [v for v in (value // 2, value * 2) if v >= 1 and v != value]
        lines.append(f"  {key} = {value}")
        for v in (v for v in tried if _possible(chosen.layout, key, v)):
            layout = dataclasses.replace(chosen.layout, **_change(key, v))
            lines.append(f"    {v}: {_against(job, chosen, layout)}")
    lines.append(f"  order = {chosen.layout.order}: {_order(job, chosen)}")
    lines.append(f"  recompute = {chosen.layout.recompute}: {_recompute(chosen)}")
    return lines


def why_not(job: Job, chosen: Prediction, other: Layout) -> list[str]:
    """Why `other` was not chosen."""
    return [f"{other.label()}: {_against(job, chosen, other)}"]


def _change(key: str, value: int) -> dict[str, Any]:
    """The dimension, and what must follow: without a pipeline there are no chunks."""
    return {key: value, "vpp": 1} if key == "pp" and value == 1 else {key: value}


def _possible(layout: Layout, key: str, value: int) -> bool:
    return not (key == "vpp" and value > 1 and layout.pp == 1)


def _against(job: Job, chosen: Prediction, layout: Layout) -> str:
    try:
        found = predict_layout(job, dataclasses.replace(layout, offload=0.0, recompute="none"), safe=True)
    except ConfigError as e:
        return str(e).partition(": ")[2] or str(e)
    except ValueError as e:
        return str(e)
    if not found.memory.fits:
        rules = policy(job.precision, job.recipe, job.model.num_layers, job.topology.gpu)
        mend = advice(shape_of(job.model), found.placement, rules, gbs=job.gbs, seq=job.seq)
        largest = max(("weights", "gradients", "optimizer", "activations", "logits", "buffers"),
                      key=lambda name: getattr(found.memory, name))  # fmt: skip
        return (
            f"needs {found.memory.total:.0f} GB of {found.memory.capacity:.0f} with full recomputation"
            f" ({found.memory.missing:.0f} too many; {largest} {getattr(found.memory, largest):.0f}); {mend}"
        )
    relative = found.step_time_s / chosen.step_time_s - 1
    if abs(relative) < _SAME:
        return f"as fast ({relative:+.1%}), {found.memory.total:.0f} GB; the model does not tell them apart"
    return f"{relative:+.1%} ({found.step_time_s:.4g} s, {found.memory.total:.0f} GB): {_causes(chosen, found)}"


def _causes(chosen: Prediction, found: Prediction) -> str:
    """The causes that differ most, in seconds of a step."""
    keys = chosen.breakdown.keys() | found.breakdown.keys()
    change = {k: found.breakdown.get(k, 0.0) - chosen.breakdown.get(k, 0.0) for k in keys}
    largest = sorted(change.items(), key=lambda item: -abs(item[1]))[:_LARGEST_CAUSES]
    text = ", ".join(f"{k} {v:+.3g} s" for k, v in largest if v)
    again = found.layout.recompute != chosen.layout.recompute
    return text + (f", recompute {found.layout.recompute}" if again else "")


def _order(job: Job, chosen: Prediction) -> str:
    if chosen.layout.pp == 1:
        return "without a pipeline both are the same"
    data, pipe = chosen.placement.link("dp"), chosen.placement.link("pp")
    return f"data parallel on {data}, pipeline on {pipe}"


def _recompute(chosen: Prediction) -> str:
    if chosen.layout.recompute == "none" and not chosen.layout.offload:
        return f"{-chosen.memory.missing:.0f} GB stay free without"
    part = f", {chosen.layout.offload:.0%} of the layers offloaded" if chosen.layout.offload else ""
    return f"the least with which {chosen.memory.total:.0f} GB fit {chosen.memory.capacity:.0f}{part}"
