"""Bands of collectives: from the topology's links, against published measurements, and on two gloo ranks."""

from __future__ import annotations

import pytest
import torch

from fp4dist.cluster.faults import FaultClass, exit_code
from fp4dist.cluster.topology import load_topology
from fp4dist.comm.fabric import Rates, expected, judge, measure
from tests.distributed import run_ranks

GB200 = load_topology("gb200_nvl72")


@pytest.mark.parametrize(
    ("ranks", "all_reduce"),
    [
        (72, 586.0),  # bus GB/s at 0.5 GB, one rack (coreweave/nccl-tests #43)
        (8, 811.0),  # two trays, multi-node NVLink
        (1440, 151.0),  # 20 racks at 0.5 GB (#48)
    ],
)
def test_published_healthy_fabrics_pass(ranks: int, all_reduce: float) -> None:
    assert all_reduce >= expected(GB200, ranks).all_reduce


def test_a_rack_over_its_nics_is_caught() -> None:
    """Without multi-node NVLink a rack's ranks share 50 GB/s each: far below the band."""
    faults = judge(Rates(all_reduce=0.98 * 4 * 50, all_to_all=48.0), GB200, 64)
    assert exit_code(faults) == FaultClass.BANDWIDTH == 30
    assert [f.what for f in faults] == ["all-reduce", "all-to-all"]
    assert "found 48.0 GB/s, expected at least 157.5 GB/s" in faults[1].line()
    assert judge(Rates(600.0, 400.0), GB200, 64) == []


def test_bands_follow_the_links() -> None:
    """Two HGX boxes are bound by their NICs, one by NVLink."""
    hgx = load_topology("h100_hgx")
    one, two = expected(hgx, 8), expected(hgx, 16)
    assert one.all_reduce > two.all_reduce
    assert two.all_to_all < hgx.across.gb_per_s


def measured() -> tuple[float, float]:
    rates = measure(torch.device("cpu"), megabytes=1)
    return rates.all_reduce, rates.all_to_all


@pytest.mark.distributed
def test_every_rank_learns_the_slowest_ranks_rates() -> None:
    first, second = run_ranks(measured, 2)
    assert first == second
    assert min(first) > 0
