"""The time model: FLOPs by formula, limits, monotony, and behaviour far from the fitted rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from fp4dist.cluster.constants import fitted
from fp4dist.cluster.layer_time import Machine
from fp4dist.cluster.shapes import shape_of
from fp4dist.cluster.timing import Prediction, predict
from fp4dist.cluster.topology import Span, load_topology
from fp4dist.errors import ConfigError
from fp4dist.spec.cluster import Layout, Precision, Topology
from fp4dist.spec.load import load_model, load_recipe

NVL72 = load_topology("gb200_nvl72")


def run(
    model: str = "llama3_8b",
    gpus: int = 8,
    layout: Layout | None = None,
    precision: Precision = "nvfp4",
    gbs: int = 128,
    topology: Topology = NVL72,
    **more: Any,
) -> Prediction:
    config = load_model(model)
    seq = more.pop("seq", config.seq_length)
    return predict(config, topology, gpus, layout or Layout(), precision=precision, gbs=gbs, seq=seq, **more)


# tokens/s and TFLOP/s of a GPU as published (Megatron-Bridge): their quotient is the FLOPs that a token stands for
@pytest.mark.parametrize(
    ("model", "seq", "tflops", "tokens"),
    [
        ("llama3_8b", 8192, 1622, 31508),
        ("llama3_70b", 8192, 2202, 4864),
        ("llama3_405b", 8192, 2944, 1166),
        ("deepseek_v3", 4096, 1276, 4912),
        ("qwen3_235b", 4096, 728, 4916),
        ("nemotron3_super", 8192, 600, 7040),
    ],
)
def test_flops_of_a_token_are_the_published_ones(model: str, seq: int, tflops: float, tokens: float) -> None:
    assert shape_of(load_model(model)).flops_per_token(seq) / 1e12 == pytest.approx(tflops / tokens, rel=0.06)


def test_the_breakdown_is_the_step() -> None:
    p = run("llama3_405b", 512, Layout(tp=4, pp=8, vpp=8, cp=2), gbs=1152)
    assert sum(p.breakdown.values()) == pytest.approx(p.step_time_s)
    assert all(v >= 0 for v in p.breakdown.values())
    assert p.tokens_per_s_per_gpu * 512 * p.step_time_s == pytest.approx(1152 * 8192)


def test_no_layout_beats_the_peak() -> None:
    for precision, peak in (("bf16", 2500), ("fp8", 5000), ("nvfp4", 10000)):
        assert run(precision=precision).tflops_per_gpu < peak  # type: ignore[arg-type]


@pytest.mark.parametrize(("key", "factor"), [("across", 2.0), ("inside", 2.0)])
@pytest.mark.parametrize(
    ("model", "gpus", "layout", "gbs"),
    [
        ("llama3_405b", 512, Layout(tp=4, pp=8, vpp=8, cp=2), 1152),
        ("deepseek_v3", 256, Layout(pp=4, vpp=4, ep=64), 4096),
        ("llama3_70b", 256, Layout(fsdp=256), 512),
        ("llama3_8b", 512, Layout(tp=2, cp=4), 64),
    ],
)
def test_more_bandwidth_is_never_slower(
    key: str, factor: float, model: str, gpus: int, layout: Layout, gbs: int
) -> None:
    link = getattr(NVL72, key)
    faster = dataclasses.replace(NVL72, **{key: dataclasses.replace(link, gb_per_s=link.gb_per_s * factor)})
    assert (
        run(model, gpus, layout, gbs=gbs, topology=faster).step_time_s <= run(model, gpus, layout, gbs=gbs).step_time_s
    )


def test_the_bubble_is_the_schedule_s() -> None:
    """(pp - 1) / (vpp * m) of the useful time; without interleaving (pp - 1) / m."""
    layout = Layout(tp=2, pp=4, vpp=5)
    p = run("llama3_70b", 64, layout, gbs=256, order="tp-cp-ep-dp-pp")
    causes = ("gemm", "attention", "quantize", "elementwise", "gaps", "tp", "cp", "ep", "recompute")
    useful = sum(p.breakdown.get(k, 0.0) for k in causes)
    assert p.breakdown["bubble"] == pytest.approx(useful * 3 / (5 * p.parts.micro_batches))


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 4, 8])
def test_a_pipeline_with_few_micro_batches_waits_for_the_first(micro_batches: int) -> None:
    """4 stages of 5 chunks, counted by chunks: the first micro-batch passes 20, each further one adds one.

    As many micro-batches as stages keep every stage busy.
    """
    p = run("llama3_70b", 8, Layout(tp=2, pp=4, vpp=5), gbs=micro_batches, order="tp-cp-ep-dp-pp")
    causes = ("gemm", "attention", "quantize", "elementwise", "gaps", "tp", "recompute")
    useful = sum(p.breakdown.get(k, 0.0) for k in causes) / micro_batches
    chunks = 20 + micro_batches - 1 if micro_batches <= 4 else 5 * micro_batches + 3
    assert p.breakdown["bubble"] == pytest.approx((chunks / 5 - micro_batches) * useful)


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("llama3_405b", Layout(tp=4, pp=8, vpp=8, cp=2)),
        ("llama3_8b", Layout()),
        ("llama3_70b", Layout(fsdp=8)),
        ("deepseek_v3", Layout(pp=4, vpp=4, ep=16)),
        ("qwen3_235b", Layout(tp=2, ep=16, etp=2)),
    ],
)
@pytest.mark.parametrize("topology", ["gb200_nvl72", "b200_hgx", "h100_hgx"])
def test_more_gpus_are_not_slower_at_one_batch(model: str, layout: Layout, topology: str) -> None:
    machine = load_topology(topology)
    times = [run(model, n, layout, gbs=1024, topology=machine).step_time_s for n in (64, 128, 256, 512, 1024)]
    assert times == sorted(times, reverse=True)


def test_weak_scaling_keeps_what_computing_takes_and_strong_scaling_pays() -> None:
    layout = Layout(tp=4, pp=8, vpp=8, cp=2)
    small, large = run("llama3_405b", 512, layout, gbs=1152), run("llama3_405b", 1024, layout, gbs=2304)
    assert large.breakdown["gemm"] == pytest.approx(small.breakdown["gemm"])
    assert run("llama3_405b", 1024, layout, gbs=1152).tflops_per_gpu < small.tflops_per_gpu


def test_precisions_rank_as_their_tensor_cores_do() -> None:
    for topology in ("gb200_nvl72", "gb300_nvl72", "b200_hgx", "b300_hgx"):
        machine = load_topology(topology)
        times = [run(precision=p, topology=machine).step_time_s for p in ("bf16", "mxfp8", "nvfp4")]  # type: ignore[arg-type]
        assert times == sorted(times, reverse=True)


def test_hopper_runs_fp4_as_bf16_products_with_quantizers_on_top() -> None:
    hopper = load_topology("h200_hgx")
    assert run(topology=hopper).step_time_s > run(topology=hopper, precision="bf16").step_time_s
    assert (
        run(topology=hopper, precision="mxfp8").breakdown["gemm"]
        == run(topology=hopper, precision="fp8").breakdown["gemm"]
    )


# Milliseconds of the GPU in one step of llama_350m, 16 x 2,048 tokens, on one H200 (tools/bench_step.py --profile)
@pytest.mark.parametrize(
    ("recipe", "kernels"), [("nvidia_nvfp4", 206), ("quartet2", 232), ("quartet", 169), ("tetrajet", 169)]
)
def test_emulated_fp4_takes_on_hopper_what_its_kernels_took(recipe: str, kernels: float) -> None:
    """Within a fifth; powers of two are multiplied on FP8 tensor cores, fractional scales in bf16."""
    hopper, model = load_topology("h200_hgx"), load_model("llama_350m")
    found = predict(model, hopper, 1, Layout(micro_batch=16), recipe=load_recipe(recipe), gbs=16, seq=2048)
    assert found.step_time_s * 1e3 == pytest.approx(kernels, rel=0.2)
    bf16 = run("llama_350m", 1, Layout(micro_batch=16), "bf16", 16, hopper)
    assert (found.breakdown["gemm"] < 0.8 * bf16.breakdown["gemm"]) == (recipe in ("quartet", "tetrajet"))


def test_experts_in_mxfp8_do_not_move_their_activation_twice() -> None:
    """The grouped GEMM of gated experts holds it; of the other formats, and of experts without a gate, it does not."""
    layout = Layout(pp=4, vpp=4, ep=64)
    mxfp8, fp8 = (run("deepseek_v3", 256, layout, p, 4096) for p in ("mxfp8", "fp8"))  # type: ignore[arg-type]
    assert mxfp8.breakdown["elementwise"] < 0.97 * fp8.breakdown["elementwise"]
    assert mxfp8.breakdown["gaps"] < 0.9 * fp8.breakdown["gaps"]
    ungated = [run("nemotron3_super", 64, Layout(tp=2, ep=64), p, 512) for p in ("mxfp8", "fp8")]  # type: ignore[arg-type]
    assert ungated[0].breakdown["elementwise"] == pytest.approx(ungated[1].breakdown["elementwise"])


@pytest.mark.parametrize(
    ("model", "gpus", "layout", "gbs"),
    [
        ("llama3_8b", 4, Layout(), 16),
        ("llama3_8b", 36, Layout(cp=2), 36),
        ("llama_30m", 1, Layout(), 128),
        ("qwen3_235b", 64, Layout(tp=4, pp=2, ep=8, etp=4), 512),
        ("deepseek_v3", 64, Layout(ep=64), 512),
        ("llama3_70b", 72, Layout(tp=8, pp=3), 72),
        ("nemotron3_super", 128, Layout(tp=2, pp=2, ep=32), 512),
        ("llama3_8b", 304, Layout(tp=2), 304),
        ("llama3_405b", 16384, Layout(tp=8, pp=16, vpp=8, cp=2), 2048),
    ],
)
def test_unusual_jobs_are_answered(model: str, gpus: int, layout: Layout, gbs: int) -> None:
    p = run(model, gpus, layout, gbs=gbs)
    assert 0 < p.tflops_per_gpu < 4000
    assert p.memory.total > p.lean.total > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gbs": 127}, "gbs = 127 is not a multiple"),
        ({"layout": Layout(ep=8)}, "need a model with experts"),
        ({"layout": Layout(cp=8), "seq": 100}, "2 \\* cp"),
        ({"layout": Layout(pp=8, vpp=16)}, "chunks are more than 32 layers"),
        ({"layout": Layout(tp=3), "gpus": 6, "gbs": 6}, "heads do not divide"),
    ],
)
def test_broken_rules_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(**changes)


# Bus rates that nccl-tests reports, 2 (n - 1) / n * bytes / seconds, measured on GB200 and published: sums of so many
# GB over (GPUs of a rack, racks). coreweave/nccl-tests 43 and 48; NCCL issue 1801.
PUBLISHED_SUMS = [
    (72, 1, 0.5, 586), (72, 1, 1, 681), (72, 1, 2, 758), (72, 1, 4, 839), (72, 1, 8, 847), (72, 20, 0.5, 151),
    (72, 20, 1, 219), (72, 20, 2, 287), (72, 20, 4, 346), (4, 3, 8, 197), (8, 3, 8, 394),
]  # fmt: skip


@pytest.mark.parametrize(("inside", "across", "gigabytes", "rate"), PUBLISHED_SUMS)
def test_a_sum_takes_as_long_as_was_measured(inside: int, across: int, gigabytes: float, rate: float) -> None:
    """A sum is a reduce-scatter and a gather."""
    machine = Machine(gpu=NVL72.gpu, inside=NVL72.inside, across=NVL72.across, constants=fitted().constants)
    n = inside * across
    seconds = 2 * machine.gather(Span(inside=inside, across=across), gigabytes * 1e9)
    assert 2 * (n - 1) / n * gigabytes / seconds == pytest.approx(rate, rel=0.1)


def test_a_gather_crosses_racks_over_the_nics_of_its_members() -> None:
    machine = Machine(gpu=NVL72.gpu, inside=NVL72.inside, across=NVL72.across, constants=fitted().constants)
    size = 64e9
    for inside in (1, 2, 4):
        nics = inside * 0.98 * 50e9
        seconds = machine.gather(Span(inside=inside, across=8), size)
        assert seconds == pytest.approx(size * (8 * inside - 1) / (8 * inside) / nics, rel=1e-2)
    assert machine.gather(Span(inside=1, across=1), size) == 0


# Milliseconds that kernels of one kind took in a step of llama_350m, 16 x 2,048 tokens, bf16, on one H100 (profiled)
@pytest.mark.parametrize(("cause", "measured"), [("gemm", 90), ("attention", 38)])
def test_causes_are_what_a_profile_shows(cause: str, measured: float) -> None:
    """Narrow heads and weight gradients of few tiles included: within a fifth."""
    found = run("llama_350m", 1, Layout(micro_batch=16), "bf16", 16, load_topology("single_gpu"))
    assert found.breakdown[cause] * 1e3 == pytest.approx(measured, rel=0.2)


def test_deep_sums_fill_the_machine_and_narrow_heads_cost_more() -> None:
    machine = Machine(gpu=NVL72.gpu, inside=NVL72.inside, across=NVL72.across, constants=fitted().constants)
    assert machine.waves(1024, 1024, 1024) == machine.waves(1024, 1024, 4096) > machine.waves(1024, 1024, 32768) > 1
    assert machine.attention(64) == pytest.approx(0.75 * machine.attention(128))
    assert machine.attention(128) < machine.attention(160) < 1.2 * machine.attention(128)


def test_codes_cut_the_traffic_between_racks() -> None:
    parts = run("llama3_405b", 512, Layout(tp=4, pp=8, vpp=8, cp=2), gbs=1152).parts
    assert parts.reduce_s / parts.reduce_fp4_s == pytest.approx(2 / 0.5625, rel=1e-2)


def test_a_recipe_decides_the_precision_layer_by_layer() -> None:
    """Its last layers in bf16 make it slower than FP4 everywhere, and faster than bf16."""
    model = load_model("llama3_8b")
    with_recipe = predict(model, NVL72, 8, Layout(), recipe=load_recipe("nvidia_nvfp4"), gbs=128, seq=8192)
    assert run(precision="nvfp4").step_time_s < with_recipe.step_time_s < run(precision="bf16").step_time_s
    high = predict(model, NVL72, 8, Layout(), recipe=load_recipe("bf16"), gbs=128, seq=8192)
    assert high.step_time_s == pytest.approx(run(precision="bf16").step_time_s)
