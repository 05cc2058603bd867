"""Control of weights around the optimizer's step, on plain torch optimizers and against formulas written out here."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fp4dist.errors import RecipeMismatch
from fp4dist.nn.apply import AppliedRecipe, apply_recipe
from fp4dist.nn.linear import Fp4Linear
from fp4dist.nn.optimizer import OptimizerControl, attach_optimizer
from fp4dist.nn.plan import LinearPlan
from fp4dist.nn.weights import OsciResetPart, _check_reach, pull_strength, ramping_period
from fp4dist.numerics.codes import decode_packed, unpack
from fp4dist.numerics.quantize import dequantize, quantize
from fp4dist.numerics.rotation import rotate, unrotate
from fp4dist.spec.build import build
from fp4dist.spec.recipe import Fprop, LinearRecipe, Phase, QuantSpec, Recipe, Rule
from fp4dist.spec.training import Cage, OsciReset, QRamping

OUT, IN = 32, 128
DOUBLE = {"format": "nvfp4", "outer": [1, 128]}  # TetraJet-v2's weights
UNIT = {"format": "mxfp4"}  # a block whose amax is 6 has scale 1
ROTATED = {"format": "mxfp4", "scale": "ceil", "rotation": {"size": 32, "signs": "none"}}
AVERAGED = {"format": "mxfp4", "scale": "ceil", "rounding": {"kind": "ema", "decay": 0.998, "after": 3}}


class Model(nn.Module):
    fc1: Fp4Linear  # once a recipe is applied

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.fc1, self.norm = nn.Linear(IN, OUT, bias=False), nn.LayerNorm(OUT)  # type: ignore[assignment]
        with torch.no_grad():
            self.fc1.weight.copy_(0.05 * torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed)))


class Run:
    """A model under `weights` controls, driven step by step without forward passes."""

    def __init__(
        self,
        w: dict[str, Any],
        *controls: Any,
        total: int = 100,
        make: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        phases: Sequence[Phase] = (),
        **options: Any,
    ) -> None:
        self.spec = build(QuantSpec, w, "w")
        linears = {"fp4": LinearRecipe(fprop=Fprop(x=build(QuantSpec, x_like(w), "x"), w=self.spec))}
        self.recipe = Recipe(
            name="r", linears=linears, rules=(Rule(path="fc1", linear="fp4"),), weights=controls, phases=tuple(phases)
        )
        self.model, self.total = Model(), total
        self.applied: AppliedRecipe = apply_recipe(self.model, self.recipe)
        self.optimizer = make(self.model.parameters(), **options)
        self.control: OptimizerControl | None = None
        if self.recipe.steers_optimizer:
            self.control = attach_optimizer(self.applied, self.optimizer, total)

    @property
    def weight(self) -> Tensor:
        return self.model.fc1.weight.detach()

    @property
    def plan(self) -> LinearPlan:
        assert self.model.fc1.plan is not None
        return self.model.fc1.plan

    @property
    def average(self) -> Tensor:
        assert self.plan.average is not None
        return self.plan.average

    @property
    def moments(self) -> list[Tensor]:
        state = self.optimizer.state[self.model.fc1.weight]
        return [state["exp_avg"].clone(), state["exp_avg_sq"].clone()]

    def step(self, number: int, gradient: Tensor, at: Tensor | None = None) -> None:
        """Take step `number` with the weight's `gradient`; `at`: from these weights."""
        self.applied.set_step(number, self.total)
        if at is not None:
            self.weight.copy_(at)
        self.model.fc1.weight.grad = gradient.clone()
        for p in self.model.norm.parameters():
            p.grad = torch.full_like(p, 0.1)
        self.optimizer.step()


def x_like(w: dict[str, Any]) -> dict[str, Any]:
    return {"format": w["format"]} | ({"rotation": w["rotation"]} if "rotation" in w else {})


def q(w: Tensor, spec: QuantSpec) -> Tensor:
    values = dequantize(quantize(w, spec))
    return unrotate(values, spec.rotation, None) if spec.rotation else values


def codes(w: Tensor, spec: QuantSpec) -> Tensor:
    return quantize(w, spec).codes


def codes_of(operand: Any) -> Tensor:
    return unpack(operand.codes)


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------- Cage


def test_the_pull_begins_after_the_silence_and_reaches_its_height_in_the_last_step() -> None:
    ramp, constant = Cage(strength=10, silence=0.8), Cage(strength=10, silence=0.8, schedule="constant")
    assert [pull_strength(ramp, t, 10) for t in (0, 7, 8, 9)] == pytest.approx([0, 0, 5, 10])
    assert [pull_strength(constant, t, 10) for t in (0, 7, 8, 9)] == [0, 0, 10, 10]


