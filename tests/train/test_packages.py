"""Missing packages and one of the wrong kind."""

from __future__ import annotations

from importlib import util
from pathlib import Path
from typing import Any

import pytest

from fp4dist.errors import DependencyError
from fp4dist.train.packages import check_packages, has_nvidia_apex, versions
from tests.train.tiny_run import tiny_run


def write_package(folder: Path, *files: str) -> None:
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")


def test_the_unrelated_apex_is_recognised_and_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_package(tmp_path, "apex/__init__.py", "apex/models.py", "apex/views.py")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DependencyError, match=r"unrelated package.*pip uninstall apex"):
        check_packages(tiny_run(tmp_path))


def test_nvidias_apex_is_used_when_its_kernels_are_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_package(tmp_path, "apex/__init__.py", "apex/optimizers/__init__.py", "apex/optimizers/fused_adam.py")
    monkeypatch.syspath_prepend(tmp_path)
    assert not has_nvidia_apex()
    write_package(tmp_path, "amp_C.py")
    assert has_nvidia_apex()


@pytest.mark.parametrize(
    ("module", "overrides", "message"),
    [
        ("megatron", (), r"megatron-core is not installed.*pip install -c constraints\.txt"),
        ("megatron.core", (), "megatron-core is not installed"),
        ("deepspeed", ("engine.kind=deepspeed",), "deepspeed is not installed, and engine.kind is deepspeed"),
        ("wandb", ("logging.wandb=true",), "wandb is not installed, and logging.wandb is true"),
    ],
)
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, overrides: tuple[str, ...], message: str
) -> None:
    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *a: None if name == module else find(name, *a))
    config: Any = tiny_run(tmp_path, *overrides)
    with pytest.raises(DependencyError, match=message):
        check_packages(config)


def test_packages_that_are_not_asked_for_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = util.find_spec
    absent = {"deepspeed", "wandb", "apex"}
    monkeypatch.setattr(util, "find_spec", lambda name, *a: None if name in absent else find(name, *a))
    check_packages(tiny_run(tmp_path))


def test_versions_name_what_decides_the_numbers() -> None:
    found = versions()
    assert found["torch"].startswith("2.")
    assert found["megatron-core"] != "absent"
