"""DeepSpeed's gather of updated weights, ZeRO 1 and 2: as codes of what has changed (`fp4dist.comm.delta`).

Its optimizers call `all_gather_dp_groups`, a name in their modules, on flat groups of parameters of which each rank has
updated a slice; the name is bound anew, and acts on the groups taken over here. They hold fp32 weights apart. While a
checkpoint is read they call it too: then, and for all other groups, it is DeepSpeed's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.zero import stage_1_and_2
from torch import Tensor, nn

from fp4dist.comm.compression import Compression
from fp4dist.comm.delta import DeltaBucket
from fp4dist.errors import ConfigError

_NAME = "all_gather_dp_groups"
_MODULES = (stage_1_and_2, bf16_optimizer)


class CodedZeroGather:
    """Takes over the gather of one of DeepSpeed's optimizers, from construction to `close`.

    module   its parameters under their names

    Raises ConfigError for an optimizer that gathers weights otherwise (ZeRO 0 and 3).
    """

    def __init__(self, optimizer: Any, module: nn.Module, compression: Compression) -> None:
        flats = getattr(optimizer, "bit16_groups_flat", None) or getattr(optimizer, "bf16_groups_flat", None)
        groups = getattr(optimizer, "real_dp_process_group", None)
        if flats is None or groups is None:
            raise ConfigError(
                f"comm.param_gather: DeepSpeed's {type(optimizer).__name__} does not gather updated weights after its"
                " step; use engine.zero_stage 1 or 2, or engine.kind: megatron"
            )
        self._buckets: dict[int, DeltaBucket] = {}
        for i, flat in enumerate(flats):
            first, size = flat.data_ptr(), flat.element_size()
            inside = {
                name: p for name, p in module.named_parameters() if 0 <= p.data_ptr() - first < flat.numel() * size
            }
            bucket = DeltaBucket(flat, inside, groups[i], f"group {i}", compression, apart=True)
            if bucket.size > 1:
                self._buckets[flat.data_ptr()] = bucket
        self._loading = False
        self._plain = getattr(stage_1_and_2, _NAME)
        for where in _MODULES:
            setattr(where, _NAME, self._gather)
        compression.kept["param_gather"] = self

    def close(self) -> None:
        """DeepSpeed's own again."""
        for where in _MODULES:
            setattr(where, _NAME, self._plain)

    @contextmanager
    def loading(self) -> Iterator[None]:
        """DeepSpeed reads a checkpoint: weights are gathered as they are, and known to all afterwards."""
        self._loading = True
        try:
            yield
        finally:
            self._loading = False
        for bucket in self._buckets.values():
            bucket.after_load()

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's slices as all ranks hold them: a checkpoint's own weights are the optimizer's."""
        return {b.name: b.data[slice(*b.slices[b.rank])].detach().cpu().clone() for b in self._buckets.values()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """What `state_dict` gave on this rank, in the same layout; a collective call."""
        for bucket in self._buckets.values():
            bucket.data[slice(*bucket.slices[bucket.rank])] = state[bucket.name].to(bucket.data.device)
            bucket.after_load()

    def _gather(self, groups_flat: Sequence[Tensor], *args: Any, **kwargs: Any) -> None:
        """DeepSpeed's all_gather_dp_groups(groups_flat, partitioned_param_groups, dp_process_group, ...)."""
        if self._loading or any(flat.data_ptr() not in self._buckets for flat in groups_flat):
            self._plain(groups_flat, *args, **kwargs)
            return
        for flat in groups_flat:
            bucket = self._buckets[flat.data_ptr()]
            bucket.before_update()
            for finish in list(bucket.start()):
                finish()
