"""From a plan to trained ranks, with the generated files: one node, two nodes without ssh, a batch script."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.distributed import free_port
from tests.megatron.tiny import MODEL
from tests.train.tiny_run import write_counting_tokens

pytestmark = [pytest.mark.distributed]
ROOT = Path(__file__).resolve().parents[2]
STEPS = 3


def start(words: list[str], timeout: float = 240, **variables: str) -> subprocess.Popen[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "FP4DIST_", "RANK", "WORLD"))}
    env |= {"PATH": path, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", **variables}
    return subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def done(process: subprocess.Popen[str], code: int = 0, timeout: float = 240) -> str:
    try:
        out, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == code, out[-4000:]
    return out


def cluster(*words: str) -> str:
    return done(start([sys.executable, "-m", "fp4dist.cluster", *words]))


def base_run(folder: Path) -> Path:
    """A run of a tiny model whose data exist, for plans to extend."""
    prefix = write_counting_tokens(folder) / "counting"
    raw = {
        "run": {"name": "base", "dir": str(folder / "run")},
        "model": MODEL | {"vocab_size": 128},
        "data": {"train": [str(prefix)], "split": "80,20,0", "cache_dir": str(folder / "cache")},
        "optim": {"lr": 8.0e-3, "warmup_steps": 1},
        "train": {"steps": STEPS, "global_batch_size": 8, "micro_batch_size": 2, "dtype": "fp32", "eval_every": 0,
                  "eval_samples": 4},
        "recipe": "nvidia_nvfp4",
        "logging": {"tensorboard": False},
    }  # fmt: skip
    (folder / "model.yaml").write_text(yaml.safe_dump(raw["model"]))
    file = folder / "base.yaml"
    file.write_text(yaml.safe_dump(raw))
    return file


def losses(folder: Path) -> list[float]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def topology(folder: Path, per_node: int) -> Path:
    """The cpu topology with other nodes."""
    raw = yaml.safe_load((ROOT / "configs/topology/cpu.yaml").read_text())
    raw["host"]["gpus"] = raw["host"]["gpus_per_numa"] = per_node
    file = folder / "nodes.yaml"
    file.write_text(yaml.safe_dump(raw))
    return file


@pytest.mark.slow
def test_plan_launch_train_on_four_ranks(tmp_path: Path) -> None:
    """`plan --topology cpu --gpus 4`, the script that `launch` writes for it, four gloo ranks under `deepspeed`."""
    base, run = base_run(tmp_path), tmp_path / "run.yaml"
    cluster("plan", "--model", str(tmp_path / "model.yaml"), "--topology", "cpu", "--gpus", "4", "--gbs", "8",
            "--recipe", "nvidia_nvfp4", "--base", str(base), "--write", str(run))  # fmt: skip
    sets = ("--set", f"run.dir={tmp_path / 'run'}")
    told = cluster(
        "launch",
        "--config",
        str(run),
        "--topology",
        "cpu",
        "--gpus",
        "4",
        "--name",
        "e2e",
        "--out",
        str(tmp_path),
        *sets,
    )
    script = tmp_path / "e2e.sh"
    assert f"start: {script}" in told
    out = done(start([str(script)], MASTER_PORT=str(free_port())))
    assert f"done at step {STEPS}" in out
    assert len(losses(tmp_path)) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_two_nodes_without_ssh(tmp_path: Path, launcher: str) -> None:
    """The node script started twice, as two machines would: two nodes of two ranks, DP inside and PP across."""
    base, nodes = base_run(tmp_path), topology(tmp_path, 2)
    cluster("launch", "--config", str(base), "--topology", str(nodes), "--gpus", "4", "--name", "two", "--out",
            str(tmp_path), "--set", "parallel.pp=2", "--set", "train.micro_batch_size=1")  # fmt: skip
    port = str(free_port())
    script = str(tmp_path / "two.node.sh")
    both = [start([script, str(node), "127.0.0.1", launcher], MASTER_PORT=port) for node in (0, 1)]
    outs = [done(process) for process in both]
    assert f"done at step {STEPS}" in outs[0]
    assert f"done at step {STEPS}" not in outs[1]  # rank 0 alone writes the log
    assert len(losses(tmp_path)) == STEPS


def slurm(folder: Path, nodes: int, hosts: list[str]) -> dict[str, str]:
    """A PATH with srun, scontrol and scancel that act on this machine, and the variables of an allocation."""
    bin = folder / "bin"
    bin.mkdir()
    scripts = {
        "srun": f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/cluster/fake_srun.py "$@"\n',
        "scontrol": f"#!/bin/sh\necho $@ >>{folder}/scontrol.log\n[ $1 != show ] || printf '%s\\n' {' '.join(hosts)}\n",
        "scancel": "#!/bin/sh\n",
    }
    for name, text in scripts.items():
        (bin / name).write_text(text)
        (bin / name).chmod(0o755)
    path = f"{bin}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {
        "PATH": path, "SLURM_JOB_ID": "7", "SLURM_NNODES": str(nodes), "SLURM_SUBMIT_DIR": str(folder / "repository"),
        "SLURM_JOB_NODELIST": ",".join(hosts),
    }  # fmt: skip


def repository(folder: Path) -> Path:
    """What a batch script finds where it was submitted: links into this checkout, so that runs/ stays in `folder`."""
    place = folder / "repository"
    place.mkdir()
    for name in ("launch", "fp4dist", "configs"):
        (place / name).symlink_to(ROOT / name)
    return place


@pytest.mark.slow
def test_batch_script_checks_and_trains(tmp_path: Path) -> None:
    """The shipped batch script as Slurm would run it on one node of four ranks; it becomes the job's own."""
    base = base_run(tmp_path)
    repository(tmp_path)
    allocation = slurm(tmp_path, 1, [socket.gethostname().split(".")[0]])
    words = ["bash", str(ROOT / "launch/gb200_nvl72.sbatch"), str(base), "--port", str(free_port())]
    out = done(start(words, TOPOLOGY="cpu", **allocation))
    assert "preflight: 1 nodes, no fault" in out
    assert f"done at step {STEPS}" in out
    assert len(losses(tmp_path)) == STEPS
    assert "requeue" not in (tmp_path / "scontrol.log").read_text()


