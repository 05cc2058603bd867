"""The monitor: what FP4 does to every linear of a run, every `monitor.every` steps, in monitor.jsonl and TensorBoard.

A look runs the first micro-batch of the coming step, data-parallel rank 0's, aside (weights, moments, counters and
random states stay as they are), so that it costs a few micro-batches and changes no bit of the run. A line of the file:

    {"step": updates behind the weights, "seconds": of the look, "noise": |g| / |g_q - g|, "fallbacks": [...],
     "linears": {path: {"zero_gradients": share, "oscillation": share,
                        slot: {"underflow", "saturation", "qsnr", "amax", "drift"}}}}

drift is log2 of the amax over that of the look before. oscillation: share of the weight's codes (first rows) that
changed with one step and changed back with the next, over the two steps after the look; its line comes then.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fp4dist.nn.apply import AppliedRecipe
from fp4dist.nn.operands import OperandWatch, oscillation, weight_codes
from fp4dist.spec.watching import MonitorConfig
from fp4dist.train.metrics import read_lines
from fp4dist.train.world import World

Watching = Callable[[], AbstractContextManager[None]]
Observe = Callable[[Watching], float | None]  # runs a micro-batch aside; the noise ratio where the engine measures it


@dataclass(slots=True)
class Look:
    """What one look has found; `linears` as in the file. The same on every rank."""

    step: int
    seconds: float
    noise: float | None
    fallbacks: list[str]
    linears: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data; numbers that are not finite as null."""
        return _finite(asdict(self))

    def slots(self) -> Iterator[tuple[str, str, dict[str, float]]]:
        """(path, slot, its numbers)."""
        for path, found in self.linears.items():
            for slot, numbers in found.items():
                if isinstance(numbers, dict):
                    yield path, slot, numbers


class Monitor:
    """Looks at a run. Every rank calls every method at the same step; rank 0 writes.

    file, tensorboard   where lines and scalars go;  resume_at   lines of later steps are dropped first
    """

    def __init__(
        self, config: MonitorConfig, world: World, applied: AppliedRecipe, file: Path, tensorboard: Path | None,
        resume_at: int,
    ) -> None:  # fmt: skip
        self.config, self._world, self._applied = config, world, applied
        self._pending: Look | None = None
        self._codes: list[dict[str, Tensor]] = []
        kept = [line for line in read_lines(file) if line["step"] <= resume_at]
        self._amax = {(p, s): n["amax"] for p, s, n in _slots(kept[-1])} if kept else {}
        self._file, self._writer = file, None
        if world.is_first:
            tmp = file.with_suffix(".tmp")
            tmp.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            os.replace(tmp, file)
        if world.is_first and tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(tensorboard), purge_step=max(resume_at + 1, 0))

    def due(self, updates: int) -> bool:
        """Whether a look begins before the step that follows `updates`."""
        return updates % self.config.every == 0

    def before_step(self, updates: int, observe: Observe) -> Look | None:
        """Look, if it is time, and return what was seen; its line is written two steps later, with oscillation."""
        self._follow(updates)
        if not self.due(updates):
            return None
        self._pending = self.look(updates, observe)
        self._codes = [weight_codes(self._applied, self.config.rows)]
        return self._pending

    def look(self, updates: int, observe: Observe) -> Look:
        """Look now; oscillation is left out. Not written."""
        begin = time.perf_counter()
        watch = OperandWatch(self._applied, self.config.rows, counts=self._world.dp_rank == 0)  # as the noise ratio
        noise = observe(watch.watching)
        operands, zeros = watch.read(), watch.zero_gradients()
        linears: dict[str, dict[str, Any]] = {path: {"zero_gradients": share} for path, share in zeros.items()}
        for (path, slot), found in operands.items():
            before = self._amax.get((path, slot))
            drift = math.log2(found.amax / before) if before and found.amax > 0 else None
            linears.setdefault(path, {})[slot] = {**asdict(found), "drift": drift}
            self._amax[path, slot] = found.amax
        return Look(updates, time.perf_counter() - begin, noise, fallbacks(self._applied), linears)

    def forget(self) -> None:
        """The run goes back: what is pending never happened."""
        self._pending, self._codes = None, []

    def close(self) -> None:
        """Write what is pending, and close."""
        if self._pending is not None:
            self._write(self._pending)
        if self._writer is not None:
            self._writer.close()

    def _follow(self, updates: int) -> None:
        """Take the weights' codes in the two steps after a look; then its line is written."""
        look = self._pending
        if look is None or updates != look.step + len(self._codes):
            return
        self._codes.append(weight_codes(self._applied, self.config.rows))
        if len(self._codes) < 3:
            return
        for path, share in self._oscillations().items():
            look.linears.setdefault(path, {})["oscillation"] = share
        self._pending, self._codes = None, []
        self._write(look)

    def _oscillations(self) -> dict[str, float]:
        """Path -> share, over all ranks."""
        packed = {
            r.site.path: spec.format.element.packed for r in self._applied.rows if (spec := r.recipe.slot("fprop.w"))
        }
        paths = sorted(packed)
        counts = torch.zeros(len(paths), 2, dtype=torch.float64, device=self._world.device)
        for i, path in enumerate(paths):
            before, between, after = (codes.get(path) for codes in self._codes)
            if before is None or between is None or after is None or not before.shape == between.shape == after.shape:
                continue
            found = oscillation(before, between, after, packed[path])
            counts[i] += torch.tensor(found, dtype=torch.float64, device=counts.device)
        if self._world.size > 1:
            dist.all_reduce(counts)
        return {path: back / n for path, (back, n) in zip(paths, counts.tolist(), strict=True) if n}

    def _write(self, look: Look) -> None:
        if not self._world.is_first:
            return
        with self._file.open("a", encoding="utf-8") as f:
            f.write(json.dumps(look.to_json()) + "\n")
        if self._writer is None:
            return
        if look.noise is not None and math.isfinite(look.noise):
            self._writer.add_scalar("monitor/noise", look.noise, look.step)
        self._writer.add_scalar("monitor/fallbacks", len(look.fallbacks), look.step)
        for path, found in look.linears.items():
            for name, value in found.items():
                numbers = {f"/{k}": v for k, v in value.items()} if isinstance(value, dict) else {"": value}
                for key, number in numbers.items():
                    if number is not None and math.isfinite(number):
                        self._writer.add_scalar(f"{path}/{name}{key}", number, look.step)


def fallbacks(applied: AppliedRecipe) -> list[str]:
    """What does not run as planned: GEMMs that have left FP8 carriers, reference kernels on a GPU."""
    found = [loss.text() for loss in applied.exactness.fallen.values()] if applied.exactness is not None else []
    on_gpu = any(target.device.type == "cuda" for target in applied.targets)
    for row in applied.rows if on_gpu else ():
        slow = sorted(name for name, backend in row.kernels.items() if backend == "reference")
        found += [f"{row.site.path}: {', '.join(slow)} on the reference"] if slow else []
    return found


def _slots(line: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, float]]]:
    for path, found in line.get("linears", {}).items():
        for slot, numbers in found.items():
            if isinstance(numbers, dict):
                yield path, slot, numbers


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
