"""Reference = Triton, bit for bit: in Triton's interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.triton.interpreter import check


@pytest.mark.skipif(torch.cuda.is_available(), reason="the compiled kernels are tested instead")
def test_the_interpreted_kernels_have_the_references_bits() -> None:
    check("parity", "no difference in")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "what", ["quantizers", "requantizers", "rotated_codes", "products", "carriers", "pairs", "handed", "signs"]
)
def test_the_compiled_kernels_have_the_references_bits(what: str) -> None:
    from tests.kernels.triton import parity

    assert list(getattr(parity, f"of_{what}")(torch.device("cuda"))) == []
