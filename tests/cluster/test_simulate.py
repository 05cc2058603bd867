"""The simulator against closed forms, and what it must do under jitter, stragglers and contention."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from fp4dist.cluster import intervals
from fp4dist.cluster.scaling import Case, curve, failures, sizes, work_of
from fp4dist.cluster.simulate import Noise, Work, simulate
from fp4dist.cluster.topology import load_topology
from fp4dist.errors import ConfigError
from fp4dist.spec.cluster import Layout
from fp4dist.spec.load import load_model

F, B = 1.0, 2.0  # seconds of a whole stage's passes


def work(pp: int, vpp: int = 1, micro_batches: int = 8, **changed: object) -> Work:
    fields = {"forward_s": (F / vpp,) * pp, "backward_s": (B / vpp,) * pp, **changed}
    return Work(pp=pp, vpp=vpp, micro_batches=micro_batches, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(("pp", "vpp", "m"), [(1, 1, 5), (4, 1, 8), (8, 1, 16), (4, 2, 8), (4, 4, 16), (8, 8, 16)])
def test_bubble_is_the_textbooks(pp: int, vpp: int, m: int) -> None:
    """Narayanan et al. 2021: m (f + b) of work and (p - 1)(f + b) / v of bubble."""
    step = simulate(work(pp, vpp, m))
    assert step.step_s == pytest.approx(m * (F + B) + (pp - 1) * (F + B) / vpp)
    assert step.bubble_s == pytest.approx((pp - 1) * (F + B) / vpp)
    assert step.events == 2 * pp * vpp * m


def test_the_slowest_stage_sets_the_pace() -> None:
    uneven = work(4, micro_batches=64, forward_s=(1.0, 1.0, 1.5, 1.0), backward_s=(2.0, 2.0, 3.0, 2.0))
    fill, wait_for_the_last_stage, drain = 2.0, 3.0 - 1.5, 4.0  # its second forward pass hides a part of the wait
    assert simulate(uneven).step_s == pytest.approx(fill + 64 * 4.5 + wait_for_the_last_stage + drain)


def test_reduction_and_gather_add_what_is_not_hidden() -> None:
    """One stage and one chunk: nothing to hide them behind."""
    step = simulate(work(1, micro_batches=4, reduce_s=0.5, gather_s=0.25, optimizer_s=0.125))
    assert step.step_s == pytest.approx(4 * (F + B) + 0.875)
    assert step.exposed_s == pytest.approx(0.875)


def test_more_chunks_hide_more_of_the_reduction() -> None:
    exposed = [simulate(work(4, vpp, 16, reduce_s=1.0)).exposed_s for vpp in (1, 2, 4)]
    assert exposed[0] == pytest.approx(1.0)
    assert exposed[0] > exposed[1] > exposed[2] > 0


def test_sends_on_the_collectives_link_take_longer() -> None:
    """Sends during the gather share its link; on links of their own they do not."""
    apart = simulate(work(4, 2, 8, send_s=0.1, gather_s=3.0, reduce_s=3.0))
    shared = simulate(work(4, 2, 8, send_s=0.1, gather_s=3.0, reduce_s=3.0, shared_link=True))
    assert shared.step_s > apart.step_s


def test_ports_serve_one_send_after_the_other() -> None:
    """Sends so long that ports bound the step: middle stages send activations and gradients through one port."""
    step = simulate(work(4, micro_batches=32, send_s=4.0))
    assert step.step_s > 32 * 2 * 4.0


def test_stragglers_slow_every_pipeline_they_touch_and_all_wait_for_them() -> None:
    base = simulate(work(4, pipelines=64, lockstep=8)).step_s
    one = Noise(slow_fraction=1 / 2048, slow_factor=1.5, seed=3)
    assert simulate(
        work(4, pipelines=64, lockstep=8), Noise(slow_fraction=1.0, slow_factor=1.5)
    ).step_s == pytest.approx(1.5 * base)
    assert base < simulate(work(4, pipelines=64, lockstep=8), one).step_s <= 1.5 * base


def test_jitter_costs_more_in_larger_groups() -> None:
    """The expected largest of k draws grows with k."""
    noise = Noise(jitter=0.05, seed=1)
    steps = [simulate(work(2, micro_batches=64, pipelines=4, lockstep=k), noise).step_s for k in (1, 8, 64)]
    assert steps == sorted(steps)
    largest_of_64 = np.exp(0.05 * 2.39)  # mean of the largest of 64 normal draws
    assert steps[2] == pytest.approx(steps[0] * largest_of_64, rel=0.03)


def test_a_seed_gives_one_step() -> None:
    noise = Noise(jitter=0.1, slow_fraction=0.01, slow_factor=2.0, seed=5)
    first, again = (simulate(work(4, 2, 8, pipelines=16, lockstep=4), noise).step_s for _ in range(2))
    assert (
        first == again != simulate(work(4, 2, 8, pipelines=16, lockstep=4), dataclasses.replace(noise, seed=6)).step_s
    )


def test_a_hundred_thousand_ranks_cost_the_events_of_one_pipeline() -> None:
    big = work(8, 8, 16, pipelines=1563, lockstep=8)
    assert big.ranks == 100_032
    step = simulate(big, Noise(jitter=0.02, slow_fraction=1e-4))
    assert step.events == simulate(work(8, 8, 16)).events
    assert step.step_s > simulate(work(8, 8, 16)).step_s


# -- layouts

CASE = Case(
    model=load_model("llama3_405b"),
    topology=load_topology("gb200_nvl72"),
    layout=Layout(tp=4, pp=8, vpp=8, cp=2, order="tp-cp-ep-pp-dp"),
    precision="nvfp4",
    gbs=1152,
    seq=8192,
)


def test_without_noise_the_simulator_agrees_with_the_planner() -> None:
    """They share layer times and differ in how they find bubble and overlap."""
    assert CASE.step(512).step_s == pytest.approx(CASE.predict(512).step_time_s, rel=0.03)


def test_work_of_a_layout_has_its_ranks() -> None:
    work = work_of(CASE.predict(512), 512, "bf16", CASE.model.num_layers)
    assert (work.ranks, work.lockstep, work.pipelines, work.micro_batches) == (512, 8, 8, 144)
    assert work.last_forward_s < work.forward_s[0]  # the head, less one layer of two


def test_curves() -> None:
    weak = curve(dataclasses.replace(CASE, gbs=128), sizes(512, 4096), "weak")
    assert [p.gpus for p in weak[::2]] == [512, 1024, 2048, 4096]
    assert all(fp4.step_s < bf16.step_s for bf16, fp4 in zip(weak[::2], weak[1::2], strict=True))
    strong = [p for p in curve(CASE, sizes(512, 8192), "strong") if p.wire == "bf16"]
    assert [p.efficiency for p in strong] == sorted((p.efficiency for p in strong), reverse=True)
    assert {p.gbs for p in strong} == {1152}


def test_failures() -> None:
    found = failures(
        dataclasses.replace(CASE, gbs=128),
        512,
        replan=lambda case, gpus: Layout(tp=2, pp=16, vpp=4, cp=2) if gpus == 448 else None,
    )
    by_name: dict[str, list[float]] = {}
    for outcome in found:
        by_name.setdefault(outcome.failure, []).append(outcome.share)
    assert by_name.keys() == {"GPU or tray", "NIC", "NVLink switch tray", "rack"}
    assert all(shares == sorted(shares, reverse=True) for shares in by_name.values())
    best = {name: shares[0] for name, shares in by_name.items()}
    assert best["GPU or tray"] == 1.0  # a spare tray
    assert best["rack"] == pytest.approx(7 / 8, rel=0.01)
    nic = next(o for o in found if o.failure == "NIC" and "share a NIC" in o.answer)
    assert 0.9 < nic.share < 1
    plans = [o for o in found if o.answer.startswith("replan")]
    assert {o.answer for o in plans} == {"replan: tp2 pp16 vpp4 cp2 mbs1, batch 112"}
    assert all(0 < o.share < 1 for o in plans)


def test_lockstep_groups_must_divide_the_job() -> None:
    with pytest.raises(ConfigError, match="lockstep"):
        work_of(CASE.predict(512), 516, "bf16", 126)


# -- checkpoint intervals


@pytest.mark.parametrize(("save", "mtbf"), [(30.0, 36000.0), (120.0, 7200.0), (60.0, 1800.0)])
def test_dalys_interval_is_the_best_of_his_model(save: float, mtbf: float) -> None:
    grid = np.geomspace(10, 10 * mtbf, 20001)
    best = max(intervals.goodput(float(t), save, 300.0, mtbf) for t in grid)
    assert intervals.goodput(intervals.daly(save, mtbf), save, 300.0, mtbf) == pytest.approx(best, rel=1e-4)
    assert intervals.daly(save, mtbf) < intervals.young(save, mtbf)


def test_goodput_against_drawn_failures() -> None:
    """Failures drawn as a Poisson process: work, saves, restarts (which may fail too) and lost work, added up."""
    rng = np.random.default_rng(0)
    save, restart, mtbf, segment = 40.0, 200.0, 3000.0, 480.0
    wall, done, rounds = 0.0, 0, 4000
    while done < rounds:
        until = rng.exponential(mtbf)  # memoryless: drawn afresh for each attempt
        if until >= segment + save:
            wall, done = wall + segment + save, done + 1
            continue
        wall += until
        while (again := rng.exponential(mtbf)) < restart:
            wall += again
        wall += restart
    expected = intervals.goodput(segment, save, restart, mtbf)
    assert rounds * segment / wall == pytest.approx(expected, rel=0.02)


def test_published_rate_of_failures() -> None:
    """Llama 3: 16,384 GPUs, one interruption about every 3 hours."""
    assert intervals.job_mtbf_s(16384) / 3600 == pytest.approx(54 * 24 / 419)
    assert math.isclose(intervals.restart_s(512), 250.0)
    assert math.isclose(intervals.restart_s(5120), 490.0)
