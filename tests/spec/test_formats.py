"""Number systems: the published grids, and what a custom grid must satisfy."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from fp4dist.spec.formats import E2M1, FORMATS, MXFP4, NVFP4, ElementFormat, Format


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
    assert Format.names() == ("nvfp4", "mxfp4")
    for name in Format.names():
        assert Format.from_name(name) is FORMATS[name]
        assert Format.from_name(name).name == name


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
