"""Captures of healthy nodes to break: a GB200 tray, made from a real `nvidia-smi -q` with another name and fabric."""

from __future__ import annotations

import json
from pathlib import Path

from fp4dist import env
from fp4dist.cluster.checks.expect import Expect
from fp4dist.cluster.environment import settings, signed
from fp4dist.cluster.facts import Facts
from fp4dist.cluster.topology import load_topology
from fp4dist.spec.cluster import Layout

CAPTURES = Path(__file__).with_name("captures")
GB200 = load_topology("gb200_nvl72")
RACK = "5b1f9a2e-7c3d-4e8f-9a10-2b3c4d5e6f70"
DRIVER = "580.159.04"
VARIABLES = signed(settings(GB200, Layout(tp=4, pp=8, vpp=8, cp=2)))
VERSIONS = {"python": "3.12.3", "torch": "2.12.0+cu130", "cuda": "13.0", "nccl": "2.29.3", "megatron-core": "0.19.2",
            "deepspeed": "0.19.8", "fp4dist": "0.1.0", "triton": "3.6.0"}  # fmt: skip
NODE = {"arch": "aarch64", "kernel": "6.8.0-1024-nvidia-64k", "page_size": 65536, "cpu_numa_nodes": 2, "cores": 144,
        "memlock_kb": -1}  # fmt: skip
RUN = {"cwd_free_gb": 5000.0, "config_hash": "0123456789abcdef", "data": {"data/books": 10**9}, "dtype": "bf16",
       "engine": {"kind": "megatron", "zero_stage": 1, "deepspeed": {}}, "prepares": False}  # fmt: skip


def recorded(name: str) -> Facts:
    """A capture from a real machine."""
    return Facts(name, {f.stem: f.read_text(encoding="utf-8") for f in (CAPTURES / name).glob("*.txt")})


def smi(gpus: int = 4, uuid: str = RACK, clique: str = "32766") -> str:
    """`nvidia-smi -q` of a tray: the recorded text once a GPU, with a fabric that is up."""
    head, _, body = recorded("h100").texts["nvidia-smi"].partition("GPU 00000000:00:06.0\n")
    fabric = body[body.index("    Fabric\n") :]
    up = fabric
    for key, value in (("State", "Completed"), ("Status", "Success"), ("CliqueId", clique), ("ClusterUUID", uuid)):
        up = set_value(up, key, value)
    for key, value in (("Summary", "Healthy"), ("Bandwidth", "Full"), ("Route Recovery in progress", "False"),
                       ("Route Unhealthy", "False"), ("Access Timeout Recovery", "False"),
                       ("Incorrect Configuration", "None")):  # fmt: skip
        up = set_value(up, key, value)
    body = body.replace(fabric, up).replace("NVIDIA H100 80GB HBM3", "NVIDIA GB200")
    return head + "\n".join(f"GPU 0000000{i}:01:00.0\n{body}" for i in range(gpus))


def set_value(text: str, key: str, value: str, count: int = 1) -> str:
    """Give the first `count` lines `key : ...` another value."""
    lines = text.split("\n")
    hits = [i for i, line in enumerate(lines) if line.split(" :")[0].strip() == key and " :" in line]
    assert hits, f"no line {key!r} in the capture"
    for i in hits[:count]:
        lines[i] = lines[i][: lines[i].index(" :") + 2] + " " + value
    return "\n".join(lines)


def imex(hosts: list[str], status: str = "UP") -> dict[str, object]:
    """`nvidia-imex-ctl -N -j` of a domain in order."""
    links = {str(i): {"host": h, "status": "CONNECTED", "changed": False} for i, h in enumerate(hosts)}
    peers = {
        str(i): {"status": "READY", "host": f"10.0.0.{i}", "hostName": h, "connections": links, "version": DRIVER}
        for i, h in enumerate(hosts)
    }
    return {"nodes": peers, "timestamp": "11/22/2026 00:00:00", "status": status}


def ibstat(nics: int = 4, rate: int = 400) -> str:
    port = "\tCA type: MT4129\n\tPort 1:\n\t\tState: Active\n\t\tPhysical state: LinkUp\n\t\tRate: {rate}\n"
    return "".join(f"CA 'mlx5_{i}'\n{port.format(rate=rate)}" for i in range(nics))


def topo(gpus: int = 4) -> str:
    header = "\t" + "\t".join([f"GPU{i}" for i in range(gpus)] + [f"NIC{i}" for i in range(gpus)])
    rows = []
    for i in range(gpus):
        near = ["NODE" if i // 2 == j // 2 else "SYS" for j in range(gpus)]
        rows.append("\t".join([f"GPU{i}", *("X" if i == j else "NV18" for j in range(gpus)), *near]))
    return "\n".join([header, *rows]) + "\n"


def tray(host: str, hosts: list[str], **changed: str | None) -> Facts:
    """A healthy GB200 tray; `changed` replaces probes (underscores for dashes), None removes one."""
    texts: dict[str, str | None] = {
        "nvidia-smi": smi(),
        "topo": topo(),
        "imex": json.dumps(imex(hosts)),
        "imex-version": f"IMEX version is: {DRIVER}\n",
        "imex-unit": "ActiveState=active\nUnitFileState=enabled\n",
        "imex-nodes": "\n".join(f"10.0.0.{i}" for i in range(len(hosts))) + "\n",
        "imex-channels": "channel0 rw\n",
        "devices": recorded("h100").texts["devices"],
        "modules": "nvidia_peermem 16384 0 - Live\nnvidia 14299136 - - Live\n",
        "ibstat": ibstat(),
        "chrony": "System time     : 0.000012 seconds fast of NTP time\nLeap status     : Normal\n",
        "memory": "MemTotal: 1700000000 kB\nHugePages_Total: 0\nHugepagesize: 524288 kB\n",
        "xid": "",
        "versions": json.dumps(VERSIONS),
        "node": json.dumps(NODE),
        "environment": json.dumps({k: v for k, v in VARIABLES.items() if k.startswith(env.MANAGED)}),
        "run": json.dumps(RUN),
    }
    texts |= {key.replace("_", "-"): value for key, value in changed.items()}
    return Facts(host, {key: value for key, value in texts.items() if value is not None})


HOSTS = [f"gb-r01-t{i:02d}" for i in range(1, 5)]


def expect(**changed: object) -> Expect:
    """Four trays of one rack."""
    fields: dict[str, object] = {"topology": GB200, "gpus_per_node": 4, "segment": 4, "hosts": tuple(HOSTS)}
    return Expect(**{**fields, **changed})  # type: ignore[arg-type]
