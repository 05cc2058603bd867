"""The rotation is an orthogonal map, cancels inside a GEMM, and has the published constant signs."""

from __future__ import annotations

import pytest
import torch

from fp4dist.numerics import Key
from fp4dist.numerics.rotation import FIXED_SIGNS, butterflies, rotate, unrotate
from fp4dist.spec.blocks import Hadamard
from tests.generators import normal


def sylvester(n: int) -> torch.Tensor:
    h = torch.ones(1, 1)
    while h.shape[0] < n:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_butterflies_multiply_by_the_sylvester_matrix(size: int) -> None:
    x = torch.randint(-8, 9, (4, 2 * size)).float()  # integers: exact in any order
    expected = (x.unflatten(-1, (2, size)) @ sylvester(size)).flatten(-2)
    assert torch.equal(butterflies(x, size), expected)


@pytest.mark.parametrize("signs", ["none", "fixed", "fresh"])
def test_rotation_cancels_in_a_product_and_inverts(signs: str) -> None:
    rotation, key = Hadamard(size=16, signs=signs), Key(seed=1, slot=2)  # type: ignore[arg-type]
    a, b = normal(8, 64), normal(8, 64, seed=1)
    rotated = rotate(a, rotation, key) @ rotate(b, rotation, Key(seed=1, slot=3)).t() / 16
    torch.testing.assert_close(rotated, a @ b.t(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(unrotate(rotate(a, rotation, key) / 4, rotation, key), a)


def test_fixed_signs_are_the_published_mask() -> None:
    assert sum(1 << i for i, s in enumerate(FIXED_SIGNS) if s < 0) == 0xD7E8