@pytest.mark.parametrize("w", [DOUBLE, {"format": "nvfp4"}, {"format": "mxfp4", "scale": "ceil"}, ROTATED])
def test_without_gradient_the_error_shrinks_by_one_minus_lr_lambda(w: dict[str, Any]) -> None:
    run = Run(w, Cage(strength=10, silence=0.5), total=10, lr=0.02, weight_decay=0.0)
    error = torch.zeros(OUT, IN)
    for t in range(10):
        before = run.weight.clone()
        error = before - q(before, run.spec)
        run.step(t, torch.zeros(OUT, IN))
        shrink = 1 - 0.02 * pull_strength(Cage(strength=10, silence=0.5), t, 10)
        after = run.weight - q(before, run.spec)
        if t < 5:
            assert torch.equal(run.weight, before), "silence"
        else:
            assert shrink < 0.97
            assert torch.allclose(after, error * shrink, rtol=0, atol=2e-8)
            assert torch.equal(codes(run.weight, run.spec), codes(before, run.spec)), "in the bin"
    assert error.abs().max() > 1e-4


@pytest.mark.parametrize("form", ["decoupled", "coupled"])
def test_the_update_is_algorithm_1_written_out(form: Any) -> None:
    """E_t before everything; coupled: g += lambda e before the moments; decay; moments; decoupled: beside the step."""
    cage = Cage(strength=4, silence=0.0, schedule="constant", form=form)
    lr, decay, (b1, b2), eps = 0.01, 0.1, (0.9, 0.95), 1e-8
    run = Run(DOUBLE, cage, total=8, lr=lr, weight_decay=decay, betas=(b1, b2), eps=eps)
    x = run.weight.double().numpy().copy()
    m, v, error = (np.zeros_like(x) for _ in range(3))
    for t in range(8):
        g = noise(OUT, IN, seed=t) * 0.1
        error = 4 * (x - q(run.weight.clone(), run.spec).double().numpy())
        run.step(t, g)
        grad = g.double().numpy() + (error if form == "coupled" else 0)
        x = x * (1 - lr * decay)
        m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad**2
        step = (m / (1 - b1 ** (t + 1))) / (np.sqrt(v / (1 - b2 ** (t + 1))) + eps)
        x = x - lr * (step + (error if form == "decoupled" else 0))
        assert np.abs(run.weight.numpy() - x).max() < 1e-6
    assert np.abs(error).max() > 1e-2, "or the pull could be absent"


# ---------- OsciReset

RESET = OsciReset(start=2, every=10, window=6, threshold=8)


def jittered(total: int, scale: float = 2e-4) -> list[Tensor]:
    base = Model().fc1.weight.detach()
    return [base + scale * noise(OUT, IN, seed=100 + t) for t in range(total)]


def ratios(path: Sequence[Tensor], spec: QuantSpec) -> Tensor:
    """R of each element along a path of weights, in the basis of the codes."""
    ws = [rotate(w, spec.rotation, None) * spec.rotation.size**-0.5 if spec.rotation else w for w in path]
    qs = [dequantize(quantize(w, spec)) for w in path]
    way = sum((b - a).abs() for a, b in pairwise(ws))
    q_way = sum((b - a).abs() for a, b in pairwise(qs))
    return q_way / (way + 1e-8)  # type: ignore[operator]


