"""Masters and moments in few bits: what is kept is the rounding of what the update made, scaled by powers of two."""

from __future__ import annotations

import copy
import math
from fractions import Fraction
from typing import Any, cast

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fp4dist.nn.apply import apply_recipe
from fp4dist.nn.optimizer import attach_optimizer
from fp4dist.nn.optimizer_state import make_parts, round_scaled, scale_exponent
from fp4dist.nn.shards import LocalWeight, Shard, ShardMap
from fp4dist.spec.recipe import Phase, Recipe
from fp4dist.spec.training import OptimizerState

TYPES = {torch.float16: np.float16, torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn}


def kept(value: np.ndarray, name: str) -> np.ndarray:
    """What a tensor in fp32 becomes: straightforward numpy code of the definition."""
    if name == "fp32":
        return value
    if name == "bf16":
        return value.astype(ml_dtypes.bfloat16).astype(np.float32)
    dtype: Any = {"fp16": np.float16, "e4m3": ml_dtypes.float8_e4m3fn}[name]
    largest = {"fp16": 65504, "e4m3": 448}[name]
    peak = Fraction(float(np.abs(value).max()))
    exponent = 0
    if peak:
        while peak * Fraction(2) ** (exponent + 1) <= largest:
            exponent += 1
        while peak * Fraction(2) ** exponent > largest:
            exponent -= 1
    scaled = np.ldexp(value.astype(np.float64), exponent).astype(np.float32)
    return np.ldexp(scaled.astype(dtype).astype(np.float64), -exponent).astype(np.float32)


class Model:
    """A tiny regression under AdamW."""

    def __init__(self, recipe: Recipe | None, total: int = 10) -> None:
        torch.manual_seed(0)
        self.net, self.total = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)), total
        self.x, self.y = torch.randn(32, 8), torch.randn(32, 4)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.01)
        self.applied = apply_recipe(self.net, recipe) if recipe is not None else None
        self.control = attach_optimizer(self.applied, self.optimizer, total) if self.applied is not None else None

    def step(self, step: int) -> float:
        if self.applied is not None:
            self.applied.set_step(step, self.total)
        self.optimizer.zero_grad()
        loss = (self.net(self.x) - self.y).square().mean()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def tensors(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        return [
            (
                p.detach().clone(),
                self.optimizer.state[p]["exp_avg"].clone(),
                self.optimizer.state[p]["exp_avg_sq"].clone(),
            )
            for p in self.net.parameters()
        ]


STATES = (
    OptimizerState(master="bf16"),
    OptimizerState(exp_avg="bf16", exp_avg_sq="fp16"),
    OptimizerState(master="bf16", exp_avg="e4m3", exp_avg_sq="e4m3"),
)


@pytest.mark.parametrize("state", STATES)
def test_what_is_kept_is_the_rounded_update(state: OptimizerState) -> None:
    """Each step from the same rounded state: an unrounded step, then numpy's rounding of it."""
    ours = Model(Recipe(name="test", optimizer_state=state))
    for step in range(4):
        plain = Model(None)
        if step:
            plain.net.load_state_dict(ours.net.state_dict())
            plain.optimizer.load_state_dict(copy.deepcopy(ours.optimizer.state_dict()))
        ours.step(step)
        plain.step(step)
        for found, exact in zip(ours.tensors(), plain.tensors(), strict=True):
            for a, b, name in zip(found, exact, (state.master, state.exp_avg, state.exp_avg_sq), strict=True):
                assert a.dtype == torch.float32
                np.testing.assert_array_equal(a.numpy(), kept(b.numpy(), name))
                if name != "fp32":
                    assert not torch.equal(a, b), "the rounding must show"


def test_full_precision_asks_for_no_part() -> None:
    model = Model(Recipe(name="test", optimizer_state=OptimizerState()))
    assert model.control is not None
    assert not model.control.parts


def test_a_phase_changes_the_precision() -> None:
    """bf16 masters, then fp32 ones for the last steps: from there on weights are not on bf16's grid."""
    recipe = Recipe(
        name="test",
        optimizer_state=OptimizerState(master="bf16"),
        phases=(Phase(name="tail", optimizer_state=OptimizerState(), step=3),),
    )
    model, on_grid = Model(recipe), []
    for step in range(6):
        model.step(step)
        on_grid.append(all(torch.equal(p, p.bfloat16().float()) for p in model.net.parameters()))
    assert on_grid == [True] * 3 + [False] * 3


@pytest.mark.parametrize("to", list(TYPES))
@pytest.mark.parametrize("power", [-100, -12, 0, 9, 100])
def test_scales_at_the_edge_of_the_range(to: torch.dtype, power: int) -> None:
    """The format's largest value times any power of two is kept exactly; the next fp32 value takes half the scale."""
    largest = torch.finfo(to).max
    edge = torch.tensor([math.ldexp(largest, power)], dtype=torch.float32)
    above = torch.nextafter(edge, torch.tensor(math.inf))
    assert scale_exponent(edge.double(), to).tolist() == [-power]
    assert scale_exponent(above.double(), to).tolist() == [-power - 1]
    for value in (edge, above):
        rounded = round_scaled(value, scale_exponent(value.double(), to)[0], to)
        assert rounded.item() == pytest.approx(value.item(), rel=2**-4)
    assert torch.equal(round_scaled(edge, scale_exponent(edge.double(), to)[0], to), edge)


def test_zeros_and_tiny_values_stay_finite() -> None:
    peaks = torch.tensor([0.0, 1e-45, 3e38], dtype=torch.float64)
    for to in TYPES:
        for peak, exponent in zip(peaks, scale_exponent(peaks, to), strict=True):
            assert round_scaled(peak.float(), exponent, to).isfinite()
    assert scale_exponent(peaks, torch.float16)[0] == 0


def test_pieces_of_one_tensor_share_its_scale() -> None:
    """Two pieces in one process: the smaller one is rounded under the scale of the larger one's peak."""
    torch.manual_seed(1)
    model = nn.Linear(8, 4, bias=False)
    weight = cast(nn.Parameter, model.weight)
    applied = apply_recipe(model, Recipe(name="test", optimizer_state=OptimizerState(exp_avg="e4m3")))
    whole = torch.randn(32) * torch.logspace(0, -4, 32)
    pieces = {piece.clone(): cut for piece, cut in zip(whole.split([4, 28]), ((0, 4), (4, 32)), strict=True)}
    shards = {piece: Shard("weight", weight, *cut) for piece, cut in pieces.items()}
    optimizer = torch.optim.AdamW(list(shards), lr=0.1)
    for piece in shards:
        optimizer.state[piece]["exp_avg"] = piece.clone()
    shard_map = ShardMap(applied, [optimizer], shards, {"weight": LocalWeight(weight)}, 10, collective=False)
    applied.set_step(0, 10)
    (part,) = make_parts(shard_map)
    part.after_update(0)
    found = torch.cat([optimizer.state[piece]["exp_avg"] for piece in shards]).numpy()
    np.testing.assert_array_equal(found, kept(whole.numpy(), "e4m3"))
    assert not np.array_equal(found[4:], kept(whole[4:].numpy(), "e4m3")), "a scale of its own would differ"
