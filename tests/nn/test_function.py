"""The autograd function against a composition written here from quantize, dequantize and float64 products.

Codes and scales must be equal bit for bit; GEMMs on random inputs stay within K 2^-24 (|A| |B|), the error of any fp32
summation order, plus a few roundings of the global scales.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from fp4dist.errors import RecipeMismatch
from fp4dist.nn.clock import Clock
from fp4dist.nn.comm import NoComm
from fp4dist.nn.function import fp4_linear
from fp4dist.numerics import BlockScaledTensor, Key, dequantize, quantize
from fp4dist.numerics.rotation import turned_back
from fp4dist.spec.estimators import Straight
from fp4dist.spec.formats import NVFP4
from fp4dist.spec.load import load_recipe, shipped
from fp4dist.spec.recipe import GEMMS, SLOTS, Dgrad, Fprop, LinearRecipe, QuantSpec, Wgrad
from fp4dist.spec.statistics import Current
from tests.compare import assert_same_bits
from tests.generators import normal, spec
from tests.nn.one_linear import (
    INPUTS,
    NUMBER,
    OUTPUTS,
    TOKENS,
    Result,
    make_plan,
    run_linear,
    same,
    tensors,
    watch,
)

SHIPPED: dict[str, LinearRecipe] = {
    f"{name}:{linear}": recipe
    for name in shipped("recipes")
    for linear, recipe in load_recipe(name).linears.items()
    if not any(INPUTS % s.columns_multiple for slot in ("fprop.x", "fprop.w") if (s := recipe.slot(slot)) is not None)
}
NV, SQUARE, SR = spec("nvfp4"), spec("nvfp4_16x16"), spec("nvfp4_sr")
PARTIAL: dict[str, LinearRecipe] = {
    "fprop": LinearRecipe(fprop=Fprop(x=NV, w=SQUARE)),
    "dgrad": LinearRecipe(dgrad=Dgrad(dy=SR, w=NV)),
    "wgrad": LinearRecipe(wgrad=Wgrad(dy=SR, x=NV)),
    "fprop.x": LinearRecipe(fprop=Fprop(x=NV)),
    "fprop.w": LinearRecipe(fprop=Fprop(w=NV)),
    "dgrad.dy": LinearRecipe(dgrad=Dgrad(dy=SR)),
    "dgrad.w": LinearRecipe(dgrad=Dgrad(w=NV)),
    "wgrad.dy": LinearRecipe(wgrad=Wgrad(dy=SR)),
    "wgrad.x": LinearRecipe(wgrad=Wgrad(x=NV)),
    "requant of mixed": LinearRecipe(
        fprop=Fprop(x=NV), wgrad=Wgrad(x=QuantSpec(format=NVFP4, source="requant"))
    ),
    "mxfp4": LinearRecipe(
        dgrad=Dgrad(dy=spec("mxfp4_34_sr"), w=spec("mxfp4_34")), wgrad=Wgrad(dy=spec("mxfp4_ceil_sr"), x=spec("mxfp4"))
    ),
}  # fmt: skip
NOISY = [
    name for name, r in SHIPPED.items() if any(s is not None and not s.is_deterministic for s in map(r.slot, SLOTS))
]
CLOCK = Clock(seed=7, step=3, micro_batch=5)


def composition(recipe: LinearRecipe, dtype: torch.dtype = torch.float32) -> dict[str, BlockScaledTensor | Tensor]:
    """The six operands, quantized one by one from the definition of slots and sources."""
    x, w, dy = tensors(dtype)
    master = {"fprop.x": x, "fprop.w": w, "dgrad.dy": dy, "dgrad.w": w.t(), "wgrad.dy": dy.t(), "wgrad.x": x.t()}
    forward = {"dgrad.w": "fprop.w", "wgrad.x": "fprop.x"}
    made: dict[str, BlockScaledTensor | Tensor] = {}

    def values(slot: str) -> Tensor:
        """Of the forward codes, in the original basis."""
        codes, spec = made[forward[slot]], recipe.slot(forward[slot])
        assert isinstance(codes, BlockScaledTensor)
        assert spec is not None
        if spec.rotation is None:
            return dequantize(codes).t()
        key = Key(seed=CLOCK.seed, layer=NUMBER, step=CLOCK.step, micro_batch=CLOCK.micro_batch)
        return turned_back(dequantize(replace(codes, rotation=1)), spec.rotation, key).t()

    for number, slot in enumerate(SLOTS):
        wanted = recipe.slot(slot)
        if recipe.dequantized(slot):
            made[slot] = values(slot).to(dtype)
            continue
        if wanted is None:
            made[slot] = master[slot]
            continue
        source = master[slot]
        if wanted.source == "requant":
            source = values(slot)
        key = Key(seed=CLOCK.seed, layer=NUMBER, step=CLOCK.step, micro_batch=CLOCK.micro_batch, slot=number)
        if wanted.source == "reuse" and 0 in wanted.shape:  # a statistic of the tensor is summed in the forward's order
            codes = made[forward[slot]]
            assert isinstance(codes, BlockScaledTensor)
            made[slot] = codes.transpose()
            continue
        made[slot] = quantize(source.contiguous(), wanted, key)  # reuse: a square block's codes are those of W^T
    return made


def product(a: BlockScaledTensor | Tensor, b: BlockScaledTensor | Tensor) -> tuple[Tensor, Tensor]:
    """(A B^T in float64, the bound on an fp32 result's distance from it)."""
    a64, b64 = (dequantize(o).double() if isinstance(o, BlockScaledTensor) else o.double() for o in (a, b))
    return a64 @ b64.t(), (a64.shape[1] + 8) * 2.0**-24 * (a64.abs() @ b64.abs().t())


def check_against_composition(recipe: LinearRecipe, result: Result, operands: dict[str, Any]) -> None:
    x, w, dy = tensors()
    for gemm, got, exact in zip(GEMMS, result.tensors(), (x @ w.t(), dy @ w, dy.t() @ x), strict=True):
        a, b = (operands[s] for s in SLOTS if s.startswith(gemm))
        if passes_otherwise(recipe, gemm):
            continue
        if isinstance(a, Tensor) and isinstance(b, Tensor) and any(map(recipe.dequantized, SLOTS)):
            assert_close_to_product(got, a, b)
            continue
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            assert torch.equal(got, exact), gemm  # the very call of an unquantized layer
            continue
        assert_close_to_product(got, a, b)
        assert not torch.equal(got, exact), gemm


def assert_close_to_product(got: Tensor, a: BlockScaledTensor | Tensor, b: BlockScaledTensor | Tensor) -> None:
    expected, bound = product(a, b)
    assert ((got.double() - expected).abs() <= bound).all()


def passes_otherwise(recipe: LinearRecipe, gemm: str) -> bool:
    """Whether an estimator acts behind this GEMM; see test_estimators."""
    spec = recipe.slot({"dgrad": "fprop.x", "wgrad": "fprop.w"}.get(gemm, "fprop.x"))
    return gemm != "fprop" and spec is not None and not isinstance(spec.estimator, Straight)


def is_codes_alone(recipe: LinearRecipe) -> bool:
    """Whether every operand is codes of its own amax; else see test_parts and test_controllers."""
    specs = [spec for slot in SLOTS if (spec := recipe.slot(slot)) is not None]
    return not any(spec.has_parts or not isinstance(spec.amax, Current) for spec in specs)


@pytest.mark.parametrize("name", [*(name for name, recipe in SHIPPED.items() if is_codes_alone(recipe)), *PARTIAL])
def test_operands_and_results_are_the_composition(name: str) -> None:
    recipe = SHIPPED.get(name) or PARTIAL[name]
    result, operands = run_linear(recipe), composition(recipe)
    for slot, got in result.operands.items():
        expected = operands[slot]
        if isinstance(expected, BlockScaledTensor):
            assert isinstance(got, BlockScaledTensor)
            assert_same_bits(got, expected)
        else:
            assert torch.equal(got, expected)  # type: ignore[arg-type]
    check_against_composition(recipe, result, operands)


def test_without_quantizers_it_is_torch() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, w, dy = tensors(dtype)
        result = run_linear(LinearRecipe(), dtype=dtype)
        for got, exact in zip(result.tensors(), (x @ w.t(), dy @ w, dy.t() @ x), strict=True):
            assert torch.equal(got, exact)
        assert result.operands == {}


@pytest.mark.parametrize("name", SHIPPED)
def test_leading_dimensions_are_tokens(name: str) -> None:
    flat = run_linear(SHIPPED[name])
    for shape in ((4, 64), (64, 2, 2)):
        deep = run_linear(SHIPPED[name], shape=shape)
        assert deep.y.shape == (*shape, OUTPUTS)
        assert deep.dx.shape == (*shape, INPUTS)
        deep.y, deep.dx = deep.y.flatten(0, -2), deep.dx.flatten(0, -2)
        assert all(same(flat, deep))


@pytest.mark.parametrize("name", [name for name, recipe in SHIPPED.items() if is_codes_alone(recipe)])
def test_bf16_tensors_give_bf16_results_of_the_same_codes(name: str) -> None:
    recipe = SHIPPED[name]
    result, operands = run_linear(recipe, dtype=torch.bfloat16), composition(recipe, torch.bfloat16)
    assert {t.dtype for t in result.tensors()} == {torch.bfloat16}
    for slot, got in result.operands.items():
        wanted = operands[slot]
        if isinstance(got, BlockScaledTensor):
            assert_same_bits(got, wanted)  # type: ignore[arg-type]
        else:
            assert torch.equal(got, wanted)  # type: ignore[arg-type]
    for gemm, got in zip(GEMMS, result.tensors(), strict=True):
        expected, bound = product(*(operands[s] for s in SLOTS if s.startswith(gemm)))
        if passes_otherwise(recipe, gemm):
            continue
        assert ((got.double() - expected).abs() <= bound + expected.abs() * 2.0**-8).all()


def test_strided_inputs_are_read_right() -> None:
    recipe, (x, w, dy) = SHIPPED["quartet2:fp4"], tensors()
    wide = torch.cat((x, x), dim=1)[:, :INPUTS].detach().requires_grad_()
    weight = w.t().contiguous().t().requires_grad_()
    assert not wide.is_contiguous()
    assert not weight.is_contiguous()
    y = fp4_linear(wide, weight, make_plan(recipe), NoComm())
    y.backward(torch.cat((dy, dy), dim=1)[:, :OUTPUTS])
    assert wide.grad is not None
    assert weight.grad is not None
    assert all(same(run_linear(recipe), Result(y, wide.grad, weight.grad, {})))


# ---------- what is kept for backward


def saved_by(recipe: LinearRecipe, *, x_grad: bool = True, w_grad: bool = True) -> list[Tensor]:
    """The tensors that forward hands to autograd."""
    kept: list[Tensor] = []
    x, w, _ = tensors()

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with saved_tensors_hooks(keep, lambda t: t):
        fp4_linear(x.requires_grad_(x_grad), w.requires_grad_(w_grad), make_plan(recipe), NoComm())
    return kept


def nbytes(kept: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in kept)


X_CODES, W_CODES = (TOKENS * INPUTS * 9 // 16 + 4, OUTPUTS * INPUTS * 9 // 16 + 4)  # 4.5 bits an element, one fp32
W_SQUARE = OUTPUTS * INPUTS // 2 + OUTPUTS * INPUTS // 256 + 4
X_WHOLE = TOKENS * INPUTS * 4


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("quartet2:fp4", X_CODES + W_CODES),
        ("tetrajet_v2_core:fp4", X_CODES + W_CODES),
        ("nvidia_nvfp4:fp4", X_WHOLE + W_SQUARE),
        ("nvidia_nvfp4_46:fp4", X_WHOLE + W_SQUARE),
        ("nvidia_nvfp4:fp4_fprop_bf16", X_WHOLE),
    ],
)
def test_only_what_the_sources_ask_for_is_kept(name: str, expected: int) -> None:
    kept = saved_by(SHIPPED[name])
    assert nbytes(kept) == expected
    assert any(t.shape == (TOKENS, INPUTS) for t in kept) == (SHIPPED[name].slot("wgrad.x").source == "master")  # type: ignore[union-attr]


