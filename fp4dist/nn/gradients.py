"""Transforms of gradients between their reduction and the optimizer: SPAM's and Stable-SPAM's, on logical tensors.

A tensor's maximum and norm are those of the unsharded parameter, over all pieces on all ranks; norms are summed in
fp64, so that they do not depend on the layout to fp32's precision. The state is a few numbers for each tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fp4dist.nn.shards import Part, ShardMap
from fp4dist.spec.training import AdaClip, AdaNorm, MomentReset, SpikeClip

_SETBACK = 0.99  # what a reset takes off the learning rate at first, as SPAM released it


def make_parts(shards: ShardMap) -> list[Part]:
    """The parts of the recipe's `gradients`, in its order."""
    parts: list[Part] = []
    for spec in shards.applied.recipe.gradients:
        match spec:
            case SpikeClip():
                parts.append(SpikeClipPart(spec, shards))
            case AdaClip():
                parts.append(AdaClipPart(spec, shards))
            case AdaNorm():
                parts.append(AdaNormPart(spec, shards))
            case MomentReset():
                parts.append(MomentResetPart(spec, shards))
    for part in parts:
        if isinstance(part, MomentResetPart):
            part.listeners = [p for p in parts if isinstance(p, SpikeClipPart | AdaClipPart)]
    return parts


class _Transform(Part):
    """What transforms of gradients have in common: settings of the optimizer that they change for one step."""

    def __init__(self, shards: ShardMap) -> None:
        super().__init__(shards)
        self._borrowed: list[tuple[dict[str, Any], str, Any]] = []

    def settled(self, step: int) -> None:
        """Put back the groups' settings that the step was run with."""
        for group, key, value in reversed(self._borrowed):
            group[key] = value
        self._borrowed = []

    def _borrow(self, group: dict[str, Any], key: str, value: Any) -> None:
        """Change a group's setting for one step."""
        self._borrowed.append((group, key, group[key]))
        group[key] = value


