"""GEMMs on carriers give exact sums where sums are exact: in Triton's interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

from fp4dist.kernels.triton.matmul import carrier_types
from fp4dist.spec.build import build
from fp4dist.spec.recipe import QuantSpec
from tests.generators import spec
from tests.kernels.triton.interpreter import check


@pytest.mark.skipif(torch.cuda.is_available(), reason="the compiled kernels are tested instead")
def test_the_interpreted_gemms_are_exact() -> None:
    check("gemm_parity", "no difference on")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "what", ["gemms", "products", "random_products", "scaled_segments", "groups", "groups_that_round", "graphs"]
)
def test_the_compiled_gemms_are_exact(what: str) -> None:
    from tests.kernels.triton import gemm_parity

    assert list(getattr(gemm_parity, f"of_{what}")(torch.device("cuda:0"))) == []


def test_carriers_without_fp8_tensor_cores_are_bf16() -> None:
    cpu = torch.device("cpu")
    assert carrier_types(spec("nvfp4"), spec("mxfp4"), cpu) == (torch.bfloat16, torch.bfloat16)
    assert carrier_types(spec("mxfp4"), spec("mxfp4"), cpu) == (torch.bfloat16, torch.bfloat16)
    assert carrier_types(spec("nvfp4"), None, cpu) == (torch.bfloat16, torch.bfloat16)
    assert carrier_types(None, None, cpu) is None


def test_what_no_carrier_holds_has_none() -> None:
    scaled_in_blocks = build(QuantSpec, {"format": {"element": "e2m1", "scale": "fp32", "block": [1, 16]}})
    assert carrier_types(scaled_in_blocks, spec("nvfp4"), torch.device("cpu")) is None
