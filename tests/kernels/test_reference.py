"""The reference backend is `fp4dist.numerics` itself."""

from __future__ import annotations

import pytest
import torch

from fp4dist.kernels.reference import amax, grouped_matmul
from fp4dist.kernels.registry import Request, resolve
from fp4dist.numerics import dequantize, matmul, quantize, requantize
from fp4dist.spec.run import BackendConfig
from tests.generators import normal, spec

CPU = torch.device("cpu")


@pytest.mark.parametrize("fn", [quantize, requantize, dequantize, matmul])
def test_operations_are_the_definitions(fn: object) -> None:
    request = Request(fn.__name__, spec("nvfp4"), CPU)  # type: ignore[attr-defined]
    assert resolve(request, BackendConfig(kind="reference")).fn is fn


def test_grouped_matmul_is_matmul_of_each_pair() -> None:
    """Pairs of different sizes, one of them with a plain operand."""
    sizes = ((32, 16, 48), (16, 64, 16), (1, 16, 32))
    a = [quantize(normal(m, k, seed=m), spec("nvfp4")) for m, _, k in sizes]
    b = [quantize(normal(n, k, seed=n), spec("nvfp4")) for _, n, k in sizes[:2]] + [normal(16, 32)]
    products = grouped_matmul(a, b)
    assert [tuple(p.shape) for p in products] == [(m, n) for m, n, _ in sizes]
    assert all(torch.equal(p, matmul(x, y)) for p, x, y in zip(products, a, b, strict=True))
    assert grouped_matmul([], []) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_amax(dtype: torch.dtype) -> None:
    x = normal(3, 5).to(dtype)
    assert amax(x).dtype == torch.float32
    assert amax(x) == x.float().abs().max()
    assert amax(-x.reshape(-1)) == amax(x)
    x[1, 2] = float("nan")
    assert amax(x).isnan()
