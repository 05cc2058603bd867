"""Blackwell's FP4 sums in the package against rational arithmetic, and against the oracle of accumulation.py."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from fp4dist.numerics import matmul, quantize
from fp4dist.numerics.blackwell_sums import add_toward_zero, matmul_in_groups, sum_in_groups
from fp4dist.spec.build import build
from fp4dist.spec.recipe import QuantSpec
from tests.oracle.accumulation import grouped_matmul

NVFP4 = build(QuantSpec, {"format": "nvfp4"})


def to_fp32(x: Fraction, toward_zero: bool) -> Fraction:
    """The fp32 value that `x` rounds to: 24 bits of significand, or a multiple of 2^-149."""
    if x == 0:
        return x
    size, power = abs(x), 0
    while size >= Fraction(2) ** (power + 1):
        power += 1
    while size < Fraction(2) ** power:
        power -= 1
    step = Fraction(2) ** max(power - 23, -149)
    below = size // step
    rest = size / step - below
    up = not toward_zero and (rest > Fraction(1, 2) or (rest == Fraction(1, 2) and below % 2 == 1))
    return (below + up) * step * (1 if x > 0 else -1)


def summed(a: np.ndarray, b: np.ndarray) -> float:
    """One element of the result, from fractions."""
    total = Fraction(0)
    for start in range(0, len(a), 64):
        pairs = zip(a[start : start + 64], b[start : start + 64], strict=True)
        partial = sum((Fraction(float(x)) * Fraction(float(y)) for x, y in pairs), Fraction(0))
        total = to_fp32(total + to_fp32(partial, toward_zero=False), toward_zero=True)
    return float(total)


def operand(rows: int, k: int, generator: np.random.Generator, spread: int) -> np.ndarray:
    """E2M1 codes times E4M3 scales of blocks of 16, over many binades."""
    levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = levels[generator.integers(0, 8, (rows, k))] * generator.choice([-1, 1], (rows, k))
    mantissa = 1 + generator.integers(0, 8, (rows, k // 16)) / 8
    scales = mantissa * 2.0 ** generator.integers(-6, -6 + spread, (rows, k // 16))
    return codes * np.repeat(scales, 16, axis=1)


@pytest.mark.parametrize("spread", [1, 6, 14])
def test_sums_are_those_of_rational_arithmetic(spread: int) -> None:
    generator = np.random.default_rng(spread)
    a, b = operand(3, 320, generator, spread), operand(4, 320, generator, spread)
    found = sum_in_groups(torch.from_numpy(a).float(), torch.from_numpy(b).float())
    wanted = [[summed(x, y) for y in b] for x in a]
    assert found.tolist() == wanted


def test_addition_rounds_toward_zero() -> None:
    """Random pairs over 60 binades, ties, and sums a hair below a number that fp32 holds."""
    generator = np.random.default_rng(0)
    size = generator.uniform(1, 2, (2, 400)) * 2.0 ** generator.integers(-30, 30, (2, 400))
    pairs = (size * generator.choice([-1, 1], (2, 400))).astype(np.float32)
    special = [(1.0, -(2.0**-60)), (1.0, 2.0**-60), (-1.0, 2.0**-40), (1.0, 2.0**-24), (3.0, -3.0), (0.0, -(2.0**-149))]
    a, b = np.concatenate([pairs, np.array(special, dtype=np.float32).T], axis=1)
    found = add_toward_zero(torch.from_numpy(a.copy()), torch.from_numpy(b.copy())).tolist()
    exact = [Fraction(float(x)) + Fraction(float(y)) for x, y in zip(a, b, strict=True)]
    assert found == [float(to_fp32(x, toward_zero=True)) for x in exact]


def test_quantized_operands_give_the_oracles_product() -> None:
    """Through codes and scales, the tensors' scales last; and near what the reference gives."""
    generator = torch.Generator().manual_seed(1)
    x, w = (torch.randn(24, 512, generator=generator) for _ in range(2))
    a, b = quantize(x, NVFP4), quantize(w, NVFP4)
    inner = [(q.codes, q.scales) for q in (a, b)]
    levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    sides = []
    for codes, scales in inner:
        bytes_ = codes.numpy()
        values = levels[np.stack([bytes_ & 15, bytes_ >> 4], axis=-1).reshape(24, 512)]
        sides.append(
            values * np.repeat(scales.view(torch.float8_e4m3fn).float().numpy().astype(np.float64), 16, axis=1)
        )
    alpha = float(a.global_scale * b.global_scale)
    found = matmul_in_groups(a, b)
    assert np.array_equal(found.numpy(), grouped_matmul(sides[0], sides[1], alpha))
    reference = matmul(a, b)
    assert (found - reference).norm() < 1e-6 * reference.norm()


def test_what_fp64_would_not_hold_is_refused() -> None:
    mxfp4 = build(QuantSpec, {"format": "mxfp4"})
    q = quantize(torch.randn(4, 64, generator=torch.Generator().manual_seed(2)) * 1e-6, mxfp4)
    with pytest.raises(ValueError, match="multiples of 2\\^-10"):
        matmul_in_groups(q, q)
    plain = torch.ones(4, 64)
    assert torch.equal(matmul_in_groups(plain, plain), torch.full((4, 4), 64.0))
