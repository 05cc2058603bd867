"""Optimizers and their learning-rate schedule, the same for both engines.

AdamW is NVIDIA apex's FusedAdam where it is built and a GPU is there, torch's fused one otherwise; SGD and Adafactor,
which are there for comparison, are torch's. Matrices decay, vectors (norm weights, biases) do not. The schedule is
Megatron-core's, in steps: `place_schedule(s)` gives the learning rate of step s, so a resumed run needs nothing but its
step and the starts of phases that change the rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from fp4dist.nn.phases import Phases
from fp4dist.spec.run import RunConfig
from fp4dist.train.packages import has_nvidia_apex

_STYLES = {"cosine": "cosine", "wsd": "WSD", "constant": "constant"}
_WSD_DECAY = "minus_sqrt"  # 1 - sqrt(t): the decay with the lowest final loss in arXiv:2405.18392
_OWN_KEYS = (
    "lr",
    "max_lr",
    "min_lr",
    "weight_decay",
    "wd_mult",
    "betas",
    "momentum",
    "eps",
)  # set by the config, not by a checkpoint


class HoldMixin:
    """An optimizer whose `step` does nothing while `held`: how a step is skipped inside another engine's step."""

    held: bool = False
    entered: Callable[[], None] | None = None  # at the beginning of every step, held or not
    before_update: Callable[[], None] | None = None  # around an update that is not held
    after_update: Callable[[], None] | None = None

    def step(self, closure: Any = None) -> Any:
        """Update the parameters, unless held."""
        if self.entered is not None:
            self.entered()
        if self.held:
            materialize_state(self)  # type: ignore[arg-type]  # engines look the state up after the first step
            return None
        if self.before_update is not None:
            self.before_update()
        result = super().step(closure)  # type: ignore[misc]
        if self.after_update is not None:
            self.after_update()
        return result


class HeldAdamW(HoldMixin, torch.optim.AdamW):
    """torch's AdamW with `held`."""


class HeldSGD(HoldMixin, torch.optim.SGD):
    """torch's SGD with `held`."""


class HeldAdafactor(HoldMixin, torch.optim.Adafactor):
    """torch's Adafactor with `held`."""


def make_optimizer(model: nn.Module, config: RunConfig, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of `optim.kind` over a model's parameters in two groups (decay, no decay), with `held`."""
    o = config.optim
    if o.kind == "adamw":
        return make_adamw(model, config, device)
    groups = parameter_groups(model.named_parameters(), config)
    if o.kind == "sgd":
        return HeldSGD(groups, lr=o.lr, momentum=o.momentum, weight_decay=o.weight_decay)
    return HeldAdafactor(groups, lr=o.lr, weight_decay=o.weight_decay)


def make_adamw(model: nn.Module, config: RunConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW over a model's parameters in two groups (decay, no decay), with `held`."""
    o = config.optim
    groups = parameter_groups(model.named_parameters(), config)
    options: dict[str, Any] = {"lr": o.lr, "betas": (o.beta1, o.beta2), "eps": o.eps, "weight_decay": o.weight_decay}
    if device.type == "cuda" and has_nvidia_apex() and not config.recipe.steers_optimizer:
        # a recipe that reaches into the optimizer needs its tensors one by one; DeepSpeed flattens apex's
        from apex.optimizers import FusedAdam  # pyright: ignore[reportMissingImports]

        cls: Any = type("HeldFusedAdam", (HoldMixin, FusedAdam), {})
        return cls(groups, adam_w_mode=True, **options)
    return HeldAdamW(groups, fused=True, **options)


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], config: RunConfig) -> list[dict[str, Any]]:
    """Megatron-core's grouping: parameters with one dimension and biases do not decay."""
    decay, no_decay = [], []
    for name, parameter in named:
        if parameter.requires_grad:
            (no_decay if parameter.dim() == 1 or name.endswith(".bias") else decay).append(parameter)
    limits = {"max_lr": config.optim.lr, "min_lr": config.optim.min_lr}
    groups = [{"params": decay, "wd_mult": 1.0, **limits}, {"params": no_decay, "wd_mult": 0.0, **limits}]
    return [g for g in groups if g["params"]]


def use_fused_step(optimizer: torch.optim.Optimizer) -> None:
    """Switch a torch AdamW, built by Megatron-core without options, to its fused step."""
    if isinstance(optimizer, torch.optim.AdamW):
        for group in optimizer.param_groups:
            group["fused"], group["foreach"] = True, False


