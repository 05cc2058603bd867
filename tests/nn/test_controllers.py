"""State that scales and choices of channels keep between steps: trajectories, what counts, equality over ranks."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fp4dist.errors import CheckpointError, RecipeMismatch
from fp4dist.nn.apply import AppliedRecipe, apply_recipe
from fp4dist.nn.comm import NoComm
from fp4dist.nn.controllers import ControlledLinear, Controllers, SlotControl, chosen_columns
from fp4dist.nn.optimizer import attach_optimizer
from fp4dist.nn.plan import LinearPlan
from fp4dist.numerics import BlockScaledTensor, dequantize, quantize
from fp4dist.numerics.tensor import Key
from fp4dist.spec.build import build
from fp4dist.spec.recipe import Dgrad, Fprop, LinearRecipe, Phase, QuantSpec, Recipe, Rule, Wgrad
from fp4dist.spec.splits import Channels, HotResidual
from fp4dist.spec.statistics import GradScale, Hindsight, Hold, Statistic
from tests.distributed import megatron_groups, run_ranks
from tests.generators import normal
from tests.megatron.test_layers import (
    INPUTS,
    Case,
    Layout,
    Outcome,
    apply,
    assert_part_of,
    capture,
    make_layer,
    run_layer,
)
from tests.nn.one_linear import make_plan

PATH, SLOT, CPU = "layers.0.fc1", "dgrad.dy", torch.device("cpu")
RADIX4 = {"element": "radix4_even", "scale": "fp32", "block": "tensor"}
NVFP4 = build(QuantSpec, {"format": "nvfp4"})
UNEVEN = [1.0, 0.5, 3.0, 3.0, 40.0, 40.0, 0.02, 0.02, 0.02, 700.0, 0.0, 1.0]  # amaxes of steps


def make_spec(amax: Statistic, **data: Any) -> QuantSpec:
    return replace(build(QuantSpec, {"format": "nvfp4"} | data), amax=amax)


def controlled(spec: QuantSpec) -> tuple[LinearPlan, Controllers]:
    """A plan whose dY alone is quantized, with what it keeps."""
    recipe = LinearRecipe(dgrad=Dgrad(dy=spec))
    controllers = Controllers([ControlledLinear(PATH, 96, [recipe])], CPU)
    plan = make_plan(recipe)
    plan.controls = controllers.slots(PATH, recipe, NoComm())
    return plan, controllers


def of_amax(amax: float, seed: int = 0) -> Tensor:
    """[64, 64] whose largest magnitude is `amax`, exactly."""
    x = normal(64, 64, seed)
    return (x / x.abs().max()).clamp(-1, 1) * amax


def codes(plan: LinearPlan, x: Tensor) -> BlockScaledTensor:
    operand = plan.quantize(SLOT, x, NoComm())
    assert isinstance(operand, BlockScaledTensor)
    return operand


def assert_same(a: BlockScaledTensor, b: BlockScaledTensor) -> None:
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.scales, b.scales)
    assert torch.equal(a.global_scale, b.global_scale)


def by_amax(x: Tensor, spec: QuantSpec, amax: float) -> BlockScaledTensor:
    """The codes of `x` under an amax that is given, without any controller."""
    return quantize(x, spec, Key(), lambda v: v if v.dim() else torch.tensor(amax))


# -- statistics


def test_hold_serves_its_steps_and_looks_again() -> None:
    spec = make_spec(Hold(steps=3))
    plan, controllers = controlled(spec)
    # looks at steps 0, 3, 6, 9; step 10 has nothing but zeros
    used = [1.0, 1.0, 1.0, 1.0, 3.0, 3.0, 3.0, 0.02, 0.02, 0.02, 700.0, 700.0]
    for step, (amax, expected) in enumerate(zip(UNEVEN, used, strict=True)):
        x = of_amax(amax, step)
        assert_same(codes(plan, x), by_amax(x, spec, expected))
        controllers.settle(step)


def test_a_step_of_zeros_is_no_look() -> None:
    plan, controllers = controlled(make_spec(Hold(steps=1)))
    for step, (amax, kept) in enumerate(((2.0, 2.0), (0.0, 2.0), (5.0, 5.0))):
        codes(plan, of_amax(amax))
        controllers.settle(step)
        assert controllers.state_dict()["banks"][0]["amax"].item() == kept


def test_hindsight_is_the_average_of_the_steps_before() -> None:
    spec = make_spec(Hindsight(momentum=0.25))
    plan, controllers = controlled(spec)
    m = np.float32(0)
    for step, amax in enumerate(UNEVEN):
        x = of_amax(amax, step)
        assert_same(codes(plan, x), by_amax(x, spec, float(m) if step else amax))
        controllers.settle(step)
        if amax:
            m = np.float32(amax) if step == 0 else np.float32(0.75) * np.float32(amax) + np.float32(0.25) * m


def test_hindsight_at_four_fifths_of_the_maximum_is_biased_on_heavy_tails() -> None:
    """methods.md 3: signed LogN(0, 2) has conc-64 of 10 instead of 64."""
    luq = {"format": {"element": "log7", "scale": "fp32", "block": "tensor"}, "rounding": "stochastic"}
    spec = make_spec(Hindsight(momentum=0.0), **luq, allow_bias=True)
    x = normal(128, 256).sign() * torch.exp(2 * normal(128, 256, 1000))
    plan, controllers = controlled(spec)
    codes(plan, 0.8 * x)
    controllers.settle(0)
    total, single = torch.zeros(x.shape, dtype=torch.float64), 0.0
    for step in range(64):
        plan.clock.step = step
        values = dequantize(codes(plan, x)).double()
        single += (values - x).square().sum().item() / 64
        total += values
    assert single / (total / 64 - x).square().sum().item() == pytest.approx(10, abs=6)


def trajectory(amaxes: Sequence[float], level: float, start: float) -> list[float]:
    """S at the beginning of each step, and after the last: the published rule, m = max |S G|, in plain numbers."""
    s, found = start, [start]
    for amax in amaxes:
        m = s * amax
        if m:
            s = s / 2 if m > level else s * 2 if m <= level / 2 else s
        found.append(s)
    return found


@pytest.mark.parametrize("lookahead", [False, True])
def test_grad_scale_trajectory(lookahead: bool) -> None:
    """X is quantized as S x, clipped to the grid, and S follows the published rule from step to step."""
    amaxes = [1.0] * 8 + [1000.0] * 11 + [0.03, 0.0, 0.03, 64.0, 32.0]
    spec = make_spec(GradScale(level=64.0, lookahead=lookahead, start=1.0), format=RADIX4)
    grid = np.array([0.0, *(4.0**i for i in range(-3, 4))])
    scales = trajectory(amaxes, 64.0, 1.0)
    assert scales[6:9] == [64.0, 64.0, 64.0], "64 * 1 is at the level and stays"
    assert scales[19] == 2.0**-4, "1000 / 16 = 62.5 fits"
    plan, controllers = controlled(spec)
    for step, amax in enumerate(amaxes):
        x = of_amax(amax, step)
        q = codes(plan, x)
        s = scales[step + 1] if lookahead else scales[step]
        z = np.clip(x.double().numpy() * s, -64, 64)
        nearest = grid[np.abs(np.abs(z)[..., None] - grid).argmin(-1)] * np.sign(z)  # ties do not occur
        assert np.array_equal(dequantize(q).double().numpy() * s, nearest)
        controllers.settle(step)
        assert controllers.state_dict()["banks"][0]["scale"].item() == scales[step + 1]


@pytest.mark.parametrize("amax", [64.0, 64.001, 32.0, 32.001, 1e-8, 3e20, 0.7])
def test_grad_scale_starts_at_the_power_of_two_that_fits(amax: float) -> None:
    plan, controllers = controlled(make_spec(GradScale(level=64.0), format=RADIX4))
    x = of_amax(amax)
    q = codes(plan, x)
    controllers.settle(0)
    s = controllers.state_dict()["banks"][0]["scale"].item()
    assert np.log2(s) == round(np.log2(s))
    assert 32 < s * np.float32(x.abs().max().item()) <= 64
    assert q.scales.item() == 1 / s, "the first step has its own fit at once"


def test_both_phases_of_a_radix_4_pair_have_one_scale() -> None:
    even, odd = (make_spec(GradScale(), format=RADIX4 | {"element": f"radix4_{name}"}) for name in ("even", "odd"))
    recipe = LinearRecipe(dgrad=Dgrad(dy=even), wgrad=Wgrad(dy=odd))
    controllers = Controllers([ControlledLinear(PATH, 96, [recipe])], CPU)
    plan = make_plan(recipe)
    plan.controls = controllers.slots(PATH, recipe, NoComm())
    for step, amax in enumerate((3.0, 3.0, 500.0, 500.0, 500.0)):
        x = of_amax(amax)
        pair = [plan.quantize(slot, part, NoComm()) for slot, part in (("dgrad.dy", x), ("wgrad.dy", x.t()))]
        a, b = (p.scales.item() for p in pair if isinstance(p, BlockScaledTensor))
        assert a == b
        controllers.settle(step)


@pytest.mark.parametrize(
    ("amax", "asked"),
    [(Hold(steps=2), 1), (Hindsight(), 1), (GradScale(), 1), (GradScale(start=1.0), 0), (GradScale(lookahead=True), 6)],
)
def test_once_something_is_kept_no_rank_asks_for_a_maximum(amax: Statistic, asked: int) -> None:
    """Within a step; a rule that is applied to the present amax must have it. A NaN on one rank stays one."""
    block = {"format": RADIX4} if isinstance(amax, GradScale) else {}
    plan, controllers = controlled(make_spec(amax, **block))
    calls: list[float] = []

    def reduce_max(values: Tensor) -> Tensor:
        calls.append(values.item())
        return values

    for step in range(6):
        through = plan.controls[SLOT].through(reduce_max)
        assert through is not None
        assert through(torch.tensor(3.0)).isfinite()
        controllers.settle(step)
    assert len(calls) == asked
    through = plan.controls[SLOT].through(reduce_max)
    assert through is not None
    assert not through(torch.tensor(float("inf"))).isfinite()


# -- a learned amax


def learned() -> tuple[SlotControl, Controllers, QuantSpec]:
    data = {"format": {"element": "int4", "scale": "fp32", "block": "tensor"}, "amax": "learned", "estimator": "lsq"}
    spec = build(QuantSpec, data)
    recipe = LinearRecipe(fprop=Fprop(x=spec, w=NVFP4))
    controllers = Controllers([ControlledLinear(PATH, 96, [recipe])], CPU)
    return controllers.slots(PATH, recipe, NoComm())["fprop.x"], controllers, spec


def used_amax(control: SlotControl, x: Tensor, spec: QuantSpec) -> float:
    through = control.through(None, x, spec, Key())
    assert through is not None
    return through(x.abs().max()).item()


def test_a_learned_amax_starts_as_lsq_does_and_follows_adamw() -> None:
    """s0 = 2 mean |x| / sqrt(7) and amax = 7 s0; then torch's AdamW on its logarithm, whatever the gradient's unit."""
    control, controllers, spec = learned()
    x = normal(64, 96)
    start = 7 * 2 * x.double().abs().mean().item() / 7**0.5
    assert used_amax(control, x, spec) == pytest.approx(start, rel=1e-6)
    controllers.settle(0, lr=0.01)
    log_amax = torch.tensor(np.log(np.float32(start)), dtype=torch.float64, requires_grad=True)
    adamw = torch.optim.AdamW([log_amax], lr=0.01, betas=(0.9, 0.999), eps=0, weight_decay=0)
    for step, g in enumerate((1.0, 2.0, -0.5, 3.0), start=1):
        for part in (0.25, 0.75):  # micro-batches
            control.add_gradient(torch.tensor(1e-9 * g * part))
        controllers.settle(step, lr=0.01)
        log_amax.grad = torch.tensor(g, dtype=torch.float64)
        adamw.step()
        assert used_amax(control, 5 * x, spec) == pytest.approx(log_amax.exp().item(), rel=1e-6)


def test_a_learned_amax_needs_the_learning_rate_once_there_is_a_gradient() -> None:
    control, controllers, spec = learned()
    used_amax(control, normal(64, 96), spec)
    controllers.settle(0)
    controllers.settle(1)
    control.add_gradient(torch.tensor(1.0))
    with pytest.raises(RecipeMismatch, match=r"step 2: layers\.0\.fc1 fprop\.x.*settle\(lr="):
        controllers.settle(2)


def test_a_plain_loop_trains_an_amax_with_its_optimizer() -> None:
    """A start far beyond the values makes them all zero or one level: the loss wants a smaller amax."""
    data = {"format": {"element": "int4", "scale": "fp32", "block": "tensor"}, "estimator": "lsq"}
    spec = build(QuantSpec, data | {"amax": {"kind": "learned", "start": 20.0, "lr": 5.0}})
    recipe = Recipe(
        name="t", linears={"it": LinearRecipe(fprop=Fprop(x=spec, w=NVFP4))}, rules=(Rule(path="*", linear="it"),)
    )
    model = small_model()
    applied, x = apply_recipe(model, recipe), normal(64, 64).requires_grad_()  # its gradient passes the quantizer
    wanted = x.detach() @ next(model.parameters()).detach().t()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    attach_optimizer(applied, optimizer, 8)
    amaxes, losses = [], []
    for step in range(8):
        applied.set_step(step, 8)
        loss = (model(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        amaxes.append(applied.state_dict()["controllers"]["banks"][0]["log_amax"].item())
        losses.append(loss.item())
    assert amaxes == sorted(amaxes, reverse=True)
    assert amaxes[0] - amaxes[-1] == pytest.approx(7 * 0.05, abs=0.02), "7 steps of 5 * 0.01"
    assert losses[-1] < losses[0]


def test_a_gradient_that_is_not_finite_trains_nothing() -> None:
    control, controllers, spec = learned()
    before = used_amax(control, normal(64, 96), spec)
    controllers.settle(0, lr=0.1)
    control.add_gradient(torch.tensor(float("nan")))
    controllers.settle(1, lr=0.1)
    assert used_amax(control, normal(64, 96, 1), spec) == before


# -- what counts


def test_a_tensor_that_is_not_finite_decodes_to_nan_and_is_not_kept() -> None:
    for bad in (float("nan"), float("inf")):
        plan, controllers = controlled(make_spec(Hold(steps=1)))
        codes(plan, of_amax(2.0))
        controllers.settle(0)
        x = of_amax(3.0)
        x[5, 7] = bad
        assert dequantize(codes(plan, x)).isnan().all()
        controllers.settle(1)
        assert controllers.state_dict()["banks"][0]["amax"].item() == 2.0
        assert_same(codes(plan, of_amax(1.0)), by_amax(of_amax(1.0), make_spec(Hold(steps=1)), 2.0))


def test_a_settled_step_takes_nothing_more() -> None:
    plan, controllers = controlled(make_spec(Hold(steps=1)))
    codes(plan, of_amax(2.0))
    controllers.settle(0)
    codes(plan, of_amax(9.0))  # the step is traced again to explain a skip
    controllers.settle(0)
    codes(plan, of_amax(1.0))
    controllers.settle(1)
    assert controllers.state_dict()["banks"][0]["amax"].item() == 1.0


def small_model() -> nn.Sequential:
    linear = nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        linear.weight.copy_(normal(64, 64, 1))
    return nn.Sequential(linear)


def one_linear(spec: QuantSpec) -> tuple[nn.Sequential, AppliedRecipe]:
    model = small_model()
    linear = LinearRecipe(fprop=Fprop(x=spec, w=replace(NVFP4, amax=spec.amax)), dgrad=Dgrad(dy=spec))
    recipe = Recipe(name="test", linears={"it": linear}, rules=(Rule(path="*", linear="it"),))
    return model, apply_recipe(model, recipe)


def kept(applied: AppliedRecipe) -> dict[str, float]:
    bank = applied.state_dict()["controllers"]["banks"][0]
    return dict(zip(bank["names"], bank["amax"].tolist(), strict=True))


@pytest.mark.parametrize("recomputed", [False, True])
def test_training_passes_count_and_others_do_not(recomputed: bool) -> None:
    model, applied = one_linear(make_spec(Hold(steps=1)))
    applied.set_step(0, 10)
    with torch.no_grad():
        model(100 * of_amax(1.0))
    with applied.aside():
        model(50 * of_amax(1.0)).sum().backward()
    for micro_batch, amax in enumerate((1.0, 4.0, 2.0)):
        applied.set_step(0, 10, micro_batch)
        x = of_amax(amax).requires_grad_()
        y = checkpoint(model, x, use_reentrant=True) if recomputed else model(x)
        (y * amax).sum().backward()
    with torch.no_grad():
        model(100 * of_amax(1.0))
    applied.set_step(1, 10)  # settles
    weight = next(model.parameters()).abs().max().item()
    assert kept(applied) == {"0 fprop.x": 4.0, "0 fprop.w": weight, "0 dgrad.dy": 4.0}


def test_a_phase_keeps_what_both_its_linears_share() -> None:
    held, shorter = make_spec(Hold(steps=5)), make_spec(Hold(steps=2))
    linears = {
        name: LinearRecipe(fprop=Fprop(x=held, w=NVFP4), dgrad=Dgrad(dy=dy))
        for name, dy in (("first", held), ("second", shorter))
    }
    phase = Phase(name="later", use={"first": "second"}, step=2)
    recipe = Recipe(name="t", linears=linears, rules=(Rule(path="*", linear="first"),), phases=(phase,))
    model = small_model()
    applied = apply_recipe(model, recipe)
    for step, amax in enumerate((3.0, 7.0, 11.0, 13.0)):
        applied.set_step(step, 10)
        (model(of_amax(amax).requires_grad_()) * amax).sum().backward()
    applied.settle()
    kept_by = {
        (bank["block"].split("steps=")[1][0], name): amax.item()
        for bank in applied.state_dict()["controllers"]["banks"]
        for name, amax in zip(bank["names"], bank["amax"], strict=True)
    }
    assert kept_by == {("5", "0 fprop.x"): 3.0, ("5", "0 dgrad.dy"): 3.0, ("2", "0 dgrad.dy"): 11.0}


# -- channels


def test_how_many_channels() -> None:
    assert chosen_columns(Channels(share=0.1, multiple=128), 4096) == 512
    assert chosen_columns(Channels(share=0.1, multiple=16), 960) == 96
    assert chosen_columns(Channels(share=0.1, multiple=1), 30) == 3, "0.1 * 30 is not above 3"
    assert chosen_columns(Channels(share=0.9, multiple=128), 96) == 96


def chooser(block: Channels | HotResidual) -> tuple[SlotControl, Controllers]:
    spec = replace(NVFP4, outlier=block)
    recipe = LinearRecipe(fprop=Fprop(x=spec, w=NVFP4))
    controllers = Controllers([ControlledLinear(PATH, 64, [recipe])], CPU)
    return controllers.slots(PATH, recipe, NoComm())["fprop.x"], controllers


def chosen(control: SlotControl) -> list[int]:
    return [] if control.channels is None else control.channels.nonzero().flatten().tolist()


def with_hot(*columns: int) -> Tensor:
    x = normal(32, 64)
    x[:, list(columns)] *= 50
    return x


def test_channels_are_collected_after_a_step_and_chosen_once() -> None:
    """20 is hot in both collected steps, 2 and 3, and 30 in the louder one."""
    control, controllers = chooser(Channels(share=2 / 64, multiple=2, after=2, collect=2))
    hot = [(1, 2), (3, 4), (10, 20), (20, 30), (40, 50), (40, 50)]
    expected = [[], [], [], [], [20, 30], [20, 30]]
    for step, (columns, before) in enumerate(zip(hot, expected, strict=True)):
        assert chosen(control) == before
        controllers.enter(step)
        control.see_columns(with_hot(*columns) * (2 if step == 3 else 1), NoComm())
        controllers.settle(step)
    assert chosen(control) == [20, 30]


def test_hot_channels_are_chosen_anew() -> None:
    control, controllers = chooser(HotResidual(share=2 / 64, multiple=2, every=2))
    hot = [(1, 2), (3, 4), (5, 6), (7, 8), (9, 10)]
    expected = [[], [1, 2], [1, 2], [5, 6], [5, 6]]
    for step, (columns, before) in enumerate(zip(hot, expected, strict=True)):
        assert chosen(control) == before
        controllers.enter(step)
        control.see_columns(with_hot(*columns), NoComm())
        controllers.settle(step)
    assert chosen(control) == [9, 10]


def test_ties_go_to_the_first_and_silence_chooses_nothing() -> None:
    control, controllers = chooser(HotResidual(share=3 / 64, multiple=3, every=0))
    controllers.settle(0)
    assert control.channels is None
    controllers.enter(1)
    control.recording = False
    control.see_columns(with_hot(9), NoComm())
    control.recording = True
    control.see_columns(torch.ones(4, 64), NoComm())
    controllers.settle(1)
    assert chosen(control) == [0, 1, 2]


# -- saving


def test_state_goes_on_where_it_was() -> None:
    """Saved as plain data in the middle of everything, read into fresh controllers: the same from then on."""
    spec = replace(make_spec(Hindsight(momentum=0.5)), outlier=Channels(share=0.1, multiple=4, after=1, collect=3))
    scaled = make_spec(GradScale(), format=RADIX4)
    recipe = LinearRecipe(
        fprop=Fprop(x=spec, w=NVFP4), dgrad=Dgrad(dy=scaled), wgrad=Wgrad(dy=make_spec(Hold(steps=3)))
    )
    linears = [ControlledLinear(f"layers.{i}.fc1", 64, [recipe]) for i in range(2)]

    def steps(controllers: Controllers, first: int, last: int) -> list[Any]:
        for step in range(first, last):
            controllers.enter(step)
            for i, linear in enumerate(linears):
                for slot, control in controllers.slots(linear.path, recipe, NoComm()).items():
                    amax = (1 + step * (i + 1)) ** (2 if slot == "dgrad.dy" else 1)
                    through = control.through(None)
                    assert through is not None
                    through(torch.tensor(float(amax)))
                    control.see_columns(with_hot(step, 7 * i), NoComm())
            controllers.settle(step)
        controls = [controllers.slots(linear.path, recipe, NoComm())["fprop.x"] for linear in linears]
        return [controllers.state_dict(), *map(chosen, controls)]

    for split in (1, 3, 5):
        whole, first, second = (Controllers(linears, CPU) for _ in range(3))
        steps(first, 0, split)
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second.load_state_dict(torch.load(file, weights_only=True))
        expected = steps(whole, 0, 8)
        assert expected[1] != []
        assert_equal(steps(second, split, 8), expected)


def test_half_a_step_is_not_saved() -> None:
    model, applied = one_linear(make_spec(Hold(steps=1)))
    applied.set_step(0, 10)
    model(of_amax(1.0).requires_grad_()).sum().backward()
    with pytest.raises(RecipeMismatch, match=r"step 0 has been seen but not settled.*settle\(\)"):
        applied.state_dict()
    applied.settle()
    model(of_amax(1.0).requires_grad_()).sum().backward()  # the step again: dropped
    saved = applied.state_dict()
    again = one_linear(make_spec(Hold(steps=1)))[1]
    again.load_state_dict(saved)
    assert_equal(again.state_dict(), saved)


def test_another_recipes_state_is_refused() -> None:
    _, hold = controlled(make_spec(Hold(steps=3)))
    _, longer = controlled(make_spec(Hold(steps=4)))
    with pytest.raises(CheckpointError, match="not those of this recipe"):
        longer.load_state_dict(hold.state_dict())


def test_nothing_is_kept_where_nothing_is_asked_for() -> None:
    recipe = LinearRecipe(fprop=Fprop(x=NVFP4, w=NVFP4))
    controllers = Controllers([ControlledLinear(PATH, 96, [recipe])], CPU)
    assert controllers.is_empty
    assert controllers.slots(PATH, recipe, NoComm()) == {}


# -- ranks

KEPT = LinearRecipe(
    fprop=Fprop(x=make_spec(Hold(steps=2)), w=make_spec(Hindsight())),
    dgrad=Dgrad(dy=make_spec(GradScale(), format=RADIX4), w=make_spec(Hold(steps=1), block=[16, 16])),
    wgrad=Wgrad(dy=make_spec(Hold(steps=2)), x=make_spec(Hindsight())),
)
HOT = replace(KEPT, fprop=replace(KEPT.fprop, x=replace(NVFP4, outlier=HotResidual(share=0.25, multiple=4, every=1))))


def assert_equal(a: Any, b: Any) -> None:
    """Equal bit for bit, also inside lists and dictionaries."""
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        assert_equal(list(a.values()), list(b.values()))
    elif isinstance(a, list):
        assert len(a) == len(b)
        for p, q in zip(a, b, strict=True):
            assert_equal(p, q)
    else:
        assert a == b


LAYERS = [
    ("column", Layout(tp=2)),
    ("column", Layout(tp=2, sequence_parallel=True)),
    ("row", Layout(tp=2, sequence_parallel=True)),
    ("row", Layout(cp=2)),
]
LINEARS = {"statistics": KEPT, "channels": HOT}


def steps_of_layers(layers: list[tuple[str, Layout]]) -> list[tuple[Any, Outcome]]:
    """Of each layer under each of LINEARS: the state after three steps on this rank's part, the codes of the last."""
    found = []
    for kind, layout in layers:
        with megatron_groups(layout.tp, cp=layout.cp) as ps:
            for linear in LINEARS.values():
                layer = make_layer(kind, layout.sequence_parallel)
                applied = apply(layer, linear)
                captured = {}
                for step in range(3):
                    applied.set_step(step, 3)
                    captured = capture(layer) if step == 2 else {}
                    run_layer(layer, kind, layout.sequence_parallel, tokens=128 * (1 + step % 2))
                applied.settle()
                at = (ps.get_tensor_model_parallel_rank(), ps.get_context_parallel_rank())
                found.append((applied.state_dict()["controllers"], Outcome(at, captured, {}, {}, {})))
    return found


