"""Whole linears of recipes: Triton's plan against the reference's, interpreted on a CPU and compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

from fp4dist.spec.load import shipped
from tests.kernels.triton.interpreter import check


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the compiled kernels are tested instead")
def test_interpreted_linears_are_the_references() -> None:
    check("linears_parity", "no difference in")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", shipped("recipes"))
def test_compiled_linears_are_the_references(name: str) -> None:
    from tests.kernels.triton import linears_parity

    assert list(linears_parity.differences([name], torch.device("cuda"))) == []
