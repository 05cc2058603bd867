"""Gradients behind the forward quantizers, backward GEMMs by the forward's values, weights rounded to their averages.

An estimator changes no forward bit and no GEMM: dX and dW of the same recipe with `straight`, times a factor that is
worked out here from the definition of the quantizer, are the oracle.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from fp4dist.errors import RecipeMismatch
from fp4dist.megatron.coded_bucket import why_whole
from fp4dist.nn.apply import plan_table
from fp4dist.nn.clock import Clock
from fp4dist.nn.comm import NoComm
from fp4dist.nn.controllers import ControlledLinear, Controllers
from fp4dist.nn.function import fp4_linear
from fp4dist.nn.gather import gather_words
from fp4dist.nn.grouped import Expert, TokenPart, expert_linear, grouped_linear
from fp4dist.nn.plan import LinearPlan
from fp4dist.numerics import BlockScaledTensor, Key, dequantize, quantize
from fp4dist.numerics.estimators import slope
from fp4dist.numerics.rotation import rotate, unrotate
from fp4dist.spec.blocks import Hadamard
from fp4dist.spec.build import build
from fp4dist.spec.estimators import Dge, Straight
from fp4dist.spec.formats import E2M1
from fp4dist.spec.load import load_recipe
from fp4dist.spec.recipe import LinearRecipe
from tests.distributed import megatron_groups, run_ranks
from tests.generators import normal
from tests.megatron.test_layers import BATCH, apply, make_layer, my_part
from tests.nn.one_linear import INPUTS, NUMBER, OUTPUTS, TOKENS, Result, make_plan, run_linear, tensors
from tests.tiny_llama import make_sites

QUEST: dict[str, Any] = {"format": "mxfp4", "scale": "quest", "estimator": "mask"}
HAD = {**QUEST, "rotation": {"size": 32, "signs": "none"}}
ROW: dict[str, Any] = {"format": "fp4_row"}
LEARNED: dict[str, Any] = {
    "format": {"element": "int4", "scale": "fp32", "block": "tensor"}, "amax": {"kind": "learned", "start": 1.0},
    "estimator": "lsq",
}  # fmt: skip
VALUES = {"dgrad": {"w": "dequant"}, "wgrad": {"x": "dequant"}}
SR8 = {"format": "fp8_e5m2"}
LINEARS: dict[str, dict[str, Any]] = {
    "mask of x": {"fprop": {"x": QUEST, "w": "mxfp4"}},
    "mask of w": {"fprop": {"x": "mxfp4", "w": QUEST}},
    "masks, rotated": {"fprop": {"x": HAD, "w": HAD}, **VALUES},
    "masks, 16 rows": {"fprop": {"x": {**QUEST, "block": [32, 32]}, "w": {**QUEST, "block": [32, 32]}}},
    "slope of w": {
        "fprop": {"x": ROW, "w": {**ROW, "estimator": "dge"}},
        "dgrad": {"dy": SR8, "w": "dequant"},
        "wgrad": {"dy": SR8, "x": "dequant"},
    },
    "slope of both": {"fprop": {"x": {"format": "nvfp4", "estimator": "dge"}, "w": {"format": "nvfp4", "scale":
                      "four_over_six", "estimator": {"kind": "dge", "k": 3}}}, "wgrad": {"x": "dequant"}},
    "slope under signs": {"fprop": {"x": {"format": "nvfp4", "rotation": {"size": 16}}, "w": {"format": "nvfp4",
                          "estimator": "dge", "rotation": {"size": 16}}}},
    "lsq of both": {"fprop": {"x": LEARNED, "w": LEARNED}, **VALUES},
    "lsq, rotated": {"fprop": {"x": {**LEARNED, "rotation": {"size": 16}}, "w": {**LEARNED, "rotation": {"size": 16}}}},
}  # fmt: skip


def linear(name: str) -> LinearRecipe:
    return build(LinearRecipe, LINEARS[name])


def straight(recipe: LinearRecipe) -> LinearRecipe:
    """The same without estimators; a learned amax becomes the tensor's own, so pass it where it matters."""
    x, w = recipe.fprop.x, recipe.fprop.w
    assert x is not None
    assert w is not None
    return replace(
        recipe, fprop=replace(recipe.fprop, x=replace(x, estimator=Straight()), w=replace(w, estimator=Straight()))
    )


