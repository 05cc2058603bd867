"""SPAM's and Stable-SPAM's gradient transforms against numpy code of their definitions, and published step values."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from fp4dist.errors import RecipeMismatch
from fp4dist.nn.apply import AppliedRecipe, apply_recipe
from fp4dist.nn.gradients import AdaClipPart, AdaNormPart, MomentResetPart, SpikeClipPart, make_parts
from fp4dist.nn.optimizer import OptimizerControl, attach_optimizer
from fp4dist.nn.shards import LocalWeight, Shard, ShardMap
from fp4dist.spec.recipe import Recipe
from fp4dist.spec.training import AdaClip, AdaNorm, GradientTransform, MomentReset, SpikeClip
from tests.distributed import run_ranks

SHAPES = ((4, 6), (5,), (3, 8))
BETAS, EPS, LR = (0.9, 0.99), 1e-8, 0.01


class Weights(nn.Module):
    """Parameters without a forward."""

    def __init__(self, shapes: Sequence[tuple[int, ...]] = SHAPES) -> None:
        super().__init__()
        self.values = nn.ParameterList(nn.Parameter(torch.ones(shape)) for shape in shapes)


class Steps:
    """A model whose gradients are given, under AdamW and a recipe's transforms."""

    def __init__(self, *transforms: GradientTransform, total: int = 1000, shapes: Any = SHAPES, lr: float = LR) -> None:
        self.model, self.total, self.done = Weights(shapes), total, 0
        self.applied = apply_recipe(self.model, Recipe(name="test", gradients=transforms))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, betas=BETAS, eps=EPS, weight_decay=0.0)
        self.control = attach_optimizer(self.applied, self.optimizer, total)

    def step(self, gradients: Sequence[Any]) -> list[Tensor]:
        """Take one step; the gradients that AdamW got."""
        self.applied.set_step(self.done, self.total)
        for p, g in zip(self.model.values, gradients, strict=True):
            p.grad = torch.as_tensor(g, dtype=torch.float32).clone()
        self.optimizer.step()
        self.done += 1
        return [p.grad.clone() for p in self.model.values if p.grad is not None]

    def weights(self) -> list[np.ndarray]:
        return [p.detach().double().numpy() for p in self.model.values]


def random_gradients(steps: int, seed: int = 0) -> list[list[np.ndarray]]:
    """Normal ones, with one element in a step now and then a thousand times larger, and one tensor of zeros."""
    rng = np.random.default_rng(seed)
    found = []
    for step in range(steps):
        gradients = [rng.standard_normal(shape).astype(np.float32) for shape in SHAPES]
        if step % 5 == 3:
            gradients[step % 3].reshape(-1)[step % 4] *= 1000
        if step == 6:
            gradients[1][:] = 0
        found.append(gradients)
    return found


