"""How setup.py builds the extension: what it needs, for which architectures, what is said when something is missing.

Loaded by its path from setup.py, where nothing of the project can be imported yet.
"""

from __future__ import annotations

import importlib.util
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
# csrc/cutlass: CUTLASS's headers ask for the first, and use what torch's own flags take from CUDA's types
_TAKEN = ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")
CUTLASS_FLAGS = ("--expt-relaxed-constexpr", *(f"-U__CUDA_NO_{name}__" for name in _TAKEN))
GEMMS = {"sm_100a": "sm100", "sm_103a": "sm100", "sm_120a": "sm120"}  # architecture -> files of csrc/cutlass


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
    archs = architectures(nvcc, present)
    targets = [f"-gencode=arch={a.replace('sm', 'compute')},code={a}" for a in archs]
    csrc = root / "csrc"
    headers, gemms = cutlass_headers(), sorted({GEMMS.get(a, "") for a in archs})
    if headers is not None and gemms not in (["sm100"], ["sm120"]):
        raise SystemExit(
            f"FP4DIST_CUTLASS adds GEMMs for {', '.join(GEMMS)}, one kind a build, and this one is for"
            f" {', '.join(archs)}. Unset it, or set FP4DIST_CUDA_ARCHS, then run: {INSTALL}"
        )
    files = [*csrc.glob("*.cpp"), *csrc.glob("*.cu")]
    flags = {"cxx": ["-O3"], "nvcc": [*NVCC_FLAGS, *targets]}
    if headers is not None:
        files += [
            csrc / "cutlass" / "bindings.cpp",
            *(f for name in gemms for f in csrc.glob(f"cutlass/gemm_{name}_*")),
        ]
        flags["cxx"] += [f"-DFP4DIST_GEMM_{name.upper()}" for name in gemms]
        flags["nvcc"] += CUTLASS_FLAGS
    print(f"fp4dist: GEMMs of csrc/cutlass {'from ' + str(headers) if headers else NO_GEMMS}", flush=True)
    sources = sorted(str(path.relative_to(root)) for path in files)
    included = [] if headers is None else [str(headers)]
    built = CUDAExtension("fp4dist._C", sources, extra_compile_args=flags, include_dirs=included)
    return {"ext_modules": [built], "cmdclass": {"build_ext": BuildExtension}}


NO_GEMMS = (
    "are not built: products that are added to fp32, and those of experts, are then torch's, in more launches. They"
    " need CUTLASS 4's headers: FP4DIST_CUTLASS=1 takes those of the package nvidia-cutlass, or set it to a folder"
)


def cutlass_headers() -> Path | None:
    """The folder of CUTLASS's headers that FP4DIST_CUTLASS names; None where it is unset."""
    asked = os.environ.get("FP4DIST_CUTLASS", "0")
    if asked in ("", "0"):
        return None
    places = [Path(asked), Path(asked) / "include"]
    if asked == "1":
        spec = importlib.util.find_spec("cutlass_library")
        if spec is None or spec.origin is None:
            raise SystemExit(
                "FP4DIST_CUTLASS=1 takes the headers of the package nvidia-cutlass, which is not installed: pip install"
                " nvidia-cutlass, or set FP4DIST_CUTLASS to CUTLASS's folder"
            )
        places = [Path(spec.origin).parent / "source" / "include"]
    found = next((place for place in places if (place / "cutlass" / "version.h").is_file()), None)
    if found is None:
        raise SystemExit(f"FP4DIST_CUTLASS = {asked!r}: no cutlass/version.h in {' or '.join(map(str, places))}")
    text = (found / "cutlass" / "version.h").read_text(encoding="utf-8")
    version = tuple(int(n) for n in re.findall(r"#define CUTLASS_(?:MAJOR|MINOR) (\d+)", text))
    if version < (4, 0):
        raise SystemExit(f"FP4DIST_CUTLASS: {found} is CUTLASS {'.'.join(map(str, version))}; 4.0 or newer is needed")
    return found.resolve()


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
