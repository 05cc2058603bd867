"""Number systems: the published grids, and what a custom grid must satisfy."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from fp4dist.spec.build import build
from fp4dist.spec.formats import E2M1, FORMATS, MXFP4, NVFP4, ElementFormat, Format, ScaleFormat


def test_presets_are_the_published_number_systems() -> None:
    assert E2M1.levels == (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    assert E2M1.max == 6.0
    assert (NVFP4.element, NVFP4.scale.name, NVFP4.scale.max, NVFP4.block, NVFP4.outer) == (
        E2M1, "e4m3", 448.0, (1, 16), "tensor"
    )  # fmt: skip
    assert (MXFP4.element, MXFP4.scale.name, MXFP4.scale.max, MXFP4.block, MXFP4.outer) == (
        E2M1, "e8m0", 2.0**127, (1, 32), "none"
    )  # fmt: skip


def test_names_find_their_presets() -> None:
    assert Format.names()[:2] == ("nvfp4", "mxfp4")
    for preset in (Format, ElementFormat, ScaleFormat):
        for name in preset.names():
            assert preset.from_name(name).name == name
    assert Format.from_name("mxfp8") is FORMATS["mxfp8"]


def test_formats_are_frozen_and_hashable() -> None:
    assert len({NVFP4, MXFP4, NVFP4}) == 2
    with pytest.raises(FrozenInstanceError):
        NVFP4.block = (1, 32)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("bits", "levels", "message"),
    [
        (2, (0.0, 1.0, 2.0), "3 levels do not fit 2 bits"),
        (4, (1.0, 2.0), "must start with 0"),
        (4, (0.0, 2.0, 1.0), "ascend"),
        (4, (0.0, 1.0, 1.0), "ascend"),
    ],
)
def test_grids_must_be_sign_magnitude(bits: int, levels: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ElementFormat(name="odd", bits=bits, levels=levels)


def test_written_out_formats_and_their_titles() -> None:
    spelled = build(Format, {"element": "e1m2", "scale": "fp32", "block": [1, 16]})
    assert (spelled.title, spelled.block, spelled.outer) == ("e1m2/fp32", (1, 16), "none")
    assert NVFP4.title == "nvfp4"
    custom = build(ElementFormat, {"name": "thirds", "bits": 4, "levels": [0, 1, 3, 9]})
    assert (custom.max, custom.exponent, custom.packed) == (9.0, 3, True)


@pytest.mark.parametrize(
    ("name", "bits", "smallest", "largest", "nonzero"),
    [
        ("e2m1", 4, 0.5, 6, 7), ("e1m2", 4, 0.5, 3.5, 7), ("e3m0", 4, 0.25, 16, 7), ("int4", 4, 1, 7, 7),
        ("int2", 2, 1, 1, 1), ("radix4_even", 4, 4.0**-3, 64, 7), ("radix4_odd", 4, 2 * 4.0**-3, 128, 7),
        ("log7", 4, 1, 64, 7), ("log8", 5, 1, 128, 8), ("e4m3", 8, 2.0**-9, 448, 126),
        ("e5m2", 8, 2.0**-16, 57344, 123),
    ],
)  # fmt: skip
def test_published_grids(name: str, bits: int, smallest: float, largest: float, nonzero: int) -> None:
    element = ElementFormat.from_name(name)
    assert (element.bits, element.levels[1], element.max, len(element.levels) - 1) == (bits, smallest, largest, nonzero)


def test_a_float_grid_is_a_float_grid() -> None:
    with pytest.raises(ValueError, match="not those of a float with 2 mantissa bits"):
        ElementFormat(name="odd", bits=8, levels=(0.0, 1.0, 2.0, 3.0, 5.0), mantissa=2)
    with pytest.raises(ValueError, match=r"bits = 9 must be in \[2, 8\]"):
        ElementFormat(name="wide", bits=9, levels=(0.0, 1.0))