class NumpyAdam:
    """Adam of one tensor in fp64, as torch defines it."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.w, self.m, self.v, self.t = np.ones(shape), np.zeros(shape), np.zeros(shape), 0

    def update(self, g: np.ndarray, lr: float, beta1: float) -> None:
        self.t += 1
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = BETAS[1] * self.v + (1 - BETAS[1]) * g * g
        root = np.sqrt(self.v / (1 - BETAS[1] ** self.t)) + EPS
        self.w = self.w - lr * self.m / (1 - beta1**self.t) / root


def stable_spam(
    gradients: list[list[np.ndarray]], total: int, every: int, decay_to: float, since_reset: bool
) -> list[np.ndarray]:
    """The weights after Stable-SPAM (gamma .7, .9, .999), written after galore_torch/stablespam.py of its authors; the
    averages of norms count their steps from the start.
    """
    weights = []
    for i, shape in enumerate(SHAPES):
        adam, peak, mean, square, clip_t = NumpyAdam(shape), 0.0, 0.0, 0.0, 0
        for step, of_step in enumerate(gradients, start=1):
            g = of_step[i].astype(np.float64)
            scale = decay_to + (1 - decay_to) * (1 + math.cos(math.pi * step / (total + 1))) / 2
            clip_t += 1
            largest = float(np.abs(g).max())
            peak = 0.999 * peak + 0.001 * largest
            limit = peak / (1 - 0.999**clip_t)
            above = np.abs(g) > limit * (1 + 1e-7)
            g[above] = g[above] / largest * limit
            norm = float(np.linalg.norm(g))
            gamma1 = 0.7 * scale
            mean = gamma1 * mean + (1 - gamma1) * norm
            square = 0.9 * square + 0.1 * norm**2
            if norm > 0:
                g = g / norm * (mean / (1 - gamma1**step)) / (math.sqrt(square / (1 - 0.9**step)) + 1e-8)
            if step % every == 0:
                adam.m[:], adam.v[:], adam.t = 0, 0, 0
                clip_t = 1 if since_reset else clip_t
            adam.update(g, LR, BETAS[0] * scale)
        weights.append(adam.w)
    return weights


@pytest.mark.parametrize("since_reset", [False, True])
@pytest.mark.parametrize("decay_to", [1.0, 0.5])
def test_stable_spam_equals_numpy(since_reset: bool, decay_to: float) -> None:
    bias: Any = "since_reset" if since_reset else "global"
    steps = Steps(AdaClip(bias_step=bias), AdaNorm(decay_to=decay_to), MomentReset(every=7), total=40)
    gradients = random_gradients(40)
    for of_step in gradients:
        steps.step(of_step)
    expected = stable_spam(gradients, 40, 7, decay_to, since_reset)
    for found, wanted in zip(steps.weights(), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-6)
    assert all(group["betas"] == BETAS and group["lr"] == LR for group in steps.optimizer.param_groups)
    other = stable_spam(gradients, 40, 7, decay_to, not since_reset)
    assert max(np.abs(a - b).max() for a, b in zip(expected, other, strict=True)) > 1e-3  # the two do differ


def spam(gradients: list[list[np.ndarray]], threshold: float, wait: int, every: int, warmup: int) -> list[np.ndarray]:
    """The weights after SPAM, written after galore_torch/SPAM.py of its authors: the reset comes before the clip."""
    weights = []
    for i, shape in enumerate(SHAPES):
        adam, last = NumpyAdam(shape), 0
        for step, of_step in enumerate(gradients):
            g = of_step[i].astype(np.float64)
            if (step + 1) % every == 0:
                adam.m[:], adam.v[:], last = 0, 0, step
            if step - last >= wait and threshold < math.inf:
                spike = (g**2 > threshold * adam.v) & (adam.v > 0)
                g[spike] = np.sign(g[spike]) * np.sqrt(threshold * adam.v[spike])
            lr = LR
            if last and step - last < warmup:
                lr *= 1 - 0.99 * (1 + math.cos(math.pi * (step - last) / (warmup + 1))) / 2
            adam.update(g, lr, BETAS[0])
        weights.append(adam.w)
    return weights


def test_spam_equals_numpy() -> None:
    steps = Steps(MomentReset(every=12, warmup=6, restart=False), SpikeClip(threshold=20.0, wait=4))
    gradients = random_gradients(40)
    for of_step in gradients:
        steps.step(of_step)
    expected = spam(gradients, threshold=20.0, wait=4, every=12, warmup=6)
    for found, wanted in zip(steps.weights(), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-6)
    unclipped = spam(gradients, threshold=math.inf, wait=4, every=12, warmup=6)
    assert max(np.abs(a - b).max() for a, b in zip(expected, unclipped, strict=True)) > 1e-3


def test_spike_clip_values() -> None:
    """|g| = sqrt(threshold v) where g^2 is above threshold v, no clip in the first `wait` steps."""
    steps = Steps(SpikeClip(threshold=5000.0, wait=2), shapes=[(2,)])
    first = steps.step([[1.0, 1.0]])[0]
    second = steps.step([[-1e6, 1.0]])[0]
    assert first.tolist() == [1.0, 1.0]
    assert second.tolist() == [-1e6, 1.0]
    v = steps.optimizer.state[steps.model.values[0]]["exp_avg_sq"].clone()
    limits = [math.sqrt(5000 * float(x)) for x in v]
    third = steps.step([[-1e9, limits[1] * 0.99]])[0]
    assert third.tolist() == pytest.approx([-limits[0], limits[1] * 0.99], rel=1e-6)


def test_warm_up_after_a_reset() -> None:
    """At the reset the rate is a hundredth; after `warmup` steps it is whole; and it is put back after every step."""
    seen: list[float] = []
    steps = Steps(MomentReset(every=10, warmup=4), shapes=[(2,)])
    steps.optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))  # after ours
    for _ in range(16):
        steps.step([[1.0, 1.0]])
        assert steps.optimizer.param_groups[0]["lr"] == LR
    share = [1 - 0.99 * (1 + math.cos(math.pi * k / 5)) / 2 for k in range(4)]
    assert [lr / LR for lr in seen] == pytest.approx([1.0] * 9 + share + [1.0] * 3)
    assert share[0] == pytest.approx(0.01)


# -- the step values of shared/spec/methods.md 7


def norms_of(steps: Steps, norms: Sequence[float]) -> list[float]:
    """The norm that AdaNorm gives to gradients of these norms."""
    return [float(steps.step([np.array([0.6, 0.8]) * norm])[0].norm()) for norm in norms]


def test_constant_norms_become_one() -> None:
    assert norms_of(Steps(AdaNorm(), shapes=[(2,)]), [3.7] * 5) == pytest.approx([1.0] * 5, abs=1e-6)


def test_a_spike_gets_the_published_norm() -> None:
    """(1 - .7) / sqrt(1 - .9) = 0.9487 whatever its size; then the norms of normal steps sink and come back."""
    steps = Steps(AdaNorm(), shapes=[(2,)])
    found = norms_of(steps, [1.0] * 200 + [1e6] + [1.0] * 120)
    assert found[200] == pytest.approx(0.9487, abs=5e-5)
    steps = Steps(AdaNorm(), shapes=[(2,)])
    found = norms_of(steps, [1.0] * 200 + [1e3] + [1.0] * 150)
    assert found[200] == pytest.approx(300.7 / math.sqrt(100000.9), abs=1e-5)  # 0.9509: what came before counts too
    assert [round(n, 2) for n in found[201:204]] == [0.70, 0.52, 0.38]
    assert min(found[201:]) == pytest.approx(0.011, abs=5e-4)
    assert found[-1] == pytest.approx(1.0, abs=0.05)


def threshold_after(part: Any, gradient: float) -> float:
    """AdaClip's M, and M with its bias correction, of the only tensor."""
    return float(part.average / (1 - part.spec.decay**part.steps))


