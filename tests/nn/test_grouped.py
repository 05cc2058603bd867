"""Grouped experts against one `fp4_linear` call for each expert: the same bits, whatever the router sends them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fp4dist.kernels import registry
from fp4dist.kernels.registry import Kernel, grouped
from fp4dist.nn import grouped as grouped_module
from fp4dist.nn.clock import Clock
from fp4dist.nn.comm import SLOT_DIMS, NoComm
from fp4dist.nn.function import fp4_linear
from fp4dist.nn.grouped import Expert, TokenPart, expert_linear, grouped_linear, token_multiple
from fp4dist.nn.plan import FP4, LinearPlan
from fp4dist.numerics import BlockScaledTensor, dequantize
from fp4dist.spec.load import load_recipe, shipped
from fp4dist.spec.recipe import GEMMS, LinearRecipe
from tests.generators import normal
from tests.nn.one_linear import make_plan

INPUTS, OUTPUTS = 64, 128
COUNTS = [33, 0, 64, 7, 128]  # ragged, none, and whole blocks of every rotation
WHOLE = TokenPart()
LINEARS = {
    f"{name}-{linear}": recipe
    for name in shipped("recipes")
    for linear, recipe in load_recipe(name).linears.items()
    if all(spec is None or 64 % spec.columns_multiple == 0 for spec in map(recipe.slot, ("dgrad.w", "fprop.w")))
} | {"quartet2-fp4": load_recipe("quartet2").linears["fp4"]}


@dataclass
class Outcome:
    """Y, dX, and the gradient and main_grad of each weight."""

    y: Tensor
    dx: Tensor
    dws: list[Tensor]
    mains: list[Tensor]

    def tensors(self) -> list[Tensor]:
        return [self.y, self.dx, *self.dws, *self.mains]


def plans(recipes: list[LinearRecipe], clock: Clock | None = None) -> list[LinearPlan]:
    clock = clock or Clock(seed=7, step=3, micro_batch=5)
    return [make_plan(recipe, clock, number=100 + e) for e, recipe in enumerate(recipes)]


def run(
    made: list[LinearPlan],
    counts: list[int],
    how: str,
    *,
    dtype: torch.dtype = torch.float32,
    main_grad: bool = False,
    inputs: int = INPUTS,
    part: TokenPart = WHOLE,
) -> Outcome:
    """Forward and backward of all experts on fixed tensors; how: grouped, or each expert by `loop` or `plain`."""
    x = normal(sum(counts), inputs, seed=1).to(dtype).requires_grad_()
    dy = normal(sum(counts), OUTPUTS, seed=2).to(dtype)
    weights = [torch.nn.Parameter(normal(OUTPUTS, inputs, seed=10 + e).to(dtype)) for e in range(len(counts))]
    mains = [torch.full((OUTPUTS, inputs), 0.25) if main_grad else torch.zeros(0) for _ in weights]
    if main_grad:
        for weight, main in zip(weights, mains, strict=True):
            weight.main_grad, weight.grad_added_to_main_grad = main, False  # type: ignore[attr-defined]
    experts = [Expert(weight, plan, NoComm()) for weight, plan in zip(weights, made, strict=True)]
    if how == "grouped":
        y = grouped_linear(x, experts, counts, part)
    else:
        one = {"loop": lambda rows, e: expert_linear(rows, e, part), "plain": plain}[how]
        y = torch.cat([one(rows, expert) for rows, expert in zip(x.split(counts), experts, strict=True)])
    y.backward(dy)
    assert x.grad is not None
    return Outcome(y.detach(), x.grad, [w.grad for w in weights], mains)  # type: ignore[misc]


def plain(rows: Tensor, expert: Expert) -> Tensor:
    """fp4_linear itself, for a number of tokens that it takes."""
    return fp4_linear(rows, expert.weight, expert.plan, expert.comm)


def assert_same(a: Outcome, b: Outcome) -> None:
    for number, (p, q) in enumerate(zip(a.tensors(), b.tensors(), strict=True)):
        assert p.dtype == q.dtype
        assert torch.equal(p, q), f"tensor {number}: {(p != q).sum()} of {p.numel()} differ"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in sorted(LINEARS)),
        *((name, torch.bfloat16) for name in ("nvidia_nvfp4-fp4", "nvidia_nvfp4-fp4_fprop_bf16", "quartet2-fp4")),
    ],
)
def test_grouped_is_the_loop_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    recipe = LINEARS[name]
    results, tallies = [], []
    for how in ("loop", "grouped"):
        made = plans([recipe] * len(COUNTS))
        results.append(run(made, COUNTS, how, dtype=dtype, main_grad=True, inputs=128))
        tallies.append([(plan.tally.calls, plan.tally.flops, plan.tally.unneeded) for plan in made])
    assert_same(*results)
    assert tallies[0] == tallies[1]
    for dw, main, count in zip(results[0].dws, results[0].mains, COUNTS, strict=True):
        assert bool(dw.ne(0).any() or main.ne(0.25).any()) == bool(count)


@pytest.mark.parametrize("how", ["loop", "grouped"])
def test_whole_blocks_need_nothing_added(how: str) -> None:
    """Against fp4_linear itself, where it can run."""
    recipe, counts = LINEARS["nvidia_nvfp4-fp4"], [128, 256, 16]
    direct = run(plans([recipe] * 3), counts, "plain")
    assert_same(run(plans([recipe] * 3), counts, how), direct)


def test_experts_may_differ_in_their_recipes() -> None:
    recipes = [LINEARS[n] for n in ("nvidia_nvfp4-fp4", "nvidia_nvfp4-fp4_fprop_bf16", "tetrajet_v2_core-fp4")]
    recipes = [LinearRecipe(), *recipes, LinearRecipe()]
    assert_same(run(plans(recipes), COUNTS, "grouped"), run(plans(recipes), COUNTS, "loop"))


def test_high_precision_is_torch() -> None:
    """An all-bf16 recipe: matmul and its autograd, expert by expert."""
    got = run(plans([LinearRecipe()] * len(COUNTS)), COUNTS, "grouped")
    x, dy = normal(sum(COUNTS), INPUTS, seed=1).requires_grad_(), normal(sum(COUNTS), OUTPUTS, seed=2)
    weights = [normal(OUTPUTS, INPUTS, seed=10 + e).requires_grad_() for e in range(len(COUNTS))]
    y = torch.cat([rows.matmul(w.t()) for rows, w in zip(x.split(COUNTS), weights, strict=True)])
    y.backward(dy)
    torch.testing.assert_close(got.y, y.detach(), rtol=0, atol=0)
    torch.testing.assert_close(got.dx, x.grad, rtol=0, atol=0)
    for e, weight in enumerate(weights):
        torch.testing.assert_close(got.dws[e], weight.grad, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("how", ["loop", "grouped"])
@pytest.mark.parametrize("name", ["nvidia_nvfp4-fp4", "quartet2-fp4"])
def test_no_tokens_at_all(name: str, how: str) -> None:
    made = plans([LINEARS[name]] * 2)
    got = run(made, [0, 0], how, main_grad=True, inputs=128)
    assert got.y.shape == (0, OUTPUTS)
    assert got.dx.shape == (0, 128)
    assert all(torch.equal(dw, torch.zeros(OUTPUTS, 128)) for dw in got.dws)
    assert all(torch.equal(main, torch.full((OUTPUTS, 128), 0.25)) for main in got.mains)
    assert all(not plan.tally.calls and plan.tally.unneeded == set(GEMMS) for plan in made)


def test_what_is_filled_up_is_exactly_zero() -> None:
    """Each operand with T: beyond the real tokens its values are zero, its amax that of the real ones."""
    recipe = LINEARS["nvidia_nvfp4-fp4"]
    recipe = replace(recipe, wgrad=replace(recipe.wgrad, dy=recipe.dgrad.dy, x=recipe.fprop.x))  # tokens not rotated
    plan, tokens = plans([recipe])[0], 33
    seen = record(plan)
    run([plan], [tokens], "grouped")
    with_tokens = [slot for slot, dims in SLOT_DIMS.items() if "T" in dims]
    assert sorted(with_tokens) == sorted(slot for slot in seen if "T" in SLOT_DIMS[slot])
    for slot in with_tokens:
        values = dequantize(seen[slot])
        values = values if SLOT_DIMS[slot][0] == "T" else values.t()
        assert values.shape[0] == 48, slot
        assert torch.equal(values[tokens:], torch.zeros_like(values[tokens:])), slot
        assert bool(values[:tokens].ne(0).any()), slot


def record(plan: LinearPlan) -> dict[str, BlockScaledTensor]:
    """What the plan's quantizing kernels return from now on."""
    seen: dict[str, BlockScaledTensor] = {}

    def recording(slot: str, kernel: Kernel) -> Kernel:
        def call(*args: Any, **named: Any) -> BlockScaledTensor:
            seen[slot] = kernel(*args, **named)
            return seen[slot]

        return replace(kernel, fn=call)

    plan.kernels.update({slot: recording(slot, plan.kernels[slot]) for slot in SLOT_DIMS if slot in plan.kernels})
    return seen


