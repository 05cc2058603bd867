"""Whole runs in which FP8 carriers lose elements: on one rank alone, logged, saved, resumed, or the step skipped."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fp4dist.nn.apply import AppliedRecipe
from fp4dist.train import checkpoint, loop
from tests.distributed import run_ranks
from tests.nn.carriers import FP8, carrier_backend
from tests.train.test_engines import KINDS
from tests.train.tiny_run import curve, run_without_picture, tiny_run, write_counting_tokens

RECIPE, LOSING = "recipe=quartet", 2  # the noise step in which elements are lost: training step 3


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(write_counting_tokens(tmp_path))


class Losing:
    """Inside, every FP8 carrier on the last rank loses 2 elements in one step."""

    def __init__(self) -> None:
        self.step, self.messages = -1, list[str]()

    def __enter__(self) -> Losing:
        self._patch = pytest.MonkeyPatch()
        set_step = AppliedRecipe.set_step

        def noting(applied: AppliedRecipe, step: int, *args: Any, **named: Any) -> list[str]:
            self.step = step
            return set_step(applied, step, *args, **named)

        self._patch.setattr(AppliedRecipe, "set_step", noting)
        handler = logging.Handler()
        handler.emit = lambda record: self.messages.append(record.getMessage())
        self._log, self._handler = logging.getLogger("fp4dist"), handler
        self._log.addHandler(handler)
        self._log.setLevel(logging.INFO)
        self._backend = carrier_backend(FP8)
        asked = self._backend.__enter__()
        last = dist.get_rank() == dist.get_world_size() - 1 if dist.is_initialized() else True
        asked.loses = lambda _: 2 * (last and self.step == LOSING)
        return self

    def __exit__(self, *_: object) -> None:
        self._backend.__exit__(None, None, None)
        self._log.removeHandler(self._handler)
        self._patch.undo()


def trained(folder: str, cases: dict[str, tuple[str, ...]]) -> dict[str, dict[str, Any]]:
    found = {}
    for name, overrides in cases.items():
        whole = tiny_run(Path(folder), RECIPE, *overrides, name=name)
        with Losing() as losing:
            summary = run_without_picture(whole)
            text = [m for m in losing.messages if "did not fit" in m or "lost elements" in m or "run again" in m]
        kept = torch.load(
            whole_dir(whole) / "checkpoints" / "step_00000006" / checkpoint.CONTROLLERS, weights_only=True
        )["exactness"]
        found[name] = {
            "curve": curve(whole, ("step", "loss", "grad_norm", "skipped", "lost", "inexact")),
            "messages": sorted(set(text)),
            "kept": kept["places"],
            "skipped": summary.skipped_steps,
        }
        with Losing():
            parts = tiny_run(Path(folder), RECIPE, *overrides, "train.stop_after=4", name=f"{name}_parts")
            run_without_picture(parts)
            run_without_picture(tiny_run(Path(folder), RECIPE, *overrides, name=f"{name}_parts"))
            found[name]["parts"] = curve(parts, ("step", "loss", "grad_norm", "skipped", "lost", "inexact"))
            manifest = whole_dir(parts) / "checkpoints" / "step_00000004" / "manifest.json"
            found[name]["streak"] = json.loads(manifest.read_text())["nonfinite_streak"]
    return found


def whole_dir(config: Any) -> Path:
    return Path(config.run_dir)


CASES = {
    "megatron": KINDS["megatron"],
    "strict": (*KINDS["megatron"], "backend.strict_exact=true"),
    "zero1_strict": (*KINDS["zero1"], "backend.strict_exact=true"),
    "zero3": KINDS["zero3"],
}


@pytest.mark.distributed
def test_runs_in_which_one_rank_loses_elements(folder: str) -> None:
    first, second = run_ranks(trained, 2, folder, CASES, timeout=400)
    for name, found in first.items():
        assert found["kept"] == second[name]["kept"], "all ranks leave FP8 together"
        paths = {(path, slot.split(".")[0]) for path, slot, *_ in found["kept"]}
        assert len(paths) == len(found["kept"]) == 3 * 8, "every GEMM of the model's 8 linears"
        assert {(count, step) for _, _, count, step, *_ in found["kept"]} == {(2, LOSING)}
        by_step = {line[0]: line for line in found["curve"]}
        strict = "strict" in name
        assert by_step[LOSING + 1][3:] == (strict or None, 2 * 48, strict or None)
        assert [line[4] for step, line in by_step.items() if step != LOSING + 1] == [None] * 6
        assert found["skipped"] == strict
        assert found["parts"] == found["curve"], "a run that goes on keeps to bf16 carriers"
        assert found["streak"] == 0
        told = [m for m in found["messages"] if "takes bf16 carriers from now on" in m]
        assert len(told) == 24
        assert f"step {LOSING + 1}: " in told[0]
        assert any("24 GEMMs lost elements" in m for m in found["messages"])
        assert any("skipped (strict_exact)" in m for m in found["messages"]) == strict
        assert not any("run again" in m for m in found["messages"]), "nothing to explain: all values were finite"
    losses = {name: [line[1] for line in found["curve"]] for name, found in first.items()}
    assert losses["megatron"][:4] == losses["strict"][:4]
    assert losses["megatron"][4:] != losses["strict"][4:], "the flagged step was not taken"
    assert loop