def test_ada_clip_threshold() -> None:
    """After 1000 steps with max |g| = 1 and one with 1000: M = 1.632, bias-corrected 2.579."""
    steps = Steps(AdaClip(), shapes=[(2,)], total=1001)
    (part,) = steps.control.parts
    assert isinstance(part, AdaClipPart)
    for _ in range(1000):
        assert steps.step([[1.0, 0.5]])[0].tolist() == [1.0, 0.5]
    clipped = steps.step([[1000.0, 0.5]])[0]
    assert float(part.average) == pytest.approx(1.632, abs=5e-4)
    assert clipped[0].item() == pytest.approx(2.579, abs=5e-4)
    assert clipped[1].item() == 0.5


def test_ada_clip_scales_in_proportion() -> None:
    """Entries above M are scaled by M / max, not cut at M; signs stay."""
    steps = Steps(AdaClip(decay=0.5), shapes=[(4,)])
    steps.step([[1.0, 1.0, 1.0, 1.0]])
    # M = (.5 * .5 + .5 * 8) / (1 - .25) = 17/3
    found = steps.step([[8.0, -6.0, 5.0, -1.0]])[0]
    assert found.tolist() == pytest.approx([17 / 3, -6 * 17 / 24, 5.0, -1.0])


@pytest.mark.parametrize(("age", "factor"), [(2, 500), (250, 4.5), (500, 2.5)])
def test_threshold_since_reset_is_inflated(age: int, factor: float) -> None:
    """As released: after a reset the bias correction counts from 1, so the next step's threshold is 500 times M."""
    steps = Steps(AdaClip(bias_step="since_reset"), MomentReset(every=5), shapes=[(1,)])
    part = steps.control.parts[0]
    assert isinstance(part, AdaClipPart)
    names = list(steps.control.shards.names)
    part.load_state_dict({"names": names, "average": torch.ones(1).double(), "steps": torch.full((1,), 1e5).double()})
    for _ in range(5):
        steps.step([[1.0]])  # the fifth resets
    assert part.steps.tolist() == [1.0]
    part.steps[:] = age - 1
    steps.step([[1.0]])
    assert threshold_after(part, 1.0) == pytest.approx(factor, rel=0.03)


