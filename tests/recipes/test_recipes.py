"""Every shipped recipe: loads, says what its paper says, uses all it defines, trains, and needs each of its blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import yaml

from fp4dist.errors import ConfigError
from fp4dist.nn.apply import apply_recipe, plan_table
from fp4dist.nn.assign import assign
from fp4dist.numerics import BlockScaledTensor
from fp4dist.spec.blocks import Ceil, Nearest, Stochastic
from fp4dist.spec.build import build
from fp4dist.spec.load import config_root, dump, load_recipe, recipe_hash, shipped
from fp4dist.spec.recipe import GEMMS, SLOTS, LinearRecipe, QuantSpec, Recipe
from tests.nn.one_linear import Result, run_linear
from tests.tiny_llama import TinyLlama, make_sites, make_tokens

NAMES = shipped("recipes")
LINEARS: dict[str, LinearRecipe] = {
    f"{name}:{key}": linear for name in NAMES for key, linear in load_recipe(name).linears.items()
}

# One line for each slot; this table is the reviewer's view of the files (formulas: fp4dist/numerics).
EXPECTED: dict[str, list[str]] = {
    "nvidia_nvfp4:fp4": [
        "nvfp4 1x16", "nvfp4 16x16",
        "nvfp4 1x16 17/16 sr", "nvfp4 16x16 reuse",
        "nvfp4 1x16 17/16 sr rht16", "nvfp4 1x16 rht16",
    ],
    "nvidia_nvfp4:fp4_fprop_bf16": [
        "bf16", "bf16",
        "nvfp4 1x16 17/16 sr", "nvfp4 16x16",
        "nvfp4 1x16 17/16 sr rht16", "nvfp4 1x16 rht16",
    ],
    "nvidia_nvfp4_te:fp4": [
        "nvfp4 1x16", "nvfp4 16x16",
        "nvfp4 1x16 sr", "nvfp4 16x16 reuse",
        "nvfp4 1x16 sr rht16", "nvfp4 1x16 rht16",
    ],
    "nvidia_nvfp4_46:fp4": [
        "nvfp4 1x16 4/6", "nvfp4 16x16 4/6",
        "nvfp4 1x16 17/16 sr", "nvfp4 16x16 4/6 reuse",
        "nvfp4 1x16 17/16 sr rht16", "nvfp4 1x16 rht16",
    ],
    "quartet2:fp4": [
        "nvfp4 1x16 4/6", "nvfp4 1x16 4/6",
        "nvfp4 1x16 eden rht*128", "nvfp4 1x16 eden rht*128 requant",
        "nvfp4 1x16 eden rht*128", "nvfp4 1x16 eden rht*128 requant",
    ],
    "tetrajet_v2_core:fp4": [
        "nvfp4 1x16", "nvfp4 1x16",
        "nvfp4 1x16 17/16 sr rht*32", "nvfp4 1x16 17/16 sr rht*32 requant",
        "nvfp4 1x16 17/16 sr rht*32", "nvfp4 1x16 17/16 sr rht*32 requant",
    ],
    "fp4_all_the_way:fp4": [
        "nvfp4 1x16", "nvfp4 1x16",
        "nvfp4 1x16 17/16 sr", "nvfp4 1x16",
        "nvfp4 1x16 17/16 sr", "nvfp4 1x16 17/16 sr",
    ],
    "fp4_all_the_way_as_released:fp4": [
        "e2m1/e4m3_inverse 1x16 max240", "e2m1/e4m3_inverse 1x16 max240",
        "e2m1/e4m3_inverse 1x16 max240 sr", "e2m1/e4m3_inverse 1x16 max240",
        "e2m1/e4m3_inverse 1x16 max240 sr", "e2m1/e4m3_inverse 1x16 max240 sr",
    ],
    "luq:fp4": [
        "int4 tensor sawb", "int4 tensor sawb",
        "log7 tensor sr", "int4 tensor sawb reuse",
        "log7 tensor sr(2)", "int4 tensor sawb reuse",
    ],
    "luq:weights_only": ["bf16", "int4 tensor sawb", "bf16", "bf16", "bf16", "bf16"],
    "mxfp4_h32:fp4": [
        "mxfp4 1x32 ceil(amax)", "mxfp4 32x32 ceil(amax) finer<0.87",
        "mxfp4 1x32 ceil(amax) sr", "mxfp4 32x32 ceil(amax) finer<0.87 reuse",
        "mxfp4 1x32 ceil(amax) rht32:d7e8d7e8", "mxfp4 1x32 ceil(amax) rht32:d7e8d7e8",
    ],
    "nemotron3:fp4": [
        "nvfp4 1x16", "nvfp4 16x16",
        "nvfp4 1x16 17/16 sr", "nvfp4 16x16 reuse",
        "nvfp4 1x16 17/16 sr rht16", "nvfp4 1x16 rht16",
    ],
    "tetrajet:fp4": [
        "mxfp4 1x32 ceil", "mxfp4 1x32 ceil",
        "mxfp4 1x32 ceil sr", "mxfp4 1x32 ceil sr requant",
        "mxfp4 1x32 ceil sr", "mxfp4 1x32 ceil sr requant",
    ],
    "ufp4:fp4": [
        "e1m2/fp32 1x16 rht16", "e1m2/fp32 1x16 rht16",
        "e1m2/fp32 1x16 sr rht16", "e1m2/fp32 1x16 rht16",
        "e1m2/fp32 1x16 sr rht16", "e1m2/fp32 1x16 rht16",
    ],
    "zhou2502:ffn": [
        "fp4_row row", "fp4_row row",
        "fp8_e5m2 tensor", "fp8_e4m3 tensor",
        "fp8_e5m2 tensor", "fp8_e4m3 tensor",
    ],
    "zhou2502:attention": [
        "fp8_e4m3 tensor", "fp8_e4m3 tensor",
        "fp8_e5m2 tensor", "fp8_e4m3 tensor",
        "fp8_e5m2 tensor", "fp8_e4m3 tensor",
    ],
}  # fmt: skip
PARITY = {"nvidia_nvfp4_te", "fp4_all_the_way_as_released"}  # biased, as their papers' code is


@pytest.mark.parametrize("name", EXPECTED)
def test_slots(name: str) -> None:
    specs = [LINEARS[name].slot(slot) for slot in SLOTS]
    assert [s.label() if s else "bf16" for s in specs] == EXPECTED[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_named_after_its_file_and_round_trips(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    again = build(Recipe, yaml.safe_load(dump(recipe)))
    assert again == recipe
    assert recipe_hash(again) == recipe_hash(recipe)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_cites_its_paper_or_explains_itself(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.notes if name == "bf16" else "arXiv:" in recipe.paper


@pytest.mark.parametrize("name", NAMES)
def test_every_rule_and_linear_is_used_by_a_llama(name: str) -> None:
    recipe, sites = load_recipe(name), make_sites(24)
    rows = assign(sites, recipe).rows
    reasons = {row.why.split(":")[0] for row in rows}
    assert {f"rule {i}" for i in range(len(recipe.rules))} <= reasons
    turned = {after for phase in recipe.phases for after in phase.use.values()}
    assert set(recipe.linears) <= {row.linear for row in rows} | turned


@pytest.mark.parametrize(
    ("name", "bf16_layers"),
    [
        ("nvidia_nvfp4", 4),
        ("nvidia_nvfp4_46", 4),
        ("nvidia_nvfp4_te", 4),
        ("quartet2", 0),
        ("tetrajet_v2_core", 0),
        ("nemotron3", 24),
        ("tetrajet", 0),
        ("luq", 0),
        ("ufp4", 0),
        ("mxfp4_h32", 0),
        ("zhou2502", 0),
    ],  # in nemotron3 every layer keeps its attention projections
)
def test_which_layers_stay_in_bf16(name: str, bf16_layers: int) -> None:
    rows = plan_table(make_sites(24), load_recipe(name)).rows
    kept = {row.site.layer for row in rows if row.recipe.is_high_precision and row.site.layer is not None}
    assert kept == set(range(24 - bf16_layers, 24))
    assert next(row for row in rows if row.site.role == "head").recipe.is_high_precision


@pytest.mark.parametrize("name", [n for n in NAMES if load_recipe(n).linears])
def test_only_a_parity_recipe_is_biased(name: str) -> None:
    specs = [s for linear in load_recipe(name).linears.values() for slot in SLOTS if (s := linear.slot(slot))]
    assert any(s.allow_bias for s in specs) == (name in PARITY)


def test_phases_ship_switched_off() -> None:
    assert not any(phase.enabled for name in NAMES for phase in load_recipe(name).phases)


def test_removing_allow_bias_from_the_parity_recipe_is_refused() -> None:
    raw = yaml.safe_load(dump(load_recipe("nvidia_nvfp4_te")))
    raw["linears"]["fp4"]["dgrad"]["dy"]["allow_bias"] = False
    with pytest.raises(ConfigError, match=r"^linears.fp4.dgrad.dy: stochastic rounding under a scale rule that clips"):
        build(Recipe, raw)


def test_every_file_of_the_folder_is_tested() -> None:
    assert [path.stem for path in sorted((config_root() / "recipes").iterdir())] == NAMES
    assert {name.split(":")[0] for name in EXPECTED} | {"bf16"} == set(NAMES)


# ---------- training


@cache
def losses(name: str, steps: int = 20) -> list[float]:
    """Losses of a tiny Llama that learns one batch by heart."""
    model = TinyLlama(num_layers=2)
    applied = apply_recipe(model, name, seed=1, tokens=128)
    optimizer, tokens, seen = torch.optim.AdamW(model.parameters(), lr=3e-3), make_tokens(), []
    for step in range(steps):
        applied.set_step(step, steps)
        optimizer.zero_grad()
        loss = model(tokens)
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    applied.check_counts()
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_twenty_steps_of_a_tiny_llama(name: str) -> None:
    seen, bf16 = losses(name), losses("bf16")
    assert seen[0] == pytest.approx(bf16[0], abs=0.05)
    assert seen[-1] < seen[0] - 2.0
    assert seen[-1] < bf16[-1] + 0.5
    assert (seen == bf16) == (name == "bf16")


def test_recipes_train_differently() -> None:
    assert len({tuple(losses(name)) for name in NAMES}) == len(NAMES)


def test_training_is_reproducible() -> None:
    assert losses.__wrapped__("quartet2", 3) == losses("quartet2")[:3]


# ---------- every block has an effect


def edited(linear: LinearRecipe, slots: tuple[str, ...], **fields: Any) -> LinearRecipe:
    """`linear` with the given fields of the quantized ones of `slots` replaced."""
    for slot in slots:
        gemm, name = slot.split(".")
        spec = linear.slot(slot)
        if spec is not None:
            linear = replace(linear, **{gemm: replace(getattr(linear, gemm), **{name: replace(spec, **fields)})})
    return linear


def without_rotation(linear: LinearRecipe, gemm: str) -> LinearRecipe:
    """Both operands change at once: one without the other is refused."""
    operands = getattr(linear, gemm)
    names = [s.split(".")[1] for s in SLOTS if s.startswith(gemm)]
    changed = {
        n: replace(spec, rotation=None, allow_bias=True) for n in names if (spec := getattr(operands, n)) is not None
    }
    return replace(linear, **{gemm: replace(operands, **changed)})


def ablations(linear: LinearRecipe) -> Iterator[tuple[str, LinearRecipe]]:
    """(what is removed, the recipe without it) for each block that differs from its default."""
    for gemm in GEMMS:
        specs = {s: linear.slot(s) for s in SLOTS if s.startswith(gemm)}
        if any(spec and spec.rotation for spec in specs.values()):
            yield f"{gemm} rotation", without_rotation(linear, gemm)
        for slot, spec in specs.items():
            if spec is None:
                continue
            partner = REUSERS.get(slot, slot)
            partner = partner if (other := linear.slot(partner)) and other.source == "reuse" else slot
            if spec.source == "reuse":
                continue  # its codes are the forward's: they are ablated there
            if spec.source == "requant":
                yield f"{slot} source", edited(linear, (slot,), source="master")
            if not isinstance(spec.rounding, Nearest):
                yield f"{slot} rounding", edited(linear, (slot,), rounding=Nearest())
            if spec.samples > 1:
                yield f"{slot} samples", edited(linear, (slot,), rounding=Stochastic())
            on_grid = spec.source == "requant" and isinstance(spec.rule, Ceil)
            if on_grid:  # amax of forward values is 1 or 1.5 times a power of two: floor and ceil take the same scale
                continue
            if spec.scale is not None and spec.rule != replace(spec, scale=None, allow_bias=True).rule:
                biased = isinstance(spec.rounding, Stochastic)
                yield f"{slot} scale", _edit_at_once(linear, (slot, partner), scale=None, allow_bias=biased)
            if spec.block is not None and spec.block != spec.format.block:
                yield f"{slot} block", _edit_at_once(linear, (slot, partner), block=None, source="master")


REUSERS = {"fprop.w": "dgrad.w", "fprop.x": "wgrad.x"}


def _edit_at_once(linear: LinearRecipe, slots: tuple[str, ...], **fields: Any) -> LinearRecipe:
    """Reused codes repeat the forward's spec, so both change in one construction."""
    changed: dict[str, dict[str, QuantSpec]] = {}
    for slot in dict.fromkeys(slots):
        gemm, name = slot.split(".")
        spec = linear.slot(slot)
        assert spec is not None
        source = spec.source if spec.source == "master" else fields.get("source", spec.source)
        changed.setdefault(gemm, {})[name] = replace(spec, **{**fields, "source": source})
    return replace(linear, **{gemm: replace(getattr(linear, gemm), **specs) for gemm, specs in changed.items()})


