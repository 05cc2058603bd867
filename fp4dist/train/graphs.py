"""A training step's forward and backward passes as CUDA graphs: recorded once, replayed for every micro-batch.

A small model's step is bound by the host, which launches thousands of kernels; a graph launches all of them at once.
What a replay must not repeat is read from device memory: the batch, and the time of the quantization noise (`Moment`).
The first micro-batch of a step quantizes the weights and the others take what it has kept, so each has a graph. Sums
over ranks, the gradients' norm and the optimizer stay outside.

A step runs eagerly, and a later one is recorded anew, where anything has changed that the recorded passes stand on: a
phase's plans, carriers that have left FP8, the batch's size.
"""

from __future__ import annotations

import logging
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from fp4dist.errors import ConfigError
from fp4dist.kernels.triton.counters import recorded
from fp4dist.nn.apply import AppliedRecipe
from fp4dist.nn.plan import LinearPlan
from fp4dist.numerics.moment import Moment
from fp4dist.spec.run import RunConfig
from fp4dist.train.data import Batch
from fp4dist.train.schedule import PipelineSchedule
from fp4dist.train.world import World

log = logging.getLogger("fp4dist")
_PATIENCE = 16  # unchanged steps, at most, before micro-batches are recorded anew
Work = Callable[[], Tensor]


class Recording(Protocol):
    """Recorded work."""

    def replay(self) -> None:
        """Do it again, on the current stream; its result lies where it was."""
        ...


Record = Callable[[Work, "Recording | None"], tuple[Recording, Tensor]]


def why_not(config: RunConfig, world: World, applied: AppliedRecipe) -> str | None:
    """What keeps this run's micro-batches from being replayed, or None."""
    parallel, train, recipe = config.parallel, config.train, config.recipe
    plans = _plans(applied)
    backends = {kernel.backend for plan in plans for kernel in plan.kernels.values()} - {"triton", "cuda"}
    lacks = (
        (world.device.type != "cuda", "there is no GPU"),
        (config.engine.kind != "megatron", f"engine.kind = {config.engine.kind} runs backward passes by itself"),
        (world.size != world.dp_size, "tensor, pipeline and context parallelism communicate inside of a micro-batch"),
        (config.model.moe is not None or parallel.ep > 1, "experts get another number of tokens each time"),
        (config.engine.fp4_param_gather, "engine.fp4_param_gather gathers weights in the forward pass"),
        (config.comm is not None, "comm: compressed communication has not been tried with it"),
        (train.recompute != "none", "train.recompute restores random states on the host"),
        (bool(backends), f"kernels of {', '.join(sorted(backends))} may take the time of the noise from the host"),
        (recipe.averages_weights, "ema rounding takes up its averages in the middle of a run"),
        (any(plan.controls for plan in plans), "kept statistics and choices of channels are decided by the host"),
    )
    return next((reason for missing, reason in lacks if missing), None)


def wanted(config: RunConfig, world: World, applied: AppliedRecipe) -> tuple[bool, str]:
    """(whether this run records its micro-batches, why or why not). ConfigError where it must and cannot."""
    asked = config.train.cuda_graph
    if asked is False:
        return False, "train.cuda_graph is false"
    reason = why_not(config, world, applied)
    if reason is None and asked == "auto" and world.dp_size > 1:
        reason = "gradients are reduced while backward runs; train.cuda_graph: true reduces them after it"
    if reason is not None and asked is True:
        raise ConfigError(f"train.cuda_graph = true: {reason}; set it to auto or false")
    return reason is None, reason or f"train.cuda_graph is {'auto' if asked == 'auto' else 'true'}"


def record_on(stream: torch.cuda.Stream) -> Record:
    """Recording as CUDA graphs on `stream`, where the model's gradient accumulators must have been made."""

    def record(work: Work, before: Any) -> tuple[Recording, Tensor]:
        graph = torch.cuda.CUDAGraph()
        pool = None if before is None else before.pool()
        # of this thread alone: others watch over collectives, and autograd runs in one of its own
        with recorded(), torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            result = work()
        return graph, result

    return record


@dataclass(slots=True)
class _Recorded:
    """One micro-batch. counts: what it adds to the tally of each plan; held: memory that other graphs read."""

    recording: Recording
    sums: Tensor
    counts: list[tuple[LinearPlan, Counter[Any], Counter[Any]]]
    held: list[Any]

    def replay(self) -> Tensor:
        """[2] fp64 loss sum and token count."""
        self.recording.replay()
        for plan, calls, flops in self.counts:
            plan.tally.calls.update(calls)
            plan.tally.flops.update(flops)
        return self.sums