def test_oscillating_weights_become_their_quantized_values_and_nothing_else_changes() -> None:
    """Against the same run without the control: the same moments, weights that differ where R >= 8 alone."""
    path = jittered(9)
    with_reset = Run(DOUBLE, RESET, lr=0.0)
    plain = Run(DOUBLE, lr=0.0)
    for t, at in enumerate(path):
        before = path[t]
        for run in (with_reset, plain):
            run.step(t, noise(OUT, IN, seed=t), at=at)
        if t < 8:
            assert torch.equal(with_reset.weight, before)
    oscillating = ratios(path[2:9], with_reset.spec) >= 8
    assert 0.02 < oscillating.double().mean() < 0.9
    after = with_reset.weight
    assert torch.equal(after, torch.where(oscillating, q(path[8], with_reset.spec), path[8]))
    assert torch.equal(after[oscillating], q(after, with_reset.spec)[oscillating]), "idempotent"
    assert torch.equal(q(after, with_reset.spec), q(path[8], with_reset.spec)), "no code changes, but for the sign of 0"
    for ours, theirs in zip(with_reset.moments, plain.moments, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(with_reset.model.norm.weight, plain.model.norm.weight)


def test_under_a_rotation_the_rotated_elements_are_reset() -> None:
    path = jittered(9, scale=1e-3)
    run = Run(ROTATED, RESET, lr=0.0)
    for t, at in enumerate(path):
        run.step(t, torch.zeros(OUT, IN), at=at)
    rotation = run.spec.rotation
    assert rotation is not None
    chosen = ratios(path[2:9], run.spec) >= 8
    rotated = rotate(path[8], rotation, None) * rotation.size**-0.5
    wanted = torch.where(chosen, dequantize(quantize(path[8], run.spec)), rotated)
    assert 0.01 < chosen.double().mean() < 0.9
    assert torch.allclose(run.weight, unrotate(wanted, rotation, None), atol=1e-7)
    assert torch.equal(dequantize(quantize(run.weight, run.spec)), dequantize(quantize(path[8], run.spec)))


def test_windows_repeat_and_a_second_one_sees_the_reset_weights() -> None:
    run = Run(DOUBLE, OsciReset(start=0.03, every=4, window=4, threshold=8), total=100, lr=0.0)
    resets = []
    for t, at in enumerate(jittered(16)):
        run.step(t, torch.zeros(OUT, IN), at=at)
        if not torch.equal(run.weight, at):
            resets.append(t)
    assert resets == [7, 11, 15]


def test_only_the_share_nearest_to_an_edge_is_tracked() -> None:
    path = jittered(9)
    run = Run(DOUBLE, OsciReset(start=2, every=10, window=6, threshold=8, share=0.03), lr=0.0)
    for t, at in enumerate(path):
        run.step(t, torch.zeros(OUT, IN), at=at)
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    quantized = quantize(path[2], run.spec)
    unit = (dequantize(quantized) / decode_packed(quantized.codes, quantized.format.element)).double()
    unit = torch.where(unit.isfinite(), unit, 0).reshape(OUT, -1, 16).amax(-1, keepdim=True)  # of each block
    z = (path[2].double().reshape(OUT, -1, 16) / unit).abs().reshape(OUT, IN).numpy()
    low = np.clip(np.searchsorted(grid, z, side="right") - 1, 0, 6)
    near = 1 - np.abs(z - (grid[low] + grid[low + 1]) / 2) / ((grid[low + 1] - grid[low]) / 2)
    changed = (run.weight != path[8]).numpy()
    oscillating = (ratios(path[2:9], run.spec) >= 8).numpy()
    threshold = np.quantile(near, 0.97)
    sure = np.abs(near - threshold) > 2e-3
    assert np.array_equal(changed[sure], (oscillating & (near > threshold))[sure])
    assert 0.01 < changed.mean() <= 0.03 < oscillating.mean() - 0.02


def test_the_bin_edge_criterion_looks_at_the_last_weights_alone() -> None:
    w = torch.full((OUT, IN), 0.25)
    w[:, ::32] = 6.0
    w[:, 1::32], w[:, 2::32] = 0.2502, 0.247  # |z - q| / half a step: .9992 and .988
    w[:, 3::32], w[:, 4::32] = 2.4999, 5.1  # .9998, .9: the steps are 1 and 2 here
    run = Run(UNIT, OsciReset(start=1, every=10, window=3, criterion="bin_edge"), lr=0.0)
    for t in range(5):
        run.step(t, torch.zeros(OUT, IN), at=w)
    wanted = w.clone()
    wanted[w == 0.25], wanted[w == 0.2502], wanted[w == 2.4999] = 0.0, 0.5, 2.0
    assert torch.equal(run.weight, wanted)


# ---------- QRamping


def test_the_period_grows_with_the_ratio_up_to_the_longest() -> None:
    rule = QRamping(step_ratio=16, stretch=5, longest=40)
    ratio = torch.tensor([0.0, 15.9, 16.0, 31.9, 32.0, 160.0])
    assert ramping_period(ratio, rule).tolist() == [1, 1, 6, 6, 11, 40]


def test_with_period_one_it_is_adamw_bit_for_bit() -> None:
    options = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    ramped = Run(DOUBLE, QRamping(every=20, probe=5, step_ratio=1e9), **options)
    plain = Run(DOUBLE, **options)
    for t in range(45):
        for run in (ramped, plain):
            run.step(t, noise(OUT, IN, seed=t))
    assert torch.equal(ramped.weight, plain.weight)
    assert all(torch.equal(a, b) for a, b in zip(ramped.moments, plain.moments, strict=True))


def test_slow_weights_collect_gradients_and_take_longer_steps() -> None:
    """Against a loop over elements' own AdamW, written out: periods, means, decay in every step, flush by a probe."""
    lr, decay, (b1, b2), eps = 1e-4, 0.1, (0.9, 0.95), 1e-8
    every, probe = 23, 6
    rule = QRamping(every=every, probe=probe, step_ratio=4, stretch=2, longest=7)
    run = Run(DOUBLE, rule, lr=lr, weight_decay=decay, betas=(b1, b2), eps=eps)
    plain = Run(DOUBLE, lr=lr, weight_decay=decay, betas=(b1, b2), eps=eps)
    x = run.weight.double()
    m, v, gathered, count = (torch.zeros_like(x) for _ in range(4))
    period, seen, path = torch.ones_like(x), torch.zeros_like(x, dtype=torch.bool), []
    for t in range(50):
        if t % every <= probe:
            path.append(run.weight.clone())
        if t % every == probe:
            ratio = ratios(path, run.spec)
            period, path = torch.clamp(torch.floor(ratio / 4) * 2 + 1, max=7).double(), []
            seen |= period > 1
        g = noise(OUT, IN, seed=t)
        for r in (run, plain):
            r.step(t, g)
        gathered, count = gathered + g.double(), count + 1
        due = (count == period) | (t % every < probe)
        mean = gathered / count
        m = torch.where(due, b1 * m + (1 - b1) * mean, m)
        v = torch.where(due, b2 * v + (1 - b2) * mean**2, v)
        step = (m / (1 - b1 ** (t + 1))) / ((v / (1 - b2 ** (t + 1))).sqrt() + eps)
        x = x * (1 - lr * decay) - torch.where(due, lr * count * step, 0.0)
        gathered, count = torch.where(due, 0.0, gathered), torch.where(due, 0.0, count)
        assert (run.weight - x).abs().max() < 1e-6, t
    assert 0.02 < seen.double().mean() < 0.9
    assert set(period.unique().tolist()) >= {1.0, 3.0, 7.0}
    assert torch.equal(run.weight[~seen], plain.weight[~seen]), "elements with period 1 are AdamW's"
    assert not torch.equal(run.weight[seen], plain.weight[seen])


def test_ramping_refuses_another_optimizer() -> None:
    with pytest.raises(RecipeMismatch, match=r"q_ramping takes AdamW's steps apart .* use torch.optim.AdamW"):
        Run(DOUBLE, QRamping(), make=torch.optim.Adam, lr=0.1, weight_decay=0.1)


# ---------- moving averages


def test_plans_round_by_the_average_of_the_weights_that_they_have_seen() -> None:
    run = Run(AVERAGED, lr=0.0)
    average = None
    for t, at in enumerate(jittered(8)):
        average = at.clone() if average is None else average
        run.step(t, torch.zeros(OUT, IN), at=at)
        average = average * 0.998 + at * (1 - 0.998)
        if t < 2:  # `after` is 3
            assert run.plan.average is None
            continue
        assert torch.allclose(run.average, average, rtol=1e-6)
        assert not torch.equal(run.average, at)


def jitter_at_an_edge(w: dict[str, Any]) -> tuple[float, float]:
    """(flips a step, mean R as the watched window has it) of weights .8 sigma from an edge, by the forward codes."""
    run, found = Run(w, OsciReset(start=20, every=200, window=150, threshold=1e9), total=300, lr=0.0), []
    assert run.control is not None
    watching = next(part for part in run.control.parts if isinstance(part, OsciResetPart))
    for t in range(160):
        run.applied.set_step(t, 300)
        at = 0.242 + 0.01 * noise(OUT, IN, seed=t)
        at[:, ::32] = 6.0
        if t >= 20:
            found.append(codes_of(run.plan.quantize_weight(at, run.model.fc1.comm, True)))
        run.step(t, torch.zeros(OUT, IN), at=at)
    flipped = [(a != b)[:, 1:32].double().mean() for a, b in pairwise(found)]
    (track,) = watching.tracks.values()
    return float(torch.stack(flipped).mean()), float(track.ratio().view(OUT, IN)[:, 1:32].mean())


def test_averages_stop_weights_at_an_edge_from_flipping() -> None:
    """The published simulation: .332 flips a step and R = 14.7 to nearest, 6e-4 and .03 by the average."""
    flips, ratio = jitter_at_an_edge({"format": "mxfp4", "scale": "ceil"})
    assert flips == pytest.approx(2 * 0.2119 * 0.7881, abs=0.01)  # p (1 - p) twice, p the normal's share beyond .8
    assert ratio == pytest.approx(14.8, abs=0.5)  # half a unit a flip, over E|dw| = .02 / sqrt(pi)
    flips, ratio = jitter_at_an_edge(AVERAGED)
    assert flips < 2e-3
    assert ratio < 0.1


# ---------- phases, checkpoints, refusals


def test_controls_rest_while_a_phase_leaves_the_weight_in_high_precision() -> None:
    tail = Phase(name="tail", assign=(Rule(path="fc1", linear="bf16"),), step=4)
    options = {"lr": 1e-2, "weight_decay": 0.0, "phases": (tail,)}
    pulled = Run(DOUBLE, Cage(strength=5, silence=0.0, schedule="constant"), **options)
    for t in range(8):
        before = pulled.weight.clone()
        pulled.step(t, torch.zeros(OUT, IN))
        assert torch.equal(before, pulled.weight) == (t >= 4)


CONTROLS: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "reset": (DOUBLE, (OsciReset(start=2, every=10, window=6, threshold=1),)),
    "share": (DOUBLE, (OsciReset(start=2, every=10, window=6, threshold=1, share=0.2),)),
    "rotated": (ROTATED, (OsciReset(start=2, every=10, window=6, threshold=1),)),
    "ramping": (DOUBLE, (QRamping(every=8, probe=3, step_ratio=0.5, stretch=2, longest=7),)),
    "ramped cage": (
        DOUBLE,
        (Cage(strength=4, silence=0.3), QRamping(every=8, probe=3, step_ratio=0.5, stretch=2, longest=7)),
    ),
    "average": (AVERAGED, ()),
}


