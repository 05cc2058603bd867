"""The model of Blackwell's accumulation, judged by exact rational arithmetic, and our GEMM judged by it."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from fp4dist.numerics import matmul, quantize
from fp4dist.numerics.quantize import carrier
from tests.generators import exactly_summable, normal, spec
from tests.oracle.accumulation import GROUP, add_toward_zero, grouped_matmul


def toward_zero(x: Fraction) -> np.float32:
    """The fp32 nearest to x among those not further from zero, by search from the nearest."""
    nearest = np.float32(float(x))
    while abs(Fraction(float(nearest))) > abs(x):
        nearest = np.nextafter(nearest, np.float32(0))
    return nearest


def test_addition_rounds_toward_zero() -> None:
    generator = np.random.default_rng(0)
    a = (generator.standard_normal(4000) * 2.0 ** generator.integers(-20, 20, 4000)).astype(np.float32)
    b = (generator.standard_normal(4000) * 2.0 ** generator.integers(-20, 20, 4000)).astype(np.float32)
    expected = [toward_zero(Fraction(float(x)) + Fraction(float(y))) for x, y in zip(a, b, strict=True)]
    assert np.array_equal(add_toward_zero(a, b), np.array(expected, dtype=np.float32))
    assert (add_toward_zero(a, b) != a + b).mean() > 0.2  # the case is there


def test_groups_and_order() -> None:
    """A partial of 64 products is rounded once; the next partial is cut off, not rounded."""
    a, b = np.zeros((1, 2 * GROUP)), np.ones((1, 2 * GROUP))
    a[0, 0], a[0, 1] = 2.0**24, 1.0  # one group: 2^24 + 1 is a tie, to even
    assert grouped_matmul(a, b)[0, 0] == 2.0**24
    a[0, 1], a[0, GROUP] = 0.0, 3.0  # two groups: 2^24 + 3 lies between 2^24 + 2 and + 4
    assert grouped_matmul(a, b)[0, 0] == 2.0**24 + 2
    assert np.float32(2.0**24) + np.float32(3.0) == 2.0**24 + 4  # where nearest would go


def test_exactly_summable_inputs_agree_with_ours() -> None:
    a, b = exactly_summable(16, 4096), exactly_summable(24, 4096, seed=1)
    model = grouped_matmul(carrier(a).double().numpy(), carrier(b).double().numpy())
    assert np.array_equal(matmul(a, b).numpy(), model)


def test_toward_zero_shrinks_and_ours_stays_within_the_bound_of_both() -> None:
    """Cutting off loses at most one ulp of the running sum a group, always toward zero: a bias of the hardware."""
    qa, qb = quantize(normal(32, 4096).abs(), spec("nvfp4")), quantize(normal(32, 4096, seed=1).abs(), spec("nvfp4"))
    a, b = carrier(qa).double().numpy(), carrier(qb).double().numpy()
    model, exact = grouped_matmul(a, b).astype(np.float64), a @ b.T
    groups = 4096 // GROUP
    assert (model <= exact).mean() > 0.9
    assert ((exact - model) <= exact * (groups + 2) * 2.0**-23).all()
    assert (exact - model).mean() > 0
    ours = matmul(qa, qb).double().numpy() / (qa.global_scale * qb.global_scale).item()
    assert (np.abs(ours - model) <= exact * (groups + 4096) * 2.0**-23).all()
