"""GPUs: number and kind, errors, throttling, leftovers of other jobs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from fp4dist.cluster.checks.expect import Expect
from fp4dist.cluster.facts import Facts, number
from fp4dist.cluster.faults import Fault, FaultClass

# Xid errors after which a GPU must be reset or replaced (NVIDIA's Xid catalogue); 13, 31 and 43 are a program's own.
_XIDS = {48, 62, 63, 64, 74, 79, 92, 94, 95, 109, 110, 119, 120, 121, 136, 140, 143, 145, 149, 154, 155, 156}
_XID = re.compile(r"NVRM: Xid \(([^)]*)\): (\d+)")
_SLOW = ("HW Slowdown", "HW Thermal Slowdown", "HW Power Brake Slowdown", "SW Thermal Slowdown")
_USED_MB = 2000  # memory of an idle GPU: driver and persistence daemon
_POWER = 0.95  # of the default limit


def node(facts: Facts, expect: Expect) -> Iterator[Fault]:
    """All GPUs of one node."""
    if not expect.gpu:
        return
    if not facts.gpus:
        said = facts.texts.get("nvidia-smi", "no such command").strip().splitlines()[:1]
        fix = "install the driver, or reboot the node if it was there"
        yield Fault(FaultClass.GPU, facts.host, "nvidia-smi", said[0] if said else "nothing", "GPUs", fix)
        return
    if len(facts.gpus) < expect.gpus_per_node:
        fix = "a GPU fell off the bus: dmesg | grep Xid, reset or reboot the node; or ask for fewer ranks a node"
        found, wanted = str(len(facts.gpus)), f"at least {expect.gpus_per_node}"
        yield Fault(FaultClass.GPU, facts.host, "GPUs", found, wanted, fix)
    for index, gpu in enumerate(facts.gpus):
        where = f"{facts.host} GPU {index}"
        yield from _kind(gpu, where, expect)
        yield from _errors(gpu, where)
        yield from _speed(gpu, where)
        yield from _leftovers(gpu, where)
    yield from _xids(facts)


def _kind(gpu: Mapping[str, Any], where: str, expect: Expect) -> Iterator[Fault]:
    name = str(gpu.get("Product Name", ""))
    if expect.topology.gpu.device not in name:
        fix = f"choose the topology of this machine, or other nodes than {expect.topology.name}'s"
        yield Fault(FaultClass.TOPOLOGY, where, "device", name or "unknown", expect.topology.gpu.device, fix)
    if str(gpu.get("MIG Mode", {}).get("Current", "")) == "Enabled":
        yield _fault(where, "MIG mode", "Enabled", "Disabled", "nvidia-smi -mig 0, then reset the GPU")


def _errors(gpu: Mapping[str, Any], where: str) -> Iterator[Fault]:
    mode = str(gpu.get("ECC Mode", {}).get("Current", "N/A"))
    if mode == "Disabled":
        yield _fault(where, "ECC", "Disabled", "Enabled", "nvidia-smi -e 1, then reboot")
    volatile = gpu.get("ECC Errors", {}).get("Volatile", {})
    for key, value in volatile.items() if isinstance(volatile, dict) else ():
        count = number(str(value)) or 0
        if "Uncorrectable" in key and count > 0:
            yield _fault(
                where, f"ECC errors, {key}", f"{count:.0f}", "0", "reset the GPU; replace it if they come back"
            )
    ecc = gpu.get("ECC Errors", {})
    flags = dict(_leaves(ecc)) if isinstance(ecc, dict) else {}
    for key in ("Channel Repair Pending", "TPC Repair Pending", "Unrepairable Memory", "SRAM Threshold Exceeded"):
        if flags.get(key) == "Yes":
            fix = "reset the GPU for a pending repair; otherwise replace it"
            yield _fault(where, key.lower(), "Yes", "No", fix)
    rows = gpu.get("Remapped Rows", {})
    if str(rows.get("Pending", "No")) == "Yes":
        yield _fault(where, "row remapping", "pending", "done", "reset the GPU so that the spare row is used")
    if str(rows.get("Remapping Failure Occurred", "No")) == "Yes":
        yield _fault(where, "row remapping", "failed", "possible", "no spare rows are left: replace the GPU")
    action = str(gpu.get("GPU Recovery Action", "None"))
    if action not in ("None", "N/A"):
        yield _fault(where, "recovery action that the driver asks for", action, "None", f"do it: {action}")


def _speed(gpu: Mapping[str, Any], where: str) -> Iterator[Fault]:
    reasons = gpu.get("Clocks Event Reasons") or gpu.get("Clocks Throttle Reasons") or {}
    flat = dict(_leaves(reasons))
    for key in _SLOW:
        if flat.get(key) == "Active":
            fix = "look at cooling and power of the tray (BMC); drain it while this lasts"
            yield _fault(where, "clocks are held down", key, "no slowdown", fix)
    power = gpu.get("GPU Power Readings", {})
    limit, default = (number(str(power.get(k, ""))) for k in ("Current Power Limit", "Default Power Limit"))
    if limit is not None and default is not None and limit < _POWER * default:
        fix = f"nvidia-smi -pl {default:.0f}, unless the site caps power: then plan with that"
        yield _fault(where, "power limit", f"{limit:.0f} W", f"{default:.0f} W", fix, fatal=False)
    parts = ("Applications Clocks", "Max Clocks")
    set_to, best = (number(str(gpu.get(part, {}).get("Graphics", ""))) for part in parts)
    if set_to is not None and best is not None and set_to < 0.8 * best:
        fix = "nvidia-smi -rac, unless the site holds clocks down: then plan with that"
        yield _fault(where, "application clock", f"{set_to:.0f} MHz", f"near {best:.0f} MHz", fix, fatal=False)
    width = gpu.get("PCI", {}).get("GPU Link Info", {}).get("Link Width", {})
    if number(str(width.get("Current", ""))) != number(str(width.get("Max", ""))):
        found, wanted = str(width.get("Current")), str(width.get("Max"))
        yield _fault(where, "PCIe lanes", found, wanted, "reseat or service the module", fatal=False)


def _leaves(tree: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value)
        else:
            yield key, str(value)


def _leftovers(gpu: Mapping[str, Any], where: str) -> Iterator[Fault]:
    used = number(str(gpu.get("FB Memory Usage", {}).get("Used", "")))
    if used is not None and used > _USED_MB:
        fix = "end the process that holds it (nvidia-smi, fuser -v /dev/nvidia*)"
        yield _fault(where, "memory in use before the start", f"{used:.0f} MiB", f"at most {_USED_MB} MiB", fix)


def _xids(facts: Facts) -> Iterator[Fault]:
    seen = {(bus, int(xid)) for bus, xid in _XID.findall(facts.texts.get("xid", ""))}
    for bus, xid in sorted(seen):
        if xid in _XIDS:
            fix = "look up the Xid in NVIDIA's catalogue; reset the GPU or drain the node, then clear the log"
            yield _fault(f"{facts.host} {bus}", "kernel log", f"Xid {xid}", "no such error", fix)


def _fault(where: str, what: str, found: str, expected: str, fix: str, *, fatal: bool = True) -> Fault:
    return Fault(FaultClass.GPU, where, what, found, expected, fix, fatal)
