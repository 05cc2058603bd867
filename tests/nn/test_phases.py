"""Phases: who starts when, what each linear then runs, and the threshold of the gradient's noise."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

import pytest
import torch

from fp4dist.errors import ConfigError, RecipeMismatch
from fp4dist.nn.apply import AppliedRecipe, apply_recipe, plan_table
from fp4dist.nn.assign import assign
from fp4dist.nn.phases import Phases
from fp4dist.numerics import dequantize, quantize
from fp4dist.numerics.tensor import Key
from fp4dist.spec.build import build
from fp4dist.spec.phases import GradNoise, LrShape, Manual
from fp4dist.spec.recipe import Dgrad, Fprop, LinearRecipe, Phase, QuantSpec, Recipe, Rule, Wgrad
from fp4dist.spec.training import OptimizerState
from tests.generators import normal, spec
from tests.tiny_llama import TinyLlama, make_sites, make_tokens

X, SR = spec("nvfp4"), spec("nvfp4_sr")
FORWARD = LinearRecipe(fprop=Fprop(x=X, w=X))
FP4 = LinearRecipe(fprop=Fprop(x=X, w=X), dgrad=Dgrad(dy=SR, w=X), wgrad=Wgrad(dy=SR, x=SR))
WIDE = LinearRecipe(fprop=Fprop(x=spec("eden"), w=spec("eden")))  # its rotation needs multiples of 128
BLOCK = ("qkv", "proj", "fc1", "fc2")


def recipe(*phases: Phase, **fields: Any) -> Recipe:
    """FP4 in all blocks, and the other linears that the phases name."""
    named = {"fp4": FP4, "forward": FORWARD, "wide": WIDE}
    used = {"fp4"} | {n for p in phases for pair in p.use.items() for n in pair} | {
        r.linear for p in phases for r in p.assign
    }  # fmt: skip
    linears = {name: linear for name, linear in named.items() if name in used}
    return Recipe(name="r", linears=linears, rules=(Rule(roles=BLOCK, linear="fp4"),), phases=phases, **fields)


def phase(name: str = "p", **fields: Any) -> Phase:
    return Phase(name=name, **({"use": {"fp4": "forward"}} | fields))


def linears(applied: AppliedRecipe) -> dict[str, str]:
    """Last part of a linear's path -> what it runs."""
    return {row.site.path.rsplit(".", 1)[-1]: row.linear for row in applied.rows}


# -- starts


def test_who_runs_at_a_step() -> None:
    phases = Phases(recipe(phase("a", last=0.25), phase("b", step=3), phase("off", step=0, enabled=False)))
    assert phases.running() == [], "before the first step nobody knows the length of the run"
    running = []
    for step in (2, 3, 5, 6, 0):
        phases.enter(step, 8)
        running.append([(s.phase, s.step) for s in phases.running()])
    assert running == [[], [("b", 3)], [("b", 3)], [("a", 6), ("b", 3)], []]


def test_a_triggered_phase_runs_from_its_recorded_start_on() -> None:
    applied = apply_recipe(TinyLlama(1), recipe(phase(trigger=Manual())))
    assert applied.set_step(4, 9) == []
    (message,) = applied.start_phase("p", "a reason")
    assert message == "step 4: phase p starts (a reason), 33.3% of block-linear FLOPs in FP4"
    assert set(linears(applied).values()) == {"forward", "bf16"}
    with pytest.raises(ConfigError, match="phase p: it runs since step 4"):
        applied.start_phase("p")
    assert applied.set_step(3, 9) == []
    assert "forward" not in linears(applied).values(), "going back leaves the phase"

    again = apply_recipe(TinyLlama(1), recipe(phase(trigger=Manual())))
    again.load_state_dict(applied.state_dict())
    assert again.set_step(3, 9) == []
    assert "forward" not in linears(again).values()
    (message,) = again.set_step(7, 9)
    assert message == "step 7: phase p runs since step 4 (a reason), 33.3% of block-linear FLOPs in FP4"


def test_only_phases_that_wait_can_be_started() -> None:
    phases = Phases(recipe(phase("a", step=3), phase("b", trigger=Manual(), enabled=False)))
    for name in ("a", "b", "c"):
        with pytest.raises(ConfigError, match=rf"phase '{name}'.* recipe r has a \(step 3\); b \(enabled: false\)"):
            phases.trigger(name)


def test_state_of_phases_that_a_recipe_lacks_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    phases = Phases(recipe(phase(trigger=Manual())))
    phases.enter(2, 8)
    phases.trigger("p")
    other = Phases(recipe(phase(step=7)))
    with caplog.at_level(logging.INFO, "fp4dist"):
        other.load_state_dict(phases.state_dict())
    assert "phase p of the checkpoint is left out" in caplog.text
    other.enter(3, 8)
    assert other.running() == []


