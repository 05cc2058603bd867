"""tools/bench_scaling.py: its runs on eight gloo ranks against one process, its jobs, its report."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.distributed import run_ranks
from tests.megatron.tiny import MODEL
from tests.train.tiny_run import FP4, VOCAB, write_counting_tokens

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def load(name: str) -> ModuleType:
    """A tool as a module, whose folder holds what it imports."""
    if str(TOOLS) not in sys.path:
        sys.path.insert(0, str(TOOLS))
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Arguments: a model that four tensor-parallel ranks can share, in steps that hardly follow single signs."""
    write_counting_tokens(tmp_path)
    run = {
        "run": {"name": "tiny"},
        "model": MODEL
        | {"vocab_size": VOCAB, "seq_length": 64, "hidden_size": 128, "ffn_hidden_size": 256, "num_query_groups": 4},
        "data": {"train": [str(tmp_path / "counting")], "split": "80,20,0"},
        "optim": {"lr": 8.0e-3, "eps": 1.0e-2},
        "train": {"steps": 6, "global_batch_size": 16, "micro_batch_size": 1, "dtype": "fp32"},
        "recipe": "bf16",
    }
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    return ["--cpu", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "out"), "--loss-recipe", FP4,
            "--loss-steps", "5", "--mib", "1", "--samples", "2", "--steps", "1", "--warmup", "1"]  # fmt: skip


def parsed(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> Any:
    monkeypatch.setattr(sys, "argv", ["bench_scaling.py", *words])
    return tool._parse()


def train_all(runs: list[tuple[str, list[str], Path]]) -> None:
    """A rank: what a job does."""
    jobs = load("job_runs")
    for config, sets, folder in runs:
        jobs.run_case(config, sets, folder)


def test_layouts_of_eight_ranks_train_like_one(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = load("bench_scaling")
    words = ["--processes", "8", "--parts", "losses", *words]
    args = parsed(tool, monkeypatch, words)
    cases = list(tool._cases("losses", args))
    assert [c.layout.name for c in cases] == ["one", "dp8", "tp2_dp4", "tp2_pp2_dp2", "tp4_pp2", "dp8"]
    runs = [(args.config, tool._sets(c, args, args.out), args.out / c.name) for c in cases]
    run_ranks(train_all, 1, runs[:1])
    run_ranks(train_all, 8, runs[1:])

    assert tool.main() == 0, "nothing was left to run"
    report = json.loads((tmp_path / "out" / "scaling.json").read_text())
    assert (tmp_path / "out" / "scaling.png").is_file()
    assert not report["left_out"]
    for case in report["cases"]:
        assert case["failure"] is None
        assert not case["random_tokens"]
        assert len(case["losses"]) == 5
        assert abs(case["gap"]) < 0.01, case
        assert (case["bytes_of_a_step"] is not None) == (case["wire"] == "coded")
    assert "of one GPU's" in capsys.readouterr().out


def test_a_job_is_started_and_what_it_refuses_is_told(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = load("bench_scaling")
    words = ["--processes", "2", "--parts", "steps", "--recipes", "bf16", "--budget", "0", *words]
    args = parsed(tool, monkeypatch, words)
    (tmp_path / "out").mkdir()
    pair = [c for c in tool._cases("steps", args) if c.layout.name == "dp2"]
    broken = tool.Case("steps", tool.Layout(2, tp=2), "bf16", "plain")
    monkeypatch.setattr(tool.Layout, "sets", lambda self: ["parallel.tp=2"] if self.tp == 2 else [])
    args.set = ["model.num_attention_heads=1", "model.num_query_groups=1"]
    tool._job([broken, *pair], "pair", args, tmp_path / "out", float("inf"))

    assert tool.main() == 1, "a run was refused and others were not begun"
    report = json.loads((tmp_path / "out" / "scaling.json").read_text())
    done = {(c["layout"], c["wire"]): c for c in report["cases"]}
    assert "heads" in done["tp2", "plain"]["failure"]
    assert done["dp2", "plain"]["ratio"] == 1
    assert done["dp2", "coded"]["tokens_per_s"] > 0
    assert "steps_one_bf16_plain" in report["left_out"]
    assert "the same command goes on" in capsys.readouterr().out


def test_layouts_divide() -> None:
    tool = load("bench_scaling")
    names = {n: [at.name for at in tool._layouts(n)] for n in (2, 3, 4, 6)}
    assert names[2] == ["dp2", "tp2", "pp2"]
    assert names[3] == ["dp3"]
    assert names[4] == ["dp4", "tp2_dp2", "tp2_pp2"]
    assert names[6] == ["dp6", "tp2_dp3"]
