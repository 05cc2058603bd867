"""The variables that every rank of a job must have, decided once, with the reason for each.

What a launcher forwards differs: `deepspeed` over pdsh passes on NCCL_*, PYTHON* and few more, containers drop others.
`signed` variables (fp4dist.env) carry their names and digest, and each rank checks them before it joins the job.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from fp4dist import env
from fp4dist.spec.cluster import Layout, Topology


class Setting(NamedTuple):
    """One variable and why it has this value."""

    name: str
    value: str
    why: str


def settings(
    topology: Topology, layout: Layout, *, ranks: int | None = None, nvls: bool = False, mnnvl: bool = True
) -> list[Setting]:
    """What `layout` on `topology` needs. mnnvl=False: the fabric is degraded, all ranks do without it together.

    ranks   of the job; each checks that so many were started
    nvls    use NVLink SHARP multicast: 2.27 and 2.28 of NCCL fall back on some ranks and hang, and it takes memory
    """
    counted = [Setting("FP4DIST_WORLD_SIZE", str(ranks), "a hostfile that is not found starts one node alone")]
    found = counted if ranks is not None else []
    if topology.gpu.family == "cpu":
        return [*found, Setting("DS_ACCELERATOR", "cpu", "DeepSpeed need not find out that there is no GPU")]
    return [*found, *_nccl(topology, nvls=nvls, mnnvl=mnnvl), *_torch(layout)]


def signed(chosen: Iterable[Setting]) -> dict[str, str]:
    """The same as a mapping, with names and digest: what launch files export."""
    return env.signed({s.name: s.value for s in chosen})


def _nccl(topology: Topology, *, nvls: bool, mnnvl: bool) -> Iterator[Setting]:
    yield Setting("NCCL_DEBUG", "WARN", "silent fallbacks should not be silent")
    yield Setting("NCCL_NVLS_ENABLE", str(int(nvls)), "the same on every rank: mixed values hang; 0 also saves memory")
    if not nvls:
        yield Setting("NCCL_GRAPH_REGISTER", "0", "registers buffers of captured graphs for NVLS alone")
    if topology.mnnvl:
        yield Setting(
            "NCCL_MNNVL_ENABLE", str(int(mnnvl)), "one value for the whole job; preflight asserts what it does"
        )
        yield Setting("NCCL_CUMEM_ENABLE", "1", "memory that other nodes of the NVLink domain can map; MNNVL needs it")
    if topology.host.c2c_gb_s:
        yield Setting("NCCL_NET_GDR_C2C", "1", "NIC to GPU through Grace's C2C; off by default before NCCL 2.27")


def _torch(layout: Layout) -> Iterator[Setting]:
    yield Setting("TORCH_NCCL_AVOID_RECORD_STREAMS", "1", "else buffers of overlapped collectives are kept too long")
    if layout.tp > 1 or layout.cp > 1:
        yield Setting("CUDA_DEVICE_MAX_CONNECTIONS", "1", "collectives start in the order of their launch, under GEMMs")
    elif layout.ep > 1:
        yield Setting("CUDA_DEVICE_MAX_CONNECTIONS", "32", "expert exchange overlaps with GEMMs on queues of its own")
    yield Setting("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True", "less fragmentation near the memory's end")
