"""FP8 elements against ml_dtypes, UE5M3 and tie rules against exact arithmetic on the written-out grids."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
import torch

from fp4dist.numerics.codes import decode, decode_scale, encode_nearest, encode_scale
from fp4dist.spec.formats import E4M3_INVERSE, ELEMENTS, FP8_E4M3, FP8_E5M2, UE5M3

FLOATS = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}


@pytest.mark.parametrize("element", [FP8_E4M3, FP8_E5M2], ids=lambda e: e.name)
def test_fp8_codes(element) -> None:  # type: ignore[no-untyped-def]
    finite = torch.arange(len(element.levels), dtype=torch.uint8)
    assert np.array_equal(decode(finite, element).numpy(), finite.numpy().view(FLOATS[element.name]).astype(np.float32))
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-18, 17, (1 << 16,), generator=generator).float()
    x = torch.randn(1 << 16, generator=generator) * torch.exp2(exponents)
    values = decode(finite, element)
    mids = (values[1:] + values[:-1]) / 2
    x = torch.cat((x, values, mids, torch.nextafter(mids, torch.tensor(0.0)), torch.nextafter(mids, torch.tensor(1e9))))
    x = torch.cat((x, -x)).clamp(-element.max, element.max)
    assert np.array_equal(encode_nearest(x, element).numpy(), x.numpy().astype(FLOATS[element.name]).view(np.uint8))
    beyond = torch.tensor([element.max * 1.5, float("inf"), -1e30])
    assert decode(encode_nearest(beyond, element), element).tolist() == [element.max, element.max, -element.max]


def ue5m3(code: int) -> Fraction:
    """The value of a byte: 5 exponent bits of bias 15, 3 mantissa bits, no sign."""
    exponent, mantissa = code >> 3, code & 7
    if exponent == 0:
        return Fraction(mantissa, 8) * Fraction(2) ** -14
    return Fraction(8 + mantissa, 8) * Fraction(2) ** (exponent - 15)


UE5M3_VALUES = [ue5m3(code) for code in range(0xF8)]


def test_ue5m3_is_e5m3_without_a_sign() -> None:
    codes = torch.arange(255, dtype=torch.uint8)
    assert decode_scale(codes, UE5M3).tolist() == [float(ue5m3(code)) for code in range(255)]
    assert decode_scale(torch.tensor([255], dtype=torch.uint8), UE5M3).isnan().all()
    assert float(ue5m3(0xF7)) == UE5M3.max == 61440
    x = torch.exp2(torch.rand(300, generator=torch.Generator().manual_seed(0)) * 36 - 19)
    x = torch.cat((x, decode_scale(codes[:0xF8], UE5M3), torch.tensor([1e6, float("inf")])))
    for value, code in zip(x.tolist(), encode_scale(x, UE5M3).tolist(), strict=True):
        exact = Fraction(min(value, 61440.0))
        nearest = min(range(0xF8), key=lambda c: (abs(UE5M3_VALUES[c] - exact), c % 2))
        assert code == nearest
    assert encode_scale(torch.tensor([float("nan")]), UE5M3).item() == 0xFF


def test_inverse_scales_keep_the_encoders_multiplier() -> None:
    x = torch.tensor([240.0, 1.0, 1 / 240, 1e-9, 0.0])
    stored = encode_scale(x, E4M3_INVERSE)
    multipliers = stored.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32).tolist()
    assert multipliers == [2 * 2.0**-9, 1.0, 240.0, 240.0, 240.0]  # the largest block has the coarsest scale
    assert decode_scale(stored, E4M3_INVERSE).tolist() == pytest.approx([1 / m for m in multipliers])


GRIDS = ["e2m1", "e1m2", "e3m0", "int4", "int2", "radix4_even", "radix4_odd", "log5", "log7", "log8"]


@pytest.mark.parametrize("ties", ["even", "away", "to_zero", "up"])
@pytest.mark.parametrize("name", GRIDS)
def test_ties_and_their_neighbours(name: str, ties: str) -> None:
    """Linear midpoints on every grid, judged in exact arithmetic."""
    element = ELEMENTS[name]
    levels = [Fraction(level) for level in element.levels]
    mids = torch.tensor([float((a + b) / 2) for a, b in pairwise(levels)])
    around = torch.cat((mids, torch.nextafter(mids, torch.tensor(0.0)), torch.nextafter(mids, torch.tensor(1e9))))
    random = torch.rand(200, generator=torch.Generator().manual_seed(0)) * element.max
    x = torch.cat((around, random, torch.tensor(element.levels)))
    x = torch.cat((x, -x))
    for value, got in zip(x.tolist(), decode(encode_nearest(x, element, ties), element).tolist(), strict=True):
        assert got == rounded(value, levels, ties)


def rounded(value: float, levels: list[Fraction], ties: str) -> float:
    magnitude, sign = Fraction(abs(value)), -1 if value < 0 else 1
    distance = min(abs(level - magnitude) for level in levels)
    nearest = [i for i, level in enumerate(levels) if abs(level - magnitude) == distance]
    if ties == "even":
        index = min(nearest, key=lambda i: i % 2)
    elif ties == "up":
        index = max(nearest) if sign > 0 else min(nearest)
    else:
        index = max(nearest) if ties == "away" else min(nearest)
    return float(sign * levels[index])
