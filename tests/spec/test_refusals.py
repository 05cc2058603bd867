"""What a recipe may not say, written as a user would write it; each message names the place and a way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fp4dist.errors import ConfigError, RecipeMismatch
from fp4dist.nn.apply import plan_table
from fp4dist.spec.build import build
from fp4dist.spec.load import load_recipe, load_run
from fp4dist.spec.phases import LrShape
from fp4dist.spec.recipe import Phase, QuantSpec, Recipe
from tests.tiny_llama import make_sites

SR = {"rounding": "stochastic"}
ROOMY = {"kind": "absmax", "headroom": "17/16"}
TENSOR = {"element": "e2m1", "scale": "fp32", "block": "tensor"}
FRESH = {"size": 32, "signs": "fresh"}


def recipe(fprop: dict[str, Any], dgrad: Any = None, wgrad: Any = None, **more: Any) -> Recipe:
    linear = {"fprop": fprop, "dgrad": dgrad or {}, "wgrad": wgrad or {}}
    return build(Recipe, {"name": "mine", "linears": {"fp4": linear}, "rules": [{"linear": "fp4"}], **more})


def run_file(folder: Path, text: str) -> str:
    file = folder / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return f"recipe={file}"


# ---------- the list


def test_stochastic_rounding_with_a_clipping_rule() -> None:
    with pytest.raises(ConfigError, match=r"^linears.fp4.dgrad.dy: .* clips is biased: absmax has headroom 1 < 17/16"):
        recipe({}, {"dy": {"format": "nvfp4", **SR}})
    assert recipe({}, {"dy": {"format": "nvfp4", **SR, "allow_bias": True}})  # the named flag, for parity with a paper


def test_reuse_without_a_transposable_block() -> None:
    with pytest.raises(ConfigError, match=r"dgrad.w.source = reuse .* needs a square block .* use requant"):
        recipe({"w": "nvfp4"}, {"w": {"format": "nvfp4", "source": "reuse"}})
    assert recipe({"w": "nvfp4"}, {"w": {"format": "nvfp4", "source": "requant"}})


def test_unequal_rotations_of_a_gemms_operands() -> None:
    with pytest.raises(ConfigError, match=r"^linears.fp4.wgrad: .* different rotations .* cancels only when both"):
        recipe({}, None, {"dy": {"format": "nvfp4", "rotation": FRESH}, "x": "nvfp4"})
    with pytest.raises(ConfigError, match="different rotations"):
        recipe({}, None, {"dy": {"format": "nvfp4", "rotation": FRESH}, "x": {"format": "nvfp4", "rotation": {}}})


def test_cage_and_osci_reset() -> None:
    with pytest.raises(ConfigError, match=r"weights: cage and osci_reset both pull .* keep one"):
        recipe({"w": "nvfp4"}, weights=["cage", "osci_reset"])


def test_q_ramping_and_osci_reset() -> None:
    with pytest.raises(ConfigError, match=r"weights: q_ramping and osci_reset both answer .* keep one"):
        recipe({"w": "nvfp4"}, weights=["q_ramping", "osci_reset"])


def test_q_ramping_with_gradient_clipping() -> None:
    with pytest.raises(ConfigError, match=r"optim.clip_grad = 1.0: recipe tetrajet_qramping .* set optim.clip_grad: 0"):
        load_run("quickstart", ["recipe=tetrajet_qramping"])
    assert load_run("quickstart", ["recipe=tetrajet_qramping", "optim.clip_grad=0"])


def test_dge_with_the_quest_mask() -> None:
    with pytest.raises(ConfigError, match=r"fprop.w: estimator = dge with scale quest: .* use estimator: mask"):
        recipe({"w": {"format": "mxfp4", "scale": "quest", "estimator": "dge"}})


def test_a_rotation_that_does_not_divide_the_contracted_dimension() -> None:
    with pytest.raises(ConfigError, match=r"rotation.size = 16 is not a multiple of the block's 32 columns"):
        recipe({"x": {"format": "mxfp4", "rotation": {}}, "w": {"format": "mxfp4", "rotation": {}}})
    with pytest.raises(RecipeMismatch, match=r"wgrad.dy: tokens per micro-batch = 64 / 2 pieces.* multiple of 128"):
        plan_table(make_sites(2), load_recipe("quartet2"), tokens=64, cp=2)


# ---------- operands


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"format": "mxfp4", "amax": "hold"}, "amax = hold keeps the amax of a whole tensor, but nothing in mxfp4"),
        ({"format": "nvfp4", "amax": "grad_scale"}, "amax = grad_scale is the only scale of its tensor"),
        ({"format": TENSOR, "amax": "hold", "amax_scope": "shard"}, "leave amax_scope: shard out"),
        ({"format": TENSOR, **SR, "amax": "hindsight"}, "biased: amax = hindsight may be below the present one"),
        (
            {
                "format": "ue5m3_fp4",
                **SR,
                "amax": "hold",
                "scale": {**ROOMY, "budget": 2048},
            },
            "amax = hold may be below",
        ),
        ({"format": "nvfp4", "estimator": "mask"}, "estimator = mask lets nothing pass where the scale clips"),
        ({"format": TENSOR, "estimator": "lsq"}, "estimator = lsq with amax = current"),
        ({"format": TENSOR, "amax": "learned"}, "estimator = straight with amax = learned"),
        ({"format": "nvfp4", "rounding": "ema", "scale": "four_over_six"}, "ema rounding decides between neighbours"),
        (
            {"format": "nvfp4", "rounding": {"kind": "eden", "group": "rotation"}, "allow_bias": True},
            "eden with group: rotation shares its correction",
        ),
        ({"format": "nvfp4", "outlier": {"kind": "occ", "alpha": 0.5}}, r"alpha = 0.5 must be in \(0.5, 1\)"),
        ({"format": "nvfp4", "outlier": {"kind": "topk", "k": 256}}, "k = 256 must be at least 1 and below group"),
        ({"format": "nvfp4", "outlier": {"kind": "channels", "share": 1.0}}, r"share = 1.0 must be in \(0, 1\)"),
        ({"format": "nvfp4", "outlier": {"kind": "channels", "collect": 0}}, "collect = 0 must be at least 1"),
        ({"format": "nvfp4", "outlier": {"kind": "hot_residual", "every": -1}}, "every = -1 not negative"),
        (
            {"format": "nvfp4", "split": {"kind": "lowrank", "rank": 0}},
            "rank = 0 and iterations = 2 must be at least",
        ),
        ({"format": "nvfp4", "estimator": {"kind": "dge", "k": 0.5}}, "k = 0.5 must be at least 1"),
        ({"format": TENSOR, "amax": {"kind": "hold", "steps": 0}}, "steps = 0 must be at least 1"),
        ({"format": TENSOR, "amax": {"kind": "hindsight", "momentum": 1}}, r"momentum = 1.0 must be in \[0, 1\)"),
        (
            {"format": TENSOR, "amax": {"kind": "grad_scale", "level": 0}},
            "level = 0.0 and start = None must be pos",
        ),
        ({"format": TENSOR, "amax": {"kind": "learned", "start": 0}}, "start = 0.0 must be positive"),
        ({"format": "nvfp4", "rounding": {"kind": "ema", "decay": 1}}, r"decay = 1.0 must be in \(0, 1\)"),
        (
            {"format": "nvfp4", "rounding": {"kind": "eden", "align": "pre", "truncate": 4}, "rotation": FRESH},
            "truncate cuts the fp32 block scale",
        ),
        ({"format": "nvfp4", "rounding": {"kind": "eden", "truncate": 23}, "rotation": FRESH}, r"must be in \[0, 23\)"),
    ],
)
def test_operands(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(QuantSpec, spec)


MEAN, OUTER = {"format": "nvfp4", "split": "mean"}, {"format": "nvfp4", "outer": [1, 128]}
HOT, SQUARE = {"format": "nvfp4", "outlier": "channels"}, {"format": "nvfp4", "block": [16, 16]}
EMA = {"format": "nvfp4", "rounding": "ema"}


@pytest.mark.parametrize(
    ("gemms", "message"),
    [
        ([{"w": MEAN}], "w.split = mean takes the mean over tokens, and a weight has none; use lowrank"),
        ([{"w": HOT}], "w.outlier = channels: channels are chosen by x and stand for both; give it x"),
        ([{"x": EMA}], "x.rounding = ema: a moving average exists for weights alone; give it w"),
        (
            [{"x": {"format": "nvfp4", "rotation": FRESH}, "w": {**EMA, "rotation": FRESH}}],
            "ema under fresh signs: the average would be in another basis each time",
        ),
        ([{"w": EMA}, {"w": EMA}], "ema: it decides the forward weight's codes; set it in fprop"),
        ([{}, {"dy": {"format": "nvfp4", "estimator": "dge"}}], "gradients pass the quantizers of fprop alone"),
        ([{}, {"dy": HOT}], "dy.outlier = channels: dgrad contracts outputs, not input channels"),
        ([{}, {}, {"dy": HOT}], "dy.outlier = channels: input channels belong to x"),
        ([{}, {}, {"x": {"format": "nvfp4", "outlier": "hot_residual"}}], "wgrad contracts tokens, not input channels"),
        ([{}, {}, {"x": HOT}], "repeats the choice of fprop.x, which has none"),
        ([{"x": HOT}, {}, {"x": {"format": "nvfp4", "outlier": {"kind": "channels", "share": 0.2}}}], "other fields"),
        ([{}, {"w": "dequant"}], "dgrad.w = dequant needs quantized forward codes, but the forward operand is bf16"),
        ([{"w": SQUARE}, {"w": {**SQUARE, "source": "reuse", "outlier": "occ"}}], "leave split and outlier out"),
        (
            [
                {"x": {"format": "nvfp4", "rotation": FRESH}, "w": {"format": "nvfp4", "rotation": FRESH}},
                {"w": {"format": "nvfp4", "source": "requant"}},
            ],
            "whose signs are not kept; use master, or fixed signs or none in fprop",
        ),
    ],
)
def test_gemms(gemms: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(*gemms)


# ---------- around the optimizer, phases, runs


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"gradients": ["ada_clip", "ada_clip"]}, "gradients: ada_clip is given twice; keep one"),
        ({"gradients": [{"kind": "spike_clip", "threshold": 0}]}, "threshold = 0.0 must be positive"),
        ({"gradients": [{"kind": "ada_clip", "decay": 1}]}, "decay = 1.0 must be in"),
        ({"gradients": [{"kind": "ada_norm", "decay_to": 0}]}, "decay_to = 0.0 in"),
        ({"gradients": [{"kind": "moment_reset", "every": 10, "warmup": 10}]}, "warmup = 10 in"),
        ({"weights": [{"kind": "cage", "silence": 1}]}, "silence = 1.0 in"),
        (
            {"weights": [{"kind": "osci_reset", "start": 1.5}]},
            "start = 1.5 must be a share of the run",
        ),
        ({"weights": [{"kind": "osci_reset", "window": 300}]}, "window = 300 must be in"),
        ({"weights": [{"kind": "osci_reset", "share": 0}]}, "share = 0.0 in"),
        ({"weights": [{"kind": "q_ramping", "probe": 1000}]}, "probe = 1000 must be in"),
        ({"weights": [{"kind": "q_ramping", "stretch": 0}]}, "stretch = 0 and longest = 100 at least 1"),
        ({"phases": [{"name": "a", "last": 0.1, "trigger": "manual", "use": {"fp4": "bf16"}}]}, "exactly one of last"),
        ({"phases": [{"name": "a", "use": {"fp4": "bf16"}}]}, "needs exactly one of last, step, trigger"),
        ({"phases": [{"name": "a", "step": 3}]}, "phase 'a' changes nothing"),
        (
            {"phases": [{"name": "a", "step": 3, "assign": [{"linear": "fp8"}]}]},
            r"assign = 'fp8' is not one",
        ),
        ({"phases": [{"name": "a", "step": 3, "lr": {"warmup": 1.5}}]}, "warmup = 1.5 must be a share"),
        ({"phases": [{"name": "a", "step": 3, "lr": {"peak": 0}}]}, "peak = 0.0 must be positive"),
        (
            {"phases": [{"name": "a", "trigger": {"kind": "grad_noise", "every": 0}, "use": {"fp4": "bf16"}}]},
            "every = 0",
        ),
    ],
)
def test_training(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe({"w": "nvfp4"}, **more)


def test_weight_control_needs_a_quantized_weight_with_one_value() -> None:
    with pytest.raises(ConfigError, match=r"weights: cage needs a linear whose fprop.w is quantized"):
        recipe({"x": "nvfp4"}, weights=["cage"])
    noisy = {"format": "nvfp4", "scale": {"kind": "absmax", "headroom": "17/16"}, **SR}
    with pytest.raises(ConfigError, match=r"weights: cage compares a weight with its quantized value, .* draws anew"):
        recipe({"w": noisy}, weights=["cage"])


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        (
            "cage",
            ["engine.kind=deepspeed", "engine.zero_stage=1"],
            r"zero_stage = 1: recipe cage has cage, .* 0$",
        ),
        ("wang2501", ["engine.kind=deepspeed", "engine.zero_stage=2"], "recipe wang2501 has optimizer_state"),
        ("spam", ["optim.kind=sgd"], r"optim.kind = sgd: recipe spam works on AdamW's moments"),
        ("bf16", ["optim.kind=adafactor"], r"adafactor with engine.kind = megatron"),
        ("bf16", ["optim.kind=sgd", "optim.momentum=1"], r"momentum = 1.0 must be in \[0, 1\)"),
    ],
)
def test_runs(name: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_run("quickstart", [f"recipe={name}", *overrides])


def test_what_the_refusals_allow() -> None:
    """The ways out that the messages name."""
    assert load_run("quickstart", ["recipe=sun2020", "optim.kind=sgd"])
    assert load_run("quickstart", ["recipe=cage", "engine.kind=deepspeed", "engine.zero_stage=0"])
    assert Phase(name="a", step=3, lr=LrShape(warmup=3))
    held = {"format": "ue5m3_fp4", **SR, "amax": "hold", "scale": {"kind": "absmax", "headroom": "17/16"}}
    assert build(QuantSpec, held)
    assert build(QuantSpec, {"format": TENSOR, "amax": "learned", "estimator": "lsq"})
