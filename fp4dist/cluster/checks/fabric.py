"""NVLink fabric: state, status, identity and health of every GPU, cliques over nodes, and what NCCL made of it.

NCCL decides by the fabric state alone and falls back to the network without a word when any rank's is not Completed;
links look Active with the fabric down; a healthy state may come with an unhealthy summary. So all of it is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fp4dist.cluster.checks.expect import Expect
from fp4dist.cluster.facts import Facts, clique
from fp4dist.cluster.faults import Fault, FaultClass

_ZERO = re.compile(r"^[0-]*$")
_HEALTHY = {
    "Summary": ("Healthy",),
    "Bandwidth": ("Full",),
    "Route Recovery in progress": ("False",),
    "Route Unhealthy": ("False",),
    "Access Timeout Recovery": ("False",),
    "Incorrect Configuration": ("None",),
}
_RESET = "nvidia-smi -r on the tray or reboot it; then look at the fabric manager's log on the switch trays"
_LOG = re.compile(r"MNNVL (\d) cliqueId (\w+) cliqueSize (\d+)")


def node(facts: Facts, expect: Expect) -> Iterator[Fault]:
    """Every GPU of one node."""
    if not expect.mnnvl:
        return
    for index, gpu in enumerate(facts.gpus):
        where = f"{facts.host} GPU {index}"
        fabric = gpu.get("Fabric")
        if not isinstance(fabric, dict):
            yield _fault(expect, where, "fabric section", "none", "Completed", "a driver that knows multi-node NVLink")
            continue
        state, status = str(fabric.get("State")), str(fabric.get("Status"))
        if state != "Completed":
            wait = "wait for the fabric manager; if it stays so: " if state == "In Progress" else ""
            yield _fault(expect, where, "fabric state", state, "Completed", wait + _RESET)
        elif status != "Success":
            yield _fault(expect, where, "fabric status", status, "Success", _RESET)
        elif not _named(gpu):
            yield _fault(expect, where, "ClusterUUID", clique(gpu)[0], "not zero: NCCL then leaves MNNVL out", _RESET)
        yield from _health(fabric.get("Health", {}), where, expect)


def _health(health: object, where: str, expect: Expect) -> Iterator[Fault]:
    """State and status may be good while health is not."""
    told: Mapping[str, object] = health if isinstance(health, dict) else {}
    for key, good in _HEALTHY.items():
        value = str(told.get(key, "N/A"))
        if value not in (*good, "N/A"):
            fix = "drain the tray, or start with --allow-degraded: MNNVL off on every rank, and a new plan for the NICs"
            yield _fault(expect, where, f"fabric health, {key}", value, good[0], fix)


def _fault(expect: Expect, where: str, what: str, found: str, expected: str, fix: str) -> Fault:
    return Fault(FaultClass.FABRIC, where, what, found, expected, fix, fatal=not expect.allow_degraded)


def cliques(nodes: Sequence[Facts], expect: Expect) -> Iterator[Fault]:
    """All GPUs of a segment (nodes that follow each other in rank order) share one (ClusterUUID, CliqueId)."""
    if not expect.mnnvl:
        return
    for first in range(0, len(nodes), expect.segment):
        group = nodes[first : first + expect.segment]
        found = {clique(gpu): facts.host for facts in reversed(group) for gpu in facts.gpus if _named(gpu)}
        if len(found) > 1:
            told = "; ".join(f"{host}: {uuid[:8]}... clique {number}" for (uuid, number), host in found.items())
            yield Fault(
                FaultClass.TOPOLOGY,
                f"nodes {first} to {first + len(group) - 1} of the rank order",
                "NVLink partition (ClusterUUID, CliqueId)",
                told,
                "one partition for every segment",
                f"sort the hosts by rack, submit with --segment={expect.segment}, or let the fabric manager make one"
                " partition of the rack",
            )


def _named(gpu: Mapping[str, Any]) -> bool:
    """Whether the GPU is in a partition at all; `node` reports those that are not."""
    uuid = clique(gpu)[0]
    return uuid != "N/A" and not _ZERO.match(uuid)


def fallback(log: str, where: str, ranks_inside: int) -> Iterator[Fault]:
    """What NCCL says at init (NCCL_DEBUG=INFO, NCCL_DEBUG_SUBSYS=INIT): is MNNVL in use, over how many ranks?"""
    lines = _LOG.findall(log)
    expected = f"MNNVL 1 cliqueSize {ranks_inside}"
    fix = "preflight's fabric and IMEX lines say why; NCCL_MNNVL_ENABLE and NCCL_CUMEM_ENABLE must not be 0"
    if not lines or all(on == "0" for on, _, _ in lines):
        found = "no line about MNNVL" if not lines else "MNNVL 0"
        yield Fault(FaultClass.FABRIC, where, "NCCL runs over the network inside the rack", found, expected, fix)
    elif max(int(size) for _, _, size in lines) < ranks_inside:
        size = max(int(size) for _, _, size in lines)
        yield Fault(FaultClass.FABRIC, where, "NCCL's clique", f"cliqueSize {size}", expected, fix)