class SpikeClipPart(_Transform):
    """`spec.training.SpikeClip`. Where the second moment is still 0 nothing is clipped: it says nothing yet."""

    key = "spike_clip"

    def __init__(self, spec: SpikeClip, shards: ShardMap) -> None:
        super().__init__(shards)
        self.spec = spec
        self.since = 0  # steps since the start or the last reset of the moments

    def before_step(self, step: int) -> None:
        """Clip this rank's elements; each needs only its own second moment."""
        if self.since >= self.spec.wait:
            for tensor, _, gradient in self.shards.gradients():
                v = self.shards.state(tensor).get("exp_avg_sq")
                if v is not None:
                    limit = v.to(gradient.dtype) * self.spec.threshold
                    spike = (gradient.square() > limit) & (limit > 0)
                    gradient.copy_(torch.where(spike, limit.sqrt_().copysign_(gradient), gradient))
        self.since += 1

    def moments_reset(self) -> None:
        """The moments were set to 0."""
        self.since = 0

    def state_dict(self) -> dict[str, Any]:
        """The number of steps since the start or the last reset."""
        return {"since": self.since}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting."""
        self.since = int(state["since"])


class AdaClipPart(_Transform):
    """`spec.training.AdaClip`: a moving average M of each logical tensor's largest |g|."""

    key = "ada_clip"

    def __init__(self, spec: AdaClip, shards: ShardMap) -> None:
        super().__init__(shards)
        self.spec = spec
        self.average = _zeros(shards)
        self.steps = _zeros(shards)  # t of the bias correction

    def before_step(self, step: int) -> None:
        """Update M, then scale what lies above it."""
        found = self.shards.gradients()
        peaks = torch._foreach_norm([g for _, _, g in found], math.inf) if found else []
        peak = self.shards.largest([(s, p) for (_, s, _), p in zip(found, peaks, strict=True)], empty=-1.0)
        seen = (peak >= 0) & peak.isfinite()
        decay = self.spec.decay
        self.steps += seen
        self.average = torch.where(seen, decay * self.average + (1 - decay) * peak, self.average)
        limit = self.average / (1 - decay**self.steps)
        # only a peak above the limit leaves anything to scale; rounding must not make one of an equal limit
        above = seen & (peak.float() > limit.float())
        factor = torch.where(above, limit / peak, 1.0).float()
        limit = torch.where(above, limit, math.inf).float()
        for _, shard, gradient in found:
            i = self.shards.index[shard.name]
            gradient.mul_(torch.where(gradient.abs() > limit[i], factor[i], 1.0))

    def moments_reset(self) -> None:
        """The moments were set to 0; as released, M's bias correction then counts this step as its first."""
        if self.spec.bias_step == "since_reset":
            self.steps = self.steps.clamp(max=1)

    def state_dict(self) -> dict[str, Any]:
        """M and its t of each logical tensor."""
        return _named(self.shards, average=self.average, steps=self.steps)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on averaging."""
        self.average, self.steps = _read(self.shards, state, "average"), _read(self.shards, state, "steps")


class AdaNormPart(_Transform):
    """`spec.training.AdaNorm`: moving averages of each logical tensor's norm and squared norm."""

    key = "ada_norm"

    def __init__(self, spec: AdaNorm, shards: ShardMap) -> None:
        super().__init__(shards)
        self.spec = spec
        self.mean, self.square, self.steps = _zeros(shards), _zeros(shards), _zeros(shards)

    def before_step(self, step: int) -> None:
        """Update the averages, then give each gradient its new norm; a zero gradient stays."""
        found, spec = self.shards.gradients(), self.spec
        norms = torch._foreach_norm([g for _, _, g in found], 2, dtype=torch.float64) if found else []
        values = [(s, n.square()) for (_, s, _), n in zip(found, norms, strict=True)]
        sums, seen = self.shards.total(values)
        norm = sums.sqrt()
        seen = seen & norm.isfinite()
        shrink = self._shrink(step)
        decay, square_decay = spec.norm_decay * shrink, spec.square_decay
        self.steps += seen
        self.mean = torch.where(seen, decay * self.mean + (1 - decay) * norm, self.mean)
        self.square = torch.where(seen, square_decay * self.square + (1 - square_decay) * sums, self.square)
        mean = self.mean / (1 - decay**self.steps)
        root = (self.square / (1 - square_decay**self.steps)).sqrt()
        factor = torch.where(seen & (norm > 0), mean / (root + spec.eps) / norm, 1.0).float()
        for _, shard, gradient in found:
            gradient.mul_(factor[self.shards.index[shard.name]])
        if shrink != 1.0:
            for group in self.shards.groups():
                beta1, beta2 = group["betas"]
                self._borrow(group, "betas", (beta1 * shrink, beta2))

    def _shrink(self, step: int) -> float:
        """The s of this step: a cosine from 1 to `decay_to`, which it reaches one step after the run, as released."""
        if self.spec.decay_to == 1:
            return 1.0
        share = (step + 1) / (self.shards.total_steps + 1)
        return self.spec.decay_to + (1 - self.spec.decay_to) * (1 + math.cos(math.pi * share)) / 2

    def state_dict(self) -> dict[str, Any]:
        """Both averages and their t of each logical tensor."""
        return _named(self.shards, mean=self.mean, square=self.square, steps=self.steps)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on averaging."""
        self.mean, self.square, self.steps = (_read(self.shards, state, key) for key in ("mean", "square", "steps"))


class MomentResetPart(_Transform):
    """`spec.training.MomentReset`."""

    key = "moment_reset"

    def __init__(self, spec: MomentReset, shards: ShardMap) -> None:
        super().__init__(shards)
        self.spec = spec
        self.listeners: list[SpikeClipPart | AdaClipPart] = []
        self.passed: int | None = None  # multiples of `every` behind the run; None before its first step here
        self.last: int | None = None  # step of the last reset

    def before_step(self, step: int) -> None:
        """Reset when due: also where the step that was due has been skipped."""
        due = (step + 1) // self.spec.every
        if due > (self.passed if self.passed is not None else step // self.spec.every):
            self._reset()
            self.last = step
        self.passed = due
        if self.last is not None and step - self.last < self.spec.warmup:
            # the cosine would reach 0 one step after the warm-up, as released
            angle = math.pi * (step - self.last) / (self.spec.warmup + 1)
            for group in self.shards.groups():
                self._borrow(group, "lr", group["lr"] * (1 - _SETBACK * (1 + math.cos(angle)) / 2))

    def _reset(self) -> None:
        for tensor in self.shards.shards:
            state = self.shards.state(tensor)
            for key in ("exp_avg", "exp_avg_sq"):
                if key in state:
                    state[key].zero_()
            if self.spec.restart and isinstance(state.get("step"), Tensor):
                state["step"].zero_()
        for group in self.shards.groups():
            if self.spec.restart and "step" in group:  # apex and Transformer Engine count steps there
                group["step"] = torch.zeros_like(group["step"]) if isinstance(group["step"], Tensor) else 0
        for part in self.listeners:
            part.moments_reset()

    def state_dict(self) -> dict[str, Any]:
        """When the last reset was."""
        return {"passed": self.passed, "last": self.last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.passed, self.last = state["passed"], state["last"]


def _zeros(shards: ShardMap) -> Tensor:
    """[names] fp64."""
    return torch.zeros(len(shards.names), dtype=torch.float64, device=shards.device)


def _named(shards: ShardMap, **vectors: Tensor) -> dict[str, Any]:
    """Vectors over the logical tensors with their names, on the CPU."""
    return {"names": list(shards.names), **{key: vector.cpu().clone() for key, vector in vectors.items()}}


def _read(shards: ShardMap, state: Mapping[str, Any], key: str) -> Tensor:
    """A vector of `_named` in this model's order of names; 0 for those that it lacks."""
    saved = dict(zip(state["names"], state[key].tolist(), strict=True))
    values = [saved.get(name, 0.0) for name in shards.names]
    return torch.tensor(values, dtype=torch.float64, device=shards.device)