def test_the_running_phase_gives_the_dtypes_of_the_optimizers_state() -> None:
    half, eighth = OptimizerState(exp_avg="bf16"), OptimizerState(exp_avg="e4m3")
    changes = (phase("a", step=2, use={}, optimizer_state=eighth), phase("b", step=4))
    applied = apply_recipe(TinyLlama(1), recipe(*changes, optimizer_state=half))
    found = []
    for step in (0, 2, 5):
        applied.phases.enter(step, 8)
        found.append(applied.optimizer_state)
    assert found == [half, eighth, eighth]


def test_a_learning_rate_that_nobody_asks_for_is_refused() -> None:
    asked = recipe(phase(step=2, use={}, lr=LrShape(warmup=2, begin="current", peak=2.0, decay="linear")))
    applied = apply_recipe(TinyLlama(1), asked)
    applied.set_step(2, 6)
    with pytest.raises(RecipeMismatch, match=r"phase p has a learning rate of its own, and nobody asks for it"):
        applied.set_step(3, 6)
    follows = apply_recipe(TinyLlama(1), asked)
    rates = []
    for step in range(6):
        follows.set_step(step, 6)
        rates.append(follows.phases.rate(step + 1, 6, lambda step: 1 - step / 6))
    assert rates == pytest.approx([5 / 6, 4 / 6, 8 / 6, 2.0, 1.0, 0.0])


# -- the gradient's noise


def test_the_average_of_the_measurements_decides() -> None:
    noise = GradNoise(below=2.0, every=3, after=2, momentum=0.5)
    phases = Phases(recipe(phase(trigger=noise)))
    due, ratios = [], iter([4.0, 3.0, math.inf, 1.0, 1.0])
    for step in range(15):
        phases.enter(step, 20)
        if phases.measuring():
            due.append(step)
            started = phases.measured(next(ratios))
    assert due == [2, 5, 8, 11, 14], "from `after` on, every `every` steps"
    assert phases.state_dict()["averages"] == {"p": 1.625}, "4, 3.5, (none), 2.25, 1.625"
    assert [(s.phase, s.step) for s in started] == [("p", 14)]
    assert started[0].reason == "gradient 1.625 times its quantization noise, under 2"
    phases.enter(17, 20)
    assert phases.measuring() == [], "it has started"


def test_averages_go_on_after_a_checkpoint() -> None:
    def run(resume_at: int | None) -> dict[str, Any]:
        phases = Phases(recipe(phase(trigger=GradNoise(every=2, below=1.0))))
        for step in range(8):
            if step == resume_at:
                state, phases = phases.state_dict(), Phases(recipe(phase(trigger=GradNoise(every=2, below=1.0))))
                phases.load_state_dict(state)
            phases.enter(step, 20)
            if phases.measuring():
                phases.measured(2.0 + 1 / (1 + step))
        return phases.state_dict()

    assert run(3) == run(4) == run(None)


def test_nobody_may_forget_to_measure() -> None:
    applied = apply_recipe(TinyLlama(1), recipe(phase(trigger=GradNoise(after=1, every=2))))
    applied.set_step(0, 9)
    assert not applied.measures_noise
    applied.set_step(1, 9, micro_batch=0)
    applied.set_step(1, 9, micro_batch=1)
    assert applied.measures_noise
    with pytest.raises(RecipeMismatch, match=r"phase p waits for the gradient's noise, .* at step 1: call"):
        applied.set_step(2, 9)
    applied.set_step(1, 9)
    assert applied.observe_noise(2.0) == []
    assert not applied.measures_noise
    applied.set_step(1, 9)  # a skipped step is looked at again
    applied.set_step(3, 9)
    assert applied.observe_noise(-9.0)[0].startswith("step 3: phase p starts (gradient 0.900 times")
    applied.set_step(4, 9)


def test_noise_without_quantized_gradients_is_refused() -> None:
    rules = (Rule(roles=BLOCK, linear="forward"),)
    with pytest.raises(ValueError, match=r"phase 'p' waits for the gradient's noise .* no linear quantizes a backward"):
        Recipe(
            name="r", linears={"forward": FORWARD}, rules=rules,
            phases=(Phase(name="p", use={"forward": "bf16"}, trigger=GradNoise()),),
        )  # fmt: skip


def descent(theta: torch.Tensor, noise: torch.Tensor) -> float:
    """(L(theta) - L(after)) / L(theta) of L = |theta|^2 / 2 after the best expected step along theta + noise."""
    square, disturbance = theta.square().sum(), noise.square().sum()
    eta = square / (square + disturbance)
    return float(1 - (theta - eta * (theta + noise)).square().sum() / square)