def scaled_by_definition(x: Tensor, q: BlockScaledTensor, rotation: Hadamard | None) -> Tensor:
    """Return x over the size of one step of the grid, fp64, by the values that codes 0 .. stand for."""
    basis = rotate(x.float(), rotation, KEY).double() if rotation else x.double()
    decoded = q.scales.double() if q.scales.dtype == torch.float32 else steps_of_bytes(q)
    tile = (basis.shape[0] // decoded.shape[0], basis.shape[1] // decoded.shape[1])
    outer = q.global_scale.double()
    return basis / (decoded.repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1) * outer)


def steps_of_bytes(q: BlockScaledTensor) -> Tensor:
    if q.format.scale.name == "e8m0":
        return torch.exp2(q.scales.double() - 127)
    return q.scales.view(torch.float8_e4m3fn).double()


KEY = Key(seed=7, layer=NUMBER, step=3, micro_batch=5)


def factor_by_definition(x: Tensor, name: str, which: str) -> Tensor:
    """fp64 factor in the rotated basis."""
    spec = getattr(linear(name).fprop, which)
    q = quantize(x, replace(spec, estimator=Straight()), replace(KEY, slot=which == "w"))
    u = scaled_by_definition(x, q, spec.rotation)
    top, levels = spec.format.element.max, torch.tensor(spec.format.element.levels, dtype=torch.float64)
    if spec.estimator.kind == "mask":
        return (u.abs() <= top * (1 + 1e-9)).double()
    if spec.estimator.kind == "straight":
        return torch.ones_like(u)
    magnitude = u.abs().clamp(max=top)
    index = (magnitude[..., None] >= levels[1:-1]).sum(-1)
    t = (2 * (magnitude - levels[index]) / (levels[index + 1] - levels[index]) - 1).abs()
    k = spec.estimator.k
    return torch.where(u.abs() <= top * (1 + 1e-6), (t ** (1 / k - 1) / k).clamp(max=spec.estimator.cap), 0.0)


def passed_by_definition(gradient: Tensor, factor: Tensor, rotation: Hadamard | None) -> Tensor:
    if rotation is None:
        return gradient.double() * factor
    there = rotate(gradient.float(), rotation, KEY) * rotation.size**-0.5
    return unrotate((there.double() * factor).float(), rotation, KEY).double()


# ---------- one linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in LINEARS if "lsq" not in name])
def test_gradients_are_those_of_straight_times_the_factor(name: str, dtype: torch.dtype) -> None:
    recipe = linear(name)
    x, w, _ = tensors(dtype)
    got, plain = run_linear(recipe, dtype=dtype), run_linear(straight(recipe), dtype=dtype)
    assert torch.equal(got.y, plain.y)
    for result, before, matrix, which in ((got.dx, plain.dx, x, "x"), (got.dw, plain.dw, w, "w")):
        assert result.dtype == dtype
        spec = getattr(recipe.fprop, which)
        expected = passed_by_definition(before, factor_by_definition(matrix, name, which), spec.rotation)
        rounding = 2.0**-7 if dtype == torch.bfloat16 else 1e-5
        slack = rounding * before.double().abs().amax() * (1 if spec.rotation else 0)
        # a slope's steep middle turns the last bit of u into more
        off = (result.double() - expected).abs() > rounding * expected.abs() + slack + 1e-4 * (
            spec.estimator.kind == "dge"
        )
        assert off.float().mean() < 2e-3
        assert torch.equal(result, before) == isinstance(spec.estimator, Straight)
    for slot in ("dgrad.dy", "wgrad.dy", "dgrad.w", "wgrad.x"):
        if slot in got.operands:
            a, b = got.operands[slot], plain.operands[slot]
            assert torch.equal(a, b) if isinstance(a, Tensor) else torch.equal(a.codes, b.codes)  # type: ignore[union-attr,arg-type]


