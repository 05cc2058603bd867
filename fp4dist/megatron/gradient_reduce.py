"""Megatron's gradient reduction over data-parallel ranks, coded: the reduce-scatter of its distributed optimizer, the
all-reduce of plain data parallelism, overlapped with backward or not.

Megatron-core has no hook for it. `dist_reduce_scatter_func`, a global of its buffer module (0.16 to 0.20), sees neither
which parameters a buffer holds nor the all-reduce of plain data parallelism, and is called inside a coalescing manager,
which would hold back a collective of several parts. So each bucket group gets a `start_grad_sync` of its own; buckets
that are not coded, and groups without any, keep Megatron's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fp4dist.comm.compression import Compression
from fp4dist.comm.reduction import Bucket, Reduction, Segment, Waitable
from fp4dist.errors import ConfigError


class CodedGradientReduce:
    """Takes over the gradient reduction of chunks that Megatron's DistributedDataParallel has wrapped.

    From construction to `close`. Decisions are registered with `compression`, which has yet to be confirmed.

    Raises ConfigError for a setting of Megatron's DDP that this reduction does not know.
    """

    def __init__(self, chunks: Sequence[Any], compression: Compression) -> None:
        self._groups: list[_Group] = []
        for i, chunk in enumerate(chunks):
            names = {parameter: name for name, parameter in chunk.module.named_parameters()}
            for kind, groups in (("", chunk.bucket_groups), ("experts ", chunk.expert_parallel_bucket_groups)):
                for j, group in enumerate(groups):
                    place = f"{kind}{'' if len(chunks) == 1 else f'chunk {i} '}bucket {j}"
                    self._groups.append(_Group(group, names, place, compression))
        for group in self._groups:
            if any(r is not None for r in group.reductions):
                group.take_over()

    def close(self) -> None:
        """Megatron's own reduction again."""
        for group in self._groups:
            group.give_back()


class _Group:
    """One of Megatron's bucket groups."""

    def __init__(self, megatron: Any, names: dict[nn.Parameter, str], place: str, compression: Compression) -> None:
        self.megatron = megatron
        config = megatron.ddp_config
        self.sharded = bool(config.use_distributed_optimizer)
        self.group = (
            megatron.intra_distributed_optimizer_instance_group if self.sharded else megatron.data_parallel_group
        )
        self.size = dist.get_world_size(self.group)
        self.reductions: list[Reduction | None] = []
        if config.num_distributed_optimizer_instances > 1:
            raise ConfigError(
                "comm.grad_reduce: num_distributed_optimizer_instances ="
                f" {config.num_distributed_optimizer_instances} reduces on two levels by itself; set it to 1 and use"
                " comm.hierarchy"
            )
        self.mean = bool(config.average_in_collective)
        for k, bucket in enumerate(megatron.buckets):
            if getattr(bucket, "params_with_extra_main_grads", None):
                raise ConfigError(
                    "comm.grad_reduce: Megatron keeps main gradients outside of its buffer here; switch that off"
                )
            name = place if len(megatron.buckets) == 1 else f"{place}.{k}"
            described = self._describe(bucket, names, name)
            halves = 1 if self.sharded else 2
            decision = described.decision(compression, self.group, bucket.grad_data.element_size(), halves=halves)
            number = compression.register(decision, self.group, comparable=True)
            coded = decision.wire is not None
            self.reductions.append(Reduction(compression, described, decision, number, self.group) if coded else None)

    def _describe(self, bucket: Any, names: dict[nn.Parameter, str], place: str) -> Bucket:
        data, numel = bucket.grad_data, bucket.grad_data.numel()
        segments = []
        for parameter in bucket.params_list:
            start = (parameter.main_grad.data_ptr() - data.data_ptr()) // data.element_size()
            segments.append(Segment.of(names[parameter], parameter.shape, start, start + parameter.numel()))
        segments.sort(key=lambda s: s.start)
        part = numel // self.size
        owned = tuple(((k * part, (k + 1) * part),) for k in range(self.size)) if self.sharded else (((0, numel),),)
        return Bucket(place, tuple(segments), owned)

    def take_over(self) -> None:
        self.megatron.start_grad_sync = partial(_start, self)

    def give_back(self) -> None:
        self.megatron.__dict__.pop("start_grad_sync", None)


@torch.no_grad()
def _start(group: _Group, force_all_reduce: bool | None = False) -> None:
    """Megatron's start_grad_sync: check, scale, start each bucket's reduction; `finish_grad_sync` waits for it."""
    megatron = group.megatron
    if force_all_reduce or all(r is None or r.wire is None for r in group.reductions):
        type(megatron).start_grad_sync(megatron, force_all_reduce=force_all_reduce)
        return
    if megatron.is_first_batch and megatron.grad_reduce_handle is not None:
        return
    assert megatron.grad_reduce_handle is None, "a reduction of this bucket group is under way"
    config = megatron.ddp_config
    if config.check_for_nan_in_grad or config.check_for_large_grads:
        megatron.check_grads(
            check_for_nan_or_inf=config.check_for_nan_in_grad, check_for_large=config.check_for_large_grads
        )
    work = []
    for bucket, reduction in zip(megatron.buckets, group.reductions, strict=True):
        if bucket.gradient_scaling_factor != 1.0:
            bucket.grad_data.mul_(bucket.gradient_scaling_factor)
        if reduction is None or reduction.wire is None:
            work.append(_plainly(group, bucket.grad_data))
        elif group.sharded:
            work.append(reduction.reduce_scatter(bucket.grad_data, mean=group.mean))
        else:
            work.append(reduction.all_reduce(bucket.grad_data, mean=group.mean))
    handle = _All(work)
    if config.overlap_grad_reduce:
        megatron.grad_reduce_handle = handle
    else:
        handle.wait()


def _plainly(group: _Group, data: torch.Tensor) -> Any:
    """Megatron's collective for a bucket beside coded ones."""
    op = dist.ReduceOp.AVG if group.mean else dist.ReduceOp.SUM
    if not group.sharded:
        return dist.all_reduce(data, op=op, group=group.group, async_op=True)
    part = data.numel() // group.size
    mine = data[dist.get_rank(group.group) * part :][:part]
    return dist.reduce_scatter_tensor(  # pyright: ignore[reportDeprecated] (the new name is not in torch 2.11)
        mine, data, op=op, group=group.group, async_op=True
    )


class _All:
    """The handles of a group's buckets as one."""

    def __init__(self, work: list[Waitable]) -> None:
        self._work = work

    def wait(self) -> None:
        """Wait for each in turn."""
        for work in self._work:
            work.wait()
