"""What a recipe does around the optimizer's step, for any optimizer whose tensors are known.

Engines call an `OptimizerControl` at four places of each step (see `shards.Part`); `attach_optimizer` does so by a
torch optimizer's own hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from fp4dist.errors import RecipeMismatch
from fp4dist.nn import gradients, optimizer_state, weights
from fp4dist.nn.apply import AppliedRecipe, Target
from fp4dist.nn.shards import LocalWeight, Part, Shard, ShardMap
from fp4dist.nn.sites import named_parameters

# In the order in which they act: transforms of gradients, control of weights, then the rounding of what is kept.
_MAKERS: tuple[Callable[[ShardMap], list[Part]], ...] = (
    gradients.make_parts,
    weights.make_parts,
    optimizer_state.make_parts,
)


class OptimizerControl:
    """The parts of a recipe that act around the optimizer's step, in their order. See `shards.Part` for the calls."""

    def __init__(self, shards: ShardMap) -> None:
        self.shards = shards
        self.parts: list[Part] = [part for make in _MAKERS for part in make(shards)]
        shards.applied.optimizer = self

    @property
    def slices(self) -> tuple[str, ...]:
        """Keys of optimizer.state[tensor] that belong to a checkpoint."""
        return tuple(key for part in self.parts for key in part.slices)

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Gradients are reduced, not yet clipped."""
        for part in self.parts:
            part.before_step(step)

    @torch.no_grad()
    def before_update(self, step: int) -> None:
        """Gradients are clipped and the update is certain to come."""
        for part in self.parts:
            part.before_update(step)

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        """Masters are updated, the model's weights not yet."""
        for part in self.parts:
            part.after_update(step)

    @torch.no_grad()
    def settled(self, step: int) -> None:
        """The model's weights are new on every rank."""
        for part in self.parts:
            part.settled(step)

    @torch.no_grad()
    def plans_changed(self) -> None:
        """The linears have new plans: a phase has begun."""
        for part in self.parts:
            if isinstance(part, weights.AveragesPart):
                part.plans_changed()

    def state_dict(self) -> dict[str, Any]:
        """The parts' small state; equal on all ranks."""
        return {part.key: part.state_dict() for part in self.parts}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave; parts that it does not know start afresh."""
        for part in self.parts:
            if part.key in state:
                part.load_state_dict(state[part.key])
        self.after_load()

    @torch.no_grad()
    def before_save(self) -> None:
        """A checkpoint is about to be written: every tensor of a part lies in the optimizer's state now."""
        for part in self.parts:
            part.before_save()

    @torch.no_grad()
    def after_load(self) -> None:
        """The optimizer's tensors have been read from a checkpoint."""
        for part in self.parts:
            part.after_load()


def targets_by_weight(applied: AppliedRecipe) -> dict[int, Target]:
    """Target by the id() of its weight."""
    return {id(w): t for t in applied.targets if (w := getattr(t.module, "weight", None)) is not None}


def attach_optimizer(applied: AppliedRecipe, optimizer: torch.optim.Optimizer, total_steps: int) -> OptimizerControl:
    """Let `applied`'s recipe act around each `optimizer.step()`, for a model that is trained without our engines.

    applied      of apply_recipe; every rank holds the whole model and has the same reduced gradients (one process, DDP)
    total_steps  of the run: shares of it appear in recipes
    returns      the control, also kept as applied.optimizer. What it keeps beside the optimizer's own state is in
                 applied.state_dict()

    Gradients are transformed where `optimizer.step` begins: clip them before, or after in a hook of your own.
    Raises RecipeMismatch for parameters that are not the model's, and for sharded ones (FSDP's DTensor).
    """
    names = {id(p): name for chunk, offset in applied.chunks for name, p in named_parameters(chunk, offset)}
    targets, shards, weights = targets_by_weight(applied), {}, {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            name = names.get(id(p))
            if isinstance(p, DTensor) or name is None:
                raise RecipeMismatch(
                    f"attach_optimizer: a parameter of shape {list(p.shape)} is"
                    f" {'sharded' if name is not None or isinstance(p, DTensor) else 'not one of the model'}; recipe"
                    f" {applied.recipe.name} works on whole local parameters: use DDP or one of the package's engines,"
                    " and build the optimizer from the model's parameters"
                )
            shards[p] = Shard(name, p, 0, p.numel(), target=targets.get(id(p)))
            weights[name] = LocalWeight(p)
    control = OptimizerControl(ShardMap(applied, [optimizer], shards, weights, total_steps, collective=False))
    depth = 0  # a subclass's step may call its base's, and torch puts hooks around both

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal depth
        if depth == 0:
            _check_step(applied, optimizer, args, kwargs)
        depth += 1
        if depth == 1:
            control.before_step(applied.clock.step)
            control.before_update(applied.clock.step)

    def after(*_: Any) -> None:
        nonlocal depth
        depth -= 1
        if depth == 0:
            control.after_update(applied.clock.step)
            control.settled(applied.clock.step)
            applied.drop_caches()
            applied.settle(float(optimizer.param_groups[0]["lr"]))

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    optimizer.register_state_dict_pre_hook(lambda _: control.before_save())
    return control


def _check_step(
    applied: AppliedRecipe, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """The gradients must lie there before the step, as they are."""
    if any(value is not None for value in (*args[1:], *kwargs.values())):
        raise RecipeMismatch(
            f"optimizer.step(closure): recipe {applied.recipe.name} acts on gradients before the step, and a closure"
            " makes them inside; run backward first and call optimizer.step()"
        )
    if getattr(optimizer, "grad_scale", None) is not None:
        raise RecipeMismatch(
            f"GradScaler.step: the gradients are still scaled, and recipe {applied.recipe.name} works on them; call"
            " scaler.unscale_(optimizer) before"
        )
