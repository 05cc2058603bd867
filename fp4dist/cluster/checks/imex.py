"""IMEX: the daemon of every node, the domain that they form, and the channel device that maps memory across nodes.

The unit's state says little: with its default quorum a daemon reports started before its peers connect.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from fp4dist.cluster.checks.expect import Expect
from fp4dist.cluster.facts import Facts
from fp4dist.cluster.faults import Fault, FaultClass

_LARGEST = 18  # nodes of an IMEX domain
_START = "systemctl restart nvidia-imex on every node of the rack, then nvidia-imex-ctl -N until UP"


def node(facts: Facts, expect: Expect) -> Iterator[Fault]:
    """One node's daemon, its view of the domain, and the channel."""
    if not expect.mnnvl or expect.allow_degraded:
        return
    yield from _unit(facts, expect)
    if not expect.kubernetes:
        yield from _domain(facts, expect)
    yield from _channel(facts, expect)
    yield from _version(facts)


def _unit(facts: Facts, expect: Expect) -> Iterator[Fault]:
    text = facts.texts.get("imex-unit", "")
    active = "ActiveState=active" in text
    if expect.kubernetes and (active or "UnitFileState=enabled" in text):
        yield _fault(
            facts.host,
            "the node's own nvidia-imex unit beside a ComputeDomain",
            " ".join(text.split()),
            "inactive and masked",
            "systemctl disable --now nvidia-imex && systemctl mask nvidia-imex",
        )
    if not expect.kubernetes and text and not active:
        yield _fault(facts.host, "unit nvidia-imex", " ".join(text.split()), "ActiveState=active", _START)


def _domain(facts: Facts, expect: Expect) -> Iterator[Fault]:
    if not facts.imex:
        said = facts.texts.get("imex", "").strip().splitlines()
        yield _fault(
            facts.host, "nvidia-imex-ctl -N", said[0] if said else "no such command", "a domain that is UP", _START
        )
        return
    peers: dict[str, Any] = facts.imex.get("nodes", {})
    waiting = [str(p.get("hostName") or p.get("host")) for p in peers.values() if p.get("status") != "READY"]
    status = str(facts.imex.get("status"))
    if status != "UP" or waiting:
        names = f", not READY: {', '.join(islice(waiting, 4))}" if waiting else ""
        yield _fault(facts.host, "IMEX domain", f"{status}{names}", "UP, every node READY", _START)
    if len(peers) > _LARGEST:
        fix = "one nodes_config.cfg a rack: list only its own nodes"
        yield _fault(facts.host, "nodes of the IMEX domain", str(len(peers)), f"at most {_LARGEST}", fix)
    elif peers and len(peers) < expect.segment:
        fix = "list every node of the rack in nodes_config.cfg, the same on all of them, and restart"
        yield _fault(facts.host, "nodes of the IMEX domain", str(len(peers)), f"at least {expect.segment}", fix)
    yield from _connections(facts, peers)


def _connections(facts: Facts, peers: dict[str, Any]) -> Iterator[Fault]:
    """This node's own row of the matrix; what it says of others' rows is made from the configuration."""
    for peer in peers.values():
        if facts.host not in (str(peer.get("hostName", "")).split(".")[0], str(peer.get("host"))):
            continue
        links = peer.get("connections", {}).values()
        lost = [str(link.get("host")) for link in links if link.get("status") != "CONNECTED"]
        if lost:
            fix = "open the IMEX ports (50000, 50005) between these nodes and restart nvidia-imex there"
            yield _fault(facts.host, "IMEX connections", f"not CONNECTED: {', '.join(lost[:4])}", "all CONNECTED", fix)


def _channel(facts: Facts, expect: Expect) -> Iterator[Fault]:
    registered = "nvidia-caps-imex-channels" in facts.texts.get("devices", "")
    if facts.has("devices") and not registered:
        fix = "load the driver with IMEX support (modprobe nvidia; /proc/devices must list nvidia-caps-imex-channels)"
        yield _fault(facts.host, "kernel device nvidia-caps-imex-channels", "not registered", "registered", fix)
        return
    lines = facts.texts.get("imex-channels", "").split("\n")
    channels = [line.split() for line in lines if line.strip()]
    way = (
        "claim the ComputeDomain's channel in the pod (resourceClaims)"
        if expect.kubernetes
        else "SwitchType=switch/nvidia_imex in slurm.conf, or nvidia-modprobe -i 0; pass it into the container"
    )
    if not channels:
        yield _fault(facts.host, "/dev/nvidia-caps-imex-channels/channelN", "none", "one channel", way)
    elif all(access == "denied" for _, access in channels):
        fix = "chmod 666 on the channel, or give the job's user access to it"
        yield _fault(facts.host, f"/dev/nvidia-caps-imex-channels/{channels[0][0]}", "no permission", "rw", fix)


def _version(facts: Facts) -> Iterator[Fault]:
    """The daemon must come from the driver's release."""
    found = re.search(r"\d+\.\d+(\.\d+)?", facts.texts.get("imex-version", ""))
    driver = str(facts.driver.get("Driver Version", ""))
    if found and driver and found[0].split(".")[0] != driver.split(".")[0]:
        yield Fault(
            FaultClass.VERSION,
            facts.host,
            "nvidia-imex and the driver",
            f"{found[0]} and {driver}",
            "one release",
            f"install nvidia-imex of release {driver.split('.')[0]} and restart it",
        )


def domain(nodes: Sequence[Facts], expect: Expect) -> Iterator[Fault]:
    """Over nodes of a segment: the same list of peers in the same order, and the same channel."""
    if not expect.mnnvl or expect.allow_degraded or expect.kubernetes:
        return
    for first in range(0, len(nodes), expect.segment):
        group = nodes[first : first + expect.segment]
        lists = {facts.host: _peers(facts) for facts in group if facts.has("imex-nodes")}
        for host, peers in lists.items():
            reference, theirs = next(iter(lists.items()))
            if peers != theirs:
                differs = "another order" if sorted(peers) == sorted(theirs) else "other nodes"
                fix = "copy one nodes_config.cfg to every node of the rack and restart nvidia-imex on all of them"
                yield _fault(host, "/etc/nvidia-imex/nodes_config.cfg", differs, f"the list of {reference}", fix)
        yield from _channels(group)


def _peers(facts: Facts) -> list[str]:
    lines = facts.texts["imex-nodes"].splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _channels(group: Sequence[Facts]) -> Iterator[Fault]:
    open_to = {
        f.host: {w.split()[0] for w in f.texts.get("imex-channels", "").splitlines() if w.endswith("rw")} for f in group
    }
    seen = [channels for channels in open_to.values() if channels]
    if seen and not set.intersection(*seen):
        told = "; ".join(f"{host}: {', '.join(sorted(channels))}" for host, channels in islice(open_to.items(), 3))
        fix = "one channel for the job on all nodes (switch/nvidia_imex gives it); remove stale devices"
        yield _fault(group[0].host, "IMEX channel of the job", told, "the same channel on every node", fix)


def _fault(where: str, what: str, found: str, expected: str, fix: str) -> Fault:
    return Fault(FaultClass.IMEX, where, what, found, expected, fix)