@pytest.mark.parametrize("factor", [2.0**20, 3e-5])
def test_scaling_all_gradients_changes_no_update(factor: float) -> None:
    transforms = (AdaClip(), AdaNorm(eps=1e-30), MomentReset(every=9))
    plain, scaled = Steps(*transforms), Steps(*transforms)
    for of_step in random_gradients(25):
        plain.step(of_step)
        scaled.step([g * np.float32(factor) for g in of_step])
    for a, b in zip(plain.weights(), scaled.weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


# -- resets


def test_a_reset_that_was_due_in_a_skipped_step_comes_later() -> None:
    steps = Steps(MomentReset(every=5), shapes=[(2,)])
    for _ in range(4):
        steps.step([[1.0, 1.0]])
    assert float(steps.optimizer.state[steps.model.values[0]]["step"]) == 4
    steps.done += 1  # step 5, where the reset was due, was not finite
    steps.step([[1.0, 1.0]])
    assert float(steps.optimizer.state[steps.model.values[0]]["step"]) == 1


@pytest.mark.parametrize(("restart", "count"), [(True, 1.0), (False, 5.0)])
def test_a_reset_empties_the_moments(restart: bool, count: float) -> None:
    steps = Steps(MomentReset(every=5, restart=restart), shapes=[(2,)])
    for gradient in (3.0, 3.0, 3.0, 3.0, 1.0):
        steps.step([[gradient, 1.0]])
    state = steps.optimizer.state[steps.model.values[0]]
    assert float(state["exp_avg"][0]) == pytest.approx(1 - BETAS[0])
    assert float(state["exp_avg_sq"][0]) == pytest.approx(1 - BETAS[1])
    assert float(state["step"]) == count


def test_a_reset_restarts_a_step_count_kept_in_the_group() -> None:
    """Where apex and Transformer Engine keep it."""
    steps = Steps(MomentReset(every=1), shapes=[(2,)])
    steps.optimizer.param_groups[0]["step"] = 7
    steps.step([[1.0, 1.0]])
    assert steps.optimizer.param_groups[0]["step"] == 0


# -- order, state, refusals


def test_parts_follow_the_recipe() -> None:
    steps = Steps(MomentReset(every=3), SpikeClip(), AdaNorm(), AdaClip())
    assert [type(p) for p in make_parts(steps.control.shards)] == [
        MomentResetPart,
        SpikeClipPart,
        AdaNormPart,
        AdaClipPart,
    ]


def test_state_continues_bit_for_bit() -> None:
    transforms = (
        MomentReset(every=6, warmup=2),
        SpikeClip(threshold=20.0, wait=2),
        AdaClip(bias_step="since_reset"),
        AdaNorm(),
    )
    gradients = random_gradients(20)
    whole = Steps(*transforms)
    for of_step in gradients:
        whole.step(of_step)
    first, second = Steps(*transforms), Steps(*transforms)
    for of_step in gradients[:8]:
        first.step(of_step)
    state = first.applied.state_dict()
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.applied.load_state_dict(state)
    second.done = 8
    for of_step in gradients[8:]:
        second.step(of_step)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.values, second.model.values, strict=True))
    assert repr(whole.applied.state_dict()) == repr(second.applied.state_dict())


def test_a_gradient_that_is_not_there_or_not_finite_changes_no_average() -> None:
    steps = Steps(AdaClip(), AdaNorm(), shapes=[(2,), (2,)])
    steps.step([[1.0, 2.0], [1.0, 1.0]])
    before = steps.control.state_dict()
    steps.applied.set_step(1, 100)
    steps.model.values[0].grad = None
    steps.model.values[1].grad = torch.tensor([math.inf, 1.0])
    steps.optimizer.step()
    assert repr(steps.control.state_dict()) == repr(before)


def test_a_recipe_that_steers_needs_an_optimizer() -> None:
    applied = apply_recipe(Weights(), Recipe(name="test", gradients=(AdaClip(),)))
    applied.set_step(0, 10)
    with pytest.raises(RecipeMismatch, match="attach_optimizer"):
        applied.set_step(1, 10)


def test_parameters_of_another_model_are_refused() -> None:
    applied = apply_recipe(Weights(), Recipe(name="test", gradients=(AdaClip(),)))
    with pytest.raises(RecipeMismatch, match="not one of the model"):
        attach_optimizer(applied, torch.optim.SGD(Weights().parameters(), lr=1.0), 10)


