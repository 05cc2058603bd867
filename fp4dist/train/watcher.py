"""Monitor and autopilot of one run behind one face: what the loop calls at each step, whether they are on or off."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fp4dist.nn.apply import AppliedRecipe
from fp4dist.spec.run import RunConfig
from fp4dist.spec.watching import AutopilotConfig, BadOperand, Drowned, RollBack
from fp4dist.train.autopilot import STATE, Action, Autopilot
from fp4dist.train.engine import Engine, StepResult
from fp4dist.train.folder import RunFolder
from fp4dist.train.monitor import Monitor, Observe
from fp4dist.train.report import write_report
from fp4dist.train.world import World

log = logging.getLogger("fp4dist")


class Watcher:
    """What looks at a run. Every rank calls every method at the same step."""

    def __init__(
        self, config: RunConfig, world: World, applied: AppliedRecipe, engine: Engine, folder: RunFolder
    ) -> None:
        self._config, self._world, self._applied, self._folder = config, world, applied, folder
        self._monitor: Monitor | None = None
        self._autopilot: Autopilot | None = None
        self._action: Action | None = None  # of the look before the step in progress
        if config.autopilot is not None and config.autopilot.mode != "off":
            self._autopilot = Autopilot(config.autopilot, applied, folder.autopilot if world.is_first else None)
            engine.judge = self._autopilot.judge
            blind = [rule for rule in config.autopilot.rules if isinstance(rule.when, BadOperand | Drowned)]
            if blind and config.monitor is None:
                log.warning(
                    "autopilot: %d rules ask the monitor, which is off (monitor: {} switches it on)", len(blind)
                )

    @property
    def shift(self) -> int:
        """Samples that were left out so far."""
        return self._autopilot.memory.shift if self._autopilot is not None else 0

    def open(self, resume_at: int) -> None:
        """The run folder is ours. resume_at   -1 for a fresh run"""
        if self._config.monitor is not None:
            tensorboard = self._folder.tensorboard / "monitor" if self._config.logging.tensorboard else None
            self._monitor = Monitor(
                self._config.monitor, self._world, self._applied, self._folder.monitor, tensorboard, resume_at
            )

    def before_step(self, step: int, observe: Observe) -> None:
        """Optimizer step `step` (from 1) is about to run; raises GEMMs where a look calls for it."""
        autopilot, self._action = self._autopilot, None
        if autopilot is not None:
            autopilot.begin(step)
        look = self._monitor.before_step(step - 1, observe) if self._monitor is not None else None
        if look is not None and autopilot is not None:
            self._follow(autopilot.after_look(look))

    def after_step(self, result: StepResult) -> Action | None:
        """The step is over; what the loop itself has to do."""
        if self._autopilot is None:
            return None
        action = self._autopilot.after_step(result)
        self._follow(action)
        return action if action is not None and isinstance(action.do, RollBack) else self._action

    def may_save(self, step: int, every: int) -> bool:
        """Whether it is time for a checkpoint and the weights are worth one."""
        if every <= 0 or step % every:
            return False
        if self._autopilot is not None and self._autopilot.acts and not self._autopilot.calm:
            log.warning("step %d: no checkpoint, the run is in trouble", step)
            return False
        return True

    def went_back(self, how: RollBack, to: int, step: int, folder: Path) -> None:
        """The engine holds the checkpoint `folder` of step `to` again, after `step`."""
        assert self._autopilot is not None
        self._autopilot.load(folder, rolled_back=True)
        left_out = round(how.skip * (step - to)) * self._config.train.global_batch_size
        self._autopilot.rolled_back(left_out)
        if self._monitor is not None:
            self._monitor.forget()
        log.warning("back at step %d, %d samples left out so far", to, self.shift)

    def cannot(self, action: Action, why: str) -> None:
        """The loop could not go back."""
        assert self._autopilot is not None
        self._autopilot.cannot(action, why)

    def news(self) -> list[str]:
        """What the autopilot did or advised since the last call."""
        return self._autopilot.news() if self._autopilot is not None else []

    def load(self, folder: Path) -> None:
        """Take what a checkpoint holds. Raised GEMMs and left-out samples stay where the autopilot is off now."""
        if self._autopilot is None and (folder / STATE).exists():
            self._autopilot = Autopilot(AutopilotConfig(mode="off", rules=()), self._applied, None)
            self._autopilot.load(folder)
            memory = self._autopilot.memory
            if memory.raised or memory.shift:
                log.warning(
                    "autopilot: off; from before %d linears stay raised and %d samples left out",
                    len(memory.raised), memory.shift,
                )  # fmt: skip
        elif self._autopilot is not None:
            self._autopilot.load(folder)

    def save(self, folder: Path) -> None:
        """Write it. On one rank."""
        if self._autopilot is not None:
            self._autopilot.save(folder)

    def close(self) -> None:
        """Write what is pending and the report."""
        if self._monitor is not None:
            self._monitor.close()
            if self._world.is_first and self._folder.metrics.exists():
                write_report(self._folder.path)

    def _follow(self, action: Any) -> None:
        """Raise what is to be raised; a roll-back is kept for the end of the step."""
        if action is None:
            return
        if isinstance(action.do, RollBack):
            self._action = action
            return
        assert self._autopilot is not None
        self._applied.restore_raised(self._autopilot.memory.raised)
