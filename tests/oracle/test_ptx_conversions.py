"""PTX's conversion instructions, as documented, against our codes: every code, tie, limit and NaN.

Where both agree, sm_100's instruction may stand in a kernel; where they differ, the test says how.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from fp4dist.numerics import ptx, scales
from fp4dist.numerics.codes import decode, encode_e4m3, encode_nearest, encode_stochastic
from fp4dist.spec.blocks import Ceil, Floor
from fp4dist.spec.formats import E2M1

LEVELS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def every_bf16() -> Tensor:
    """All 65,536 bf16 values, zeros of both signs, subnormals, infinities and NaNs included, as fp32."""
    return (torch.arange(1 << 16, dtype=torch.int64) << 16).to(torch.int32).view(torch.float32)


def around(points: Tensor) -> Tensor:
    """Each point, its two neighbours in fp32, and their negatives."""
    away, back = (torch.nextafter(points, torch.full_like(points, end)) for end in (1e38, -1e38))
    positive = torch.cat([points, away, back])
    return torch.cat([positive, -positive])


def random_fp32(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(1 << 31), 1 << 31, (count,), generator=generator).to(torch.int32).view(torch.float32)


def nibble(x: Tensor) -> Tensor:
    """E2M1 codes of `x` as operand b of the instruction."""
    return ptx.cvt_rn_satfinite_e2m1x2(torch.zeros(x.shape, dtype=torch.int64), ptx.bits_of(x))


def test_e2m1_nearest_is_ours_for_every_input_class() -> None:
    ties = (LEVELS[1:] + LEVELS[:-1]) / 2
    for x in (every_bf16(), around(ties), around(LEVELS), random_fp32(1 << 18), decode(torch.arange(16).byte(), E2M1)):
        assert torch.equal(nibble(x).byte(), encode_nearest(x, E2M1))


def test_e2m1_nearest_is_ml_dtypes_where_that_is_finite() -> None:
    x = every_bf16()
    x = x[x.abs() <= 6]
    oracle = x.numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    assert np.array_equal(nibble(x).numpy(), oracle)


def test_e2m1_pairs_keep_their_order_and_a_nan_is_positive_six() -> None:
    a, b = torch.tensor([1.5, -6.0, float("nan")]), torch.tensor([-2.0, 1e9, -float("inf")])
    word = ptx.cvt_rn_satfinite_e2m1x2(ptx.bits_of(a), ptx.bits_of(b))
    assert word.tolist() == [0x3C, 0xF7, 0x7F]


def test_e4m3_nearest_is_ours_for_every_non_negative_input() -> None:
    codes = torch.arange(127).to(torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (codes[1:] + codes[:-1]) / 2
    for x in (every_bf16(), around(ties), around(codes), random_fp32(1 << 18)):
        x = x[(x >= 0) | x.isnan()].abs()
        word = ptx.cvt_rn_satfinite_e4m3x2(torch.zeros(x.shape, dtype=torch.int64), ptx.bits_of(x))
        assert torch.equal(word.byte(), encode_e4m3(x))
        finite = x <= 448
        assert torch.equal(word[finite].byte(), x[finite].to(torch.float8_e4m3fn).view(torch.uint8))
    assert ptx.cvt_rn_satfinite_e4m3x2(ptx.bits_of(-codes[5:6]), ptx.bits_of(codes[7:8])).tolist() == [0x8507]


def exponents(x: Tensor, rounding: str) -> Tensor:
    return ptx.cvt_satfinite_ue8m0x2(torch.zeros(x.shape, dtype=torch.int64), ptx.bits_of(x), rounding)  # type: ignore[arg-type]


def test_ue8m0_is_our_power_of_two_rules() -> None:
    """Of a/4 toward zero it is the rule `floor` for E2M1, of a upward `ceil` of the amax, where a is normal and finite.

    Ours differ where a block's amax is no number (255, a NaN block, instead of 2^127) or below 2^-126.
    """
    x = torch.cat([every_bf16(), random_fp32(1 << 16), around(2.0 ** torch.arange(-100.0, 101.0))]).abs()
    normal = x[x.isfinite() & (x >= 2.0**-120)]
    ours = scales._exponent_byte(normal, Floor(), E2M1)
    assert torch.equal(exponents(normal / 4, "rz").byte(), ours)
    below = normal[normal <= 2.0**127]
    assert torch.equal(exponents(below, "rp").byte(), scales._exponent_byte(below, Ceil(of="amax"), E2M1))
    infinite = torch.tensor([float("inf"), float("nan"), 3e38, 0.0, 2.0**-127, 2.0**-126 * 0.75])
    assert exponents(infinite, "rp").tolist() == [254, 255, 254, 0, 0, 1]
    assert exponents(infinite, "rz").tolist() == [254, 255, 254, 0, 0, 0]
    assert scales._exponent_byte(infinite[:2], Floor(), E2M1).tolist() == [255, 255]


def distances() -> tuple[Tensor, Tensor, Tensor]:
    """(x, index of the level below, distance from it in steps): every quarter of a 256th of each step."""
    share = torch.arange(0, 256 * 4, dtype=torch.float64) / (256 * 4)
    below = torch.arange(7).repeat_interleave(len(share))
    levels = LEVELS.double()
    x = levels[below] + share.repeat(7) * (levels[below + 1] - levels[below])
    return x.float(), below, share.repeat(7)


def stochastic(x: Tensor, noise: int) -> Tensor:
    """[4, n] codes of x as a, b, e and f with the same eight random bits."""
    bits = ptx.bits_of(x)
    word = ptx.cvt_rs_satfinite_e2m1x4(bits, bits, bits, bits, torch.full_like(bits, noise * 0x01010101))
    return torch.stack([(word >> shift) & 15 for shift in (12, 8, 4, 0)])


def test_stochastic_goes_up_by_the_carry_of_eight_bits() -> None:
    """Of 256 values of the random bits floor(256 d) go up: exact levels stay, the mean is low by d mod 1/256."""
    x, below, distance = distances()
    ups = torch.zeros(4, len(x), dtype=torch.int64)
    for noise in range(256):
        ups += stochastic(x, noise) - below
    assert torch.equal(ups, (distance * 256).floor().to(torch.int64).expand(4, -1))
    minus = stochastic(-x, 77)
    assert torch.equal(minus, stochastic(x, 77) | 8)


def test_stochastic_differs_from_ours_by_at_most_a_256th_and_always_down() -> None:
    """Ours compares the distance with 16 random bits and a half: unbiased to 2^-17, which the instruction is not.

    So it cannot stand in for our rounding: a recipe that wants it has to name it.
    """
    x, below, distance = distances()
    noise = torch.arange(0, 1 << 16, 257)  # 256 values, evenly spread: their high bytes are 0 ... 255
    high = noise >> 8
    same, ours_up, theirs_up = 0, torch.zeros_like(below), torch.zeros_like(below)
    for full, byte in zip(noise.tolist(), high.tolist(), strict=True):
        ours = encode_stochastic(x, E2M1, torch.full(x.shape, full, dtype=torch.int32)).long() - below
        theirs = stochastic(x, 255 - byte)[0] - below  # large noise keeps ours down, and lifts theirs
        same += int((ours == theirs).sum())
        ours_up, theirs_up = ours_up + ours, theirs_up + theirs
    assert same < 256 * len(x)
    assert (theirs_up <= ours_up + 1).all()
    assert ((distance - theirs_up / 256) < 1 / 256).all()
    assert (distance - theirs_up / 256).mean() == pytest.approx(1.5 / 1024)  # 0, 1, 2 or 3 of four parts of a 256th
    assert (distance - ours_up / 256).mean().abs() < 1 / 1024


def test_random_bits_reach_one_operand_each() -> None:
    """Each byte of rbits moves one code; a and b take the upper bytes of the two halves, e and f the lower ones."""
    x = ptx.bits_of(torch.full((4,), 2.5))
    codes = []
    for byte in range(4):
        word = ptx.cvt_rs_satfinite_e2m1x4(x, x, x, x, torch.full((4,), 0xFF << 8 * byte))[0].item()
        codes.append([(int(word) >> shift) & 15 for shift in (12, 8, 4, 0)])
    assert codes == [[4, 4, 4, 5], [4, 5, 4, 4], [4, 4, 5, 4], [5, 4, 4, 4]]


def test_stochastic_saturates_and_makes_a_nan_six() -> None:
    x = torch.tensor([6.0, 7.0, -1e30, float("inf"), -float("inf"), float("nan"), -0.0, 1e-40])
    for noise in (0, 255):
        assert stochastic(x, noise)[0].tolist() == [7, 7, 15, 7, 15, 7, 8, 0]
