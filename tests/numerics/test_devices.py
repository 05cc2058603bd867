"""One meaning on every device: the reference on a GPU gives the CPU's bits."""

from __future__ import annotations

import pytest
import torch

from fp4dist.numerics import Key, matmul, quantize, requantize
from tests.compare import assert_same_bits, moved
from tests.generators import SPECS, exactly_summable, families, spec
from tests.numerics.quantizers import EXTRA, extra

pytestmark = pytest.mark.gpu
KEY = Key(seed=3, layer=0x89ABCDEF, step=4, micro_batch=5, slot=2)


@pytest.fixture(autouse=True)
def _needs_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.mark.parametrize("name", list(SPECS))
def test_codes_and_scales(name: str) -> None:
    for x in families(128, 512, seed=6).values():
        assert_same_bits(moved(quantize(x.cuda(), spec(name), KEY), "cpu"), quantize(x, spec(name), KEY))


@pytest.mark.parametrize("name", list(EXTRA))
def test_codes_and_scales_of_the_whole_vocabulary(name: str) -> None:
    for x in families(128, 512, seed=6).values():
        assert_same_bits(moved(quantize(x.cuda(), extra(name), KEY), "cpu"), quantize(x, extra(name), KEY))


@pytest.mark.parametrize("name", ["eden", "nvfp4_sr", "nvfp4_46"])
def test_requantize(name: str) -> None:
    x = families(128, 512)["normal"]
    there = requantize(quantize(x.cuda(), spec("nvfp4_46")), spec(name), KEY)
    assert_same_bits(moved(there, "cpu"), requantize(quantize(x, spec("nvfp4_46")), spec(name), KEY))


def test_exactly_summable_products() -> None:
    a, b = exactly_summable(64, 4096), exactly_summable(128, 4096, seed=1)
    here = matmul(a, b)
    there = matmul(moved(a, "cuda"), moved(b, "cuda")).cpu()
    assert torch.equal(here, there)
