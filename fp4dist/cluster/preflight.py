"""Judge captured facts of a job's nodes: every check, one line a fault, one exit code.

The same code judges recorded captures (tests, support) and live ones. What needs all ranks at once (collectives, NCCL's
own word on NVLink) is launch/check_fabric.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from fp4dist.cluster.checks import devices, fabric, host, imex, network, placement, settings, variables, versions
from fp4dist.cluster.checks.expect import Expect
from fp4dist.cluster.facts import Facts
from fp4dist.cluster.faults import Fault, merge

OfNode = Callable[[Facts, Expect], Iterator[Fault]]
OfJob = Callable[[Sequence[Facts], Expect], Iterator[Fault]]
NODE: tuple[OfNode, ...] = (
    host.node,
    versions.node,
    devices.node,
    fabric.node,
    imex.node,
    network.node,
    variables.node,
    settings.node,
)
JOB: tuple[OfJob, ...] = (
    fabric.cliques,
    imex.domain,
    versions.same,
    variables.same,
    host.same,
    settings.same,
)


def judge(nodes: Sequence[Facts], expect: Expect) -> list[Fault]:
    """All faults, fatal ones first, equal ones of several places merged."""
    faults = list(placement.hosts(nodes, expect))
    listed = in_order(nodes, expect)
    for facts in listed:
        for check in NODE:
            faults += check(facts, expect)
    if listed:
        for over_all in JOB:
            faults += over_all(listed, expect)
    return merge(faults)


def in_order(nodes: Sequence[Facts], expect: Expect) -> list[Facts]:
    """Captures of the job's hosts in rank order; without a list of hosts, all captures by name."""
    if not expect.hosts:
        return sorted(nodes, key=lambda f: f.host)
    by_name = {facts.host: facts for facts in nodes}
    return [by_name[name] for h in expect.hosts if (name := h.split(".")[0]) in by_name]


def table(faults: Sequence[Fault], nodes: int) -> str:
    """What the operator reads."""
    if not faults:
        return f"preflight: {nodes} nodes, no fault"
    fatal = sum(f.fatal for f in faults)
    head = f"preflight: {nodes} nodes, {fatal} faults, {len(faults) - fatal} warnings"
    return "\n".join([head, *(f.line() for f in faults)])
