"""One training run from a RunConfig: set up, train, evaluate, save, and stop in good order.

    run(config)       train, or go on where the run folder's newest checkpoint is
    dry_run(config)   what would be trained: configuration, layer table, parameters, memory; needs no GPU and no groups

The step number is the state of everything that is not in a tensor: learning rate, order of samples and quantization
noise are functions of it. Step s (from 1) trains on samples [(s-1) * global batch, s * global batch); the noise clock
counts the updates that the weights have behind them, s - 1.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import signal
import statistics
import threading
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fp4dist import env
from fp4dist.comm.compression import closing_words
from fp4dist.errors import CheckpointError, ConfigError, TrainingDiverged
from fp4dist.megatron import fusions
from fp4dist.megatron.chunks import layer_offset
from fp4dist.megatron.provider import build_chunks
from fp4dist.megatron.sites import count_parameters, flops_per_token, gpt_sites
from fp4dist.nn.apply import AppliedRecipe, apply_recipe, plan_table
from fp4dist.nn.triage import Triage
from fp4dist.spec.build import plain
from fp4dist.spec.load import config_hash, dump
from fp4dist.spec.phases import Manual
from fp4dist.spec.run import RunConfig
from fp4dist.spec.watching import RollBack
from fp4dist.train import checkpoint, communication, data, memory
from fp4dist.train.autopilot import Action
from fp4dist.train.checkpoint import Manifest, Store
from fp4dist.train.engine import Engine, StepResult, Watching
from fp4dist.train.folder import RunFolder
from fp4dist.train.metrics import (
    ConsoleSink,
    JsonlSink,
    Record,
    Sink,
    TensorboardSink,
    WandbSink,
    peak_tflops,
    read_lines,
)
from fp4dist.train.packages import check_packages, versions
from fp4dist.train.phase import Requests
from fp4dist.train.plots import draw_curves
from fp4dist.train.watcher import Watcher
from fp4dist.train.world import World, check_sizes, open_world

log = logging.getLogger("fp4dist")
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """How a run ended.

    steps            steps behind the model;  interrupted   it stopped before train.steps
    val_losses       (step, validation loss) of this process's evaluations, in order
    tokens_per_s     median over this process's steps, all ranks together
    fp4_share        share of block-linear FLOPs that ran in FP4, by counted GEMM calls of this process's steps
    checkpoint       the newest one
    """

    run_dir: Path
    steps: int
    interrupted: bool
    loss: float | None
    val_losses: tuple[tuple[int, float], ...]
    tokens_per_s: float
    fp4_share: float
    skipped_steps: int
    checkpoint: Path | None


def run(config: RunConfig) -> RunSummary:
    """Train to the end of `config` or to an interruption (SIGTERM, train.stop_after), from where another call goes on.

    Raises Fp4DistError (ConfigError, DataError, CheckpointError, TrainingDiverged ...) on every rank alike.
    """
    check_packages(config)
    config = resolve_dtype(config)
    with _without_known_warnings(), _named_out_of_memory(config), open_world(config) as world:
        training = _Training(config, world)
        try:
            return training.run()
        finally:
            training.close()


def dry_run(config: RunConfig) -> str:
    """The resolved configuration, the layer table, parameter counts and memory of one rank, as text."""
    config = resolve_dtype(config)
    dp = check_sizes(config, env.world_size())
    model, size = config.model, _DTYPES[config.train.dtype].itemsize
    tp, cp = config.parallel.tp, config.parallel.cp
    sp = config.parallel.sequence_parallel
    table = plan_table(gpt_sites(model), config.recipe, tokens=_tokens(config), tp=tp, cp=cp, sequence_parallel=sp)
    needed = memory.estimate(config, dp, element=size)
    return "\n".join(
        [
            f"# resolved configuration, hash {config_hash(config)}",
            dump(config),
            table.table(),
            f"parameters: {count_parameters(model):,} ({model.name}); {needed.parameters:,} on the fullest of"
            f" {env.world_size()} ranks ({_layout(config, dp)})",
            f"training: {flops_per_token(model) / 1e9:.3f} GFLOP a token, {_step_tokens(config):,} tokens a step,"
            f" {_step_tokens(config) * config.train.steps / 1e9:.3f} billion tokens in {config.train.steps} steps",
            f"memory of that rank in {config.train.dtype} under engine {config.engine.kind} (the large buffers):",
            needed.table(),
        ]
    )


def resolve_dtype(config: RunConfig) -> RunConfig:
    """`config` with train.dtype decided: bf16 on a GPU, fp32 on a CPU, for `auto`."""
    if config.train.dtype != "auto":
        return config
    dtype = "bf16" if torch.cuda.is_available() else "fp32"
    log.info("train.dtype: auto is %s here", dtype)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, dtype=dtype))


def _layout(config: RunConfig, dp: int) -> str:
    """The parallel sizes for the log."""
    p = config.parallel
    sizes = [("tp", p.tp), ("pp", p.pp), *([("cp", p.cp)] if p.cp > 1 else []), ("dp", dp)]
    text = " x ".join(f"{name} {size}" for name, size in sizes)
    text += "".join(f", {name} {size}" for name, size in (("vpp", p.vpp), ("ep", p.ep)) if size > 1)
    return text + (", sequence parallel" if p.sequence_parallel else "")


def _tokens(config: RunConfig) -> int:
    """Tokens of one micro-batch on one rank."""
    return config.train.micro_batch_size * config.model.seq_length // config.parallel.cp


def _step_tokens(config: RunConfig) -> int:
    return config.train.global_batch_size * config.model.seq_length


@dataclass(frozen=True, slots=True)
class _Start:
    """Where training begins: from a checkpoint, or None for fresh weights."""

    folder: Path | None
    manifest: Manifest | None
    own: bool = False  # the run's own checkpoint: its evaluation is in metrics.jsonl already

    @property
    def step(self) -> int:
        return self.manifest.step if self.manifest is not None else 0


class _Training:
    """The state of one run in this process."""

    def __init__(self, config: RunConfig, world: World) -> None:
        self.config, self.world = config, world
        self.folder = RunFolder(Path(config.run_dir))
        self.store = Store(self.folder.checkpoints)
        self.sinks: list[Sink] = []
        self.engine: Engine | None = None
        self._signalled = False
        self._streak = self._skipped = 0  # skipped steps: in a row, in all
        self._flops = flops_per_token(config.model)
        on_gpu = world.device.type == "cuda"
        self._peak = peak_tflops(config, torch.cuda.get_device_name(world.device) if on_gpu else "")
        self._speeds: list[float] = []
        self._val_losses: list[tuple[int, float]] = []
        self._noise: float | None = None  # the gradient over its quantization noise, where the step measured it
        self._requests = Requests(self.folder.phases)
        self._noted: set[str] = set()  # manual phases whose start the run folder holds

    def run(self) -> RunSummary:
        """Everything between the process groups' birth and their end."""
        config, world = self.config, self.world
        world.from_rank0(lambda: self.folder.check(config))
        start = world.from_rank0(self._find_start)
        if start.manifest is not None:
            self._streak, self._skipped = start.manifest.nonfinite_streak, start.manifest.skipped_steps
        self.datasets = self._datasets()
        self.engine, self.applied = build_engine(config, world)
        self._watcher = Watcher(config, world, self.applied, self.engine, self.folder)
        self._load(start)
        if start.folder is not None:
            self._watcher.load(start.folder)
        world.from_rank0(lambda: self._open_folder(start))
        self._watcher.open(start.step if start.manifest is not None else -1)
        with self._watching_for_sigterm():
            done, loss = self._train(start)
        return self._finish(done, loss)

    def close(self) -> None:
        """Close files and engine, whatever happened."""
        self._close_sinks()
        if self.engine is not None:
            self._watcher.close()
        if self.engine is not None:
            self.engine.close()

    # -- setting up

    def _find_start(self) -> _Start:
        """checkpoint.load, or the run's own newest checkpoint; own ones win once they have that start behind them."""
        config = self.config
        self.store.clean()
        newest = self.store.newest()
        folder = newest
        if config.checkpoint.load is not None:
            folder = Path(config.checkpoint.load)
            own = dict(self.store.all())  # the readable ones: a damaged newest one must not keep a run from another
            if newest in own and own[newest].started_from == config.checkpoint.load:
                folder = newest
        if folder is None:
            return _Start(None, None)
        manifest = checkpoint.read_manifest(folder)
        own = folder.resolve().parent == self.store.folder.resolve() and manifest.config_hash == config_hash(config)
        checkpoint.check_fits(folder, manifest, config, dp=self.world.dp_size, own=own)
        if manifest.step > config.train.steps:
            raise CheckpointError(
                f"checkpoint {folder}: it is at step {manifest.step}, beyond train.steps = {config.train.steps};"
                " raise train.steps"
            )
        return _Start(folder, manifest, own)

    def _datasets(self) -> data.Datasets:
        data.ensure_prepared(self.config)
        self.world.from_rank0(lambda: data.check_token_files(self.config))
        return data.build_datasets(self.config, self.world.dp_size)

    def _load(self, start: _Start) -> None:
        if start.folder is None or start.manifest is None:
            return
        p, m = self.config.parallel, start.manifest
        assert self.engine is not None
        same = (m.tp, m.pp, m.ep) == (p.tp, p.pp, p.ep)
        if p.ep > 1:  # ranks have random states of their own
            same = same and (m.dp, m.cp) == (self.world.dp_size, p.cp)
        self.engine.load(start.folder / checkpoint.STATE, step=m.step, same_layout=same)
        self._load_kept(start.folder, m)
        communication.load(self.engine.compression, start.folder / checkpoint.STATE)
        self.applied.drop_caches()
        log.info("continuing from %s: step %d of %d", start.folder, m.step, self.config.train.steps)
        _tell(checkpoint.what_changes(m, self.config))

    def _load_kept(self, folder: Path, manifest: Manifest) -> None:
        """What the recipe keeps from step to step; under a changed recipe it starts afresh."""
        recipe, applied = self.config.recipe, self.applied
        if manifest.recipe_hash == checkpoint.recipe_hash(recipe):
            if recipe.keeps_state:
                applied.load_state_dict(checkpoint.read_controllers(folder, recipe.name))
            elif (folder / checkpoint.CONTROLLERS).exists():  # of GEMMs that have left FP8 carriers
                applied.load_exactness(checkpoint.read_controllers(folder, recipe.name))
            else:  # none had, when it was written
                applied.load_exactness({})
            return
        if applied.optimizer is not None:
            applied.optimizer.after_load()
        if recipe.keeps_state:
            log.info(
                "recipe %s keeps state from step to step (statistics, choices, phases, control of weights): it starts"
                " afresh, because the checkpoint is of recipe %s", recipe.name, manifest.recipe,
            )  # fmt: skip

    def _open_folder(self, start: _Start) -> None:
        """Rank 0: claim the folder, write what is known, open the sinks."""
        config, folder = self.config, self.folder
        folder.claim(config)
        layers = {**self.applied.to_json(), "fusions": fusions.choose(config).describe()}
        folder.layers.write_text(json.dumps(layers, indent=1) + "\n", encoding="utf-8")
        self._open_sinks(start.step if start.manifest is not None else -1)
        assert self.engine is not None
        log.info("run folder %s, config hash %s", folder.path, config_hash(config))
        log.info(
            "%s, %s parameters, %s, %d ranks (%s), optimizer %s",
            config.model.name, f"{count_parameters(config.model):,}", config.train.dtype, self.world.size,
            _layout(config, self.world.dp_size), self.engine.optimizer_name,
        )  # fmt: skip
        log.info("%s", self.applied.table())
        for late in self.applied.phases.starts(config.train.steps):
            if late.step >= config.train.steps:
                log.warning(
                    "phase %s starts at step %d, which the run of %d steps does not reach",
                    late.phase, late.step, config.train.steps,
                )  # fmt: skip

    def _open_sinks(self, resume_at: int) -> None:
        config, folder = self.config, self.folder
        self.sinks = [ConsoleSink(config.logging.every, config.train.steps), JsonlSink(folder.metrics, resume_at)]
        if config.logging.tensorboard:
            self.sinks.append(TensorboardSink(folder.tensorboard, resume_at))
        if config.logging.wandb:
            self.sinks.append(WandbSink(folder.path, config, plain(config)))

    def _close_sinks(self) -> None:
        for sink in self.sinks:
            sink.close()

    @contextmanager
    def _watching_for_sigterm(self) -> Iterator[None]:
        """Slurm announces preemption with SIGTERM: the step in progress is finished and saved."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(*_: Any) -> None:
            self._signalled = True

        before = signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    # -- training

    def _train(self, begin: _Start) -> tuple[int, float | None]:
        """(steps done, last loss)."""
        config, world, start = self.config, self.world, begin.step
        steps, stop_after = config.train.steps, config.train.stop_after
        if not begin.own and (before := self._evaluate(start)) is not None:
            self._emit(Record(step=start, val_loss=before))
        if start >= min(steps, stop_after or steps):
            log.info("nothing to do: step %d is behind the run already", start)
            return start, None
        batches = self._batches(start)
        loss, step = None, start
        while step < steps:
            step += 1
            result, seconds = self._step(step, batches, check=step == start + 1)
            loss = result.loss
            self._count_nonfinite(step, result)
            if self._streak == 1 and result.skipped and not (result.inexact or result.refused):
                self._explain_skip(step)
            action = self._watcher.after_step(result)
            evaluate = step == steps or (config.train.eval_every > 0 and step % config.train.eval_every == 0)
            self._emit(self._record(step, result, seconds, self._evaluate(step) if evaluate else None))
            stop = world.any(self._signalled) or (stop_after is not None and step >= stop_after)
            if action is not None and (back := self._go_back(action, step)) is not None:
                batches.close()
                step, batches = back, self._batches(back)
            elif stop or step == steps or self._watcher.may_save(step, config.checkpoint.every):
                self._save(step)
            self._stop_if_diverged(step)
            if stop:
                break
        return step, loss

    def _step(self, step: int, batches: Iterator[data.Batch], *, check: bool) -> tuple[StepResult, float]:
        """One optimizer step and its duration; the first one of a process is checked against the layer table."""
        assert self.engine is not None
        self._set_clock(step - 1)
        noise = self._follow_triggers(step - 1)
        self._watcher.before_step(step, partial(self._observe, step - 1))
        result, seconds = timed_step(self.engine, self.applied, step, batches)
        if check:
            self.applied.check_counts()
        self._noise = noise
        return result, seconds

    def _observe(self, updates: int, watching: Watching) -> float | None:
        """The monitor's look at the first micro-batch of the step to come."""
        assert self.engine is not None
        assert self.config.monitor is not None
        return self.engine.observe(self._batches(updates), watching, self.config.monitor.noise)

    def _evaluate(self, step: int) -> float | None:
        """Validation loss of the weights after `step` updates; None when train.eval_samples is 0."""
        assert self.engine is not None
        if self.datasets.valid is None:
            return None
        self._set_clock(step)
        loss = self.engine.evaluate(data.valid_batches(self.datasets, self.config, **self._place()))
        self._val_losses.append((step, loss))
        return loss

    def _batches(self, updates: int) -> Generator[data.Batch]:
        """This rank's micro-batches from the step on that follows `updates`."""
        consumed = updates * self.config.train.global_batch_size
        return data.train_iterator(
            self.datasets, self.config, consumed_samples=consumed, shift=self._watcher.shift, **self._place()
        )

    def _go_back(self, action: Action, step: int) -> int | None:
        """Do what the autopilot wants done after `step`; the step to go on from where that is an earlier one."""
        if not isinstance(action.do, RollBack):
            return None
        every = self.config.checkpoint.every  # the same checkpoint whether the run was interrupted or not
        found = self.world.from_rank0(lambda: self.store.last_good(action.before, every))
        if found is None:
            self._watcher.cannot(action, f"no good checkpoint of step {action.before} or before")
            return None
        manifest = checkpoint.read_manifest(found)
        self._load(_Start(found, manifest, own=True))
        self._watcher.went_back(action.do, manifest.step, step, found)
        self._streak = 0
        self.world.from_rank0(lambda: self._undo_lines(manifest.step))
        self._set_clock(manifest.step)
        self._save(manifest.step)  # what the autopilot knows now belongs to these weights
        return manifest.step

    def _undo_lines(self, step: int) -> None:
        """Rank 0: move the lines of later steps out of metrics.jsonl."""
        self._close_sinks()
        undone = [line for line in read_lines(self.folder.metrics) if line["step"] > step]
        with self.folder.undone.open("a", encoding="utf-8") as f:
            f.writelines(json.dumps(line) + "\n" for line in undone)
        self._open_sinks(step)

    def _place(self) -> dict[str, int]:
        """Whose samples and which pieces of them this process reads."""
        w = self.world
        return {"dp_rank": w.dp_rank, "dp_size": w.dp_size, "cp_rank": w.cp_rank, "cp_size": w.cp_size}

    def _set_clock(self, updates: int) -> None:
        _tell(self.applied.set_step(updates, self.config.train.steps))

    def _follow_triggers(self, updates: int) -> float | None:
        """Start the phases that wait for a measurement or for a person; the gradient's noise, if it was measured."""
        applied, world, ratio = self.applied, self.world, None
        if applied.phases.measuring():
            ratio = self._probe(updates) if applied.measures_noise else math.inf
            _tell(applied.observe_noise(ratio))
        waiting = applied.phases.manual()
        if waiting and world.any(world.is_first and self._requests.exist(waiting)):
            for name in world.from_rank0(lambda: self._requests.due(waiting, updates)):
                _tell(applied.start_phase(name))
        self._note_started()
        return ratio

    def _note_started(self) -> None:
        """Rank 0: leave the starts of manual phases in the run folder, for the command and for a second way here."""
        started = {s.phase: s.step for s in self.applied.phases.running()}
        for name in [p.name for p in self.config.recipe.phases if isinstance(p.trigger, Manual)]:
            if name in started and name not in self._noted:
                self._noted.add(name)
                self.world.from_rank0(lambda name=name: self._requests.write(name, started[name]))

    def _probe(self, updates: int) -> float:
        """The gradient over its quantization noise, on the first micro-batch of the step to come."""
        assert self.engine is not None
        ratio = self.engine.probe(self._batches(updates))
        log.info("step %d: the gradient is %.3f times its quantization noise", updates, ratio)
        return ratio

    def _count_nonfinite(self, step: int, result: StepResult) -> None:
        self._skipped += result.skipped
        if result.refused:
            return
        if result.inexact:
            log.warning("step %d: %d elements did not fit FP8 carriers: skipped (strict_exact)", step, result.lost)
            return
        self._streak = self._streak + 1 if result.skipped else 0
        if result.skipped:
            log.warning(
                "step %d: loss %g, gradient norm %g: skipped (%d in a row, at most %d)",
                step, result.loss, result.grad_norm, self._streak, self.config.train.max_nonfinite_steps,
            )  # fmt: skip

    def _explain_skip(self, step: int) -> None:
        """Log which module and operand was the first that was not finite: the step's micro-batches run once more."""
        assert self.engine is not None
        world = self.world
        self._set_clock(step - 1)
        found = self.engine.retrace(self._batches(step - 1))
        everyone: list[Any] = [None] * world.size
        dist.all_gather_object(everyone, found)
        for line in explain(everyone, step).splitlines():
            log.warning("%s", line)

    def _stop_if_diverged(self, step: int) -> None:
        limit = self.config.train.max_nonfinite_steps
        if self._streak < limit:
            return
        good = self.world.from_rank0(self.store.last_good)
        kept = f"the last good checkpoint is {good}" if good else "no checkpoint was written before (checkpoint.every)"
        raise TrainingDiverged(
            f"step {step}: loss or gradient was not finite for {self._streak} steps in a row"
            f" (train.max_nonfinite_steps = {limit}); {kept}. Lower optim.lr or optim.clip_grad, or look at the data"
            f" from sample {(step - self._streak) * self.config.train.global_batch_size} on; then go on from there"
            " (checkpoint.load)"
        )

    # -- writing

    def _record(self, step: int, result: StepResult, seconds: float, val_loss: float | None) -> Record:
        speed = _step_tokens(self.config) / seconds
        self._speeds.append(speed)
        tflops = self._flops * speed / self.world.size / 1e12
        started = [start for start in self.applied.phases.running() if start.step == step - 1]
        _tell(result.traffic.messages if result.traffic is not None else ())
        sent, canaries = communication.told(result.traffic)
        return Record(
            step=step,
            loss=result.loss,
            lr=result.lr,
            grad_norm=result.grad_norm,
            tokens_per_s=speed,
            tflops=tflops,
            mfu=tflops / self._peak if self._peak else None,
            val_loss=val_loss,
            seconds=seconds,
            skipped=result.skipped,
            lost=result.lost or None,
            inexact=result.inexact,
            grad_noise=self._noise,
            phase="; ".join(f"{s.phase}: {s.reason}" for s in started) or None,
            refused=result.refused,
            autopilot="; ".join(self._watcher.news()) or None,
            bytes_sent=sent,
            canary=canaries,
            fallback="; ".join(result.traffic.fallbacks) or None if result.traffic is not None else None,
        )

    def _emit(self, record: Record) -> None:
        for sink in self.sinks:
            sink.write(record)

    def _save(self, step: int) -> None:
        """Write and publish a checkpoint of the weights after `step` steps."""
        assert self.engine is not None
        world, config = self.world, self.config
        manifest = checkpoint.describe(
            config, step=step, dp=world.dp_size, streak=self._streak, skipped=self._skipped, versions=versions()
        )
        state = world.from_rank0(lambda: self.store.begin(step))
        with checkpoint.writing(self.store.folder):
            self.engine.save(state)
            communication.save(self.engine.compression, state)
        if config.recipe.keeps_state or (self.applied.exactness is not None and self.applied.exactness.moved):
            kept = self.applied.state_dict()  # on every rank, and the same there
            world.from_rank0(lambda: checkpoint.write_controllers(state, kept))
        world.from_rank0(lambda: self._watcher.save(state.parent))
        world.barrier()
        published = world.from_rank0(lambda: self.store.publish(manifest, config.checkpoint.keep))
        log.info("step %d: saved %s", step, published)
        self._draw()

    def _draw(self) -> None:
        if self.world.is_first:
            c = self.config
            draw_curves(self.folder.metrics, self.folder.curves, f"{c.run.name}: {c.model.name}, {c.recipe.name}")

    def _finish(self, done: int, loss: float | None) -> RunSummary:
        """Draw, sum up, tell."""
        self._draw()
        summary = RunSummary(
            run_dir=self.folder.path,
            steps=done,
            interrupted=done < self.config.train.steps,
            loss=loss,
            val_losses=tuple(self._val_losses),
            tokens_per_s=statistics.median(self._speeds) if self._speeds else 0.0,
            fp4_share=_counted_share(self.applied, self.world),
            skipped_steps=self._skipped,
            checkpoint=self.world.from_rank0(self.store.newest),
        )
        assert self.engine is not None
        sent = closing_words(self.engine.compression.ledger) if self.engine.compression is not None else []
        for line in [*_closing_words(summary, self.applied), *sent]:
            log.info("%s", line)
        return summary


