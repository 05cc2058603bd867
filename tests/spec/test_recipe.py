"""What a recipe may say: unbiased stochastic rounding, matching rotations, legal sources, rules and phases."""

from __future__ import annotations

from typing import Any

import pytest

from fp4dist.errors import ConfigError
from fp4dist.spec.blocks import AbsMax, Ceil, Eden, Floor, FourOverSix, Hadamard, Nearest, Stochastic
from fp4dist.spec.build import build, plain
from fp4dist.spec.formats import MXFP4, NVFP4
from fp4dist.spec.recipe import GEMMS, SLOTS, Dgrad, Fprop, LinearRecipe, Phase, QuantSpec, Recipe, Rule, Wgrad

NV = QuantSpec(format=NVFP4)
SQUARE = QuantSpec(format=NVFP4, block=(16, 16))
FP4 = LinearRecipe(fprop=Fprop(x=NV, w=NV))


def spec(**fields: Any) -> QuantSpec:
    return QuantSpec(**{"format": NVFP4, **fields})


# ---------- QuantSpec


def test_defaults_follow_the_format() -> None:
    assert (NV.shape, NV.rule, NV.rounding, NV.rotation, NV.source) == ((1, 16), AbsMax(), Nearest(), None, "master")
    assert QuantSpec(format=MXFP4).shape == (1, 32)
    assert QuantSpec(format=MXFP4).rule == Floor()


@pytest.mark.parametrize("rule", [Floor(), Ceil()])
def test_e4m3_scales_need_their_rules(rule: Any) -> None:
    with pytest.raises(ValueError, match=r"does not fit e4m3 scales of nvfp4; use one of absmax, four_over_six"):
        spec(scale=rule)


@pytest.mark.parametrize("rule", [AbsMax(), FourOverSix()])
def test_e8m0_scales_need_their_rules(rule: Any) -> None:
    with pytest.raises(ValueError, match=r"does not fit e8m0 scales of mxfp4; use one of floor, ceil"):
        spec(format=MXFP4, scale=rule)


@pytest.mark.parametrize(
    ("fields", "way_out"),
    [
        ({}, "headroom: 17/16"),
        ({"scale": AbsMax(headroom=1.06)}, "headroom: 17/16"),
        ({"scale": FourOverSix(headroom=17 / 16)}, "biased: the choice of the scale follows the noise"),
        ({"format": MXFP4}, "headroom: 4/3"),
        ({"format": MXFP4, "scale": Floor(headroom=1.3)}, "headroom: 4/3"),
    ],
)
def test_stochastic_rounding_with_a_rule_that_clips_is_refused(fields: dict[str, Any], way_out: str) -> None:
    with pytest.raises(ValueError, match=r"biased.*allow_bias: true") as caught:
        spec(rounding=Stochastic(), **fields)
    assert way_out in str(caught.value)
    assert spec(rounding=Stochastic(), allow_bias=True, **fields).draws_noise


@pytest.mark.parametrize(
    "fields",
    [
        {"scale": AbsMax(headroom=17 / 16)},
        {"scale": AbsMax(headroom=1.2)},
        {"format": MXFP4, "scale": Floor(headroom=4 / 3)},
        {"format": MXFP4, "scale": Ceil()},
    ],
)
def test_stochastic_rounding_with_a_rule_that_never_clips(fields: dict[str, Any]) -> None:
    assert spec(rounding=Stochastic(), **fields).draws_noise


def test_fractions_of_a_file_are_exact_enough() -> None:
    for text, kind, format_ in (("17/16", "absmax", "nvfp4"), ("4/3", "floor", "mxfp4")):
        data = {"format": format_, "rounding": "stochastic", "scale": {"kind": kind, "headroom": text}}
        assert build(QuantSpec, data).draws_noise


@pytest.mark.parametrize("rotation", [None, Hadamard(size=16, signs="fixed"), Hadamard(size=128, signs="none")])
def test_eden_needs_a_fresh_rotation(rotation: Hadamard | None) -> None:
    with pytest.raises(ValueError, match="eden is unbiased only under a fresh rotation"):
        spec(rounding=Eden(), rotation=rotation)
    assert spec(rounding=Eden(), rotation=rotation, allow_bias=True).draws_noise


