"""Whose tensors an optimizer updates: the layout-independent names, ranges and sums that its control works with.

An optimizer's tensor is a whole local weight or, under Megatron's distributed optimizer, a flat piece of one. What is
computed of a logical tensor (the unsharded parameter) goes through `ShardMap.total` and `ShardMap.largest`, which count
each element once over all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from fp4dist.nn.apply import AppliedRecipe, Target


@dataclass(slots=True, eq=False)
class Shard:
    """What one tensor of an optimizer holds.

    name          of the whole model's parameter, the same in every layout; equal for the pieces of one logical tensor
    parameter     this rank's whole local weight
    start, stop   flat range of `parameter` that the optimizer's tensor holds
    counted       False for a copy of what another rank counts, so that sums over ranks count each element once
    target        the linear under a recipe whose weight it is
    """

    name: str
    parameter: nn.Parameter
    start: int
    stop: int
    counted: bool = True
    target: Target | None = None


@dataclass(slots=True, eq=False)
class LocalWeight:
    """A parameter of this rank, whether or not the optimizer here holds a piece of it.

    holders   the ranks whose optimizers hold the pieces of it; None where this rank's holds all
    """

    parameter: nn.Parameter
    holders: dist.ProcessGroup | None = None


class Part:
    """What acts around an optimizer's step, at the places that a subclass takes up.

    `step` counts the updates behind the weights, as the noise clock does.

    All ranks call all methods in the same order, so that each may communicate.
    key      its name in a saved state
    slices   keys of optimizer.state[tensor] where it keeps tensors like that tensor: a checkpoint holds them, absent
             ones as zeros
    """

    key: str = ""
    slices: tuple[str, ...] = ()

    def __init__(self, shards: ShardMap) -> None:
        self.shards = shards

    def before_step(self, step: int) -> None:
        """Gradients are reduced and lie in the optimizer tensors' .grad, to be changed in place; their global norm has
        not clipped them yet.
        """

    def before_update(self, step: int) -> None:
        """Gradients are clipped and the step is certain to be taken: the optimizer's tensors are still the old ones."""

    def after_update(self, step: int) -> None:
        """The optimizer's tensors are updated, the model's weights are not yet made from them."""

    def settled(self, step: int) -> None:
        """The model's weights are new, and whole, on every rank."""

    def state_dict(self) -> dict[str, Any]:
        """What it keeps beside `slices`: plain numbers and CPU tensors, equal on all ranks and in all layouts."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave."""

    def before_save(self) -> None:
        """A checkpoint is about to be written: what `slices` names must be in optimizer.state."""

    def after_load(self) -> None:
        """Slices or weights have been read from a checkpoint; may be called more than once for one checkpoint."""


