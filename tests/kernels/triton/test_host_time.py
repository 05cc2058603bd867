"""How often the host calls something for a linear: what an eager step of a small model is bound by."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.triton.host_time import nothing_runs
from tools import bench_host

# Recipe -> launches of Triton's kernels of one linear, forward and backward, with its weight quantized anew
LAUNCHES = {"nvidia_nvfp4": 8, "quartet2": 14}
MOST_CALLS = 500  # of Python functions, autograd's included, of one linear


@pytest.mark.parametrize("recipe", LAUNCHES)
def test_a_linear_takes_few_calls(recipe: str) -> None:
    with nothing_runs():
        linears = bench_host.Linears(recipe, torch.device("cpu"))
        for _ in range(2):
            linears.step()
        counts = bench_host.calls_of(linears.step)
    assert counts["launches"] // bench_host.LINEARS == LAUNCHES[recipe]  # beside one that draws all signs
    assert counts["python"] <= MOST_CALLS * bench_host.LINEARS