def test_eden_chooses_its_own_scale() -> None:
    rotation = Hadamard(size=128, signs="fresh")
    assert spec(rounding=Eden(), rotation=rotation).draws_noise
    with pytest.raises(ValueError, match="eden chooses its own block scale; leave `scale` out"):
        spec(rounding=Eden(), scale=AbsMax(), rotation=rotation)
    with pytest.raises(ValueError, match="it needs format nvfp4"):
        spec(format=MXFP4, rounding=Eden())
    with pytest.raises(ValueError, match=r"eden corrects 1xN blocks; block = \[16, 16\]"):
        spec(rounding=Eden(), block=(16, 16))


@pytest.mark.parametrize("block", [(2, 16), (16, 8), (1, 1), (1, 0), (0, 0), (1, 24), (24, 24), (1, -16), (-16, -16)])
def test_block_shapes(block: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"must be \[1, n\] or square, with n a power of two"):
        spec(block=block)


def test_the_rotation_covers_whole_blocks() -> None:
    with pytest.raises(ValueError, match=r"rotation.size = 16 is not a multiple of the block's 32 columns"):
        spec(block=(1, 32), rotation=Hadamard(size=16))


@pytest.mark.parametrize(
    ("fields", "multiple"),
    [
        ({}, 16),
        ({"block": (1, 64)}, 64),
        ({"block": (1, 4)}, 4),
        ({"block": (1, 4), "rounding": Stochastic(), "scale": AbsMax(headroom=2)}, 8),  # one draw serves 8 elements
        ({"rotation": Hadamard(size=128, signs="none")}, 128),
    ],
)
def test_what_the_contracted_dimension_must_divide_by(fields: dict[str, Any], multiple: int) -> None:
    assert spec(**fields).columns_multiple == multiple


def test_deterministic_means_neither_noise_nor_fresh_signs() -> None:
    assert NV.is_deterministic
    assert spec(rotation=Hadamard()).is_deterministic
    assert not spec(rotation=Hadamard(signs="fresh")).is_deterministic
    assert not spec(rounding=Eden(), allow_bias=True).is_deterministic


@pytest.mark.parametrize(
    ("fields", "label"),
    [
        ({}, "nvfp4 1x16"),
        ({"block": (16, 16), "scale": FourOverSix()}, "nvfp4 16x16 4/6"),
        ({"scale": FourOverSix(metric="mae")}, "nvfp4 1x16 4/6(mae)"),
        ({"scale": AbsMax(headroom=17 / 16), "rounding": Stochastic()}, "nvfp4 1x16 17/16 sr"),
        ({"scale": AbsMax(headroom=0.988125, budget=256)}, "nvfp4 1x16 0.9881 max256"),
        ({"scale": FourOverSix(headroom=17 / 16, budget=448)}, "nvfp4 1x16 4/6 17/16 max448"),
        ({"format": MXFP4, "scale": Floor(headroom=4 / 3)}, "mxfp4 1x32 4/3"),
        ({"rounding": Eden(), "rotation": Hadamard(size=128, signs="fresh")}, "nvfp4 1x16 eden rht*128"),
        ({"rounding": Eden(align="pre"), "rotation": Hadamard(), "allow_bias": True}, "nvfp4 1x16 eden(pre) rht16"),
        ({"rotation": Hadamard(signs="none"), "source": "requant"}, "nvfp4 1x16 had16 requant"),
        ({"format": MXFP4, "scale": Ceil()}, "mxfp4 1x32 ceil"),
        ({"rotation": Hadamard(), "amax_scope": "shard"}, "nvfp4 1x16 rht16 shard-amax"),
    ],
)
def test_labels(fields: dict[str, Any], label: str) -> None:
    assert spec(**fields).label() == label


