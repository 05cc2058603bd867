"""tools/compare_accumulation.py: both steps run, the model's sums are used, and what differs is told."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from tools import compare_accumulation as tool

WORDS = ["x", "--device", "cpu", "--model", "tiny", "--batch", "1", "--seq", "128", "--recipe", "nvidia_nvfp4"]


def test_one_step_of_a_small_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [*WORDS, "--out", str(tmp_path)])
    assert tool.main() == 0
    rows = {row["compared"]: row for row in json.loads((tmp_path / "compare_accumulation.json").read_text())["rows"]}
    assert rows["published"]["sums"] == 3 * 4  # one of two layers is FP4: four linears of three GEMMs
    assert rows["again"]["gradients"] == rows["again"]["sums"] == 0
    assert 0 < rows["published"]["gradients"] < 1e-6 < rows["seeds"]["gradients"]


def test_sums_that_are_far_off_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tool.matmul_in_groups
    monkeypatch.setattr(
        tool, "matmul_in_groups", lambda *a, **k: real(*a, **k) * 1.01 if "into" not in k else real(*a, **k)
    )
    monkeypatch.setattr(sys, "argv", [*WORDS, "--out", str(tmp_path)])
    assert tool.main() == 1


def test_distance_is_relative() -> None:
    assert tool.distance(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0])) == pytest.approx(1 / 18**0.5)
