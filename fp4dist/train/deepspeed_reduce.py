"""DeepSpeed's gradient reductions, coded: ZeRO 0 to 3.

DeepSpeed has no hook for it either, so methods of its engine and optimizer objects are replaced, one a stage; what they
do around the collective stays theirs.

    stage   replaced                                              collective
    0       engine.allreduce_bucket (with bf16 also stage 1)      all-reduce of a bucket of gradients
    1, 2    optimizer.allreduce_and_scatter (and average_tensor,  reduce-scatter of a bucket to the owners of its slices
            which tells what the bucket holds)                    (DeepSpeed's: an all-reduce)
    3       reduce_scatter_coalesced, inside __avg_scatter_grads  reduce-scatter of parameters, each cut over all ranks

Which gradients make a bucket shows when backward first fills it: decisions are made then, and agreed and printed after
the first step. ZeRO 2 and 3 reduce after every micro-batch: each reduction draws noise of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import stage3
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from fp4dist.comm.compression import Compression
from fp4dist.comm.reduction import Bucket, Reduction, Run, Segment
from fp4dist.errors import ConfigError

Held = list[tuple[nn.Parameter, int, int]]  # a parameter's gradient is elements [start, stop) of a bucket
_AVG_SCATTER = "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads"


class CodedZeroReduce:
    """Takes over the gradient reduction of a DeepSpeed engine, from construction to `close`.

    module   its parameters under their names;  group   data-parallel ranks;  micro_batches   of a step

    Raises ConfigError for settings with which DeepSpeed goes another way.
    """

    def __init__(
        self, engine: Any, optimizer: Any, module: nn.Module, compression: Compression, group: Any, micro_batches: int
    ) -> None:
        self._compression = compression
        self._times = micro_batches if engine.zero_optimization_stage() > 1 else 1  # that a bucket is reduced in a step
        compression.prepare(group)
        self._names = {parameter: name for name, parameter in module.named_parameters()}
        self._reductions: dict[Any, Reduction | None] = {}
        self._undo: list[Callable[[], None]] = []
        self._bucket: tuple[Tensor, Held] | None = None
        if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            _refuse_other_ways(optimizer)
            self._replace(optimizer, _AVG_SCATTER, partial(self._avg_scatter, getattr(optimizer, _AVG_SCATTER)))
        elif isinstance(optimizer, DeepSpeedZeroOptimizer):
            _refuse_other_ways(optimizer)
            self._replace(optimizer, "average_tensor", partial(self._average, optimizer, optimizer.average_tensor))
            self._replace(
                optimizer,
                "allreduce_and_scatter",
                partial(self._scatter, optimizer, optimizer.allreduce_and_scatter),
            )
        else:
            self._replace(engine, "allreduce_bucket", partial(self._allreduce, engine, engine.allreduce_bucket))

    def close(self) -> None:
        """DeepSpeed's own methods again."""
        for undo in self._undo:
            undo()
        self._undo = []

    def _replace(self, owner: Any, name: str, method: Callable[..., Any]) -> None:
        setattr(owner, name, method)
        self._undo.append(lambda: owner.__dict__.pop(name, None))

    # -- ZeRO 0

    def _allreduce(
        self, engine: Any, plainly: Any, bucket: Sequence[Tensor], group: Any, size: int | None = None
    ) -> Any:
        held = self._found(bucket)
        if not engine.gradient_average or not held:
            raise ConfigError(
                "comm.grad_reduce: DeepSpeed reduces gradients here that no parameter owns, or without their mean;"
                " leave out what changes that in engine.deepspeed, or comm.grad_reduce"
            )
        flat = torch.cat([grad.reshape(-1) for grad in bucket]).to(engine.communication_data_type)
        reduction = self._reduction(held, None, flat, group)
        if reduction is None or reduction.wire is None:
            return plainly(bucket, group, size)
        reduction.all_reduce(flat, mean=True).wait()
        return flat.to(bucket[0].dtype)

    def _found(self, bucket: Sequence[Tensor]) -> Held:
        """Where the gradients of parameters lie in the tensors of a bucket, each a gradient or a flat group of them."""
        held, at = [], 0
        for part in bucket:
            first, size = part.data_ptr(), part.element_size()
            for parameter in self._names:
                for grad in (getattr(parameter, "_hp_grad", None), parameter.grad):
                    offset = (grad.data_ptr() - first) // size if grad is not None else -1
                    if grad is not None and 0 <= offset < part.numel() and grad.dtype == part.dtype:
                        held.append((parameter, at + offset, at + offset + grad.numel()))
                        break
            at += part.numel()
        return sorted(held, key=lambda h: h[1])

    # -- ZeRO 1 and 2

    def _average(self, optimizer: Any, average: Any, tensor: Tensor, dtype: torch.dtype) -> None:
        held = [optimizer.bit16_groups[i][k] for i, k, _ in optimizer.ipg_buckets[dtype].params]
        self._bucket = tensor, _in_order(held, [parameter.numel() for parameter in held])
        try:
            average(tensor, dtype)
        finally:
            self._bucket = None

    def _scatter(
        self, optimizer: Any, plainly: Any, bucket: Any, dtype: torch.dtype, *args: Any, process_group: Any, **more: Any
    ) -> None:
        """bucket: (owners of a slice, the slice, where an owner adds it or None) of the tensor to be averaged, which is
        divided by the number of ranks already.
        """
        assert self._bucket is not None
        tensor, held = self._bucket
        group, size = process_group, dist.get_world_size(process_group)
        owned: list[list[Run]] = [[] for _ in range(size)]
        for owners, part, _ in bucket:
            start = (part.data_ptr() - tensor.data_ptr()) // tensor.element_size()
            for owner in owners:
                owned[owner].append((start, start + part.numel()))
        once = all(len(owners) == 1 for owners, *_ in bucket)
        reduction = self._reduction(held, owned, tensor, group) if once else None
        if reduction is None or reduction.wire is None:
            plainly(bucket, dtype, *args, process_group=group, **more)
            return
        reduction.reduce_scatter(tensor, mean=False).wait()
        for owners, part, target in bucket:
            if dist.get_rank(group) in owners:
                optimizer._add_to_grad_partition_buffer(target, part)

    # -- ZeRO 3

    def _avg_scatter(self, average: Any, parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> list[Tensor]:
        with _bound(stage3, "reduce_scatter_coalesced", partial(self._coalesced, parameters)):
            return average(parameters, dtype)

    def _coalesced(self, parameters: Sequence[nn.Parameter], tensors: Sequence[Tensor], group: Any) -> list[Tensor]:
        """The mean of `tensors` over ranks: of each, this rank's part of ceil(numel / ranks) elements."""
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        owned: list[list[Run]] = [[] for _ in range(size)]
        mine, at = [], 0
        for tensor in tensors:
            numel, part = tensor.numel(), -(-tensor.numel() // size)
            for k in range(size):
                run = (at + min(k * part, numel), at + min((k + 1) * part, numel))
                owned[k].append(run)
                if k == rank:
                    mine.append(run)
            at += numel
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        held = _in_order(parameters, [tensor.numel() for tensor in tensors])
        reduction = self._reduction(held, owned, flat, group)
        if reduction is None or reduction.wire is None:
            return _plain_coalesced(list(tensors), group)
        reduction.reduce_scatter(flat, mean=True).wait()
        return [flat[start:stop] for start, stop in mine]

    # -- buckets

    def _reduction(
        self, held: Held, owned: Sequence[Sequence[Run]] | None, flat: Tensor, group: Any
    ) -> Reduction | None:
        """That of the bucket `flat`, which holds these parameters; owned: None for an all-reduce."""
        names = tuple(self._names[parameter] for parameter, *_ in held)
        if names not in self._reductions:
            segments = [
                Segment.of(self._names[parameter], getattr(parameter, "ds_shape", parameter.shape), start, stop)
                for parameter, start, stop in held
            ]
            owners = (((0, flat.numel()),),) if owned is None else tuple(tuple(runs) for runs in owned)
            described = Bucket(f"bucket {len(self._reductions)}", tuple(segments), owners)
            compression = self._compression
            decision = described.decision(compression, group, flat.element_size(), halves=1 if owned is not None else 2)
            of_a_step = replace(decision, before=decision.before * self._times, after=decision.after * self._times)
            number = compression.register(of_a_step, group, comparable=True)
            coded = decision.wire is not None
            self._reductions[names] = Reduction(compression, described, decision, number, group) if coded else None
        return self._reductions[names]


def _in_order(parameters: Sequence[nn.Parameter], sizes: Sequence[int]) -> Held:
    """Gradients one after the other."""
    held, at = [], 0
    for parameter, numel in zip(parameters, sizes, strict=True):
        held.append((parameter, at, at + numel))
        at += numel
    return held


_plain_coalesced = stage3.reduce_scatter_coalesced


@contextmanager
def _bound(module: Any, name: str, value: Any) -> Any:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _refuse_other_ways(optimizer: Any) -> None:
    """Settings with which ZeRO does not go through what is replaced."""
    wrong = {
        "zero_optimization.reduce_scatter: false": not optimizer.reduce_scatter,
        "zero_optimization.use_multi_rank_bucket_allreduce: false": not getattr(
            optimizer, "use_multi_rank_bucket_allreduce", True
        ),
        "zero_optimization.zero_quantized_gradients: true": getattr(optimizer, "all2all_process_group", None)
        is not None,
    }
    for setting, there in wrong.items():
        if there:
            raise ConfigError(f"comm.grad_reduce: engine.deepspeed has {setting}, which reduces another way: drop one")