INVERSE = {"element": "e2m1", "scale": "e4m3_inverse", "block": [1, 16], "outer": "tensor"}
E1M2 = {"element": "e1m2", "scale": "fp32", "block": [1, 16]}
SR = {"rounding": "stochastic"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        # blocks and outer levels
        ({"format": "nvfp4", "block": "row"}, r"kept in fp32; e4m3 scales need a block \[r, c\]"),
        ({"format": "nvfp4", "outer": [1, 24]}, r"must be whole blocks of \[1, 16\]"),
        ({"format": "nvfp4", "block": [16, 16], "outer": [1, 128]}, r"must be whole blocks of \[16, 16\]"),
        ({"format": "nvfp4", "block": [16, 16], "outer": "row"}, "needs blocks within a row"),
        ({"format": "mxfp4", "outer": "tensor"}, "but e8m0 has fp32's; use none"),
        ({"format": "int4", "outer": [1, 128]}, "but fp32 has fp32's; use none"),
        ({"format": INVERSE, "outer": "none"}, "need outer: tensor, row"),
        # rules and scale formats
        ({"format": "int4", "scale": "four_over_six"}, "does not fit fp32 scales of int4; use one of absmax"),
        ({"format": "mxfp8", "scale": "sawb"}, "does not fit e8m0 scales of mxfp8"),
        ({"format": "nvfp4", "scale": {"kind": "absmax", "budget": 449}}, "e4m3 scales end at 448"),
        ({"format": INVERSE, "scale": {"kind": "absmax", "budget": 448}}, "e4m3_inverse scales end at 240"),
        ({"format": "ue5m3_fp4", "scale": {"kind": "absmax", "budget": 70000}}, "ue5m3 scales end at 61440"),
        ({"format": "int4", "scale": {"kind": "absmax", "budget": 256}}, "have no outer level; leave budget out"),
        ({"format": "int4", "block": [1, 32], "scale": "quest"}, "optimum of e2m1, not of int4"),
        ({"format": "fp4_row", "scale": "quest"}, "use spread: rms, or a block of fixed size"),
        ({"format": "fp4_row", "scale": "sawb"}, "those of int4, not of e2m1"),
        # roundings
        ({"format": "mxfp8", "rounding": {"kind": "nearest", "ties": "away"}}, "round ties to even, as conversions do"),
        ({"format": "nvfp4", "scale": "mse_search", **SR, "allow_bias": True}, "needs nearest rounding"),
        ({"format": "nvfp4", "scale": "best_of", **SR, "allow_bias": True}, "best_of compares errors"),
        ({"format": "nvfp4", "outer": "row", "rounding": "eden", "rotation": {"signs": "fresh"}}, "under one scale"),
    ],
)  # fmt: skip
def test_meaningless_combinations_name_the_way_out(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(QuantSpec, data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"format": "mxfp4", "scale": "quest"}, "quest clips the largest elements on purpose"),
        ({"format": "int4", "scale": "sawb"}, "sawb clips the largest elements"),
        ({"format": "mxfp4", "scale": {"kind": "ceil", "of": "amax", "finer_below": 0.87}}, "ceil clips the largest"),
        ({"format": "log7", "scale": {"kind": "absmax", "headroom": 0.8}}, "has headroom 0.8 < 1"),
        ({"format": "ue5m3_fp4"}, "headroom: 17/16"),
        ({"format": "nvfp4", "outer": [1, 128]}, "headroom: 17/16"),
        ({"format": "mxfp8"}, "headroom: 8/7"),
        ({"format": INVERSE, "scale": {"kind": "absmax", "budget": 240, "headroom": 2}}, "their coarsest steps"),
        ({"format": "nvfp4", "outer": "none", "scale": {"kind": "absmax", "headroom": 2}}, "set outer: tensor"),
    ],
)  # fmt: skip
def test_every_biased_pair_is_refused_unless_allowed(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"biased.*{message}|{message}.*biased") as caught:
        build(QuantSpec, {**data, **SR})
    assert "allow_bias: true for parity with a paper" in str(caught.value)
    assert build(QuantSpec, {**data, **SR, "allow_bias": True}).draws_noise


