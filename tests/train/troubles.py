"""Troubles put into a run: bad batches, a spike of the learning rate, a layer with outliers, NaN on one rank."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from fp4dist.nn.comm import NoComm
from fp4dist.train import data, engine_megatron, loop
from fp4dist.train.data import Batch
from tests.train.tiny_run import VOCAB


@contextmanager
def bad_batches(steps: range) -> Generator[None]:
    """The samples of these steps are noise: labels that no text has. It is the samples, wherever they are read."""

    def iterator(*args: Any, consumed_samples: int = 0, shift: int = 0, **named: Any) -> Generator[Batch]:
        config = args[1]
        size = config.train.global_batch_size
        place = consumed_samples + shift
        draw = torch.Generator().manual_seed(0)
        for batch in original(*args, consumed_samples=consumed_samples, shift=shift, **named):
            if place // size + 1 in steps:
                labels = torch.randint(VOCAB // 2, batch.labels.shape, generator=draw)
                batch = replace(batch, labels=labels, tokens=labels.flip(1))
            place += config.train.micro_batch_size * named.get("dp_size", 1)
            yield batch

    original = data.train_iterator
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "train_iterator", iterator)
        yield


@contextmanager
def rate_spike(step: int, factor: float) -> Generator[None]:
    """At its first coming, optimizer step `step` has `factor` times its learning rate."""
    pending = [step]

    def place(schedule: Any, at: int) -> float:
        rate = original(schedule, at)
        if at in pending:
            pending.remove(at)
            for group in schedule.optimizer.param_groups:
                group["lr"] *= factor
        return rate

    original = engine_megatron.optim.place_schedule
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_megatron.optim, "place_schedule", place)
        yield


@contextmanager
def outliers(path: str, since: int, factor: float = 1e7) -> Generator[None]:
    """From a step on, the tensor scale of one linear's inputs is that of an outlier in a part that is not here."""

    class Outlier(NoComm):
        def reduce_max(self, slot: str, token_shard: bool = False) -> Any:
            inner, clock = super().reduce_max(slot, token_shard), found["clock"]
            if slot != "fprop.x" or clock.step < since:
                return inner
            return lambda amax: (inner(amax) if inner is not None else amax) * factor

    found: dict[str, Any] = {}

    def build(*args: Any) -> Any:
        engine, applied = original(*args)
        found["clock"] = applied.clock
        for target in applied.targets:
            if target.site.path == path:
                found["comm"] = target.module.comm
                cast(Any, target.module).comm = Outlier()
        assert "comm" in found, [t.site.path for t in applied.targets]
        return engine, applied

    original = loop.build_engine
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build_engine", build)
        yield


@contextmanager
def nan_weights(step: int, rank: int) -> Generator[None]:
    """Before optimizer step `step`, at its first coming, a weight of one rank alone becomes NaN."""
    pending = [step]

    def train_step(self: Any, at: int, batches: Iterator[Batch]) -> Any:
        if at in pending:
            pending.remove(at)
            if dist.get_rank() == rank:
                with torch.no_grad():
                    next(p for p in self._chunks[0].parameters() if p.dim() == 2)[0, 0] = float("nan")
        return original(self, at, batches)

    original = engine_megatron.MegatronEngine.train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_megatron.MegatronEngine, "train_step", train_step)
        yield
