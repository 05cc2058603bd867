"""Every shipped recipe: loads, says what its paper says, uses all it defines, trains, and resumes to the bit."""

from __future__ import annotations

import io
import re
from functools import cache
from typing import get_args, get_type_hints

import pytest
import torch
import yaml

from fp4dist.errors import ConfigError
from fp4dist.nn.apply import plan_table
from fp4dist.nn.assign import assign
from fp4dist.spec.build import build
from fp4dist.spec.formats import ScaleFormat
from fp4dist.spec.load import config_root, dump, load_recipe, recipe_hash, shipped
from fp4dist.spec.recipe import SLOTS, LinearRecipe, Recipe
from fp4dist.spec.training import WeightControl
from tests.recipes.training import STEPS, fast_recipe, go_on, loaded, saved, start, trained, width
from tests.test_architecture import METHOD_NAMES, NAMES_OF_BLOCKS
from tests.tiny_llama import make_sites, make_tokens

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
    "fp4dist_nvfp4:fp4": [
        "nvfp4 1x16 best(1,3/2,15/16)", "nvfp4 1x16 best(1,3/2,15/16)",
        "nvfp4 1x16 eden rht*128", "nvfp4 1x16 eden rht*128 requant",
        "nvfp4 1x16 eden rht*128", "nvfp4 1x16 eden rht*128 requant",
    ],
    "fp4dist_nvfp4:forward_bf16": [
        "bf16", "bf16",
        "nvfp4 1x16 eden rht*128", "nvfp4 1x16 eden rht*128",
        "nvfp4 1x16 eden rht*128", "nvfp4 1x16 eden rht*128",
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
    "averis:fp4": [
        "nvfp4 1x16 mean", "nvfp4 16x16",
        "nvfp4 1x16 17/16 sr mean", "nvfp4 16x16 reuse",
        "nvfp4 1x16 17/16 sr mean", "nvfp4 1x16 mean",
    ],
    "cage:fp4": [
        "mxfp4 1x32 quest(nearest) had128 mask", "mxfp4 1x32 quest(nearest) had128 mask",
        "bf16", "dequant",
        "bf16", "dequant",
    ],
    "chon:fp4": [
        "nvfp4 1x16 hot_residual", "nvfp4 16x16",
        "nvfp4 1x16 17/16 sr", "nvfp4 16x16 reuse",
        "nvfp4 1x16 17/16 sr rht16", "nvfp4 1x16 rht16",
    ],
    "luq_hindsight:fp4": [
        "int4 tensor sawb", "int4 tensor sawb",
        "log7 tensor sr hindsight", "int4 tensor sawb reuse",
        "log7 tensor sr(2) hindsight", "int4 tensor sawb reuse",
    ],
    "quartet:fp4": [
        "mxfp4 1x32 quest had32 mask", "mxfp4 1x32 quest had32 mask",
        "mxfp4 1x32 4/3 rht*32", "mxfp4 1x32 4/3 rht*32 requant",
        "mxfp4 1x32 4/3 rht*32", "mxfp4 1x32 4/3 rht*32 requant",
    ],
    "quartet2_as_released:fp4": [
        "nvfp4 1x16 4/6 ties:away", "nvfp4 1x16 4/6 ties:away",
        "nvfp4 1x16 eden(pre,S/rotation) rht*128", "nvfp4 1x16 eden(pre,S/rotation) rht*128 requant",
        "nvfp4 1x16 eden(pre,S/rotation) rht*128", "nvfp4 1x16 eden(pre,S/rotation) rht*128 requant",
    ],
    "quartet_as_released:fp4": [
        "mxfp4 1x32 quest ties:to_zero had32 mask", "mxfp4 1x32 quest ties:to_zero had32 mask",
        "mxfp4 1x32 4/3 ties:to_zero had32", "mxfp4 1x32 4/3 ties:to_zero had32 requant",
        "mxfp4 1x32 4/3 ties:to_zero had32", "mxfp4 1x32 4/3 ties:to_zero had32 requant",
    ],
    "quest_mxfp4:fp4": [
        "mxfp4 1x32 quest had32 mask", "mxfp4 1x32 quest had32 mask",
        "bf16", "dequant",
        "bf16", "dequant",
    ],
    "spam:fp4": [
        "e1m2/fp32 1x256 topk", "e1m2/fp32 1x256 topk",
        "bf16", "dequant",
        "bf16", "dequant",
    ],
    "stable_spam_fp4:fp4": [
        "e1m2/fp32 1x256 topk", "e1m2/fp32 1x256 topk",
        "bf16", "dequant",
        "bf16", "dequant",
    ],
    "stable_spam_fp4_as_released:fp4": [
        "e1m2/fp32 1x256 topk", "e1m2/fp32 1x256 topk",
        "bf16", "dequant",
        "bf16", "dequant",
    ],
    "sun2020:fp4": [
        "int4 tensor sawb", "int4 tensor sawb",
        "radix4_even/fp32 tensor grad_scale", "int4 tensor sawb reuse",
        "radix4_odd/fp32 tensor grad_scale", "int4 tensor sawb reuse",
    ],
    "tetrajet_qema:fp4": [
        "mxfp4 1x32 ceil", "mxfp4 1x32 ceil ema(0.998)",
        "mxfp4 1x32 ceil sr", "mxfp4 1x32 ceil sr requant",
        "mxfp4 1x32 ceil sr", "mxfp4 1x32 ceil sr requant",
    ],
    "tetrajet_qramping:fp4": [
        "mxfp4 1x32 ceil", "mxfp4 1x32 ceil",
        "mxfp4 1x32 ceil sr", "mxfp4 1x32 ceil sr requant",
        "mxfp4 1x32 ceil sr", "mxfp4 1x32 ceil sr requant",
    ],
    "tetrajet_v2:fp4": [
        "nvfp4 1x16 outer:1x128 channels", "nvfp4 1x16 outer:1x128",
        "nvfp4 1x16 outer:1x128 17/16 nonzero sr rht*16", "nvfp4 1x16 outer:1x128 17/16 nonzero sr rht*16 requant",
        "nvfp4 1x16 outer:1x128 17/16 nonzero sr rht*16",
        "nvfp4 1x16 outer:1x128 17/16 nonzero sr rht*16 channels requant",
    ],
    "tetrajet_v2_as_released:fp4": [
        "nvfp4 1x16 outer:1x128 channels", "nvfp4 1x16 outer:1x128",
        "nvfp4 1x16 outer:1x128 nonzero sr rht*16", "nvfp4 1x16 outer:1x128 nonzero sr rht*16 requant",
        "nvfp4 1x16 outer:1x128 nonzero sr rht*16", "nvfp4 1x16 outer:1x128 nonzero sr rht*16 channels requant",
    ],
    "ue5m3:fp4": [
        "ue5m3_fp4 1x16 nonzero hold", "ue5m3_fp4 16x16 nonzero hold",
        "ue5m3_fp4 1x16 17/16 nonzero sr hold", "ue5m3_fp4 16x16 nonzero hold reuse",
        "ue5m3_fp4 1x16 17/16 nonzero sr hold", "ue5m3_fp4 1x16 nonzero hold",
    ],
    "wang2501:fp4": [
        "fp4_row row occ", "fp4_row row dge",
        "fp8_e5m2 tensor", "dequant",
        "fp8_e5m2 tensor", "dequant",
    ],
    "wang2501_as_released:fp4": [
        "fp4_row row ceil ties:up occ(compensate=False)", "fp4_row row ceil ties:up dge",
        "fp8_e5m2 tensor", "dequant",
        "fp8_e5m2 tensor", "dequant",
    ],
}  # fmt: skip
PARITY = {  # biased, as their papers' code is, or as a paper's option is
    "nvidia_nvfp4_te", "fp4_all_the_way_as_released", "tetrajet_v2_as_released", "luq_hindsight",
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_slots(name: str) -> None:
    assert [LINEARS[name].word(slot) for slot in SLOTS] == EXPECTED[name]


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
    assert recipe.notes if name == "bf16" else re.search(r"arXiv:\d{4}\.\d{5}", recipe.paper)
    head = (config_root() / "recipes" / f"{name}.yaml").read_text(encoding="utf-8").split("\nname:")[0]
    assert name == "bf16" or re.search(r"Published|For parity only", head), "its published numbers"
    assert name == "bf16" or re.search(r"Known deviation|Second-hand|For parity only", head), "what differs from it"


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
        ("fp4dist_nvfp4", 0),
        ("tetrajet_v2_core", 0),
        ("nemotron3", 24),
        ("tetrajet", 0),
        ("luq", 0),
        ("ufp4", 0),
        ("mxfp4_h32", 0),
        ("zhou2502", 0),
        ("wang2501", 0),
        ("sun2020", 0),
        ("tetrajet_v2", 0),
        ("quartet", 0),
        ("cage", 0),
        ("ue5m3", 0),
        ("averis", 4),
        ("chon", 24),
    ],  # in nemotron3 every layer keeps its attention projections, in chon its qkv
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


