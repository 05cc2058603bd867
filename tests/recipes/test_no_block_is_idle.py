"""Every block of every shipped recipe, replaced by its default, changes codes, scales, gradients or weights.

Blocks that act within one step are removed from one linear; those that keep something from step to step, or act around
the optimizer's step, from a short training run with time constants to match.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fp4dist.nn.plan import Operand
from fp4dist.numerics.tensor import pack
from fp4dist.spec.blocks import Ceil, Eden, Ema, Nearest, Stochastic
from fp4dist.spec.estimators import Straight
from fp4dist.spec.load import load_recipe, shipped
from fp4dist.spec.recipe import GEMMS, SLOTS, LinearRecipe, Phase, QuantSpec, Recipe
from fp4dist.spec.splits import Channels, HotResidual
from fp4dist.spec.statistics import Current
from tests.generators import normal
from tests.nn.one_linear import OUTPUTS, TOKENS, Result, run_linear
from tests.recipes.training import STEPS, Run, fast_recipe, go_on, start, train, trained

NAMES = shipped("recipes")
LINEARS: dict[str, LinearRecipe] = {
    f"{name}:{key}": linear for name in NAMES for key, linear in load_recipe(name).linears.items()
}
REUSERS = {"fprop.w": "dgrad.w", "fprop.x": "wgrad.x"}
INPUTS = 256  # every shipped block and rotation divides it


# ---------- one step of one linear


def without_rotation(linear: LinearRecipe, gemm: str) -> LinearRecipe:
    """Both operands change at once: one without the other is refused."""
    changed = {}
    for slot in SLOTS:
        spec = linear.slot(slot)
        if slot.startswith(gemm) and spec is not None:
            own = isinstance(spec.rounding, Eden)  # its correction cannot be shared in a rotation that is not there
            rounding = replace(spec.rounding, group="block") if own else spec.rounding
            changed[slot.split(".")[1]] = replace(spec, rotation=None, allow_bias=True, rounding=rounding)
    return replace(linear, **{gemm: replace(getattr(linear, gemm), **changed)})


def edited(linear: LinearRecipe, slots: tuple[str, ...], **changes: Any) -> LinearRecipe:
    """`linear` with fields of `slots` replaced in one construction: reused codes repeat the forward's spec."""
    changed: dict[str, dict[str, QuantSpec]] = {}
    for slot in dict.fromkeys(slots):
        gemm, name = slot.split(".")
        spec = linear.slot(slot)
        assert spec is not None
        source = spec.source if spec.source == "master" else changes.get("source", spec.source)
        changed.setdefault(gemm, {})[name] = replace(spec, **{**changes, "source": source})
    return replace(linear, **{gemm: replace(getattr(linear, gemm), **specs) for gemm, specs in changed.items()})


def with_reuser(linear: LinearRecipe, slot: str) -> tuple[str, ...]:
    """`slot`, and the slot that reads its codes."""
    reuser = linear.slot(REUSERS.get(slot, slot))
    return (slot, REUSERS[slot]) if slot in REUSERS and reuser and reuser.source == "reuse" else (slot,)


def stateful(spec: QuantSpec) -> bool:
    """Whether a block of the operand acts from a later step on."""
    return isinstance(spec.outlier, Channels | HotResidual) or not isinstance(spec.amax, Current)


def ablations(linear: LinearRecipe) -> Iterator[tuple[str, str, LinearRecipe]]:
    """(what is removed, the GEMM whose result it decides, the recipe without it) for each block of one step."""
    for gemm in GEMMS:
        specs = {s: linear.slot(s) for s in SLOTS if s.startswith(gemm)}
        if any(spec and spec.rotation for spec in specs.values()):
            yield f"{gemm} rotation", gemm, without_rotation(linear, gemm)
        for slot, spec in specs.items():
            if linear.dequantized(slot):
                operands = replace(getattr(linear, gemm), **{slot.split(".")[1]: None})
                yield f"{slot} dequant", gemm, replace(linear, **{gemm: operands})
            if spec is not None and spec.source != "reuse":  # reused codes are the forward's: they are ablated there
                yield from operand_ablations(linear, slot, spec)


