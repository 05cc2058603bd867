"""Whole runs whose traffic is coded: they learn as exact ones do, send the bytes of the formula and nothing twice."""

from __future__ import annotations

import dataclasses
import gc
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.model_parallel_config import ModelParallelConfig

from fp4dist.cluster.topology import load_topology
from fp4dist.comm.canary import compare
from fp4dist.comm.compression import Compression, same_bits
from fp4dist.comm.policy import SMALL
from fp4dist.comm.trace import Seen, Trace, judge, profiled
from fp4dist.errors import EnvironmentMismatch, WireError
from fp4dist.megatron.pipeline_wire import CodedPipeline
from fp4dist.spec.communication import Band, Canary, CommConfig
from fp4dist.spec.wire import NVFP4_WIRE
from fp4dist.train import communication, engine_megatron
from fp4dist.train.engine_megatron import MegatronEngine
from tests.distributed import RankError, run_ranks
from tests.train.tiny_run import curve, losses, metrics, run_without_picture, tiny_run, write_counting_tokens

pytestmark = pytest.mark.distributed
STEPS = 30
LONG = (f"train.steps={STEPS}", "optim.lr=2.0e-3", "train.eval_every=0")
MSEDEN, RTN = "comm.grad_reduce=nvfp4", "comm.grad_reduce=nvfp4_nearest"
SP = ("parallel.tp=2", "parallel.sequence_parallel=true")
EXPERTS = (
    "model.moe={num_experts: 4, top_k: 2, ffn_hidden_size: 128}",
    "model.hidden_size=128",
    "model.ffn_hidden_size=256",
    "parallel.ep=2",
)
ZERO = {f"zero{stage}": ("engine.kind=deepspeed", f"engine.zero_stage={stage}") for stage in range(4)}


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(write_counting_tokens(tmp_path))


@contextmanager
def made() -> Iterator[list[Compression]]:
    """The Compressions of the runs inside."""
    found: list[Compression] = []
    real = communication.make_compression

    def make(config: Any) -> Compression | None:
        compression = real(config)
        if compression is not None:
            found.append(compression)
        return compression

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_megatron, "make_compression", make)
        if "fp4dist.train.engine_deepspeed" in __import__("sys").modules:
            patch.setattr("fp4dist.train.engine_deepspeed.make_compression", make)
        yield found


