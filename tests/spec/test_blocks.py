"""Blocks check their own numbers; what two blocks must agree on is a QuantSpec's business (test_recipe.py)."""

from __future__ import annotations

from typing import Any

import pytest

from fp4dist.spec.blocks import (
    E4M3_NO_CLIP,
    FLOOR_NO_CLIP,
    AbsMax,
    BestOf,
    Ceil,
    Eden,
    Floor,
    FourOverSix,
    Hadamard,
    MseSearch,
    Nearest,
    Quest,
    Sawb,
    Stochastic,
)

BLOCKS = (AbsMax, FourOverSix, BestOf, Floor, Ceil, Quest, Sawb, MseSearch, Nearest, Stochastic, Eden)


def test_each_block_has_its_own_tag() -> None:
    assert [block().kind for block in BLOCKS] == [
        "absmax", "four_over_six", "best_of", "floor", "ceil", "quest", "sawb", "mse_search", "nearest", "stochastic",
        "eden",
    ]  # fmt: skip


def test_defaults_are_the_published_values() -> None:
    assert (AbsMax().headroom, AbsMax().budget) == (1.0, 448.0)
    assert (FourOverSix().metric, FourOverSix().headroom, FourOverSix().budget) == ("mse", 1.0, 256.0)
    assert (Eden().align, Eden().headroom, Eden().budget) == ("post_hoc", 17 / 16 * 0.93, 256.0)
    assert Floor().headroom == 1.0
    assert (Hadamard().size, Hadamard().signs) == (16, "fixed")
    assert (E4M3_NO_CLIP, FLOOR_NO_CLIP) == (17 / 16, 4 / 3)


@pytest.mark.parametrize("block", [FourOverSix, BestOf, Eden])
@pytest.mark.parametrize("values", [{"headroom": 0.0}, {"headroom": -1.0}, {"budget": 0.0}, {"budget": 449.0}])
def test_e4m3_rules_stay_in_range(block: Any, values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"headroom = .* must be positive and budget = .* in \(0, 448\]"):
        block(**values)


def test_floor_needs_positive_headroom() -> None:
    with pytest.raises(ValueError, match="headroom = 0 must be positive"):
        Floor(headroom=0)


@pytest.mark.parametrize("size", [0, 8, 24, 256])
def test_rotation_sizes(size: int) -> None:
    with pytest.raises(ValueError, match=f"size = {size} must be 16, 32, 64 or 128"):
        Hadamard(size=size, signs="fresh")


def test_fixed_signs_exist_for_size_16_only() -> None:
    with pytest.raises(ValueError, match="published sign vector has 16 entries; use fresh"):
        Hadamard(size=32, signs="fixed")
    assert Hadamard(size=128, signs="none").size == 128
    assert Hadamard(size=32, signs="fixed", mask=0xD7E8D7E8).mask == 0xD7E8D7E8


@pytest.mark.parametrize("fields", [{"signs": "fresh"}, {"signs": "none"}, {"mask": -1}, {"mask": 1 << 16}])
def test_a_mask_is_a_constant_sign_vector_of_the_rotations_size(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs signs: fixed and at most 16 bits"):
        Hadamard(**{"size": 16, "mask": 3, **fields})


@pytest.mark.parametrize(
    ("block", "values", "message"),
    [
        (AbsMax, {"headroom": 0.0}, "must be positive"),
        (AbsMax, {"budget": -1.0}, "must be positive"),
        (Ceil, {"finer_below": 0.5}, "belongs to of: amax"),
        (Ceil, {"of": "amax", "finer_below": 1.5}, r"must be in \[0, 1\]"),
        (Quest, {"factor": 0.0}, "must be positive"),
        (Sawb, {"rms": 12.1}, "give both or neither"),
        (BestOf, {"also": ()}, r"also = \[\] must be positive numbers, at least one, 1 not among them"),
        (BestOf, {"also": (1.5, 1.0)}, r"also = \[1.5, 1.0\] must be positive numbers"),
        (BestOf, {"also": (-1.5,)}, r"also = \[-1.5\] must be positive numbers"),
        (MseSearch, {"steps": 0}, "steps = 0 must be at least 1"),
        (MseSearch, {"lowest": 1.0}, r"lowest = 1.0 in \(0, 1\)"),
        (Stochastic, {"samples": 0}, r"samples = 0 must be in \[1, 16\]"),
    ],
)
def test_a_block_checks_its_numbers(block: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block(**values)