def test_a_step_that_makes_its_own_gradients_is_refused() -> None:
    steps = Steps(AdaClip())
    with pytest.raises(RecipeMismatch, match="closure"):
        steps.optimizer.step(lambda: 0.0)
    setattr(steps.optimizer, "grad_scale", torch.ones(()))  # noqa: B010 - as GradScaler does
    with pytest.raises(RecipeMismatch, match="unscale_"):
        steps.optimizer.step()
    setattr(steps.optimizer, "grad_scale", None)  # noqa: B010
    steps.step(random_gradients(1)[0])


def attach_to_shards() -> str:
    model = Weights()
    applied = apply_recipe(model, Recipe(name="test", gradients=(AdaClip(),)))
    fully_shard(model)
    with pytest.raises(RecipeMismatch) as error:
        attach_optimizer(applied, torch.optim.SGD(model.parameters(), lr=1.0), 10)
    return str(error.value)


@pytest.mark.distributed
def test_sharded_parameters_are_refused() -> None:
    assert "is sharded" in run_ranks(attach_to_shards, 1)[0]


# -- logical tensors over ranks


class Split:
    """`Steps` over two ranks: weight 0 cut in two, weight 1 on both as a copy, weight 2 on the second rank alone."""

    def __init__(self, *transforms: GradientTransform) -> None:
        rank, self.model = dist.get_rank(), Weights()
        self.applied: AppliedRecipe = apply_recipe(self.model, Recipe(name="test", gradients=transforms))
        whole = list(self.model.values)
        cut = [(0, 10), (10, 24)][rank]
        self.cuts = [(0, *cut, True), (1, 0, 5, rank == 0), *([(2, 0, 24, True)] if rank == 1 else [])]
        shards = {
            torch.ones(stop - start): Shard(f"values.{i}", whole[i], start, stop, counted)
            for i, start, stop, counted in self.cuts
        }
        self.tensors = list(shards)
        group = dist.group.WORLD
        weights = {f"values.{i}": LocalWeight(p, group if i == 0 else None) for i, p in enumerate(whole)}
        optimizer = torch.optim.AdamW(self.tensors, lr=LR, betas=BETAS, eps=EPS)
        self.control = OptimizerControl(ShardMap(self.applied, [optimizer], shards, weights, 1000, collective=True))

    def step(self, step: int, gradients: list[np.ndarray]) -> list[Tensor]:
        for tensor, (i, start, stop, _) in zip(self.tensors, self.cuts, strict=True):
            tensor.grad = torch.from_numpy(gradients[i]).reshape(-1)[start:stop].clone()
        self.control.before_step(step)
        return [t.grad for t in self.tensors if t.grad is not None]


def split_steps(gradients: list[list[np.ndarray]]) -> tuple[list[list[Tensor]], Any, Tensor]:
    split = Split(AdaClip(), AdaNorm())
    found = [split.step(i, of_step) for i, of_step in enumerate(gradients)]
    shards = split.control.shards
    for i, tensor in enumerate(split.tensors):
        shards.state(tensor)["kept"] = torch.arange(tensor.numel()) + 100.0 * i + 1000.0 * dist.get_rank()
    return found, split.control.state_dict(), shards.gather("kept", ["values.0"])["values.0"]


@pytest.mark.distributed
def test_two_ranks_transform_as_one() -> None:
    gradients = random_gradients(9)
    one = Steps(AdaClip(), AdaNorm())
    wanted = [one.step(of_step) for of_step in gradients]
    (first, state, kept), (second, other, _) = run_ranks(split_steps, 2, gradients)
    for step, whole in enumerate(wanted):
        joined = [torch.cat([first[step][0], second[step][0]]), first[step][1], second[step][2]]
        assert torch.equal(first[step][1], second[step][1])
        for found, expected in zip(joined, whole, strict=True):
            torch.testing.assert_close(found, expected.reshape(-1), rtol=1e-6, atol=0)
    assert repr(state) == repr(other)
    assert torch.equal(state["ada_clip"]["average"], one.control.state_dict()["ada_clip"]["average"])
    expected = torch.cat([torch.arange(10.0), torch.arange(14.0) + 1000]).view(4, 6)
    assert torch.equal(kept, expected)
