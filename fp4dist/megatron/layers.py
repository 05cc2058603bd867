"""Megatron-core's tensor-parallel linears with a LinearPlan: initialization, sharding and checkpoints are inherited.

Megatron calls `_forward_impl` for everything between a layer's input and its partial output: the sequence-parallel
gather, the GEMM, and in backward the input gradient's reduction and the weight gradient. One override replaces it with
`fp4dist.nn.function`. Row-parallel layers keep Megatron's own reduction of the output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from fp4dist.nn.comm import SLOT_DIMS, Dim
from fp4dist.nn.function import fp4_linear
from fp4dist.nn.plan import LinearPlan
from fp4dist.numerics.quantize import ReduceMax


@dataclass(slots=True)
class TpComm:
    """The tensor-parallel group of one linear (see `fp4dist.nn.comm.LinearComm`).

    split               O for column-parallel, I for row-parallel
    sequence_parallel   the input is this rank's part of the tokens, and so is the input gradient
    allreduce_dgrad     the input gradient is a partial sum to be all-reduced
    pieces              Megatron's `partition_stride`: 2 where each rank holds its parts of SwiGLU's gate and up
    """

    split: Dim | None
    group: Any
    sequence_parallel: bool = False
    allreduce_dgrad: bool = False
    pieces: int = 1

    @property
    def rank(self) -> int:
        """This rank's place in the group."""
        return dist.get_rank(self.group) if self.size > 1 else 0

    @property
    def size(self) -> int:
        """Ranks that share the layer."""
        return dist.get_world_size(self.group) if self.group is not None and dist.is_initialized() else 1

    def gather_x(self, x: Tensor) -> Tensor:
        """[S/tp, B, I] -> [S, B, I] under sequence parallelism."""
        if not self.sequence_parallel or self.size == 1:
            return x
        full = x.new_empty((x.shape[0] * self.size, *x.shape[1:]))
        dist.all_gather_into_tensor(full, x.contiguous(), group=self.group)  # pyright: ignore[reportDeprecated]
        return full

    def reduce_dx(self, dx: Tensor) -> Callable[[], Tensor]:
        """Start the reduce-scatter (sequence parallel) or all-reduce of the partial input gradient."""
        if self.size == 1 or not (self.sequence_parallel or self.allreduce_dgrad):
            return lambda: dx
        if self.sequence_parallel:
            part = dx.new_empty((dx.shape[0] // self.size, *dx.shape[1:]))
            work = dist.reduce_scatter_tensor(  # pyright: ignore[reportDeprecated] (the new name is not in torch 2.11)
                part, dx.contiguous(), group=self.group, async_op=True
            )
        else:
            part = dx.contiguous()
            work = dist.all_reduce(part, group=self.group, async_op=True)

        def finish() -> Tensor:
            assert work is not None
            work.wait()
            return part

        return finish

    def reduce_max(self, slot: str) -> ReduceMax | None:
        """MAX all-reduce for operands that are shards of the logical tensor: every rank then uses the same scale."""
        if self.size == 1 or self.split not in SLOT_DIMS[slot]:
            return None

        def reduce(amax: Tensor) -> Tensor:
            whole = amax.clone()
            dist.all_reduce(whole, op=dist.ReduceOp.MAX, group=self.group)
            return whole

        return reduce


class _Planned:
    """What column- and row-parallel layers share. Without a plan they are exactly Megatron's."""

    plan: LinearPlan | None = None
    comm: TpComm
    input_size: int
    output_size: int

    def set_plan(self, plan: LinearPlan | None) -> None:
        """Run under `plan` from now on; None is Megatron's own linear again."""
        self.plan = plan

    def global_features(self) -> tuple[int, int]:
        """(in, out) of the unsharded layer."""
        return self.input_size, self.output_size

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.plan is None:
            return super()._forward_impl(input, weight, *args, **kwargs)  # type: ignore[misc]
        if args:
            raise TypeError("Megatron-core passes _forward_impl's arguments by position; fp4dist expects keywords")
        self.comm.sequence_parallel = bool(kwargs["sequence_parallel"])
        self.comm.allreduce_dgrad = bool(kwargs["allreduce_dgrad"])
        y = fp4_linear(input, weight, self.plan, self.comm)
        bias = kwargs.get("bias")
        return y if bias is None else y + bias


class Fp4ColumnParallelLinear(_Planned, ColumnParallelLinear):
    """Column-parallel linear: W [O/tp, I] on each rank."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.comm = TpComm("O", None if self.explicit_expert_comm else self.tp_group)
        self.comm.pieces = getattr(self.weight, "partition_stride", 1)  # a tied head has no weight of its own


class Fp4RowParallelLinear(_Planned, RowParallelLinear):
    """Row-parallel linear: W [O, I/tp] on each rank; the output is reduced by Megatron."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.comm = TpComm("I", None if self.explicit_expert_comm else self.tp_group)
