"""The autopilot: watches loss, gradient norm and the monitor's looks, and acts by the rules of the run file.

Where in a step rules are asked: `judge` before the update (only `spike` with `skip`), `after_look` when a look of the
monitor is complete, `after_step` when the update has been taken or skipped. What it knows is the same on every rank, so
that all decide alike; it lies in each checkpoint (autopilot.json), so that a resumed run decides as the first one did.
Every action is a line of autopilot.jsonl in the run folder: step, mode, action, cause. `advise` writes the lines alone.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fp4dist.errors import CheckpointError
from fp4dist.nn.apply import AppliedRecipe
from fp4dist.nn.raising import merged
from fp4dist.spec.build import plain
from fp4dist.spec.load import canonical_digest
from fp4dist.spec.recipe import BLOCK_ROLES
from fp4dist.spec.watching import (
    LONGEST,
    AutopilotConfig,
    BadOperand,
    Drift,
    Drowned,
    NotFinite,
    Raise,
    RollBack,
    Rule,
    Skip,
    Spike,
)
from fp4dist.train.engine import StepResult
from fp4dist.train.monitor import Look

log = logging.getLogger("fp4dist")
STATE = "autopilot.json"  # in a checkpoint
_SPREAD = 1.4826  # of the median distance, to a standard deviation of normal data


@dataclass(frozen=True, slots=True)
class Action:
    """What is to be done, after the step or look that it is told with.

    cause    for people;  before   a roll-back goes to a checkpoint of at most this step
    paths, gemms, to   of a `raise`
    """

    rule: int
    do: Skip | RollBack | Raise
    cause: str
    before: int = 0
    paths: tuple[str, ...] = ()
    gemms: tuple[str, ...] = ()

    def text(self) -> str:
        """What is done, in words."""
        if isinstance(self.do, Raise):
            what = f"{', '.join(self.paths)}" if len(self.paths) < 4 else f"{len(self.paths)} linears"
            return f"raise {'/'.join(self.gemms)} of {what} to {self.do.to}"
        return "skip the step" if isinstance(self.do, Skip) else "roll back"


@dataclass
class Memory:
    """What the autopilot knows, as plain data.

    losses      (step, loss, gradient norm or None, accepted) of finite steps, newest last
    lowest      lowest median loss so far, by window: of `drift`
    streak      steps in a row that were not finite
    troubled    first step of the present trouble; None when it is calm
    taken       digest of a rule -> (times, step of the last one)
    raised      path -> GEMM -> precision;  shift   samples left out
    worst       (path, slot) of the lowest QSNR in the newest look
    """

    losses: list[tuple[int, float, float | None, bool]] = field(default_factory=list)
    lowest: dict[str, float] = field(default_factory=dict)
    streak: int = 0
    troubled: int | None = None
    taken: dict[str, tuple[int, int]] = field(default_factory=dict)
    raised: dict[str, dict[str, str]] = field(default_factory=dict)
    shift: int = 0
    worst: tuple[str, str] | None = None


class Autopilot:
    """The rules of one run.

    file   autopilot.jsonl; None on ranks that do not write
    """

    def __init__(self, config: AutopilotConfig, applied: AppliedRecipe, file: Path | None) -> None:
        self.config, self._applied, self._file = config, applied, file
        self.memory = Memory()
        self._keys = [canonical_digest(plain(rule)) for rule in config.rules]  # a resume may have others around them
        self.told: list[str] = []  # since the last `news`
        self._step = 0
        self._refusing: tuple[int, str] | None = None  # rule and cause of the step that `judge` refused

    @property
    def acts(self) -> bool:
        """Whether actions are taken."""
        return self.config.mode == "act"

    # ---------- what is asked

    def begin(self, step: int) -> None:
        """Optimizer step `step` (from 1) begins."""
        self._step, self._refusing = step, None

    def judge(self, loss: float, norm: float | None) -> bool:
        """Whether to leave out the update of the present step, whose loss and gradient are finite."""
        for number, rule in self._rules(Skip):
            assert isinstance(rule.when, Spike)
            cause = self._spike(rule.when, loss, norm)
            if cause is not None:
                self._refusing = number, cause
                self._take(Action(number, rule.do, cause))
                return self.acts
        return False

    def after_step(self, result: StepResult) -> Action | None:
        """Take note of the step; an action for which the loop has to do something."""
        m, step = self.memory, self._step
        finite = math.isfinite(result.loss) and math.isfinite(result.grad_norm)
        m.streak = 0 if finite else m.streak + 1
        spiked = self._refusing is not None
        if finite:
            known = result.grad_norm if result.grad_norm > 0 else None
            m.losses = [*m.losses[-LONGEST:], (step, result.loss, known, not (result.skipped or spiked))]
        found = self._first((NotFinite, Drift, Spike), lambda when: self._after_step(when))
        calm = finite and not spiked and self._near_lowest()
        m.troubled = None if calm else m.troubled if m.troubled is not None else step
        return found

    def after_look(self, look: Look) -> Action | None:
        """An action for what the monitor has seen."""
        self.memory.worst = self._least(look) or self.memory.worst
        for number, rule in self._rules(Raise, RollBack):
            cause = worst = None
            if isinstance(rule.when, Drowned) and look.noise is not None and look.noise < rule.when.below:
                cause = f"the gradient is {look.noise:.3f} times its quantization noise, under {rule.when.below:.4g}"
            elif isinstance(rule.when, BadOperand):
                worst = self._worst(rule, rule.when, look)
                cause = worst and worst[2]
            if cause is None:
                continue
            action = self._made(number, rule, cause, worst[:2] if worst else self.memory.worst)
            if action is not None:
                return self._take(action)
        return None

    def news(self) -> list[str]:
        """What has been told since the last call, for the step's record."""
        told, self.told = self.told, []
        return told

    @property
    def calm(self) -> bool:
        """Whether a checkpoint of now is one to go back to."""
        return self.memory.troubled is None

    # ---------- what is kept

    def state_dict(self) -> dict[str, Any]:
        """Plain data, the same on every rank."""
        return asdict(self.memory)

    def load(self, folder: Path, *, rolled_back: bool = False) -> None:
        """Take what a checkpoint holds. rolled_back   counts, raised GEMMs and left-out samples stay as they are now"""
        file, now = folder / STATE, self.memory
        if not file.exists():
            found: dict[str, Any] = {}
        else:
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
                found["losses"] = [tuple(item) for item in found["losses"]]
                found["taken"] = {k: tuple(v) for k, v in found["taken"].items()}
                found["worst"] = tuple(found["worst"]) if found.get("worst") else None
                self.memory = Memory(**found)
            except (json.JSONDecodeError, KeyError, TypeError) as e:
                raise CheckpointError(f"{file}: not what the autopilot writes ({e}); remove it to start afresh") from e
        if not found:
            self.memory = Memory()
        if rolled_back:
            self.memory.taken, self.memory.raised, self.memory.shift = now.taken, now.raised, now.shift
        self._applied.restore_raised(self.memory.raised)

    def save(self, folder: Path) -> None:
        """Write it into a checkpoint's folder. On one rank."""
        (folder / STATE).write_text(json.dumps(self.state_dict()) + "\n", encoding="utf-8")

    def rolled_back(self, skipped: int) -> None:
        """The loop has gone back and leaves out `skipped` more samples."""
        self.memory.shift += skipped

    def cannot(self, action: Action, why: str) -> None:
        """The loop could not do what was asked."""
        self._tell(f"{action.text()}: not possible, {why}", action.cause)

    # ---------- conditions

    def _after_step(self, when: Any) -> str | None:
        m = self.memory
        if isinstance(when, NotFinite):
            return (
                f"loss or gradient was not finite for {m.streak} steps in a row" if m.streak >= when.in_a_row else None
            )
        if not m.losses or m.losses[-1][0] != self._step:
            return None
        if isinstance(when, Spike):  # of a rule that does more than skip
            _, loss, norm, _ = m.losses[-1]
            return self._spike(when, loss, norm, before=self._step)
        return self._drift(when)

    def _spike(self, when: Spike, loss: float, norm: float | None, before: int | None = None) -> str | None:
        index, value = (1, loss) if when.of == "loss" else (2, norm)
        past = [item for item in self.memory.losses if item[3] and (before is None or item[0] < before)][-when.window :]
        known = [float(item[index]) for item in past if item[index] is not None]  # type: ignore[arg-type]
        if value is None or len(known) < when.window:
            return None
        middle = statistics.median(known)
        spread = _SPREAD * statistics.median([abs(x - middle) for x in known])
        least = when.at_least if when.of == "loss" else when.at_least * middle
        if value <= middle + max(when.above * spread, least):
            return None
        name = "loss" if when.of == "loss" else "gradient norm"
        return f"{name} {value:.4g}, median of the last {len(known)} accepted steps {middle:.4g}, spread {spread:.3g}"

    def _drift(self, when: Drift) -> str | None:
        recent = [loss for _, loss, _, _ in self.memory.losses[-when.window :]]
        if len(recent) < when.window:
            return None
        median, key = statistics.median(recent), str(when.window)
        lowest = self.memory.lowest[key] = min(self.memory.lowest.get(key, median), median)
        if median <= lowest + when.at_least:
            return None
        return f"median loss of {when.window} steps {median:.4f}, {median - lowest:.4f} over its lowest"

    def _near_lowest(self) -> bool:
        """Whether the median of the last three losses is over the lowest one by at most half of what `drift` allows."""
        drifts = [rule.when for rule in self.config.rules if isinstance(rule.when, Drift)]
        last = statistics.median([loss for _, loss, _, _ in self.memory.losses[-3:]])
        return all(last <= self.memory.lowest.get(str(d.window), math.inf) + d.at_least / 2 for d in drifts)

    def _worst(self, rule: Rule, when: BadOperand, look: Look) -> tuple[str, str, str] | None:
        """(path, slot, cause) of the operand furthest beyond the bound, of those not raised already."""
        sign = -1.0 if when.of == "qsnr" else 1.0
        beyond = []
        for path, slot, numbers in look.slots():
            value = numbers.get(when.of)
            if value is None or slot not in when.slots or sign * value <= sign * when.bound:
                continue
            gemm = slot.split(".")[0]
            if isinstance(rule.do, Raise) and self._stands(path, rule.do.gemms or (gemm,), rule.do.to):
                continue
            beyond.append((sign * value, path, slot, value))
        if not beyond:
            return None
        _, path, slot, value = max(beyond)
        return path, slot, f"{when.of} {value:.4g} of {slot} in {path}, bound {when.bound:.4g}"

    def _least(self, look: Look) -> tuple[str, str] | None:
        """(path, slot) of the lowest QSNR: where a layer has to be chosen for a cause that names none."""
        found = [
            (numbers["qsnr"], path, slot) for path, slot, numbers in look.slots() if math.isfinite(numbers["qsnr"])
        ]
        return min(found)[1:] if found else None

    # ---------- actions

    def _rules(self, *kinds: type) -> list[tuple[int, Rule]]:
        """Those with such an action that may act now."""
        found = []
        for number, rule in enumerate(self.config.rules):
            times, last = self.memory.taken.get(self._keys[number], (0, -(10**9)))
            if isinstance(rule.do, kinds) and times < rule.times and self._step - last > rule.rest:
                found.append((number, rule))
        return found

    def _first(self, conditions: tuple[type, ...], cause_of: Callable[[Any], str | None]) -> Action | None:
        """The first rule, not one to skip, whose condition holds. Every condition is asked: some keep a record."""
        found: Action | None = None
        for number, rule in enumerate(self.config.rules):
            if not isinstance(rule.when, conditions) or isinstance(rule.do, Skip):
                continue
            cause = cause_of(rule.when)
            allowed = any(number == n for n, _ in self._rules(RollBack, Raise))
            if found is None and cause is not None and allowed:
                found = self._made(number, rule, cause, self.memory.worst)
        return self._take(found) if found is not None else None

    def _made(self, number: int, rule: Rule, cause: str, worst: Sequence[str] | None) -> Action | None:
        """The action of a rule; None where there is nothing left to raise."""
        if isinstance(rule.do, RollBack):
            trouble = self.memory.troubled if self.memory.troubled is not None else self._step
            return Action(number, rule.do, cause, before=max(trouble - 2, 0))
        assert isinstance(rule.do, Raise)
        if rule.do.where == "worst" and worst is None:
            return None
        gemms = rule.do.gemms or ((worst[1].split(".")[0],) if worst else ("fprop",))
        paths = (worst[0],) if worst and rule.do.where == "worst" else self._quantized()
        if all(self._stands(path, gemms, rule.do.to) for path in paths):
            return None
        return Action(number, rule.do, cause, paths=tuple(paths), gemms=tuple(gemms))

    def _take(self, action: Action) -> Action | None:
        """Count and tell it; the action where it is to be done, None in `advise`."""
        key = self._keys[action.rule]
        times, _ = self.memory.taken.get(key, (0, 0))
        self.memory.taken[key] = times + 1, self._step
        self._tell(action.text(), action.cause)
        if not self.acts:
            return None
        if isinstance(action.do, Raise):
            self.memory.raised = merged(self.memory.raised, action.paths, action.gemms, action.do.to)
        return action

    def _stands(self, path: str, gemms: Sequence[str], to: str) -> bool:
        """Whether these GEMMs are as high already."""
        kept = self.memory.raised.get(path, {})
        return all(kept.get(gemm) in (to, "bf16") for gemm in gemms)

    def _quantized(self) -> tuple[str, ...]:
        rows = [r for r in self._applied.rows if r.site.role in BLOCK_ROLES and not r.recipe.is_high_precision]
        return tuple(row.site.path for row in rows)

    def _tell(self, action: str, cause: str) -> None:
        mode = "act" if self.acts else "advise"
        self.told.append(f"{mode}: {action} ({cause})")
        log.warning("autopilot, step %d: %s%s: %s", self._step, "" if self.acts else "would ", action, cause)
        if self._file is not None:
            line = {"step": self._step, "mode": mode, "action": action, "cause": cause}
            with self._file.open("a", encoding="utf-8") as f:
                f.write(json.dumps(line) + "\n")