def test_split_layers_keep_and_multiply_what_one_rank_does() -> None:
    (wholes,) = run_ranks(steps_of_layers, 1, [(kind, Layout()) for kind, _ in LAYERS])
    ranks = run_ranks(steps_of_layers, 2, LAYERS)
    cases = [(kind, layout, name) for kind, layout in LAYERS for name in LINEARS]
    for i, (kind, layout, name) in enumerate(cases):
        state, whole = wholes[i]
        if name == "channels":
            assert state["choices"][0]["chosen"].sum() == INPUTS // 4
        else:
            assert all(bank.get("amax", bank.get("scale")).all() for bank in state["banks"])
        for others, part in (rank[i] for rank in ranks):
            assert_equal(others, state)
            assert_part_of(whole, part, Case(name, kind, 128), layout)


def replicas(batches: int) -> Any:
    """State after three steps of a linear whose samples this rank has a part of."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    spec = replace(make_spec(Hold(steps=2)), outlier=HotResidual(share=0.25, multiple=4, every=1))
    linear = LinearRecipe(fprop=Fprop(x=spec, w=NVFP4), dgrad=Dgrad(dy=make_spec(GradScale(), format=RADIX4)))
    model = small_model()
    recipe = Recipe(name="t", linears={"it": linear}, rules=(Rule(path="*", linear="it"),))
    applied = apply_recipe(model, recipe)
    for step in range(3):
        for i in range(batches // size):
            applied.set_step(step, 3, i)
            x = normal(64, 64, seed=10 * step + i * size + rank).requires_grad_()
            (model(x).square().mean() * (size / batches)).backward()
    applied.settle()
    return applied.state_dict()["controllers"]


def test_data_parallel_ranks_keep_what_one_process_does() -> None:
    """Also of gradients, which are those of the mean loss of the ranks' own samples."""
    (whole,) = run_ranks(replicas, 1, 4)
    assert whole["banks"][0]["amax"].item() > 0
    for state in run_ranks(replicas, 2, 4):
        assert_equal(state, whole)
