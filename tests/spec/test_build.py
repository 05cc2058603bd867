"""The strict builder: what it accepts, what each refusal says, and that `plain` is its inverse."""

from __future__ import annotations

from typing import Any

import pytest

from fp4dist.errors import ConfigError
from fp4dist.spec.blocks import AbsMax, FourOverSix, Hadamard, Stochastic
from fp4dist.spec.build import build, plain
from fp4dist.spec.formats import NVFP4, Format
from fp4dist.spec.recipe import Fprop, LinearRecipe, QuantSpec, Recipe, Rule
from fp4dist.spec.run import OptimConfig, ParallelConfig, RunConfig, TrainConfig

RECIPE: dict[str, Any] = {
    "name": "r",
    "linears": {"fp4": {"fprop": {"x": "nvfp4", "w": {"format": "nvfp4", "block": [16, 16]}}}},
    "rules": [{"roles": ["qkv", "fc1"], "last": "1/4", "linear": "bf16"}, {"linear": "fp4"}],
}


def refusal(tp: Any, value: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        build(tp, value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("given", "number"),
    [("17/16", 1.0625), ("2e-3", 0.002), ("2E+1", 20.0), (" 4 / 3 ", 4 / 3), (3, 3.0), (0.5, 0.5), ("-.5", -0.5)],
)
def test_numbers(given: Any, number: float) -> None:
    built = build(float, given)
    assert built == number
    assert type(built) is float


@pytest.mark.parametrize(
    "given",
    ["1/0", "1/2/3", "nan", "inf", float("nan"), float("inf"), "", "1_0", "0x10", True, None, [1], "1e999", "x"],
)
def test_what_is_no_finite_number(given: Any) -> None:
    assert refusal(AbsMax, {"headroom": given}).startswith(f"headroom: expected a finite number, got {given!r}")


@pytest.mark.parametrize(("given", "kind"), [("4", "str"), (4.0, "float"), (True, "bool"), (None, "NoneType")])
def test_integers_are_not_guessed(given: Any, kind: str) -> None:
    assert refusal(ParallelConfig, {"tp": given}) == f"tp: expected int, got {given!r} ({kind})"


def test_strings_and_booleans_are_not_guessed() -> None:
    assert refusal(ParallelConfig, {"sequence_parallel": 1}) == "sequence_parallel: expected bool, got 1 (int)"
    assert refusal(Rule, {"linear": 7}) == "linear: expected str, got 7; write it in quotes"


def test_unknown_keys_come_with_path_and_suggestion() -> None:
    spec = {"format": "nvfp4", "rotaton": {"size": 16}}
    recipe = {"name": "r", "linears": {"fp4": {"wgrad": {"dy": spec}}}}
    message = refusal(Recipe, recipe)
    assert message == "linears.fp4.wgrad.dy.rotaton: unknown key of QuantSpec; did you mean 'rotation'?"
    assert refusal(OptimConfig, {"lr": 1, "beta_1": 0.9}).endswith("did you mean 'beta1'?")
    assert refusal(OptimConfig, {"lr": 1, "zzz": 0.9}) == "zzz: unknown key of OptimConfig"
    assert refusal(OptimConfig, {"lr": 1, 3: 0.9}) == "3: unknown key of OptimConfig"


def test_missing_keys_are_all_named() -> None:
    assert refusal(TrainConfig, {"steps": 3}) == "TrainConfig needs global_batch_size, micro_batch_size"
    assert refusal(Recipe, {"name": "r", "rules": [{"roles": ["qkv"]}]}) == "rules[0]: Rule needs linear"


def test_literals() -> None:
    message = refusal(Hadamard, {"signs": "fixd"})
    assert message == "signs: 'fixd' is not one of none, fixed, fresh; did you mean 'fixed'?"
    assert "signs: ['fixed'] is not one of" in refusal(Hadamard, {"signs": ["fixed"]})
    assert refusal(Recipe, {"name": "r", "rules": [{"roles": ["qvk"], "linear": "bf16"}]}) == (
        "rules[0].roles[0]: 'qvk' is not one of qkv, proj, fc1, fc2, expert, head, embedding, router;"
        " did you mean 'qkv'?"
    )


def test_tagged_blocks() -> None:
    spec = build(QuantSpec, {"format": "nvfp4", "scale": "four_over_six"})
    assert spec.scale == FourOverSix()
    full = build(
        QuantSpec, {"format": "nvfp4", "scale": {"kind": "absmax", "headroom": "17/16"}, "rounding": "stochastic"}
    )
    assert full == QuantSpec(format=NVFP4, scale=AbsMax(headroom=17 / 16), rounding=Stochastic())


KINDS = "nearest, stochastic, eden, ema"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("stochstic", f"rounding.kind: 'stochstic' is not one of {KINDS}; did you mean 'stochastic'?"),
        ({"kind": "edn"}, f"rounding.kind: 'edn' is not one of {KINDS}; did you mean 'eden'?"),
        ({"kind": ["eden"]}, f"rounding.kind: ['eden'] is not one of {KINDS}; did you mean 'eden'?"),
        (
            {"align": "pre"},
            f"rounding: expected one of {KINDS}, or a mapping with that `kind`; got {{'align': 'pre'}}",
        ),
        (3, f"rounding: expected one of {KINDS}, or a mapping with that `kind`; got 3"),
        (None, f"rounding: expected one of {KINDS}, or a mapping with that `kind`; got None"),
        (
            {"kind": "eden", "allign": "pre"},
            "rounding.allign: unknown key of Eden; did you mean 'align'?",
        ),
        ({"kind": "nearest", "align": "pre"}, "rounding.align: unknown key of Nearest"),
    ],
)
def test_bad_tags(given: Any, message: str) -> None:
    assert refusal(QuantSpec, {"format": "nvfp4", "rounding": given}) == message


