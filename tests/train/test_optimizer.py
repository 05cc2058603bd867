"""What recipes do around the optimizer's step is the same in both engines and every layout, and continues exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fp4dist.errors import ConfigError
from fp4dist.train import optim
from fp4dist.train.checkpoint import CONTROLLERS
from fp4dist.train.memory import estimate
from tests.distributed import run_ranks
from tests.train.tiny_run import curve, losses, run_without_picture, tiny_run, write_counting_tokens

SPAM = """
name: test_gradients
gradients:
  - {kind: ada_clip, bias_step: since_reset}
  - {kind: ada_norm, decay_to: 0.5}
  - {kind: moment_reset, every: 4, warmup: 2}
"""
ROUNDED = """
name: test_rounded
gradients:
  - {kind: moment_reset, every: 5}
  - {kind: spike_clip, threshold: 3, wait: 1}
optimizer_state: {master: bf16, exp_avg: e4m3, exp_avg_sq: fp16}
phases:
  - {name: tail, step: 4, optimizer_state: {master: fp32}}
"""
SHORT = ("train.eval_every=0", "train.eval_samples=0", "logging.tensorboard=false")
EXPERTS = ("model.moe={num_experts: 4, top_k: 2, ffn_hidden_size: 64}", "model.num_layers=1")
TIED = ("model.tie_embeddings=true",)
ZERO0 = ("engine.kind=deepspeed", "engine.zero_stage=0")
BF16 = ("train.dtype=bf16",)
SGD = ("optim.kind=sgd", "optim.lr=0.3")

Case = tuple[str, ...]


def recipe(folder: str, name: str) -> Case:
    return (f"recipe={Path(folder) / name}.yaml", *SHORT)


def trained(folder: str, cases: dict[str, Case]) -> dict[str, Any]:
    """Name -> (losses, what the recipe keeps, curve, checkpoint) of a run for each case, one after the other.

    NAME:cut is the first half of case NAME, NAME:on goes on in its folder, NAME:moved from its checkpoint elsewhere.
    """
    results: dict[str, Any] = {}
    for name, overrides in cases.items():
        base, _, part = name.partition(":")
        where = base if part in ("cut", "on") else name.replace(":", "_")
        more = {"cut": ("train.stop_after=3",), "moved": (f"checkpoint.load={results.get(f'{base}:cut', [''])[-1]}",)}
        config = tiny_run(Path(folder), *overrides, *more.get(part, ()), name=where if part else f"{where}_whole")
        saved = run_without_picture(config).checkpoint
        dist.barrier()
        assert saved is not None
        kept = saved / CONTROLLERS
        state = torch.load(kept, weights_only=True)["optimizer"] if kept.exists() else None
        results[name] = losses(config), state, curve(config), str(saved)
    return results


def halves(cases: dict[str, Case]) -> dict[str, Case]:
    """Each case whole, and in two parts."""
    return {f"{name}{part}": case for name, case in cases.items() for part in ("", ":cut", ":on")}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All runs of this file on one and two ranks: the engines are imported once."""
    path = write_counting_tokens(tmp_path_factory.mktemp("optimizer"))
    (path / "spam.yaml").write_text(SPAM, encoding="utf-8")
    (path / "rounded.yaml").write_text(ROUNDED, encoding="utf-8")
    folder = str(path)
    spam, rounded, sgd = recipe(folder, "spam"), recipe(folder, "rounded"), (*SHORT, *SGD)
    tp = ("parallel.tp=2", "parallel.sequence_parallel=true")
    one = {
        "plain": SHORT,
        "megatron": spam,
        "zero0": (*spam, *ZERO0),
        "rounded": rounded,
        "rounded_zero0": (*rounded, *ZERO0),
        "tied": (*spam, *TIED),
        "experts": (*spam, *EXPERTS),
    } | halves(
        {
            "megatron_bf16": (*spam, *BF16),
            "zero0_bf16": (*spam, *ZERO0, *BF16),
            "rounded_bf16": (*rounded, *BF16),
            "adafactor": (*SHORT, *ZERO0, *BF16, "optim.kind=adafactor"),
        }
    )
    two = {
        "tp2": (*spam, *tp),
        "zero0_tp2": (*spam, *ZERO0, *tp),
        "tied_pp2": (*spam, *TIED, "parallel.pp=2"),
        "experts_ep2": (*spam, *EXPERTS, "parallel.ep=2"),
        "experts_tp2": (*spam, *EXPERTS, *tp),
        "experts_zero0_dp2": (*spam, *EXPERTS, *ZERO0),
        "zero0_dp2": (*spam, *ZERO0),
        "rounded_dp2": rounded,
        "dp2": spam,
        "dp2:cut": spam,
        "dp2:on": spam,
        "dp2:moved": (*spam, *tp),
        "sgd_zero0": (*sgd, *ZERO0),
        "sgd_zero1": (*sgd, "engine.kind=deepspeed"),
    } | halves({"sgd": sgd})
    found = run_ranks(trained, 1, folder, one, timeout=400)[0]
    return found | run_ranks(trained, 2, folder, two, timeout=400)[0]


