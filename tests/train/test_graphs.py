"""Recorded micro-batches: the bits of eager ones, noise of their own, recorded anew when what they stand on changes.

On a CPU something else takes the place of a CUDA graph: what happens on the host happens once, when it is recorded, and
a replay runs the same arithmetic with the host's numbers of that time, so that only device memory can tell it the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fp4dist.errors import ConfigError
from fp4dist.nn.apply import AppliedRecipe
from fp4dist.nn.clock import Clock
from fp4dist.nn.operands import OperandWatch
from fp4dist.train import data
from fp4dist.train.engine_megatron import MegatronEngine
from fp4dist.train.graphs import GraphedSchedule, Recording, Work, wanted, why_not
from fp4dist.train.world import World, open_world
from tests.distributed import run_ranks
from tests.train.test_engines import build
from tests.train.tiny_run import tiny_run, with_overrides, write_counting_tokens

STEPS = 4
RUN = ("train.global_batch_size=6",)  # three micro-batches
RECIPES = {"signs": "recipe=quartet", "rounding": "recipe=nvidia_nvfp4"}  # fresh signs; stochastic rounding
PHASE = "recipe.phases=[{name: late, step: 2, use: {fp4: bf16}}]"


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(write_counting_tokens(tmp_path))


class Replayed:
    """Stands for a CUDA graph: repeats `work` with the host's time of its recording."""

    def __init__(self, work: Work, engine: Any, applied: AppliedRecipe, *, tells_time: bool) -> None:
        self.work, self.engine, self.applied, self.tells_time = work, engine, applied, tells_time
        clock = applied.clock
        self.then, self.moment = (clock.step, clock.micro_batch), clock.moment
        with self.nothing_on_the_device():
            self.sums = work()

    @contextmanager
    def nothing_on_the_device(self) -> Iterator[None]:
        """What the work adds to gradients is taken back."""
        buffers = [b.grad_data for chunk in self.engine._chunks for b in chunk.buffers]
        before = [b.clone() for b in buffers]
        yield
        for buffer, old in zip(buffers, before, strict=True):
            buffer.copy_(old)

    def replay(self) -> None:
        clock, plans = self.applied.clock, [t.module.plan for t in self.applied.targets if t.module.plan is not None]
        tallies = [(plan, plan.tally.calls.copy(), plan.tally.flops.copy()) for plan in plans]
        now = clock.step, clock.micro_batch
        clock.step, clock.micro_batch = self.then
        clock.moment = self.moment if self.tells_time else None
        self.sums.copy_(self.work())
        (clock.step, clock.micro_batch), clock.moment = now, None
        for plan, calls, flops in tallies:
            plan.tally.calls, plan.tally.flops = calls, flops


def train(folder: str, name: str, overrides: tuple[str, ...], kind: str) -> dict[str, Any]:
    """Losses and what was recorded. kind: eager; replayed; blind (replayed without the time); watched (replayed, and
    the monitor looks before each step); waits (on a GPU).
    """
    config = tiny_run(Path(folder), *RUN, *overrides, name=name)
    with open_world(config) as world:
        engine, applied, batches = build(config, world)
        assert isinstance(engine, MegatronEngine)
        recorded = []

        def record(work: Work, before: Recording | None) -> tuple[Recording, Tensor]:
            assert (before is None) == (len(recorded) % 2 == 0)
            recorded.append(Replayed(work, engine, applied, tells_time=kind != "blind"))
            return recorded[-1], recorded[-1].sums

        if kind == "waits":  # for the device, which no recording can
            pass_on = engine._schedule.one
            engine._schedule.one = lambda batch, number: pass_on(batch, number) * torch.ones(1).cuda().item()
        elif kind != "eager":
            engine._graphs = GraphedSchedule(engine._schedule, applied, world, record)
        found = []
        for step in range(1, STEPS + 1):
            applied.set_step(step - 1, 10)
            if kind == "watched":
                watch = OperandWatch(applied, 64, counts=True)
                coming = data.train_iterator(data.build_datasets(config, 1), config, dp_rank=0, dp_size=1)
                assert engine.observe(coming, watch.watching, True) is not None
                assert watch.read()
            result = engine.train_step(step, batches)
            applied.settle(result.lr)
            applied.check_counts()
            found.append((result.loss, result.grad_norm))
        graphs = engine._graphs
        outcome = {
            "losses": found, "recorded": len(recorded), "replays": graphs.replays if graphs is not None else 0,
            "counts": applied.counts(), "failure": graphs.failure if graphs is not None else None,
        }  # fmt: skip
        engine.close()
    return outcome


