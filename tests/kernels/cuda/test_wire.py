"""The wire codec of csrc/: its kernels on a CPU against the reference, and where they are taken."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fp4dist.kernels import cuda
from tests.kernels.cuda import emulated

PARTS = 6  # of the wires one is run here; `python -m tests.kernels.cuda.wire emulated` runs all

needs_compiler = pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler on PATH")


def run(*arguments: object) -> str:
    """Standard output of the program `wire`, which registers operators and so needs a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.cuda.wire", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@needs_compiler
def test_the_codec_has_the_references_bits() -> None:
    assert "no difference in the wire codec" in run("emulated", 0, PARTS)


@needs_compiler
def test_blackwell_takes_it_and_hopper_tritons() -> None:
    assert run("faked").splitlines() == [
        "10 cuda fp4dist.kernels.cuda.wire",
        "9 triton fp4dist.kernels.triton.wire",
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.skipif(cuda.MISSING is not None, reason=str(cuda.MISSING))
def test_the_built_codec_has_the_references_bits() -> None:
    assert "no difference in the wire codec" in run("gpu")
