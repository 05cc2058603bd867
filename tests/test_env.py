"""The one reader of environment variables."""

from __future__ import annotations

import os

import pytest

from fp4dist import env
from fp4dist.errors import ConfigError

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")

KERNELS = ("CUBLAS_WORKSPACE_CONFIG", "NVTE_ALLOW_NONDETERMINISTIC_ALGO")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NAMES, "CUDA_DEVICE_MAX_CONNECTIONS", "TORCH_NCCL_HIGH_PRIORITY", *KERNELS):
        monkeypatch.setenv(name, "")  # so that what the test sets is undone
        monkeypatch.delenv(name)


def test_a_plain_start_is_one_process() -> None:
    assert (env.rank(), env.local_rank(), env.world_size(), env.local_world_size()) == (0, 0, 1, 1)
    assert env.cores() >= 1


def test_a_plain_start_is_completed_with_a_free_port() -> None:
    assert env.ensure_launch_variables()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")
    assert 1024 < int(os.environ["MASTER_PORT"]) < 65536
    assert not env.ensure_launch_variables(), "the second time all is there"


def test_a_launchers_variables_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29500",
        "LOCAL_RANK": "1",
        "LOCAL_SIZE": "2",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert not env.ensure_launch_variables()
    assert {name: os.environ[name] for name in values} == values
    assert (env.rank(), env.local_rank(), env.world_size(), env.local_world_size()) == (3, 1, 4, 2)


def test_half_a_launch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ConfigError, match="WORLD_SIZE = 8, but RANK, MASTER_ADDR, MASTER_PORT is not set"):
        env.ensure_launch_variables()


def test_nonsense_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ConfigError, match="RANK = 'first' must be an integer"):
        env.rank()


def test_device_queues_are_set_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert env.serialize_device_queues()
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    assert not env.serialize_device_queues()
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "8", "a user's value wins"


def test_transfers_come_first_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert env.put_transfers_first()
    assert env.managed()["TORCH_NCCL_HIGH_PRIORITY"] == "1", "compared between ranks, and recorded"
    monkeypatch.setenv("TORCH_NCCL_HIGH_PRIORITY", "0")
    assert not env.put_transfers_first()
    assert os.environ["TORCH_NCCL_HIGH_PRIORITY"] == "0"


def test_deterministic_kernels_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    env.ask_for_deterministic_kernels()
    assert [os.environ[name] for name in KERNELS] == [":4096:8", "0"]
    monkeypatch.setenv(KERNELS[0], ":16:8")
    env.ask_for_deterministic_kernels()
    assert os.environ[KERNELS[0]] == ":16:8", "a user's value wins"