def test_nothing_is_kept_for_a_gradient_nobody_wants() -> None:
    recipe = SHIPPED["quartet2:fp4"]
    assert nbytes(saved_by(recipe, w_grad=False)) == W_CODES
    assert nbytes(saved_by(recipe, x_grad=False)) == X_CODES
    assert nbytes(saved_by(SHIPPED["nvidia_nvfp4:fp4"], w_grad=False)) == W_SQUARE
    assert saved_by(recipe, x_grad=False, w_grad=False) == []


def test_no_grad_keeps_nothing_and_counts_nothing() -> None:
    x, w, _ = tensors()
    plan = make_plan(SHIPPED["quartet2:fp4"])
    with torch.no_grad():
        y = fp4_linear(x, w.requires_grad_(), plan, NoComm())
    assert y.grad_fn is None
    assert not plan.tally.calls
    assert torch.equal(y, run_linear(SHIPPED["quartet2:fp4"]).y)


# ---------- gradient flow


@pytest.mark.parametrize("name", ["nvidia_nvfp4:fp4", "quartet2:fp4", "nvidia_nvfp4:fp4_fprop_bf16"])
def test_one_gradient_without_the_other(name: str) -> None:
    whole, (x, w, dy) = run_linear(SHIPPED[name]), tensors()
    plan = make_plan(SHIPPED[name])
    frozen = x.clone().requires_grad_()
    fp4_linear(frozen, w, plan, NoComm()).backward(dy)
    assert frozen.grad is not None
    assert torch.equal(frozen.grad, whole.dx)
    assert plan.tally.unneeded == {"wgrad"}
    weight, plan = w.clone().requires_grad_(), make_plan(SHIPPED[name])
    fp4_linear(x, weight, plan, NoComm()).backward(dy)
    assert weight.grad is not None
    assert torch.equal(weight.grad, whole.dw)
    assert plan.tally.unneeded == {"dgrad"}
    assert {gemm for gemm, _ in plan.tally.calls} == {"fprop", "wgrad"}


