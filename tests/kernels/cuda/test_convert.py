"""csrc/convert.cuh, its integer forms compiled for a CPU, against fp4dist.numerics.codes: every code, tie and edge."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from torch import Tensor

from fp4dist.numerics import codes
from fp4dist.spec.formats import E2M1
from tests.kernels.cuda import emulated

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler on PATH")


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(emulated.build()))


def at(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def around(values: list[float]) -> Tensor:
    """Each value of both signs, and its eight neighbours of fp32 on either side."""
    bits = torch.tensor(values).view(torch.int32)[:, None] + torch.arange(-8, 9)
    found = bits.to(torch.int32).flatten().view(torch.float32)
    return torch.cat((found, -found))


def every_bf16() -> Tensor:
    """All finite and infinite bf16, as fp32."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    return x[~x.isnan()]


def whole(x: Tensor) -> Tensor:
    """Filled up with zeros to a multiple of eight."""
    return torch.cat((x, torch.zeros(-x.numel() % 8))).contiguous()


def unpacked(words: Tensor) -> Tensor:
    return codes.unpack(words.view(torch.uint8)[None])[0]


def test_e2m1_to_nearest(library: ctypes.CDLL) -> None:
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 7.0, 8.0, 1e-40, 1e38]
    u = whole(torch.cat((around(ties), every_bf16(), torch.randn(100_000) * 3)))
    words, levels = torch.empty(u.numel() // 8, dtype=torch.int32), torch.empty_like(u)
    library.convert_e2m1_nearest(at(u), ctypes.c_int64(u.numel()), at(words), at(levels))
    expected = codes.encode_nearest(u, E2M1)
    assert torch.equal(unpacked(words), expected)
    assert torch.equal(levels, codes.decode(expected & 7, E2M1))


def test_e2m1_stochastically(library: ctypes.CDLL) -> None:
    noise = torch.arange(2**16, dtype=torch.int32)
    for value in (0.0, -0.0, 1e-30, 0.1, 0.5, 0.6875, 1.0, 1.2, 2.0, 2.7, 3.999, 4.0, 5.3, 6.0, 0.25, 0.4999999):
        u = torch.full((2**16,), value) * torch.where(noise % 3 == 0, -1.0, 1.0)
        packed = noise.view(-1, 2)
        halves = (packed[:, 0] | packed[:, 1] << 16).to(torch.int32).contiguous()
        words, levels = torch.empty(2**13, dtype=torch.int32), torch.empty_like(u)
        library.convert_e2m1_stochastic(at(u), at(halves), ctypes.c_int64(2**16), at(words), at(levels))
        expected = codes.encode_stochastic(u, E2M1, noise)
        assert torch.equal(unpacked(words), expected), value
        assert torch.equal(levels, codes.decode(expected & 7, E2M1)), value


def test_e4m3_to_nearest(library: ctypes.CDLL) -> None:
    values = codes.decode_e4m3(torch.arange(127, dtype=torch.uint8))
    middles = ((values[1:] + values[:-1]) / 2).tolist()
    x = torch.cat(
        (around([*values.tolist()[1:], *middles, 464.0, 1e30]).abs(), every_bf16().abs(), torch.tensor([torch.nan]))
    )
    found = torch.empty(x.numel(), dtype=torch.uint8)
    library.convert_e4m3_nearest(at(x), ctypes.c_int64(x.numel()), at(found))
    assert torch.equal(found, codes.encode_e4m3(x))


def test_e4m3_stochastically(library: ctypes.CDLL) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.exp2(torch.rand(200_000, generator=generator) * 24 - 14)
    x[:4] = torch.tensor([0.0, 448.0, torch.nan, torch.inf])
    noise = torch.randint(0, 2**32, x.shape, generator=generator, dtype=torch.int64)
    noise[10:1000] = torch.tensor([0, 2**32 - 1])[torch.arange(990) % 2]
    words = torch.from_numpy(noise.numpy().astype(np.uint32).view(np.int32))
    found = torch.empty(x.numel(), dtype=torch.uint8)
    library.convert_e4m3_stochastic(at(x), at(words), ctypes.c_int64(x.numel()), at(found))
    assert torch.equal(found, codes.encode_e4m3_stochastic(x, noise))


def test_values_of_codes(library: ctypes.CDLL) -> None:
    e2m1, e4m3, e8m0, inverse = (torch.empty(n) for n in (16, 128, 256, 256))
    library.convert_values(at(e2m1), at(e4m3), at(e8m0), at(inverse))
    expected = codes.decode(torch.arange(16, dtype=torch.uint8), E2M1)
    assert torch.equal(e2m1.view(torch.int32), expected.view(torch.int32))  # -0 too
    assert torch.equal(e4m3[:127], codes.decode_e4m3(torch.arange(127, dtype=torch.uint8)))
    powers = codes.decode_e8m0(torch.arange(255, dtype=torch.uint8))
    assert torch.equal(e8m0[:255], powers)
    assert torch.equal(inverse[:255], 1.0 / powers)
    assert e4m3[127].isnan()
    assert e8m0[255].isnan()
    assert inverse[255].isnan()