@pytest.mark.parametrize(("k", "published", "switches"), [(0.5, 0.9230, False), (1.0, 0.750, None), (2.0, 0.427, True)])
def test_descent_at_the_threshold_of_sqrt_3(k: float, published: float, switches: bool | None) -> None:
    """methods.md 4: noise of k |g| / sqrt(3 d) a coordinate leaves 1 / (1 + k^2 / 3) of the descent, and k = 1 is
    where the ratio falls under sqrt 3. d = 2e4; the published values are one draw's.
    """
    d, generator = 20_000, torch.Generator().manual_seed(0)
    theta = torch.randn(d, generator=generator, dtype=torch.float64)
    fractions, ratios = [], []
    for _ in range(64):
        sigma = k * theta.norm() / math.sqrt(3 * d)
        noise = sigma * torch.randn(d, generator=generator, dtype=torch.float64)
        fractions.append(descent(theta, noise))
        ratios.append(float(theta.norm() / noise.norm()))
    mean, error = torch.tensor(fractions).mean().item(), torch.tensor(fractions).std().item()
    assert mean == pytest.approx(1 / (1 + k * k / 3), abs=4 * error / 8)
    assert published == pytest.approx(mean, abs=4 * error)
    assert ratios[0] == pytest.approx(math.sqrt(3) / k, rel=0.03)
    if switches is not None:
        phases = Phases(recipe(phase(trigger=GradNoise(every=1))))
        phases.enter(0, 1)
        assert bool(phases.measured(ratios[0])) == switches


def test_descent_follows_the_ratio_of_a_real_quantizer() -> None:
    """Stochastic rounding is unbiased, so a measured r predicts the descent that is left: 1 / (1 + 1 / r^2)."""
    left = {}
    for name in ("nvfp4_sr", "mxfp4_34_sr"):
        quantizer = spec(name)
        theta = normal(128, 160).double()
        found, predicted = [], []
        for draw in range(16):
            codes = quantize(theta.float(), quantizer, Key(seed=draw), None)
            noise = dequantize(codes).double() - theta
            found.append(descent(theta, noise))
            predicted.append(1 / (1 + float(noise.square().sum() / theta.square().sum())))
        left[name] = sum(found) / 16
        error = float(torch.tensor(found).std()) / 4
        assert left[name] == pytest.approx(sum(predicted) / 16, abs=4 * error)
    assert left["mxfp4_34_sr"] < left["nvfp4_sr"] < 0.99


# -- which linear runs what


def test_rules_of_a_phase_come_before_the_recipes_own_and_later_phases_win() -> None:
    first = phase("a", step=1, use={}, assign=(Rule(roles=("fc2",), linear="bf16"), Rule(path="*", linear="forward")))
    second = phase("b", step=2, use={"forward": "fp4", "fp4": "bf16"}, assign=(Rule(roles=("qkv",), linear="forward"),))
    applied = apply_recipe(TinyLlama(1), recipe(first, second))
    whys = []
    expected = {
        0: {"q_proj": "fp4", "o_proj": "fp4", "down_proj": "fp4", "lm_head": "bf16"},
        1: {"q_proj": "forward", "o_proj": "forward", "down_proj": "bf16", "lm_head": "forward"},
        # b's rule decides over b's `use`, which turns what a's rules have given
        2: {"q_proj": "forward", "o_proj": "fp4", "down_proj": "bf16", "lm_head": "fp4"},
    }
    for step, wanted in expected.items():
        applied.set_step(step, 3)
        found = linears(applied)
        assert {name: found[name] for name in wanted} == wanted, step
        whys.append(next(row.why for row in applied.rows if row.site.path.endswith("q_proj")))
        applied.reset_counts()
        model_step(applied)
        applied.check_counts()
    table = apply_recipe(TinyLlama(1), recipe(first, second)).table()
    turned = ("fp4 -> forward (6 linears)", "fp4 -> bf16 (1 linears)", "bf16 -> forward (1 linears)")
    assert f"  phase a (step 1): {', '.join(turned)}" in table
    assert "  phase b (step 2): fp4 -> forward (3 linears), fp4 -> bf16 (4 linears)" in table
    assert whys[0] == "rule 0: qkv/proj/fc1/fc2"
    assert whys[1:] == ["phase a, rule 1: path *", "phase b, rule 0: qkv"]


def test_variants_of_a_site_are_what_it_can_come_to_run() -> None:
    wide = phase("a", step=1, use={}, assign=(Rule(roles=("fc1",), linear="wide"),))
    off = phase("off", step=1, use={"fp4": "bf16"}, enabled=False)
    turned = phase("c", step=3, use={"wide": "forward"})
    rows = {row.site.path.split(".")[-1]: row for row in assign(make_sites(1), recipe(wide, off, turned)).rows}
    asked = recipe(wide, off, turned)
    assert rows["up_proj"].variants(asked) == [FP4, WIDE, FORWARD]
    assert rows["o_proj"].variants(asked) == [FP4]
    assert rows["lm_head"].variants(asked) == [LinearRecipe()]


