"""What preflight reports: one line a fault, and an exit code for each class of faults."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple


class FaultClass(IntEnum):
    """The process's exit code; 20 to 25 are those of the project's specification."""

    FABRIC = 20  # NVLink: state, cliques, health, silent fallback
    IMEX = 21  # daemons and channels that map memory across nodes
    ENVIRONMENT = 22  # variables that differ between ranks, or contradict each other
    TOPOLOGY = 23  # hosts, their order, segments, devices of a node
    SETTINGS = 24  # combinations of options that are known to give wrong numbers or nothing
    VERSION = 25  # driver, CUDA, NCCL, torch, IMEX
    GPU = 26  # ECC, Xid, remapped rows, clocks, power, leftovers
    NETWORK = 27  # NICs, rails, GPUDirect
    STORAGE = 28  # shared folder, space, data, configuration
    HOST = 29  # architecture, page size, NUMA, locked memory, clock
    BANDWIDTH = 30  # collectives below what the links should give


# What to repair first: later classes often follow from earlier ones.
_FIRST = (
    FaultClass.HOST,
    FaultClass.VERSION,
    FaultClass.TOPOLOGY,
    FaultClass.GPU,
    FaultClass.FABRIC,
    FaultClass.IMEX,
    FaultClass.NETWORK,
    FaultClass.STORAGE,
    FaultClass.ENVIRONMENT,
    FaultClass.SETTINGS,
    FaultClass.BANDWIDTH,
)


class Fault(NamedTuple):
    """One thing that is wrong, where, and the way out."""

    kind: FaultClass
    where: str  # host, and GPU, NIC or file
    what: str
    found: str
    expected: str
    fix: str
    fatal: bool = True  # otherwise the run may start

    def line(self) -> str:
        """The fault in one line."""
        mark = "" if self.fatal else " (warning)"
        return (
            f"{int(self.kind)} {self.kind.name.lower()}{mark}: {self.where}: {self.what}: found {self.found}, expected"
            f" {self.expected}; fix: {self.fix}"
        )


def exit_code(faults: Iterable[Fault]) -> int:
    """0 without a fatal fault, else the class to repair first."""
    kinds = {fault.kind for fault in faults if fault.fatal}
    return int(min(kinds, key=_FIRST.index)) if kinds else 0


def merge(faults: Iterable[Fault]) -> list[Fault]:
    """Equal faults of many places become one line that names the first places; fatal ones come first."""
    groups: dict[tuple[object, ...], list[Fault]] = {}
    for fault in faults:
        key = (fault.kind, fault.what, fault.found, fault.expected, fault.fix, fault.fatal)
        groups.setdefault(key, []).append(fault)
    merged = [same[0]._replace(where=_places([f.where for f in same])) for same in groups.values()]
    return sorted(merged, key=lambda f: (not f.fatal, _FIRST.index(f.kind)))


def _places(where: list[str]) -> str:
    shown = ", ".join(where[:3])
    return shown if len(where) <= 3 else f"{shown} and {len(where) - 3} more"
