"""One run of a study, from its first step or from where a piece before it stopped, to its record.

A record is plain data (JSON): configuration hash, versions, device, curves, held-out losses, time and memory. A run
that the deadline cuts leaves its weights and moments in a file beside, and goes on there in the next piece.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp4dist.errors import CheckpointError
from fp4dist.nn.apply import AppliedRecipe, apply_recipe
from fp4dist.nn.optimizer import attach_optimizer
from fp4dist.spec.load import recipe_hash
from fp4dist.spec.run import BackendConfig
from fp4dist.study.model import Llama, initialize, schedule
from fp4dist.study.plan import Job, digest, name_of
from fp4dist.study.tokens import Stream, held_out_batches, training_batches
from fp4dist.train.packages import versions

log = logging.getLogger("fp4dist")
FORMAT = 1
_WINDOW = 10  # steps between looks at the loss: each waits for the device
_SETTLED = 2  # windows at the start of a piece that no time is taken from: kernels are compiled there
Record = dict[str, Any]


@dataclass(slots=True)
class Data:
    """The streams of a study on one device."""

    train: Stream
    valid: list[Stream]

    @property
    def identity(self) -> dict[str, Any]:
        """For configuration hashes."""
        return {"train": self.train.identity, "valid": [s.identity for s in self.valid]}


def load_data(train: Sequence[str], valid: Sequence[str], device: torch.device) -> Data:
    """Read the token files."""
    return Data(Stream(train, device), [Stream([prefix], device) for prefix in valid])


def steps_done(partial: Path) -> Path:
    """The file beside a cut run's state that says how many steps it has done."""
    return partial.with_suffix(".steps")


