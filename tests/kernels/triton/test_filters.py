"""Gradients through trust masks: reference = Triton, bit for bit, interpreted on a CPU and compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

from fp4dist.kernels.triton import filters
from fp4dist.spec.build import build
from fp4dist.spec.recipe import QuantSpec
from tests.kernels.triton.interpreter import check


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the compiled kernels are tested instead")
def test_the_interpreted_filters_have_the_references_bits() -> None:
    check("filters_parity", "no difference in")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_compiled_filters_have_the_references_bits() -> None:
    from tests.kernels.triton import filters_parity

    assert list(filters_parity.differences(torch.device("cuda"))) == []


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ({"format": "fp4_row", "estimator": "dge"}, "estimator dge"),
        ({"format": "int4", "scale": "sawb", "estimator": "mask"}, "fp32 scales"),
        ({"format": "mxfp4", "block": [1, 64], "scale": "quest", "estimator": "mask"}, "blocks"),
        ({"format": "nvfp4", "outer": [1, 128], "scale": "quest", "estimator": "mask"}, "outer"),
    ],
)
def test_what_the_filters_lack_is_named(data: dict, what: str) -> None:
    assert what in (filters.why_not(build(QuantSpec, data)) or "")
