"""tools/recipe_table.py: the command itself, its lines, its errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fp4dist.spec.load import shipped

TOOL = Path(__file__).resolve().parents[2] / "tools" / "recipe_table.py"


def table(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True, check=False)


def test_every_shipped_recipe_fits_the_shipped_model() -> None:
    done = table("--all", "--model", "llama_124m")
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert sorted(lines) == sorted(shipped("recipes"))
    assert "cannot run" not in done.stdout
    assert "83.3% FP4" in lines["nvidia_nvfp4"]  # the last 15 % of 12 layers round up to 2
    assert " 0.0% FP4" in lines["bf16"]


def test_json_is_that_of_a_run() -> None:
    done = table("nvidia_nvfp4", "--json")
    found = json.loads(done.stdout)
    assert found["fp4_share_of_block_linear_flops"] == pytest.approx(10 / 12)
    assert len(found["linears"]) == 12 * 4 + 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("quartet3",), "did you mean 'quartet'"),
        (("quartet2", "--tp", "5"), "tp 5"),
    ],
)
def test_one_clear_error(arguments: tuple[str, ...], words: str) -> None:
    done = table(*arguments)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr
