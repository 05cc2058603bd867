"""Memory: sums by hand, monotony, what is known to run, what is known not to."""

from __future__ import annotations

import dataclasses

import pytest

from fp4dist.cluster.memory import Memory, fitting, in_flight_chunks, memory, stage_parameters
from fp4dist.cluster.points import Point, load_points
from fp4dist.cluster.precision import policy
from fp4dist.cluster.shapes import shape_of
from fp4dist.cluster.topology import load_topology, place
from fp4dist.spec.cluster import Layout, Precision
from fp4dist.spec.load import load_model

# billions, from the models' papers
PARAMETERS = {"llama3_8b": 8.03, "llama3_70b": 70.6, "llama3_405b": 405.9, "deepseek_v3": 671.0, "qwen3_235b": 235.1,
              "nemotron3_super": 120.6}  # fmt: skip


def estimate(
    model: str, topology: str, gpus: int, layout: Layout, precision: Precision, *, lean: bool = False, gbs: int = 0
) -> Memory:
    shape, machine = shape_of(load_model(model)), load_topology(topology)
    placement = place(machine, gpus, layout)
    rules = policy(precision, None, len(shape.layers), machine.gpu)
    gbs = gbs or layout.dp(gpus) * layout.micro_batch * layout.pp
    return memory(shape, placement, rules, gbs=gbs, seq=shape.model.seq_length, lean=lean)


@pytest.mark.parametrize(("name", "billions"), PARAMETERS.items())
def test_parameters_are_those_of_the_papers(name: str, billions: float) -> None:
    assert shape_of(load_model(name)).parameters / 1e9 == pytest.approx(billions, rel=2e-3)


def test_state_is_what_adam_needs() -> None:
    """8.03 billion parameters on 8 ranks: bf16 weights, fp32 gradients, 12 bytes of state over 8."""
    m = estimate("llama3_8b", "gb200_nvl72", 8, Layout(), "bf16")
    assert m.weights == pytest.approx(2 * 8.03, rel=1e-2)
    assert m.gradients == pytest.approx(4 * 8.03, rel=1e-2)
    assert m.optimizer == pytest.approx(12 * 8.03 / 8, rel=1e-2)


def test_stage_parameters_of_a_split_model() -> None:
    dense, experts = stage_parameters(shape_of(load_model("llama3_405b")), Layout(tp=4, pp=8, vpp=8))
    # 126 layers in 64 places are 2 at most: 16 of a stage; one of the two tables
    assert dense == pytest.approx((16 * 3.1877e9 + 2.101e9) / 4, rel=1e-3)
    assert experts == 0


@pytest.mark.parametrize(
    ("layout", "chunks"),
    [(Layout(), 1), (Layout(pp=4), 4), (Layout(pp=4, vpp=2), 6 + 4 + 1), (Layout(pp=8, vpp=8), 71)],
)
def test_chunks_in_flight(layout: Layout, chunks: int) -> None:
    """Megatron's warm-up: (pp - rank - 1) * 2 + (vpp - 1) * pp on rank 0, and the one that runs."""
    assert in_flight_chunks(layout) == chunks


@pytest.mark.parametrize("point", [p for p in load_points() if p.use != "note"], ids=lambda p: p.id)
def test_published_jobs_are_not_called_impossible(point: Point) -> None:
    """They ran: the lower estimate must leave a way, by recomputing at most."""
    assert point.predict().lean.fits


@pytest.mark.parametrize(
    ("model", "topology", "gpus", "layout"),
    [
        ("llama3_8b", "h100_hgx", 1, Layout()),  # 16 bytes a parameter are 128 GB
        ("llama3_70b", "h100_hgx", 8, Layout(tp=8)),  # 18 bytes of 8.8 billion are 159 GB
        ("llama3_70b", "gb200_nvl72", 4, Layout(tp=4)),
        ("llama3_405b", "gb200_nvl72", 64, Layout(tp=8)),  # weights and gradients of 50 billion are 300 GB
        ("llama3_405b", "h100_hgx", 64, Layout(tp=8, pp=8)),  # 6.5 billion with 18 bytes are 117 GB
        ("deepseek_v3", "h100_hgx", 64, Layout(ep=64)),
        ("qwen3_235b", "gb200_nvl72", 8, Layout(ep=8)),
    ],
)  # fmt: skip
def test_what_cannot_fit_is_never_said_to(model: str, topology: str, gpus: int, layout: Layout) -> None:
    """Weights, gradients and optimizer state alone, counted by hand, exceed the device."""
    shape, machine = shape_of(load_model(model)), load_topology(topology)
    rules = policy("bf16", None, len(shape.layers), machine.gpu)
    placement = place(machine, gpus, layout)
    assert fitting(shape, placement, rules, gbs=gpus, seq=1024, lean=True) is None
    assert fitting(shape, placement, rules, gbs=gpus, seq=1024, lean=False) is None


# peak GB measured on an H100 or H200, of the jobs in points.yaml
MEASURED = {"h100-30m": 14.8, "h100-124m": 15.1, "h100-350m": 37.1, "h100-350m-engine": 40.8,
            "h200-350m-nvidia_nvfp4": 37.5, "h200-350m-quartet2": 36.7, "h200-350m-quartet": 36.9,
            "h200-350m-tetrajet": 36.5}  # fmt: skip


@pytest.mark.parametrize(("name", "peak"), MEASURED.items())
def test_the_upper_estimate_lies_above_measured_peaks(name: str, peak: float) -> None:
    point = next(p for p in load_points() if p.id == name)
    assert point.predict().memory.total - point.predict().memory.reserve > peak * 0.8
    assert point.predict().memory.total > peak


@pytest.mark.parametrize("key", ["micro_batch", "pp", "tp", "cp"])
def test_more_samples_need_more_and_more_ranks_less(key: str) -> None:
    base = Layout(tp=2, pp=2)
    more = dataclasses.replace(base, **{key: 2 * getattr(base, key)})
    a, b = (estimate("llama3_70b", "gb200_nvl72", 64, x, "nvfp4", gbs=512) for x in (base, more))
    assert (b.total > a.total) is (key == "micro_batch")


def test_the_lower_estimate_is_lower_and_codes_save_activations() -> None:
    layout = Layout(tp=4, pp=8, vpp=8, cp=2)
    upper, lower = (estimate("llama3_405b", "gb200_nvl72", 512, layout, "nvfp4", lean=x) for x in (False, True))
    assert lower.total < upper.total
    assert upper.activations < estimate("llama3_405b", "gb200_nvl72", 512, layout, "bf16").activations


def test_recompute_and_offload_save() -> None:
    base = Layout(fsdp=64, micro_batch=2)
    sizes = [
        estimate("llama3_70b", "gb200_nvl72", 64, dataclasses.replace(base, **kw), "fp8").activations
        for kw in ({}, {"recompute": "selective"}, {"recompute": "selective", "offload": 0.5}, {"recompute": "full"})
    ]
    assert sizes == sorted(sizes, reverse=True)
