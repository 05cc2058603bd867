"""Programs in Triton's interpreter, which is chosen when Triton is imported: each is a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def check(program: str, words: str) -> str:
    """Run tests.kernels.triton.<program>, or a module by its whole name: it must end well and say `words`.

    Returns what it printed. The interpreter leaves out what it does twice (tests/kernels/triton/quick.py).
    """
    module = program if "." in program else f"tests.kernels.triton.{program}"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kernels.triton.quick", module],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert words in done.stdout, done.stdout
    return done.stdout
