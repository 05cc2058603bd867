"""The scale rule best_of, against a search in fp64 that knows only E2M1's and E4M3's levels, and its errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fp4dist.numerics import dequantize, quantize
from fp4dist.spec.build import build
from fp4dist.spec.recipe import QuantSpec
from tests.generators import families

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3 = np.array(
    [*(m * 2.0**-9 for m in range(8)), *((8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8))][:-1]
)  # to 448
ALSO = (1.5, 0.9375, 1.0625)


def spec(**fields: object) -> QuantSpec:
    return build(QuantSpec, {"format": "nvfp4", "scale": {"kind": "best_of", **fields}})


def nearest(x: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The nearest of `levels` to each non-negative x; of two equally near the one with the even number."""
    above = np.searchsorted(levels, x).clip(1, len(levels) - 1)
    low, high = levels[above - 1], levels[above]
    up = (x - low > high - x) | ((x - low == high - x) & (above % 2 == 0))
    return np.where(up, high, low)


def least_errors(x: np.ndarray, stretches: tuple[float, ...]) -> np.ndarray:
    """[R, C/16] the least squared error of each block over the scales of `stretches`, under a tensor scale of 256."""
    blocks = np.abs(x).reshape(x.shape[0], -1, 16).astype(np.float64)
    unit = np.abs(x).max() / (256 * 6)
    errors = []
    for stretch in stretches:
        scale = nearest((blocks.max(-1) / 6 / unit * stretch).clip(max=448), E4M3)[..., None] * unit
        with np.errstate(divide="ignore", invalid="ignore"):
            codes = np.where(scale > 0, nearest((blocks / scale).clip(max=6), E2M1), 0)
        errors.append(((blocks - codes * scale) ** 2).sum(-1))
    return np.min(errors, axis=0)


@pytest.mark.parametrize("also", [ALSO, (0.5,), (1.25, 0.875, 1.5, 3.0)])
@pytest.mark.parametrize("family", ["normal", "outliers", "row_scales"])
def test_no_scale_that_is_tried_has_less_error(family: str, also: tuple[float, ...]) -> None:
    x = families(64, 128)[family]
    found = dequantize(quantize(x, spec(also=also)))
    error = (x - found).double().square().reshape(64, -1, 16).sum(-1).numpy()
    least = least_errors(x.numpy(), (1.0, *also))
    np.testing.assert_allclose(error, least, rtol=1e-3, atol=1e-12 * float(x.abs().max()) ** 2)


def test_with_one_and_a_half_alone_it_is_four_over_six() -> None:
    x = families(64, 128)["outliers"]
    for metric in ("mse", "mae", "absmax"):
        four = quantize(x, build(QuantSpec, {"format": "nvfp4", "scale": {"kind": "four_over_six", "metric": metric}}))
        best = quantize(x, spec(also=[1.5], metric=metric))
        assert torch.equal(four.codes, best.codes)
        assert torch.equal(four.scales, best.scales)


MANY = tuple(i / 16 for i in range(11, 30) if i != 16)
ERRORS = [  # of normal values and of Student's t with 3 degrees, e-3
    ((1.5,), 7.55, 7.60), (ALSO[:2], 7.03, 7.22), (ALSO, 6.90, 7.12), (MANY, 6.60, 7.01),
]  # fmt: skip


@pytest.mark.parametrize(("also", "of_normal", "of_t"), ERRORS)
def test_errors(also: tuple[float, ...], of_normal: float, of_t: float) -> None:
    """Three scales gain most of what four do, and four of what nineteen do."""
    generator = torch.Generator().manual_seed(1)
    x, z, chi = (torch.randn(*size, generator=generator) for size in ((512, 1024), (512, 1024), (512, 1024, 3)))
    for values, expected in ((x, of_normal), (z / chi.square().mean(-1).sqrt(), of_t)):
        error = (values - dequantize(quantize(values, spec(also=also)))).square().sum() / values.square().sum()
        assert float(error) * 1e3 == pytest.approx(expected, abs=0.02)
