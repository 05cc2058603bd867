"""Coded gradients for torch's DistributedDataParallel.

    ddp = DistributedDataParallel(model)
    hook = fp4dist.comm.ddp_hook(ddp, CommConfig(grad_reduce="nvfp4"))
    ddp.register_comm_hook(*hook)          # hook.state.table() says what is coded; hook.state.last what a step has sent

Every DDP bucket is one all-reduce: vectors, embeddings, heads, routers and norms travel exactly, the rest coded; the
result is the mean over ranks. A call of backward that synchronizes is a step of the noise.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fp4dist.comm.compression import Compression, StepTraffic
from fp4dist.comm.policy import table
from fp4dist.comm.reduction import Bucket, Reduction, Segment
from fp4dist.spec.cluster import Topology
from fp4dist.spec.communication import CommConfig

log = logging.getLogger("fp4dist")


class DdpState:
    """What the hook keeps. `step` counts synchronizing backward passes and may be set, to go on after a resume;
    `compression.state_dict()` and `compression.feedback.state_dict()` are what a checkpoint needs besides it. DDP makes
    its buckets anew after a process's first backward pass, so that one differs in its rounding from a run in one piece.
    """

    def __init__(self, module: nn.Module, compression: Compression, group: Any) -> None:
        self.compression, self.group = compression, group
        self.step = 0
        self.last = StepTraffic()
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
        self._reductions: dict[tuple[int, ...], Reduction | None] = {}
        self._places: dict[tuple[int, ...], str] = {}
        self._passes = 0
        self._known: set[str] = set()  # buckets of the passes before
        self._used: set[str] = set()  # and of this one
        self._begun = False
        self._stream: torch.cuda.Stream | None = None

    def table(self) -> str:
        """What travels coded; complete after two backward passes, since DDP orders its buckets anew after the first."""
        return table(self.compression.decisions)

    def reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """The hook."""
        if not self._begun:
            self._begun = True
            self.compression.begin_step(self.step)
        data = bucket.buffer()
        future: torch.futures.Future[Tensor]
        if data.is_cuda:  # on a stream of its own: backward goes on
            self._stream = self._stream or torch.cuda.Stream(data.device)
            self._stream.wait_stream(torch.cuda.current_stream(data.device))
            future = torch.futures.Future(devices=[data.device])
            with torch.cuda.stream(self._stream):
                self._run(bucket, data)
                future.set_result(data)
        else:
            future = torch.futures.Future()
            self._run(bucket, data)
            future.set_result(data)
        if bucket.is_last():
            self._finish()
        return future

    def _run(self, bucket: dist.GradBucket, data: Tensor) -> None:
        reduction = self._reduction(bucket, data)
        if reduction is not None and reduction.wire is not None:
            reduction.all_reduce(data, mean=True).wait()
            return
        dist.all_reduce(data, group=self.group)
        data.div_(dist.get_world_size(self.group))
        size = dist.get_world_size(self.group)
        self.compression.ledger.book("grad_reduce", exact=2 * data.nbytes * (size - 1) // size)

    def _reduction(self, bucket: dist.GradBucket, data: Tensor) -> Reduction | None:
        """The Reduction of a bucket with these parameters."""
        key = tuple(id(parameter) for parameter in bucket.parameters())
        if key not in self._reductions:
            described, compression = self._describe(bucket), self.compression
            self._places[key] = described.name
            decision = described.decision(compression, self.group, data.element_size(), halves=2)
            number = compression.register(decision, self.group, comparable=True)
            coded = decision.wire is not None
            self._reductions[key] = Reduction(compression, described, decision, number, self.group) if coded else None
        self._used.add(self._places[key])
        return self._reductions[key]

    def _describe(self, bucket: dist.GradBucket) -> Bucket:
        segments, at = [], 0
        for parameter in bucket.parameters():
            name = self._names[parameter]
            segments.append(Segment.of(name, parameter.shape, at, at + parameter.numel()))
            at += parameter.numel()
        layout = "first " if self._passes == 0 else ""  # DDP makes others after its first backward pass
        return Bucket(f"{layout}bucket {bucket.index()}", tuple(segments), (((0, at),),))

    def _finish(self) -> None:
        self.last = self.compression.finish_step()
        for message in self.last.messages:
            log.info("%s", message)
        for gone in self._known - self._used:
            self.compression.retire(gone)
        self._known, self._used = self._used, set()
        self.step, self._passes, self._begun = self.step + 1, self._passes + 1, False


class DdpHook(NamedTuple):
    """The arguments of DistributedDataParallel.register_comm_hook."""

    state: DdpState
    hook: Any


def ddp_hook(
    ddp: nn.parallel.DistributedDataParallel, config: CommConfig, *, seed: int = 0, topology: Topology | None = None
) -> DdpHook:
    """State and hook for `ddp.register_comm_hook(*...)`; a collective call, all ranks must give the same `config`.

    seed       of the rounding noise;  topology   link speeds, which `grad_reduce: auto` needs
    raises     EnvironmentMismatch on every rank when they differ, within config.timeout_s
    """
    compression = Compression(config, seed, topology)
    compression.prepare(ddp.process_group)
    compression.confirm()
    return DdpHook(DdpState(ddp.module, compression, ddp.process_group), _hook)


def _hook(state: DdpState, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    return state.reduce(bucket)


# DDP compares annotations with its types; those of this module are texts
_hook.__annotations__ = {
    "state": DdpState,
    "bucket": dist.GradBucket,
    "return": torch.futures.Future[torch.Tensor],
}
