"""How often the host calls something for a linear: what an eager step of a small model is bound by."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.triton.host_time import nothing_runs
from tools import bench_host

# Recipe -> of one linear, forward and backward, with its weight quantized anew: launches of Triton's kernels, and the
# most calls of Python functions, autograd's included
COUNTS = {"nvidia_nvfp4": (8, 420), "quartet2": (11, 500), "quartet": (12, 465), "tetrajet": (10, 445)}


@pytest.mark.parametrize("recipe", COUNTS)
def test_a_linear_takes_few_calls(recipe: str) -> None:
    with nothing_runs():
        linears = bench_host.Linears(recipe, torch.device("cpu"))
        for _ in range(2):
            linears.step()
        counts = bench_host.calls_of(linears.step)
    launches, most = COUNTS[recipe]
    assert counts["launches"] // bench_host.LINEARS == launches  # beside one that draws all signs
    assert counts["python"] <= most * bench_host.LINEARS
