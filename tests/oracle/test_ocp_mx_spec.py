"""MXFP4 against the OCP Microscaling text, evaluated in float64 with math.log2 and math.floor."""

from __future__ import annotations

import math

import pytest
import torch

from fp4dist.numerics import dequantize, quantize
from tests.generators import families, spec

LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def nearest_even(u: float) -> float:
    magnitude = min(abs(u), 6.0)
    best = min(range(8), key=lambda i: (abs(LEVELS[i] - magnitude), i % 2))
    return math.copysign(LEVELS[best], u)


@pytest.mark.parametrize("family", ["normal", "ties", "row_scales", "outliers", "bf16"])
@pytest.mark.parametrize("name", ["mxfp4", "mxfp4_ceil"])
def test_values_of_every_block(name: str, family: str) -> None:
    x = families(8, 64)[family].float()
    values = dequantize(quantize(x, spec(name)))
    for row in range(8):
        for first in (0, 32):
            block = x[row, first : first + 32].double().tolist()
            amax = max(map(abs, block))
            exponent = math.floor(math.log2(amax)) - 2 if name == "mxfp4" else math.ceil(math.log2(amax / 6))
            expected = [nearest_even(v / 2.0**exponent) * 2.0**exponent for v in block]
            assert values[row, first : first + 32].double().tolist() == expected


def test_three_quarters_acts_after_the_scale_is_chosen() -> None:
    x = torch.full((1, 32), 1.9)  # floor exponent -2: u = 7.6 clips at 6 without headroom, 5.7 with it
    assert dequantize(quantize(x, spec("mxfp4"))).max().item() == 1.5
    assert dequantize(quantize(x, spec("mxfp4_34"))).max().item() == pytest.approx(2.0, rel=1e-6)  # 6 * 2^-2 * 4/3


def test_extremes() -> None:
    tiny = quantize(torch.full((1, 32), 1e-45), spec("mxfp4"))
    assert tiny.scales.item() == 0
    zero = quantize(torch.zeros(1, 32), spec("mxfp4"))
    assert torch.equal(dequantize(zero), torch.zeros(1, 32))
    infinite = quantize(torch.full((1, 32), float("inf")), spec("mxfp4"))
    assert infinite.scales.item() == 255
    assert dequantize(infinite).isnan().all()
