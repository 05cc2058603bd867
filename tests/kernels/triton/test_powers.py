"""What power-of-two quantizers remember changes nothing; interpreted on a CPU and compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.triton.interpreter import check


@pytest.mark.skipif(torch.cuda.is_available(), reason="the compiled kernels are tested instead")
def test_interpreted_values_do_not_depend_on_what_was_remembered() -> None:
    check("powers_parity", "no difference in")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("what", ["remembered", "losses", "masks", "turned", "held", "pairs", "values"])
def test_compiled_values_do_not_depend_on_what_was_remembered(what: str) -> None:
    from tests.kernels.triton import powers_parity

    assert list(getattr(powers_parity, f"of_{what}")(torch.device("cuda"))) == []
