"""curves.png from metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

from fp4dist.train.plots import draw_curves


def test_a_picture_of_a_run_with_gaps(tmp_path: Path) -> None:
    lines = [{"step": 0, "val_loss": 5.0}]
    lines += [{"step": s, "loss": 5.0 / s, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 10.0} for s in range(1, 9)]
    lines[4] |= {"loss": None, "grad_norm": None, "skipped": True}
    metrics, picture = tmp_path / "metrics.jsonl", tmp_path / "curves.png"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_curves(metrics, picture, "a run")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_a_picture_of_nothing(tmp_path: Path) -> None:
    draw_curves(tmp_path / "absent.jsonl", tmp_path / "curves.png", "nothing yet")
    assert (tmp_path / "curves.png").exists()