def test_gradients_accumulate_over_micro_batches() -> None:
    recipe, (x, w, dy) = SHIPPED["nvidia_nvfp4:fp4"], tensors()
    weight, clock = w.requires_grad_(), Clock(seed=7, step=3)
    total = torch.zeros_like(w)
    for i in range(2):
        clock.micro_batch = i
        fp4_linear(x, weight, make_plan(recipe, clock), NoComm()).backward(dy)
        total += run_linear(recipe, Clock(seed=7, step=3, micro_batch=i)).dw
    assert weight.grad is not None
    assert torch.equal(weight.grad, total)


def with_main_grad(w: Tensor) -> torch.nn.Parameter:
    weight = torch.nn.Parameter(w)
    weight.main_grad = torch.ones(w.shape, dtype=torch.float32)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["nvidia_nvfp4:fp4", "quartet2:fp4"])
def test_main_grad_gets_the_fp32_gradient(name: str, dtype: torch.dtype) -> None:
    x, w, dy = tensors(dtype)
    weight = with_main_grad(w)
    fp4_linear(x, weight, make_plan(SHIPPED[name]), NoComm()).backward(dy)
    operands = composition(SHIPPED[name], dtype)
    expected, bound = product(operands["wgrad.dy"], operands["wgrad.x"])
    difference = weight.main_grad.double() - (expected + 1)  # type: ignore[attr-defined]
    assert (difference.abs() <= bound + 2.0**-22 * (1 + expected.abs())).all()  # no bf16 on the way
    assert weight.grad_added_to_main_grad is True  # type: ignore[attr-defined]
    assert weight.grad is not None  # Megatron's hook has to fire
    assert weight.grad.dtype == dtype
    assert not weight.grad.any()


