"""The monitor beside a run: no bit changes, its file and its report say what was seen."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fp4dist.nn.apply import apply_recipe
from fp4dist.nn.operands import OperandWatch, oscillation
from fp4dist.spec.load import changed_recipe, config_hash
from fp4dist.spec.recipe import SLOTS
from fp4dist.spec.run import RunConfig
from fp4dist.spec.watching import MonitorConfig
from fp4dist.train.report import chart, main, write_report
from tests.distributed import run_ranks
from tests.train.tiny_run import ENGINES, FP4, curve, run_without_picture, tiny_run, write_counting_tokens

EVERY = MonitorConfig(every=3, rows=128)
FC1 = "decoder.layers.0.mlp.linear_fc1"


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_counting_tokens(tmp_path_factory.mktemp("monitor"))


def looks(config: RunConfig) -> list[dict[str, Any]]:
    text = (Path(config.run_dir) / "monitor.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("engine", ENGINES)
def test_looking_changes_no_bit_and_says_all(tokens: Path, engine: str) -> None:
    plain = tiny_run(tokens, f"recipe={FP4}", f"engine.kind={engine}", "train.steps=8", name=f"plain_{engine}")
    watched = tiny_run(tokens, f"recipe={FP4}", f"engine.kind={engine}", "train.steps=8", name=f"watched_{engine}")
    watched = dataclasses.replace(watched, monitor=EVERY)
    assert config_hash(dataclasses.replace(watched, run=plain.run)) == config_hash(plain)
    for config in (plain, watched):
        run_without_picture(config)
    assert curve(watched) == curve(plain)
    found = looks(watched)
    assert [look["step"] for look in found] == [0, 3, 6]
    whole = engine == "megatron"
    for number, look in enumerate(found):
        layer = look["linears"][FC1]
        slots = {name for name, numbers in layer.items() if isinstance(numbers, dict)}
        assert slots == (set(SLOTS) - {"dgrad.w"} if whole else {"fprop.x", "fprop.w"})  # it reuses fprop.w's codes
        assert layer["fprop.x"]["qsnr"] > 15
        assert (layer["fprop.x"]["drift"] is None) == (number == 0)
        assert (look["noise"] is not None and 1 < look["noise"] < 100) == whole
        assert ("zero_gradients" in layer) == whole
        assert ("oscillation" in layer) == (number < 2)  # the run ended before the last one's was known
        assert look["fallbacks"] == []
    page = (Path(watched.run_dir) / "report.html").read_text(encoding="utf-8")
    assert FC1 in page
    assert "<svg" in page
    assert not re.search(r"<script|src=|href=|https?:", page)


def test_a_resumed_run_goes_on_looking(tokens: Path) -> None:
    whole = dataclasses.replace(tiny_run(tokens, f"recipe={FP4}", "train.steps=8", name="whole"), monitor=EVERY)
    run_without_picture(whole)
    cut = tiny_run(tokens, f"recipe={FP4}", "train.steps=8", "train.stop_after=6", name="cut")
    cut = dataclasses.replace(cut, monitor=dataclasses.replace(EVERY, noise=False))
    run_without_picture(cut)
    run_without_picture(dataclasses.replace(cut, train=dataclasses.replace(cut.train, stop_after=None)))
    for a, b in zip(looks(cut), looks(whole), strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0, "noise": None}


def on_two_ranks(folder: str) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    found = []
    for name, layout in (("dp", ()), ("tp", ("parallel.tp=2", "parallel.sequence_parallel=true"))):
        config = tiny_run(Path(folder), f"recipe={FP4}", "train.steps=4", *layout, name=name)
        config = dataclasses.replace(config, monitor=EVERY)
        run_without_picture(config)
        found.append(looks(config)[0])
    return found


def test_two_ranks_see_what_one_sees(tokens: Path) -> None:
    """Under data parallelism the same micro-batch; under tensor parallelism each rank's parts, added up."""
    one = dataclasses.replace(tiny_run(tokens, f"recipe={FP4}", "train.steps=4", name="one"), monitor=EVERY)
    run_without_picture(one)
    alone = looks(one)[0]
    for seen in run_ranks(on_two_ranks, 2, str(tokens))[0]:
        assert seen["linears"].keys() == alone["linears"].keys()
        assert seen["noise"] == pytest.approx(alone["noise"], rel=0.05)
        for path, layer in alone["linears"].items():
            assert seen["linears"][path].get("zero_gradients") == pytest.approx(layer.get("zero_gradients"), abs=0.02)
            for slot in ("fprop.x", "fprop.w", "dgrad.dy", "wgrad.x"):
                for key in (
                    "underflow",
                    "qsnr",
                    *(("amax",) if slot.startswith("fprop") else ()),
                ):  # dY is scaled by dp
                    if slot in layer:
                        assert seen["linears"][path][slot][key] == pytest.approx(layer[slot][key], rel=0.15, abs=0.02)


def test_what_stands_beside_codes_is_not_theirs() -> None:
    """Activations of 100 + normal noise: where the mean stands apart, codes hold the noise."""
    x = torch.randn(256, 128, generator=torch.Generator().manual_seed(0))
    amax = {}
    for recipe in ("averis", "nvidia_nvfp4"):
        model = nn.Sequential(OrderedDict(linear_fc1=nn.Linear(128, 128, bias=False)))
        rules = [{"roles": ["fc1"], "linear": "fp4"}]
        applied = apply_recipe(model, changed_recipe(recipe, {"rules": rules}), seed=0, tokens=256)
        watch = OperandWatch(applied, 128)
        with applied.aside(), watch.watching():
            model(100 + x).sum().backward()
        amax[recipe] = watch.read()["linear_fc1", "fprop.x"].amax
    assert amax["nvidia_nvfp4"] == pytest.approx(100 + float(x.max()), abs=1e-3)
    assert amax["averis"] == pytest.approx(float((x - x.mean(0)).abs().max()), abs=0.05)


def test_oscillation_counts_codes_that_come_back() -> None:
    before = torch.tensor([[0x21, 0x43]], dtype=torch.uint8)  # codes 1, 2, 3, 4
    between = torch.tensor([[0x22, 0x53]], dtype=torch.uint8)  # 2, 2, 3, 5
    after = torch.tensor([[0x21, 0x63]], dtype=torch.uint8)  # 1, 2, 3, 6: only the first came back
    assert oscillation(before, between, after, packed=True) == (1, 4)
    assert oscillation(before, between, after, packed=False) == (1, 2)


def test_the_report_of_any_run(tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_run(tokens, name="unwatched")
    run_without_picture(config)
    assert not (Path(config.run_dir) / "report.html").exists()
    assert main([config.run_dir]) == 0
    assert "report.html" in capsys.readouterr().out
    assert "no looks" in write_report(Path(config.run_dir)).read_text(encoding="utf-8")
    assert main([str(tokens)]) == 2


def test_a_chart_places_its_points() -> None:
    svg = chart("t", {"a": [(0.0, 1.0), (10.0, 3.0)]})
    assert "points='58.0,198.0 432.0,22.0'" in svg
    assert chart("t", {"a": []}) == ""
    assert "x='" in chart("t", {"a": [(5.0, 2.0)]})


def test_what_the_section_may_not_say() -> None:
    with pytest.raises(ValueError, match="at least 3"):
        MonitorConfig(every=2)
    with pytest.raises(ValueError, match="multiple of 128"):
        MonitorConfig(rows=100)
