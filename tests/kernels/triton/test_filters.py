"""Gradients through trust masks: reference = Triton, bit for bit, interpreted on a CPU and compiled on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fp4dist.kernels.triton import filters
from fp4dist.spec.build import build
from fp4dist.spec.recipe import QuantSpec

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the compiled kernels are tested instead")
def test_the_interpreted_filters_have_the_references_bits() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kernels.triton.filters_parity"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "no difference in" in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_compiled_filters_have_the_references_bits() -> None:
    from tests.kernels.triton import filters_parity

    assert list(filters_parity.differences(torch.device("cuda"))) == []


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ({"format": "fp4_row", "estimator": "dge"}, "estimator dge"),
        ({"format": "int4", "scale": "sawb", "estimator": "mask"}, "fp32 scales"),
        ({"format": "mxfp4", "block": [1, 64], "scale": "quest", "estimator": "mask"}, "blocks"),
        ({"format": "nvfp4", "outer": [1, 128], "scale": "quest", "estimator": "mask"}, "outer"),
    ],
)
def test_what_the_filters_lack_is_named(data: dict, what: str) -> None:
    assert what in (filters.why_not(build(QuantSpec, data)) or "")