def test_main_grad_is_left_alone_where_megatron_adds_it_itself() -> None:
    x, w, dy = tensors(torch.bfloat16)
    weight = with_main_grad(w)
    fp4_linear(x, weight, make_plan(LinearRecipe()), NoComm()).backward(dy)  # a bf16 GEMM gives a bf16 gradient
    assert weight.grad is not None
    assert torch.equal(weight.grad, dy.t() @ x)
    assert weight.grad_added_to_main_grad is False  # type: ignore[attr-defined]
    assert torch.equal(weight.main_grad, torch.ones_like(weight.main_grad))  # type: ignore[attr-defined]
    plain = torch.nn.Parameter(tensors()[1])
    plain.main_grad = torch.zeros(plain.shape)  # type: ignore[attr-defined] (not Megatron's: no marker)
    fp4_linear(tensors()[0], plain, make_plan(SHIPPED["quartet2:fp4"]), NoComm()).backward(tensors()[2])
    assert plain.grad is not None
    assert plain.grad.any()
    assert not plain.main_grad.any()  # type: ignore[attr-defined]


def test_a_second_derivative_is_refused() -> None:
    x, w, dy = tensors()
    y = fp4_linear(x.requires_grad_(), w.requires_grad_(), make_plan(SHIPPED["quartet2:fp4"]), NoComm())
    (dx,) = torch.autograd.grad(y, x, dy.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("name", ["nvidia_nvfp4:fp4", "quartet2:fp4"])
def test_a_retained_graph_gives_the_same_gradient_again(name: str) -> None:
    whole, (x, w, dy) = run_linear(SHIPPED[name]), tensors()
    weight = torch.nn.Parameter(w)
    y = fp4_linear(x.requires_grad_(), weight, make_plan(SHIPPED[name]), NoComm())
    for _ in range(2):
        x.grad = weight.grad = None
        y.backward(dy, retain_graph=True)
        assert x.grad is not None
        assert weight.grad is not None
        assert torch.equal(x.grad, whole.dx)
        assert torch.equal(weight.grad, whole.dw)
    y.backward(dy)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward(dy)


# ---------- noise


@pytest.mark.parametrize("name", NOISY)
def test_the_clock_decides_every_bit(name: str) -> None:
    recipe = SHIPPED[name]
    base = run_linear(recipe, Clock(seed=7, step=3, micro_batch=5))
    assert all(same(base, run_linear(recipe, Clock(seed=7, step=3, micro_batch=5))))
    for other in (Clock(8, 3, 5), Clock(7, 4, 5), Clock(7, 3, 6)):
        for gemm, equal in zip(GEMMS, same(base, run_linear(recipe, other)), strict=True):
            specs = [recipe.slot(slot) for slot in SLOTS if slot.startswith(gemm)]
            assert equal == all(spec is None or spec.is_deterministic for spec in specs), gemm


def test_layers_draw_different_noise() -> None:
    recipe, (x, w, dy) = SHIPPED["quartet2:fp4"], tensors()
    gradients = []
    for number in (1, 2):
        weight = w.clone().requires_grad_()
        fp4_linear(x, weight, make_plan(recipe, number=number), NoComm()).backward(dy)
        gradients.append(weight.grad)
    assert not torch.equal(*gradients)


@pytest.mark.parametrize("name", NOISY)
def test_backward_uses_the_clock_of_its_forward(name: str) -> None:
    x, w, dy = tensors()
    clock = Clock(seed=7, step=3, micro_batch=5)
    x, w = x.requires_grad_(), w.requires_grad_()
    y = fp4_linear(x, w, make_plan(SHIPPED[name], clock), NoComm())
    clock.step, clock.micro_batch = 4, 0  # a pipeline schedule has gone on
    y.backward(dy)
    assert (clock.step, clock.micro_batch) == (4, 0)
    assert x.grad is not None
    assert w.grad is not None
    assert all(same(run_linear(SHIPPED[name]), Result(y, x.grad, w.grad, {})))


def test_a_failing_backward_leaves_the_clock_alone() -> None:
    x, w, dy = tensors()
    clock = Clock(step=3)
    plan = make_plan(SHIPPED["quartet2:fp4"], clock)
    y = fp4_linear(x.requires_grad_(), w, plan, NoComm())
    clock.step = 4
    del plan.kernels["dgrad.dy"]
    with pytest.raises(KeyError):
        y.backward(dy)
    assert clock.step == 4


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["quartet2:fp4", "nvidia_nvfp4:fp4"])
def test_recompute_gives_the_same_gradients(name: str, reentrant: bool) -> None:
    dy = normal(TOKENS, OUTPUTS, seed=9)

    def gradients(wrap: Callable[..., Tensor] | None) -> list[Tensor]:
        x, w, _ = tensors()
        v = normal(OUTPUTS, OUTPUTS, seed=4).requires_grad_()
        x, w = x.requires_grad_(), w.requires_grad_()
        clock = Clock(seed=1, step=2, micro_batch=3)
        first, second = make_plan(SHIPPED[name], clock, 1), make_plan(SHIPPED[name], clock, 2)

        def block(t: Tensor) -> Tensor:
            return fp4_linear(torch.relu(fp4_linear(t, w, first, NoComm())), v, second, NoComm())

        y = block(x) if wrap is None else wrap(block, x)
        y.backward(dy)
        return [y, *(t.grad for t in (x, w, v) if t.grad is not None)]

    plain = gradients(None)
    recomputed = gradients(lambda f, t: checkpoint(f, t, use_reentrant=reentrant))  # type: ignore[return-value]
    assert len(plain) == len(recomputed) == 4
    for a, b in zip(plain, recomputed, strict=True):
        assert torch.equal(a, b)