def operand_ablations(linear: LinearRecipe, slot: str, spec: QuantSpec) -> Iterator[tuple[str, str, LinearRecipe]]:
    gemm, both = slot.split(".")[0], with_reuser(linear, slot)
    if spec.source == "requant":
        yield f"{slot} source", gemm, edited(linear, (slot,), source="master")
    if not isinstance(spec.rounding, Nearest | Ema) or spec.rounding == Nearest(ties="up"):
        yield f"{slot} rounding", gemm, edited(linear, both, rounding=Nearest())
    if spec.samples > 1:
        yield f"{slot} samples", gemm, edited(linear, (slot,), rounding=Stochastic())
    if spec.split is not None:
        yield f"{slot} split", gemm, edited(linear, both, split=None)
    if spec.outlier is not None and not stateful(spec):
        yield f"{slot} outlier", gemm, edited(linear, both, outlier=None)
    if not isinstance(spec.estimator, Straight):  # of x it decides dX, of w it decides dW
        decides = "dgrad" if slot == "fprop.x" else "wgrad"
        yield f"{slot} estimator", decides, edited(linear, both, estimator=Straight())
    if spec.outer is not None:
        yield f"{slot} outer", gemm, edited(linear, both, outer=None)
    if spec.block is not None and spec.block != spec.format.block:
        yield f"{slot} block", gemm, edited(linear, both, block=None, source="master")
    # Amax of forward values is 1 or 1.5 times a power of two: floor and ceil take the same scale for them.
    on_grid = spec.source == "requant" and isinstance(spec.rule, Ceil)
    if spec.scale is not None and not on_grid and spec.rule != replace(spec, scale=None, allow_bias=True).rule:
        bias = isinstance(spec.rounding, Stochastic)
        yield f"{slot} scale", gemm, edited(linear, both, scale=None, allow_bias=bias, estimator=Straight())


CASES = [(name, what) for name, linear in LINEARS.items() for what, _, _ in ablations(linear)]