def test_a_block_of_another_union_is_refused() -> None:
    assert "expected one of nearest" in refusal(QuantSpec, {"format": "nvfp4", "rounding": AbsMax()})


def test_tuples() -> None:
    assert build(QuantSpec, {"format": "nvfp4", "block": [16, 16]}).block == (16, 16)
    assert refusal(QuantSpec, {"format": "nvfp4", "block": [16]}) == "block: expected 2 items, got 1: [16]"
    assert refusal(QuantSpec, {"format": "nvfp4", "block": 16}) == "block: expected a list, got 16"
    assert refusal(QuantSpec, {"format": "nvfp4", "block": "1616"}) == (
        "block: '1616' is neither a list nor one of row, tensor"
    )
    assert refusal(QuantSpec, {"format": "int4", "block": "tenser"}).endswith("; did you mean 'tensor'?")
    assert build(QuantSpec, {"format": "int4", "block": "row"}).block == "row"
    assert refusal(QuantSpec, {"format": "nvfp4", "block": [16, "16"]}) == "block[1]: expected int, got '16' (str)"


def test_names_and_shorthands() -> None:
    fprop = build(Fprop, {"x": "nvfp4", "w": "bf16"})
    assert fprop == Fprop(x=QuantSpec(format=NVFP4), w=None)
    assert build(Fprop, {"x": None}) == Fprop()
    assert refusal(Fprop, {"x": "nvpf4"}).startswith("x.format: 'nvpf4' is not one of nvfp4, mxfp4, ")
    assert refusal(Fprop, {"x": "nvpf4"}).endswith("; did you mean 'nvfp4'?")
    assert refusal(QuantSpec, {"format": "nvfp4", "rotation": "bf16"}) == (
        "rotation: expected a mapping for Hadamard, got 'bf16'"
    )


def test_mappings() -> None:
    assert refusal(Recipe, {"name": "r", "linears": ["fp4"]}) == "linears: expected a mapping, got ['fp4']"
    assert refusal(Recipe, {"name": "r", "linears": {4: {}}}) == "linears.4: expected str, got 4; write it in quotes"
    assert refusal(Recipe, "quartet") == "expected a mapping for Recipe, got 'quartet'"
    assert refusal(LinearRecipe, {"fprop": None}) == "fprop: expected a mapping for Fprop, got None"


def test_cross_field_errors_name_the_section() -> None:
    message = refusal(Recipe, {"name": "r", "linears": {"fp4": {"fprop": {"x": {"format": "nvfp4", "scale": "ceil"}}}}})
    assert message.startswith("linears.fp4.fprop.x: scale rule ceil does not fit e4m3 scales of nvfp4")


def test_a_complete_format_can_be_written_out() -> None:
    written = plain(NVFP4)
    assert written == "nvfp4"
    custom = {
        "name": "e1m2",
        "element": {"name": "e1m2", "bits": 4, "levels": [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75]},
        "scale": {"name": "e4m3", "max": 448},
        "block": [1, 16],
        "outer": "tensor",
    }
    built = build(Format, custom)
    assert built.element.max == 1.75
    assert build(Format, plain(built)) == built
    renamed = build(Format, {**custom, "name": "nvfp4"})
    assert build(Format, plain(renamed)) == renamed  # a name that lies is written out in full


def test_plain_is_the_inverse_of_build() -> None:
    recipe = build(Recipe, RECIPE)
    data = plain(recipe)
    assert build(Recipe, data) == recipe
    assert data["linears"]["fp4"]["fprop"]["w"]["block"] == [16, 16]
    assert data["linears"]["fp4"]["dgrad"] == {"dy": None, "w": None}
    assert data["rules"][0]["last"] == 0.25
    assert plain(data) == data


def test_building_what_is_built_changes_nothing() -> None:
    recipe = build(Recipe, RECIPE)
    assert build(Recipe, recipe) is recipe
    again = build(Recipe, {"name": "r", "linears": recipe.linears, "rules": recipe.rules})
    assert again == recipe


def test_root_errors_have_no_empty_path() -> None:
    message = refusal(RunConfig, {})
    assert message == "RunConfig needs run, model, data, optim, train, recipe"