def _tell(messages: Sequence[str]) -> None:
    for message in messages:
        log.info("%s", message)


def build_engine(config: RunConfig, world: World) -> tuple[Engine, AppliedRecipe]:
    """The model of a resolved configuration under its recipe, in its engine, ready for its first step."""
    dtype = _DTYPES[config.train.dtype]
    chunks = build_chunks(config, dtype)
    whole = config.parallel.pp == 1 and config.parallel.ep == 1
    applied = apply_recipe(
        chunks,
        config.recipe,
        seed=config.run.seed,
        backend=config.backend,
        sites=None if whole else gpt_sites(config.model),
        layer_offset=[layer_offset(chunk) for chunk in chunks],
        tokens=_tokens(config),
    )
    # Weights change only between steps. ZeRO 3 has them whole while a layer runs, and their codes must not stay longer.
    applied.clock.cache_weights = config.engine.kind == "megatron" or config.engine.zero_stage < 3
    if applied.controllers is not None:
        applied.controllers.replicas = world.dp_size * world.cp_size
    if config.engine.kind == "megatron":
        from fp4dist.train.engine_megatron import MegatronEngine

        return MegatronEngine(config, world, chunks, applied, dtype), applied
    if world.device.type == "cpu":
        env.tell_deepspeed_there_is_no_gpu()  # before the import: DeepSpeed decides then
    from fp4dist.train.engine_deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(config, world, chunks, applied, dtype), applied