def data(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """(x [T, I], w [O, I], dy [T, O]).

    normal   N(0, 1)
    wide     some rows and columns are so small that the scales of their blocks round to 0
    ties     values halfway between two codes of a power-of-two scale
    """
    shapes = ((TOKENS, INPUTS), (OUTPUTS, INPUTS), (TOKENS, OUTPUTS))
    x, w, dy = (normal(*shape, seed=i) for i, shape in enumerate(shapes))
    if kind == "wide":  # at places of their own, so that what is small here meets something of the usual size there
        for i, t in enumerate((x, w, dy)):
            for start_at, factor in ((32 * i, 4e-9), (32 * i + 16, 1e-6)):
                t[start_at : start_at + 16] *= factor
                t[:, start_at : start_at + 16] *= factor
    if kind == "ties":
        x, w, dy = ((t * 4).round() / 4 + (t > 3) * 5 for t in (x, w, dy))
    return x, w, dy


def tensors_of(operand: Operand) -> list[Tensor]:
    return [operand] if isinstance(operand, Tensor) else pack(operand)[0]


def differs(a: Result, b: Result, gemm: str) -> bool:
    """Whether the GEMM's result changed, and with it something that the linear computes with."""
    results = [r.tensors()[GEMMS.index(gemm)] for r in (a, b)]
    return not torch.equal(*results)


@pytest.mark.parametrize(("name", "what"), CASES)
def test_no_block_of_a_linear_is_idle(name: str, what: str) -> None:
    linear = LINEARS[name]
    gemm, without = next((gemm, changed) for found, gemm, changed in ablations(linear) if found == what)
    assert without != linear
    kinds = ("normal", "wide", "ties")
    assert any(differs(run_linear(linear, data=d), run_linear(without, data=d), gemm) for d in map(data, kinds))


def test_the_ablations_cover_the_published_ingredients() -> None:
    removed = {what for name, what in CASES if name == "nvidia_nvfp4:fp4"}
    assert removed == {
        "wgrad rotation", "dgrad.dy rounding", "dgrad.dy scale", "wgrad.dy rounding", "wgrad.dy scale", "fprop.w block",
    }  # fmt: skip
    assert len({what for name, what in CASES if name == "quartet2:fp4"}) == 2 + 4 + 2 + 2
    assert {what for name, what in CASES if name == "wang2501:fp4"} == {
        "fprop.x outlier", "fprop.w estimator", "dgrad.w dequant", "wgrad.x dequant",
    }  # fmt: skip


# ---------- a short training run


def training_ablations(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """(what is removed, the recipe without it) for blocks that outlast a step or act around the optimizer's."""
    for key, linear in recipe.linears.items():
        for what, changed in stateful_ablations(linear):
            yield f"{key} {what}", replace(recipe, linears={**recipe.linears, key: changed})
    for name in ("gradients", "weights"):
        blocks = getattr(recipe, name)
        for i, block in enumerate(blocks):
            yield f"{name} {block.kind}", replace(recipe, **{name: (*blocks[:i], *blocks[i + 1 :])})
    if recipe.optimizer_state is not None:
        state = recipe.optimizer_state
        for f in (f for f in fields(state) if getattr(state, f.name) != f.default):
            yield f"optimizer_state {f.name}", replace(recipe, optimizer_state=replace(state, **{f.name: f.default}))


def stateful_ablations(linear: LinearRecipe) -> Iterator[tuple[str, LinearRecipe]]:
    for slot in SLOTS:
        spec = linear.slot(slot)
        if spec is None or spec.source == "reuse":
            continue
        both = with_reuser(linear, slot)
        if not isinstance(spec.amax, Current):
            yield f"{slot} amax", edited(linear, both, amax=Current())
        if isinstance(spec.rounding, Ema):
            yield f"{slot} rounding", edited(linear, both, rounding=Nearest())
        if isinstance(spec.outlier, Channels | HotResidual):
            chooser = (other := linear.slot("wgrad.x")) is not None and slot == "fprop.x" and other.outlier is not None
            yield f"{slot} outlier", edited(linear, (slot, "wgrad.x") if chooser else (slot,), outlier=None)


TRAINING_CASES = [(name, what) for name in NAMES for what, _ in training_ablations(load_recipe(name))]
PHASES = [(name, phase.name) for name in NAMES for phase in load_recipe(name).phases]


@pytest.mark.parametrize(("name", "what"), TRAINING_CASES)
def test_no_block_of_training_is_idle(name: str, what: str) -> None:
    recipe = fast_recipe(name)
    without = dict(training_ablations(recipe))[what]
    assert without != recipe
    full, ablated = trained(name)[1], train(without).weights()
    assert not all(torch.equal(a, b) for a, b in zip(full, ablated, strict=True))


def with_phase(recipe: Recipe, name: str, **changes: Any) -> Recipe:
    """`recipe` with that phase switched on; a published share of the run, shorter than a step here, becomes 0.4."""

    def changed(p: Phase) -> Phase:
        return replace(p, enabled=True, last=0.4 if p.last is not None else None, **changes) if p.name == name else p

    return replace(recipe, phases=tuple(map(changed, recipe.phases)))


BEGIN = round(0.6 * STEPS)


def train_with_phase(recipe: Recipe) -> Run:
    """A whole run; a phase that waits for noisy gradients gets them at step BEGIN."""
    return go_on(start(recipe), 0, STEPS, ratio=lambda step: 0.1 if step >= BEGIN else 1.8)


@pytest.mark.parametrize(("name", "phase"), PHASES)
def test_no_phase_is_idle(name: str, phase: str) -> None:
    """Switched on, a published phase changes what comes after its start and nothing before; so does each part of it."""
    recipe = fast_recipe(name)
    run, (losses, weights) = train_with_phase(with_phase(recipe, phase)), trained(name)
    assert phase in run.applied.active
    assert run.losses[:BEGIN] == losses[:BEGIN]
    assert not all(torch.equal(a, b) for a, b in zip(run.weights(), weights, strict=True))
    for part, default in (("use", {}), ("lr", None)):
        own = next(p for p in recipe.phases if p.name == phase)
        others = own.lr is not None if part == "use" else bool(own.use)
        if getattr(own, part) != default and others:
            without = train_with_phase(with_phase(replace_unused(recipe, part), phase, **{part: default}))
            assert not all(torch.equal(a, b) for a, b in zip(run.weights(), without.weights(), strict=True)), part


def replace_unused(recipe: Recipe, part: str) -> Recipe:
    """`recipe` ready to lose `part` of its phases: what only a phase's `use` names would be refused without it."""
    if part != "use":
        return recipe
    ruled = {rule.linear for rule in recipe.rules}
    bare = tuple(replace(p, use={}) for p in recipe.phases)
    return replace(recipe, phases=bare, linears={k: v for k, v in recipe.linears.items() if k in ruled})


def test_what_the_training_ablations_cover() -> None:
    found = {what.split()[-1] for _, what in TRAINING_CASES}
    assert found >= {
        "amax", "outlier", "rounding", "ada_clip", "ada_norm", "moment_reset", "spike_clip", "cage", "osci_reset",
        "q_ramping", "exp_avg", "exp_avg_sq",
    }  # fmt: skip
