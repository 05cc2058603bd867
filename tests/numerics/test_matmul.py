"""The block-scaled GEMM: exact where sums are exact, within the analytic bound elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fp4dist.numerics import Key, dequantize, matmul, quantize
from fp4dist.numerics.quantize import carrier as decoded
from fp4dist.numerics.tensor import Carrier
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


def test_a_product_is_rounded_to_bf16_once_from_the_scaled_sum() -> None:
    qa, qb = quantize(normal(32, 256), spec("eden"), Key(slot=2)), quantize(normal(48, 256), spec("eden"), Key(slot=3))
    assert torch.equal(matmul(qa, qb, out=torch.bfloat16), matmul(qa, qb).bfloat16())


def test_a_product_is_added_to_a_given_sum() -> None:
    qa, qb = exactly_summable(32, 256), exactly_summable(48, 256, seed=1)
    total = torch.ones(32, 48)
    assert matmul(qa, qb, into=total) is total
    assert torch.equal(total, matmul(qa, qb) + 1)
    with pytest.raises(ValueError, match=r"into is torch.float32 \[32, 47\]; it must be torch.float32 \[32, 48\]"):
        matmul(qa, qb, into=total[:, 1:])
    with pytest.raises(ValueError, match="has no meaning with `into`"):
        matmul(qa, qb, out=torch.bfloat16, into=total)
    with pytest.raises(ValueError, match=r"out = torch.float16 must be torch.float32 or torch.bfloat16"):
        matmul(qa, qb, out=torch.float16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e5m2])
def test_a_carrier_stands_for_its_codes(dtype: torch.dtype) -> None:
    name = "nvfp4" if dtype == torch.bfloat16 else "mxfp4"
    qa, qb = quantize(normal(32, 256), spec(name)), quantize(normal(48, 256, seed=1), spec(name))
    carriers = []
    for q in (qa, qb):
        values, scale = decoded(q), q.global_scale * 0.25
        carriers.append(Carrier((values * 4).to(dtype), scale))
        assert torch.equal(carriers[-1].values.float(), values * 4)  # else nothing is tested
    assert torch.equal(matmul(*carriers), matmul(qa, qb))
    assert torch.equal(matmul(carriers[0], qb), matmul(qa, qb))


def test_a_carriers_rows_and_rotation_multiply_the_sum() -> None:
    values = normal(32, 64).bfloat16()
    rows = torch.exp2(torch.arange(32.0).remainder(5))[:, None]
    plain = Carrier(values, torch.tensor(0.5), 16)
    assert torch.equal(matmul(replace(plain, rows=rows), plain), matmul(plain, plain) * rows)
    torch.testing.assert_close(matmul(plain, plain), values.float() @ values.float().t() * 0.25 / 16)
    with pytest.raises(ValueError, match="different rotated bases: 16 and 1"):
        matmul(plain, values)


def test_factors_of_parts_of_a_carriers_rows_multiply_its_values() -> None:
    values, parts = normal(8, 64).bfloat16(), torch.exp2(torch.arange(16.0).remainder(5)).reshape(8, 2)
    carrier = Carrier(values, torch.tensor(0.5), rows=parts)
    whole = values.float() * parts.repeat_interleave(32, dim=1) * 0.5
    torch.testing.assert_close(matmul(carrier, normal(4, 64)), whole @ normal(4, 64).t())