def timed_step(
    engine: Engine, applied: AppliedRecipe, step: int, batches: Iterator[data.Batch]
) -> tuple[StepResult, float]:
    """Optimizer step `step` (from 1) on this rank's next micro-batches, and its seconds on the host.

    Every step waits for its own gradients, so these seconds are the device's too; but the kernels of the update may
    still run when it returns, under the reading of the next batch, and count in the next step's time.
    The noise clock must show the updates before the step (`applied.set_step(step - 1, ...)`).
    """
    begin = time.perf_counter()
    result = engine.train_step(step, batches)
    applied.settle(result.lr)
    return result, time.perf_counter() - begin


def explain(found: Sequence[Triage], step: int) -> str:
    """The first finding of all ranks in words: forward in the earliest micro-batch, on the earliest pipeline stage.

    found   of each rank. Stages follow each other in the order of ranks; backward comes from the last one
    """
    forward = [f.forward for f in found if f.forward is not None]
    backward = [f.backward for f in found if f.backward is not None]
    if forward:
        first = min(forward, key=lambda f: (f.micro_batch, f.rank))
    elif backward:
        first = min(backward, key=lambda f: (f.micro_batch, -f.rank))
    else:
        seen = "value in the model" if any(f.checked["backward"] for f in found) else "value of the forward passes"
        return (
            f"step {step} run again: every {seen} is finite; a gradient or a sum over micro-batches or ranks overflowed"
            " elsewhere, or the hardware gave another result this time"
        )
    return f"step {step} run again: {first.text()}"


