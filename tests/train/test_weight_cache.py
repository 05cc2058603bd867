"""Weights are quantized once a step where they are whole on a rank, and never served after they have changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fp4dist.train.world import open_world
from tests.distributed import run_ranks
from tests.nn.carriers import carrier_backend
from tests.train.test_engines import KINDS, build
from tests.train.tiny_run import tiny_run, write_counting_tokens

MICRO_BATCHES, STEPS = 2, 3
RUN = ("recipe=nvidia_nvfp4", "train.global_batch_size=8")
CASES = {
    "overlap": KINDS["megatron"],  # weights are gathered while the next forward pass runs
    "megatron": (*KINDS["megatron"], "engine.overlap=false"),
    "codes": (*KINDS["megatron"], "engine.fp4_param_gather=true"),
    "zero1": KINDS["zero1"],
    "zero3": KINDS["zero3"],
}


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(write_counting_tokens(tmp_path))


def train(folder: str) -> dict[str, Any]:
    """Name -> (losses, the same without a cache, weights quantized a step, bytes that stay inside and after a step)."""
    found: dict[str, Any] = {}
    for name, overrides in CASES.items():
        losses: list[list[float]] = []
        for cached in (True, False):
            config = tiny_run(Path(folder), *overrides, *RUN, name=name)
            with open_world(config) as world:
                engine, applied, batches = build(config, world)
                if not cached:
                    applied.clock.cache_weights = False
                plans = [t.module.plan for t in applied.targets if t.module.plan is not None]
                calls = [0]
                plans = [plan for plan in plans if "fprop.w" in plan.kernels]
                for plan in plans:
                    plan.kernels["fprop.w"] = counting(plan.kernels["fprop.w"], calls)
                losses.append([])
                bytes_held = []
                for step in range(1, STEPS + 1):
                    applied.set_step(step - 1, 10)
                    losses[-1].append(engine.train_step(step, batches).loss)
                    inside = sum(plan.cached_bytes for plan in plans if plan.delivered is None)
                    applied.settle()
                    bytes_held.append((inside, sum(plan.cached_bytes for plan in plans if plan.delivered is None)))
                if cached:
                    found[name] = [calls[0] / STEPS / len(plans), bytes_held]
                engine.close()
        found[name] += losses
    return found


def counting(kernel: Any, calls: list[int]) -> Any:
    def run(*args: Any, **named: Any) -> Any:
        calls[0] += 1
        return kernel.fn(*args, **named)

    return replace(kernel, fn=run)


def train_with_carriers(folder: str) -> dict[str, Any]:
    with carrier_backend():
        return train(folder)


@pytest.mark.distributed
def test_engines_keep_weights_for_a_step_where_they_are_whole(folder: str) -> None:
    first, second = run_ranks(train_with_carriers, 2, folder, timeout=400)
    for name, (calls, held, with_cache, without) in first.items():
        assert with_cache == without, f"{name}: a kept weight was another one"
        assert with_cache == second[name][2]
        assert all(after == 0 for _, after in held), f"{name}: nothing stays behind a step"
        inside = {size for size, _ in held}
        if name == "zero3":
            assert calls == MICRO_BATCHES
            assert inside == {0}, "no longer than the gathered weight"
        elif name != "codes":
            assert calls == 1
            assert len(inside) == 1
            assert min(inside) > 0
