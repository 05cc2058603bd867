"""Environment variables: the same on every node, what the launcher set, and no known mistake."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from fp4dist import env
from fp4dist.cluster.checks.expect import Expect
from fp4dist.cluster.facts import Facts
from fp4dist.cluster.faults import Fault, FaultClass


def node(facts: Facts, expect: Expect) -> Iterator[Fault]:
    """One node's variables."""
    have = facts.environment
    yield from _signature(facts.host, have)
    if not expect.gpu:
        return
    if expect.mnnvl:
        yield from _multinode(facts.host, have, expect)
    multinode = len(expect.hosts) > 1
    if have.get("NCCL_IB_DISABLE") == "1" and multinode and expect.topology.host.nics:
        yield _fault(facts.host, "NCCL_IB_DISABLE", "1", "unset: all traffic between nodes is on sockets", "unset it")
    if have.get("NCCL_P2P_DISABLE") == "1" or have.get("NCCL_SHM_DISABLE") == "1":
        names = ", ".join(n for n in ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE") if have.get(n) == "1")
        yield _fault(facts.host, names, "1", "unset: NVLink is left idle", "unset it, it is a debugging aid")
    if have.get("NCCL_ALGO") or have.get("NCCL_PROTO"):
        names = ", ".join(n for n in ("NCCL_ALGO", "NCCL_PROTO") if have.get(n))
        fix = "unset it unless it was measured on this cluster"
        yield _fault(facts.host, names, "set", "unset: NCCL chooses by size", fix, fatal=False)
    if have.get("NCCL_NVLS_ENABLE", "2") != "0" and have.get("NCCL_GRAPH_REGISTER") == "0":
        fix = "set both by the launch files: NVLS off with 0 0, on with 1 and GRAPH_REGISTER unset"
        found = have.get("NCCL_NVLS_ENABLE", "unset")
        yield _fault(facts.host, "NCCL_NVLS_ENABLE with NCCL_GRAPH_REGISTER=0", found, "0", fix, fatal=False)


def _signature(host: str, have: Mapping[str, str]) -> Iterator[Fault]:
    """Did all that the launcher set arrive?"""
    names, expected = have.get("FP4DIST_ENV_NAMES"), have.get("FP4DIST_ENV_HASH")
    if names is None or expected is None:
        return
    wanted = [n for n in names.split(",") if n.startswith(env.MANAGED)]
    missing = [n for n in wanted if n not in have]
    fix = "export it on every node: .deepspeed_env, srun --export=ALL, the container's environment"
    if missing:
        yield _fault(host, "variables of the launcher", f"{', '.join(missing)} missing", "all of them", fix)
    elif len(wanted) == len(names.split(",")) and (found := env.digest({n: have[n] for n in wanted})) != expected:
        yield _fault(host, "digest of the launcher's variables", found, expected, "look for a module that changes one")


def _multinode(host: str, have: Mapping[str, str], expect: Expect) -> Iterator[Fault]:
    mnnvl, cumem = have.get("NCCL_MNNVL_ENABLE", "2"), have.get("NCCL_CUMEM_ENABLE", "1")
    if expect.allow_degraded:
        if mnnvl != "0":
            fix = "write the launch files with --allow-degraded: mixed values inside one communicator are unsafe"
            yield _fault(host, "NCCL_MNNVL_ENABLE on a degraded fabric", mnnvl, "0 on every rank", fix)
        return
    if mnnvl == "0":
        fix = "set 1 (the launch files do), or accept the network with --allow-degraded"
        yield _fault(host, "NCCL_MNNVL_ENABLE", "0", "1: else NVLink stops at the tray", fix)
    if cumem == "0":
        fix = "unset it: without cuMem NCCL leaves multi-node NVLink out, silently"
        yield _fault(host, "NCCL_CUMEM_ENABLE", "0", "1", fix)


def same(nodes: Sequence[Facts], expect: Expect) -> Iterator[Fault]:
    """Variables that differ between nodes."""
    reference = nodes[0]
    for facts in nodes[1:]:
        ours, theirs = reference.environment, facts.environment
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                yield _fault(
                    facts.host,
                    name,
                    theirs.get(name, "unset"),
                    f"{ours.get(name, 'unset')} as on {reference.host}",
                    "export the same values on every node (the launch files do)",
                )


def _fault(where: str, what: str, found: str, expected: str, fix: str, *, fatal: bool = True) -> Fault:
    return Fault(FaultClass.ENVIRONMENT, where, what, found, expected, fix, fatal)