def _counted_share(applied: AppliedRecipe, world: World) -> float:
    """FP4's share of the block linears' FLOPs that all ranks counted."""
    flops = applied.counts()["flops"]
    sums = torch.tensor([flops.get("fp4", 0), sum(flops.values())], dtype=torch.float64, device=world.device)
    dist.all_reduce(sums)
    return float(sums[0] / sums[1]) if sums[1] > 0 else 0.0


def _closing_words(s: RunSummary, applied: AppliedRecipe) -> list[str]:
    planned = applied.to_json()["fp4_share_of_block_linear_flops"]
    lines = [f"{'interrupted' if s.interrupted else 'done'} at step {s.steps}; run folder {s.run_dir}"]
    if s.val_losses:
        told = [f"{loss:.4f} (step {step})" for step, loss in (s.val_losses[0], *s.val_losses[1:][-1:])]
        lines.append(f"validation loss {' -> '.join(told)}")
    if s.tokens_per_s:
        lines.append(
            f"{s.tokens_per_s:,.0f} tokens/s (median); {s.fp4_share:.1%} of block-linear FLOPs ran in FP4 by counted"
            f" calls, the layer table says {planned:.1%}"
        )
    if s.skipped_steps:
        exact = ", or FP8 carriers lost elements" if applied.backend.strict_exact else ""
        lines.append(f"{s.skipped_steps} steps were skipped because loss or gradient was not finite{exact}")
    if applied.exactness is not None and applied.exactness.fallen:
        lines.append(f"{len(applied.exactness.fallen)} GEMMs lost elements in FP8 carriers and take others since")
    if s.checkpoint is not None:
        lines.append(f"newest checkpoint {s.checkpoint}")
    return lines


@contextmanager
def _without_known_warnings() -> Iterator[None]:
    """Silence what Megatron-core and DeepSpeed do by design, and what they will have to rename one day."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf", UserWarning)
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", r"Please use DTensor instead", FutureWarning)
        yield


@contextmanager
def _named_out_of_memory(config: RunConfig) -> Iterator[None]:
    """Say which buffers fill the GPU instead of which allocation happened to be the last.

    Outside of the world: other ranks may not run out, and taking down groups that they use would hang.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as e:
        dp = check_sizes(config, env.world_size())
        needed = memory.estimate(config, dp, element=_DTYPES[config.train.dtype].itemsize)
        buffers = ", ".join(f"{name} {memory.readable(size)}" for name, size in needed.largest())
        total = memory.readable(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
        raise ConfigError(
            f"train.micro_batch_size = {config.train.micro_batch_size}: out of GPU memory ({total}); estimated for this"
            f" rank: {buffers}. Ways out: a smaller train.micro_batch_size (global_batch_size may stay), parallel.tp or"
            " more data-parallel ranks, engine.kind: deepspeed with a higher engine.zero_stage."
            f" ({str(e).splitlines()[0]})"
        ) from e
