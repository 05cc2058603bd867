"""Floors of versions, and that all nodes have the same ones."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from fp4dist.cluster.checks.expect import Expect
from fp4dist.cluster.facts import Facts
from fp4dist.cluster.faults import Fault, FaultClass

Version = tuple[int, ...]
# package -> (oldest, first that is too new); README's tested ranges
_RANGES: dict[str, tuple[Version, Version | None]] = {
    "python": ((3, 11), (3, 13)),
    "torch": ((2, 11), (2, 14)),
    "megatron-core": ((0, 16), (0, 21)),
}
_NCCL = (2, 27)  # knows C2C between NIC and GPU on Grace, symmetric memory; older ones fall back there
_NVLS_HANGS = ((2, 27), (2, 29))  # fall back on some ranks without a word and may hang
_DRIVER_OF_CUDA = {12: 570, 13: 580}  # release of the driver that the toolkit needs
_DRIVER_OF_GPU = {"GB200": 570, "GB300": 580, "B200": 570, "B300": 580, "H100": 535, "H200": 550}
_SHARED = ("python", "torch", "nccl", "cuda", "fp4dist", "megatron-core", "deepspeed", "triton")


def node(facts: Facts, expect: Expect) -> Iterator[Fault]:
    """One node against the floors."""
    have = facts.versions
    if not have:
        said = facts.texts.get("versions", "").strip().splitlines()[-1:]
        fix = "activate the environment of the job on every node: pip install -c constraints.txt -e ."
        yield _fault(facts.host, "python packages", said[0] if said else "nothing", "torch importable", fix)
        return
    for package, (oldest, end) in _RANGES.items():
        found = parse(have.get(package, ""))
        if found and (found < oldest or (end is not None and found >= end)):
            wanted = f"{_text(oldest)} to below {_text(end)}" if end else f"at least {_text(oldest)}"
            yield _fault(facts.host, package, have[package], wanted, "pip install -c constraints.txt -e .")
    if expect.gpu:
        yield from _nccl(facts, expect)
        yield from _driver(facts, expect)


def _nccl(facts: Facts, expect: Expect) -> Iterator[Fault]:
    text = facts.versions.get("nccl", "")
    found = parse(text)
    if not found:
        fix = "install a CUDA build of torch"
        yield _fault(facts.host, "NCCL", text or "none", f"at least {_text(_NCCL)}", fix)
    elif found < _NCCL:
        yield _fault(facts.host, "NCCL", text, f"at least {_text(_NCCL)}", "install a torch build with a newer NCCL")
    elif not expect.mnnvl and len(expect.hosts) < 2:
        return
    elif _NVLS_HANGS[0] <= found < _NVLS_HANGS[1] and facts.environment.get("NCCL_NVLS_ENABLE", "2") != "0":
        fix = "NCCL_NVLS_ENABLE=0 on every rank, or NCCL 2.29"
        yield _fault(facts.host, "NVLS with this NCCL falls back on some ranks and hangs", text, "2.29 for NVLS", fix)


def _driver(facts: Facts, expect: Expect) -> Iterator[Fault]:
    text = str(facts.driver.get("Driver Version", ""))
    found, cuda = parse(text), parse(facts.versions.get("cuda", ""))
    if not found:
        return  # checks.devices tells that there is no driver
    floors = {f"torch's CUDA {facts.versions.get('cuda')}": _DRIVER_OF_CUDA.get(cuda[0], 0) if cuda else 0}
    floors[expect.topology.gpu.device] = _DRIVER_OF_GPU.get(expect.topology.gpu.device, 0)
    for what, floor in floors.items():
        if found[0] < floor:
            fix = f"install a driver of release {floor} or newer on every node"
            yield _fault(facts.host, f"driver for {what}", text, f"at least {floor}", fix)


def same(nodes: Sequence[Facts], expect: Expect) -> Iterator[Fault]:
    """Versions that differ between nodes: NCCL then hangs at init, or ranks compute differently."""
    described = [(f.host, {**f.versions, "driver": str(f.driver.get("Driver Version", ""))}) for f in nodes]
    keys = (*_SHARED, "driver") if expect.gpu else _SHARED
    for key in keys:
        values: dict[str, str] = {}
        for host, versions in described:
            if versions.get(key):  # what a node lacks altogether is told by its own checks
                values.setdefault(versions[key], host)
        if len(values) > 1:
            told = ", ".join(f"{value} on {host}" for value, host in values.items())
            fix = "use one environment or container image on all nodes"
            yield _fault("all nodes", f"version of {key}", told, "one version", fix)


def parse(text: str) -> Version:
    """Leading numbers of a version: 2.13.0+cpu is (2, 13, 0)."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(n) for n in found[0].split(".")) if found else ()


def _text(version: Version | None) -> str:
    return ".".join(map(str, version or ()))


def _fault(where: str, what: str, found: str, expected: str, fix: str) -> Fault:
    return Fault(FaultClass.VERSION, where, what, found, expected, fix)
