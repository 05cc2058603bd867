"""What MS-EDEN's first pass may skip: blocks whose corrected scale cannot be the tensor's largest."""

from __future__ import annotations

from math import inf

import pytest
import torch

pytest.importorskip("triton")

from fp4dist.kernels.triton.eden import bounds_of_corrected, bounds_of_correction
from fp4dist.numerics import codes
from fp4dist.numerics.scales import target_max
from fp4dist.spec.blocks import Eden
from fp4dist.spec.formats import E2M1


def corrections(u: torch.Tensor) -> torch.Tensor:
    """[n] <u,u> / <u,c> in fp64 of [n, 16] scaled values."""
    level = codes.decode(codes.encode_nearest(u, E2M1), E2M1).double()
    u = u.double()
    return (u * u).sum(1) / (u * level).sum(1)


@pytest.mark.parametrize("v", [target_max(6.0, Eden().headroom), 6.0, 5.0, 4.5, 3.0, 2.0, 1.0])
def test_no_correction_reaches_the_bound(v: float) -> None:
    least, most = bounds_of_correction(v)
    generator = torch.Generator().manual_seed(0)
    blocks = [torch.rand(20000, 16, generator=generator) * v]
    ends = [(low + high) / 2 for low, high in zip(E2M1.levels, E2M1.levels[1:], strict=False)]
    for end in [e for e in ends if e < v]:  # where rounding down is worst: alone, and in part of a block
        for number in (1, 8, 15):
            block = torch.zeros(1, 16)
            block[0, :number] = end * (1 - 1e-6)
            blocks.append(block)
    u = torch.cat(blocks)
    u[:, 15] = v
    assert least < corrections(u).min()
    assert corrections(u).max() < most


def test_scales_that_may_be_half_larger_stay_within_their_bounds() -> None:
    """A block keeps the scale of its amax or takes 1.5 of it; what is corrected is above and below both."""
    v = target_max(6.0, Eden().headroom)
    least, most = bounds_of_corrected(v, True)
    u = torch.rand(50000, 16, generator=torch.Generator().manual_seed(0)) * v
    u[:, 15] = v
    both = torch.cat([corrections(u), 1.5 * corrections(u / 1.5)])
    assert least < both.min()
    assert 1.25 < both.max() < most
    assert bounds_of_corrected(v, False) == bounds_of_correction(v)


def test_a_bound_that_nothing_proves_skips_nothing() -> None:
    assert bounds_of_correction(0.2)[1] == inf
