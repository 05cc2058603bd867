"""Which phases of a recipe run: by share of the run, by step, by the noise of gradients, by hand.

A phase with a step of its own starts there. One with a trigger starts at the step at which something told: a
measurement (`measured`) or a person (`trigger`). That step is recorded and goes with checkpoints, so whatever depends
on phases (quantizers, learning rate, dtypes of the optimizer's state) is a function of the step and this record.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fp4dist.errors import ConfigError, RecipeMismatch
from fp4dist.spec.phases import GradNoise, LrShape, Manual
from fp4dist.spec.recipe import Phase, Recipe
from fp4dist.spec.training import OptimizerState

log = logging.getLogger("fp4dist")


@dataclass(frozen=True, slots=True)
class Start:
    """When a phase started or will start: `step` updates are behind the weights then; `reason` is for people."""

    phase: str
    step: int
    reason: str


class Phases:
    """The enabled phases of a recipe in one run.

    step, total   where the run is, in optimizer steps (the clock's: updates behind the weights), and its length;
                  None before the first `enter`, when no phase runs yet
    steers_rate   whether someone takes the learning rate from here
    """

    def __init__(self, recipe: Recipe) -> None:
        self.step = 0
        self.total: int | None = None
        self.steers_rate = False
        self._recipe = recipe
        self._phases = {p.name: p for p in recipe.phases if p.enabled}
        self._triggered: dict[str, Start] = {}
        self._averages: dict[str, float] = {}  # of each grad_noise phase: the ratio's moving average
        self._expected: dict[str, int] = {}  # grad_noise phases whose measurement at this step is still to come
        self._measured: int | None = None  # the last step with a measurement

    def enter(self, step: int, total: int) -> None:
        """The run is at `step` of `total`.

        Raises RecipeMismatch where the gradient noise that a phase waits for was not measured at an earlier step, or
        where nobody has asked for the learning rate that an earlier step needed.
        """
        ruling = self.ruling(step, total)
        if ruling is not None and not self.steers_rate:
            raise RecipeMismatch(
                f"phase {ruling[0].phase} has a learning rate of its own, and nobody asks for it: set the optimizer's"
                " rate to its highest times AppliedRecipe.phases.rate(step, total, schedule) before every step, train"
                " with fp4dist.train (launch/pretrain.py), or remove lr from the phase"
            )
        for name, missed in self._expected.items():
            if step > missed:
                raise RecipeMismatch(
                    f"phase {name} waits for the gradient's noise, which should have been measured at step {missed}:"
                    " call AppliedRecipe.observe_noise(ratio) where AppliedRecipe.measures_noise says so, train with"
                    " fp4dist.train (launch/pretrain.py), or give the phase a step"
                )
        self.step, self.total = step, total
        self._expected = {name: step for name in self.measuring()}

    def starts(self, total: int | None = None) -> list[Start]:
        """The phases whose start is known in a run of `total` steps (default: this one), in the recipe's order."""
        total = self.total if total is None else total
        if total is None:
            return []
        found = []
        for phase in self._phases.values():
            at = phase.start(total)
            if at is not None:
                found.append(Start(phase.name, at, _when(phase)))
            elif phase.name in self._triggered:
                found.append(self._triggered[phase.name])
        return found

    def running(self) -> list[Start]:
        """The phases that run now, in the recipe's order."""
        return [start for start in self.starts() if start.step <= self.step]

    def ruling(self, step: int, total: int) -> tuple[Start, LrShape] | None:
        """The learning rate's shape at optimizer step `step` (from 1): of running phases the recipe's last one's."""
        begun = [start for start in self.starts(total) if start.step < step]
        return next(((s, shape) for s in reversed(begun) if (shape := self._phases[s.phase].lr) is not None), None)

    def rate(self, step: int, total: int, base: Callable[[int], float]) -> float:
        """The learning rate of optimizer step `step` (from 1) of `total`: of the step and the recorded starts alone.

        base      the run's own schedule, from a step to its rate
        returns   in units of the run's highest rate, as `base` does
        """
        self.steers_rate = True
        ruling = self.ruling(step, total)
        if ruling is None:
            return base(step)
        start, shape = ruling
        found = self.rate(start.step, total, base) if shape.begin == "current" else 0.0
        return shape_rate(shape, step - start.step, total - start.step, found)

    @property
    def optimizer_state(self) -> OptimizerState | None:
        """Dtypes of master weights and moments now: the last running phase's that has some, else the recipe's."""
        found = [state for s in self.running() if (state := self._phases[s.phase].optimizer_state) is not None]
        return found[-1] if found else self._recipe.optimizer_state

    # -- triggers

    def measuring(self) -> list[str]:
        """The phases for which the gradient's noise is still to be measured at this step."""
        names = []
        for name, trigger in self._waiting(GradNoise):
            since = self.step - trigger.after
            if since >= 0 and since % trigger.every == 0 and self._measured != self.step:
                names.append(name)
        return names

    def measured(self, ratio: float) -> list[Start]:
        """Take the measurement of now, |g| / |g_q - g|; returns the phases that start by it.

        A ratio that is not finite (a step without noise or with an overflow) is left out of the averages.
        """
        found, self._measured = [], self.step
        for name in [name for name, step in self._expected.items() if step == self.step]:
            del self._expected[name]
            if not math.isfinite(ratio):
                continue
            trigger = self._phases[name].trigger
            assert isinstance(trigger, GradNoise)
            m, before = trigger.momentum, self._averages.get(name, ratio)
            average = self._averages[name] = m * before + (1 - m) * ratio
            if average < trigger.below:
                reason = f"gradient {average:.3f} times its quantization noise, under {trigger.below:.6g}"
                found.append(self.trigger(name, reason))
        return found

    def manual(self) -> list[str]:
        """The phases that wait to be asked for."""
        return [name for name, _ in self._waiting(Manual)]

    def trigger(self, name: str, reason: str = "asked for") -> Start:
        """Start phase `name` now. Raises ConfigError for one that does not wait for it."""
        check_waits(self._recipe, name)
        if name in self._triggered:
            raise ConfigError(f"phase {name}: it runs since step {self._triggered[name].step}")
        self._triggered[name] = Start(name, self.step, reason)
        self._expected.pop(name, None)
        return self._triggered[name]

    def _waiting(self, kind: Any) -> list[tuple[str, Any]]:
        """(name, trigger) of the phases that wait for a trigger of `kind`."""
        phases = [p for p in self._phases.values() if p.name not in self._triggered]
        return [(p.name, p.trigger) for p in phases if isinstance(p.trigger, kind)]

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Starts by trigger and moving averages, as plain data, equal on all ranks."""
        return {
            "triggered": {start.phase: [start.step, start.reason] for start in self._triggered.values()},
            "averages": dict(self._averages),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Read what `state_dict` gave; phases that this recipe does not have are left out, with a line in the log."""
        triggers = {p.name for p in self._phases.values() if p.trigger is not None}
        for name in sorted({*state["triggered"], *state["averages"]} - triggers):
            log.info("phase %s of the checkpoint is left out: recipe %s has no such trigger", name, self._recipe.name)
        self._triggered = {
            name: Start(name, int(step), str(reason))
            for name, (step, reason) in state["triggered"].items()
            if name in triggers
        }
        self._averages = {name: float(x) for name, x in state["averages"].items() if name in triggers}
        self._expected, self._measured = {}, None


def check_waits(recipe: Recipe, name: str, *, by_hand: bool = False) -> None:
    """Raise ConfigError unless `name` is an enabled phase with a trigger.

    by_hand   the trigger must be `manual`
    """
    phase = next((p for p in recipe.phases if p.name == name), None)
    trigger = phase.trigger if phase is not None and phase.enabled else None
    if isinstance(trigger, Manual) or (trigger is not None and not by_hand):
        return
    listed = "; ".join(f"{p.name} ({_when(p) if p.enabled else 'enabled: false'})" for p in recipe.phases)
    if phase is None:
        raise ConfigError(f"phase {name!r}: recipe {recipe.name} has {listed or 'no phases'}")
    way_out = "set enabled: true" if not phase.enabled else "only phases with trigger: manual wait to be asked for"
    raise ConfigError(f"phase {name!r} cannot be started; recipe {recipe.name} has {listed}; {way_out}")


def describe(recipe: Recipe, turned: Mapping[str, Sequence[str]]) -> list[str]:
    """A line for each enabled phase: how it starts, what it changes.

    turned   phase -> what becomes of linears when it alone runs, e.g. "fp4 -> bf16 (12 linears)"
    """
    lines = []
    for phase in (p for p in recipe.phases if p.enabled):
        changes = [*turned[phase.name], *(["the learning rate"] if phase.lr else [])]
        changes += ["the optimizer's state"] if phase.optimizer_state else []
        lines.append(f"  phase {phase.name} ({_when(phase)}): {', '.join(changes) or 'changes nothing here'}")
    return lines


def _when(phase: Phase) -> str:
    """How a phase starts, in words."""
    if phase.step is not None:
        return f"step {phase.step}"
    if phase.last is not None:
        return f"the last {phase.last:.6g} of the run"
    return "by hand" if isinstance(phase.trigger, Manual) else "when the gradient's noise is high"


def shape_rate(shape: LrShape, step: int, length: int, found: float) -> float:
    """The rate, in units of the run's highest, of step `step` (from 1) of a phase of `length` steps; at last `end`.

    found   where a warm-up from the current rate begins, at step 0
    """
    warmup = round(shape.warmup * length) if shape.warmup < 1 else int(shape.warmup)
    if step < warmup:
        return found + (shape.peak - found) * step / warmup
    if shape.decay == "constant" or step == warmup:
        return shape.peak
    t = min((step - warmup) / (length - warmup), 1.0)
    left = 1 - t if shape.decay == "linear" else 0.5 * (math.cos(math.pi * t) + 1)
    return shape.end + (shape.peak - shape.end) * left


def names(starts: Sequence[Start]) -> frozenset[str]:
    """The phases' names."""
    return frozenset(start.phase for start in starts)
