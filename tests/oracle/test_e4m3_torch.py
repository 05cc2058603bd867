"""E4M3 and E8M0 bytes against torch's float8 casts."""

from __future__ import annotations

import torch

from fp4dist.numerics.codes import decode_e4m3, decode_e8m0, encode_e4m3, encode_e4m3_stochastic


def test_decode_of_all_bytes() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(
        decode_e4m3(codes).view(torch.int32)[~expected.isnan()], expected.view(torch.int32)[~expected.isnan()]
    )
    assert torch.equal(decode_e4m3(codes).isnan(), expected.isnan())
    e8m0 = codes.view(torch.float8_e8m0fnu).float()
    assert torch.equal(decode_e8m0(codes)[:255], e8m0[:255])
    assert decode_e8m0(codes)[255].isnan()


def test_encode_on_log_spread_values() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1 << 18, generator=generator) * torch.exp2(
        torch.randint(-14, 9, (1 << 18,), generator=generator).float()
    )
    expected = x.clamp(max=448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(encode_e4m3(x), expected)


def test_encode_at_all_values_midpoints_and_neighbours() -> None:
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    mids = (values[1:] + values[:-1]) / 2
    around = torch.cat(
        (values, mids, torch.nextafter(mids, torch.tensor(0.0)), torch.nextafter(mids, torch.tensor(500.0)))
    )
    assert torch.equal(encode_e4m3(around), around.to(torch.float8_e4m3fn).view(torch.uint8))


def test_saturation_and_nan() -> None:
    x = torch.tensor([448.0, 464.0, 1e9, float("inf"), float("nan")])
    assert encode_e4m3(x).tolist() == [0x7E, 0x7E, 0x7E, 0x7E, 0x7F]


def test_stochastic_is_exact_on_values_and_uses_the_whole_interval() -> None:
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    for noise in (0, 2**31, 2**32 - 1):
        assert torch.equal(
            encode_e4m3_stochastic(values, torch.full((127,), noise)), torch.arange(127, dtype=torch.uint8)
        )
    between = torch.tensor([1.03125, 0.0013, 300.1])
    low = encode_e4m3_stochastic(between, torch.full((3,), 2**32 - 1))
    high = encode_e4m3_stochastic(between, torch.zeros(3, dtype=torch.int64))
    assert torch.equal(high, low + 1)


def test_stochastic_mean_is_the_value() -> None:
    noise = torch.arange(0, 2**32, 2**14, dtype=torch.int64)  # an even sweep instead of samples: the mean is exact
    for value in (1.03125, 0.0013, 300.1, 0.0001, 17.7):
        x = torch.full(noise.shape, value)
        mean = decode_e4m3(encode_e4m3_stochastic(x, noise)).double().mean().item()
        assert abs(mean - x[0].item()) < 2e-5 * value + 1e-7
