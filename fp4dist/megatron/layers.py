"""Megatron-core's tensor-parallel linears with a LinearPlan: initialization, sharding and checkpoints are inherited.

Megatron calls `_forward_impl` for everything between a layer's input and its partial output: the sequence-parallel
gather, the GEMM, and in backward the input gradient's reduction and the weight gradient. One override replaces it with
`fp4dist.nn.function`. A row-parallel layer under sequence parallelism overrides `forward` as well: its output's
reduce-scatter becomes part of our autograd function, so that backward can gather dY as packed codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch.distributed as dist
from torch import Tensor

from fp4dist.megatron.stamp import RecipeStamp
from fp4dist.megatron.upstream import ColumnParallelLinear, RowParallelLinear, parallel_state, refuse_fp4_switch
from fp4dist.nn.comm import SLOT_DIMS, Dim
from fp4dist.nn.function import fp4_linear
from fp4dist.nn.plan import LinearPlan
from fp4dist.numerics.quantize import ReduceMax


class SumWire(Protocol):
    """Another way for the reduce-scatters of one linear."""

    def reduce_scatter(self, t: Tensor, group: Any) -> Callable[[], Tensor]:
        """Start summing [n, ...] over the ranks of `group`; the returned function waits, gives this rank's part."""
        ...


