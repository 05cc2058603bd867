"""Megatron's distributed optimizer: updated weights gathered as codes of what has changed, for any recipe.

0.57 bytes an element instead of 2 or 4; see `fp4dist.comm.delta`. With bf16 weights the optimizer has fp32 ones of its
own; fp32 weights are put aside, and put back for the update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fp4dist.comm.compression import Compression
from fp4dist.comm.delta import DeltaBucket


class CodedParamGather:
    """Takes over the parameter gather of chunks that Megatron's DistributedDataParallel has wrapped.

    The engine calls `before_update` before it changes weights, `after_load` when others have. Decisions are registered
    with `compression`, which has yet to be confirmed.
    """

    def __init__(self, chunks: Sequence[Any], compression: Compression) -> None:
        self._buckets: list[DeltaBucket] = []
        self._groups: list[tuple[Any, list[DeltaBucket]]] = []
        for i, chunk in enumerate(chunks):
            names = {parameter: name for name, parameter in chunk.module.named_parameters()}
            for kind, groups in (("", chunk.bucket_groups), ("experts ", chunk.expert_parallel_bucket_groups)):
                for j, group in enumerate(groups):
                    place = f"{kind}{'' if len(chunks) == 1 else f'chunk {i} '}bucket {j}"
                    self._take(group, names, place, compression)
        compression.kept["param_gather"] = self

    def _take(self, group: Any, names: dict[nn.Parameter, str], place: str, compression: Compression) -> None:
        if group.intra_distributed_optimizer_instance_size == 1:
            return
        buckets = [
            DeltaBucket(
                bucket.param_data,
                {names[p]: p for p in bucket.params_list},
                group.intra_distributed_optimizer_instance_group,
                f"{place}.{k}",
                compression,
                apart=bucket.param_data.dtype != torch.float32,
            )
            for k, bucket in enumerate(group.buckets)
        ]
        if all(bucket.wire is None for bucket in buckets):
            return  # Megatron's own
        self._groups.append((group, buckets))
        self._buckets += buckets
        group.start_param_sync = partial(_start, group, buckets)

    def before_update(self) -> None:
        """The optimizer will change weights now: it is given the exact ones."""
        for bucket in self._buckets:
            bucket.before_update()

    def after_load(self) -> None:
        """Weights were read from a checkpoint: each slice is taken from its owner, exactly; a collective call."""
        for bucket in self._buckets:
            bucket.after_load()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """What `state_dict` gave on this rank, in the same layout."""
        for bucket in self._buckets:
            if bucket.name in state:
                bucket.aside = state[bucket.name].to(bucket.data.device)

    def state_dict(self) -> dict[str, Tensor]:
        """What this rank's optimizer knows better than its weights: fp32 weights put aside."""
        return {bucket.name: bucket.aside.cpu() for bucket in self._buckets if bucket.aside is not None}

    def close(self) -> None:
        """Megatron's own gather again, of weights on which all ranks agree."""
        for group, buckets in self._groups:
            group.start_param_sync(force_sync=True)
            for bucket in buckets:
                bucket.before_update()
            group.__dict__.pop("start_param_sync", None)


def _start(group: Any, buckets: Sequence[DeltaBucket], force_sync: bool = False) -> None:
    """Megatron's start_param_sync."""
    if force_sync and group.param_gather_handle is not None:
        group.param_gather_handle.wait()
        group.param_gather_handle = None
        return
    handle = _Together([work for bucket in buckets for work in bucket.start()])
    if group.ddp_config.overlap_param_gather and not force_sync:
        group.param_gather_handle = handle
    else:
        handle.wait()
        group.param_gather_handle = None
    group.param_gather_dispatched = True


class _Together:
    """Several works as one handle."""

    def __init__(self, works: list[Any]) -> None:
        self._works = works

    def wait(self) -> None:
        """Finish all of them, in order."""
        works, self._works = self._works, []
        for work in works:
            work()
