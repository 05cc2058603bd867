"""csrc/ without a GPU: its kernels on a CPU against the reference, and what resolves to them on a Blackwell GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fp4dist.kernels import cuda
from tests.kernels.cuda import emulated

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler on PATH")

PARTS = 3  # of the specs one is run here; `python -m tests.kernels.cuda.emulated` runs all
# recipes whose formats FP4 tensor cores have, quantized as those have them
NATIVE = {
    "cage", "fp4_all_the_way", "mxfp4_h32", "nemotron3", "nvidia_nvfp4", "nvidia_nvfp4_46", "nvidia_nvfp4_te",
    "quartet", "quartet2", "quest_mxfp4", "tetrajet", "tetrajet_qramping", "tetrajet_v2_core",
}  # fmt: skip
FUSED_IN_TRITON = {"mask", "filter_by_mask", "filter_by_scales", "original"}  # csrc/ has no kernels for these


def run(module: str, *arguments: object) -> str:
    """Standard output of a program of this package, which registers operators and so needs a process of its own."""
    command = [sys.executable, "-m", f"tests.kernels.cuda.{module}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def resolved(major: int, minor: int) -> list[list[str]]:
    """[recipe, linear, slot:operation, backend, why not csrc/] of all shipped recipes."""
    return [line.split("\t") for line in run("faked", major, minor).splitlines() if line.count("\t") == 4]


def test_the_kernels_have_the_references_bits() -> None:
    assert "no difference in" in run("emulated", 1, PARTS)


def test_on_blackwell_native_recipes_resolve_to_csrc() -> None:
    lines = resolved(10, 0)
    assert {recipe for recipe, *_ in lines} >= NATIVE
    for recipe, _, what, backend, reason in lines:
        operation = what.rpartition(":")[2]
        if recipe in NATIVE and operation not in FUSED_IN_TRITON:
            assert backend == "cuda", (recipe, what, backend, reason)
        assert (reason == "") == (backend == "cuda"), (recipe, what)


def test_on_hopper_triton_comes_first_and_csrc_says_why_not() -> None:
    faster = "Triton's kernels are faster before compute capability 10.0; backend.kind: cuda takes these"
    for recipe, _, what, backend, reason in resolved(9, 0):
        operation = what.rpartition(":")[2]
        assert backend == "triton", (recipe, what)
        if recipe in NATIVE and operation == "matmul":
            assert reason == "needs FP4 tensor cores (compute capability 10.0), not 9.0"
        elif recipe in NATIVE and operation not in FUSED_IN_TRITON:
            assert reason == faster


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.skipif(cuda.MISSING is not None, reason=str(cuda.MISSING))
@pytest.mark.parametrize(
    "what", ["quantizers", "requantizers", "rotated_codes", "products", "carriers", "pairs", "layouts"]
)
def test_the_built_kernels_have_the_references_bits(what: str) -> None:
    from tests.kernels.cuda import parity

    assert list(parity.differences(what, torch.device("cuda"))) == []