@dataclass(slots=True)
class TpComm:
    """The process groups of one linear (see `fp4dist.nn.comm.LinearComm`).

    split             O for column-parallel, I for row-parallel
    group             the tensor-parallel group; an expert's is the expert tensor-parallel group
    pieces            Megatron's `partition_stride`: 2 where each rank holds its parts of SwiGLU's gate and up
    token_shard       sequence parallelism: x for column-parallel, y for row-parallel
    allreduce_dgrad   the input gradient is a partial sum to be all-reduced
    context_group     ranks that hold other pieces of the same sequences; None: this rank has whole sequences
    both_group        the product of `group` and `context_group`
    wire              how sums under sequence parallelism travel; None: as they are
    """

    split: Dim | None
    group: Any
    pieces: int = 1
    token_shard: Literal["x", "y"] | None = None
    allreduce_dgrad: bool = False
    context_group: Any = None
    both_group: Any = None
    wire: SumWire | None = None
    _sizes: tuple[int, int] | None = None  # of `group` and `context_group`, asked several times a GEMM

    @property
    def rank(self) -> int:
        """This rank's place in the tensor-parallel group."""
        return dist.get_rank(self.group) if self.size > 1 else 0

    @property
    def size(self) -> int:
        """Ranks that share the layer."""
        return (self._sizes or self._ask())[0]

    @property
    def context(self) -> tuple[int, int]:
        """(rank, size) in context parallelism."""
        size = (self._sizes or self._ask())[1]
        return (dist.get_rank(self.context_group), size) if size > 1 else (0, 1)

    def _ask(self) -> tuple[int, int]:
        found = _size(self.group), _size(self.context_group)
        if dist.is_initialized():  # else there are no groups yet
            self._sizes = found
        return found

    def all_gather(self, part: Tensor) -> Callable[[], Tensor]:
        """Start gathering [n, ...] from every rank to [size * n, ...]."""
        full = part.new_empty((part.shape[0] * self.size, *part.shape[1:]))
        work = dist.all_gather_into_tensor(  # pyright: ignore[reportDeprecated] (the new name is not in torch 2.11)
            full, part, group=self.group, async_op=True
        )
        return _after(work, full)

    def reduce_dx(self, dx: Tensor) -> Callable[[], Tensor]:
        """Start the reduce-scatter (sequence parallel) or all-reduce of the partial input gradient."""
        if self.size > 1 and self.token_shard == "x":
            return self._reduce_scatter(dx)
        if self.size == 1 or not self.allreduce_dgrad:
            return lambda: dx
        part = dx.contiguous()
        return _after(dist.all_reduce(part, group=self.group, async_op=True), part)

    def reduce_y(self, y: Tensor) -> Tensor:
        """The reduce-scatter of a row-parallel layer's partial output under sequence parallelism, or y."""
        return self._reduce_scatter(y)() if self.size > 1 and self.token_shard == "y" else y

    def reduce_max(self, slot: str, token_shard: bool = False) -> ReduceMax | None:
        """MAX all-reduce for operands that are shards of the logical tensor: every rank then uses the same scale."""
        has_tokens = "T" in SLOT_DIMS[slot]
        over_tp = self.size > 1 and (self.split in SLOT_DIMS[slot] or (token_shard and has_tokens))
        over_context = has_tokens and self.context[1] > 1
        if not over_tp and not over_context:
            return None
        group = self.both_group if over_tp and over_context else self.group if over_tp else self.context_group

        def reduce(amax: Tensor) -> Tensor:
            whole = amax.clone()
            dist.all_reduce(whole, op=dist.ReduceOp.MAX, group=group)
            return whole

        return reduce

    def _reduce_scatter(self, t: Tensor) -> Callable[[], Tensor]:
        if self.wire is not None:
            return self.wire.reduce_scatter(t, self.group)
        part = t.new_empty((t.shape[0] // self.size, *t.shape[1:]))
        work = dist.reduce_scatter_tensor(  # pyright: ignore[reportDeprecated]
            part, t.contiguous(), group=self.group, async_op=True
        )
        return _after(work, part)


def _size(group: Any) -> int:
    """Of the group itself: dist.get_world_size takes ten times as long."""
    return group.size() if group is not None and dist.is_initialized() else 1


def _after(work: Any, result: Tensor) -> Callable[[], Tensor]:
    def wait() -> Tensor:
        work.wait()
        return result

    return wait


def _make_comm(split: Dim, layer: Any) -> TpComm:
    """The groups of a constructed layer; an expert's tokens have no place in a sequence, so none is split."""
    refuse_fp4_switch(layer.config)
    comm = TpComm(split, layer.tp_group)
    context_group = parallel_state.get_context_parallel_group(check_initialized=False)
    if not layer.is_expert and _size(context_group) > 1:
        comm.context_group = context_group
        comm.both_group = parallel_state.get_tensor_and_context_parallel_group()
    if layer.sequence_parallel and not layer.explicit_expert_comm:
        comm.token_shard = "x" if split == "O" else "y"
    return comm


class _Planned:
    """What column- and row-parallel layers share. Without a plan they are exactly Megatron's."""

    plan: LinearPlan | None = None
    stamp: RecipeStamp | None = None  # of a recipe that fp4dist.megatron.apply gave
    comm: TpComm
    input_size: int
    output_size: int

    def set_plan(self, plan: LinearPlan | None) -> None:
        """Run under `plan` from now on; None is Megatron's own linear again."""
        self.plan = plan

    def global_features(self) -> tuple[int, int]:
        """(in, out) of the unsharded layer."""
        return self.input_size, self.output_size

    def get_extra_state(self) -> Any:
        """The recipe's stamp for checkpoints; None, as Megatron's own linears have it, without FP4."""
        return None if self.stamp is None else self.stamp.state()

    def set_extra_state(self, state: Any) -> None:
        """Refuse a checkpoint of another recipe; CheckpointError."""
        if self.stamp is not None:
            self.stamp.check(state)

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.plan is None:
            return super()._forward_impl(input, weight, *args, **kwargs)  # type: ignore[misc]
        if args:
            raise TypeError("Megatron-core passes _forward_impl's arguments by position; fp4dist expects keywords")
        self.comm.token_shard = "x" if kwargs["sequence_parallel"] else None
        self.comm.allreduce_dgrad = bool(kwargs["allreduce_dgrad"])
        y = fp4_linear(input, weight, self.plan, self.comm)
        bias = kwargs.get("bias")
        return y if bias is None else y + bias


class Fp4ColumnParallelLinear(_Planned, ColumnParallelLinear):
    """Column-parallel linear: W [O/tp, I] on each rank."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.comm = _make_comm("O", self)
        self.comm.pieces = getattr(self.weight, "partition_stride", 1)  # a tied head has no weight of its own


class Fp4RowParallelLinear(_Planned, RowParallelLinear):
    """Row-parallel linear: W [O, I/tp] on each rank; without sequence parallelism Megatron reduces the output."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.comm = _make_comm("I", self)

    def forward(self, input_: Tensor) -> tuple[Tensor, Any]:
        """[S, B, I/tp] -> ([S, B, O], or [S/tp, B, O] under sequence parallelism; the bias if it is left to others)."""
        if (
            self.plan is None
            or not self.sequence_parallel
            or self.explicit_expert_comm  # an attribute that a shared expert sets after construction
            or self.config._cpu_offloading_context is not None
        ):
            return super().forward(input_)
        self.comm.token_shard, self.comm.allreduce_dgrad = "y", False
        y = fp4_linear(input_, self.weight, self.plan, self.comm)
        if self.skip_bias_add:
            return y, self.bias
        return (y + self.bias if self.bias is not None else y), None