def test_the_order_of_calls_does_not_matter() -> None:
    recipe, (x, w, dy) = SHIPPED["quartet2:fp4"], tensors()
    clock = Clock(seed=1)

    def gradients(order: tuple[int, ...]) -> dict[int, Tensor]:
        weights = {n: w.clone().requires_grad_() for n in order}
        outputs = {n: fp4_linear(x, weights[n], make_plan(recipe, clock, n), NoComm()) for n in order}
        for n in reversed(order):
            outputs[n].backward(dy)
        return {n: weight.grad for n, weight in weights.items() if weight.grad is not None}

    forth, back = gradients((1, 2, 3)), gradients((3, 1, 2))
    for n in (1, 2, 3):
        assert torch.equal(forth[n], back[n])


# ---------- weight cache


def test_quantized_weights_live_for_one_step() -> None:
    x, w, _ = tensors()
    w = w.requires_grad_()
    clock = Clock(step=0, cache_weights=True)
    watched = watch(make_plan(SHIPPED["nvidia_nvfp4:fp4"], clock))

    def forward() -> int:
        fp4_linear(x, w, watched.plan, NoComm())
        return watched.calls["fprop.w"]

    assert [forward(), forward()] == [1, 1]
    clock.micro_batch = 1
    assert forward() == 1
    clock.step = 1
    assert [forward(), forward()] == [2, 2]
    watched.plan.drop_cache()
    assert forward() == 3
    clock.cache_weights = False
    assert [forward(), forward()] == [4, 5]


