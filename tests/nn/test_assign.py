"""Ordered rules on roles, layers and paths: what wins, what rounds, what is reported and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from fp4dist.errors import RecipeMismatch
from fp4dist.nn.assign import assign, check_shapes, describe
from fp4dist.nn.sites import LinearSite, layer_of, role_of
from fp4dist.spec.blocks import Sawb
from fp4dist.spec.formats import INT4_TENSOR
from fp4dist.spec.load import load_recipe
from fp4dist.spec.recipe import Dgrad, Fprop, LinearRecipe, QuantSpec, Recipe, Rule, Wgrad
from tests.generators import spec
from tests.tiny_llama import make_sites

NV = spec("nvfp4")
FP4 = LinearRecipe(fprop=Fprop(x=NV, w=NV))


def recipe(*rules: dict[str, Any], **linears: LinearRecipe) -> Recipe:
    return Recipe(name="r", linears=linears or {"fp4": FP4}, rules=tuple(Rule(**rule) for rule in rules))


def sites(*paths: str, size: int = 128) -> list[LinearSite]:
    return [LinearSite(path=p, role=role_of(p), layer=layer_of(p), in_features=size, out_features=size) for p in paths]


def layers_of(rules: Recipe, num_layers: int, linear: str = "bf16") -> list[int]:
    rows = assign(make_sites(num_layers), rules).rows
    return sorted({r.site.layer for r in rows if r.linear == linear and r.site.layer is not None})


def test_the_first_matching_rule_wins() -> None:
    rules = recipe({"path": "*.layers.1.*", "linear": "bf16"}, {"roles": ("qkv", "fc1"), "linear": "fp4"})
    found = assign(make_sites(2), rules)
    assert found.named("model.layers.0.self_attn.q_proj").linear == "fp4"
    assert found.named("model.layers.0.self_attn.q_proj").why == "rule 1: qkv/fc1"
    assert found.named("model.layers.1.self_attn.q_proj").linear == "bf16"
    assert found.named("model.layers.1.self_attn.q_proj").why == "rule 0: path *.layers.1.*"
    assert found.named("model.layers.0.mlp.down_proj").linear == "bf16"
    assert found.named("model.layers.0.mlp.down_proj").why == "no rule matches"
    assert [row.site for row in found.rows] == make_sites(2)
    assert found.remarks == ()


@pytest.mark.parametrize(
    ("condition", "num_layers", "expected"),
    [
        ({"last": 0.15}, 2, [1]),
        ({"last": 0.15}, 12, [10, 11]),
        ({"last": 0.15}, 20, [17, 18, 19]),
        ({"first": 0.55}, 20, list(range(11))),  # 0.55 * 20 is 11, though floating point says 11.000000000000002
        ({"last": 0.15}, 24, [20, 21, 22, 23]),
        ({"first": 0.01}, 4, [0]),
        ({"first": 0.3}, 10, [0, 1, 2]),
        ({"first": 1}, 4, [0]),
        ({"first": 3.0}, 4, [0, 1, 2]),
        ({"last": 2}, 4, [2, 3]),
        ({"layers": (1, 2)}, 4, [1, 2]),
        ({"layers": (3, 9)}, 4, [3]),
    ],
)
def test_fractions_round_up_and_ranges_are_inclusive(
    condition: dict[str, Any], num_layers: int, expected: list[int]
) -> None:
    rules = recipe(
        {"roles": ("qkv", "proj", "fc1", "fc2"), "linear": "bf16", **condition},
        {"roles": ("qkv", "proj", "fc1", "fc2"), "linear": "fp4"},
    )
    assert layers_of(rules, num_layers) == expected
    assert layers_of(rules, num_layers, "fp4") == [n for n in range(num_layers) if n not in expected]


def test_more_layers_than_there_are() -> None:
    rules = recipe({"roles": ("fc2",), "first": 9, "linear": "bf16"}, {"roles": ("qkv",), "linear": "fp4"})
    assert assign(make_sites(2), rules).named("model.layers.1.mlp.down_proj").why == "rule 0: fc2 layers 0-1"


def test_a_layer_condition_leaves_the_head_out() -> None:
    rules = recipe({"first": 0.99, "linear": "fp4"}, {"linear": "bf16"})
    assert assign(make_sites(2), rules).named("lm_head").linear == "bf16"


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({}, "everything"),
        ({"roles": ("qkv", "proj")}, "qkv/proj"),
        ({"roles": ("qkv",), "last": 0.15}, "qkv layers 10-11"),
        ({"path": "*.fc1", "layers": (2, 3)}, "layers 2-3 path *.fc1"),
        ({"first": 2}, "layers 0-1"),
        ({"last": 99}, "layers 0-11"),
    ],
)
def test_rules_in_words(rule: dict[str, Any], words: str) -> None:
    assert describe(Rule(linear="bf16", **rule), 12) == words


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            {"path": "decoder.layer.*.mlp.*"},
            r"rule 0 \(path decoder.layer.\*.mlp.\*\) matches no linear of the model's 2 layers;"
            r" nearest module path: 'model.layers.\d.mlp.*'; fix its roles, layers or path, or remove it",
        ),
        ({"path": "*.Q_PROJ"}, "matches no linear"),  # globs are case-sensitive
        ({"roles": ("qkv",), "layers": (2, 3)}, r"rule 0 \(qkv layers 2-3\) matches no linear of the model's 2 layers"),
        ({"roles": ("head",), "last": 0.5}, r"rule 0 \(head layers 1-1\) matches no linear"),
        ({"roles": ("qkv",), "path": "*.gate_proj"}, "matches no linear"),
        ({"roles": ("expert",), "path": "*.expertz.*"}, "matches no linear"),  # the path is wrong, whatever the role
    ],
)
def test_a_rule_that_matches_nothing(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeMismatch, match=message):
        assign(make_sites(2), recipe({"linear": "bf16", **rule}, {"linear": "fp4"}))


def test_a_role_that_the_model_lacks_is_a_remark() -> None:
    rules = recipe({"roles": ("expert", "router"), "linear": "bf16"}, {"roles": ("qkv", "expert"), "linear": "fp4"})
    found = assign(make_sites(1), rules)
    assert found.remarks == ("rule 0: the model has no expert, router", "rule 1: the model has no expert")


def test_a_rule_shadowed_by_an_earlier_one_is_no_error() -> None:
    rules = recipe({"roles": ("qkv",), "linear": "fp4"}, {"path": "*.q_proj", "linear": "bf16"})
    assert assign(make_sites(1), rules).named("model.layers.0.self_attn.q_proj").linear == "fp4"


def test_fp4_asked_for_and_not_got() -> None:
    unknown = sites("net.0", "net.2")
    shipped = load_recipe("nvidia_nvfp4")
    with pytest.raises(
        RecipeMismatch, match=r"asks for FP4, but no linear .* none of its module names tells a role, for"
    ):
        assign(unknown, shipped)
    with pytest.raises(RecipeMismatch, match=r"its roles are head, .*'lm_head'; add a rule with a path"):
        assign(sites("lm_head"), shipped)
    with pytest.raises(RecipeMismatch, match="the model has no linear layers that fp4dist can run"):
        assign([], load_recipe("quartet2"))
    with pytest.raises(
        RecipeMismatch, match=r"q_proj has bf16 by rule 0: qkv/.* layers 0-0, .* a model with more layers"
    ):
        assign(make_sites(1), shipped)  # the last 15 % of one layer is that layer


def test_a_bf16_recipe_may_leave_everything_in_bf16() -> None:
    assert {row.linear for row in assign(sites("net.0"), load_recipe("bf16")).rows} == {"bf16"}


def test_a_path_that_is_not_in_the_list() -> None:
    found = assign(make_sites(1), load_recipe("bf16"))
    with pytest.raises(
        RecipeMismatch, match=r"'layers.0.mlp.up_proj' is not in the list of 8 sites; nearest: 'model.*'"
    ):
        found.named("layers.0.mlp.up_proj")
    with pytest.raises(RecipeMismatch, match=r"'zzz' is not in the list of 8 sites$"):
        found.named("zzz")


# ---------- shapes


def site(role: str = "fc1", inputs: int = 256, outputs: int = 256) -> LinearSite:
    return LinearSite(path="layers.0.x", role=role, layer=0, in_features=inputs, out_features=outputs)


SHAPES: dict[str, LinearRecipe] = {
    "fprop.x": LinearRecipe(fprop=Fprop(x=NV)),
    "fprop.w square": LinearRecipe(fprop=Fprop(w=spec("nvfp4_16x16"))),
    "dgrad.dy": LinearRecipe(dgrad=Dgrad(dy=spec("nvfp4_sr"))),
    "wgrad.dy": LinearRecipe(wgrad=Wgrad(dy=NV)),
    "wgrad eden": LinearRecipe(wgrad=Wgrad(dy=spec("eden"), x=spec("eden"))),
    "mxfp4": LinearRecipe(fprop=Fprop(x=spec("mxfp4"))),
}


@pytest.mark.parametrize(
    ("name", "where", "tokens", "tp", "message"),
    [
        (
            "fprop.x",
            site(inputs=100),
            256,
            1,
            r"layers.0.x fprop.x: input features = 100 is not a multiple of 16, which",
        ),
        ("mxfp4", site(inputs=48), 256, 1, r"input features = 48 is not a multiple of 32, which mxfp4 1x32 needs"),
        ("fprop.w square", site(outputs=24), 256, 1, r"fprop.w: output features = 24 is not a multiple of 16"),
        ("dgrad.dy", site(outputs=24), 256, 1, r"dgrad.dy: output features = 24 is not a multiple of 16"),
        ("dgrad.dy", site(outputs=48), 256, 2, r"output features = 48 / tp 2 = 24 is not a multiple of 16"),
        ("fprop.x", site("proj", inputs=48), 256, 2, r"input features = 48 / tp 2 = 24 is not a multiple of 16"),
        ("fprop.w square", site("fc1", outputs=48), 256, 2, r"fprop.w: output features = 48 / tp 2 = 24"),
    ],
)
def test_sizes_that_do_not_divide(name: str, where: LinearSite, tokens: int, tp: int, message: str) -> None:
    with pytest.raises(RecipeMismatch, match=message) as caught:
        check_shapes(where, SHAPES[name], tokens=tokens, tp=tp)
    assert "or give this layer to bf16 with a rule" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "where", "tokens", "tp"),
    [
        ("fprop.x", site("fc1", inputs=48), 256, 2),  # column-parallel: the input is whole on each rank
        ("dgrad.dy", site("proj", outputs=48), 256, 2),  # row-parallel: the output is
        ("wgrad.dy", site(outputs=24), 16, 1),  # rows of a 1 x 16 block are free
        ("wgrad eden", site(inputs=24, outputs=24), None, 1),  # tokens unknown: not judged
    ],
)
def test_sizes_that_divide(name: str, where: LinearSite, tokens: int | None, tp: int) -> None:
    check_shapes(where, SHAPES[name], tokens=tokens, tp=tp)


@pytest.mark.parametrize(("layout", "found"), [({"tp": 2, "sequence_parallel": True}, 100), ({"tp": 1, "cp": 2}, 50)])
def test_tokens_are_filled_up_where_no_parallelism_splits_them(layout: dict[str, Any], found: float) -> None:
    for tp in (1, 2):
        check_shapes(site(), SHAPES["wgrad.dy"], tokens=100, tp=tp)
        check_shapes(site(), SHAPES["wgrad eden"], tokens=192, tp=tp)
    with pytest.raises(RecipeMismatch, match=r"wgrad.dy: tokens per micro-batch = 100.* is not a multiple of 16"):
        check_shapes(site(), SHAPES["wgrad.dy"], tokens=100, **layout)
    luq = load_recipe("luq").linears["fp4"]
    check_shapes(site(), luq, tokens=104, tp=1)
    with pytest.raises(RecipeMismatch, match=r"moments of a whole tensor; change the 100 tokens of a micro-batch, use"):
        check_shapes(site(), luq, tokens=100, tp=1)


def test_moments_of_an_experts_row_or_tensor_are_refused() -> None:
    """Zero tokens fill up an expert's operands and would count in them."""
    luq = load_recipe("luq")
    (expert, dense) = sites("layers.0.experts.local_experts.3.linear_fc1", "layers.0.mlp.linear_fc1")
    check_shapes(dense, luq.linears["fp4"], tokens=None, tp=1)
    check_shapes(expert, luq.linears["weights_only"], tokens=None, tp=1)  # no operand with tokens is quantized
    with pytest.raises(RecipeMismatch, match=r"experts\.3\.linear_fc1 fprop\.x: .* multiple of 8, .* a whole tensor"):
        check_shapes(expert, luq.linears["fp4"], tokens=None, tp=1)
    rows = QuantSpec(format=INT4_TENSOR, scale=Sawb(), block="row")
    check_shapes(expert, LinearRecipe(fprop=Fprop(x=rows)), tokens=None, tp=1)  # a row of x is one token
    with pytest.raises(RecipeMismatch, match=r"wgrad\.x: .* a whole row; use an absmax scale"):
        check_shapes(expert, LinearRecipe(wgrad=Wgrad(x=rows)), tokens=None, tp=1)


def test_stacked_matrices_must_divide_one_by_one_under_tensor_parallelism() -> None:
    """SwiGLU's gate and up of 192 rows each: 96 of both on each of two ranks, no multiple of the rotation's 128."""
    fc1 = LinearSite(path="fc1", role="fc1", layer=0, in_features=256, out_features=384, pieces=2)
    linear = load_recipe("quartet2").linears["fp4"]
    check_shapes(fc1, linear, tokens=128, tp=1)
    with pytest.raises(RecipeMismatch, match=r"dgrad.dy: output features = 384 / 2 stacked / tp 2 = 96 is not a mult"):
        check_shapes(fc1, linear, tokens=128, tp=2)
