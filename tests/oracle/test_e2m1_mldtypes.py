"""E2M1 codes against ml_dtypes' float4_e2m1fn: all codes, every midpoint and its neighbours, random values."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch

from fp4dist.numerics.codes import decode, decode_packed, encode_nearest, pack, unpack
from fp4dist.spec.formats import E2M1


def oracle(values: np.ndarray) -> np.ndarray:
    return values.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)


def test_all_sixteen_codes_decode_and_encode() -> None:
    codes = np.arange(16, dtype=np.uint8)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert np.array_equal(decode(torch.from_numpy(codes), E2M1).numpy().view(np.int32), values.view(np.int32))
    assert np.array_equal(encode_nearest(torch.from_numpy(values), E2M1).numpy(), codes)


def test_every_midpoint_and_its_neighbours() -> None:
    levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)
    mids = (levels[1:] + levels[:-1]) / 2
    around = np.concatenate([mids, np.nextafter(mids, np.float32(0)), np.nextafter(mids, np.float32(9)), levels])
    both = np.concatenate([around, -around]).astype(np.float32)
    assert np.array_equal(encode_nearest(torch.from_numpy(both), E2M1).numpy(), oracle(both))


def test_random_values_saturate_and_round_alike() -> None:
    x = (torch.randn(1 << 18, generator=torch.Generator().manual_seed(0)) * 4).clamp(-6, 6)
    assert np.array_equal(encode_nearest(x, E2M1).numpy(), oracle(x.numpy()))
    beyond = torch.tensor([6.5, 1e30, float("inf"), -7.0])
    assert encode_nearest(beyond, E2M1).tolist() == [7, 7, 7, 15]


def test_packing_puts_even_elements_in_the_low_nibble() -> None:
    codes = torch.arange(16, dtype=torch.uint8).reshape(2, 8)
    packed = pack(codes)
    assert packed[0, 0].item() == 0x10
    assert torch.equal(unpack(packed), codes)
    assert torch.equal(decode_packed(packed, E2M1), decode(codes, E2M1))
