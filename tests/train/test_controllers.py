"""What a recipe keeps between steps, in whole runs: saved with checkpoints, exact on resume, equal in every layout."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fp4dist.errors import CheckpointError
from fp4dist.spec.run import RunConfig
from fp4dist.train import checkpoint
from tests.distributed import run_ranks
from tests.nn.test_controllers import assert_equal
from tests.train.test_engines import KINDS, interrupted_and_whole
from tests.train.test_loop import raised
from tests.train.tiny_run import metrics, run_without_picture, tiny_run, write_counting_tokens

HELD = {"kind": "hold", "steps": 3}
RADIX4 = {"element": "radix4_even", "scale": "fp32", "block": "tensor"}
RECIPE: dict[str, Any] = {
    "name": "keeps",
    "linears": {
        "it": {
            "fprop": {
                "x": {"format": "nvfp4", "amax": HELD, "outlier": {"kind": "hot_residual", "multiple": 8, "every": 2}},
                "w": {"format": "nvfp4", "amax": HELD},
            },
            "dgrad": {"dy": {"format": RADIX4, "amax": "grad_scale"}},
            "wgrad": {"dy": {"format": "nvfp4", "amax": "hindsight"}},
        },
        "learning": {
            "fprop": {
                "x": {"format": {"element": "int4", "scale": "fp32", "block": "tensor"}, "amax": "learned",
                      "estimator": "lsq"},
                "w": {"format": "nvfp4"},
            }
        },
    },
    "rules": [{"roles": ["proj"], "linear": "learning"}, {"roles": ["fc1", "fc2", "qkv"], "linear": "it"}],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> str:
    (tmp_path / "keeps.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    return str(write_counting_tokens(tmp_path))


def newest(config_or_dir: RunConfig | Path) -> dict[str, Any]:
    """controllers.pt of a run's last checkpoint, of step 6."""
    run = config_or_dir if isinstance(config_or_dir, Path) else Path(config_or_dir.run_dir)
    return torch.load(run / "checkpoints" / "step_00000006" / checkpoint.CONTROLLERS, weights_only=True)


def stopped_and_whole(folder: str, cases: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    """(curves of a whole run and of one in two parts, controllers.pt of both) for each case."""
    results = interrupted_and_whole(folder, cases)
    place = {name: [Path(folder) / f"{name}_{part}" for part in ("whole", "parts")] for name in cases}
    return {name: (curves, [newest(run) for run in place[name]]) for name, curves in results.items()}


def assert_resumed(name: str, result: Any) -> None:
    (whole, parts), kept = result
    assert parts == whole, name
    assert_equal(kept[1], kept[0])
    controllers = kept[0]["controllers"]
    assert controllers["settled"] == 5
    kept_values = [bank[key] for bank in controllers["banks"] for key in ("amax", "scale", "updates") if key in bank]
    assert len(kept_values) == len(controllers["banks"]) == 4
    assert all(values.all() for values in kept_values)
    assert all(choice["chosen"].any() for choice in controllers["choices"])


NO_CLIP = "optim.clip_grad=0"  # the norm of a gradient in two parts is another sum


def test_resume_is_exact_and_layouts_agree(folder: str) -> None:
    """Stopped after step 2, in the middle of what is held; data-parallel ranks keep bit for bit what one process does.

    Tensor-parallel ranks add in another order, so their weights have other bits, and their amaxes nearly the same.
    """
    recipe = f"recipe={folder}/keeps.yaml"
    megatron = (*KINDS["megatron"], recipe, NO_CLIP)
    one = {"megatron": megatron, "zero1": (*KINDS["zero1"], recipe)}
    two = {"dp2": megatron, "tp2": (*megatron, "parallel.tp=2"), "pp2": (*megatron, "parallel.pp=2")}
    (alone,) = run_ranks(stopped_and_whole, 1, folder, one, timeout=300)
    for name, result in alone.items():
        assert_resumed(name, result)
    _, (whole, _) = alone["megatron"]
    tolerance = {"looked": 0.0, "amax": 0.05, "scale": 1.0}  # relative; S may be one doubling away
    for ranks in run_ranks(stopped_and_whole, 2, folder, two, timeout=300):
        for name, result in ranks.items():
            assert_resumed(name, result)
            for a, b in zip(result[1][0]["controllers"]["banks"], whole["controllers"]["banks"], strict=True):
                assert a["names"] == b["names"]
                for key in set(tolerance) & set(a):
                    torch.testing.assert_close(a[key], b[key], rtol=tolerance[key], atol=0)
        assert_equal(ranks["dp2"][1][0], whole)


def newest_of_step_2(folder: str, name: str) -> Path:
    return Path(folder) / name / "checkpoints" / "step_00000002"


def changes(folder: str) -> dict[str, Any]:
    """Checkpoints of other recipes, in both directions; then the run's own without controllers.pt, and with others."""
    recipe, messages = f"recipe={folder}/keeps.yaml", []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("fp4dist").addHandler(handler)
    logging.getLogger("fp4dist").setLevel(logging.INFO)
    run_without_picture(tiny_run(Path(folder), recipe, "train.stop_after=2", name="kept"))
    run_without_picture(tiny_run(Path(folder), "train.stop_after=2", name="plain"))
    kept, plain = (newest_of_step_2(folder, name) for name in ("kept", "plain"))
    found: dict[str, Any] = {"files": [sorted(p.name for p in place.iterdir()) for place in (kept, plain)]}
    allow = ("checkpoint.allow_recipe_change=true", "train.stop_after=3")
    for name, given, start in (("away", (), kept), ("to", (recipe,), plain)):
        messages.clear()
        after = tiny_run(Path(folder), *given, *allow, f"checkpoint.load={start}", name=name)
        run_without_picture(after)
        found[name] = [line["step"] for line in metrics(after)], [m for m in messages if "starts afresh" in m]
    file = kept / checkpoint.CONTROLLERS
    file.rename(file.with_suffix(".away"))
    found["absent"] = raised(folder, recipe, name="kept")
    file.write_bytes(pickle.dumps(exit))
    found["code"] = raised(folder, recipe, name="kept")
    torch.save({"controllers": None}, file)
    found["other"] = raised(folder, recipe, name="kept")
    return found


def test_what_is_kept_must_be_there_and_another_recipe_starts_afresh(folder: str) -> None:
    (found,) = run_ranks(changes, 1, folder)
    assert found["files"] == [["controllers.pt", "manifest.json", "state"], ["manifest.json", "state"]]
    assert found["away"] == ([2, 3], [])
    assert found["to"][0] == [2, 3]
    assert "recipe keeps keeps state" in found["to"][1][0]
    for key, message in (
        ("absent", r"no controllers\.pt, in which recipe keeps keeps its state"),
        ("code", r"controllers\.pt is not the plain data"),
        ("other", r"controllers\.pt lacks optimizer, phases"),
    ):
        with pytest.raises(CheckpointError, match=message):
            raise found[key]
