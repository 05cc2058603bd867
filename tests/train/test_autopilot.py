"""The autopilot under injected trouble: `act` ends near the undisturbed run, `off` does worse, nothing is lost."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from fp4dist.errors import CheckpointError, ConfigError, TrainingDiverged
from fp4dist.megatron.sites import gpt_sites
from fp4dist.nn.apply import plan_table
from fp4dist.nn.raising import raised
from fp4dist.spec.build import build
from fp4dist.spec.load import config_hash, load_recipe, load_run
from fp4dist.spec.run import RunConfig
from fp4dist.spec.watching import (
    AutopilotConfig,
    BadOperand,
    Drift,
    Drowned,
    MonitorConfig,
    NotFinite,
    Raise,
    RollBack,
    Rule,
    Skip,
    Spike,
)  # fmt: skip
from fp4dist.train.autopilot import STATE, Autopilot
from fp4dist.train.engine import StepResult
from fp4dist.train.monitor import Look
from fp4dist.train.watcher import Watcher
from tests.distributed import run_ranks
from tests.train.tiny_run import FP4, curve, metrics, run_without_picture, tiny_run, write_counting_tokens
from tests.train.troubles import bad_batches, nan_weights, outliers, rate_spike

QKV = "decoder.layers.0.self_attention.linear_qkv"
RULES = (
    Rule(when=Spike(window=8, above=6, at_least=0.5), do=Skip()),
    Rule(when=BadOperand(of="underflow", bound=0.9), do=Raise()),
    Rule(when=NotFinite(in_a_row=2), do=RollBack()),
    Rule(when=Drift(window=4, at_least=0.25), do=RollBack(), times=3, rest=4),
)
STEPS = 48


def config_of(folder: Path, name: str, mode: str, *overrides: str, monitor: bool = False) -> RunConfig:
    found = tiny_run(
        folder, f"train.steps={STEPS}", "train.eval_every=0", "train.eval_samples=16",
        "optim.lr=0.005", "train.global_batch_size=8", "train.micro_batch_size=8",
        f"checkpoint.every={12 if mode == 'act' else 0}", *overrides, name=name,
    )  # fmt: skip
    autopilot = AutopilotConfig(mode=mode, rules=RULES)  # type: ignore[arg-type]
    return dataclasses.replace(
        found, autopilot=autopilot, monitor=MonitorConfig(every=4, rows=128) if monitor else None
    )


def actions(config: RunConfig) -> list[tuple[int, str]]:
    file = Path(config.run_dir) / "autopilot.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [(line["step"], line["action"].split(" of ")[0]) for line in map(json.loads, lines)]


def final_loss(config: RunConfig, trouble: AbstractContextManager[None]) -> float:
    with trouble:
        return run_without_picture(config).val_losses[-1][1]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_counting_tokens(tmp_path_factory.mktemp("autopilot"))


@pytest.fixture(scope="module")
def undisturbed(tokens: Path) -> dict[str, float]:
    """Final loss by recipe; the rules see nothing."""
    losses = {}
    for recipe in ("bf16", FP4):
        config = config_of(tokens, f"calm_{recipe}", "advise", f"recipe={recipe}", monitor=recipe == FP4)
        losses[recipe] = final_loss(config, nullcontext())
        assert actions(config) == []
    return losses


TROUBLES: dict[str, Any] = {
    "batch": ("bf16", lambda: bad_batches(range(26, 28)), ["skip the step", "skip the step", "roll back"]),
    "rate": ("bf16", lambda: rate_spike(29, 100.0), ["skip the step", "skip the step", "roll back"]),
    "outliers": (FP4, lambda: outliers(QKV, since=20), ["raise fprop"]),
}


@pytest.mark.parametrize("name", TROUBLES)
def test_act_ends_near_the_undisturbed_run_and_off_does_worse(
    tokens: Path, undisturbed: dict[str, float], name: str
) -> None:
    recipe, trouble, expected = TROUBLES[name]
    config = config_of(tokens, f"{name}_act", "act", f"recipe={recipe}", monitor=recipe == FP4)
    acted = final_loss(config, trouble())
    assert [what for _, what in actions(config)] == expected
    off = config_of(tokens, f"{name}_off", "off", f"recipe={recipe}")
    left_alone = final_loss(off, trouble())
    print(f"{name}: undisturbed {undisturbed[recipe]:.4f}, act {acted:.4f}, off {left_alone:.4f}")
    assert abs(acted - undisturbed[recipe]) < 0.02
    assert left_alone > max(acted, undisturbed[recipe]) + 0.02
    assert actions(off) == []
    lines = metrics(config)
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    undone = Path(config.run_dir) / "metrics.undone.jsonl"
    told = "".join(line.get("autopilot", "") for line in lines)
    if "roll back" in expected:
        gone = [json.loads(text) for text in undone.read_text(encoding="utf-8").splitlines()]
        told += "".join(line.get("autopilot", "") for line in gone)
        back = min(line["step"] for line in gone) - 1
        assert back % 12 == 0
        assert back < 29
    else:
        assert not undone.exists()
    assert told.count("act: ") == len(expected)
    last = max((Path(config.run_dir) / "checkpoints").iterdir(), key=lambda folder: folder.name)
    taken = json.loads((last / STATE).read_text(encoding="utf-8"))["taken"]
    assert sum(times for times, _ in taken.values()) == len(expected)  # going back does not forget them


def nan_on_one_rank(folder: str) -> dict[str, Any]:
    """On two ranks: the undisturbed loss, the acting run's, what happens without."""
    tokens, rank = Path(folder), int(os.environ["RANK"])
    torch.set_num_threads(1)
    shared = ("train.micro_batch_size=4", "train.steps=20")
    calm = run_without_picture(config_of(tokens, "calm2", "off", *shared))
    with nan_weights(15, 1):
        acting = config_of(tokens, "nan_act", "act", *shared)
        acted = run_without_picture(acting)
    with nan_weights(15, 1), pytest.raises(TrainingDiverged):
        run_without_picture(config_of(tokens, "nan_off", "off", *shared))
    return {"rank": rank, "calm": calm.val_losses[-1][1], "acted": acted.val_losses[-1][1], "steps": acted.steps,
            "actions": actions(acting)}  # fmt: skip


