"""How setup.py builds the extension: what it needs, for which architectures, what is said when something is missing.

Loaded by its path from setup.py, where nothing of the project can be imported yet.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

ARCHS = ("sm_90a", "sm_100a", "sm_103a", "sm_120a")
SINCE = "CUDA 12.8 is the first with sm_100a and sm_120a, CUDA 12.9 with sm_103a"
INSTALL = "FP4DIST_CUDA=1 pip install --no-build-isolation ."
# -fmad=false: the numerics contract asks for every operation rounded on its own
NVCC_FLAGS = ("-O3", "-fmad=false")


def extension(root: Path) -> dict[str, Any]:
    """The setup() arguments that build fp4dist._C from csrc/; SystemExit with one clear reason where they cannot."""
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CUDAExtension
    except ImportError as missing:
        raise SystemExit(
            f"FP4DIST_CUDA=1 compiles against the installed torch, which this build cannot import ({missing}); pip's"
            f" build isolation hides it. Install a CUDA build of torch and setuptools, then run: {INSTALL}"
        ) from missing
    if torch.version.cuda is None:
        raise SystemExit(
            f"FP4DIST_CUDA=1 needs a CUDA build of torch; {torch.__version__} is for the CPU. Install one, then run:"
            f" {INSTALL}"
        )
    nvcc = shutil.which("nvcc", path=os.path.join(CUDA_HOME, "bin")) if CUDA_HOME else None
    if nvcc is None:
        raise SystemExit(
            f"FP4DIST_CUDA=1 needs nvcc, and there is none in CUDA_HOME ({CUDA_HOME}) or on PATH. Install the CUDA"
            f" toolkit {torch.version.cuda} that torch was built with, set CUDA_HOME, then run: {INSTALL}"
        )
    present = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    targets = [f"-gencode=arch={a.replace('sm', 'compute')},code={a}" for a in architectures(nvcc, present)]
    csrc = root / "csrc"
    sources = sorted(str(path.relative_to(root)) for path in [*csrc.glob("*.cpp"), *csrc.glob("*.cu")])
    flags = {"cxx": ["-O3"], "nvcc": [*NVCC_FLAGS, *targets]}
    built = CUDAExtension("fp4dist._C", sources, extra_compile_args=flags)
    return {"ext_modules": [built], "cmdclass": {"build_ext": BuildExtension}}


def architectures(nvcc: str, present: list[tuple[int, int]]) -> list[str]:
    """What to compile for: FP4DIST_CUDA_ARCHS, else the GPUs that are present, else all that nvcc knows of ARCHS."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    asked = [a for a in re.split(r"[\s,;]+", os.environ.get("FP4DIST_CUDA_ARCHS", "")) if a]
    mine = sorted({f"sm_{major}{minor}{'a' if major >= 9 else ''}" for major, minor in present})
    wanted = asked or mine or [a for a in ARCHS if a.rstrip("a") in listed]
    unknown = [a for a in wanted if not re.fullmatch(r"sm_\d+a?", a) or a.rstrip("a") not in listed]
    if unknown or not wanted:
        raise SystemExit(
            f"{nvcc} cannot compile for {', '.join(unknown) or 'any of ' + ', '.join(ARCHS)}; it knows"
            f" {', '.join(listed)}. {SINCE}. Install a newer one, or set FP4DIST_CUDA_ARCHS, then run: {INSTALL}"
        )
    return wanted