def test_a_token_does_not_depend_on_who_follows() -> None:
    """Nearest rounding of y's row 0..6 with 7 tokens, and of the same rows in a call where the rest is zero."""
    recipe = LINEARS["nvidia_nvfp4-fp4"]
    weight = normal(OUTPUTS, INPUTS, seed=3)
    seven = normal(7, INPUTS, seed=1)
    filled = torch.cat([seven, torch.zeros(25, INPUTS)])
    plan = plans([recipe])[0]
    y = grouped_linear(seven, [Expert(weight, plan, NoComm())], [7], WHOLE)
    assert torch.equal(y, fp4_linear(filled, weight, plan, NoComm())[:7])


def test_token_multiples() -> None:
    assert token_multiple(LinearRecipe()) == 1
    assert token_multiple(LINEARS["nvidia_nvfp4-fp4"]) == 16
    assert token_multiple(LINEARS["quartet2-fp4"]) == 128
    assert token_multiple(LINEARS["tetrajet_v2_core-fp4"]) == 32


@pytest.mark.parametrize("how", ["loop", "grouped"])
def test_parts_of_a_micro_batch_draw_different_noise(how: str) -> None:
    """Part 1 of 2 at micro-batch 5 is micro-batch 11, also in backward, and the clock is itself again afterwards."""
    recipe = LINEARS["tetrajet_v2_core-fp4"]
    clock = Clock(seed=7, step=3, micro_batch=5)
    parts = [run(plans([recipe] * 2, clock), [32, 64], how, part=TokenPart(index, 2)) for index in (0, 1)]
    assert clock.micro_batch == 5
    later = run(plans([recipe] * 2, Clock(seed=7, step=3, micro_batch=11)), [32, 64], how)
    assert_same(parts[1], later)
    assert not torch.equal(parts[0].dx, parts[1].dx)
    assert not torch.equal(parts[0].dws[0], parts[1].dws[0])