def test_recipes_that_share_a_name_with_a_block() -> None:
    """tests/test_architecture.py forbids the names of recipes in the code, but for these."""
    kinds = {get_args(get_type_hints(block)["kind"])[0] for block in get_args(WeightControl)}
    assert {"bf16"} | ({*NAMES} & ({*kinds, *ScaleFormat.names()})) == NAMES_OF_BLOCKS
    assert {*NAMES} - NAMES_OF_BLOCKS <= set(METHOD_NAMES)


def test_phases_of_published_recipes_ship_switched_off() -> None:
    """They are options of their papers; our own recipe's belongs to it."""
    assert {name for name in NAMES for phase in load_recipe(name).phases if phase.enabled} == {"fp4dist_nvfp4"}


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
def losses(name: str, hidden: int, steps: int = 20) -> list[float]:
    """Losses of a tiny Llama that learns one batch by heart."""
    run, tokens, seen = start(load_recipe(name), steps, lr=3e-3, hidden=hidden), make_tokens(), []
    for step in range(steps):
        run.applied.set_step(step, steps)
        run.optimizer.zero_grad()
        loss = run.model(tokens)
        loss.backward()
        run.optimizer.step()
        seen.append(loss.item())
    run.applied.check_counts()
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_twenty_steps_of_a_tiny_llama(name: str) -> None:
    hidden = width(load_recipe(name))
    seen, bf16 = losses(name, hidden), losses("bf16", hidden)
    assert seen[0] == pytest.approx(bf16[0], abs=0.05)
    assert seen[-1] < seen[0] - 2.0
    assert seen[-1] < bf16[-1] + 0.5
    assert (seen == bf16) == (name == "bf16")


