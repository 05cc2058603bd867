"""Reference = Triton, bit for bit: in Triton's interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.triton.interpreter import check


@pytest.mark.skipif(torch.cuda.is_available(), reason="the compiled kernels are tested instead")
def test_the_interpreted_codec_has_the_references_bits() -> None:
    pytest.importorskip("triton")
    check("tests.comm.wire_parity", "no difference in")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("part", range(4))
def test_the_compiled_codec_has_the_references_bits(part: int) -> None:
    from tests.comm import wire_parity

    assert wire_parity.main(part, 4) == 0