@pytest.mark.parametrize(
    ("data", "label"),
    [
        ("fp4_row", "fp4_row row"),
        ({"format": "int4", "scale": "sawb"}, "int4 tensor sawb"),
        ({"format": "log7", "rounding": {"kind": "stochastic", "samples": 2}}, "log7 tensor sr(2)"),
        ({"format": E1M2, **SR, "rotation": {"size": 16}}, "e1m2/fp32 1x16 sr rht16"),
        ({"format": "nvfp4", "outer": [1, 128]}, "nvfp4 1x16 outer:1x128"),
        ({"format": "nvfp4", "outer": "none"}, "nvfp4 1x16 outer:none"),
        ({"format": "ue5m3_fp4", "scale": {"kind": "absmax", "budget": 2048, "nonzero": True}},
         "ue5m3_fp4 1x16 max2048 nonzero"),
        ({"format": "mxfp4", "scale": {"kind": "quest", "power": "nearest"}}, "mxfp4 1x32 quest(nearest)"),
        ({"format": "nvfp4", "scale": {"kind": "quest", "spread": "rms", "factor": 0.5}}, "nvfp4 1x16 quest rms 0.5"),
        ({"format": "int4", "scale": {"kind": "sawb", "rms": 3, "mean_abs": 2}}, "int4 tensor sawb(3,2)"),
        ({"format": "nvfp4", "scale": "mse_search"}, "nvfp4 1x16 mse(100:0.2)"),
        ({"format": "nvfp4", "scale": "best_of"}, "nvfp4 1x16 best(1,3/2,15/16)"),
        ({"format": "mxfp4", "scale": {"kind": "ceil", "of": "amax", "finer_below": 0.87}},
         "mxfp4 1x32 ceil(amax) finer<0.87"),
        ({"format": "nvfp4", "rounding": {"kind": "nearest", "ties": "away"}}, "nvfp4 1x16 ties:away"),
        ({"format": "mxfp4", "rotation": {"size": 32, "mask": 0xD7E8D7E8}}, "mxfp4 1x32 rht32:d7e8d7e8"),
        ({"format": "nvfp4", "amax_scope": "shard"}, "nvfp4 1x16 shard-amax"),
    ],
)  # fmt: skip
def test_labels_of_the_whole_vocabulary(data: Any, label: str) -> None:
    made = build(QuantSpec, data)
    assert made.label() == label
    assert build(QuantSpec, plain(made)) == made


def test_what_rows_and_columns_must_divide_by() -> None:
    for data, multiples in (
        ("fp4_row", (1, 2)),
        ("int4", (1, 2)),
        ({"format": "nvfp4", "outer": [1, 128]}, (1, 128)),
        ({"format": "nvfp4", "block": [16, 16], "outer": [32, 64]}, (32, 64)),
        ({"format": "log7", **SR}, (1, 8)),
    ):
        made = build(QuantSpec, data)
        assert (made.rows_multiple, made.columns_multiple) == multiples


def test_which_codes_may_be_joined_from_parts() -> None:
    joins = {
        name: build(QuantSpec, {"format": name}).joins
        for name in ("nvfp4", "mxfp4", "ue5m3_fp4", "int4", "fp4_row", "mxfp8")
    }
    assert joins == {"nvfp4": True, "mxfp4": True, "ue5m3_fp4": True, "int4": False, "fp4_row": False, "mxfp8": False}
    assert not build(QuantSpec, {"format": "nvfp4", "outer": "row"}).joins


# ---------- GEMMs and operands


def test_samples_belong_to_one_operand_of_a_backward_gemm() -> None:
    sampled = build(QuantSpec, {"format": "log7", "rounding": {"kind": "stochastic", "samples": 2}})
    assert Wgrad(dy=sampled, x=NV).dy is sampled
    with pytest.raises(ValueError, match=r"wgrad: both operands dy and x average several samples, .* 4 GEMMs"):
        Wgrad(dy=sampled, x=sampled)
    with pytest.raises(ValueError, match="x averages 2 samples: only a gradient's GEMM repeats"):
        Fprop(x=sampled)


def test_reuse_of_tensor_scaled_codes_but_not_of_rows_or_tiles() -> None:
    int4 = build(QuantSpec, "int4")
    reused = build(QuantSpec, {"format": "int4", "source": "reuse"})
    assert LinearRecipe(fprop=Fprop(x=int4, w=int4), dgrad=Dgrad(w=reused), wgrad=Wgrad(x=reused)).wgrad.x == reused
    row, tiled = {"format": "fp4_row"}, {"format": "nvfp4", "block": [16, 16], "outer": [16, 32]}
    for data, message in ((row, "needs a square block .* block = row"), (tiled, r"outer = \(16, 32\) lies along one")):
        with pytest.raises(ValueError, match=message):
            LinearRecipe(
                fprop=Fprop(w=build(QuantSpec, data)), dgrad=Dgrad(w=build(QuantSpec, {**data, "source": "reuse"}))
            )


def test_an_fp8_gemm_is_no_fp4_gemm() -> None:
    fp8, row = build(QuantSpec, "fp8_e4m3"), build(QuantSpec, "fp4_row")
    recipe = LinearRecipe(fprop=Fprop(x=row, w=row), dgrad=Dgrad(dy=fp8, w=fp8), wgrad=Wgrad(dy=fp8, x=row))
    assert [recipe.gemm_is_fp4(g) for g in GEMMS] == [True, False, False]