def test_training_is_reproducible() -> None:
    assert losses.__wrapped__("quartet2", 128, 3) == losses("quartet2", 128)[:3]


def test_recipes_train_differently() -> None:
    """With time constants short enough for ten steps: what only acts late in a run shows, too."""
    runs = {name: torch.cat([w.flatten() for w in trained(name)[1]]) for name in NAMES}
    same = [(a, b) for i, a in enumerate(NAMES) for b in NAMES[:i] if torch.equal(runs[a], runs[b])]
    assert not same


# ---------- resuming


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_is_the_uninterrupted_one(name: str) -> None:
    """Weights, optimizer state and what the recipe keeps, saved in the middle and read by another process's objects."""
    recipe, middle = fast_recipe(name), 6
    whole_losses, whole_weights = trained(name)
    checkpoint = saved(go_on(start(recipe), 0, middle))
    resumed = go_on(loaded(recipe, checkpoint), middle, STEPS)
    assert resumed.losses == whole_losses[middle:]
    assert all(torch.equal(a, b) for a, b in zip(resumed.weights(), whole_weights, strict=True))


KEEPERS = [name for name in NAMES if load_recipe(name).keeps_state]


@pytest.mark.parametrize("name", KEEPERS)
def test_a_run_that_forgets_the_recipes_state_goes_another_way(name: str) -> None:
    """The counterpart: without what the recipe keeps, the same checkpoint gives other weights."""
    recipe, middle = fast_recipe(name), 6
    state = torch.load(io.BytesIO(saved(go_on(start(recipe), 0, middle))), weights_only=True)
    state["optimizer"]["state"] = {
        i: {key: value for key, value in entry.items() if key in ("step", "exp_avg", "exp_avg_sq")}
        for i, entry in state["optimizer"]["state"].items()
    }
    run = start(recipe)
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    forgetful = go_on(run, middle, STEPS)
    same = all(torch.equal(a, b) for a, b in zip(forgetful.weights(), trained(name)[1], strict=True))
    assert same == (name in STATELESS)


# What these keep is a function of the weights, or nothing that outlasts a step.
STATELESS = {"cage", "wang2501", "wang2501_as_released"}


def test_which_recipes_keep_state() -> None:
    assert set(KEEPERS) == {
        "wang2501", "wang2501_as_released", "sun2020", "luq_hindsight", "tetrajet_qema", "tetrajet_qramping",
        "tetrajet_v2", "tetrajet_v2_as_released", "stable_spam_fp4", "stable_spam_fp4_as_released", "spam", "cage",
        "chon", "ue5m3",
    }  # fmt: skip
