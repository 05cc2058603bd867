"""A run from end to end: what it leaves in its folder, when it goes on, when it refuses, how it stops."""

from __future__ import annotations

import json
import logging
import os
import pickle
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fp4dist.errors import Fp4DistError, RecipeMismatch, TrainingDiverged
from fp4dist.nn.apply import apply_recipe
from fp4dist.spec.load import config_hash, load_run
from fp4dist.train import loop
from tests.distributed import run_ranks
from tests.train.tiny_run import FP4, curve, losses, metrics, run_without_picture, tiny_run, write_counting_tokens

pytestmark = pytest.mark.distributed


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(write_counting_tokens(tmp_path))


def raised(folder: str, *overrides: str, name: str = "run") -> Fp4DistError:
    """The error of a run that must fail."""
    try:
        run_without_picture(tiny_run(Path(folder), *overrides, name=name))
    except Fp4DistError as e:
        return e
    raise AssertionError(f"the run with {overrides} did not fail")


# -- what a run leaves


def one_fp4_run(folder: str) -> dict[str, Any]:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("fp4dist")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logs = ("logging.tensorboard=true", "logging.every=2", "checkpoint.every=2")
    config = tiny_run(Path(folder), f"recipe={FP4}", "train.dtype=auto", *logs)
    summary = loop.run(config)
    again = loop.run(config)  # finished: nothing to do, nothing changes
    return {"summary": summary, "again": again, "messages": messages}


def test_a_run_leaves_everything_that_is_promised(folder: str) -> None:
    (result,) = run_ranks(one_fp4_run, 1, folder)
    summary, run = result["summary"], Path(folder) / "run"
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6]
    assert lines[0].keys() == {"step", "val_loss"}
    for line in lines[1:]:
        assert {"step", "loss", "lr", "grad_norm", "tokens_per_s"} <= line.keys()
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 3, 6]
    assert lines[-1]["val_loss"] < lines[0]["val_loss"]
    assert lines[-1]["lr"] == 0.0 < lines[1]["lr"]

    resolved = load_run(run / "config.resolved.yaml")
    assert resolved.train.dtype == ("bf16" if torch.cuda.is_available() else "fp32"), (
        "auto must be resolved in the file"
    )
    assert (run / "config.resolved.yaml").read_text().startswith(f"# config_hash: {config_hash(resolved)}\n")

    layers = json.loads((run / "layers.json").read_text())
    assert {row["path"].split(".")[-1] for row in layers["linears"]} >= {
        "linear_qkv",
        "linear_proj",
        "linear_fc1",
        "linear_fc2",
    }
    assert summary.fp4_share == pytest.approx(layers["fp4_share_of_block_linear_flops"]) == pytest.approx(0.5)

    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step_00000004", "step_00000006"]
    assert summary.checkpoint == run / "checkpoints" / "step_00000006"
    assert (summary.steps, summary.interrupted, summary.skipped_steps) == (6, False, 0)
    assert [step for step, _ in summary.val_losses] == [0, 3, 6]

    text = "\n".join(result["messages"])
    for part in ("train.dtype: auto is", "optimizer torch AdamW (fused)", "linear_qkv", "step 2/6 | loss", "ETA"):
        assert part in text, part
    assert "step 5/6 | loss" not in text, "a line every two steps"
    assert "50.0% of block-linear FLOPs ran in FP4 by counted calls, the layer table says 50.0%" in text
    again = result["again"]
    assert (again.steps, again.interrupted, again.val_losses) == (6, False, ())
    assert [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()] == lines


# -- whose folder


def folder_rules(folder: str) -> dict[str, Any]:
    run_without_picture(tiny_run(Path(folder), "train.stop_after=2"))
    before = sorted(p.name for p in (Path(folder) / "run").iterdir())
    other = raised(folder, "optim.lr=0.001", "train.steps=9")
    result = {"other": str(other), "untouched": before == sorted(p.name for p in (Path(folder) / "run").iterdir())}
    summary = run_without_picture(tiny_run(Path(folder), "logging.every=3", "checkpoint.every=1", "checkpoint.keep=1"))
    result["continued"] = (summary.steps, [line["step"] for line in metrics(tiny_run(Path(folder)))])
    bad = raised(folder, "recipe=quartet2", name="failed")
    result["failed"] = (type(bad), (Path(folder) / "failed" / "config.resolved.yaml").exists())
    return result


