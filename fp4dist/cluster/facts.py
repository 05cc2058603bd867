"""What one node says about itself: outputs of its own tools, kept as text, and readers for them.

A capture is a folder with one text file a probe, so that it can be looked at, sent in and replayed without the node.
A probe that the node does not have leaves no file; checks decide whether that matters.
"""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fp4dist import env
from fp4dist.errors import ConfigError, Fp4DistError
from fp4dist.spec.load import config_hash, load_run

_LIMIT_S = 60
_POLL_S = 5.0
_VERSIONS = """
import json, sys
from importlib import metadata
found = {"python": sys.version.split()[0]}
for name in ("fp4dist", "megatron-core", "deepspeed", "triton", "transformer-engine"):
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
import torch
found["torch"] = torch.__version__
if torch.version.cuda:
    found["cuda"] = torch.version.cuda
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
print(json.dumps(found))
"""
COMMANDS: Mapping[str, tuple[str, ...]] = {
    "nvidia-smi": ("nvidia-smi", "-q"),
    "topo": ("nvidia-smi", "topo", "-m"),
    "imex": ("nvidia-imex-ctl", "-N", "-j"),
    "imex-version": ("nvidia-imex", "--version"),
    "imex-unit": ("systemctl", "show", "nvidia-imex", "--property=ActiveState,UnitFileState"),
    "ibstat": ("ibstat",),
    "chrony": ("chronyc", "tracking"),
    "xid": ("sh", "-c", "dmesg 2>/dev/null | grep -F 'NVRM: Xid' | tail -n 20"),
    "versions": (sys.executable, "-c", _VERSIONS),
}
FILES: Mapping[str, str] = {
    "imex-nodes": "/etc/nvidia-imex/nodes_config.cfg",
    "imex-config": "/etc/nvidia-imex/config.cfg",
    "devices": "/proc/devices",
    "modules": "/proc/modules",
    "memory": "/proc/meminfo",
}
_CHANNELS = Path("/dev/nvidia-caps-imex-channels")


@dataclass(frozen=True)
class Facts:
    """One node: probe name -> what it printed."""

    host: str
    texts: Mapping[str, str]

    def has(self, probe: str) -> bool:
        """Whether the node answered this probe."""
        return bool(self.texts.get(probe, "").strip())

    @cached_property
    def gpus(self) -> list[dict[str, Any]]:
        """Nested sections of `nvidia-smi -q`, one mapping a GPU; empty without a driver."""
        return list(smi(self.texts.get("nvidia-smi", "")).get("GPU", {}).values())

    @cached_property
    def driver(self) -> dict[str, Any]:
        """What `nvidia-smi -q` says of the driver."""
        return smi(self.texts.get("nvidia-smi", ""))

    @cached_property
    def imex(self) -> dict[str, Any]:
        """`nvidia-imex-ctl -N -j`; empty where it is missing or no JSON."""
        return _json(self.texts.get("imex", ""))

    @cached_property
    def versions(self) -> dict[str, str]:
        """Package -> version."""
        return _json(self.texts.get("versions", ""))

    @cached_property
    def node(self) -> dict[str, Any]:
        """Architecture, page size and the like."""
        return _json(self.texts.get("node", ""))

    @cached_property
    def environment(self) -> dict[str, str]:
        """Managed variables of the process that collected."""
        return _json(self.texts.get("environment", ""))

    @cached_property
    def run(self) -> dict[str, Any]:
        """Hash of the configuration, data files, free space."""
        return _json(self.texts.get("run", ""))


def clique(gpu: Mapping[str, Any]) -> tuple[str, str]:
    """(ClusterUUID, CliqueId) of a GPU: only the pair names a NVLink partition, clique numbers repeat."""
    fabric = gpu.get("Fabric", {})
    return str(fabric.get("ClusterUUID", "N/A")), str(fabric.get("CliqueId", "N/A"))


# -- collecting


def collect(config: str | None = None, overrides: tuple[str, ...] = ()) -> Facts:
    """Ask this node everything; takes seconds, changes nothing."""
    texts = {name: text for name, command in COMMANDS.items() if (text := _output(command)) is not None}
    texts |= {name: text for name, path in FILES.items() if (text := _content(Path(path))) is not None}
    if (channels := _channels()) is not None:
        texts["imex-channels"] = channels
    texts["node"] = json.dumps(_node())
    texts["environment"] = json.dumps(env.managed())
    texts["run"] = json.dumps(_run(config, overrides))
    return Facts(socket.gethostname().split(".")[0], texts)


