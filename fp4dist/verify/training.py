"""A short training run through the package's own trainer, as a process of its own, and what its log must show.

python -m fp4dist.verify.training RUN FOLDER key=value ...
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

from fp4dist.spec.load import load_run

STEPS = 50
_LEAST_FALL = 0.1  # of the first loss: a model that learns nothing stays at it


def train(run: str, folder: Path, recipe: str) -> dict[str, Any]:
    """Train `run` for 50 steps; {"ok": ..., "losses": [...], "tokens_per_s": ..., "why": ...}."""
    sets = (f"recipe={recipe}", f"train.steps={STEPS}", "optim.warmup_steps=5", "train.eval_every=0",
            "checkpoint.every=0", "logging.tensorboard=false", f"run.dir={folder}")  # fmt: skip
    words = [sys.executable, "-m", "fp4dist.verify.training", run, *sets]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    (folder.parent / "training.log").write_text(done.stdout, encoding="utf-8")
    if done.returncode:
        last = (done.stdout.strip().splitlines() or ["no output"])[-1]
        return {"ok": False, "why": f"exit code {done.returncode}: {last[:300]}"}
    return judge(folder / "metrics.jsonl")


def judge(metrics: Path) -> dict[str, Any]:
    """All losses finite, as many as steps, and the last five lower than the first by a tenth."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    losses = [row["loss"] for row in rows if row.get("loss") is not None]
    rates = sorted(row["tokens_per_s"] for row in rows if row.get("tokens_per_s"))
    found: dict[str, Any] = {"losses": losses, "tokens_per_s": rates[len(rates) // 2] if rates else None}
    if len(losses) != STEPS or not all(map(math.isfinite, losses)):
        return found | {"ok": False, "why": f"{len(losses)} losses of {STEPS} steps, or some not finite"}
    fallen = 1 - sum(losses[-5:]) / 5 / losses[0]
    why = "" if fallen >= _LEAST_FALL else f"the loss fell by {fallen:.1%}, {_LEAST_FALL:.0%} were expected"
    return found | {"ok": not why, "why": why}


def main() -> int:
    """One run."""
    from fp4dist.train import loop

    loop.run(load_run(sys.argv[1], sys.argv[2:]))
    return 0


if __name__ == "__main__":  # checkpoints are written by a spawned process that imports this file again
    sys.exit(main())
