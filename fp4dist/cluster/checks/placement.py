"""Hosts of the job: all there, once, in an order in which a rack's nodes follow each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fp4dist.cluster.checks.expect import Expect
from fp4dist.cluster.facts import Facts
from fp4dist.cluster.faults import Fault, FaultClass
from fp4dist.cluster.hostlist import natural


def hosts(nodes: Sequence[Facts], expect: Expect) -> Iterator[Fault]:
    """Captures against the list of hosts."""
    if not nodes:
        fix = "run `preflight --collect` on every node, into a folder that all of them share"
        yield Fault(FaultClass.STORAGE, "captures", "nodes that wrote one", "0", "every node", fix)
        return
    wanted = list(expect.hosts)
    if not wanted:
        return
    have = {facts.host for facts in nodes}
    missing = [host for host in wanted if host.split(".")[0] not in have]
    if missing:
        told = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        fix = "is the folder on a file system that these nodes share? did they boot? run --collect there by hand"
        yield Fault(FaultClass.STORAGE, told, "facts in the shared folder", "none", "one capture a host", fix)
    if len(set(wanted)) < len(wanted):
        twice = sorted({h for h in wanted if wanted.count(h) > 1})
        yield _fault("host list", "hosts given twice", ", ".join(twice), "every host once", "remove the repetition")
    if len(wanted) % expect.segment:
        fix = f"ask for a multiple of {expect.segment} nodes; with another number Slurm's segments become small"
        yield _fault("host list", "hosts", str(len(wanted)), f"a multiple of the segment {expect.segment}", fix)
    if expect.mnnvl and wanted != sorted(wanted, key=natural):
        first = next(a for a, b in zip(wanted, sorted(wanted, key=natural), strict=True) if a != b)
        fix = "scontrol show hostnames | sort -V, and srun --distribution=arbitrary with that SLURM_HOSTFILE"
        yield _fault("host list", "order", f"not sorted from {first} on", "sorted, rack after rack", fix, fatal=False)


def _fault(where: str, what: str, found: str, expected: str, fix: str, *, fatal: bool = True) -> Fault:
    return Fault(FaultClass.TOPOLOGY, where, what, found, expected, fix, fatal)