def assert_same_averages(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """AdaClip's and AdaNorm's state, by logical tensor."""
    for part in ("ada_clip", "ada_norm"):
        assert found[part]["names"] == expected[part]["names"]
        for key in set(found[part]) - {"names"}:
            torch.testing.assert_close(found[part][key], expected[part][key], rtol=2e-4, atol=1e-9)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("zero0", "megatron"),
        ("dp2", "megatron"),
        ("tp2", "megatron"),
        ("zero0_dp2", "megatron"),
        ("zero0_tp2", "megatron"),
        ("dp2:moved", "megatron"),
        ("tied_pp2", "tied"),
        ("experts_ep2", "experts"),
        ("experts_tp2", "experts"),
        ("experts_zero0_dp2", "experts"),
    ],
)
def test_engines_and_layouts_transform_alike(results: dict[str, Any], name: str, reference: str) -> None:
    """Losses, and the averages that the transforms keep of each logical tensor; experts route in parts under tp."""
    expected, state = results[reference][:2]
    assert results[name][0] == pytest.approx(expected[-len(results[name][0]) :], rel=3e-6)
    assert_same_averages(results[name][1], state)
    assert results["megatron"][0] != pytest.approx(results["plain"][0], rel=1e-3), "the transforms must show"


@pytest.mark.distributed
def test_state_is_rounded_alike(results: dict[str, Any]) -> None:
    assert results["rounded"][0] != pytest.approx(results["plain"][0], rel=1e-3)
    for name in ("rounded_zero0", "rounded_dp2"):
        assert results[name][0] == pytest.approx(results["rounded"][0], rel=1e-4), name


@pytest.mark.distributed
def test_engines_transform_alike_in_bf16(results: dict[str, Any]) -> None:
    assert results["zero0_bf16"][0] == pytest.approx(results["megatron_bf16"][0], rel=5e-3)
    assert results["zero0_bf16"][1]["ada_clip"]["names"] == results["megatron"][1]["ada_clip"]["names"]


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["megatron_bf16", "zero0_bf16", "rounded_bf16", "adafactor", "dp2", "sgd"])
def test_runs_continue_bit_for_bit(results: dict[str, Any], name: str) -> None:
    assert results[f"{name}:on"][2] == results[name][2]
    assert repr(results[f"{name}:on"][1]) == repr(results[name][1])
    assert len(results[f"{name}:cut"][2]) < len(results[name][2])


