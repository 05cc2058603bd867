"""Megatron's experts under LinearPlans: one after the other, or all of a rank in grouped GEMMs, with the same bits.

Both keep SequentialMLP's modules and parameters, `local_experts.E.linear_fc1.weight` and so on: checkpoints, expert
parallel resharding, initialization and recipe rules do not know which one runs. Paths and noise numbers carry the
global expert number.

An expert's tokens come from all ranks of the expert-parallel group in the order in which the dispatcher lays them out.
They are one logical tensor on the rank that holds the expert: its amax is not reduced over copies of the expert on
other ranks, and its noise differs between them.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from fp4dist.errors import ConfigError
from fp4dist.megatron.layers import Fp4ColumnParallelLinear, Fp4RowParallelLinear, TpComm
from fp4dist.megatron.upstream import MLP, RowParallelLinear, SequentialMLP, parallel_state
from fp4dist.nn.grouped import Expert, TokenPart, expert_linear, grouped_linear
from fp4dist.nn.plan import LinearPlan


class Fp4SequentialExperts(SequentialMLP):
    """Experts one after the other."""

    @property
    def first_expert(self) -> int:
        """Global number of local_experts[0]."""
        return self.ep_group.rank() * self.num_local_experts


class Fp4GroupedExperts(Fp4SequentialExperts):
    """All experts of the rank in one grouped GEMM for fc1 and one for fc2; needs GroupedColumn and GroupedRow."""

    _z3_leaf = True  # DeepSpeed's mark: ZeRO-3 gathers and releases the parameters of all experts together

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.config.add_bias_linear:
            raise ConfigError("add_bias_linear: grouped experts have no bias; set it False or moe_grouped_gemm False")

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """[T, H] sorted by expert, [E] tokens of each, [T] router probabilities -> ([T, H], no bias).

        Without plans exactly SequentialMLP.
        """
        if self.fc1(0).plan is None:
            return super().forward(permuted_local_hidden_states, tokens_per_expert, permuted_probs)
        x, probs, counts = permuted_local_hidden_states, permuted_probs, tokens_per_expert.tolist()
        if self.config.moe_apply_probs_on_input:
            x, probs = (probs.unsqueeze(-1) * x).to(x.dtype), torch.ones_like(probs)
        part = _token_part()
        members = range(self.num_local_experts)
        hidden = grouped_linear(x, [self.fc1(e).expert() for e in members], counts, part)
        activated = self._activated(hidden, probs, counts)
        return grouped_linear(activated, [self.fc2(e).expert() for e in members], counts, part), None

    def fc1(self, expert: int) -> GroupedColumn:
        """The first linear of a local expert."""
        return cast(GroupedColumn, cast(MLP, self.local_experts[expert]).linear_fc1)

    def fc2(self, expert: int) -> GroupedRow:
        """The second linear of a local expert."""
        return cast(GroupedRow, cast(MLP, self.local_experts[expert]).linear_fc2)

    def _activated(self, hidden: Tensor, probs: Tensor, counts: list[int]) -> Tensor:
        """What Megatron's MLP does between its linears. Its elementwise kernels give the same bits for any number of
        rows on a GPU; on a CPU the ends of a vectorized loop may round silu differently, so there it runs by expert.
        """
        between = SimpleNamespace(
            config=self.config,
            activation_func=cast(MLP, self.local_experts[0]).activation_func,
            linear_fc1=_SAME,
            linear_fc2=_SAME,
        )
        if hidden.is_cuda:
            return MLP.forward(cast(MLP, between), hidden, probs)[0]
        parts = zip(hidden.split(counts), probs.split(counts), strict=True)
        return torch.cat([MLP.forward(cast(MLP, between), rows, scale)[0] for rows, scale in parts])


class _Same(nn.Module):
    """In place of a linear."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x, None


_SAME = _Same()


class _ExpertLinear:
    """An expert's linear. Its tokens are not in sequence order and never split or reduced over ranks: the dispatcher
    has done all communication.
    """

    plan: LinearPlan | None
    comm: TpComm

    @property
    def token_share(self) -> float:
        """Part of all tokens that passes this linear if experts are used evenly."""
        config = cast(Any, self).config
        return config.moe_router_topk / config.num_moe_experts

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.plan is None:
            return super()._forward_impl(input, weight, *args, **kwargs)  # type: ignore[misc]
        y = expert_linear(input, Expert(weight, self.plan, self.comm), _token_part())
        bias = kwargs.get("bias")
        return y if bias is None else y + bias


class ExpertColumn(_ExpertLinear, Fp4ColumnParallelLinear):
    """The first linear of an expert: W [O/etp, I]."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.comm.token_shard = None


class ExpertRow(_ExpertLinear, Fp4RowParallelLinear):
    """The second linear of an expert: W [O, I/etp]."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.comm.token_shard = None

    def forward(self, input_: Tensor) -> tuple[Tensor, Any]:
        """[T, I/etp] -> ([T, O], the bias if it is left to others)."""
        return RowParallelLinear.forward(self, input_)  # type: ignore[arg-type]


class _Held:
    """A linear that grouped experts run: it is called without an input and gives its weight, so that the hooks that
    overlapped parameter gathers and FSDP put on modules do their work before the weight is read.
    """

    def forward(self, input_: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """The weight; with an input, Megatron's linear."""
        if input_ is None:
            return cast(Any, self).weight
        return super().forward(input_, *args, **kwargs)  # type: ignore[misc]

    def expert(self) -> Expert:
        """What the grouped GEMM needs of this expert."""
        layer = cast(Any, self)
        return Expert(layer(), layer.plan, layer.comm)


class GroupedColumn(_Held, ExpertColumn):
    """ExpertColumn inside Fp4GroupedExperts."""


class GroupedRow(_Held, ExpertRow):
    """ExpertRow inside Fp4GroupedExperts."""


def _token_part() -> TokenPart:
    """Which of the parts of a micro-batch that its ranks route separately is this rank's: those of TP (sequence
    parallelism) and CP. Ranks that share an expert's weight by expert tensor parallelism route together.
    """
    expert_tensor = parallel_state.get_expert_tensor_parallel_world_size() or 1
    tensor_parts = max(parallel_state.get_tensor_model_parallel_world_size() // expert_tensor, 1)
    part = parallel_state.get_tensor_model_parallel_rank() // expert_tensor
    contexts = parallel_state.get_context_parallel_world_size()
    return TokenPart(parallel_state.get_context_parallel_rank() * tensor_parts + part, contexts * tensor_parts)