def train_with(folder: str) -> dict[str, Any]:
    found = {}
    for name, recipe in RECIPES.items():
        for kind in ("eager", "replayed", "blind"):
            found[name, kind] = train(folder, f"{name}_{kind}", (recipe,), kind)
    found["signs", "watched"] = train(folder, "signs_watched", (RECIPES["signs"],), "watched")
    for kind in ("eager", "replayed"):
        found["phase", kind] = train(folder, f"phase_{kind}", (RECIPES["signs"], PHASE), kind)
    return found


@pytest.mark.distributed
def test_recorded_micro_batches_have_the_bits_of_eager_ones(folder: str) -> None:
    (found,) = run_ranks(train_with, 1, folder, timeout=300)
    for name in RECIPES:
        eager, replayed = found[name, "eager"], found[name, "replayed"]
        assert replayed["losses"] == eager["losses"]
        assert replayed["counts"] == eager["counts"]
        assert (replayed["recorded"], replayed["replays"]) == (2, 3 * (STEPS - 1)), "the first step runs eagerly"
        assert found[name, "blind"]["losses"] != eager["losses"], "noise that repeats must show"
    watched = found["signs", "watched"]
    assert (watched["losses"], watched["counts"]) == tuple(found["signs", "eager"][key] for key in ("losses", "counts"))
    assert (watched["recorded"], watched["replays"]) == (2, 3 * (STEPS - 1)), "a look ends no recording"
    eager, replayed = found["phase", "eager"], found["phase", "replayed"]
    assert replayed["losses"] == eager["losses"] != found["signs", "eager"]["losses"]
    assert replayed["counts"] == eager["counts"]
    assert (replayed["recorded"], replayed["replays"]) == (4, 3 * 2), "steps 1 and 3 run eagerly, 2 and 4 are recorded"


def train_on_a_gpu(folder: str) -> dict[str, Any]:
    found = {}
    for name, recipe in (RECIPES | {"bf16": "recipe=bf16"}).items():
        for graph in ("false", "true"):
            overrides = (recipe, "train.dtype=bf16", "train.deterministic=true", f"train.cuda_graph={graph}")
            found[name, graph] = train(folder, f"{name}_{graph}", overrides, "eager")
    waits = (RECIPES["rounding"], "train.dtype=bf16", "train.deterministic=true")
    return found | {"waits": train(folder, "waits", waits, "waits")}


@pytest.mark.gpu
@pytest.mark.distributed
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_graphs_have_the_bits_of_eager_steps(folder: str) -> None:
    (found,) = run_ranks(train_on_a_gpu, 1, folder, timeout=300)
    for name in (*RECIPES, "bf16"):
        eager, replayed = found[name, "false"], found[name, "true"]
        assert replayed["losses"] == eager["losses"]
        assert replayed["counts"] == eager["counts"]
        assert (eager["replays"], replayed["replays"]) == (0, 3 * (STEPS - 1))
    assert found["waits"]["losses"] == found["rounding", "false"]["losses"], "what failed leaves no trace"
    assert (found["waits"]["failure"] is not None, found["waits"]["replays"]) == (True, 0)