@pytest.mark.distributed
def test_sgd_is_the_same_in_all_engines(results: dict[str, Any]) -> None:
    assert results["sgd"][0] != pytest.approx(results["plain"][0], rel=1e-3)
    for name in ("sgd_zero0", "sgd_zero1"):
        assert results[name][0] == pytest.approx(results["sgd"][0], rel=3e-6), name


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("sgd", lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.8, weight_decay=0.2)),
        ("adafactor", lambda groups: torch.optim.Adafactor(groups, lr=0.1, weight_decay=0.2)),
    ],
)
def test_optimizers_are_torchs(tmp_path: Path, kind: str, make: Any) -> None:
    """Bit for bit over a few steps, with the groups' decay, also after a held step."""
    engine = ZERO0 if kind == "adafactor" else ()
    settings = ("optim.lr=0.1", "optim.momentum=0.8", "optim.weight_decay=0.2")
    config = tiny_run(tmp_path, f"optim.kind={kind}", *settings, *engine)
    torch.manual_seed(0)
    ours, theirs = (nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    optimizer: Any = optim.make_optimizer(ours, config, torch.device("cpu"))
    groups = optim.parameter_groups(theirs.named_parameters(), config)
    for group in groups:
        group["weight_decay"] = 0.2
    expected = make(groups)
    for step in range(5):
        x = torch.randn(7, 6)
        for net, o in ((ours, optimizer), (theirs, expected)):
            o.zero_grad()
            net(x).square().sum().backward()
            if net is ours and step == 2:
                o.held = True
                o.step()
                o.held = False
            o.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_the_log_names_the_optimizer(tmp_path: Path) -> None:
    for kind, name in (("sgd", "torch SGD"), ("adafactor", "torch Adafactor"), ("adamw", "torch AdamW (fused)")):
        engine = ZERO0 if kind == "adafactor" else ()
        config = tiny_run(tmp_path, f"optim.kind={kind}", *engine)
        assert optim.describe(optim.make_optimizer(nn.Linear(2, 2), config, torch.device("cpu"))) == name


def test_memory_of_optimizers(tmp_path: Path) -> None:
    """Bytes a weight: AdamW 8, SGD 4 on every rank, Adafactor none to speak of."""
    found = {}
    for kind in ("adamw", "sgd"):
        needed = estimate(tiny_run(tmp_path, f"optim.kind={kind}"), 2, element=4)
        found[kind] = needed.optimizer / needed.parameters
    needed = estimate(tiny_run(tmp_path, "optim.kind=adafactor", *ZERO0), 2, element=4)
    assert found | {"adafactor": needed.optimizer} == {"adamw": 4, "sgd": 4, "adafactor": 0}


def test_memory_of_averages_and_windows(tmp_path: Path) -> None:
    """Averages: 4 bytes a quantized weight on every rank. A window over all of them: 16 bytes on one of two ranks."""
    blocks = 2 * (128 * 64 + 64 * 64 + 256 * 64 + 64 * 128)
    for name, size in (("tetrajet_qema", 4 * blocks), ("tetrajet_qramping", 8 * blocks)):
        config = tiny_run(tmp_path, f"recipe={name}", "optim.clip_grad=0")
        needed = estimate(config, 2, element=4)
        assert needed.controls == size
        assert "controls" in needed.table()
    assert "controls" not in estimate(tiny_run(tmp_path), 2, element=4).table()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("optim.kind=adafactor",), "zero_stage 0"),
        (("optim.kind=sgd", "engine.fp4_param_gather=true"), "fp4_param_gather"),
    ],
)
def test_what_an_optimizer_cannot_do_is_refused(tmp_path: Path, overrides: Case, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny_run(tmp_path, *overrides)


def test_zero_partitions_refuse_gradient_transforms(tmp_path: Path) -> None:
    (tmp_path / "spam.yaml").write_text(SPAM, encoding="utf-8")
    with pytest.raises(ConfigError, match="ada_clip"):
        tiny_run(tmp_path, *recipe(str(tmp_path), "spam"), "engine.kind=deepspeed", "engine.zero_stage=1")
    with pytest.raises(ConfigError, match="ema"):
        tiny_run(tmp_path, "recipe=tetrajet_qema", "engine.kind=deepspeed", "engine.zero_stage=1")
