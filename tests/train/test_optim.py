"""AdamW's groups, its learning rates, and a step that is held."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fp4dist.train import optim
from tests.train.tiny_run import tiny_run


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))


def rates(tmp_path: Path, *overrides: str, steps: int = 20) -> list[float]:
    config = tiny_run(tmp_path, f"train.steps={steps}", "optim.lr=1.0", *overrides)
    optimizer = optim.make_adamw(model(), config, torch.device("cpu"))
    schedule = optim.make_schedule(optimizer, config)
    return [optim.place_schedule(schedule, step) for step in range(1, steps + 1)]


def test_matrices_decay_and_vectors_do_not(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, "optim.weight_decay=0.3")
    optimizer: Any = optim.make_adamw(model(), config, torch.device("cpu"))
    optim.place_schedule(optim.make_schedule(optimizer, config), 1)
    shapes = [[tuple(p.shape) for p in g["params"]] for g in optimizer.param_groups]
    assert shapes == [[(3, 4)], [(3,), (3,), (3,)]]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.0]
    assert optim.describe(optimizer) == "torch AdamW (fused)"


def test_cosine(tmp_path: Path) -> None:
    found = rates(tmp_path, "optim.schedule=cosine", "optim.warmup_steps=4", "optim.min_lr=0.1")
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    middle = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 8 / 16))
    assert found[11] == pytest.approx(middle)
    assert found[-1] == pytest.approx(0.1)


def test_warmup_stable_decay(tmp_path: Path) -> None:
    found = rates(tmp_path, "optim.schedule=wsd", "optim.warmup_steps=2", "optim.decay_fraction=0.25")
    assert found[:2] == [0.5, 1.0]
    assert found[2:15] == [1.0] * 13
    assert found[15:] == pytest.approx([1 - math.sqrt(k / 5) for k in range(1, 6)])


def test_constant(tmp_path: Path) -> None:
    assert rates(tmp_path, "optim.schedule=constant", "optim.warmup_steps=0") == [1.0] * 20


def test_the_rate_depends_on_the_step_alone(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, "train.steps=20")
    schedule = optim.make_schedule(optim.make_adamw(model(), config, torch.device("cpu")), config)
    forward = [optim.place_schedule(schedule, step) for step in range(1, 21)]
    backward = [optim.place_schedule(schedule, step) for step in range(20, 0, -1)]
    assert forward == backward[::-1]


def test_a_held_step_changes_nothing_but_makes_the_state(tmp_path: Path) -> None:
    net = model()
    optimizer: Any = optim.make_adamw(net, tiny_run(tmp_path), torch.device("cpu"))
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.held = True
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert all(float(s["step"]) == 0 and not s["exp_avg"].any() for s in optimizer.state.values())
    optimizer.held = False
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert {float(s["step"]) for s in optimizer.state.values()} == {1.0}


def test_materialized_state_is_what_the_first_step_makes(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    first, second = model(), model()
    lazy, eager = (optim.make_adamw(m, config, torch.device("cpu")) for m in (first, second))
    optim.materialize_state(eager)
    for net, optimizer in ((first, lazy), (second, eager)):
        for p in net.parameters():
            p.grad = torch.full_like(p, 0.5)
        optimizer.step()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_settings_of_the_config_win_over_those_of_a_checkpoint(tmp_path: Path) -> None:
    optimizer = optim.make_adamw(model(), tiny_run(tmp_path), torch.device("cpu"))
    own = optim.own_settings(optimizer.param_groups)
    for group in optimizer.param_groups:
        group.update(lr=9.0, max_lr=9.0, betas=(0.1, 0.2), fused=None)
    optim.restore_settings(optimizer.param_groups, own)
    assert all(g["lr"] == 8e-3 == g["max_lr"] and g["betas"] == (0.9, 0.95) for g in optimizer.param_groups)
