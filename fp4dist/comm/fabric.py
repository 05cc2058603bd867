"""What the links between ranks give: short collectives, timed, against what the topology promises.

A job whose NCCL fell back to the network inside a rack still runs, ten times slower; only a measurement or NCCL's own
log tells. Rates are bus rates as nccl-tests defines them: bytes that each GPU's link carries in one direction.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fp4dist.cluster.faults import Fault, FaultClass
from fp4dist.spec.cluster import Topology

_ROUNDS, _WARMUP = 8, 3
# Share of the link that a sum of 256 MB must reach. Measured on GB200 NVL72: 0.65 of NVLink over one rack at 512 MB
# (0.94 at 8 GB); over 20 racks 151 GB/s of the 900 of NVLink, which bounds a domain that has a NIC for each GPU.
_INSIDE, _ACROSS = 0.35, 0.10
_MEASURED_MB = 256


@dataclass(frozen=True, slots=True)
class Rates:
    """Bus GB/s of one GPU, the slowest rank's."""

    all_reduce: float
    all_to_all: float


def measure(device: torch.device, megabytes: int = _MEASURED_MB) -> Rates:
    """Time an all-reduce and an all-to-all of `megabytes` bf16 data over all ranks of the job."""
    world = dist.get_world_size()
    count = megabytes * 1_000_000 // 2 // world * world
    data = torch.zeros(count, dtype=torch.bfloat16, device=device)
    out = torch.empty_like(data)
    size, share = 2 * count / 1e9, (world - 1) / world
    summed = _seconds(lambda: dist.all_reduce(data), device)
    exchanged = _seconds(lambda: dist.all_to_all_single(out, data), device)
    slowest = torch.tensor([summed, exchanged], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return Rates(2 * size * share / float(slowest[0]), size * share / float(slowest[1]))


def _seconds(collective: Callable[[], object], device: torch.device) -> float:
    """Median time of one call."""
    times = []
    for _ in range(_WARMUP + _ROUNDS):
        _wait(device)
        begin = time.perf_counter()
        collective()
        _wait(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[_WARMUP:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def expected(topology: Topology, ranks: int) -> Rates:
    """The least GB/s that `ranks` ranks should see: a share of the slowest link that bounds each collective."""
    inside, across, domain = topology.inside.gb_per_s, topology.across.gb_per_s, topology.usable_per_domain
    if ranks <= topology.gpus_per_domain:
        return Rates(_INSIDE * inside, _INSIDE * inside * 0.5)
    leaving = (ranks - domain) / ranks  # of each rank's data in an all-to-all
    return Rates(_ACROSS * min(inside, domain * across), 0.4 * across / leaving)


def judge(rates: Rates, topology: Topology, ranks: int) -> list[Fault]:
    """Faults of the class BANDWIDTH."""
    least = expected(topology, ranks)
    found = (("all-reduce", rates.all_reduce, least.all_reduce), ("all-to-all", rates.all_to_all, least.all_to_all))
    fix = "preflight's fabric, IMEX and NIC lines; NCCL_DEBUG=INFO says which transport it chose"
    return [
        Fault(FaultClass.BANDWIDTH, f"{ranks} ranks", what, f"{rate:.1f} GB/s", f"at least {wanted:.1f} GB/s", fix)
        for what, rate, wanted in found
        if rate < wanted
    ]