def train_all(folder: str, cases: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    """Name -> (losses, bytes that this rank's decisions announce, lines of metrics, totals of this rank) of runs."""
    __import__("fp4dist.train.engine_deepspeed")
    results = {}
    for name, overrides in cases.items():
        config = tiny_run(Path(folder), *overrides, name=name)
        with made() as compressions:
            run_without_picture(config)
        dist.barrier()
        announced = sent = 0
        for compression in compressions:
            gradients = [d for d in compression.decisions if d.direction == "grad_reduce"]
            announced = sum(d.after for d in gradients if d.wire is not None)
            account = compression.ledger.total.get("grad_reduce")
            sent = account.coded + account.exact if account is not None else 0
        results[name] = (losses(config), announced, sent, metrics(config))
    return results


def late(values: list[float]) -> float:
    return statistics.fmean(values[-10:])


def assert_learns_as(results: list[dict[str, Any]], names: dict[str, str]) -> None:
    """The mean of the last losses is within 1 % of the exact run's, and the runs differ: something was coded."""
    for name, reference in names.items():
        lines = [results[0][which][3] for which in (name, reference)]
        norms = [next(line["grad_norm"] for line in found if "grad_norm" in line) for found in lines]
        assert norms[0] == pytest.approx(norms[1], rel=0.03), f"{name}: a mean over ranks, which AdamW would not tell"
        coded, exact = results[0][name][0], results[0][reference][0]
        assert late(exact) < exact[0] - 0.3, f"{reference} must learn, or equality says nothing"
        assert late(coded) == pytest.approx(late(exact), rel=0.01), name
        assert coded != exact, name


def test_gradients_on_two_ranks_of_both_engines(folder: str) -> None:
    cases: dict[str, tuple[str, ...]] = {"exact": ()}
    cases |= {
        "mseden": (MSEDEN,),
        "rtn": (RTN, "comm.pairs=all_gather"),
        "ef": ("comm.grad_reduce=int4", "comm.error_feedback=ef"),
    }
    cases |= {name: (*engine, MSEDEN) for name, engine in ZERO.items()}
    cases["zero2"] += ("train.micro_batch_size=1",)  # two of them, and two reductions, a step
    cases["bf16"] = ("train.dtype=bf16", "engine.overlap=false", MSEDEN)
    cases["zero1_bf16"] = (*ZERO["zero1"], "train.dtype=bf16", MSEDEN)  # another optimizer class of DeepSpeed's
    cases = {name: (*sets, *LONG) for name, sets in cases.items()}
    results = run_ranks(train_all, 2, folder, cases, timeout=300)
    assert_learns_as(results, dict.fromkeys([name for name in cases if name != "exact"], "exact"))
    for rank, found in enumerate(results):
        for name, (_, announced, sent, _) in found.items():
            assert sent == STEPS * announced, (rank, name)
            assert (sent > 0) == (name != "exact"), (rank, name)
    lines = results[0]["mseden"][3]
    (canary,) = lines[1]["canary"]  # of step 1; step 0 in the clock's counting
    assert canary["one_shot"] == pytest.approx(9.3e-3 / 2, rel=0.2)  # a rank's own half is exact
    assert 0.995 < canary["cosine"] < 1
    assert abs(canary["bias"]) < 0.02
    account = lines[-1]["bytes_sent"]["grad_reduce"]
    assert account["coded"] + account["exact"] < 0.35 * account["plain"]
    assert account["extra"] == 0
    assert lines[1]["bytes_sent"]["grad_reduce"]["extra"] > 0


def test_activations_weights_and_experts_on_two_ranks(folder: str) -> None:
    pp, p2p = ("parallel.pp=2",), ("comm.pp_forward={kind: nvfp4, rounding: nearest, rotation: 128}",)
    cases: dict[str, tuple[str, ...]] = {"exact": (), "weights": ("comm.param_gather=nvfp4_nearest",)}
    cases |= {"pp": (*pp, *p2p, "comm.pp_backward=nvfp4")}
    cases |= {"sp": (*SP, "comm.sp_reduce_scatter=fp8"), "sp4": (*SP, "comm.sp_reduce_scatter=nvfp4")}
    cases |= {"sp4_again": (*SP, "comm.sp_reduce_scatter=nvfp4", "train.recompute=full")}
    cases |= {"experts_exact": EXPERTS}
    cases |= {"experts": (*EXPERTS, "comm.ep_dispatch=nvfp4_nearest", "comm.ep_combine=fp8")}
    cases = {name: (*sets, *LONG) for name, sets in cases.items()}
    chunks = (
        *pp,
        "parallel.vpp=2",
        "model.num_layers=4",
        "optim.lr=2.0e-3",
    )  # a few steps: each is as long as ten of the others
    cases |= {"vpp": (*chunks, *p2p, "comm.pp_backward=nvfp4"), "vpp_exact": chunks}
    results = run_ranks(train_all, 2, folder, cases, timeout=300)
    assert results[0]["vpp"][0] == pytest.approx(results[0]["vpp_exact"][0], rel=0.01)
    names = dict.fromkeys(("weights", "pp", "sp", "sp4"), "exact")
    assert_learns_as(results, names | {"experts": "experts_exact"})
    assert results[0]["sp4"][0] == results[0]["sp4_again"][0], "recomputed layers must send what they sent"
    last = {name: found[3][-1].get("bytes_sent", {}) for name, found in results[0].items()}
    assert last["pp"].keys() == {"pp_forward"}  # of rank 0, the first stage
    assert last["pp"]["pp_forward"]["coded"] < 0.16 * last["pp"]["pp_forward"]["plain"]
    assert last["sp"]["sp_reduce_scatter"]["coded"] < 0.27 * last["sp"]["sp_reduce_scatter"]["plain"]
    assert last["experts"].keys() == {"ep_dispatch", "ep_combine"}
    weights = last["weights"]["param_gather"]
    assert weights["coded"] + weights["exact"] < 0.16 * weights["plain"]


def weights_of_all_ranks(folder: str) -> tuple[bool, list[float]]:
    """(whether all ranks had the same weight bits after each update, distance of fp32 masters from them)."""
    same, distances = [], []
    real = MegatronEngine.train_step

    def step(engine: Any, *args: Any) -> Any:
        result = real(engine, *args)
        engine._finish_gathers()
        buckets = engine._delta._buckets
        same.extend(same_bits(b.data, b.group) for b in buckets)
        gaps = [(b.aside - torch.cat(b.seen)).norm() / b.aside.norm() for b in buckets]
        distances.append(max(map(float, gaps)))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MegatronEngine, "train_step", step)
        run_without_picture(
            tiny_run(Path(folder), "comm.param_gather=nvfp4_nearest", "train.steps=30", "train.eval_every=0")
        )
    return all(same), distances


