"""The block-scaled GEMM: exact where sums are exact, within the analytic bound elsewhere."""

from __future__ import annotations

import pytest
import torch

from fp4dist.numerics import Key, dequantize, matmul, quantize
from tests.generators import exactly_summable, normal, spec


def test_exactly_summable_inputs_give_the_exact_product() -> None:
    qa, qb = exactly_summable(32, 4096), exactly_summable(48, 4096, seed=1)
    assert torch.equal(matmul(qa, qb).double(), dequantize(qa).double() @ dequantize(qb).double().t())


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_16x16", "mxfp4", "mxfp4_34", "eden"])
def test_random_inputs_within_the_analytic_bound(name: str) -> None:
    a, b = normal(32, 256), normal(48, 256, seed=1)
    qa, qb = quantize(a, spec(name), Key(slot=2)), quantize(b, spec(name), Key(slot=3))
    da, db = dequantize(qa).double(), dequantize(qb).double()
    bound = (256 + 4) * 2.0**-24 * (da.abs() @ db.abs().t()) + 1e-30
    assert ((matmul(qa, qb).double() - da @ db.t()).abs() <= bound).all()


def test_one_quantized_operand() -> None:
    a, b = normal(32, 64), normal(16, 64, seed=1)
    qb = quantize(b, spec("nvfp4"))
    torch.testing.assert_close(matmul(a, qb), a @ dequantize(qb).t())


def test_different_bases_are_refused() -> None:
    a = quantize(normal(32, 256), spec("eden"), Key(slot=2))
    with pytest.raises(ValueError, match="different rotated bases: 128 and 1"):
        matmul(a, quantize(normal(32, 256), spec("nvfp4")))
    with pytest.raises(ValueError, match="contracted dimensions differ"):
        matmul(normal(2, 32), normal(2, 16))
