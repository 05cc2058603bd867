"""A run's `comm:` section made ready for its engine, and what of it goes into checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fp4dist.cluster.topology import load_topology
from fp4dist.comm.compression import Compression, StepTraffic, summary
from fp4dist.megatron.activation_wire import CodedDispatch, MicroBatch, code_sequence_sums
from fp4dist.nn.apply import AppliedRecipe
from fp4dist.spec.run import RunConfig
from fp4dist.train.world import World

log = logging.getLogger("fp4dist")
GUARD = "comm.pt"  # in a checkpoint: what all ranks share
_FEEDBACK = "comm_rank{rank}_of_{world}.pt"  # and what each rank's messages have lost
_LAYOUT = "layout"  # a key of that file: whose ranks they are


def make_compression(config: RunConfig) -> Compression | None:
    """The Compression of a run; None where it has no `comm:` section that asks for any."""
    comm = config.comm
    if comm is None or not comm.active:
        return None
    topology = load_topology(comm.topology) if comm.topology is not None else None
    compression = Compression(comm, config.run.seed, topology)
    p, kind = config.parallel, config.engine.kind
    zero = f" ZeRO-{config.engine.zero_stage}" if kind == "deepspeed" else ""
    compression.layout = f"tp {p.tp} pp {p.pp} vpp {p.vpp} cp {p.cp} ep {p.ep} {kind}{zero} {config.train.dtype}"
    return compression


def code_activations(
    config: RunConfig,
    world: World,
    chunks: Sequence[nn.Module],
    applied: AppliedRecipe,
    compression: Compression,
    dtype: torch.dtype,
) -> None:
    """Let the layers of a model send their sums and their experts' tokens as `compression` says."""
    train, model, parallel = config.train, config.model, config.parallel
    active, clock = compression.config.active, MicroBatch(applied.clock, world.dp_size)
    number = train.global_batch_size // (train.micro_batch_size * world.dp_size)
    tokens = train.micro_batch_size * model.seq_length // parallel.cp
    modules = [module for chunk in chunks for module in chunk.modules()]
    if "sp_reduce_scatter" in active:
        code_sequence_sums(modules, compression, clock, tokens * model.hidden_size, dtype.itemsize, number)
    if {"ep_dispatch", "ep_combine"} & set(active) and model.moe is not None:
        held = tokens * model.moe.top_k // (parallel.tp if parallel.sequence_parallel else 1)
        dispatchers = [module.token_dispatcher for module in modules if hasattr(module, "token_dispatcher")]
        CodedDispatch(dispatchers, compression, clock, held * model.hidden_size, dtype.itemsize, number)


def save(compression: Compression | None, folder: Path) -> None:
    """Write what a resumed run needs into a checkpoint's state folder; called on every rank."""
    if compression is None:
        return
    if dist.get_rank() == 0:
        torch.save(compression.state_dict(), folder / GUARD)
    kept = {name: state for name, part in compression.kept.items() if (state := part.state_dict())}
    if kept:
        torch.save({_LAYOUT: compression.layout, **kept}, _own(folder))


def load(compression: Compression | None, folder: Path) -> None:
    """Read it back; what is missing (another layout, an older run) starts afresh, which is logged."""
    if compression is None:
        for file in sorted(folder.glob(_FEEDBACK.format(rank="*", world="*")))[:1]:
            log.info("comm: %s holds what coded messages had lost; without a comm: section it is left out", file)
        return
    if (folder / GUARD).exists():
        state: dict[str, Any] = torch.load(folder / GUARD, weights_only=True)
        for message in compression.load_state_dict(state):
            log.info("%s", message)
    own = _own(folder)
    if not own.exists() and (others := sorted(folder.glob(_FEEDBACK.format(rank="*", world="*")))):
        log.info("comm: %s and the like hold what messages of another layout had lost: not read", others[0])
    stored: dict[str, Any] = torch.load(own, weights_only=True) if own.exists() else {}
    layout = stored.pop(_LAYOUT, compression.layout)
    if layout != compression.layout:  # tensors may well be as long, and mean others
        log.info("comm: %s is of layout %s, this run of %s: it is not read", own, layout, compression.layout)
        stored = {}
    compression.feedback.load_state_dict({})  # of later steps, after a roll-back
    for name, part in compression.kept.items():
        if name in stored:
            part.load_state_dict(stored[name])
    for what in compression.fallen:
        compression.feedback.drop(what)
    left = sorted(stored.keys() - compression.kept.keys())
    if left:
        log.info("comm: %s also holds %s, which this run does not send: left out", own, ", ".join(left))
    if compression.feedback.on and "feedback" not in stored:
        log.info("comm.error_feedback starts afresh: %s holds none of this rank in a job of this layout", folder)


def _own(folder: Path) -> Path:
    return folder / _FEEDBACK.format(rank=dist.get_rank(), world=dist.get_world_size())


def told(traffic: StepTraffic | None) -> tuple[dict[str, dict[str, int]] | None, list[dict[str, Any]] | None]:
    """(bytes by direction, canaries) of a step for its record."""
    if traffic is None:
        return None, None
    canaries = [
        {"what": f.what, "nmse": f.nmse, "one_shot": f.one_shot, "bias": f.bias, "cosine": f.cosine,
         "correlation": f.correlation}
        for f in traffic.findings
    ]  # fmt: skip
    return summary(traffic.accounts), canaries or None