def test_torchs_grouped_gemm_gives_the_loops_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch that a GPU takes, on torch's CPU fallback of the same function."""
    made = [plans([LinearRecipe()] * len(COUNTS)) for _ in range(2)]
    loop = run(made[0], COUNTS, "grouped", dtype=torch.bfloat16)
    calls: list[tuple[Any, ...]] = []
    fallback = torch.nn.functional.grouped_mm
    monkeypatch.setattr(grouped_module, "fits_grouped_mm", lambda a, b: True)
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", lambda *a, **k: calls.append(a) or fallback(*a, **k))
    got = run(made[1], COUNTS, "grouped", dtype=torch.bfloat16)
    assert len(calls) == 3
    for a, b in zip(got.tensors(), loop.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=1.6e-2, atol=1e-2)
    cpu = torch.ones(8, 8, dtype=torch.bfloat16)
    monkeypatch.undo()
    assert not grouped_module.fits_grouped_mm(cpu, cpu)


def test_counts_must_add_up() -> None:
    expert = Expert(normal(OUTPUTS, INPUTS), plans([LinearRecipe()])[0], NoComm())
    with pytest.raises(ValueError, match=r"8 rows for 1 experts with \[7\] tokens"):
        grouped_linear(normal(8, INPUTS), [expert], [7], WHOLE)
    with pytest.raises(ValueError, match="8 rows for 1 experts"):
        grouped_linear(normal(8, INPUTS), [expert], [4, 4], WHOLE)