GPU = World(rank=0, size=1, dp_rank=0, dp_size=1, device=torch.device("cuda"))
REFUSED = {
    "there is no GPU": (replace(GPU, device=torch.device("cpu")), ()),
    "parallelism communicate": (replace(GPU, size=2), ()),
    "fp4_param_gather": (GPU, ("engine.fp4_param_gather=true", "recipe=nvidia_nvfp4")),
    "recompute": (GPU, ("train.recompute=full",)),
    "engine.kind": (GPU, ("engine.kind=deepspeed",)),
    "ema rounding": (GPU, ("recipe=tetrajet_qema",)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_recorded_is_refused_with_the_reason(reason: str, folder: str) -> None:
    world, overrides = REFUSED[reason]
    config = tiny_run(Path(folder), *overrides)
    applied = AppliedRecipe(config.recipe, Clock(), (), (), (), config.backend)
    assert reason in (why_not(config, world, applied) or "")
    assert not wanted(config, world, applied)[0]
    with pytest.raises(ConfigError, match=reason):
        wanted(with_overrides(config, "train", cuda_graph=True), world, applied)
    assert wanted(with_overrides(config, "train", cuda_graph=False), world, applied)[0] is False


def test_auto_is_one_gpu_alone(folder: str) -> None:
    config = tiny_run(Path(folder))
    applied = AppliedRecipe(config.recipe, Clock(), (), (), (), config.backend)
    several = replace(GPU, size=2, dp_size=2)
    assert wanted(config, GPU, applied)[0]
    assert not wanted(config, several, applied)[0]
    assert wanted(with_overrides(config, "train", cuda_graph=True), several, applied)[0]


class Schedule:
    """Stands for a PipelineSchedule whose loss sum counts micro-batches, and its token count their tokens."""

    def one(self, batch: data.Batch, number: int) -> Tensor:
        return torch.tensor([float(number), batch.tokens.numel()], dtype=torch.float64)

    def run(self, batches: Iterator[data.Batch], first: int, number: int, *, forward_only: bool) -> Tensor:
        return sum((self.one(batch, number) for batch in batches), torch.zeros(2, dtype=torch.float64))

    enter = finish = staticmethod(lambda *_: None)


def graphed(folder: str, record: Any, **named: Any) -> GraphedSchedule:
    config = tiny_run(Path(folder))
    applied = AppliedRecipe(config.recipe, Clock(), (), (), (), config.backend)
    return GraphedSchedule(Schedule(), applied, replace(GPU, device=torch.device("cpu")), record, **named)  # type: ignore[arg-type]


def step(graphs: GraphedSchedule, tokens: int) -> list[float]:
    """Three micro-batches of two samples."""
    numbers = torch.zeros(2, tokens, dtype=torch.int64)
    return graphs.run(iter([data.Batch(numbers, numbers, numbers.float(), numbers)] * 3), 3).tolist()


def test_work_that_cannot_be_recorded_runs_without(folder: str) -> None:
    def refuse(work: Work, before: Recording | None) -> tuple[Recording, Tensor]:
        raise RuntimeError("operation not permitted\nand more")

    graphs = graphed(folder, refuse)
    for _ in range(3):
        assert step(graphs, 4) == [9.0, 24.0]
    assert graphs.failure == "operation not permitted"
    strict = graphed(folder, refuse, strict=True)
    step(strict, 4)
    with pytest.raises(ConfigError, match="operation not permitted"):
        step(strict, 4)


def test_all_ranks_go_on_without_where_one_cannot_record(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a rank whose recording failed would end, or run eagerly, while the others wait for its collectives."""
    asked: list[bool] = []
    monkeypatch.setattr(World, "any", lambda _, failed: asked.append(failed) or True)
    graphs = graphed(folder, lambda work, before: (None, work()))
    for _ in range(3):
        assert step(graphs, 4) == [9.0, 24.0]
    assert graphs.failure == "it could not be recorded on another rank"
    assert asked == [False]


def test_what_keeps_changing_is_recorded_less_often(folder: str) -> None:
    """Batches of another size are a change; a recording that it ends makes the next one wait a step longer."""
    recorded: list[int] = []
    steps: list[int] = []  # since the last change

    class Again:
        def replay(self) -> None:
            pass

    def record(work: Work, before: Recording | None) -> tuple[Recording, Tensor]:
        recorded.append(len(steps) - 1)
        return Again(), work()

    graphs, waits = graphed(folder, record), []
    for change, tokens in enumerate((4, 8, 4, 8, 4)):
        steps.clear()
        for i in range(10):
            steps.append(i)
            assert step(graphs, tokens) == [9.0, 6.0 * tokens]
        waits.append(recorded[-1])
        assert len(recorded) == 2 * (change + 1), "the first micro-batch of a step, and the others"
    assert waits == [1, 1, 2, 3, 4]