class Training:
    """A run in progress."""

    def __init__(self, job: Job, data: Data, device: torch.device, backend: BackendConfig | None = None) -> None:
        self.job, self.data, self.device = job, data, device
        self.config = job.config(data.identity)
        self.hash = digest(self.config)
        study, on_gpu = job.study, device.type == "cuda"
        data.train.check(job.model.vocab_size, "training files")
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        self.model = Llama(job.model, torch.bfloat16 if on_gpu else torch.float32)
        initialize(self.model, job.seed)
        self.model.to(device)
        tokens = job.size.micro_batch * study.seq_length
        self.applied: AppliedRecipe = apply_recipe(
            self.model, job.recipe, seed=job.seed, backend=backend or BackendConfig(), tokens=tokens
        )
        self.applied.clock.cache_weights = True  # weights change between steps only
        groups = self.model.parameter_groups(study.weight_decay)
        betas = (study.beta1, study.beta2)
        self.optimizer = torch.optim.AdamW(groups, lr=job.size.lr, betas=betas, fused=on_gpu)
        if job.recipe.steers_optimizer:
            attach_optimizer(self.applied, self.optimizer, job.steps)
        self.step = 0
        self.curve: list[list[float]] = []  # step, mean training loss of the window that ends there, gradient norm
        self.held_out: list[dict[str, Any]] = []
        self.windows: list[float] = []  # seconds a step, settled windows
        self.seconds = 0.0
        self.diverged = False

    def run(self, deadline: float, partial: Path | None, *, cut: bool = True) -> Record | None:
        """Train to the end; None where `deadline` (of time.monotonic) comes first.

        partial   where a cut run is kept, and found again
        cut       whether this one may be; otherwise, or without `partial`, what cannot end in time is given up early
        """
        if partial is not None and partial.exists():
            self._load(partial)
        begin = time.monotonic()
        kept = partial if cut else None
        done = self._train(deadline, may_be_cut=kept is not None)
        self.seconds += time.monotonic() - begin
        if done:
            if partial is not None:
                partial.unlink(missing_ok=True)
                steps_done(partial).unlink(missing_ok=True)
            return self.record()
        if kept is not None:
            self._save(kept)
        return None

    def _train(self, deadline: float, *, may_be_cut: bool) -> bool:
        study, job = self.job.study, self.job
        batches = training_batches(
            self.data.train, seed=job.seed, batch=study.batch, micro_batch=job.size.micro_batch,
            length=study.seq_length, start=self.step, steps=job.steps, epochs=study.epochs,
        )  # fmt: skip
        marks = {round(job.steps * i / (study.evaluations + 1)) for i in range(1, study.evaluations + 1)} - {0}
        losses: list[Tensor] = []
        norm = torch.zeros(())
        clock, counted, first = time.monotonic(), 0, self.step
        for micro_batches in batches:
            loss, norm = self._step(micro_batches)
            losses.append(loss)
            counted += 1
            self.step += 1
            if self.step - first == 1:
                self.applied.check_counts()
            if self.step % _WINDOW and self.step not in marks and self.step < job.steps:
                continue
            mean = float(torch.stack(losses).mean())  # waits for the device
            window = (time.monotonic() - clock) / counted
            self.curve.append([self.step, mean, float(norm)])
            losses, counted = [], 0
            if self.step - first > _SETTLED * _WINDOW or self.step == job.steps <= _SETTLED * _WINDOW:
                self.windows.append(window)
            if not math.isfinite(mean):
                self.diverged = True
                log.warning("%s: step %d: the loss is not finite; the run ends here", job.name, self.step)
                return True
            if self.step in marks or self.step == job.steps:
                self.held_out.append(self.evaluate(self.step))
                log.info(
                    "%s: step %d of %d: held-out loss %.4f", job.name, self.step, job.steps, self.held_out[-1]["loss"]
                )
            if self.step < job.steps and self._ends_too_late(window, deadline, may_be_cut):
                return False
            clock = time.monotonic()
        return True

    def _ends_too_late(self, window: float, deadline: float, may_be_cut: bool) -> bool:
        now, left = time.monotonic(), (self.job.steps - self.step) * window
        if may_be_cut:
            return now + _WINDOW * window > deadline
        if self.windows and now + left > deadline:
            log.info("%s: %.0f s more, and %.0f s are left: not now", self.job.name, left, deadline - now)
            return True
        return now > deadline

    def _step(self, micro_batches: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """(loss, gradient norm) of one step, on the device: nothing waits for it here."""
        study, job = self.job.study, self.job
        rate = job.size.lr * schedule(self.step, job.steps, study.warmup, study.start, study.end)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device=self.device)
        for number, (text, labels) in enumerate(micro_batches):
            for line in self.applied.set_step(self.step, job.steps, micro_batch=number):
                log.info("%s: %s", job.name, line)
            loss = self.model(text, labels) / len(micro_batches)
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), study.clip_grad or math.inf, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total, norm

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, Any]:
        """Mean loss over every whole sequence of the held-out files, quantized as in training at `step`."""
        study, job = self.job.study, self.job
        self.applied.set_step(step, job.steps)
        self.model.eval()
        files: dict[str, tuple[Tensor, int]] = {}
        with self.applied.aside():
            for prefix, stream in zip(study.valid, self.data.valid, strict=True):
                total, length = torch.zeros((), dtype=torch.float64, device=self.device), study.seq_length
                for text, labels in held_out_batches(stream, job.size.micro_batch, length):
                    total += self.model(text, labels).double() * labels.numel()
                files[Path(prefix).name] = total, stream.samples(length) * length
        self.model.train()
        tokens = sum(count for _, count in files.values())
        loss = sum(float(total) for total, _ in files.values()) / tokens
        each = {name: float(total) / count for name, (total, count) in files.items()}
        return {"step": step, "loss": loss, "files": each, "tokens": tokens}

    def record(self) -> Record:
        """What came of the run."""
        job, on_gpu = self.job, self.device.type == "cuda"
        step_seconds = statistics.median(self.windows) if self.windows else None
        tokens = job.study.batch * job.study.seq_length
        last = self.held_out[-1] if self.held_out and not self.diverged else None
        fallen = self.applied.exactness.fallen if self.applied.exactness is not None else {}
        return {
            "format": FORMAT,
            "run": job.name,
            "hash": self.hash,
            "study": job.study.name,
            "arm": name_of(job.arm),
            "recipe": job.recipe.name,
            "recipe_hash": recipe_hash(job.recipe),
            "model": job.model.name,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "block_parameters": sum(p.numel() for p in self.model.layers.parameters()),
            "budget": job.tokens,
            "tokens": self.step * tokens,
            "steps": self.step,
            "seed": job.seed,
            "diverged": self.diverged,
            "loss": last["loss"] if last else None,
            "files": last["files"] if last else None,
            "held_out": self.held_out,
            "curve": self.curve,
            "step_seconds": step_seconds,
            "tokens_per_s": tokens / step_seconds if step_seconds else None,
            "peak_bytes": torch.cuda.max_memory_allocated(self.device) if on_gpu else None,
            "seconds": self.seconds,
            "fp4_share": self.applied.to_json()["fp4_share_of_block_linear_flops"],
            "counted_share": self.applied.counts()["fp4_share"],
            "left_fp8": sorted(f"{path} {gemm}" for (path, gemm), loss in fallen.items() if loss.left_fp8),
            "device": torch.cuda.get_device_name(self.device) if on_gpu else "CPU",
            "versions": versions(),
            "config": self.config,
        }

    def _save(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "hash": self.hash,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "applied": self.applied.state_dict(),
            "curve": self.curve,
            "held_out": self.held_out,
            "windows": self.windows,
            "seconds": self.seconds,
        }
        torch.save(state, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").replace(file)
        steps_done(file).write_text(str(self.step), encoding="utf-8")
        log.info("%s: step %d of %d, kept in %s", self.job.name, self.step, self.job.steps, file)

    def _load(self, file: Path) -> None:
        state = torch.load(file, map_location=self.device, weights_only=True)
        if state["hash"] != self.hash:
            raise CheckpointError(f"{file}: of another configuration ({state['hash']}, not {self.hash}); remove it")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.applied.load_state_dict(state["applied"])
        self.step, self.curve, self.held_out = state["step"], state["curve"], state["held_out"]
        self.windows, self.seconds = state["windows"], state["seconds"]
        log.info("%s: goes on at step %d of %d", self.job.name, self.step, self.job.steps)