class GraphedSchedule:
    """Runs the micro-batches of training steps as recordings, and as `schedule` does where there are none.

    record   how work is recorded: `record_on(stream)`
    strict   ConfigError where recording fails (train.cuda_graph: true), instead of going on without
    """

    def __init__(
        self, schedule: PipelineSchedule, applied: AppliedRecipe, world: World, record: Record, *, strict: bool = False
    ) -> None:
        self._schedule, self._applied, self._world, self._record = schedule, applied, world, record
        self._strict = strict
        self._moment = Moment(world.device)
        self._stands_on: tuple[list[object], list[torch.Size]] = ([], [])
        self._batch: Batch | None = None
        self._recorded: list[_Recorded] = []
        self._unchanged = self._dropped = 0  # steps since a change; recordings that changes have ended
        self.failure: str | None = None
        self.replays = 0  # micro-batches so far

    def run(self, batches: Iterator[Batch], number: int) -> Tensor:
        """`PipelineSchedule.run` of a training step's `number` micro-batches."""
        given = list(islice(batches, number))
        if not self._may_replay(given):
            return self._schedule.run(iter(given), 0, number, forward_only=False)
        sums = torch.zeros(2, dtype=torch.float64, device=self._world.device)
        for index, batch in enumerate(given):
            self._load(batch)
            self._schedule.enter(index)
            sums += self._micro_batch(min(index, 1), number)
        self._schedule.finish()
        return sums

    def _may_replay(self, given: Sequence[Batch]) -> bool:
        """Whether everything is as in the step before; if not, what is recorded is forgotten."""
        if self.failure is not None:
            return False
        plans, sizes = _plans(self._applied), [batch.tokens.shape for batch in given]
        things = [*plans, *(plan.carrying for plan in plans)]
        before, sizes_before = self._stands_on
        same = sizes == sizes_before and len(things) == len(before)
        if same and all(map(operator.is_, things, before)):
            self._unchanged += 1
            return bool(self._recorded) or self._unchanged >= self._patience
        if self._recorded:
            self._dropped += 1
            log.info(
                "step %d: what micro-batches were recorded with has changed; they are again after %d steps without",
                self._applied.clock.step, self._patience,
            )  # fmt: skip
        self._unchanged = 0
        self._recorded, self._batch, self._moment = [], None, Moment(self._world.device)
        self._stands_on = things, sizes
        return False

    @property
    def _patience(self) -> int:
        """Unchanged steps before the next recording, which takes as long as some steps: more, the more went to waste,
        as where GEMMs leave FP8 one after the other at the start of a run.
        """
        return max(1, min(self._dropped, _PATIENCE))

    def _load(self, batch: Batch) -> None:
        """Put `batch` where the recordings read it."""
        if self._batch is None:
            sizes = [getattr(batch, f.name) for f in fields(Batch)]
            self._batch = Batch(*(torch.empty_like(t, device=self._world.device) for t in sizes))
        for f in fields(Batch):
            source = getattr(batch, f.name)
            on_gpu = self._world.device.type == "cuda"
            getattr(self._batch, f.name).copy_(source.pin_memory() if on_gpu else source, non_blocking=on_gpu)

    def _micro_batch(self, kind: int, number: int) -> Tensor:
        """[2] fp64 of the batch that is loaded. kind: 0 for the first of a step's `number`, 1 for others."""
        clock = self._applied.clock
        self._moment.set(clock.step, clock.micro_batch)
        if kind < len(self._recorded):
            self.replays += 1
            return self._recorded[kind].replay()
        if self.failure is None:
            found, error = None, None
            try:
                found = self._new(number)
            except RuntimeError as e:  # of torch and CUDA; nothing has run
                error = e
            # ranks record at the same micro-batch, and go on alike: else the others would wait for one that has ended
            if not self._world.any(error is not None):
                assert found is not None
                self._recorded.append(found)
                return self._micro_batch(kind, number)
            self._give_up(error or RuntimeError("it could not be recorded on another rank"))
        return self._pass(number)

    def _pass(self, number: int) -> Tensor:
        assert self._batch is not None
        return self._schedule.one(self._batch, number)

    def _new(self, number: int) -> _Recorded:
        """Record the present micro-batch."""
        clock, plans = self._applied.clock, _plans(self._applied)
        first = not self._recorded
        if first:
            for plan in plans:
                plan.forget_weights()  # they are quantized inside
        before = [(plan, plan.tally.calls.copy(), plan.tally.flops.copy()) for plan in plans]
        clock.moment = self._moment
        try:
            recording, sums = self._record(lambda: self._pass(number), None if first else self._recorded[0].recording)
        finally:
            clock.moment = None
            counts = [(plan, plan.tally.calls - calls, plan.tally.flops - flops) for plan, calls, flops in before]
            for plan, calls, flops in before:  # nothing has run yet
                plan.tally.calls, plan.tally.flops = calls, flops
        return _Recorded(recording, sums, counts, [plan.kept() for plan in plans])

    def _give_up(self, error: RuntimeError) -> None:
        """Go on without graphs, or do not."""
        reason = str(error.__context__ or error).strip().partition("\n")[0]  # CUDA reports the end of it once more
        self._forget_gradients()
        if self._strict:
            raise ConfigError(
                f"train.cuda_graph = true: this model's micro-batch cannot be recorded: {reason}"
            ) from error
        log.warning("micro-batches are not recorded as CUDA graphs, because that failed: %s", reason)
        self.failure = reason
        for plan in _plans(self._applied):
            plan.forget_weights()

    def _forget_gradients(self) -> None:
        for chunk, _ in self._applied.chunks:
            for parameter in chunk.parameters():
                parameter.grad = None


def _plans(applied: AppliedRecipe) -> list[LinearPlan]:
    return [target.module.plan for target in applied.targets if target.module.plan is not None]
