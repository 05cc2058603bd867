"""The general quantizers: reference = Triton, bit for bit, interpreted on a CPU and compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

from fp4dist.kernels.triton import grids
from fp4dist.nn.plan import resolve_kernels
from fp4dist.spec.build import build
from fp4dist.spec.load import load_recipe, shipped
from fp4dist.spec.recipe import QuantSpec
from fp4dist.spec.run import BackendConfig
from tests.kernels.triton.interpreter import check


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the compiled kernels are tested instead")
def test_the_interpreted_kernels_have_the_references_bits() -> None:
    check("grids_parity", "no difference in")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("what", ["quantizers", "levels", "tiles", "requantizers", "shards", "products"])
def test_the_compiled_kernels_have_the_references_bits(what: str) -> None:
    from tests.kernels.triton import grids_parity

    assert list(getattr(grids_parity, f"of_{what}")(torch.device("cuda"))) == []


@pytest.mark.parametrize("name", shipped("recipes"))
def test_no_shipped_recipe_needs_the_reference_on_a_gpu(name: str) -> None:
    for linear in load_recipe(name).linears.values():
        kernels = resolve_kernels(linear, torch.device("cuda"), BackendConfig(kind="triton"))
        assert {kernel.backend for kernel in kernels.values()} <= {"triton"}


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ({"format": "nvfp4", "scale": "mse_search"}, "scale rule mse_search"),
        ({"format": {"element": "log10", "scale": "fp32", "block": "tensor"}}, "grid of 11 levels"),
        ({"format": "nvfp4", "outer": [16, 128]}, "outer"),
        ({"format": "fp8_e5m2", "rounding": "stochastic"}, "rounding to FP8"),
        ({"format": {"element": "e2m1", "scale": "fp32", "block": [1, 512]}}, "blocks"),
    ],
)
def test_what_the_grids_lack_is_named(data: dict, what: str) -> None:
    assert what in (grids.why_not(build(QuantSpec, data)) or "")
