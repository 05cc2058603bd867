"""Clusters and layouts: what they refuse, and models that only the planner knows."""

from __future__ import annotations

from typing import Any

import pytest

from fp4dist.errors import ConfigError
from fp4dist.spec.build import build, plain
from fp4dist.spec.cluster import Layout, Topology
from fp4dist.spec.load import load_model, load_run, load_spec, model_hash, shipped


@pytest.mark.parametrize("name", shipped("topology"))
def test_topologies_survive_a_dump(name: str) -> None:
    topology = load_spec(Topology, "topology", name)
    assert build(Topology, plain(topology)) == topology
    assert len({topology, topology}) == 1  # hashable


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes_per_domain": 0}, "nodes_per_domain = 0"),
        ({"spare_nodes": 18}, "spare_nodes = 18"),
        ({"nodes_per_domain": 1, "spare_nodes": 0}, "mnnvl"),
        ({"inside": {"name": "x", "gb_per_s": 0, "latency_us": 1}}, "gb_per_s = 0"),
        ({"trays": 18}, "unknown key of Topology"),
    ],
)
def test_broken_topologies_are_refused(changes: dict[str, Any], message: str) -> None:
    raw = plain(load_spec(Topology, "topology", "gb200_nvl72"))
    with pytest.raises(ConfigError, match=message):
        build(Topology, {**raw, **changes})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tp": 0}, "tp = 0"),
        ({"vpp": 2}, "needs pp > 1"),
        ({"offload": 2.0}, "shares"),
        ({"recomputed": 0.0}, "shares"),
    ],
)
def test_broken_layouts_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(**keys)


def test_data_parallel_is_the_rest() -> None:
    layout = Layout(tp=4, pp=8, cp=2, ep=4, etp=2)
    assert layout.dp(512) == 8
    assert layout.expert_dp(512) == 8
    with pytest.raises(ValueError, match="not a multiple"):
        layout.dp(100)


@pytest.mark.parametrize("name", ["deepseek_v3", "nemotron3_super"])
def test_a_run_refuses_what_only_the_planner_knows(name: str) -> None:
    with pytest.raises(ConfigError, match="has blocks beyond a Llama-style decoder"):
        load_run("tiny", [f"model={name}"])


@pytest.mark.parametrize(("name", "digest"), [("tiny", "50ae9becf8ca406b"), ("moe_4x", "4e6c89292600eca1")])
def test_hashes_of_models_are_those_of_before(name: str, digest: str) -> None:
    """Written down before ModelConfig had `beyond`: checkpoints hold such hashes."""
    assert model_hash(load_model(name)) == digest