def collectives_of_a_step(folder: str) -> tuple[list[tuple[str, str, int]], int, list[list[str]]]:
    """(name, dtype, elements of the input) of every torch.distributed call of the last step; bytes it announced; what a
    trace of it says against it, as it is, and with a compressed bucket that is summed as well, or is not sent.
    """
    traces: list[tuple[Trace, Any]] = []
    seen: list[tuple[str, str, int]] = []

    def spy(name: str, real: Any, place: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensor = args[place] if len(args) > place else next(iter(kwargs.values()))
            if isinstance(tensor, torch.Tensor):
                seen.append((name, str(tensor.dtype), tensor.numel()))
            return real(*args, **kwargs)

        return call

    real_step = MegatronEngine.train_step

    def step(engine: Any, number: int, batches: Any) -> Any:
        seen.clear()
        if number < 6:
            return real_step(engine, number, batches)
        with profiled() as trace:
            result = real_step(engine, number, batches)
        traces.append((trace, result.traffic))
        return result

    names = {
        "all_reduce": 0,
        "reduce_scatter_tensor": 1,
        "_reduce_scatter_base": 1,
        "all_to_all_single": 1,
        "reduce": 0,
    }
    with made() as compressions, pytest.MonkeyPatch.context() as patch:
        for name, place in names.items():
            patch.setattr(dist, name, spy(name, getattr(dist, name), place))
        patch.setattr(MegatronEngine, "train_step", step)
        run_without_picture(tiny_run(Path(folder), MSEDEN, "comm.canary.every=0", "train.eval_every=0", name="spied"))
    ((trace, traffic),), decisions = traces, compressions[0].decisions
    calls = trace.collectives
    twice = [*calls, Seen("reduce_scatter_", "", decisions[0].numel)]
    unsent = [call for call in calls if call.dtype != "unsigned char"]
    booked, ranks = traffic.accounts["grad_reduce"], dist.get_world_size()
    told = [judge(found, decisions, booked, ranks) for found in (calls, twice, unsent)]
    return seen, sum(d.after for d in decisions), told


def guarded(folder: str) -> dict[str, Any]:
    """Curves of runs in which the guard acts, error feedback is resumed, and validation stops."""
    out: dict[str, Any] = {}
    low = Canary(every=2, band=Band(nmse=0.01))

    def run(name: str, comm: CommConfig | None, *overrides: str, **changes: Any) -> Any:
        config = tiny_run(Path(folder), "train.eval_every=0", *overrides, name=name)
        config = dataclasses.replace(config, comm=comm, **changes)
        run_without_picture(config)
        dist.barrier()
        return config

    out["exact"] = losses(run("guard_exact", None))
    falling = CommConfig(grad_reduce="nvfp4", canary=low)
    out["fallen"] = metrics(run("guard", falling))
    run("guard_resumed", falling, "train.stop_after=3")
    out["fallen_resumed"] = metrics(run("guard_resumed", falling))
    feedback = CommConfig(grad_reduce="int4", error_feedback="loco", param_gather="nvfp4_nearest", guard=False)
    out["kept"] = curve(run("kept", feedback))
    run("kept_resumed", feedback, "train.stop_after=3")
    out["kept_resumed"] = curve(run("kept_resumed", feedback))
    zero = dataclasses.replace(feedback, error_feedback="ef")
    out["kept_zero"] = curve(run("kept_zero", zero, *ZERO["zero1"]))
    run("kept_zero_resumed", zero, *ZERO["zero1"], "train.stop_after=3")
    out["kept_zero_resumed"] = curve(run("kept_zero_resumed", zero, *ZERO["zero1"]))
    try:
        run("validated", CommConfig(grad_reduce="int4", canary=low, validate=2))
    except WireError as e:
        out["validated"] = str(e)
    return out


def kept_in_files(folder: str) -> list[dict[str, Any]]:
    """What runs of the same and of another layout find of each other's errors, which are as long."""
    found, file = [], Path(folder) / "kept_in_files"
    if dist.get_rank() == 0:
        file.mkdir()
    dist.barrier()
    for layout, folder_of in (("tp 1", file), ("tp 1", file), ("tp 2", file), ("tp 1", file.parent)):
        compression = Compression(CommConfig(grad_reduce="int4", error_feedback="ef"), seed=1)
        compression.layout = layout
        compression.feedback.error("bucket 1", 3, torch.device("cpu"))  # of steps that a roll-back undoes
        communication.load(compression, folder_of)
        dist.barrier()
        found.append(compression.feedback.state_dict())
        compression.feedback.error("bucket 0", 3, torch.device("cpu"))
        communication.save(compression, file)
        dist.barrier()
    return found


def lost_by_coding() -> tuple[str | None, str | None]:
    """Why a sum that only coding made infinite leaves the band, and one that was infinite before."""
    finite, infinite = torch.ones(512), torch.full((512,), torch.inf)
    how: dict[str, Any] = {"wire": NVFP4_WIRE, "group": None, "mean": False, "cut": False}
    pairs = ((infinite, finite), (infinite, infinite))
    first, second = (compare("x", 0, coded, exact, exact, **how).why_outside(Band()) for coded, exact in pairs)
    return first, second


def left_of_runs() -> list[str]:
    """Names of what earlier runs of this process have left of their models."""
    gc.collect()
    wrappers = "DistributedDataParallel", "Float16Module"
    return [name for o in gc.get_objects() if (name := type(o).__name__) in wrappers]


def checks_on_two_ranks(folder: str) -> dict[str, Any]:
    return {
        "weights": weights_of_all_ranks(folder),
        "collectives": collectives_of_a_step(folder),
        "left": left_of_runs(),
        "files": kept_in_files(folder),
        "lost": lost_by_coding(),
        **guarded(folder),
    }


def test_the_proof_while_running(folder: str) -> None:
    first, second = run_ranks(checks_on_two_ranks, 2, folder, timeout=300)
    for found in (first, second):
        same, distances = found["weights"]
        assert same, "all ranks hold the same bits after every update"
        assert distances[-1] < 1.5 * max(distances[2:6]), "what rounding loses does not add up"
        assert 0 < distances[-1] < 3e-3
        assert [list(errors) for errors in found["files"]] == [[], ["bucket 0"], [], []]
        assert found["lost"] == ("the exact result is finite, the coded one is not", None)
        assert found["left"] == [], "an engine that was closed holds no memory"
        seen, announced, (nothing, twice, unsent) = found["collectives"]
        assert nothing == []
        assert any("reduced in high precision" in fault for fault in twice)
        assert any("no codes in the trace" in fault for fault in unsent)
        assert not [call for call in seen if "reduce_scatter" in call[0] or call[0] == "reduce"], (
            "gradients travel once"
        )
        assert all(numel < SMALL for name, _, numel in seen if name == "all_reduce")  # losses and norms
        exchanged = [(dtype, numel) for name, dtype, numel in seen if name == "all_to_all_single"]
        assert {dtype for dtype, _ in exchanged} == {"torch.uint8"}
        assert sum(numel for _, numel in exchanged) == announced
        lines = [line for line in found["fallen"] if "loss" in line]
        assert [bool(line["bytes_sent"]) for line in lines] == [True, False, False, False, False, False]
        assert lines[0]["loss"] == found["exact"][0]
        assert [line["loss"] for line in lines] == [line["loss"] for line in found["fallen_resumed"] if "loss" in line]
        assert found["kept"] == found["kept_resumed"], "errors and weights put aside are in the checkpoint"
        assert found["kept_zero"] == found["kept_zero_resumed"], "so are the weights that all ranks hold"
        assert "the coded and the exact reduction part" in found["validated"]


def four_ranks(folder: str, cases: dict[str, tuple[str, ...]]) -> tuple[dict[str, Any], list[float]]:
    return train_all(folder, cases), along_a_pipeline()


def along_a_pipeline() -> list[float]:
    """Four stages, of which two each share a domain, and `auto`: errors of what comes from the stage before and after.

    The middle link is the only one that pays, and stages see other links than their neighbours do.
    """
    hgx = load_topology("h100_hgx")
    pairs = dataclasses.replace(hgx, host=dataclasses.replace(hgx.host, gpus=2))
    comm = CommConfig(pp_forward="auto", pp_backward="auto", topology="h100_hgx")
    model = ModelParallelConfig(pipeline_dtype=torch.float32)
    compression = Compression(comm, seed=1, topology=pairs)
    stages = CodedPipeline(dist.new_group(list(range(4))), model, compression, (2048, 1, 4096), 1)
    compression.begin_step(0)
    shape, me = (16, 1, 64), dist.get_rank()
    sent = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    before, after, _ = stages._communicate(
        tensor_send_next=sent[me] if me < 3 else None, tensor_send_prev=sent[me] if me > 0 else None,
        recv_prev=me > 0, recv_next=me < 3, tensor_shape=shape,
    )  # fmt: skip
    came = [(before, me - 1), (after, me + 1)]
    return [float((t.detach() - sent[i]).norm() / sent[i].norm()) for t, i in came if t is not None]


def test_two_levels_pipeline_and_data_on_four_ranks(folder: str) -> None:
    one = ("train.micro_batch_size=1",)
    cases: dict[str, tuple[str, ...]] = {
        "exact": one,
        "levels": (*one, MSEDEN, "comm.hierarchy=[2,2]"),
        "levels_zero1": (*one, *ZERO["zero1"], MSEDEN, "comm.hierarchy=[2,2]"),
        "levels_zero0": (*one, *ZERO["zero0"], MSEDEN, "comm.hierarchy=[2,2]"),
        "levels_zero2": (*one, *ZERO["zero2"], MSEDEN, "comm.hierarchy=[2,2]"),
        "dp_pp": (MSEDEN, "parallel.pp=2", "comm.pp_forward=nvfp4", "comm.pp_backward=nvfp4"),
        "dp_sp": (*SP, MSEDEN, "comm.sp_reduce_scatter=fp8", "comm.param_gather=nvfp4_nearest"),
    }
    cases = {name: (*sets, *LONG) for name, sets in cases.items()}
    both = run_ranks(four_ranks, 4, folder, cases, timeout=300)
    results = [found for found, _ in both]
    first, second, third, fourth = (errors for _, errors in both)
    assert first == fourth == [0.0]
    assert second[0] == third[1] == 0.0
    assert 0.05 < second[1] < 0.15
    assert 0.05 < third[0] < 0.15
    assert_learns_as(results, dict.fromkeys([name for name in cases if name != "exact"], "exact"))
    for found in results:
        for name in ("levels", "levels_zero0", "levels_zero1", "levels_zero2"):
            assert found[name][2] == STEPS * found[name][1] > 0


def mixed(folder: str, what: str) -> str:
    """Rank 1 has another wire, or never comes; the error that this rank gets."""
    wire = "int4" if what == "wire" and dist.get_rank() == 1 else "nvfp4"
    compression = Compression(CommConfig(grad_reduce=wire, timeout_s=3.0), seed=1)
    if what == "absent" and dist.get_rank() == 1:
        return "absent"
    with pytest.raises(EnvironmentMismatch) as caught:
        compression.confirm()
    assert caught.value.exit_code == 22
    return str(caught.value)


def test_mixed_configurations_stop_every_rank_with_one_message(folder: str) -> None:
    first, second = run_ranks(mixed, 2, folder, "wire", timeout=60)
    assert first == second
    assert "rank 0 and rank 1 differ" in first
    first, _ = run_ranks(mixed, 2, folder, "absent", timeout=60)
    assert "ranks [1] have not agreed" in first


def different_runs(folder: str) -> None:
    run_without_picture(tiny_run(Path(folder), "comm.grad_reduce=" + ("int4", "nvfp4")[dist.get_rank()]))


def test_a_run_with_mixed_configurations_does_not_start(folder: str) -> None:
    with pytest.raises(RankError, match="differ"):
        run_ranks(different_runs, 2, folder, timeout=60)