def test_nan_on_one_rank_is_rolled_back(tokens: Path) -> None:
    found = run_ranks(nan_on_one_rank, 2, str(tokens))
    for rank in found:
        assert abs(rank["acted"] - rank["calm"]) < 0.02
        assert rank["steps"] == 20
        assert rank["actions"] == [(16, "roll back")]


def test_a_resumed_run_decides_as_the_first_one_did(tokens: Path) -> None:
    """Cut after it went back, in the middle of the window that it looks at."""
    whole = config_of(tokens, "rate_act", "act")  # of the test before
    assert "roll back" in [what for _, what in actions(whole)]
    cut = config_of(tokens, "rate_cut", "act", "train.stop_after=27")
    with rate_spike(29, 100.0):
        run_without_picture(cut)
        second = dataclasses.replace(cut, train=dataclasses.replace(cut.train, stop_after=36))
        run_without_picture(second)
    run_without_picture(dataclasses.replace(cut, train=dataclasses.replace(cut.train, stop_after=None)))
    assert curve(cut) == curve(whole)
    assert actions(cut) == actions(whole)


def test_advise_tells_and_changes_nothing(tokens: Path) -> None:
    short = ("train.steps=24", "checkpoint.every=0")
    off, advise = (config_of(tokens, f"{mode}_24", mode, *short) for mode in ("off", "advise"))
    for config in (off, advise):
        with bad_batches(range(20, 21)):
            run_without_picture(config)
    assert curve(off) == curve(advise)
    assert actions(advise) == [(20, "skip the step")]


# ---------- rules without a run


def pilot(*rules: Rule, mode: str = "act", recipe: str = "nvidia_nvfp4") -> Autopilot:
    model = load_run("tiny").model
    applied = plan_table(gpt_sites(model), load_recipe(recipe))
    return Autopilot(AutopilotConfig(mode=mode, rules=rules), applied, None)  # type: ignore[arg-type]


