"""The device code in csrc/ compiles for Hopper and Blackwell with nvcc alone: no GPU and no CUDA build of torch."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
NVCC = shutil.which("nvcc")
ARCHITECTURES = ("sm_90a", "sm_100a", "sm_103a", "sm_120a")
DEVICE_FILES = sorted(CSRC.glob("*.cu"))

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")


@pytest.fixture(scope="module")
def known_architectures() -> frozenset[str]:
    """What this nvcc can compile for; CUDA 12.8 knows sm_100a and sm_120a, CUDA 12.9 also sm_103a."""
    listed = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    return frozenset(listed.split())


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", DEVICE_FILES, ids=lambda path: path.name)
def test_compiles_without_spills(
    source: Path, architecture: str, tmp_path: Path, known_architectures: frozenset[str]
) -> None:
    if architecture.rstrip("a") not in known_architectures:
        pytest.skip(f"this nvcc does not know {architecture}")
    cubin = tmp_path / "out.cubin"
    command = ["nvcc", "-std=c++17", "-O3", "-fmad=false", "-Xptxas", "-v", "-cubin", f"-arch={architecture}"]
    run = subprocess.run([*command, "-o", str(cubin), str(source)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert cubin.read_bytes()[:4] == b"\x7fELF"
    spills = [int(number) for number in re.findall(r"(\d+) bytes spill", run.stderr)]
    assert spills, f"ptxas reported no kernel:\n{run.stderr}"
    assert not any(spills), run.stderr


@pytest.mark.parametrize("source", [*DEVICE_FILES, *sorted(CSRC.glob("*.h"))], ids=lambda path: path.name)
def test_device_code_includes_no_torch(source: Path) -> None:
    included = re.findall(r'^#include\s+[<"]([^>"]+)', source.read_text(encoding="utf-8"), re.MULTILINE)
    assert included
    assert not [name for name in included if name.startswith(("torch/", "ATen/", "c10/", "Python.h", "pybind11/"))]
