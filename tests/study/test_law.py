"""The scaling law: published constants, efficiencies and regions again, and a law that was put in comes out."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fp4dist.errors import ConfigError, DataError
from fp4dist.study.law import CONSTANTS, Law, Point, bootstrap, efficiency, fit, interval
from fp4dist.study.points import FULL, load_losses, study_points
from fp4dist.study.precision import best, crossover, precisions

ROOT = Path(__file__).resolve().parents[2]
PAPER = Law(**load_losses("quartet")[0].laws["paper"])


def test_the_published_runs_give_the_published_fit() -> None:
    """The notebook's own output row and its cost, to the digits that it prints."""
    found = fit(load_losses("quartet")[1][FULL])
    assert f"{found.law.A:.3e} {found.law.B:.3e}" == "1.274e+05 4.658e+05"
    rounded = [round(x, 4) for x in (found.law.alpha, found.law.beta, found.law.E, found.law.gamma)]
    assert rounded == [0.5785, 0.5389, 1.3408, 0.2764]
    assert found.cost == pytest.approx(2.12922e-6, rel=1e-5)


def test_without_the_two_largest_models_they_are_over_predicted() -> None:
    _, points = load_losses("quartet", without=("430M", "800M"))
    law = fit(points[FULL]).law
    assert [round(x, 3) for x in (law.alpha, law.beta, law.E, law.gamma)] == [0.644, 0.561, 1.634, 0.309]
    large = [p for p in load_losses("quartet")[1][FULL] if p.parameters > 4e8]
    assert [round(law.loss(p.parameters, p.tokens) - p.loss, 3) for p in large] == [0.016, 0.022]


@pytest.mark.parametrize(
    ("forward", "backward", "which", "expected"),
    [
        ("quest", "bf16", "n", 0.645), ("nearest", "bf16", "n", 0.606),
        ("bf16", "stochastic", "d", 0.893), ("bf16", "nearest", "d", 0.928), ("bf16", "eden128", "d", 0.951),
    ],
)  # fmt: skip
def test_efficiencies_of_single_passes(forward: str, backward: str, which: str, expected: float) -> None:
    _, points = load_losses("quartet")
    found = efficiency(fit(points[FULL]).law, points[forward, backward], which)
    assert round(found.eff_n if which == "n" else found.eff_d, 3) == expected
    assert 1.0 in (found.eff_n, found.eff_d)


def test_the_published_regions() -> None:
    """Tokens a parameter from which FP4 in both passes wins; FP8:FP8 and FP4:FP8 never do."""
    options = precisions(0.65, 0.95)
    assert [option.training for option in options] == pytest.approx([1.0, 1.2, 1.5, 2.0])
    found = [crossover(PAPER, options, n) for n in (1e8, 1e9, 1e10, 1e11)]
    assert found == pytest.approx([86, 104, 125, 152], abs=0.6)
    winners = {best(PAPER, options, n, n * r).name for n in (1e8, 1e10, 1e11) for r in (1, 10, 100, 1000)}
    assert winners == {"FP8:FP4", "FP4:FP4"}
    slower = precisions(0.65, 0.95, 1.8, 1.4)
    assert all(200 < crossover(PAPER, slower, n) < 410 for n in (1e8, 1e11))
    assert crossover(PAPER, precisions(0.01, 0.07), 1e9) == float("inf")


def test_a_law_that_was_put_in_comes_out() -> None:
    law = Law(A=2e5, alpha=0.5, B=4e5, beta=0.45, E=1.5, gamma=0.4)
    points = [Point(n, n * r, law.loss(n, n * r)) for n in (3e7, 1e8, 1e9) for r in (5, 20, 100, 500)]
    found = fit(points).law
    for name in CONSTANTS:
        assert getattr(found, name) == pytest.approx(getattr(law, name), rel=2e-3)
    method = [Point(p.parameters, p.tokens, law.loss(p.parameters, p.tokens, 0.7, 0.8)) for p in points]
    both = efficiency(law, method, "both")
    assert (both.eff_n, both.eff_d) == (pytest.approx(0.7, rel=1e-4), pytest.approx(0.8, rel=1e-4))


def test_intervals_cover_the_law_behind_noisy_runs() -> None:
    rng = np.random.default_rng(1)
    places = [(n, n * r) for n in (3e7, 1e8, 8e8) for r in (10, 20, 50, 100, 200, 400)]
    points = [Point(n, d, PAPER.loss(n, d) * np.exp(rng.normal(0, 1e-3))) for n, d in places]
    drawn = bootstrap(points, fit(points).law, number=60)
    low, high = interval([law.loss(3e8, 3e10) for law in drawn])
    assert low < PAPER.loss(3e8, 3e10) < high
    assert 1e-4 < high - low < 2e-2


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="six constants"):
        fit([Point(3e7, 1e8 * i, 3.0) for i in range(1, 9)])
    with pytest.raises(DataError, match="no sizes"):
        load_losses("quartet", without=("1T",))
    with pytest.raises(ValueError, match="must be n, d or both"):
        efficiency(PAPER, [Point(1e8, 1e9, 3.0)], "x")
    nameless = tmp_path / "losses.yaml"
    nameless.write_text("source: ''\ntokens_per_step: 1\nparameters: {}\nseries: []\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="source"):
        load_losses(nameless)


def test_a_study_gives_points(tmp_path: Path) -> None:
    cell = {"model": "m", "block_parameters": 100, "tokens": 500, "losses": {"1": 3.0, "2": 3.2}}
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"cells": [{**cell, "arm": "bf16"}, {**cell, "arm": "x"}]}), encoding="utf-8")
    assert study_points(file) == {FULL: [Point(100, 500, 3.1)], ("x", "x"): [Point(100, 500, 3.1)]}
    file.write_text(json.dumps({"cells": []}), encoding="utf-8")
    with pytest.raises(DataError, match="bf16"):
        study_points(file)
    file.write_text("[]", encoding="utf-8")
    with pytest.raises(DataError, match="not the results"):
        study_points(file)


def test_the_program(tmp_path: Path) -> None:
    command = [sys.executable, "tools/scaling_law.py", "quartet", "--bootstrap", "5", "--predict", "7e9:1e12"]
    run = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "| paper | 85.5 | 103.5 | 125.2 | 151.5 |" in run.stdout
    assert re.search(r"^\| fitted, 95 % \| \d+ to \d+ \|", run.stdout, re.M)
    assert "paper: FP4:FP4" in run.stdout
    regions = json.loads((tmp_path / "law.json").read_text(encoding="utf-8"))["regions"]
    assert regions["paper"]["100000000.0"] == [pytest.approx(85.5, abs=0.1), None]
    low, high = regions["fitted"]["100000000.0"][1]
    assert 50 < low < high < 150
    assert {f.name for f in tmp_path.iterdir()} == {"law.json", "fit.png", "regions.png"}
    wrong = subprocess.run([*command[:2], "nothing"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "no file for" in wrong.stderr