def materialize_state(optimizer: torch.optim.Optimizer) -> None:
    """Create zero moments where none are yet, exactly as the first step would, without taking it.

    SGD's first step makes its momentum of the gradient alone, which is what it makes of a momentum of 0. Adafactor,
    whose engine does not look, makes its state itself.
    """
    torch_style = isinstance(optimizer, torch.optim.AdamW)
    if isinstance(optimizer, torch.optim.SGD):
        _materialize_momentum(optimizer)
    if isinstance(optimizer, torch.optim.SGD | torch.optim.Adafactor):
        return
    for group in optimizer.param_groups:
        for p in group["params"]:
            if optimizer.state[p]:
                continue
            if torch_style:  # apex and Transformer Engine count steps in the group
                device = p.device if group.get("fused") or group.get("capturable") else torch.device("cpu")
                optimizer.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=device)
            optimizer.state[p]["exp_avg"] = torch.zeros_like(p.data)
            optimizer.state[p]["exp_avg_sq"] = torch.zeros_like(p.data)


def _materialize_momentum(optimizer: torch.optim.SGD) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            if group["momentum"] != 0 and optimizer.state[p].get("momentum_buffer") is None:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p.data)


def own_settings(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The settings of each group that belong to the config, to be put back after a checkpoint has overwritten them."""
    return [{key: group[key] for key in _OWN_KEYS if key in group} for group in groups]


def restore_settings(groups: list[dict[str, Any]], settings: list[dict[str, Any]]) -> None:
    """Undo what loading a checkpoint did to the groups' settings."""
    for group, own in zip(groups, settings, strict=True):
        group.update(own)


class Schedule:
    """The run's learning rate: Megatron-core's schedule, and from a phase's start on the shape that the phase gives.

    scheduler   Megatron-core's OptimizerParamScheduler, counting steps
    phases      those of the run's recipe; None: it has none. A rate depends on its step and their recorded starts alone
    """

    def __init__(self, scheduler: Any, config: RunConfig, phases: Phases | None) -> None:
        self.optimizer = scheduler.optimizer
        self._scheduler, self._config, self._phases = scheduler, config, phases
        if phases is not None:
            phases.steers_rate = True

    def place(self, step: int) -> None:
        """Set rate and weight decay of every group to those of step `step` (from 1)."""
        self._scheduler.num_steps = step
        self._scheduler.step(0)
        total = self._config.train.steps
        if self._phases is None or self._phases.ruling(step, total) is None:
            return
        for group in self.optimizer.param_groups:
            rate = self._phases.rate(step, total, lambda s, group=group: self._base(s, group))
            group["lr"] = self._unit(group) * rate

    def _base(self, step: int, group: dict[str, Any]) -> float:
        """The run's own rate of a group, in units of the group's highest."""
        self._scheduler.num_steps = step
        return float(self._scheduler.get_lr(group)) / self._unit(group)

    def _unit(self, group: dict[str, Any]) -> float:
        return group.get("max_lr", self._config.optim.lr)


def make_schedule(optimizer: Any, config: RunConfig, phases: Phases | None = None) -> Schedule:
    """The schedule of anything with `param_groups`; `phases` are those of the AppliedRecipe that it trains."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    o, steps = config.optim, config.train.steps
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=o.lr,
        min_lr=o.min_lr,
        lr_warmup_steps=o.warmup_steps,
        lr_decay_steps=steps,
        lr_decay_style=_STYLES[o.schedule],
        start_wd=o.weight_decay,
        end_wd=o.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        wsd_decay_steps=math.ceil(o.decay_fraction * steps),
        lr_wsd_decay_style=_WSD_DECAY,
    )
    return Schedule(scheduler, config, phases)


def place_schedule(schedule: Schedule, step: int) -> float:
    """Set the optimizer's learning rate to that of step `step` (from 1) and return it."""
    schedule.place(step)
    groups = schedule.optimizer.param_groups
    return float(groups[0]["lr"]) if groups else 0.0


def describe(optimizer: torch.optim.Optimizer) -> str:
    """For the log: which optimizer this is."""
    cls = type(optimizer)
    base = next(c for c in cls.__mro__ if not c.__module__.startswith("fp4dist"))
    fused = " (fused)" if any(g.get("fused") for g in optimizer.param_groups) else ""
    return f"{base.__module__.partition('.')[0]} {base.__name__}{fused}"
