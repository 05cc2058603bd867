"""launch/pretrain.py as a user starts it: its exit codes, its one-line errors, its launchers."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed import free_port
from tests.train.tiny_run import FP4, metrics, tiny_run, write_counting_tokens

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "launch" / "pretrain.py")
BIN = Path(sys.executable).parent


def environment(**more: str) -> dict[str, str]:
    """No launcher's variables, no GPU, the checkout importable, this interpreter's programs first."""
    launched = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    kept = {name: value for name, value in os.environ.items() if name not in launched}
    path = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH")]))
    return {**kept, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "PATH": f"{BIN}{os.pathsep}{kept['PATH']}", **more}


@pytest.fixture
def run_file(tmp_path: Path) -> str:
    tiny_run(write_counting_tokens(tmp_path))
    return str(next(tmp_path.glob("run-*.yaml")))


def start(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300)


def test_a_dry_run_prints_and_writes_nothing(tmp_path: Path, run_file: str) -> None:
    done = start(sys.executable, SCRIPT, "--config", run_file, "--dry-run", "--set", f"recipe={FP4}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in ("hidden_size: 64", "linear_qkv", "parameters:", "memory of that rank"):
        assert part in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "train.stepz=3"), "ConfigError: run-"),
        (("--set", "recipe=nvidia_nvfp5"), "did you mean"),
        (("--set", "data.train=[nowhere]"), "DataError: "),
        (("--set", "parallel.tp=2"), "ConfigError: WORLD_SIZE = 1 is not a multiple of"),
        (("--set", "checkpoint.load=nowhere"), "CheckpointError: checkpoint nowhere: no manifest.json"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(
    tmp_path: Path, run_file: str, arguments: tuple[str, ...], message: str
) -> None:
    done = start(sys.executable, SCRIPT, "--config", run_file, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_plain_python_is_interrupted_by_sigterm_and_goes_on(tmp_path: Path, run_file: str) -> None:
    """The two-process life of a preempted job, with a plain `python` start."""
    config = tiny_run(tmp_path)
    command = [sys.executable, SCRIPT, "--config", run_file, "--local-rank=0", "--set", "train.steps=300"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True)
    file = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (file.exists() and len(metrics(config)) > 3):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert "interrupted at step" in out
    reached = metrics(config)[-1]["step"]
    done = start(*command[:5], "--set", "train.steps=300", "--set", f"train.stop_after={reached + 1}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"continuing from {tmp_path}/run/checkpoints/step_{reached:08d}" in done.stdout
    assert metrics(config)[-1]["step"] == reached + 1


@pytest.mark.slow
def test_the_deepspeed_launcher_starts_one_rank_on_a_cpu(tmp_path: Path, run_file: str) -> None:
    """`deepspeed launch/pretrain.py --config X`, as in the README."""
    arguments = ("--config", run_file, "--set", f"recipe={FP4}", "--set", "train.steps=2")
    done = start(program("deepspeed"), f"--master_port={free_port()}", SCRIPT, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 ranks (tp 1 x pp 1 x dp 1)" in done.stdout
    assert "50.0% of block-linear FLOPs ran in FP4" in done.stdout


@pytest.mark.slow
def test_torchrun_starts_two_ranks_of_deepspeeds_engine(tmp_path: Path, run_file: str) -> None:
    arguments = ("--config", run_file, "--set", "engine.kind=deepspeed", "--set", "train.steps=3")
    launcher = (program("torchrun"), "--nproc-per-node=2", "--standalone")
    done = start(*launcher, SCRIPT, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 ranks (tp 1 x pp 1 x dp 2)" in done.stdout
    assert done.stdout.count("done at step 3") == 1, "only rank 0 speaks"
    assert [line["step"] for line in metrics(tiny_run(tmp_path))] == [0, 1, 2, 3]


def program(name: str) -> str:
    found = shutil.which(name, path=environment()["PATH"])
    assert found is not None, f"{name} is not beside {sys.executable}"
    return found
