"""The reference backend is `fp4dist.numerics` itself."""

from __future__ import annotations

import pytest
import torch

from fp4dist.kernels.reference import amax
from fp4dist.kernels.registry import Request, resolve
from fp4dist.numerics import dequantize, matmul, quantize, requantize
from fp4dist.spec.run import BackendConfig
from tests.generators import normal, spec

CPU = torch.device("cpu")


@pytest.mark.parametrize("fn", [quantize, requantize, dequantize, matmul])
def test_operations_are_the_definitions(fn: object) -> None:
    request = Request(fn.__name__, spec("nvfp4"), CPU)  # type: ignore[attr-defined]
    assert resolve(request, BackendConfig(kind="reference")).fn is fn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_amax(dtype: torch.dtype) -> None:
    x = normal(3, 5).to(dtype)
    assert amax(x).dtype == torch.float32
    assert amax(x) == x.float().abs().max()
    assert amax(-x.reshape(-1)) == amax(x)
    x[1, 2] = float("nan")
    assert amax(x).isnan()
