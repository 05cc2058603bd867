"""The run as each node sees it: one configuration, its data, room to write, and options known to go wrong together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fp4dist.cluster.checks.expect import Expect
from fp4dist.cluster.checks.versions import parse
from fp4dist.cluster.facts import Facts
from fp4dist.cluster.faults import Fault, FaultClass

_FREE_GB = 20.0


def node(facts: Facts, expect: Expect) -> Iterator[Fault]:
    """One node's view of the run."""
    run = facts.run
    if "config_error" in run:
        fix = "the same checkout and configuration on every node"
        yield _storage(facts.host, "configuration", str(run["config_error"]), "a valid run file", fix)
    free = float(run.get("cwd_free_gb", _FREE_GB))
    if free < _FREE_GB:
        yield _storage(
            facts.host, "free space of the run's folder", f"{free:.1f} GB", f"{_FREE_GB:.0f} GB", "make room"
        )
    data: Mapping[str, int] = run.get("data", {})
    lost = [prefix for prefix, size in data.items() if size < 0]
    if lost and not run.get("prepares", False):
        fix = "tools/prepare_data.py writes them; mount the data's file system on this node"
        yield _storage(facts.host, "token files", f"no {', '.join(lost)}.bin", "every data.train and data.valid", fix)
    yield from _known_wrong(facts.host, run, expect)
    yield from _param_gather(facts, expect)


def _known_wrong(host: str, run: Mapping[str, Any], expect: Expect) -> Iterator[Fault]:
    """DeepSpeed's quantized communication: what its kernels read wrongly, and what stays off without a word."""
    engine: Mapping[str, Any] = run.get("engine", {})
    zero: Mapping[str, Any] = engine.get("deepspeed", {}).get("zero_optimization", {})
    where = f"{host}: engine.deepspeed.zero_optimization"
    if zero.get("zero_quantized_gradients"):
        if run.get("dtype") != "fp32" and expect.gpu:
            fix = "leave it off: its kernels read bf16 gradients as fp16 (DeepSpeed #3992, #4886)"
            yield _settings(where, "zero_quantized_gradients with bf16", "on", "off", fix)
        if engine.get("zero_stage") != 3 or len(expect.hosts) < 2:
            found = f"zero_stage {engine.get('zero_stage')} on {max(1, len(expect.hosts))} nodes"
            fix = "it does nothing elsewhere, silently: remove it"
            yield _settings(where, "zero_quantized_gradients", found, "zero_stage 3 on several nodes", fix)
    size = zero.get("zero_hpz_partition_size", 1)
    if size > 1:
        domain = expect.segment * expect.gpus_per_node
        if domain % size and size % domain:
            fix = "a divisor of the GPUs that NVLink joins: secondary shards are gathered in every backward pass"
            yield _settings(where, "zero_hpz_partition_size", str(size), f"a divisor of {domain}", fix)
    if zero.get("zero_quantized_weights") and engine.get("zero_stage") != 3:
        found, fix = f"zero_stage {engine.get('zero_stage')}", "it does nothing there, silently: remove it"
        yield _settings(where, "zero_quantized_weights", found, "zero_stage 3", fix)


_GATHERS = {
    "--fp4-param-gather": (("transformer-engine", (2, 14)), ("megatron-core", (0, 18))),
    "--fp8-param-gather": (),
}
_WITH_IT = ("--use-distributed-optimizer", "--overlap-param-gather", "--overlap-grad-reduce")


def _param_gather(facts: Facts, expect: Expect) -> Iterator[Fault]:
    """Megatron-LM's low-precision gather of parameters: NaN or nothing without its companions, broken in old versions.

    Megatron-LM #2272 and #2284, Transformer Engine #2352, Megatron-Bridge #3801.
    """
    for flag, floors in _GATHERS.items():
        if flag not in expect.megatron:
            continue
        lacking = [companion for companion in _WITH_IT if companion not in expect.megatron]
        if lacking:
            fix = f"add {' '.join(lacking)}, or drop {flag}"
            yield _settings(facts.host, f"{flag} without its companions", "no " + ", ".join(lacking), "all", fix)
        for package, floor in floors:
            found = parse(facts.versions.get(package, ""))
            if found < floor:
                wanted = ".".join(map(str, floor))
                yield _settings(
                    facts.host, f"{package} for {flag}", facts.versions.get(package, "none"), f"at least {wanted}",
                    f"update {package}, or drop {flag}",
                )  # fmt: skip


def same(nodes: Sequence[Facts], expect: Expect) -> Iterator[Fault]:
    """One configuration hash, and data files of one size."""
    hashes: dict[str, str] = {}
    for facts in nodes:
        hashes.setdefault(str(facts.run.get("config_hash", "none")), facts.host)
    if len(hashes) > 1:
        told = ", ".join(f"{value} on {host}" for value, host in hashes.items())
        fix = "one checkout and one run file for all nodes"
        yield _storage("all nodes", "hash of the configuration", told, "one", fix)
    reference = nodes[0]
    for facts in nodes[1:]:
        ours, theirs = reference.run.get("data", {}), facts.run.get("data", {})
        for prefix in ours:
            if theirs.get(prefix, -1) >= 0 and theirs[prefix] != ours[prefix]:
                found, expected = f"{theirs[prefix]} bytes", f"{ours[prefix]} as on {reference.host}"
                fix = "copy the token files again, or share one file system"
                yield _storage(facts.host, f"{prefix}.bin", found, expected, fix)


def _storage(where: str, what: str, found: str, expected: str, fix: str) -> Fault:
    return Fault(FaultClass.STORAGE, where, what, found, expected, fix)


def _settings(where: str, what: str, found: str, expected: str, fix: str) -> Fault:
    return Fault(FaultClass.SETTINGS, where, what, found, expected, fix)