def wait_for_imex(limit_s: float) -> None:
    """Return when this node's IMEX domain is UP, when there is no IMEX here, or after `limit_s` seconds.

    Daemons report that they have started before their peers connect, so a job may begin before its domain is there.
    """
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        said = _output(COMMANDS["imex"])
        if said is None or _json(said).get("status") == "UP":
            return
        time.sleep(_POLL_S)


def save(facts: Facts, folder: Path) -> None:
    """Write a capture to folder/host/."""
    place = folder / facts.host
    place.mkdir(parents=True, exist_ok=True)
    for name, text in facts.texts.items():
        (place / f"{name}.txt").write_text(text, encoding="utf-8")


def load(folder: Path) -> list[Facts]:
    """All captures of a folder, sorted by host."""
    if not folder.is_dir():
        raise ConfigError(f"preflight: {folder} is not a folder of captures; write some with --collect {folder}")
    return [
        Facts(place.name, {f.stem: f.read_text(encoding="utf-8", errors="replace") for f in place.glob("*.txt")})
        for place in sorted(p for p in folder.iterdir() if p.is_dir())
    ]


def _output(command: tuple[str, ...]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"no answer in {_LIMIT_S} s\n"
    return done.stdout or done.stderr


def _content(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _channels() -> str | None:
    """Every channel and whether this process may use it, one a line."""
    if not _CHANNELS.is_dir():
        return None
    nodes = sorted(_CHANNELS.iterdir())
    return "".join(f"{n.name} {'rw' if os.access(n, os.R_OK | os.W_OK) else 'denied'}\n" for n in nodes)


def _node() -> dict[str, Any]:
    numa = [p for p in Path("/sys/devices/system/node").glob("node[0-9]*") if (_content(p / "cpulist") or "").strip()]
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return {
        "arch": platform.machine(),
        "kernel": platform.release(),
        "page_size": os.sysconf("SC_PAGE_SIZE"),
        "cpu_numa_nodes": len(numa),
        "cores": env.cores(),
        "memlock_kb": -1 if soft == resource.RLIM_INFINITY else soft // 1024,
    }


def _run(config: str | None, overrides: tuple[str, ...]) -> dict[str, Any]:
    """What this node sees of the run: its configuration, its data, the space of its folder."""
    found: dict[str, Any] = {"cwd_free_gb": shutil.disk_usage(".").free / 1e9}
    if config is None:
        return found
    try:
        run = load_run(config, overrides)
    except (Fp4DistError, OSError) as e:
        return {**found, "config_error": str(e)}
    prefixes = [p for p in (*run.data.train, *run.data.valid) if not p.replace(".", "", 1).isdigit()]
    found["config_hash"] = config_hash(run)
    found["data"] = {p: _size(Path(f"{p}.bin")) for p in prefixes}
    found["prepares"] = run.data.prepare is not None
    found["engine"] = {"kind": run.engine.kind, "zero_stage": run.engine.zero_stage, "deepspeed": run.engine.deepspeed}
    found["dtype"] = run.train.dtype
    return found


def _size(path: Path) -> int:
    """Bytes, -1 where there is no file."""
    return path.stat().st_size if path.is_file() else -1


# -- reading


def smi(text: str) -> dict[str, Any]:
    """The indented text of `nvidia-smi -q` as nested mappings; GPUs under `GPU`, by their bus address."""
    top: dict[str, Any] = {}
    stack: list[tuple[int, dict[str, Any]]] = [(-1, top)]
    for line in text.splitlines():
        if not line.strip() or line.startswith("="):
            continue
        indent = len(line) - len(line.lstrip())
        while stack[-1][0] >= indent:
            stack.pop()
        key, colon, value = _split(line.strip())
        if colon:
            stack[-1][1][key] = value
            continue
        parent = top.setdefault("GPU", {}) if indent == 0 and key.startswith("GPU ") else stack[-1][1]
        section: dict[str, Any] = parent.setdefault(key, {})
        stack.append((indent, section if isinstance(section, dict) else {}))
    return top


def _split(line: str) -> tuple[str, bool, str]:
    """key, whether it has a value, value: `Key   : value`; a bus address is a section's name."""
    found = re.match(r"^(.*?)\s+:(?:\s+(.*))?$", line)
    return (found[1], True, (found[2] or "").strip()) if found else (line, False, "")


def _json(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return data if isinstance(data, dict) else {}


def number(text: str) -> float | None:
    """The number that a value such as `1980 MHz` or `700.00 W` begins with; None for N/A."""
    found = re.match(r"^-?\d+(\.\d+)?", text.strip())
    return float(found[0]) if found else None