def test_evaluation_keeps_and_counts_nothing() -> None:
    plan = plans([LINEARS["nvidia_nvfp4-fp4"]])[0]
    expert = Expert(torch.nn.Parameter(normal(OUTPUTS, INPUTS)), plan, NoComm())
    with torch.no_grad():
        y = grouped_linear(normal(20, INPUTS), [expert], [20], WHOLE)
    assert not y.requires_grad
    assert not plan.tally.calls


@pytest.mark.parametrize("how", ["loop", "grouped"])
def test_an_evaluation_without_tokens_excuses_no_gemm(how: str) -> None:
    """What `check_counts` lets a training step leave out must come from training."""
    plan = plans([LINEARS["nvidia_nvfp4-fp4"]])[0]
    expert = Expert(torch.nn.Parameter(normal(OUTPUTS, INPUTS)), plan, NoComm())
    with torch.no_grad():
        x = normal(0, INPUTS)
        y = expert_linear(x, expert, WHOLE) if how == "loop" else grouped_linear(x, [expert], [0], WHOLE)
    assert y.shape == (0, OUTPUTS)
    assert not plan.tally.unneeded


def test_a_second_derivative_is_refused() -> None:
    plan = plans([LINEARS["nvidia_nvfp4-fp4"]])[0]
    expert = Expert(torch.nn.Parameter(normal(OUTPUTS, INPUTS)), plan, NoComm())
    x, dy = normal(20, INPUTS).requires_grad_(), normal(20, OUTPUTS, seed=2).requires_grad_()
    (dx,) = torch.autograd.grad(grouped_linear(x, [expert], [20], WHOLE), x, dy, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_a_backend_without_a_grouped_gemm_is_called_for_each_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_KERNELS", {})
    matmul = Kernel("matmul", "triton", lambda a, b: (a, b), lambda request: None)
    assert grouped(matmul)([1, 2], [3, 4]) == [(1, 3), (2, 4)]
    registry.kernel("grouped_matmul", backend="triton")(lambda a, b: ["grouped"])
    monkeypatch.setitem(registry._KERNELS, ("matmul", "triton"), matmul)
    assert grouped(matmul)([1], [2]) == ["grouped"]
    watched = replace(matmul, fn=lambda a, b: "watched")
    assert grouped(watched)([1], [2]) == ["watched"]


def test_kinds_are_counted_expert_by_expert() -> None:
    made = plans([LINEARS["nvidia_nvfp4-fp4"], LinearRecipe()])
    run(made, [20, 20], "grouped")
    assert made[0].tally.calls == {(gemm, FP4): 1 for gemm in GEMMS}
    assert made[0].tally.flops[("fprop", FP4)] == 2 * 32 * INPUTS * OUTPUTS  # with the tokens that fill the blocks
    assert made[1].tally.flops == {(gemm, "bf16"): 2 * 20 * INPUTS * OUTPUTS for gemm in GEMMS}


def test_results_that_lie_in_a_row_are_not_copied() -> None:
    from fp4dist.nn.grouped import _in_order

    whole = torch.arange(24.0).view(6, 4)
    rows = dict(enumerate(whole.split([2, 0, 3, 1])))
    joined = _in_order(rows, whole, 4)
    assert joined.data_ptr() == whole.data_ptr()
    assert torch.equal(joined, whole)
    for parts in ({0: rows[2], 1: rows[0]}, {0: rows[0], 1: rows[3]}, {0: rows[0], 1: whole[2:5].clone()}):
        assert torch.equal(_in_order(parts, whole, 4), torch.cat([parts[0], parts[1]]))
    assert _in_order({}, whole, 4).shape == (0, 4)