def test_another_configuration_is_refused_and_a_failed_start_claims_nothing(folder: str) -> None:
    (result,) = run_ranks(folder_rules, 1, folder)
    assert "another run lives there" in result["other"]
    assert "train.steps: 6 -> 9" in result["other"]
    assert "optim.lr: 0.008 -> 0.001" in result["other"]
    assert "--set run.dir=" in result["other"]
    assert result["untouched"]
    assert result["continued"] == (6, [0, 1, 2, 3, 4, 5, 6]), "logging and checkpoint settings do not make another run"
    assert result["failed"] == (RecipeMismatch, False)


# -- recipes and models change


def recipe_changes(folder: str) -> dict[str, Any]:
    run_without_picture(tiny_run(Path(folder), "train.stop_after=3", name="bf16"))
    start = f"checkpoint.load={folder}/bf16/checkpoints/step_00000003"
    result: dict[str, Any] = {
        "recipe": str(raised(folder, f"recipe={FP4}", start, name="fp4")),
        "model": str(raised(folder, "model.num_layers=4", start, name="deep")),
        "engine": str(raised(folder, "engine.kind=deepspeed", start, name="ds")),
        "beyond": str(raised(folder, "train.steps=2", start, name="short")),
        "absent": str(raised(folder, f"checkpoint.load={folder}/nowhere", name="absent")),
    }
    allow = "checkpoint.allow_recipe_change=true"
    fp4 = tiny_run(Path(folder), f"recipe={FP4}", start, allow, "train.stop_after=4", name="fp4")
    run_without_picture(fp4)
    rest = tiny_run(Path(folder), f"recipe={FP4}", start, allow, name="fp4")
    run_without_picture(rest)  # own checkpoints win once they have that start behind them
    result["fp4"] = [(line["step"], line.get("val_loss")) for line in metrics(rest)]
    back = tiny_run(Path(folder), f"checkpoint.load={folder}/fp4/checkpoints/step_00000004", allow, name="back")
    run_without_picture(back)
    result["back"] = [line["step"] for line in metrics(back)]
    whole = tiny_run(Path(folder), name="whole")
    run_without_picture(whole)
    result["losses"] = (losses(rest), losses(back), losses(whole))
    return result


def test_a_recipe_change_needs_the_flag_and_works_both_ways(folder: str) -> None:
    (result,) = run_ranks(recipe_changes, 1, folder)
    assert "checkpoint.allow_recipe_change: true" in result["recipe"]
    assert "it holds model tiny" in result["model"]
    assert "set engine.kind: megatron" in result["engine"]
    assert "beyond train.steps = 2" in result["beyond"]
    assert "no manifest.json" in result["absent"]
    assert [step for step, _ in result["fp4"]] == [3, 4, 5, 6]
    assert result["fp4"][0][1] is not None, "the weights it started from are evaluated"
    assert result["back"] == [4, 5, 6]
    fp4, back, whole = result["losses"]
    assert fp4[0] != whole[3], "the streams of two recipes differ"
    assert fp4[0] == pytest.approx(whole[3], abs=0.1)
    assert back[-1] == pytest.approx(whole[-1], abs=0.2)


# -- numbers that are not finite


def diverging(folder: str, kind: str) -> dict[str, Any]:
    """Every gradient from step 4 on is infinite."""

    def poisoned(model: Any, *args: Any, **kwargs: Any) -> Any:
        applied = apply_recipe(model, *args, **kwargs)
        weight = model[-1].decoder.final_layernorm.weight
        weight.register_hook(lambda g: g * float("inf") if applied.clock.step >= 3 else g)
        return applied

    every_step = ("train.eval_every=1", "checkpoint.every=1", "checkpoint.keep=1")
    overrides = (f"engine.kind={kind}", "train.max_nonfinite_steps=3", *every_step)
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("fp4dist").addHandler(handler)
    config = tiny_run(Path(folder), *overrides, name=kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "apply_recipe", poisoned)
        two_bad_steps = run_without_picture(tiny_run(Path(folder), *overrides, "train.stop_after=5", name=kind))
        error = raised(folder, *overrides, name=kind)
    kept = sorted(p.name for p in (Path(config.run_dir) / "checkpoints").iterdir())
    skipped, lines = two_bad_steps.skipped_steps, metrics(config)
    return {"skipped": skipped, "error": error, "lines": lines, "kept": kept, "told": told}