def test_a_phases_rule_is_checked_where_it_reaches_and_nowhere_else() -> None:
    """128 input features of fc1 divide by the rotation of 128, the 64 of fc2 do not."""

    def reaching(role: str) -> Recipe:
        return recipe(phase(step=5, use={}, assign=(Rule(roles=(role,), linear="wide"),)))  # type: ignore[arg-type]

    model = TinyLlama(1, hidden=128, inner=64)
    applied = apply_recipe(model, reaching("fc1"))
    applied.set_step(5, 6)
    assert linears(applied)["up_proj"] == "wide"
    with pytest.raises(RecipeMismatch, match=r"down_proj fprop.x: input features = 64 is not a multiple of 128"):
        apply_recipe(TinyLlama(1, hidden=128, inner=64), reaching("fc2"))
    sites = [row.site for row in applied.rows]
    assert plan_table(sites, reaching("fc1")).rows
    with pytest.raises(RecipeMismatch, match=r"down_proj fprop.x"):
        plan_table(sites, reaching("fc2"))


def test_a_phases_rule_that_matches_nothing_is_refused() -> None:
    wrong = recipe(phase(step=5, use={}, assign=(Rule(path="*.nowhere", linear="fp4"),)))
    with pytest.raises(RecipeMismatch, match=r"phase p, rule 0 \(path \*.nowhere\) matches no linear"):
        apply_recipe(TinyLlama(1), wrong)


def test_quantization_may_begin_with_a_phase() -> None:
    rules = (Rule(roles=BLOCK, linear="bf16"),)
    late = Phase(name="p", step=1, assign=(Rule(roles=("fc1",), linear="fp4"),))
    asked = Recipe(name="r", linears={"fp4": FP4}, rules=rules, phases=(late,))
    assert asked.wants_fp4
    assert not dataclasses.replace(asked, linears={}, phases=()).wants_fp4
    applied = apply_recipe(TinyLlama(1), asked)
    applied.set_step(1, 2)
    applied.reset_counts()
    model_step(applied)
    applied.check_counts()
    assert applied.counts()["calls"]["fp4"] == 2 * 3


def test_a_phase_without_quantizers_of_its_own_builds_no_plans() -> None:
    applied = apply_recipe(TinyLlama(1), recipe(phase(step=1, use={}, lr=LrShape())))
    before = [target.module.plan for target in applied.targets]
    assert len(applied.set_step(1, 2)) == 1
    assert all(a is t.module.plan for a, t in zip(before, applied.targets, strict=True))
    assert applied.before == ()


# -- passes aside


def model_step(applied: AppliedRecipe) -> torch.Tensor:
    """Gradients of one pass through the model that `applied` belongs to, flat."""
    model = applied.chunks[0][0]
    model.zero_grad()
    model(make_tokens()).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


PARTED = LinearRecipe(
    fprop=Fprop(
        x=build(QuantSpec, {"format": "nvfp4", "outlier": {"kind": "occ"}}),
        w=build(QuantSpec, {"format": "mxfp4", "scale": {"kind": "quest"}, "estimator": "mask"}),
    ),
    dgrad=Dgrad(dy=SR, w="dequant"),
    wgrad=Wgrad(dy=build(QuantSpec, {"format": "nvfp4", "split": {"kind": "mean"}}), x="dequant"),
)


@pytest.mark.parametrize("linear", [FP4, PARTED])
def test_a_pass_aside_repeats_forward_and_noise_and_is_not_counted(linear: LinearRecipe) -> None:
    def applied(linear: LinearRecipe) -> AppliedRecipe:
        rules = (Rule(roles=BLOCK, linear="it"),)
        return apply_recipe(TinyLlama(1), Recipe(name="r", linears={"it": linear}, rules=rules), seed=5)

    fresh, rest = applied(linear), applied(linear.with_high_precision_backward())
    wanted, high = model_step(fresh), model_step(rest)
    counts, plans = fresh.counts(), [t.module.plan for t in fresh.targets]
    with fresh.aside():
        assert torch.equal(model_step(fresh), wanted)
    with fresh.aside(high_precision_backward=True):
        assert torch.equal(model_step(fresh), high)
    assert not torch.equal(wanted, high)
    assert fresh.counts() == counts
    assert all(a is t.module.plan for a, t in zip(plans, fresh.targets, strict=True))
    assert torch.equal(model_step(fresh), wanted)
    assert len(fresh.noisy_weights()) == 7
    assert rest.noisy_weights() == []