@pytest.mark.parametrize(
    ("gemm", "names"), [(Fprop, ("x", "w")), (Dgrad, ("dy", "w")), (Wgrad, ("dy", "x"))], ids=GEMMS
)
@pytest.mark.parametrize("other", [NV, None, spec(rotation=Hadamard(signs="fresh"))], ids=["plain", "bf16", "fresh"])
def test_operands_of_a_gemm_share_their_rotation(gemm: Any, names: tuple[str, str], other: QuantSpec | None) -> None:
    rotated = spec(rotation=Hadamard())
    first, second = names
    assert gemm(**{first: rotated, second: rotated}) is not None
    message = rf"operands {first} and {second} have different rotations .* cancels only when both operands"
    for pair in ({first: rotated, second: other}, {first: other, second: rotated}):
        with pytest.raises(ValueError, match=message):
            gemm(**pair)


def test_sources_belong_to_backward_weights_and_inputs() -> None:
    requant = spec(source="requant")
    for gemm, name in ((Fprop, "x"), (Fprop, "w")):
        with pytest.raises(ValueError, match=f"{name}.source = requant: a forward operand has only its master"):
            gemm(**{name: requant})
    for gemm in (Dgrad, Wgrad):
        with pytest.raises(ValueError, match=r"dy.source = requant: the incoming gradient has only its master"):
            gemm(dy=requant)


@pytest.mark.parametrize("source", ["requant", "reuse"])
def test_a_source_of_codes_needs_codes(source: Any) -> None:
    for backward in ({"dgrad": Dgrad(w=spec(source=source))}, {"wgrad": Wgrad(x=spec(source=source))}):
        with pytest.raises(ValueError, match=f"source = {source} needs quantized forward codes"):
            LinearRecipe(**backward)


def test_reuse_reads_square_unrotated_codes() -> None:
    reused = spec(block=(16, 16), source="reuse")
    assert LinearRecipe(fprop=Fprop(w=SQUARE), dgrad=Dgrad(w=reused)).slot("dgrad.w") == reused
    with pytest.raises(ValueError, match=r"dgrad.w.source = reuse .* needs a square block .* block = \[1, 16\]"):
        LinearRecipe(fprop=Fprop(w=NV), dgrad=Dgrad(w=spec(source="reuse")))
    rotation = Hadamard()
    rotated = spec(block=(16, 16), rotation=rotation)
    with pytest.raises(ValueError, match=r"without rotation; .* use requant"):
        LinearRecipe(
            fprop=Fprop(x=spec(rotation=rotation), w=rotated),
            dgrad=Dgrad(dy=spec(rotation=rotation), w=spec(block=(16, 16), rotation=rotation, source="reuse")),
        )


@pytest.mark.parametrize(
    "fields", [{"block": (16, 16), "scale": FourOverSix()}, {"block": (32, 32)}, {"format": MXFP4, "block": (16, 16)}]
)
def test_reuse_repeats_the_forward_spec(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"reuse must repeat the forward operand's spec \(nvfp4 16x16\), got"):
        LinearRecipe(fprop=Fprop(w=SQUARE), dgrad=Dgrad(w=spec(source="reuse", **fields)))


def test_reuse_repeats_the_scope_of_the_amax() -> None:
    """Codes under one rank's scale are not those under the logical tensor's."""
    alone = spec(block=(16, 16), amax_scope="shard")
    again = spec(block=(16, 16), amax_scope="shard", source="reuse")
    assert LinearRecipe(fprop=Fprop(w=alone), dgrad=Dgrad(w=again)).slot("dgrad.w") == again
    with pytest.raises(ValueError, match=r"reuse must repeat .* \(nvfp4 16x16\), got nvfp4 16x16 shard-amax reuse"):
        LinearRecipe(fprop=Fprop(w=SQUARE), dgrad=Dgrad(w=again))


def test_reuse_may_spell_out_the_default_rule() -> None:
    LinearRecipe(fprop=Fprop(w=SQUARE), dgrad=Dgrad(w=spec(block=(16, 16), scale=AbsMax(), source="reuse")))


