"""Reference = Triton, bit for bit: in Triton's interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the compiled kernels are tested instead")
def test_the_interpreted_kernels_have_the_references_bits() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kernels.triton.parity"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "no difference in" in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("what", ["quantizers", "requantizers", "rotated_codes", "products", "carriers", "pairs"])
def test_the_compiled_kernels_have_the_references_bits(what: str) -> None:
    from tests.kernels.triton import parity

    assert list(getattr(parity, f"of_{what}")(torch.device("cuda"))) == []
