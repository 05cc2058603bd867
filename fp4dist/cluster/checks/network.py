"""NICs, their rails, and the way between them and the GPUs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from fp4dist.cluster.checks.expect import Expect
from fp4dist.cluster.facts import Facts
from fp4dist.cluster.faults import Fault, FaultClass

_NEAR = {"PIX", "PXB", "PHB", "NODE"}  # of nvidia-smi topo: within a NUMA node; SYS crosses sockets
_DMABUF_KERNEL = (5, 12)


class Nic(NamedTuple):
    """One port of ibstat."""

    name: str
    state: str
    rate_gb: float  # Gbit/s


def node(facts: Facts, expect: Expect) -> Iterator[Fault]:
    """One node's NICs."""
    if not expect.gpu or not expect.topology.host.nics:
        return
    multinode = len(expect.hosts) > 1
    nics = ports(facts.texts.get("ibstat", ""))
    if not facts.has("ibstat"):
        if multinode:
            yield _fault(facts.host, "ibstat", "no such command", "NICs", "install infiniband-diags", fatal=False)
        return
    wanted = expect.topology.across.gb_per_s * 8
    fast = [n for n in nics if n.rate_gb >= 0.9 * wanted or n.state != "Active"]
    active = [n for n in fast if n.state == "Active"]
    if len(active) < expect.topology.host.nics:
        down = ", ".join(f"{n.name} {n.state}" for n in fast if n.state != "Active") or "none down, too few or too slow"
        fix = "look at cable, switch port and subnet manager; a rank without its NIC halves its neighbour's rate"
        yield _fault(
            facts.host,
            f"active NICs of {wanted:.0f} Gb/s",
            f"{len(active)} ({down})",
            str(expect.topology.host.nics),
            fix,
            fatal=multinode,
        )
    yield from _rails(facts, expect)
    yield from _direct(facts, multinode=multinode)


def ports(text: str) -> list[Nic]:
    """What `ibstat` lists; Ethernet ports without RDMA are not there."""
    found = []
    for block in re.split(r"^CA '", text, flags=re.MULTILINE)[1:]:
        name = block.split("'")[0]
        state = re.search(r"^\s*State: (\w+)", block, re.MULTILINE)
        rate = re.search(r"^\s*Rate: (\d+)", block, re.MULTILINE)
        found.append(Nic(name, state[1] if state else "unknown", float(rate[1]) if rate else 0.0))
    return found


def near(topo: str) -> dict[str, set[str]]:
    """GPU -> NICs of its NUMA node, from the matrix of `nvidia-smi topo -m`."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in topo.splitlines()]
    header = next((line.split() for line in lines if "GPU0" in line and not line.startswith("GPU0")), [])
    matrix: dict[str, set[str]] = {}
    for line in lines:
        words = line.split()
        if words and re.fullmatch(r"GPU\d+", words[0]):
            cells = dict(zip(header, words[1:], strict=False))
            matrix[words[0]] = {n for n, how in cells.items() if n.startswith("NIC") and how in _NEAR}
    return matrix


def _rails(facts: Facts, expect: Expect) -> Iterator[Fault]:
    """Each GPU needs a NIC of its own near it: GPU i of every node then talks over rail i."""
    matrix = near(facts.texts.get("topo", ""))
    if not matrix or not any(matrix.values()):
        return
    far = [gpu for gpu, nics in matrix.items() if not nics]
    if far and len(expect.hosts) > 1:
        fix = "check the PCIe slots of the NICs; or plan with fewer NICs (topology: host.nics)"
        yield _fault(facts.host, "GPUs without a NIC on their NUMA node", ", ".join(far), "none", fix)


def _direct(facts: Facts, *, multinode: bool) -> Iterator[Fault]:
    """GPUDirect RDMA: nvidia_peermem, or a kernel with dma-buf and the open driver."""
    kernel = [int(n) for n in re.findall(r"\d+", str(facts.node.get("kernel", "0.0")))[:2]]
    peermem = "nvidia_peermem" in facts.texts.get("modules", "")
    open_driver = any("Open" in str(g.get("Product Architecture", "")) for g in facts.gpus)
    if not peermem and not open_driver and tuple(kernel) < _DMABUF_KERNEL:
        fix = "modprobe nvidia_peermem, or a kernel from 5.12 on with the open driver (dma-buf)"
        what = "GPUDirect RDMA"
        yield _fault(facts.host, what, "neither nvidia_peermem nor dma-buf", "one of them", fix, fatal=multinode)


def _fault(where: str, what: str, found: str, expected: str, fix: str, *, fatal: bool = True) -> Fault:
    return Fault(FaultClass.NETWORK, where, what, found, expected, fix, fatal)