def test_requant_goes_back_to_the_original_basis_by_signs_that_are_kept() -> None:
    fixed = spec(rotation=Hadamard())
    assert LinearRecipe(fprop=Fprop(x=fixed, w=fixed), wgrad=Wgrad(x=spec(source="requant")))
    rotated = spec(rotation=Hadamard(signs="fresh"))
    with pytest.raises(ValueError, match=r"wgrad.x.source = requant .* the forward operand has rotation = Hadamard"):
        LinearRecipe(fprop=Fprop(x=rotated, w=rotated), wgrad=Wgrad(x=spec(source="requant")))


def test_slots_and_kinds() -> None:
    recipe = LinearRecipe(fprop=Fprop(x=NV, w=SQUARE), dgrad=Dgrad(dy=NV))
    assert [recipe.slot(s) for s in SLOTS] == [NV, SQUARE, NV, None, None, None]
    assert [recipe.gemm_is_fp4(g) for g in GEMMS] == [True, False, False]
    assert not recipe.is_high_precision
    assert LinearRecipe().is_high_precision
    assert {recipe, LinearRecipe(fprop=Fprop(x=NV, w=SQUARE), dgrad=Dgrad(dy=NV))} == {recipe}


# ---------- rules and phases


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"roles": ()}, "roles is empty"),
        ({"first": 0}, "first = 0 must be a fraction below 1 or a whole number"),
        ({"last": -1}, "last = -1 must be"),
        ({"last": 1.5}, "last = 1.5 must be"),
        ({"first": 1, "last": 1}, "give only one of layers, first, last"),
        ({"layers": (0, 1), "last": 0.5}, "give only one of layers, first, last"),
    ],
)
def test_rule_conditions(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rule(linear="bf16", **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "needs exactly one of last, step"),
        ({"last": 0.1, "step": 3}, "needs exactly one of last, step"),
        ({"last": 1.0}, r"last = 1.0 must be in \(0, 1\)"),
        ({"step": -1}, "step = -1 must not be negative"),
        ({"step": 1, "use": {}}, "phase 'p' changes nothing"),
    ],
)
def test_phase_starts(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Phase(**{"name": "p", "use": {"fp4": "bf16"}, **fields})


def test_a_phase_starts_at_its_step() -> None:
    assert Phase(name="p", use={"fp4": "bf16"}, last=0.18).start(100) == 82
    assert Phase(name="p", use={"fp4": "bf16"}, last=0.5).start(7) == 4
    assert Phase(name="p", use={"fp4": "bf16"}, step=7).start(100) == 7


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rules": (Rule(linear="fp8"),)}, r"rules\[0\].linear = 'fp8' is not one of fp4, bf16"),
        ({"rules": ()}, "linears.fp4 is used by no rule and no phase"),
        (
            {"rules": (), "phases": (Phase(name="p", use={"fp4": "bf16"}, step=1, enabled=False),)},
            "^rules: no rule and no enabled phase asks for linears.fp4, so nothing would run in FP4",
        ),
        (
            {"phases": (Phase(name="p", use={"fp4": "tail"}, step=1),)},
            r"phases\[0\].use = 'tail' is not one of fp4, bf16",
        ),
        ({"linears": {"bf16": FP4}, "rules": ()}, "linears.bf16: this name is taken"),
        (
            {"phases": tuple(Phase(name="p", use={"fp4": "bf16"}, step=s) for s in (1, 2))},
            "phases: the names p, p must differ",
        ),
    ],
)
def test_names_in_a_recipe(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**{"name": "r", "linears": {"fp4": FP4}, "rules": (Rule(linear="fp4"),), **fields})


def test_a_recipe_of_a_file_reports_the_key() -> None:
    data = {
        "name": "r",
        "linears": {"fp4": {"fprop": {"x": "nvfp4"}}},
        "rules": [{"linear": "fp4"}, {"first": 0, "linear": "fp4"}],
    }
    with pytest.raises(ConfigError, match=r"^rules\[1\]: first = 0.0 must be a fraction"):
        build(Recipe, data)


def test_what_a_recipe_wants() -> None:
    assert not Recipe(name="bf16").wants_fp4
    assert not Recipe(name="r", rules=(Rule(linear="bf16"),)).wants_fp4
    recipe = Recipe(name="r", linears={"fp4": FP4}, rules=(Rule(linear="fp4"),))
    assert recipe.wants_fp4
    assert recipe.linear("fp4") is FP4
    assert recipe.linear("bf16").is_high_precision