def test_a_mask_stops_exactly_what_was_clipped() -> None:
    """Without rotation bits decide: 0 where |x| is beyond 6 steps, untouched elsewhere."""
    got, plain = run_linear(linear("mask of x")), run_linear(straight(linear("mask of x")))
    factor = factor_by_definition(tensors()[0], "mask of x", "x") != 0
    assert torch.equal(got.dx, torch.where(factor, plain.dx, 0.0))
    assert torch.equal(got.dw, plain.dw)
    assert 0.001 < (~factor).float().mean() < 0.2


@pytest.mark.parametrize("name", LINEARS)
def test_leading_dimensions_and_checkpoints_change_no_bit(name: str) -> None:
    whole = trained(name)
    deep = trained(name, shape=(4, TOKENS // 4))
    again = trained(name, recompute=True)
    for other in (deep, again):
        assert torch.equal(other.dx.reshape(whole.dx.shape), whole.dx)
        assert torch.equal(other.dw, whole.dw)


def trained(name: str, shape: tuple[int, ...] = (TOKENS,), recompute: bool = False) -> Result:
    """One pass with controls, where the recipe keeps something."""
    plan, _ = with_controls(linear(name))
    x, w, dy = tensors()
    x, w = x.reshape(*shape, INPUTS).requires_grad_(), w.requires_grad_()
    if recompute:
        y = checkpoint(lambda t: fp4_linear(t, w, plan, NoComm()), x, use_reentrant=False)
    else:
        y = fp4_linear(x, w, plan, NoComm())
    y.backward(dy.reshape(*shape, OUTPUTS))
    assert x.grad is not None
    assert w.grad is not None
    return Result(y.detach(), x.grad, w.grad, {})


def with_controls(recipe: LinearRecipe, comm: Any = None) -> tuple[LinearPlan, Controllers]:
    plan = make_plan(recipe)
    controllers = Controllers([ControlledLinear(plan.path, INPUTS, [recipe])], torch.device("cpu"))
    plan.controls = controllers.slots(plan.path, recipe, comm or NoComm())
    return plan, controllers


def test_what_is_kept_is_one_bit_an_element() -> None:
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    x, w, _ = tensors()
    with saved_tensors_hooks(keep, lambda t: t):
        fp4_linear(x.requires_grad_(), w.requires_grad_(), make_plan(linear("masks, rotated")), NoComm())
    codes = (TOKENS + OUTPUTS) * INPUTS * 17 // 32 + 8  # both forward codes for `dequant`: no master is kept
    scales_of_w = OUTPUTS * INPUTS // 32 + 4
    assert sum(t.numel() * t.element_size() for t in kept) == codes + TOKENS * INPUTS // 8 + scales_of_w


def test_a_frozen_side_needs_no_estimator() -> None:
    for name in ("masks, rotated", "lsq of both"):
        x, w, dy = tensors()
        whole = trained(name)
        plan, _ = with_controls(linear(name))
        fp4_linear(x.requires_grad_(), w, plan, NoComm()).backward(dy)
        assert torch.equal(x.grad, whole.dx)  # type: ignore[arg-type]
        plan, _ = with_controls(linear(name))
        if name == "lsq of both":  # nothing would train x's amax
            with pytest.raises(RecipeMismatch, match=r"fprop\.x: amax = learned is trained by"):
                fp4_linear(x.detach(), w.requires_grad_(), plan, NoComm())
            continue
        fp4_linear(x.detach(), w.requires_grad_(), plan, NoComm()).backward(dy)
        assert torch.equal(w.grad, whole.dw)  # type: ignore[arg-type]


def test_main_grad_gets_the_passed_gradient() -> None:
    x, w, dy = tensors()
    weight = torch.nn.Parameter(w)
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros_like(w), False  # type: ignore[attr-defined]
    recipe = build(LinearRecipe, {**LINEARS["slope of w"]})
    fp4_linear(x, weight, make_plan(recipe), NoComm()).backward(dy)
    assert torch.equal(weight.main_grad, run_linear(recipe).dw)  # type: ignore[arg-type]


# ---------- beside what was taken out


def ran(recipe: LinearRecipe, chosen: Tensor | None = None) -> Result:
    """Forward and backward on the fixed tensors, with these channels chosen."""
    plan, controllers = with_controls(recipe)
    for choice in controllers._choices.values():
        choice.chosen = chosen
    x, w, dy = (t.clone() for t in tensors())
    y = fp4_linear(x.requires_grad_(), w.requires_grad_(), plan, NoComm())
    y.backward(dy)
    assert x.grad is not None
    assert w.grad is not None
    return Result(y.detach(), x.grad, w.grad, {})


def test_what_is_clamped_and_compensated_passes_whole() -> None:
    """OCC's clamped elements stand beside the codes, so their slope is 1; the others' is that of the clamped row."""
    occ = {**ROW, "outlier": {"kind": "occ", "alpha": 0.95}}
    data = {"fprop": {"x": {**occ, "estimator": "dge"}, "w": ROW}}
    recipe, plain = build(LinearRecipe, data), ran(build(LinearRecipe, {"fprop": {"x": occ, "w": ROW}}))
    got, x = ran(recipe), tensors()[0]
    index = -(-95 * INPUTS // 100) - 1
    ordered = x.sort(dim=1).values
    low, high = ordered[:, INPUTS - 1 - index, None], ordered[:, index, None]
    beside = (x < low) | (x > high)
    assert 0.05 < beside.float().mean() < 0.15
    clamped = x.clamp(low, high)
    u = clamped / clamped.abs().amax(1, keepdim=True) * 6
    factor = torch.where(beside, 1.0, slope(u, E2M1, Dge()))
    assert torch.equal(got.y, plain.y)
    off = (got.dx - plain.dx * factor).abs() > 1e-3 * (plain.dx * factor).abs() + 1e-4
    assert off.float().mean() < 2e-3
    assert torch.equal(got.dx[beside], plain.dx[beside])


@pytest.mark.parametrize("rotation", [{}, {"rotation": {"size": 32, "signs": "none"}}])
def test_chosen_channels_pass_whole(rotation: dict[str, Any]) -> None:
    """In both operands, whose codes hold zeros there; the mask of the rest is that of these codes."""
    outlier = {"outlier": {"kind": "channels", "share": 0.1, "multiple": 1, "precision": "bf16"}}
    x_spec, w_spec = {**QUEST, **rotation, **outlier}, {**QUEST, **rotation}
    chosen = torch.zeros(INPUTS, dtype=torch.bool)
    chosen[[3, 40, 41, 90]] = True
    recipe = build(LinearRecipe, {"fprop": {"x": x_spec, "w": w_spec}})
    got, plain = ran(recipe, chosen), ran(straight(recipe), chosen)
    assert torch.equal(got.y, plain.y)
    for result, before, matrix in ((got.dx, plain.dx, tensors()[0]), (got.dw, plain.dw, tensors()[1])):
        assert torch.equal(result[:, chosen], before[:, chosen])
        spec = recipe.fprop.w
        assert spec is not None
        rest = torch.where(chosen, 0.0, matrix)
        u = scaled_by_definition(rest, quantize(rest, spec, KEY), spec.rotation)
        expected = passed_by_definition(before, (u.abs() <= 6).double(), spec.rotation)
        torch.testing.assert_close(result[:, ~chosen].double(), expected[:, ~chosen], rtol=1e-5, atol=1e-4)
        assert not torch.equal(result, before)


def test_the_hottest_channels_of_x_pass_whole() -> None:
    """Their rounding error is multiplied as well, so what fprop saw of them is x itself."""
    hot = {**QUEST, "outlier": {"kind": "hot_residual", "share": 0.1, "multiple": 1}}
    recipe = build(LinearRecipe, {"fprop": {"x": hot, "w": "mxfp4"}})
    chosen = torch.zeros(INPUTS, dtype=torch.bool)
    chosen[::16] = True
    got, plain = ran(recipe, chosen), ran(straight(recipe), chosen)
    factor = factor_by_definition(tensors()[0], "mask of x", "x") != 0
    assert torch.equal(got.dx, torch.where(factor | chosen, plain.dx, 0.0))
    assert not torch.equal(got.dx, torch.where(factor, plain.dx, 0.0))


# ---------- values of the forward codes


def test_dequant_multiplies_the_forwards_values() -> None:
    """Backward through the very matrices of the forward pass: the gradients of fp64 autograd on them."""
    recipe = straight(linear("masks, rotated"))
    result = run_linear(recipe)
    x, w, dy = tensors()
    assert recipe.fprop.x is not None
    rotation = recipe.fprop.x.rotation
    assert rotation is not None
    values = [unrotate(dequantize(quantize(m, recipe.fprop.x, KEY)), rotation, KEY).double() for m in (x, w)]  # type: ignore[arg-type]
    torch.testing.assert_close(result.dx.double(), dy.double() @ values[1], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(result.dw.double(), dy.double().t() @ values[0], atol=1e-4, rtol=1e-5)
    assert recipe.word("dgrad.w") == "dequant"
    assert make_plan(recipe).kind("dgrad") == "bf16"


def test_dequant_travels_as_codes() -> None:
    class Shards(NoComm):
        token_shard: Any = "x"
        size = 2
        split: Any = "O"

    recipe = build(LinearRecipe, {"fprop": {"x": "nvfp4", "w": "nvfp4"}, **VALUES})
    assert gather_words(recipe, Shards(), 512) == {"fprop.x": "packed", "wgrad.x": "packed"}


def test_the_table_names_it() -> None:
    row = plan_table(make_sites(1), load_recipe("quest_mxfp4")).to_json()["linears"][0]
    assert (row["slots"]["dgrad.w"], row["slots"]["wgrad.x"], row["slots"]["dgrad.dy"]) == (
        "dequant",
        "dequant",
        "bf16",
    )
    assert row["gemms"] == {"fprop": "fp4", "dgrad": "bf16", "wgrad": "bf16"}


# ---------- a learned amax


def test_a_learned_amax_gets_lsqs_gradient() -> None:
    """sum(dL/dQ * (r(u) - u, or the clip's sign * 7) * step), as LSQ has it, times amax / step / 7 for log(amax)."""
    x, w, dy = tensors()
    plan, controllers = with_controls(linear("lsq of both"))
    for step in range(2):  # in the first one the start is noted, in the second it is used
        plan.clock.step = step
        fp4_linear(x.requires_grad_(), w.requires_grad_(), plan, NoComm()).backward(dy)
        if step == 0:
            controllers.settle(step, lr=0.0)
    bank = next(iter(controllers._banks.values()))
    recipe = linear("lsq of both")
    found = dict(zip(bank.names, bank.gradient.tolist(), strict=True))
    amaxes = dict(zip(bank.names, bank.used.double().tolist(), strict=True))
    for slot, matrix, other in (("fprop.x", x, w), ("fprop.w", w, x)):
        name, spec = f"{plan.path} {slot}", recipe.slot(slot)
        assert spec is not None
        size = amaxes[name] / 7
        u = matrix.detach().double() / size
        clipped = u.abs() > 7
        assert 0.001 < clipped.double().mean() < 0.5
        direction = torch.where(clipped, u.sign() * 7, u.round() - u) * size
        side = f"{plan.path} {'fprop.w' if slot == 'fprop.x' else 'fprop.x'}"
        values = (other.detach().double() / (amaxes[side] / 7)).round().clamp(-7, 7) * (amaxes[side] / 7)
        gradient = dy.double() @ values if slot == "fprop.x" else dy.double().t() @ values
        assert found[name] == pytest.approx((gradient * direction).sum().item(), rel=1e-3)


def test_a_learned_amax_finds_the_clip_of_least_error() -> None:
    """Training nothing but the two amaxes on |Y - X W^T|^2, from one four times too wide, lowers the loss to that of
    the best pair of a grid search, within a tenth.
    """
    wide = {**LEARNED, "amax": {"kind": "learned", "start": 8.0}}
    plan, controllers = with_controls(build(LinearRecipe, {"fprop": {"x": wide, "w": wide}, **VALUES}))
    x, w, _ = tensors()
    exact, losses = x @ w.t(), []
    x, w = x.requires_grad_(), w.requires_grad_()
    for step in range(120):
        plan.clock.step = step
        y = fp4_linear(x, w, plan, NoComm())
        loss = (y - exact).square().mean()
        loss.backward()
        losses.append(loss.item())
        controllers.settle(step, lr=0.05)

    def error(clip: float) -> float:
        values = [(m.detach() / (clip / 7)).round().clamp(-7, 7) * (clip / 7) for m in (x, w)]
        return (values[0] @ values[1].t() - exact).square().mean().item()

    best = min(error(0.5 + 0.1 * i) for i in range(60))
    assert losses[1] > 4 * best
    assert losses[-1] < 1.1 * best


# ---------- moving averages


def ema_plan(cache: bool) -> LinearPlan:
    recipe = build(
        LinearRecipe, {"fprop": {"x": "mxfp4", "w": {"format": "mxfp4", "scale": "ceil", "rounding": "ema"}}}
    )
    return make_plan(recipe, Clock(seed=7, step=20, micro_batch=0, cache_weights=cache))


@pytest.mark.parametrize("cache", [False, True])
def test_weights_round_to_their_moving_average(cache: bool) -> None:
    plan = ema_plan(cache)
    spec = plan.recipe.fprop.w
    assert spec is not None
    x, w, _ = tensors()
    weight = w.clone().requires_grad_()
    average = w + 0.3 * normal(OUTPUTS, INPUTS, seed=9)

    def codes() -> Tensor:
        operand = plan.quantize_weight(weight, NoComm(), training=True)
        assert isinstance(operand, BlockScaledTensor)
        return operand.codes

    nearest, toward = quantize(w, spec).codes, quantize(w, spec, toward=average).codes
    assert torch.equal(codes(), nearest)  # nobody keeps an average yet: rounding to nearest
    plan.average, plan.clock.step = average, 21
    assert torch.equal(codes(), toward)
    assert not torch.equal(toward, nearest)
    y = fp4_linear(x, weight, plan, NoComm())
    values = dequantize(quantize(x, plan.recipe.fprop.x)) @ dequantize(quantize(w, spec, toward=average)).t()  # type: ignore[arg-type]
    torch.testing.assert_close(y.detach(), values, atol=1e-4, rtol=1e-5)
    plan.average, plan.clock.step = w, 22  # a new step: another average counts at once
    assert torch.equal(codes(), nearest)


def test_an_average_is_nothing_to_other_roundings() -> None:
    plan = make_plan(build(LinearRecipe, {"fprop": {"w": "nvfp4"}}))
    plan.average = normal(OUTPUTS, INPUTS)
    plan.quantize_weight(tensors()[1], NoComm(), training=True)


def test_a_weight_that_needs_more_than_its_codes_does_not_travel_as_codes() -> None:
    for w in ({**ROW, "estimator": "dge"}, {"format": "mxfp4", "rounding": "ema"}, LEARNED):
        recipe = build(LinearRecipe, {"fprop": {"x": "mxfp4", "w": w}, "dgrad": {"w": "dequant"}})
        assert why_whole(recipe) is not None


# ---------- experts


@pytest.mark.parametrize("name", LINEARS)
def test_grouped_experts_have_the_bits_of_each_alone(name: str) -> None:
    counts = [33, 0, 64, 7]
    outcomes = []
    for form in ("loop", "grouped"):
        plans = []
        for e in range(len(counts)):
            plan, controllers = with_controls(linear(name))
            plan.number, plans = 100 + e, [*plans, (plan, controllers)]
        x = normal(sum(counts), INPUTS, seed=1).requires_grad_()
        weights = [torch.nn.Parameter(normal(OUTPUTS, INPUTS, seed=10 + e)) for e in range(len(counts))]
        experts = [Expert(w, plan, NoComm()) for w, (plan, _) in zip(weights, plans, strict=True)]
        if form == "grouped":
            y = grouped_linear(x, experts, counts, TokenPart())
        else:
            y = torch.cat([expert_linear(r, e, TokenPart()) for r, e in zip(x.split(counts), experts, strict=True)])
        y.backward(normal(sum(counts), OUTPUTS, seed=2))
        gradients = [b.gradient for _, c in plans for b in c._banks.values()]
        outcomes.append([y.detach(), x.grad, *(w.grad for w in weights), *gradients])
    for a, b in zip(*outcomes, strict=True):
        assert torch.equal(a, b)  # type: ignore[arg-type]
    if "lsq" in name:
        assert any(bool(g.any()) for g in outcomes[0][2 + len(counts) :])


# ---------- tensor, sequence and context parallelism

SHARDED = ("mask of x", "masks, rotated", "slope of both", "slope of w", "lsq of both")


class Layer(torch.nn.Module):
    """A name for the one linear."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer


def sharded(layouts: list[tuple[int, int, bool]]) -> list[dict[str, Any]]:
    """Gradients of every layer kind, recipe and (tp, cp, sequence_parallel) on this rank, and of its learned amaxes."""
    found = []
    for tp, cp, sequence_parallel in layouts:
        with megatron_groups(tp, cp=cp) as ps:
            for kind in ("column", "row"):
                for name in SHARDED:
                    layer = make_layer(kind, sequence_parallel)
                    applied = apply(Layer(layer), linear(name), 512 // cp)
                    column = kind == "column"
                    x = normal(512, 128, seed=2).reshape(-1, BATCH, 128)
                    x = my_part(x, not column, column and sequence_parallel).requires_grad_()
                    y, _ = layer(x)
                    dy = normal(512, 256, seed=3).reshape(-1, BATCH, 256)
                    y.backward(my_part(dy, column, not column and sequence_parallel))
                    assert applied.controllers is not None
                    banks = [b.gradient for b in applied.controllers._banks.values()]
                    gradient = torch.cat(banks) if banks else torch.zeros(0)
                    dw = layer.weight.grad.clone()
                    if cp > 1:
                        torch.distributed.all_reduce(dw, group=ps.get_context_parallel_group())
                    torch.distributed.all_reduce(gradient)
                    gradient = gradient * (tp * cp) / torch.distributed.get_world_size()
                    found.append(
                        {"kind": kind, "name": name, "dx": x.grad, "dw": dw, "amax": gradient,
                         "tp": ps.get_tensor_model_parallel_rank(), "cp": ps.get_context_parallel_rank()}
                    )  # fmt: skip
    return found


@pytest.mark.distributed
def test_gradients_do_not_depend_on_the_split() -> None:
    layouts = [(2, 1, False), (2, 1, True), (1, 2, False)]
    whole = run_ranks(sharded, 1, [(1, 1, False)])[0]
    ranks = run_ranks(sharded, 2, layouts)
    for number, (_, cp, sequence_parallel) in enumerate(layouts):
        for i, one in enumerate(whole):
            parts = [rank[number * len(whole) + i] for rank in ranks]
            place = f"{one['kind']} {one['name']} {layouts[number]}"
            column = one["kind"] == "column"
            dw = parts[0]["dw"] if cp > 1 else torch.cat([p["dw"] for p in parts], 0 if column else 1)
            assert bool(one["amax"].all()) == ("lsq" in one["name"]) or one["amax"].numel() == 0
            torch.testing.assert_close(dw, one["dw"], rtol=1e-4, atol=1e-3, msg=f"{place} dw")
            torch.testing.assert_close(parts[0]["amax"], one["amax"], rtol=1e-4, atol=1e-2, msg=f"{place} amax")
            if cp > 1:
                pieces = torch.arange(256).chunk(4)
                dx = torch.empty_like(one["dx"])
                for part in parts:
                    dx[torch.cat((pieces[part["cp"]], pieces[3 - part["cp"]]))] = part["dx"]
            elif column:
                dx = torch.cat([p["dx"] for p in parts]) if sequence_parallel else parts[0]["dx"]
            else:
                dx = torch.cat([p["dx"] for p in parts], 2)
            torch.testing.assert_close(dx, one["dx"], rtol=1e-4, atol=1e-3, msg=f"{place} dx")
