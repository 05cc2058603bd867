"""The node beside its GPUs: processor, pages, NUMA, locked memory, clock."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from fp4dist.cluster.checks.expect import Expect
from fp4dist.cluster.facts import Facts, number
from fp4dist.cluster.faults import Fault, FaultClass

_CLOCK_S = 0.1  # between nodes: logs are ordered by it, tickets of Kerberos and TLS allow minutes
_MEMLOCK_KB = 64 * 1024  # the usual default, on which registering RDMA memory fails


def node(facts: Facts, expect: Expect) -> Iterator[Fault]:
    """One node."""
    have, host = facts.node, facts.host
    if not have:
        yield _fault(host, "facts of the node", "none", "node.txt", "collect again with this version of fp4dist")
        return
    if have.get("arch") != expect.topology.host.arch:
        fix = f"topology {expect.topology.name} has other hosts; wheels and images are per architecture"
        fatal = expect.gpu
        yield _fault(host, "architecture", str(have.get("arch")), expect.topology.host.arch, fix, fatal=fatal)
    if not expect.gpu:
        return
    sockets = -(-expect.topology.host.gpus // expect.topology.host.gpus_per_numa)
    if 0 < int(have.get("cpu_numa_nodes", 0)) < sockets:
        found, fix = (
            str(have["cpu_numa_nodes"]),
            "NPS1 and sub-NUMA off in the firmware; give containers all processors",
        )
        yield _fault(host, "NUMA nodes with processors", found, f"{sockets}", fix, fatal=False)
    memlock = int(have.get("memlock_kb", -1))
    if 0 <= memlock <= _MEMLOCK_KB and len(expect.hosts) > 1:
        fix = "ulimit -l unlimited (limits.conf, slurmd's LimitMEMLOCK, IPC_LOCK in a pod)"
        yield _fault(host, "locked memory", f"{memlock} kB", "unlimited: RDMA pins buffers", fix)
    yield from _pages(facts)
    yield from _clock(facts)


def _pages(facts: Facts) -> Iterator[Fault]:
    """Reserved huge pages are memory that nobody here uses."""
    text = facts.texts.get("memory", "")
    total = re.search(r"^MemTotal:\s+(\d+)", text, re.MULTILINE)
    huge = re.search(r"^HugePages_Total:\s+(\d+)", text, re.MULTILINE)
    size = re.search(r"^Hugepagesize:\s+(\d+)", text, re.MULTILINE)
    if total and huge and size and int(huge[1]) * int(size[1]) > 0.1 * int(total[1]):
        share = 100 * int(huge[1]) * int(size[1]) // int(total[1])
        fix = "sysctl vm.nr_hugepages=0: nothing here uses them"
        yield _fault(facts.host, "memory reserved as huge pages", f"{share} %", "below 10 %", fix, fatal=False)


def _clock(facts: Facts) -> Iterator[Fault]:
    text = facts.texts.get("chrony", "")
    found = re.search(r"^System time\s*:\s*(\S+) seconds", text, re.MULTILINE)
    offset = number(found[1]) if found else None
    if offset is not None and abs(offset) > _CLOCK_S:
        yield _fault(facts.host, "clock", f"{offset:.3f} s off", f"within {_CLOCK_S} s", "chronyc makestep")
    if "Not synchronised" in text:
        fix = "systemctl enable --now chronyd, with the site's servers"
        yield _fault(facts.host, "clock", "not synchronised", "NTP", fix, fatal=False)


def same(nodes: Sequence[Facts], expect: Expect) -> Iterator[Fault]:
    """Page size and kernel of all nodes."""
    for key, what in (("page_size", "page size"), ("kernel", "kernel")):
        values: dict[str, str] = {}
        for facts in nodes:
            values.setdefault(str(facts.node.get(key, "unknown")), facts.host)
        if len(values) > 1:
            told = ", ".join(f"{value} on {host}" for value, host in values.items())
            fix = "one image on all nodes; a page size of 4 KiB and one of 64 KiB behave differently on Grace"
            yield _fault("all nodes", what, told, "one", fix, fatal=key == "page_size")


def _fault(where: str, what: str, found: str, expected: str, fix: str, *, fatal: bool = True) -> Fault:
    return Fault(FaultClass.HOST, where, what, found, expected, fix, fatal)
