"""The layer table: what layers.json says, shares of FLOPs, and the text for the log."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fp4dist.nn.apply import plan_table
from fp4dist.nn.report import fp4_share, table_text
from fp4dist.nn.sites import LinearSite
from fp4dist.spec.load import load_recipe, recipe_hash
from fp4dist.spec.recipe import Dgrad, Fprop, LinearRecipe, Recipe, Rule, Wgrad
from tests.generators import spec
from tests.tiny_llama import make_sites

NV = spec("nvfp4")


def test_json_has_every_linear_with_its_six_slots() -> None:
    table = plan_table(make_sites(4), load_recipe("nvidia_nvfp4")).to_json()
    assert json.loads(json.dumps(table)) == table
    assert table["recipe"] == "nvidia_nvfp4"
    assert table["recipe_hash"] == recipe_hash(load_recipe("nvidia_nvfp4"))
    assert table["remarks"] == ["rule 0: the model has no expert", "rule 1: the model has no expert"]
    assert table["fp4_share_of_block_linear_flops"] == 0.75  # the last of four layers stays in bf16
    assert len(table["linears"]) == 4 * 7 + 1
    by_path = {row["path"]: row for row in table["linears"]}
    assert by_path["model.layers.0.mlp.gate_proj"] == {
        "path": "model.layers.0.mlp.gate_proj",
        "role": "fc1",
        "layer": 0,
        "shape": [256, 128],
        "linear": "fp4",
        "slots": {
            "fprop.x": "nvfp4 1x16",
            "fprop.w": "nvfp4 16x16",
            "dgrad.dy": "nvfp4 1x16 17/16 sr",
            "dgrad.w": "nvfp4 16x16 reuse",
            "wgrad.dy": "nvfp4 1x16 17/16 sr rht16",
            "wgrad.x": "nvfp4 1x16 rht16",
        },
        "gemms": {"fprop": "fp4", "dgrad": "fp4", "wgrad": "fp4"},
        "kernels": {},
        "gather": {},
        "why": "rule 1: qkv/proj/fc1/fc2/expert",
    }
    last = by_path["model.layers.3.mlp.gate_proj"]
    assert (last["linear"], last["why"]) == ("bf16", "rule 0: qkv/proj/fc1/fc2/expert layers 3-3")
    assert set(last["slots"].values()) == {"bf16"}
    assert (by_path["lm_head"]["linear"], by_path["lm_head"]["why"]) == ("bf16", "no rule matches")


@pytest.mark.parametrize(
    ("name", "layers", "share"), [("bf16", 4, 0), ("quartet2", 4, 1), ("nvidia_nvfp4", 12, 10 / 12)]
)
def test_share_of_block_linear_flops(name: str, layers: int, share: float) -> None:
    assert fp4_share(plan_table(make_sites(layers), load_recipe(name)).rows) == pytest.approx(share, abs=1e-15)


def test_only_gemms_with_two_quantized_operands_count() -> None:
    linear = LinearRecipe(fprop=Fprop(x=NV, w=NV), dgrad=Dgrad(dy=NV), wgrad=Wgrad(dy=NV, x=NV))
    recipe = Recipe(name="r", linears={"fp4": linear}, rules=(Rule(path="*", linear="fp4"),))
    assert fp4_share(plan_table(make_sites(2), recipe).rows) == pytest.approx(2 / 3)


def test_large_layers_weigh_more() -> None:
    linear = LinearRecipe(fprop=Fprop(x=NV, w=NV), dgrad=Dgrad(dy=NV, w=NV), wgrad=Wgrad(dy=NV, x=NV))
    recipe = Recipe(name="r", linears={"fp4": linear}, rules=(Rule(roles=("fc1",), linear="fp4"),))
    rows = plan_table(make_sites(1), recipe).rows
    assert fp4_share(rows) == pytest.approx(2 * 256 / (4 * 128 + 3 * 256))  # the head is no block linear


def test_a_gemm_counts_once_a_sample() -> None:
    """LUQ averages two samples of dY in wgrad, here times an X in bf16: half of the four GEMMs run in FP4."""
    linear = load_recipe("luq").linears["fp4"]
    linear = replace(linear, wgrad=replace(linear.wgrad, x=None))
    recipe = Recipe(name="r", linears={"fp4": linear}, rules=(Rule(path="*", linear="fp4"),))
    table = plan_table(make_sites(1), recipe)
    assert table.to_json()["fp4_share_of_block_linear_flops"] == 0.5
    lines = [line for line in table.table().splitlines() if "run 2 times" in line]
    assert lines
    assert all(line.strip().startswith("wgrad") for line in lines)


def test_a_model_without_roles_counts_all_of_its_linears() -> None:
    sites = [LinearSite(path=f"net.{i}", role="", layer=None, in_features=128, out_features=128) for i in range(4)]
    linear = load_recipe("quartet2").linears["fp4"]
    recipe = Recipe(name="r", linears={"fp4": linear}, rules=(Rule(path="net.[012]", linear="fp4"),))
    assert fp4_share(plan_table(sites, recipe).rows) == 0.75
    assert fp4_share(()) == 0.0


def test_the_text_groups_like_layers_and_says_why_not() -> None:
    text = plan_table(make_sites(12), load_recipe("nvidia_nvfp4")).table()
    lines = text.splitlines()
    assert lines[0] == (
        "recipe nvidia_nvfp4 (arXiv:2509.25149), 83.3% of block-linear FLOPs in FP4"
        " (bf16 stands for the model's own dtype)"
    )
    assert "  note: rule 0: the model has no expert" in lines
    assert "  gate_proj    [256 x 128] layers 0-9: fp4 (rule 1: qkv/proj/fc1/fc2/expert)" in lines
    assert "  gate_proj    [256 x 128] layers 10-11: bf16 (rule 0: qkv/proj/fc1/fc2/expert layers 10-11)" in lines
    assert "  lm_head      [64 x 128]: bf16 (no rule matches)" in lines
    at = lines.index("  gate_proj    [256 x 128] layers 0-9: fp4 (rule 1: qkv/proj/fc1/fc2/expert)")
    assert lines[at + 1 : at + 4] == [
        "      fprop  x: nvfp4 1x16  |  w: nvfp4 16x16",
        "      dgrad  dy: nvfp4 1x16 17/16 sr  |  w: nvfp4 16x16 reuse",
        "      wgrad  dy: nvfp4 1x16 17/16 sr rht16  |  x: nvfp4 1x16 rht16",
    ]


def test_the_text_says_how_tokens_are_gathered() -> None:
    table = plan_table(make_sites(2), load_recipe("nvidia_nvfp4"))
    row = next(row for row in table.rows if row.site.path == "model.layers.0.mlp.gate_proj")
    gathered = replace(row, gather={"fprop.x": "packed", "wgrad.x": "high"})
    lines = table_text([gathered], table.recipe, ()).splitlines()
    assert "      fprop  x: nvfp4 1x16 gather: packed  |  w: nvfp4 16x16" in lines
    assert "      wgrad  dy: nvfp4 1x16 17/16 sr rht16  |  x: nvfp4 1x16 rht16 gather: high" in lines
    assert gathered.to_json()["gather"] == {"fprop.x": "packed", "wgrad.x": "high"}


def test_scattered_layers_are_listed_as_ranges() -> None:
    linear = load_recipe("quartet2").linears["fp4"]
    rules = tuple(Rule(roles=("fc2",), layers=pair, linear="fp4") for pair in ((0, 2), (5, 5), (7, 8)))
    text = plan_table(make_sites(9), Recipe(name="r", linears={"fp4": linear}, rules=rules)).table()
    assert "down_proj    [128 x 256] layers 0-2: fp4" in text
    assert "down_proj    [128 x 256] layers 3-4,6: bf16 (no rule matches)" in text
    assert "recipe r (no paper)" in text