class ShardMap:
    """The optimizers of one rank and what their tensors are.

    shards        of every tensor that the optimizers update;  weights   of every trained parameter of this rank by name
    total_steps   of the run
    collective    whether elements are spread over the ranks of the world, which then all take part in every sum
    names         of the whole model's parameters, equal on every rank: the index of `largest` and `total`
    """

    def __init__(
        self,
        applied: AppliedRecipe,
        optimizers: Sequence[torch.optim.Optimizer],
        shards: Mapping[Tensor, Shard],
        weights: Mapping[str, LocalWeight],
        total_steps: int,
        *,
        collective: bool,
    ) -> None:
        self.applied, self.optimizers, self.total_steps = applied, tuple(optimizers), total_steps
        self.shards, self.weights = dict(shards), dict(weights)
        self.collective = collective and dist.is_initialized() and dist.get_world_size() > 1
        self.names = self._world_names()
        self.index = {name: i for i, name in enumerate(self.names)}
        self.device = next((w.parameter.device for w in self.weights.values()), torch.device("cpu"))

    def state(self, tensor: Tensor) -> dict[str, Any]:
        """The optimizer's state of one of its tensors."""
        return self._owner(tensor).state[tensor]

    def group(self, tensor: Tensor) -> dict[str, Any]:
        """The parameter group of one of the optimizers' tensors: lr, betas, weight_decay ..."""
        self._owner(tensor)
        return self._groups[id(tensor)]

    def groups(self) -> list[dict[str, Any]]:
        """All parameter groups."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def gradients(self) -> list[tuple[Tensor, Shard, Tensor]]:
        """(optimizer tensor, its shard, its gradient), of those that have a gradient and an element."""
        found = []
        for tensor, shard in self.shards.items():
            if tensor.grad is not None and tensor.numel() > 0:
                found.append((tensor, shard, tensor.grad))
        return found

    def largest(self, values: Sequence[tuple[Shard, Tensor]], *, empty: float) -> Tensor:
        """[names] fp64: the maximum of the scalars `values` of each logical tensor over all ranks; else `empty`."""
        best: dict[str, Tensor] = {}
        for shard, value in values:
            known = best.get(shard.name)
            best[shard.name] = value if known is None else torch.maximum(known, value)
        out = torch.full((len(self.names),), empty, dtype=torch.float64, device=self.device)
        if best:
            out[self._at(best)] = torch.stack(list(best.values())).double()
        if self.collective:
            dist.all_reduce(out, op=dist.ReduceOp.MAX)
        return out

    def total(self, values: Sequence[tuple[Shard, Tensor]]) -> tuple[Tensor, Tensor]:
        """(sums, seen), [names] each: fp64 sums of the scalars `values` of each logical tensor over all ranks, without
        copies, and whether any rank had one.
        """
        sums: dict[str, Tensor] = {}
        for shard, value in values:
            if shard.counted:
                known = sums.get(shard.name)
                sums[shard.name] = value if known is None else known + value
        out = torch.zeros((2, len(self.names)), dtype=torch.float64, device=self.device)
        if sums:
            at = self._at(sums)
            out[0, at], out[1, at] = torch.stack(list(sums.values())).double(), 1.0
        if self.collective:
            dist.all_reduce(out)
        return out[0], out[1] > 0

    def _at(self, names: Iterable[str]) -> Tensor:
        return torch.tensor([self.index[name] for name in names], device=self.device)

    def gather(self, key: str, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Whole local tensors, shaped like the weights, of what optimizer.state holds under `key` in slices.

        names     of this rank's weights, default all of them; the ranks that hold pieces of a weight must ask alike
        returns   by name; fp32, zero where no state is
        """
        whole = {}
        for name in self.weights if names is None else names:
            weight = self.weights[name]
            whole[name] = torch.zeros_like(weight.parameter, dtype=torch.float32, requires_grad=False).view(-1)
        for tensor, shard in self.shards.items():
            value = self.state(tensor).get(key)
            if shard.name in whole and value is not None:
                whole[shard.name][shard.start : shard.stop].copy_(value.reshape(-1))
        for name, flat in whole.items():
            holders = self.weights[name].holders
            if holders is not None and dist.get_world_size(holders) > 1:
                dist.all_reduce(flat, group=holders)
        return {name: flat.view(self.weights[name].parameter.shape) for name, flat in whole.items()}

    def scatter(self, key: str, whole: Mapping[str, Tensor]) -> None:
        """The inverse of `gather`: each optimizer tensor takes its slice of the whole local tensors."""
        for tensor, shard in self.shards.items():
            if shard.name in whole:
                flat = whole[shard.name].reshape(-1)[shard.start : shard.stop]
                held = self.state(tensor).get(key)
                if held is None:
                    self.state(tensor)[key] = flat.to(tensor.device, torch.float32, copy=True).view(tensor.shape)
                else:
                    held.copy_(flat.view(held.shape))

    def _owner(self, tensor: Tensor) -> torch.optim.Optimizer:
        """Groups may be exchanged when a checkpoint is read, so the map of owners is checked and made anew."""
        stamp = tuple(id(group) for group in self.groups())
        if getattr(self, "_stamp", None) != stamp:
            self._stamp = stamp
            self._owners: dict[int, torch.optim.Optimizer] = {}
            self._groups: dict[int, dict[str, Any]] = {}
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    for p in group["params"]:
                        self._owners[id(p)], self._groups[id(p)] = optimizer, group
        return self._owners[id(tensor)]

    def _world_names(self) -> tuple[str, ...]:
        own = [shard.name for shard in self.shards.values()] + list(self.weights)
        if not self.collective:
            return tuple(sorted(set(own)))
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, own)
        return tuple(sorted({name for names in every for name in names}))
