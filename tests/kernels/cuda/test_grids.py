"""What csrc's general quantizer and filters take, and what they say of the rest; their bits: test_emulated."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fp4dist.kernels.cuda import filters, grids, quantizers
from fp4dist.kernels.triton import quantizers as of_triton
from fp4dist.spec.build import build
from fp4dist.spec.estimators import TrustMask
from fp4dist.spec.load import load_recipe, shipped
from fp4dist.spec.recipe import SLOTS, QuantSpec
from tests.generators import SPECS
from tests.kernels.triton.grids_parity import MORE


@pytest.mark.parametrize("data", [*SPECS.values(), *MORE], ids=str)
def test_what_triton_quantizes_csrc_does(data: dict[str, Any]) -> None:
    spec = build(QuantSpec, data)
    if of_triton.why_not(spec) is None:
        assert quantizers.why_not(spec) is None


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ({"format": {"element": "log10", "scale": "fp32", "block": "tensor"}}, "grid of 11 levels"),
        ({"format": "nvfp4", "outer": [16, 128]}, "outer"),
        ({"format": "fp8_e5m2", "rounding": "stochastic"}, "rounding to FP8"),
        ({"format": {"element": "e2m1", "scale": "fp32", "block": [1, 512]}}, "blocks"),
        ({"format": "fp4_row", "scale": "mse_search"}, "mse_search of whole rows"),
        ({"format": "nvfp4", "scale": {"kind": "mse_search", "steps": 200}}, "more than 128 scales"),
    ],
)
def test_what_it_lacks_is_named(data: dict[str, Any], what: str) -> None:
    assert what in (quantizers.why_not(build(QuantSpec, data)) or "")


def test_masks_are_for_every_quantizer_that_clips() -> None:
    linears = [linear for name in shipped("recipes") for linear in load_recipe(name).linears.values()]
    specs = [spec for linear in linears for slot in SLOTS if (spec := linear.slot(slot)) is not None]
    masked = [spec for spec in specs if isinstance(spec.estimator, TrustMask) and not spec.has_parts]
    assert len(masked) > 4
    assert [filters.why_not(spec) for spec in masked if filters.why_not(spec)] == []


def test_the_door() -> None:
    spec = build(QuantSpec, {"format": "nvfp4", "outer": "row"})
    with pytest.raises(TypeError, match=r"expected a bf16 or fp32 matrix, got torch\.float16"):
        grids.quantize(torch.zeros(16, 32, dtype=torch.float16), spec)
    with pytest.raises(ValueError, match="columns of 16"):
        grids.quantize(torch.zeros(16, 24), spec)
    with pytest.raises(TypeError, match="filters take bf16 or fp32"):
        filters.filter_by_mask(torch.zeros(1, 16).half(), torch.zeros(1, 2, dtype=torch.uint8), None, None)
