"""Training jobs that a tool starts, one or several processes each, and waits for; what it needs before and after."""

from __future__ import annotations

import contextlib
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path


def new_folder(out: Path, names: Sequence[str], known: Collection[str], option: str) -> Path:
    """`out` made, for one folder each of `names`. Raises SystemExit for an unknown name, or one that has run there."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"{option} {','.join(unknown)}: not among {', '.join(known)}")
    out = out.resolve()
    taken = [name for name in names if (out / name).exists()]
    if taken:
        raise SystemExit(f"{out} has runs of {', '.join(taken)} already; give another --out or remove them")
    out.mkdir(parents=True, exist_ok=True)
    return out


def short_run(steps: int, warmup_steps: int, out: Path) -> list[str]:
    """Overrides of a run of `steps` without evaluations and checkpoints, its data's index in `out`."""
    return [
        f"train.steps={steps}",
        f"optim.warmup_steps={warmup_steps}",
        "train.eval_every=0",
        "checkpoint.every=0",
        "logging.tensorboard=false",
        f"data.cache_dir={out / 'data_cache'}",
    ]


def launcher(processes: int, kind: str = "torchrun") -> list[str]:
    """Command that starts a Python program in `processes` ranks of this machine, under a free port."""
    if kind == "deepspeed":
        return ["deepspeed", "--num_gpus", str(processes), "--master_port", str(_free_port())]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


def _free_port() -> int:
    """One that nobody listens on, below those (from 32768 on) that the kernel may give to any connection meanwhile."""
    while True:
        port = random.SystemRandom().randrange(15000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


def run_to(log: Path, command: Sequence[str], timeout: float) -> tuple[str | None, float]:
    """(why it failed, or None; seconds) of a command, whose output goes into `log` below the command itself."""
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        file.write(" ".join(command) + "\n")
        file.flush()
        try:
            done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=timeout, check=False)
            failure = f"exit code {done.returncode}" if done.returncode else None
        except subprocess.TimeoutExpired:
            failure = f"not done after {timeout:g} s"
    return failure, time.monotonic() - start


def tail(log: Path) -> str:
    """Its last lines that name an error; torchrun's own words come after those."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [
        line for line in lines if re.match(r"(\[rank\d+\]: *)?[\w.]+(Error|Unavailable|Mismatch|Diverged)\b", line)
    ]
    return "\n".join(f"    {line}" for line in errors[-4:] or lines[-12:])
