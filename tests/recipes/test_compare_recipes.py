"""tools/compare_recipes.py: step constants made shorter, gaps and intervals, the table, and the command going on."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fp4dist.spec.load import load_recipe, load_run, shipped
from fp4dist.spec.splits import Channels
from tests.train.tiny_run import write_counting_tokens
from tools import compare_recipes
from tools.compare_recipes import Job, Outcome, gaps, half_interval, needed_settings, shrunk, table
from tools.compare_runs import Run

TOOL = Path(compare_recipes.__file__)


def outcome(recipe: str, seed: int, val_losses: list[float] | None) -> Outcome:
    """Evaluations every 10 steps; None: a run that failed."""
    job = Job(recipe, seed, Path(f"{recipe}/{seed}"), load_run("tiny"), (), ())
    if val_losses is None:
        return Outcome(job, 1.0, failure="exit code 2")
    points = [(10 * i, loss) for i, loss in enumerate(val_losses)]
    return Outcome(job, 1.0, Run(f"{recipe}_{seed}", recipe, [], points, 1000.0, 0.5))


# ---------- what is run


def test_step_constants_become_shorter_and_nothing_else() -> None:
    before, after = load_recipe("tetrajet_v2"), shrunk(load_recipe("tetrajet_v2"), 10)
    hot = after.linears["fp4"].slot("fprop.x").outlier
    assert hot == after.linears["fp4"].slot("wgrad.x").outlier == Channels(after=50, collect=5)
    assert (after.weights[0].every, after.weights[0].window, after.weights[0].start) == (20, 5, 0.66)
    assert shrunk(before, 1) == before
    assert shrunk(load_recipe("quartet2"), 10) == load_recipe("quartet2")
    clip, reset = sorted(shrunk(load_recipe("spam"), 10).gradients, key=lambda block: block.kind, reverse=True)
    assert (clip.wait, reset.every, reset.warmup, reset.restart) == (2, 50, 15, False)
    shapes = {name: shrunk(load_recipe(name), 10).phases[0].lr for name in ("fp4_all_the_way", "luq")}
    assert [shape.warmup for shape in shapes.values() if shape] == [4, 0.5]  # steps, and a share of the phase


@pytest.mark.parametrize("name", shipped("recipes"))
def test_every_recipe_runs_in_the_tiny_preset(name: str) -> None:
    """Its configuration is legal with the settings that the tool adds; whatever the factor, no constant grows."""
    recipe = load_recipe(name)
    settings = needed_settings(recipe)
    assert load_run("tiny", [f"recipe={name}", *settings]).recipe == recipe
    assert bool(settings) == (name in ("tetrajet_qramping", "stable_spam_fp4", "stable_spam_fp4_as_released"))
    for factor in (3, 10, 1000):
        shrunk(recipe, factor)  # every block checks its own numbers


# ---------- what came of it


def test_gap_is_the_mean_of_paired_differences_over_seeds() -> None:
    runs = [
        outcome("bf16", 1, [6.0, 5.0, 4.0]), outcome("bf16", 2, [6.0, 5.5, 4.5]),
        outcome("a", 1, [6.0, 5.2, 4.1]), outcome("a", 2, [6.0, 5.6, 4.5]),
        outcome("b", 1, [6.0, 4.9, 3.9]), outcome("b", 3, [1.0, 1.0, 1.0]), outcome("c", 1, None),
    ]  # fmt: skip
    b, a = gaps(runs, last=2)
    assert (a.recipe, b.recipe) == ("a", "b")
    assert a.per_seed == {1: pytest.approx(0.15), 2: pytest.approx(0.05)}
    assert a.mean == pytest.approx(0.1)
    assert a.interval == pytest.approx(12.706 * 0.05)  # t(1 degree of freedom) * sd / sqrt 2, sd = 0.1 / sqrt 2
    assert a.over_seeds
    assert b.per_seed == {1: pytest.approx(-0.1)}  # seed 3 has no baseline
    assert not b.over_seeds


@pytest.mark.parametrize(("n", "quantile"), [(2, 12.7062), (3, 4.3027), (11, 2.2281), (12, 2.2010), (31, 2.0423)])
def test_intervals_are_students(n: int, quantile: float) -> None:
    sample = [0.0, 1.0] * (n // 2) + [0.5] * (n % 2)
    deviation = (sum((x - 0.5) ** 2 for x in sample) / (n - 1)) ** 0.5
    assert half_interval(sample) == pytest.approx(quantile * deviation / n**0.5, rel=2e-2 if n > 11 else 1e-3)


def test_table_marks_what_one_seed_tells(tmp_path: Path) -> None:
    args = argparse.Namespace(last=2, seeds=["1"], shrink_steps=10.0)
    runs = [outcome("bf16", 1, [5.0, 4.0]), outcome("a", 1, [5.3, 4.1]), outcome("c", 1, None)]
    text = table(runs, gaps(runs, 2), args)
    assert "| a | 50.0% | 4.1000 | +0.2000 | ± 1.2706 * |" in text
    assert "too narrow" in text
    assert "divided by 10" in text
    assert "| c | | seed 1: exit code 2 |" in text


# ---------- the command


def compare(config: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), "--config", str(config), "--out", str(out), "--threads", "1", *more]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_command_trains_compares_and_goes_on(tmp_path: Path) -> None:
    """Two runs; then one more recipe, without repeating them; a run of other settings in the folder is refused."""
    tokens = write_counting_tokens(tmp_path) / "counting"
    raw = {
        "run": {"name": "x"},
        "model": {"extends": "tiny", "vocab_size": 128, "seq_length": 64},
        "data": {"train": [str(tokens)], "split": "80,20,0"},
        "optim": {"lr": 1e-3},
        "train": {"steps": 2, "global_batch_size": 2, "micro_batch_size": 2, "dtype": "fp32", "eval_every": 1},
        "recipe": "bf16",
    }
    raw["train"]["eval_samples"] = 2
    config, out = tmp_path / "run.yaml", tmp_path / "out"
    config.write_text(yaml.safe_dump(raw), encoding="utf-8")
    first = compare(config, out, "--recipes", "tetrajet")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "0 of them finished before" in first.stdout
    told = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert [gap["recipe"] for gap in told["gaps"]] == ["tetrajet"]
    assert 0 < abs(told["gaps"][0]["mean"]) < 0.1
    assert (out / "gaps.png").stat().st_size > 1000
    again = compare(config, out, "--recipes", "tetrajet")
    assert again.returncode == 0
    assert again.stdout.count("finished before\n") == 2
    other = compare(config, out, "--recipes", "tetrajet", "--set", "optim.lr=2e-3")
    assert other.returncode == 2
    assert "another run lives there" in other.stderr
