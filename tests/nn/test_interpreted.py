"""A linear's forward and backward pass through the Triton kernels, on a machine without a GPU."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.kernels.triton.interpreter import check


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_a_linear_in_the_interpreter_has_the_operands_of_the_reference() -> None:
    told = check("tests.nn.interpreted", "equal")
    assert told.count("equal") == 11, told