def step(p: Autopilot, number: int, loss: float, norm: float = 1.0, skipped: bool = False) -> Any:
    """(refused, action)."""
    p.begin(number)
    refused = math.isfinite(loss) and p.judge(loss, norm)
    return refused, p.after_step(StepResult(loss, norm, skipped or refused, 1, 0.1, refused=refused))


def look(**numbers: float) -> Look:
    slot = {"underflow": 0.1, "saturation": 0.0, "qsnr": 20.0, "amax": 1.0, "drift": 0.0, **numbers}
    good = {"underflow": 0.1, "saturation": 0.0, "qsnr": 25.0, "amax": 1.0, "drift": 0.0}
    return Look(8, 0.0, 1.5, [], {"decoder.layers.0.mlp.linear_fc1": {"fprop.x": slot, "dgrad.dy": good}})


def test_a_spike_needs_a_full_window_and_leaves_it_untouched() -> None:
    p = pilot(Rule(when=Spike(window=4, above=5, at_least=0.5), do=Skip(), times=2))
    assert [step(p, i, 3.0 + i / 100)[0] for i in range(1, 5)] == [False] * 4
    assert step(p, 5, 3.4)[0] is False  # below at_least
    assert step(p, 6, 9.0)[0] is True
    assert step(p, 7, 9.0)[0] is True
    assert step(p, 8, 9.0)[0] is False  # times are used up
    assert p.calm  # without `drift` a taken step is calm


def test_drift_goes_back_before_the_trouble() -> None:
    p = pilot(Rule(when=Drift(window=3, at_least=0.5), do=RollBack()))
    for i in range(1, 11):
        assert step(p, i, 3.0)[1] is None
    assert step(p, 11, 3.9)[1] is None
    found = step(p, 12, 3.9)[1]
    assert found is not None
    assert found.before == 10
    assert not p.calm
    assert "0.9000 over its lowest" in found.cause


def test_a_bad_operand_raises_the_worst_layer_once() -> None:
    p = pilot(Rule(when=BadOperand(of="qsnr", bound=10.0), do=Raise(to="fp8")))
    p.begin(9)
    assert p.after_look(look(qsnr=15.0)) is None
    found = p.after_look(look(qsnr=5.0))
    assert found is not None
    assert (found.paths, found.gemms) == (("decoder.layers.0.mlp.linear_fc1",), ("fprop",))
    assert p.memory.raised == {"decoder.layers.0.mlp.linear_fc1": {"fprop": "fp8"}}
    assert p.after_look(look(qsnr=5.0)) is None  # it is as high as the rule goes


def test_a_drowned_gradient_switches_the_forward_pass_for_the_tail() -> None:
    p = pilot(Rule(when=Drowned(), do=Raise(where="all", gemms=("fprop",)), times=1))
    p.begin(9)
    found = p.after_look(look())
    assert found is not None
    assert len(found.paths) == 4  # one of the two layers is in bf16 already
    assert set(p.memory.raised) == set(found.paths)


def test_advise_takes_nothing() -> None:
    p = pilot(*RULES, mode="advise")
    for i in range(1, 9):
        step(p, i, 3.0)
    assert step(p, 9, 9.0)[0] is False
    assert p.news() == ["advise: skip the step (loss 9, median of the last 8 accepted steps 3, spread 0)"]
    p.begin(10)
    assert p.after_look(look(underflow=0.99)) is None
    assert p.memory.raised == {}


def test_a_drift_raises_the_layer_that_the_last_look_found_worst(tmp_path: Path) -> None:
    p, other = (pilot(Rule(when=Drift(window=2, at_least=0.5), do=Raise(to="fp8"))) for _ in range(2))
    p.begin(1)
    assert p.after_look(look(qsnr=12.0)) is None
    p.save(tmp_path)
    other.load(tmp_path)
    found, same = ([step(one, i, loss)[1] for i, loss in enumerate((3.0, 3.0, 9.0), start=1)] for one in (p, other))
    assert found == same
    assert found[:2] == [None, None]
    assert (found[2].paths, found[2].gemms) == (("decoder.layers.0.mlp.linear_fc1",), ("fprop",))
    blind = pilot(Rule(when=Drift(window=2, at_least=0.5), do=Raise()))
    assert [step(blind, number, loss)[1] for number, loss in enumerate((3.0, 3.0, 9.0), start=1)] == [None] * 3


