"""Placement: every rank lies where the rank map says, counted rank by rank."""

from __future__ import annotations

import pytest

from fp4dist.cluster.pictures import coordinates
from fp4dist.cluster.topology import load_topology, place
from fp4dist.errors import ConfigError
from fp4dist.spec.cluster import Layout, Topology
from fp4dist.spec.load import load_spec, shipped

NVL72 = load_topology("gb200_nvl72")


@pytest.mark.parametrize("name", shipped("topology"))
def test_shipped_topologies_load(name: str) -> None:
    topology = load_spec(Topology, "topology", name)
    assert topology.name == name
    assert topology.usable_per_domain <= topology.gpus_per_domain


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [(4, (4, 1)), (36, (36, 1)), (64, (64, 1)), (72, (72, 1)), (128, (64, 2)), (512, (64, 8)), (5120, (64, 80)),
     (144, (72, 2)), (1440, (72, 20)), (4608, (64, 72))],
)  # fmt: skip
def test_a_job_fills_domains_in_equal_parts(gpus: int, expected: tuple[int, int]) -> None:
    placement = place(NVL72, gpus, Layout())
    assert (placement.per_domain, placement.domains) == expected
    assert not placement.uneven


def test_a_job_without_a_divisor_is_warned_about() -> None:
    placement = place(NVL72, 76 * 4, Layout(tp=4))
    assert placement.uneven
    assert any("no divisor near 18" in w for w in placement.warnings)


LAYOUTS = [
    (512, Layout(tp=4, pp=8, cp=2, order="tp-cp-ep-pp-dp")),
    (512, Layout(tp=4, pp=8, cp=2)),
    (128, Layout(tp=2, pp=4)),
    (72, Layout(cp=2)),
    (256, Layout(pp=4, tp=8, cp=2)),
]


@pytest.mark.parametrize(("gpus", "layout"), LAYOUTS)
@pytest.mark.parametrize("axis", ["tp", "cp", "pp", "dp"])
def test_spans_are_those_of_the_ranks(gpus: int, layout: Layout, axis: str) -> None:
    """Group ranks by all other coordinates, and count domains and members of each group."""
    placement = place(NVL72, gpus, layout)
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(gpus):
        at = coordinates(placement, rank)
        groups.setdefault(tuple(v for k, v in at.items() if k != axis), []).append(rank // placement.per_domain)
    span = placement.span(axis)
    for domains in groups.values():
        assert len(domains) == span.size
        assert len(set(domains)) == span.across


def test_experts_lie_inside_a_rack_and_leave_it_when_they_must() -> None:
    assert place(NVL72, 256, Layout(pp=4, ep=64)).span("ep").across == 1
    hgx = place(load_topology("h100_hgx"), 64, Layout(ep=64))
    assert hgx.span("ep").across == 8
    assert any("expert-parallel groups" in w for w in hgx.warnings)


@pytest.mark.parametrize(
    ("gpus", "layout", "message"),
    [
        (500, Layout(tp=4, pp=8, cp=2), "500 GPUs are not a multiple of tp \\* pp \\* cp"),
        (64, Layout(ep=48), "etp \\* ep \\* pp"),
        (64, Layout(fsdp=48), "fsdp = 48 must divide the 64 ranks"),
        (64, Layout(pp=2, ep=8, order="tp-cp-ep-pp-dp"), "needs ep \\* etp = tp \\* cp"),
        (0, Layout(), "at least 1"),
    ],
)
def test_what_does_not_divide_is_an_error(gpus: int, layout: Layout, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        place(NVL72, gpus, layout)


def test_a_cluster_has_only_so_many_gpus() -> None:
    with pytest.raises(ConfigError, match="single_gpu has 1 GPUs"):
        place(load_topology("single_gpu"), 2, Layout())