def test_batch_script_stops_where_preflight_does(tmp_path: Path) -> None:
    """One of two nodes writes no facts: the script ends with that class's code, and no rank is started."""
    base, nodes = base_run(tmp_path), topology(tmp_path, 2)
    cluster("launch", "--config", str(base), "--topology", str(nodes), "--gpus", "4", "--name", "batch", "--out",
            str(tmp_path), "--set", "train.micro_batch_size=1")  # fmt: skip
    repository(tmp_path)
    here = socket.gethostname().split(".")[0]
    out = done(start(["bash", str(tmp_path / "batch.sbatch")], **slurm(tmp_path, 2, [here, "zz-lost"])), code=28)
    assert "28 storage: zz-lost: facts in the shared folder: found none" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("ends_with", "requeued"), [(0, True), (3, False)])
def test_near_the_time_limit_the_job_saves_and_is_queued_again(tmp_path: Path, ends_with: int, requeued: bool) -> None:
    """The script's last part with a step that ends when it is told to; one that fails is not started again."""
    text = slurm_text(tmp_path)
    step = f"(trap 'exit {ends_with}' TERM; echo $BASHPID >{tmp_path}/step; while :; do sleep 0.1; done) &"
    script = tmp_path / "last.sh"
    last = text[text.index("\n\n# Before the time limit") :]
    script.write_text("set -euo pipefail\n" + step + last.replace(" USR1\n", f" USR1\n: >{tmp_path}/trapped\n"))
    variables = slurm(tmp_path, 1, ["n1"])
    (tmp_path / "bin/scancel").write_text(f"#!/bin/sh\nkill -TERM $(cat {tmp_path}/step)\n")
    batch = start(["bash", str(script)], **variables)
    while (
        not (tmp_path / "trapped").exists() or not (tmp_path / "step").exists() or not (tmp_path / "step").read_text()
    ):
        time.sleep(0.02)
    batch.send_signal(signal.SIGUSR1)
    done(batch, code=ends_with, timeout=20)
    log = tmp_path / "scontrol.log"
    assert (log.exists() and "requeue 7" in log.read_text()) == requeued


def slurm_text(folder: Path) -> str:
    base = base_run(folder)
    cluster("launch", "--config", str(base), "--topology", "cpu", "--gpus", "2", "--name", "x", "--out", str(folder))
    return (folder / "x.sbatch").read_text()


def test_a_rank_with_another_environment_is_caught() -> None:
    """Two ranks under torchrun, one with a NCCL variable more: both stop with code 22 and name it."""
    program = (
        'if [ "$RANK" = 1 ]; then export NCCL_NVLS_ENABLE=1; fi; exec python launch/check_fabric.py --topology cpu'
    )
    words = [
        "torchrun",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
        "--no-python",
        "bash",
        "-c",
        program,
    ]
    out = done(start(words), code=1)
    assert "rank 0 and rank 1 differ: NCCL_NVLS_ENABLE = unset / 1" in out
    assert "exitcode  : 22" in out


@pytest.mark.slow
def test_a_rank_with_another_configuration_is_caught(tmp_path: Path) -> None:
    """Two ranks of one job, one of which reads another learning rate."""
    base = base_run(tmp_path)
    program = (
        'if [ "$RANK" = 1 ]; then set -- --set optim.lr=1e-3; fi; exec python launch/pretrain.py --config "$0" "$@"'
    )
    words = [
        "torchrun",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
        "--no-python",
        "bash",
        "-c",
        program,
        str(base),
    ]
    out = done(start(words), code=1)
    assert "rank 0 and rank 1 differ: hash of the configuration" in out
    assert "exitcode  : 22" in out