def test_the_cache_is_not_used_in_evaluation() -> None:
    x, w, _ = tensors()
    w = w.requires_grad_()
    clock = Clock(cache_weights=True)
    plan = make_plan(SHIPPED["nvidia_nvfp4:fp4"], clock)
    before = fp4_linear(x, w, plan, NoComm())
    with torch.no_grad():
        w.mul_(2)  # the optimizer's step; evaluation follows under the same clock
        assert torch.equal(fp4_linear(x, w, plan, NoComm()), 2 * before)
    clock.step = 1
    assert torch.equal(fp4_linear(x, w, plan, NoComm()), 2 * before)


def test_caching_changes_no_bit() -> None:
    noisy_weight = LinearRecipe(fprop=Fprop(x=NV, w=SR))  # the codes depend on the micro-batch: not kept
    for recipe in (SHIPPED["quartet2:fp4"], SHIPPED["nvidia_nvfp4_46:fp4"], noisy_weight):
        outcomes = []
        for cache in (False, True):
            x, w, dy = tensors()
            weight, clock = w.requires_grad_(), Clock(seed=5, cache_weights=cache)
            plan, ys = make_plan(recipe, clock), []
            for i in range(2):
                clock.micro_batch = i
                ys.append(fp4_linear(x, weight, plan, NoComm()))
                ys[-1].backward(dy)
            assert weight.grad is not None
            outcomes.append(torch.cat((ys[0].flatten(), ys[1].flatten(), weight.grad.flatten())))
        assert torch.equal(*outcomes)


# ---------- rest