CASES = [(name, what) for name, linear in LINEARS.items() for what, _ in ablations(linear)]


def fingerprint(result: Result) -> list[torch.Tensor]:
    """Everything a block could change."""
    found = result.tensors()
    for operand in result.operands.values():
        found += [operand.codes, operand.scales] if isinstance(operand, BlockScaledTensor) else [operand]
    return found


@pytest.mark.parametrize(("name", "what"), CASES)
def test_no_block_is_idle(name: str, what: str) -> None:
    linear = LINEARS[name]
    without = dict(ablations(linear))[what]
    assert without != linear
    full, ablated = run_linear(linear), run_linear(without)
    slot = what.split()[0]
    index = GEMMS.index(slot.split(".")[0])
    assert not torch.equal(full.tensors()[index], ablated.tensors()[index])  # the GEMM that the block belongs to
    assert any(
        a.shape != b.shape or not torch.equal(a, b)
        for a, b in zip(fingerprint(full), fingerprint(ablated), strict=True)
    )


def test_the_ablations_cover_the_published_ingredients() -> None:
    removed = {what for name, what in CASES if name == "nvidia_nvfp4:fp4"}
    assert removed == {
        "wgrad rotation", "dgrad.dy rounding", "dgrad.dy scale", "wgrad.dy rounding", "wgrad.dy scale", "fprop.w block",
    }  # fmt: skip
    assert len({what for name, what in CASES if name == "quartet2:fp4"}) == 2 + 4 + 2 + 2