def test_switched_off_it_keeps_what_it_raised_and_left_out(tokens: Path, tmp_path: Path) -> None:
    p = pilot(*RULES)
    p.memory.raised, p.memory.shift = {QKV: {"fprop": "bf16"}}, 24
    p.save(tmp_path)
    applied = plan_table(gpt_sites(load_run("tiny").model), load_recipe("quartet2"))
    nothing: Any = None  # of a run that is off
    watcher = Watcher(config_of(tokens, "x", "off"), nothing, applied, nothing, nothing)
    watcher.load(tmp_path / "none")
    assert watcher.shift == 0
    watcher.load(tmp_path)
    assert watcher.shift == 24
    assert applied.raised == {QKV: {"fprop": "bf16"}}
    (tmp_path / "next").mkdir()
    watcher.save(tmp_path / "next")
    assert json.loads((tmp_path / "next" / STATE).read_text(encoding="utf-8"))["shift"] == 24


def test_state_survives_a_file_and_a_wrong_one_is_refused(tmp_path: Path) -> None:
    p, other = pilot(*RULES), pilot(*RULES)
    for i in range(1, 12):
        step(p, i, 3.0 - i / 50)
    step(p, 12, math.nan)
    p.save(tmp_path)
    other.load(tmp_path)
    assert other.memory == p.memory
    p.begin(13)
    assert p.after_look(look(underflow=0.99)) is not None
    p.save(tmp_path)
    fewer = pilot(*RULES[1:])  # a resume without the first rule: what the others have done stays theirs
    fewer.load(tmp_path)
    assert [number for number, _ in fewer._rules(Raise)] == []
    (tmp_path / "autopilot.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match="not what the autopilot writes"):
        other.load(tmp_path)


@pytest.mark.parametrize("recipe", ["nvidia_nvfp4", "quartet2", "wang2501", "tetrajet_v2"])
@pytest.mark.parametrize("to", ["bf16", "fp8"])
def test_any_gemm_of_a_recipe_can_be_raised(recipe: str, to: str) -> None:
    linear = load_recipe(recipe).linear("fp4")
    for gemms in (["fprop"], ["dgrad"], ["wgrad"], ["fprop", "dgrad", "wgrad"]):
        found = raised(linear, dict.fromkeys(gemms, to))
        for gemm in ("fprop", "dgrad", "wgrad"):
            if gemm in gemms:
                assert not found.gemm_is_fp4(gemm)
                assert (found.slot(f"{gemm}.{'x' if gemm == 'fprop' else 'dy'}") is None) == (to == "bf16")
    assert raised(linear, {}) == linear
    with pytest.raises(ValueError, match="precisions bf16"):
        raised(linear, {"fprop": "fp6"})


def test_what_the_file_may_not_say(tokens: Path) -> None:
    with pytest.raises(ConfigError, match="do: skip needs"):
        build(AutopilotConfig, {"rules": [{"when": {"kind": "drift"}, "do": {"kind": "skip"}}]})
    with pytest.raises(ValueError, match="there are none"):
        config_of(tokens, "x", "act", "checkpoint.every=0")
    for when, do, match in (
        (NotFinite(in_a_row=9), RollBack(), r"stops after train.max_nonfinite_steps = 5"),
        (Drift(), Raise(), r"rules\[0\].*add `monitor: \{\}`"),
        (Drowned(), Raise(), "drowned asks for the gradient's noise"),
    ):
        silent = MonitorConfig(noise=False) if isinstance(when, Drowned) else None
        rules = AutopilotConfig(mode="advise", rules=(Rule(when=when, do=do),))
        with pytest.raises(ValueError, match=match):
            dataclasses.replace(config_of(tokens, "x", "off"), autopilot=rules, monitor=silent)
    for wrong in (
        lambda: Spike(window=300), lambda: Drift(window=300), lambda: RollBack(skip=-1.0), lambda: Drowned(below=0.0)
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"window <= 256|must not be negative|must be positive"):
            wrong()
    base = config_of(tokens, "x", "off")
    watched = dataclasses.replace(base, monitor=MonitorConfig(every=10))
    assert config_hash(base) == config_hash(watched)
