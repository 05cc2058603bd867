"""csrc/ without a GPU: its kernels on a CPU against the reference, and what resolves to them on a Blackwell GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fp4dist.kernels import cuda
from fp4dist.nn.reasons import remarks
from fp4dist.spec.load import load_recipe, shipped
from tests.kernels.cuda import emulated

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler on PATH")

PARTS = 3  # of the specs one is run here; `python -m tests.kernels.cuda.emulated` runs all
CAPABILITIES = ("10.0", "9.0", "7.5")
MEANS = {("averis", "decompose", "torch")}  # on every GPU


def run(module: str, *arguments: object) -> str:
    """Standard output of a program of this package, which registers operators and so needs a process of its own."""
    command = [sys.executable, "-m", f"tests.kernels.cuda.{module}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def resolved() -> list[list[str]]:
    """[capability, recipe, linear, slot:operation, backend, why not csrc/] of all shipped recipes."""
    return [line.split("\t") for line in run("faked", *CAPABILITIES).splitlines() if line.count("\t") == 5]


def test_the_kernels_have_the_references_bits() -> None:
    assert run("emulated", 1, PARTS).count("no difference in") == 3


def test_linears_have_the_references_results() -> None:
    assert "no difference in linears" in run("linears")


def test_on_blackwell_every_operation_of_every_recipe_resolves_to_csrc(resolved: list[list[str]]) -> None:
    lines = [line for line in resolved if line[0] == "10.0"]
    quantizing = {name for name in shipped("recipes") if load_recipe(name).linears}
    assert {recipe for _, recipe, *_ in lines} == quantizing
    assert {what.rpartition(":")[2] for _, _, _, what, _, _ in lines} >= {
        "quantize", "requantize", "dequantize", "matmul", "mask", "filter_by_mask", "filter_by_scales", "original",
        "decompose", "take_channels", "in_precision", "hot_residual", "slope",
    }  # fmt: skip
    elsewhere = [line for line in lines if line[4] != "cuda" or line[5]]
    assert {(recipe, what.rpartition(":")[2], backend) for _, recipe, _, what, backend, _ in elsewhere} == MEANS
    assert {reason for *_, reason in elsewhere} == {"csrc takes no means and no factors out of operands, torch does"}


def test_on_older_gpus_triton_comes_first_and_csrc_says_why_not(resolved: list[list[str]]) -> None:
    faster = "Triton's kernels are faster before compute capability 10.0; backend.kind: cuda takes these"
    for capability, recipe, _, what, backend, reason in resolved:
        if capability == "10.0" or backend == "torch":
            continue
        assert backend == "triton", (recipe, what)
        if capability == "7.5":
            assert "compute capability" in reason, (recipe, what, reason)
        elif what.endswith(":matmul"):
            assert reason == "needs FP4 tensor cores (compute capability 10.0), not 9.0"
        else:
            assert reason == faster, (recipe, what, reason)


def test_the_layer_table_says_each_reason_once(resolved: list[list[str]]) -> None:
    hopper = [
        {what: (what.rpartition(":")[2], why)}
        for capability, _, _, what, backend, why in resolved
        if capability == "9.0" and backend != "torch"
    ]
    said = remarks(hopper)
    assert len(said) == 2
    assert "not in csrc/: matmul: needs FP4 tensor cores (compute capability 10.0), not 9.0" in said
    assert any("quantize" in line and "Triton's kernels are faster" in line for line in said)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.skipif(cuda.MISSING is not None, reason=str(cuda.MISSING))
@pytest.mark.parametrize(
    "what",
    ["quantizers", "requantizers", "rotated_codes", "products", "carriers", "pairs", "handed", "layouts", "memories"],
)
def test_the_built_kernels_have_the_references_bits(what: str) -> None:
    from tests.kernels.cuda import parity

    assert list(parity.differences(what, torch.device("cuda"))) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.skipif(cuda.MISSING is not None, reason=str(cuda.MISSING))
def test_the_built_general_kernels_have_the_references_bits() -> None:
    from tests.kernels.cuda import more_parity

    more_parity.use_ours()
    assert list(more_parity.differences(torch.device("cuda"))) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.skipif(cuda.MISSING is not None, reason=str(cuda.MISSING))
def test_what_the_built_kernels_take_out_is_the_references() -> None:
    from tests.kernels.cuda import parts

    device = torch.device("cuda")
    assert [*parts.differences(device), *parts.of_doors(device)] == []