@pytest.mark.parametrize("name", list(CONTROLS))
@pytest.mark.parametrize("stop", [1, 5, 13])
def test_a_run_goes_on_bit_for_bit_from_a_checkpoint(name: str, stop: int) -> None:
    """Also in the middle of a window or of a collection of gradients, and when saving interrupts nothing."""
    w, controls = CONTROLS[name]
    options: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "total": 20}

    def train(run: Run, first: int, last: int) -> None:
        for t in range(first, last):
            run.step(t, noise(OUT, IN, seed=t))

    whole, saved = Run(w, *controls, **options), Run(w, *controls, **options)
    train(whole, 0, 20)
    train(saved, 0, stop)
    files = saved.model.state_dict(), saved.optimizer.state_dict(), saved.applied.state_dict()
    files = tuple(torch.load(_through_a_file(f), weights_only=True) for f in files)
    resumed = Run(w, *controls, **options)
    resumed.model.load_state_dict(files[0])
    resumed.optimizer.load_state_dict(files[1])
    resumed.applied.load_state_dict(files[2])
    train(saved, stop, 20)
    train(resumed, stop, 20)
    for run in (saved, resumed):
        assert torch.equal(run.weight, whole.weight)
        assert all(torch.equal(a, b) for a, b in zip(run.moments, whole.moments, strict=True))
    if name == "average":
        assert torch.equal(resumed.average, whole.average)
    plain = Run(w, **options)
    train(plain, 0, 20)
    assert torch.equal(plain.weight, whole.weight) == (name == "average"), "a control that does nothing shows nothing"


def _through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def test_slices_leave_the_optimizer_after_saving() -> None:
    run = Run(DOUBLE, RESET, lr=1e-3)
    for t in range(5):
        run.step(t, noise(OUT, IN, seed=t))
    weight = run.model.fc1.weight
    assert not any("osci" in key for key in run.optimizer.state[weight])
    run.optimizer.state_dict()
    assert "osci_reset_q_way" in run.optimizer.state[weight]
    run.step(5, noise(OUT, IN, seed=5))
    assert not any("osci" in key for key in run.optimizer.state[weight])


def test_a_quantized_linear_without_a_weight_of_its_own_is_refused() -> None:
    run = Run(DOUBLE, RESET, lr=1e-3)
    del run.model.fc1.weight
    run.model.fc1.weight = None  # type: ignore[assignment]
    with pytest.raises(RecipeMismatch, match=r"fc1: recipe r controls the weights .* give it to bf16 with a rule"):
        _check_reach(run.applied)
