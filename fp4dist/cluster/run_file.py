"""A chosen layout as a run file that the strict loader accepts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml

from fp4dist.cluster.planner import Job, counts_ends
from fp4dist.cluster.timing import Prediction
from fp4dist.errors import ConfigError
from fp4dist.spec.load import load_run, shipped

_HEADER = """# Written by python -m fp4dist.cluster plan for {gpus} GPUs of {topology}: predicted step {step:.4g} s,
#{coded} {memory:.0f} of {capacity:.0f} GB. Data, optimizer and length of the run are those of `{base}`: set your own.
"""


def write_run(
    path: Path, job: Job, found: Prediction, base: str | None, recipe: str | None, links: str | None = None
) -> None:
    """Write the run file and read it back. Raises ConfigError, and leaves no file, where the loader refuses it.

    links   name or path of the topology by whose links gradients are coded; None: they travel as the engine sends them
    """
    base = base or _base(job)
    data = _settings(job, found, base, recipe)
    if links is not None:
        where = str(Path(links).resolve()) if links.endswith((".yaml", ".yml")) else links
        data["comm"] = {"grad_reduce": "auto", "topology": where}
    header = _HEADER.format(
        gpus=job.gpus,
        topology=job.topology.name,
        step=found.step_time_s,
        coded=f" {found.parts.reduce_saved_s:.3g} s less with comm:," if links is not None else "",
        memory=found.memory.total,
        capacity=found.memory.capacity,
        base=base,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(header + yaml.safe_dump(data, sort_keys=False, width=120), encoding="utf-8")
    try:
        load_run(path)
    except ConfigError as e:
        path.unlink()
        raise ConfigError(f"plan: no run file for {found.layout.label()}: {e}") from e


def _base(job: Job) -> str:
    """A shipped run of this model; else the smallest on a CPU, the first GPU run elsewhere."""
    if job.model.name in shipped("runs"):
        return job.model.name
    return "tiny" if job.topology.gpu.family == "cpu" else "llama_124m"


def _settings(job: Job, found: Prediction, base: str, recipe: str | None) -> dict[str, Any]:
    layout = found.layout
    model: Any = job.model.name
    if job.seq != job.model.seq_length:
        model = {"extends": job.model.name, "seq_length": job.seq}
    parallel: dict[str, Any] = {key: getattr(layout, key) for key in ("tp", "pp", "vpp", "cp", "ep")}
    parallel["sequence_parallel"] = layout.tp > 1
    parallel["order"] = layout.order
    if counts_ends(job, layout):
        parallel["ends_as_layers"] = True
    engine: dict[str, Any] = {"kind": layout.engine}
    if layout.engine == "deepspeed":
        engine["zero_stage"] = 3
    module = "moe" if job.model.moe else "mlp"
    recompute: dict[str, Any] = {"recompute": "full"} if layout.recompute == "full" else {}
    if layout.recompute == "mlp":
        recompute = {"recompute": "selective", "recompute_modules": [module]}
    train = {"global_batch_size": job.gbs, "micro_batch_size": layout.micro_batch, **recompute}
    if job.topology.gpu.family == "cpu":
        train["dtype"] = "fp32"
    out: dict[str, Any] = {
        "extends": base,
        "run": {"name": f"{job.model.name}_{job.topology.name}_{job.gpus}"},
        "model": model,
        "train": train,
        "parallel": parallel,
        "engine": engine,
    }
    word = recipe or ("bf16" if job.precision == "bf16" else None)
    if word is not None:
        out["recipe"] = word
    peak = job.topology.gpu.peak.bf16
    out["logging"] = {"peak_tflops": float(peak)} if math.isfinite(peak) and job.topology.gpu.family != "cpu" else {}
    return {key: value for key, value in out.items() if value != {}}