@pytest.mark.parametrize("kind", ["megatron", "deepspeed"])
def test_bad_steps_are_skipped_counted_and_end_the_run(folder: str, kind: str) -> None:
    """The count goes on through an interruption, and the last good checkpoint stays."""
    (result,) = run_ranks(diverging, 1, folder, kind)
    assert result["skipped"] == 2
    assert isinstance(result["error"], TrainingDiverged)
    assert "3 steps in a row" in str(result["error"])
    assert "checkpoints/step_00000003. " in str(result["error"])
    lines = {line["step"]: line for line in result["lines"]}
    assert list(lines) == [0, 1, 2, 3, 4, 5, 6]
    assert [step for step, line in lines.items() if line.get("skipped")] == [4, 5, 6]
    assert lines[4]["grad_norm"] is None, "JSON has no infinity"
    assert lines[3]["val_loss"] == lines[4]["val_loss"] == lines[6]["val_loss"], "skipped steps leave the weights alone"
    assert result["kept"] == ["latest", "step_00000003", "step_00000006"]
    triage = [line for line in result["told"] if line.startswith("step 4 run again: ")]
    assert len(triage) == 1, "the first bad step of a row is explained"
    where = {
        "megatron": "weight gradient of decoder.final_layernorm (RMSNorm) is not finite, step 3, micro-batch 0",
        "deepspeed": "every value of the forward passes is finite",
    }
    assert where[kind] in triage[0]


# -- interruptions


def preempted(folder: str) -> dict[str, Any]:
    """SIGTERM in the middle of step 2, then the rest; and leftovers of a killed save."""

    def signalling(model: Any, *args: Any, **kwargs: Any) -> Any:
        applied = apply_recipe(model, *args, **kwargs)
        send = lambda g: os.kill(os.getpid(), signal.SIGTERM) if applied.clock.step == 1 else None  # noqa: E731
        model[-1].decoder.final_layernorm.weight.register_hook(send)
        return applied

    config = tiny_run(Path(folder))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "apply_recipe", signalling)
        first = run_without_picture(config)
    restored = signal.getsignal(signal.SIGTERM) == before
    (Path(config.run_dir) / "checkpoints" / ".tmp-step_00000004").mkdir()
    with (Path(config.run_dir) / "metrics.jsonl").open("a") as f:  # a killed run was further than its checkpoint
        f.write('{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    second = run_without_picture(config)
    whole = tiny_run(Path(folder), name="whole")
    run_without_picture(whole)
    left = sorted(p.name for p in (Path(config.run_dir) / "checkpoints").iterdir())
    return {
        "first": first,
        "second": second,
        "restored": restored,
        "curves": (curve(config), curve(whole)),
        "left": left,
    }


def test_sigterm_finishes_the_step_saves_and_goes_on_later(folder: str) -> None:
    (result,) = run_ranks(preempted, 1, folder)
    assert (result["first"].steps, result["first"].interrupted) == (2, True)
    assert (result["second"].steps, result["second"].interrupted) == (6, False)
    assert result["restored"]
    parts, whole = result["curves"]
    assert parts == whole
    assert result["left"] == ["latest", "step_00000002", "step_00000006"]


def damaged(folder: str) -> list[str]:
    """The run's own newest checkpoint with a file missing, then with code in its index."""
    config = tiny_run(Path(folder), "train.stop_after=2")
    run_without_picture(config)
    dist.barrier()
    state = Path(config.run_dir) / "checkpoints" / "step_00000002" / "state"
    if dist.get_rank() == 0:
        next(state.glob("*.distcp")).rename(state / "elsewhere")
    dist.barrier()
    missing = raised(folder)
    dist.barrier()
    if dist.get_rank() == 0:
        (state / ".metadata").write_bytes(pickle.dumps(os.getcwd))
    dist.barrier()
    return [str(missing), str(raised(folder))]


def test_a_damaged_checkpoint_is_refused_on_every_rank(folder: str) -> None:
    for missing, code in run_ranks(damaged, 2, folder):
        assert "use another checkpoint" in missing
        assert "does not belong in an index" in code


# -- wrong sizes, missing things


def two_ranks_wrong(folder: str, *overrides: str) -> str:
    return str(raised(folder, *overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("parallel.tp=2", "parallel.pp=2"),
            "WORLD_SIZE = 2 is not a multiple of parallel.tp * pp * cp = 2 * 2 * 1 = 4",
        ),
        (("train.micro_batch_size=4",), "is not a multiple of train.micro_batch_size * data parallel = 4 * 2 = 8"),
        (("data.train=[nowhere]",), "nowhere"),
    ],
)
def test_errors_reach_every_rank(folder: str, overrides: tuple[str, ...], message: str) -> None:
    for text in run_ranks(two_ranks_wrong, 2, folder, *overrides):
        assert message in text


def test_no_evaluation_without_samples(folder: str) -> None:
    (values,) = run_ranks(without_evaluation, 1, folder)
    assert values == []


def without_evaluation(folder: str) -> list[Any]:
    config = tiny_run(Path(folder), "train.eval_samples=0", "train.stop_after=1")
    run_without_picture(config)
    return [line["val_loss"] for line in metrics(config) if "val_loss" in line]
