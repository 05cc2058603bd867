"""What the policy decides, and the `comm:` section of a run file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fp4dist.cluster.topology import load_topology
from fp4dist.comm.policy import Span, break_even, decide, digest, gain, levels, pairs_of, span_of, table, why_exact
from fp4dist.comm.reduction import Bucket, Segment, cut, joined
from fp4dist.errors import ConfigError
from fp4dist.spec.build import build, plain
from fp4dist.spec.communication import AUTO, CommConfig
from fp4dist.spec.load import config_hash, load_run
from fp4dist.spec.wire import NVFP4_WIRE, Wire
from tests.train.tiny_run import tiny_run

BIG = (512, 512)


@pytest.mark.parametrize(
    ("name", "shape", "why"),
    [
        ("decoder.layers.0.mlp.linear_fc1.weight", BIG, None),
        ("decoder.layers.0.self_attention.linear_qkv.weight", BIG, None),
        ("decoder.layers.0.mlp.experts.local_experts.3.linear_fc2.weight", BIG, None),
        ("model.layers.0.mlp.gate_proj.weight", BIG, None),
        ("embedding.word_embeddings.weight", BIG, "embedding"),
        ("model.embed_tokens.weight", BIG, "embedding"),
        ("transformer.wte.weight", BIG, "embedding"),
        ("output_layer.weight", BIG, "LM head"),
        ("lm_head.weight", BIG, "LM head"),
        ("decoder.layers.0.mlp.router.weight", BIG, "router"),
        ("model.layers.3.block_sparse_moe.gate.weight", BIG, "router"),
        ("decoder.final_layernorm.weight", (512,), "norm"),
        ("transformer.h.0.ln_1.weight", (512,), "norm"),
        ("fc.bias", (512,), "vector"),
        ("fc.weight", (8, 8), "under 4096 elements"),
    ],
)
def test_which_gradients_stay_exact(name: str, shape: tuple[int, ...], why: str | None) -> None:
    assert why_exact(name, shape) == why


def test_a_section_names_wires_or_describes_them() -> None:
    raw = {"grad_reduce": "nvfp4", "pp_forward": {"kind": "fp8", "rounding": "nearest"}, "pp_backward": "bf16"}
    config = build(CommConfig, raw)
    assert config.active == ("grad_reduce", "pp_forward")
    assert config.wire("grad_reduce") == NVFP4_WIRE
    assert config.wire("pp_forward") == Wire(kind="fp8", rounding="nearest", rotation=0)
    assert build(CommConfig, plain(config)) == config
    assert CommConfig().active == ()
    assert build(CommConfig, {"grad_reduce": "auto", "topology": "cpu"}).wire("grad_reduce") == AUTO["grad_reduce"]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"grad_reduce": "auto"}, "needs `topology`"),
        ({"grad_reduce": "nvfp5"}, "comm.grad_reduce"),
        ({"error_feedback": "ef"}, "needs grad_reduce"),
        ({"error_feedback": "ef", "grad_reduce": "int4", "hierarchy": [2, 2]}, "drop one of them"),
        ({"hierarchy": [0]}, "at least 1"),
        ({"canary": {"band": {"cosine": 2}}}, "cosine = 2"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"sms": 0}, "sms = 0"),
        ({"validate": 2, "pp_forward": "nvfp4"}, "validate = 2 would do nothing"),
        ({"hierarchy": [2, 2]}, "set grad_reduce"),
        ({"exact": "bf16"}, "set grad_reduce"),
        ({"grad_reduce": "nvfp4", "inner": "fp8"}, "set grad_reduce, and hierarchy or topology"),
        ({"grad_reduce": "nvfp4", "min_numel": 10}, "set grad_reduce: auto"),
        ({"grad_reduce": "nvfp4", "error_feedback": "ef", "loco": {"beta": 0.5}}, "needs error_feedback: loco"),
        ({"gradreduce": "nvfp4"}, "did you mean 'grad_reduce'"),
    ],
)
def test_errors_name_the_key_and_the_way_out(raw: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=r"^comm") as caught:
        build(CommConfig, raw, "comm")
    assert message in str(caught.value)


def test_a_run_refuses_traffic_that_it_does_not_have(tmp_path: Path) -> None:
    for override, message in (
        ("comm.pp_forward=nvfp4", "parallel.pp above 1"),
        ("comm.sp_reduce_scatter=fp8", "sequence_parallel"),
        ("comm.ep_dispatch=nvfp4", "parallel.ep above 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            tiny_run(tmp_path, override)
    with pytest.raises(ConfigError, match="choose one"):
        tiny_run(tmp_path, "comm.param_gather=nvfp4", "engine.fp4_param_gather=true")
    with pytest.raises(ConfigError, match="zero_stage 1 or 2"):
        tiny_run(tmp_path, "comm.param_gather=nvfp4", "engine.kind=deepspeed", "engine.zero_stage=3")


def test_runs_without_a_section_keep_their_hash(tmp_path: Path) -> None:
    config = load_run("tiny")
    assert config.comm is None
    assert config_hash(config) == config_hash(load_run("tiny", ["comm=null"]))
    assert config_hash(config) != config_hash(load_run("tiny", ["comm.grad_reduce=nvfp4"]))


def test_break_even_is_where_the_gain_passes_one() -> None:
    topology = load_topology("gb200_nvl72")
    for span in (Span(8, 1), Span(1, 4), Span(8, 4)):
        n = break_even(NVFP4_WIRE, 4, span, topology)
        assert n is not None
        assert gain(n, NVFP4_WIRE, 4, span, topology) > 1 >= gain(n - 1, NVFP4_WIRE, 4, span, topology)
    across = [gain(10**9, NVFP4_WIRE, 4, Span(1, racks), topology) for racks in (2, 8, 64)]
    assert all(5 < g < 7.2 for g in across)  # the network is the bound: nearly 4 / 0.566 times fewer bytes
    assert break_even(NVFP4_WIRE, 4, Span(2, 1), load_topology("cpu")) is None


def test_auto_leaves_what_does_not_pay_and_says_why() -> None:
    topology = load_topology("h100_hgx")
    auto = CommConfig(grad_reduce="auto", topology="h100_hgx")

    def made(config: CommConfig, numel: int, span: Span) -> str:
        decision = decide(
            config,
            "grad_reduce",
            "bucket 0",
            numel=numel,
            coded=numel,
            itemsize=4,
            span=span,
            topology=topology,
            why="",
        )
        return decision.why if decision.wire is None else decision.wire.label()

    assert "pays from" in made(auto, 10**5, Span(1, 4))
    assert made(auto, 10**8, Span(1, 4)) == NVFP4_WIRE.label()
    assert made(CommConfig(grad_reduce="nvfp4"), 10**5, Span(1, 4)) == NVFP4_WIRE.label()  # asked for by name
    assert "min_numel" in made(CommConfig(grad_reduce="auto", topology="h100_hgx", min_numel=10**9), 10**8, Span(1, 4))
    assert "one rank" in made(auto, 10**8, Span(1, 1))
    irregular = Span(3, 2, regular=False)
    assert "ring" in made(CommConfig(grad_reduce="auto", topology="h100_hgx", min_numel=0), 10**9, irregular)


def test_groups_over_several_domains_reduce_on_two_levels() -> None:
    topology = load_topology("h100_hgx")
    assert span_of(range(16), topology) == Span(8, 2)
    assert span_of(range(0, 32, 8), topology) == Span(1, 4)
    assert not span_of([0, 1, 2, 8], topology).regular
    assert levels(CommConfig(), Span(8, 2), "x") == (8, 2)
    assert levels(CommConfig(), Span(8, 1), "x") is None
    assert levels(CommConfig(grad_reduce="int4", error_feedback="ef"), Span(8, 2), "x") is None
    assert levels(CommConfig(grad_reduce="nvfp4", hierarchy=(2, 4)), Span(8, 1), "x") == (2, 4)
    with pytest.raises(ConfigError, match=r"hierarchy = \[3, 2\]: x has 8 ranks"):
        levels(CommConfig(grad_reduce="nvfp4", hierarchy=(3, 2)), Span(8, 1), "x")


def test_two_ranks_over_a_network_exchange_by_an_all_gather() -> None:
    """Where the connections that it gains outweigh the copy of the own half: on every network that is shipped."""
    hgx, auto = load_topology("h100_hgx"), CommConfig()
    way, told = pairs_of(auto, Span(1, 2), None, hgx)
    assert way == "all_gather"
    assert told == "all-gather of two ranks over NDR400: 1.38x of an all-to-all"
    fast = dataclasses.replace(hgx, across=dataclasses.replace(hgx.across, gb_per_s=900.0))
    assert pairs_of(auto, Span(1, 2), None, fast) == (
        "all_to_all", "all-to-all of two ranks over NDR400: an all-gather is 0.85x of it",
    )  # fmt: skip
    for span, two in ((Span(2, 1), None), (Span(1, 3), None), (Span(2, 2), None), (Span(4, 3), (4, 3))):
        assert pairs_of(auto, span, two, hgx) == ("all_to_all", "")
    assert pairs_of(auto, Span(8, 2), (8, 2), hgx)[0] == "all_gather"  # the outer level is between two ranks
    assert pairs_of(auto, Span(1, 2), None, load_topology("cpu"))[0] == "all_to_all"
    assert pairs_of(CommConfig(pairs="all_gather"), Span(2, 1), None, None)[0] == "all_gather"


def test_a_bucket_is_cut_by_owner_and_segment() -> None:
    segments = (
        Segment("a", 0, 10, None),
        Segment("b", 10, 12, "norm"),
        Segment("c", 12, 20, None),
        Segment("d", 20, 30, None),
    )
    bucket = Bucket("x", segments, (((0, 16),), ((16, 32),)))
    assert bucket.runs(coded=True) == [[(0, 10), (12, 16)], [(16, 30)]]
    assert bucket.runs(coded=False) == [[(10, 12)], []]
    assert (bucket.numel, bucket.coded_numel, bucket.why()) == (30, 28, "norm (2)")
    assert joined([(0, 2), (2, 5), (6, 7)]) == [(0, 5), (6, 7)]
    assert cut([(0, 10)], [(8, 12), (2, 3)]) == [(8, 10), (2, 3)]


def test_the_table_and_the_digest_tell_decisions_apart() -> None:
    config = CommConfig(grad_reduce="nvfp4")

    def one(numel: int, config: CommConfig = config) -> object:
        return decide(
            config, "grad_reduce", "bucket 0", numel=numel, coded=numel, itemsize=4, span=Span(2, 1), topology=None,
            why="norm (5)",
        )  # fmt: skip

    text = table([one(2**20)])  # type: ignore[list-item]
    assert "norm (5)" in text
    assert f"2,097,152 before, {128 * (16 + 2048 + 256):,} after" in text  # 2^19 elements to the other rank
    assert digest(config, [one(2**20)]) == digest(config, [one(2**20)])  # type: ignore[list-item]
    other = CommConfig(grad_reduce="int4")
    assert len({digest(config, [one(2**20)]), digest(config, [one(2**21)]), digest(other, [one(2**20, other)])}) == 3  # type: ignore[list-item]
