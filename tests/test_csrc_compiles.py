"""The device code in csrc/ compiles for Hopper and Blackwell with nvcc alone: no GPU and no CUDA build of torch."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
DEVICE_FILES = sorted(CSRC.glob("*.cu"))
FEW = "quantize_four_over_six.cu"  # of the architectures beside the first: both conversions, in seconds
BLACKWELL = ("sm_100a", "sm_103a", "sm_120a")

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


def inspected(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    """The report of tools/inspect_sass.py, which keeps what it compiled by the text of csrc/."""
    out = tmp_path / "sass.json"
    command = [sys.executable, str(ROOT / "tools" / "inspect_sass.py"), "--jobs", "2", "--out", str(out), *arguments]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def known() -> frozenset[str]:
    """What this nvcc can compile for; CUDA 12.8 knows sm_100a and sm_120a, CUDA 12.9 also sm_103a."""
    listed = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    return frozenset(listed.split())


@needs_nvcc
def test_every_file_compiles_for_sm_100a_without_spills(tmp_path: Path, known: frozenset[str]) -> None:
    if "sm_100" not in known:
        pytest.skip("this nvcc does not know sm_100a")
    kernels = inspected(tmp_path, "--archs", "sm_100a")
    assert {k["file"] for k in kernels} == {path.name for path in DEVICE_FILES}
    assert not [k for k in kernels if k["spill_bytes"] or k["stack_bytes"]]


@needs_nvcc
@pytest.mark.parametrize("architecture", ["sm_90a", *BLACKWELL])
def test_conversions_are_the_machines_where_it_has_them(
    architecture: str, tmp_path: Path, known: frozenset[str]
) -> None:
    if architecture.rstrip("a") not in known:
        pytest.skip(f"this nvcc does not know {architecture}")
    kernels = inspected(tmp_path, "--archs", architecture, "--files", FEW)
    found: Counter[str] = sum((Counter(k["found"]) for k in kernels), Counter())
    if not any(k["instructions"] for k in kernels):
        pytest.skip("no nvdisasm")
    assert (found["to E2M1"] > 0) == (architecture in BLACKWELL)
    assert found["to E4M3"] > 0
    assert found["to E2M1 .RS"] == 0  # its random bits are not our thresholds


def test_architectures_differ_in_the_conversions_alone() -> None:
    for path in [*DEVICE_FILES, *CSRC.glob("*.h"), *CSRC.glob("*.cuh"), *CSRC.glob("*.cpp")]:
        asks = re.findall(r"^#\s*(?:el)?if.*__CUDA_ARCH.*$", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert bool(asks) == (path.name == "convert.cuh"), path


@pytest.mark.parametrize(
    "source",
    [*DEVICE_FILES, *sorted(CSRC.glob("*.h")), *sorted(CSRC.glob("*.cuh"))],
    ids=lambda path: path.name,
)
def test_device_code_includes_no_torch(source: Path) -> None:
    included = re.findall(r'^#include\s+[<"]([^>"]+)', source.read_text(encoding="utf-8"), re.MULTILINE)
    assert included
    assert not [name for name in included if name.startswith(("torch/", "ATen/", "c10/", "Python.h", "pybind11/"))]