def test_every_gemm_is_counted() -> None:
    x, w, dy = tensors()
    plan = make_plan(PARTIAL["dgrad.dy"])
    fp4_linear(x.requires_grad_(), w.requires_grad_(), plan, NoComm()).backward(dy)
    assert dict(plan.tally.calls) == {("fprop", "bf16"): 1, ("dgrad", "mixed"): 1, ("wgrad", "bf16"): 1}
    assert set(plan.tally.flops.values()) == {2 * TOKENS * INPUTS * OUTPUTS}
    plan = make_plan(SHIPPED["quartet2:fp4"])
    fp4_linear(x, w, plan, NoComm()).backward(dy)
    assert dict(plan.tally.calls) == {(gemm, "fp4"): 1 for gemm in GEMMS}
    plan = make_plan(SHIPPED["luq:fp4"])  # averages two samples of dY in wgrad
    fp4_linear(x, w, plan, NoComm()).backward(dy)
    assert dict(plan.tally.calls) == {("fprop", "fp4"): 1, ("dgrad", "fp4"): 1, ("wgrad", "fp4"): 2}
    assert plan.tally.flops["wgrad", "fp4"] == 2 * plan.tally.flops["dgrad", "fp4"]


def test_autocast_does_not_reach_the_arithmetic() -> None:
    """Under autocast a GEMM of fp32 carriers would silently run in bf16."""
    for name in ("quartet2:fp4", "nvidia_nvfp4:fp4_fprop_bf16"):
        x, w, dy = tensors()
        x, w = x.requires_grad_(), w.requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = fp4_linear(x, w, make_plan(SHIPPED[name]), NoComm())
            y.backward(dy)
        assert x.grad is not None
        assert w.grad is not None
        assert all(same(run_linear(SHIPPED[name]), Result(y, x.grad, w.grad, {})))


def test_nan_reaches_the_gradients() -> None:
    """A non-finite value must be seen by the loop, which skips the step; it is never clipped away."""
    x, w, dy = tensors()
    x[3, 5] = float("inf")
    w = w.requires_grad_()
    y = fp4_linear(x, w, make_plan(SHIPPED["nvidia_nvfp4:fp4"]), NoComm())
    y.backward(dy)
    assert y.isnan().all()
    assert w.grad is not None
    assert w.grad.isnan().all()


@pytest.mark.parametrize("name", ["nvidia_nvfp4:fp4", "quartet2:fp4", "averis:fp4"])
def test_tokens_that_do_not_divide_are_filled_up(name: str) -> None:
    """A last batch that is smaller: the bits of one with zero tokens behind, which are cut off again."""
    x, w, dy = tensors()
    full = {"nvidia_nvfp4:fp4": 48}.get(name, 128)
    filled = [torch.cat((t[:40], torch.zeros(full - 40, t.shape[1]))) for t in (x, dy)]
    whole = run_linear(SHIPPED[name], data=(filled[0], w, filled[1]), shape=(full,))
    for shape in ((40,), (5, 8)):
        part = run_linear(SHIPPED[name], data=(x[:40], w, dy[:40]), shape=shape)
        assert part.y.shape == (*shape, OUTPUTS)
        if name != "averis:fp4":  # its mean is that of the tokens that are there
            assert torch.equal(part.y.reshape(40, -1), whole.y[:40])
            assert torch.equal(part.dx.reshape(40, -1), whole.dx[:40])
            assert torch.equal(part.dw, whole.dw)
    with torch.no_grad():
        plan = make_plan(SHIPPED[name])
        assert torch.equal(fp4_linear(x[:40], w, plan, NoComm()), part.y.reshape(40, -1))
        assert plan.filled == 0, "no block of the forward pass lies across tokens"


def test_tokens_that_may_not_be_filled_up_are_named() -> None:
    """Moments of the whole tensor, a part of the tokens on each rank: the error names the layer and the slot."""
    x, w, _ = tensors()
    with pytest.raises(RecipeMismatch, match=r"fc1 fprop\.x: tokens would be filled .* change the 41 tokens"):
        fp4_linear(x[:41], w.requires_grad_(), make_plan(SHIPPED["luq:fp4"]), NoComm())

    class Split(NoComm):
        context = (0, 2)

    y = fp4_linear(x[:40], w, make_plan(SHIPPED["nvidia_nvfp4:fp4"]), Split())
    with pytest.raises(RecipeMismatch, match=r"fc1 wgrad\.dy: this rank's 40 columns are 2 separate runs of the whole"):
        y.sum().backward()


def test_other_dtypes_are_refused() -> None:
    x, w, _ = tensors(torch.float16)
    with pytest.raises(ValueError, match=r"expected bf16 or fp32, got torch\.float16"):
        fp4_linear(x, w, make_plan(SHIPPED["quartet2:fp4"]), NoComm())
