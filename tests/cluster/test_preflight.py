"""Every class of faults on captures of nodes: its exit code, and a line that names place, value, rule and way out."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fp4dist.cluster import facts, preflight, preflight_command
from fp4dist.cluster.checks.expect import Expect
from fp4dist.cluster.checks.fabric import fallback
from fp4dist.cluster.facts import Facts
from fp4dist.cluster.faults import Fault, FaultClass, exit_code, merge
from fp4dist.cluster.topology import load_topology
from tests.cluster import nodes
from tests.cluster.nodes import HOSTS, RACK, expect, tray

OTHER = "99999999-7c3d-4e8f-9a10-2b3c4d5e6f70"
ZERO = "00000000-0000-0000-0000-000000000000"


def rack(**changed: str | None) -> list[Facts]:
    """Four healthy trays, the second of which has `changed` probes."""
    return [tray(h, HOSTS, **(changed if h == HOSTS[1] else {})) for h in HOSTS]


def with_gpu(key: str, value: str, count: int = 1) -> dict[str, str]:
    return {"nvidia_smi": nodes.set_value(nodes.smi(), key, value, count)}


def with_json(probe: str, base: dict[str, object], **fields: object) -> dict[str, str]:
    return {probe: json.dumps({**base, **fields})}


def imex_state(status: str, node: str = "READY", link: str = "CONNECTED", count: int = 4) -> dict[str, str]:
    state = nodes.imex(HOSTS if count == 4 else [f"gb-r01-t{i:02d}" for i in range(1, count + 1)], status)
    third = state["nodes"]["2"]  # type: ignore[index]
    third["status"] = node
    own = state["nodes"]["1"]  # type: ignore[index]
    own["connections"]["2"]["status"] = link
    return {"imex": json.dumps(state)}


def environment(**fields: str | None) -> dict[str, str]:
    have = {**nodes.VARIABLES, **fields}
    return {"environment": json.dumps({k: v for k, v in have.items() if v is not None})}


def deepspeed(stage: int, **zero: object) -> dict[str, str]:
    engine = {"kind": "deepspeed", "zero_stage": stage, "deepspeed": {"zero_optimization": zero}}
    return with_json("run", nodes.RUN, engine=engine)


# name: (changed probes of one tray, exit code, words of the line)
ONE_TRAY: dict[str, tuple[dict[str, str | None], int, tuple[str, ...]]] = {
    # comm.md 4.2: the fabric
    "fabric in progress": (with_gpu("State", "In Progress"), 20, ("GPU 0", "In Progress", "Completed", "wait")),
    "fabric not started": (with_gpu("State", "Not Started"), 20, ("Not Started", "nvidia-smi -r")),
    "insufficient resources": (with_gpu("Status", "Insufficient Resources"), 20, ("Insufficient Resources", "Success")),
    "zero uuid": ({"nvidia_smi": nodes.smi(uuid=ZERO)}, 20, ("ClusterUUID", "MNNVL")),
    "unhealthy": (with_gpu("Summary", "Unhealthy"), 20, ("health, Summary", "Unhealthy", "--allow-degraded")),
    "degraded bandwidth": (with_gpu("Bandwidth", "Degraded"), 20, ("health, Bandwidth", "Degraded")),
    "route unhealthy": (with_gpu("Route Unhealthy", "True"), 20, ("Route Unhealthy", "True")),
    # the same clique number under another UUID is another partition
    "two partitions": ({"nvidia_smi": nodes.smi(uuid=OTHER)}, 23, ("partition", OTHER[:8], RACK[:8], "--segment=4")),
    "two cliques": ({"nvidia_smi": nodes.smi(clique="7")}, 23, ("clique 7", "clique 32766")),
    # IMEX
    "imex missing": ({"imex": None}, 21, ("nvidia-imex-ctl", "no such command", "systemctl restart nvidia-imex")),
    "imex not json": ({"imex": "Failed to connect to nvidia-imex daemon\n"}, 21, ("Failed to connect",)),
    "domain degraded": (imex_state("DEGRADED"), 21, ("IMEX domain", "DEGRADED", "UP")),
    "peer not ready": (imex_state("UP", node="UNAVAILABLE"), 21, ("not READY: gb-r01-t03",)),
    "peer not connected": (imex_state("UP", link="INVALID"), 21, ("not CONNECTED: gb-r01-t03", "50000")),
    "too many imex nodes": (imex_state("UP", count=19), 21, ("19", "at most 18")),
    "too few imex nodes": (imex_state("UP", count=3), 21, ("3", "at least 4")),
    "unit inactive": ({"imex_unit": "ActiveState=failed\nUnitFileState=enabled\n"}, 21, ("failed",)),
    "other peers": ({"imex_nodes": "10.0.0.0\n10.0.0.9\n"}, 21, ("nodes_config.cfg", "other nodes", "gb-r01-t01")),
    "peers in another order": (
        {"imex_nodes": "10.0.0.1\n10.0.0.0\n10.0.0.2\n10.0.0.3\n"}, 21, ("another order",)
    ),
    "no channel": ({"imex_channels": None}, 21, ("channelN", "nvidia-modprobe")),
    "channel denied": ({"imex_channels": "channel0 denied\n"}, 21, ("channel0", "no permission")),
    "another channel": ({"imex_channels": "channel3 rw\n"}, 21, ("same channel on every node", "channel3")),
    "no imex in the kernel": ({"devices": "Character devices:\n195 nvidia\n"}, 21, ("not registered",)),
    "imex of another release": ({"imex_version": "IMEX version is: 570.86.15\n"}, 25, ("570.86.15", "580.159.04")),
    # comm.md 5: environment
    "variable missing": (environment(NCCL_NVLS_ENABLE=None), 22, ("NCCL_NVLS_ENABLE missing", ".deepspeed_env")),
    "variable changed": (environment(NCCL_NVLS_ENABLE="1"), 22, ("digest",)),
    "mnnvl off on one node": (environment(NCCL_MNNVL_ENABLE="0"), 22, ("NCCL_MNNVL_ENABLE", "found 0")),
    "cumem off": (environment(NCCL_CUMEM_ENABLE="0"), 22, ("NCCL_CUMEM_ENABLE", "silently")),
    "variable on one node only": (environment(NCCL_IB_HCA="mlx5_0"), 22, ("NCCL_IB_HCA", "unset as on gb-r01-t01")),
    "ib disabled": (environment(NCCL_IB_DISABLE="1"), 22, ("NCCL_IB_DISABLE", "sockets")),
    "p2p disabled": (environment(NCCL_P2P_DISABLE="1"), 22, ("NCCL_P2P_DISABLE", "NVLink is left idle")),
    # versions
    "old driver": (with_gpu("Driver Version", "550.54.15"), 25, ("550.54.15", "580")),
    "old nccl": (with_json("versions", nodes.VERSIONS, nccl="2.26.2"), 25, ("NCCL", "2.26.2", "at least 2.27")),
    "nvls hang": (
        {**with_json("versions", nodes.VERSIONS, nccl="2.28.9"), **environment(NCCL_NVLS_ENABLE="1")}, 25,
        ("NVLS", "2.28.9"),
    ),
    "torch of another version": (with_json("versions", nodes.VERSIONS, torch="2.11.0"), 25, ("2.11.0 on",)),
    "torch too old": (with_json("versions", nodes.VERSIONS, torch="2.7.0"), 25, ("torch", "2.11")),
    "no torch": ({"versions": "ModuleNotFoundError: No module named 'torch'\n"}, 25, ("No module named 'torch'",)),
    # GPUs
    "no driver": ({"nvidia_smi": None}, 26, ("nvidia-smi", "no such command")),
    "a gpu is gone": ({"nvidia_smi": nodes.smi(gpus=3)}, 26, ("found 3", "at least 4", "Xid")),
    "another gpu": (with_gpu("Product Name", "NVIDIA H100 80GB HBM3"), 23, ("NVIDIA H100", "GB200")),
    "ecc errors": (with_gpu("DRAM Uncorrectable", "2"), 26, ("DRAM Uncorrectable", "found 2")),
    "ecc off": (with_gpu("Current", "Disabled", 99), 26, ("ECC", "Disabled")),
    "row remapping": (with_gpu("Remapping Failure Occurred", "Yes"), 26, ("row remapping", "replace the GPU")),
    "unrepairable": (with_gpu("Unrepairable Memory", "Yes"), 26, ("unrepairable memory",)),
    "thermal slowdown": (with_gpu("HW Thermal Slowdown", "Active"), 26, ("HW Thermal Slowdown", "cooling")),
    "recovery action": (with_gpu("GPU Recovery Action", "Drain and Reset"), 26, ("Drain and Reset",)),
    "memory in use": (with_gpu("Used", "70000 MiB"), 26, ("70000 MiB", "fuser")),
    "xid": ({"xid": "[1.0] NVRM: Xid (PCI:0008:01:00): 79, pid=1, GPU lost\n"}, 26, ("Xid 79", "PCI:0008")),
    # network
    "nic down": ({"ibstat": nodes.ibstat().replace("Active", "Down", 1)}, 27, ("mlx5_0 Down", "subnet manager")),
    "slow nics": ({"ibstat": nodes.ibstat(rate=100)}, 27, ("400 Gb/s", "found 0")),
    "no gpudirect": (
        {"modules": "nvidia 1 - - Live\n", **with_json("node", nodes.NODE, kernel="5.4.0")}, 27,
        ("nvidia_peermem", "dma-buf"),
    ),
    "rail": ({"topo": nodes.topo().replace("NODE\tNODE\tSYS\tSYS", "SYS\tSYS\tSYS\tSYS")}, 27, ("GPU0, GPU1",)),
    # storage and settings
    "other configuration": (with_json("run", nodes.RUN, config_hash="ffff"), 28, ("hash of the configuration", "ffff")),
    "no data": (with_json("run", nodes.RUN, data={"data/books": -1}), 28, ("data/books.bin", "prepare_data")),
    "other data": (with_json("run", nodes.RUN, data={"data/books": 7}), 28, ("7 bytes", "1000000000")),
    "disk full": (with_json("run", nodes.RUN, cwd_free_gb=0.5), 28, ("0.5 GB", "20 GB")),
    "broken configuration": (with_json("run", nodes.RUN, config_error="x.yaml: no"), 28, ("x.yaml: no",)),
    "bf16 into fp16 kernels": (deepspeed(3, zero_quantized_gradients=True), 24, ("zero_quantized_gradients", "#3992")),
    "quantized weights without zero 3": (deepspeed(1, zero_quantized_weights=True), 24, ("silently", "zero_stage 3")),
    "hpz over a boundary": (deepspeed(3, zero_hpz_partition_size=6), 24, ("zero_hpz_partition_size", "divisor of 16")),
    # host
    "x86 host": (with_json("node", nodes.NODE, arch="x86_64"), 29, ("x86_64", "aarch64")),
    "page size": (with_json("node", nodes.NODE, page_size=4096), 29, ("page size", "4096 on gb-r01-t02", "65536")),
    "locked memory": (with_json("node", nodes.NODE, memlock_kb=64), 29, ("locked memory", "64 kB")),
    "clock": ({"chrony": "System time     : 2.5 seconds slow of NTP time\n"}, 29, ("2.500 s off", "chronyc makestep")),
}  # fmt: skip


def test_healthy_rack_has_no_fault() -> None:
    assert preflight.judge(rack(), expect()) == []


@pytest.mark.parametrize("name", ONE_TRAY)
def test_one_broken_tray(name: str) -> None:
    changed, code, words = ONE_TRAY[name]
    faults = preflight.judge(rack(**changed), expect())
    assert exit_code(faults) == code, [f.line() for f in faults]
    lines = [f.line() for f in faults if f.kind == code]
    assert any(all(word in line for word in words) for line in lines), lines
    assert all("; fix: " in line and "\n" not in line for line in lines)
    assert any(HOSTS[1] in line or "all nodes" in line or "nodes 0 to 3" in line or HOSTS[0] in line for line in lines)


WARNINGS: dict[str, tuple[dict[str, str | None], str]] = {
    "power limit": (with_gpu("Current Power Limit", "500.00 W"), "power limit"),
    "application clock": (with_gpu("Graphics", "900 MHz", 2), "application clock"),
    "algorithm forced": (environment(NCCL_ALGO="Ring"), "NCCL_ALGO"),
    "huge pages": ({"memory": "MemTotal: 1000000 kB\nHugePages_Total: 400\nHugepagesize: 2048 kB\n"}, "huge pages"),
    "numa": (with_json("node", nodes.NODE, cpu_numa_nodes=1), "NUMA"),
    "no ntp": ({"chrony": "Leap status     : Not synchronised\n"}, "not synchronised"),
    "kernel": (with_json("node", nodes.NODE, kernel="6.9"), "kernel"),
    "no ibstat": ({"ibstat": None}, "infiniband-diags"),
}


@pytest.mark.parametrize("name", WARNINGS)
def test_warnings_do_not_stop(name: str) -> None:
    changed, word = WARNINGS[name]
    faults = preflight.judge(rack(**changed), expect())
    warned = [f.line() for f in faults if not f.fatal]
    assert any(word in line and "(warning)" in line for line in warned), [f.line() for f in faults]
    assert exit_code(f for f in faults if f.what not in ("NCCL_ALGO",)) == 0


def test_degraded_fabric_may_run_over_the_network() -> None:
    """With --allow-degraded the fabric is a warning, and MNNVL must then be off on every rank alike."""
    sick = with_gpu("Summary", "Unhealthy")
    allowed = expect(allow_degraded=True)
    mixed = preflight.judge(rack(**sick), allowed)
    assert exit_code(mixed) == 22
    assert any("NCCL_MNNVL_ENABLE on a degraded fabric" in f.line() for f in mixed)
    off = {"environment": json.dumps({"NCCL_MNNVL_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"})}
    alike = [tray(h, HOSTS, **off, **(sick if h == HOSTS[1] else {})) for h in HOSTS]
    faults = preflight.judge(alike, allowed)
    assert exit_code(faults) == 0
    assert [f.fatal for f in faults] == [False]


def test_kubernetes_wants_the_nodes_unit_masked() -> None:
    faults = preflight.judge(rack(), expect(kubernetes=True))
    assert exit_code(faults) == 21
    assert "systemctl mask nvidia-imex" in faults[0].line()
    pods = [tray(h, HOSTS, imex=None, imex_unit="ActiveState=inactive\nUnitFileState=masked\n") for h in HOSTS]
    assert preflight.judge(pods, expect(kubernetes=True)) == []


GATHER = "--fp4-param-gather --use-distributed-optimizer --overlap-param-gather --overlap-grad-reduce"


@pytest.mark.parametrize(
    ("arguments", "te", "words"),
    [
        ("--fp4-param-gather", "2.16.0", "--overlap-param-gather"),
        (GATHER, "2.9.0", "at least 2.14"),
        (GATHER.replace("--overlap-grad-reduce", ""), "2.16.0", "add --overlap-grad-reduce"),
        (GATHER.replace("fp4", "fp8").replace("--use-distributed-optimizer", ""), None, "--use-distributed-optimizer"),
    ],
)
def test_parameter_gathers_that_give_nothing_or_nan(arguments: str, te: str | None, words: str) -> None:
    versions = {**nodes.VERSIONS, **({"transformer-engine": te} if te else {})}
    captured = [tray(h, HOSTS, versions=json.dumps(versions)) for h in HOSTS]
    faults = preflight.judge(captured, expect(megatron=tuple(arguments.split())))
    assert exit_code(faults) == 24
    assert any(words in f.line() for f in faults)


def test_a_complete_parameter_gather_passes() -> None:
    versions = {**nodes.VERSIONS, "transformer-engine": "2.16.0"}
    captured = [tray(h, HOSTS, versions=json.dumps(versions)) for h in HOSTS]
    assert preflight.judge(captured, expect(megatron=tuple(GATHER.split()))) == []


PLACEMENT: dict[str, tuple[Callable[[], tuple[list[Facts], Expect]], int, str]] = {
    "a node is missing": (lambda: (rack()[:3], expect()), 28, "gb-r01-t04"),
    "nothing was captured": (lambda: ([], expect()), 28, "--collect"),
    "host twice": (lambda: (rack(), expect(hosts=(*HOSTS[:3], HOSTS[0]))), 23, "given twice"),
    "not whole segments": (lambda: (rack(), expect(hosts=tuple(HOSTS[:3]))), 23, "multiple of the segment 4"),
}


@pytest.mark.parametrize("name", PLACEMENT)
def test_placement(name: str) -> None:
    make, code, word = PLACEMENT[name]
    captured, wanted = make()
    faults = preflight.judge(captured, wanted)
    assert exit_code(faults) == code
    assert any(word in f.line() for f in faults)


def two_racks(order: list[str]) -> tuple[list[Facts], Expect]:
    """Two racks of two trays, in the given rank order."""
    uuid = {"gb-r01": RACK, "gb-r02": OTHER}
    listed = [
        tray(h, order, nvidia_smi=nodes.smi(uuid=uuid[h[:6]]), imex=json.dumps(nodes.imex([h, h + "b"]))) for h in order
    ]
    return listed, expect(hosts=tuple(order), segment=2)


def test_rank_order_against_racks() -> None:
    """The same four trays: rack after rack is right, alternating racks puts every tensor-parallel group across them."""
    right = ["gb-r01-t01", "gb-r01-t02", "gb-r02-t01", "gb-r02-t02"]
    assert exit_code(preflight.judge(*two_racks(right))) == 0
    faults = preflight.judge(*two_racks([right[0], right[2], right[1], right[3]]))
    assert exit_code(faults) == 23
    assert sum("NVLink partition" in f.what for f in faults) == 2  # both segments are torn
    assert any("not sorted" in f.found and not f.fatal for f in faults)


NCCL_UP = "vm:1:2 [0] NCCL INFO MNNVL 1 cliqueId 7ffe cliqueSize 64 cliqueRank 0 nvlsSupport 1\n"


@pytest.mark.parametrize(
    ("log", "word"),
    [
        ("vm:1:2 [0] NCCL INFO MNNVL 0 cliqueId 0 cliqueSize 0 cliqueRank 0\n", "MNNVL 0"),
        ("vm:1:2 [0] NCCL INFO Using network IB\n", "no line about MNNVL"),
        (NCCL_UP.replace("64", "4"), "cliqueSize 4"),
    ],
)
def test_silent_fallback_is_seen_in_nccls_log(log: str, word: str) -> None:
    faults = list(fallback(log, "rank 0", 64))
    assert exit_code(faults) == 20
    assert word in faults[0].line()


def test_mnnvl_in_use() -> None:
    assert list(fallback(NCCL_UP, "rank 0", 64)) == []


def test_a_real_h100_passes() -> None:
    """What nvidia-smi and the kernel of a machine with one H100 said; its one NUMA node is only a warning."""
    wanted = Expect(topology=load_topology("h100_hgx"), gpus_per_node=1)
    faults = preflight.judge([nodes.recorded("h100")], wanted)
    assert exit_code(faults) == 0, [f.line() for f in faults]
    assert nodes.recorded("h100").gpus[0]["Max Clocks"]["SM"] == "1980 MHz"


def test_the_first_thing_to_repair_decides_the_code() -> None:
    def fault(kind: FaultClass, *, fatal: bool = True) -> Fault:
        return Fault(kind, "here", "x", "1", "2", "repair", fatal)

    assert exit_code([fault(FaultClass.BANDWIDTH), fault(FaultClass.IMEX), fault(FaultClass.FABRIC)]) == 20
    assert exit_code([fault(FaultClass.HOST, fatal=False)]) == 0
    many = merge(fault(FaultClass.GPU)._replace(where=f"n{i}") for i in range(9))
    assert len(many) == 1
    assert "n0, n1, n2 and 6 more" in many[0].line()


def test_a_domain_that_comes_up_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for nvidia-imex-ctl whose third answer is UP."""
    calls = tmp_path / "calls"
    script = f"""echo x >>{calls}; [ $(wc -l <{calls}) -ge 3 ] && s=UP || s=DOWN; echo "{{\\"status\\": \\"$s\\"}}" """
    monkeypatch.setattr(facts, "COMMANDS", {"imex": ("sh", "-c", script)})
    monkeypatch.setattr(facts, "_POLL_S", 0.01)
    facts.wait_for_imex(60)
    assert calls.read_text().count("x") == 3
    calls.unlink()
    facts.wait_for_imex(0)
    assert not calls.exists()


def command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    preflight_command.add_arguments(parser)
    return preflight_command.run(parser.parse_args(words))


def test_collect_then_judge_on_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """This machine's own tools: a CPU host passes as topology cpu, and is no GB200 tray."""
    assert command("--collect", str(tmp_path), "--config", "configs/runs/quickstart.yaml") == 0
    assert len(facts.load(tmp_path)) == 1
    assert command("--topology", "cpu", "--facts", str(tmp_path)) == 0
    capsys.readouterr()
    code = command("--topology", "gb200_nvl72", "--facts", str(tmp_path), "--json")
    told = json.loads(capsys.readouterr().out)
    assert 20 <= code <= 30
    assert {"kind", "where", "what", "found", "expected", "fix", "fatal"} == told[0].keys()
