"""Recompute on = off, bit for bit, while the clock moves on between forward and replay as 1F1B makes it."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fp4dist.nn.apply import AppliedRecipe, apply_recipe
from fp4dist.numerics import BlockScaledTensor
from fp4dist.spec.load import load_recipe
from fp4dist.spec.recipe import BLOCK_ROLES, GEMMS, Dgrad, Fprop, LinearRecipe, Recipe, Rule, Wgrad
from tests.distributed import megatron_groups, run_ranks
from tests.generators import spec
from tests.megatron.tiny import tiny_batch, tiny_run

SIZES: dict[str, Any] = dict(
    hidden_size=128, ffn_hidden_size=128
)  # with 4 samples of 32: a rotation of 128 divides all
SR = spec("nvfp4_sr")
FORWARD_NOISE = Recipe(
    name="noise",
    linears={"fp4": LinearRecipe(fprop=Fprop(x=SR, w=SR), dgrad=Dgrad(dy=SR, w=SR), wgrad=Wgrad(dy=SR, x=SR))},
    rules=(Rule(roles=BLOCK_ROLES, linear="fp4"),),  # type: ignore[arg-type]
)
RECIPES = {"quartet2": load_recipe("quartet2"), "forward noise": FORWARD_NOISE}
GRANULARITIES: dict[str, dict[str, Any]] = {
    "none": {},
    "full": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
    "mlp": dict(recompute_granularity="selective", recompute_modules=["mlp"]),
}
Codes = dict[tuple[str, str, int], list[tuple[Tensor, ...]]]


class Run(NamedTuple):
    outputs: list[Tensor]
    gradients: dict[str, Tensor]
    codes: Codes  # (path, gemm, micro-batch) -> codes of each time that this GEMM ran
    calls: dict[str, int]


def record(applied: AppliedRecipe) -> Codes:
    """What every GEMM multiplies from now on, by the time that the clock shows."""
    seen: Codes = {}
    for target in applied.targets:
        plan: Any = target.module.plan
        for gemm in [g for g in GEMMS if g in plan.kernels]:

            def run(
                *operands: Any, _plan: Any = plan, _gemm: str = gemm, _kernel: Any = plan.kernels[gemm], **named: Any
            ) -> Tensor:
                codes = tuple(q.codes.clone() for q in operands if isinstance(q, BlockScaledTensor))
                seen.setdefault((_plan.path, _gemm, _plan.clock.micro_batch), []).append(codes)
                return _kernel(*operands, **named)

            plan.kernels[gemm] = run
    return seen


def step(recipe: Recipe, settings: dict[str, Any]) -> Run:
    """Two micro-batches in 1F1B's order for the first of two stages: F0 F1 B0 B1."""
    from fp4dist.megatron.provider import build_gpt, transformer_config

    run = tiny_run(**SIZES)
    megatron: Any = transformer_config(run, torch.float32)
    for name, value in settings.items():
        setattr(megatron, name, value)
    model = build_gpt(run, torch.float32, megatron=megatron)
    applied = apply_recipe(model, recipe, seed=3)
    applied.set_step(5, 10)
    codes = record(applied)
    outputs = []
    for micro_batch in range(2):
        applied.clock.micro_batch = micro_batch
        tokens, positions, labels = tiny_batch(micro_batch, size=4)
        outputs.append(model(tokens, positions, None, labels=labels))
    for loss in outputs:
        loss.mean().backward()
    assert applied.clock.micro_batch == 1
    applied.check_counts()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Run([y.detach() for y in outputs], gradients, codes, applied.counts()["calls"])


def everything() -> dict[str, Any]:
    """Outcomes by recipe and granularity, before and after the clock is kept."""
    found: dict[str, Any] = {}
    with megatron_groups():
        from fp4dist.megatron.recompute import keep_clock_on_replay

        found["lost"] = {name: step(recipe, GRANULARITIES["full"]).gradients for name, recipe in RECIPES.items()}
        found["rebound"] = [keep_clock_on_replay(), keep_clock_on_replay()]
        for name, recipe in RECIPES.items():
            for granularity, settings in GRANULARITIES.items():
                found[f"{name} {granularity}"] = step(recipe, settings)
    return found


@pytest.mark.distributed
def test_a_replay_draws_the_noise_of_its_first_run() -> None:
    found = run_ranks(everything, 1)[0]
    assert len(found["rebound"][0]) == 3
    assert found["rebound"][1] == ()
    for name in RECIPES:
        plain: Run = found[f"{name} none"]
        assert all(len(times) == 1 for times in plain.codes.values())
        for granularity in ("full", "mlp"):
            again: Run = found[f"{name} {granularity}"]
            assert_same(plain, again, f"{name} {granularity}")
            replayed = {path for (path, gemm, _), times in again.codes.items() if gemm == "fprop" and len(times) == 2}
            assert any("mlp" in path for path in replayed)
            assert any("attention" in path for path in replayed) == (granularity == "full")
        lost = found["lost"][name]  # what Megatron's own checkpoint gives: the test can see the fault
        assert any(not torch.equal(gradient, lost[p]) for p, gradient in plain.gradients.items())


def assert_same(plain: Run, again: Run, name: str) -> None:
    for i, y in enumerate(plain.outputs):
        assert torch.equal(y, again.outputs[i]), f"{name}: output {i}"
    assert plain.codes.keys() == again.codes.keys(), name
    for at, times in again.codes.items():
        for codes in times:
            assert all(torch.equal(a, b) for a, b in zip(codes, plain.codes[at][0], strict=True)), f"{name}: {at}"
    for parameter, gradient in plain.gradients.items():
        assert torch.equal(gradient, again.gradients[parameter]), f"{name}: gradient of {parameter}"
    assert plain.calls == again.calls, name  # the first run, without gradients, is not counted
