"""Every parallel layout trains the same model: bit for bit as with Megatron's own linears, and as one process does."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from fp4dist.megatron.sites import gpt_sites
from fp4dist.train import engine_megatron, loop
from tests.distributed import run_ranks
from tests.train.tiny_run import FP4, losses, metrics, run_without_picture, tiny_run, write_counting_tokens

pytestmark = pytest.mark.distributed

ENDS = {  # six layers in four chunks: the first and the last hold one, the others two
    "ends": ("model.num_layers=6", "parallel.pp=2", "parallel.vpp=2", "parallel.ends_as_layers=true"),
}
DEEP = (
    "model.num_layers=4", "train.steps=5", "train.global_batch_size=8", "train.micro_batch_size=2",
    "train.eval_every=5", "optim.lr=4e-3", "optim.schedule=constant",
)  # fmt: skip
TWO = {
    "tp2": ("parallel.tp=2",),
    "tp2sp": ("parallel.tp=2", "parallel.sequence_parallel=true"),
    "pp2": ("parallel.pp=2",),
    "vpp": ("parallel.pp=2", "parallel.vpp=2"),
    "dp2": (),
    # Megatron's own attention has context parallelism only in Transformer Engine: "stock" has SdpaAttention here, too
    "cp2": ("parallel.cp=2",),
}
BLOCKS = (  # sizes that blocks and rotations of 128 divide
    "model.hidden_size=128", "model.num_query_groups=4", "model.seq_length=64", "train.global_batch_size=8",
)  # fmt: skip
EXPERTS = (
    "model.moe={num_experts: 4, top_k: 2, ffn_hidden_size: 64, shared_ffn_hidden_size: 64}",
    "model.num_layers=2",
)
TWO_WITH_EXPERTS = {
    "ep2": (*EXPERTS, "parallel.ep=2"),
    "ep2_loop": (*EXPERTS, "parallel.ep=2", "model.moe.grouped_gemm=false"),
}
FOUR = {
    "pp2tp2sp": ("parallel.pp=2", *TWO["tp2sp"]),
    "cp2tp2sp": ("parallel.cp=2", *TWO["tp2sp"]),
    "vpp_dp2_tied": (*TWO["vpp"], "model.tie_embeddings=true"),
    "pp2_inside_dp2": (*TWO["pp2"], "parallel.order=tp-cp-ep-pp-dp"),
}


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(write_counting_tokens(tmp_path))


Found = tuple[list[float], list[float], list[float]]


def train(folder: str, name: str, overrides: tuple[str, ...], *, stock: bool = False) -> Found:
    """(losses, gradient norms, validation losses) of a run; `stock`: with Megatron's own linears."""
    config = tiny_run(Path(folder), *overrides, name=f"{name}_stock" if stock else name)
    with pytest.MonkeyPatch.context() as patch:
        if stock:
            patch.setattr(loop, "build_chunks", partial(loop.build_chunks, linears="megatron"))
            apply = loop.apply_recipe
            patch.setattr(loop, "apply_recipe", lambda *a, **k: apply(*a, **(k | {"sites": gpt_sites(config.model)})))
        summary = run_without_picture(config)
    dist.barrier()  # rank 0 has written the metrics that all read
    norms = [line["grad_norm"] for line in metrics(config) if "loss" in line]
    return losses(config), norms, [loss for _, loss in summary.val_losses]


def ours_and_stock(folder: str, cases: dict[str, tuple[str, ...]]) -> dict[str, tuple[Found, Found]]:
    return {
        name: (train(folder, name, (*DEEP, *case)), train(folder, name, (*DEEP, *case), stock=True))
        for name, case in cases.items()
    }


def one_process(folder: str, cases: dict[str, tuple[str, ...]]) -> dict[str, Found]:
    return {name: train(folder, name, (*DEEP, *case)) for name, case in cases.items()}


def assert_close(found: Found, expected: Found, tolerance: float, name: str) -> None:
    for values, wanted, looser in zip(found, expected, (1, 10, 1), strict=True):  # norms differ first
        assert values == pytest.approx(wanted, rel=looser * tolerance), name


def test_two_ranks_train_as_stock_megatron_and_as_one_process(folder: str) -> None:
    (alone,) = run_ranks(one_process, 1, folder, {"one": (), "experts": EXPERTS}, timeout=300)
    first, second = run_ranks(ours_and_stock, 2, folder, TWO | TWO_WITH_EXPERTS, timeout=300)
    assert alone["one"][0][-1] < alone["one"][0][0] - 0.15, "the tiny model must learn, or equality says nothing"
    assert first == second, "ranks must agree on every number"
    for name, (ours, stock) in first.items():
        assert ours == stock, name
        assert_close(ours, alone["experts" if name in TWO_WITH_EXPERTS else "one"], 1e-5, name)


def test_ends_that_count_as_layers(folder: str) -> None:
    (alone,) = run_ranks(one_process, 1, folder, {"one": ("model.num_layers=6",)}, timeout=300)
    first, second = run_ranks(ours_and_stock, 2, folder, ENDS, timeout=300)
    assert first == second
    ours, stock = first["ends"]
    assert ours == stock
    assert_close(ours, alone["one"], 1e-5, "ends")


def test_four_ranks_train_as_stock_megatron_and_as_one_process(folder: str) -> None:
    tied = ("model.tie_embeddings=true",)
    (alone,) = run_ranks(one_process, 1, folder, {"one": (), "tied": tied}, timeout=300)
    first, *others = run_ranks(ours_and_stock, 4, folder, FOUR, timeout=300)
    assert all(other == first for other in others), "ranks must agree on every number"
    for name, (ours, stock) in first.items():
        assert ours == stock, name
        assert_close(ours, alone["tied" if "tied" in name else "one"], 1e-5, name)


# -- overlapped gathers

MANY_BUCKETS = 4096  # elements of a bucket: every few parameters have one, where Megatron's default is one for all


def overlapped_and_not(folder: str) -> tuple[list[Found], list[tuple[int, int]]]:
    """(runs without and with overlap, bucket groups of each run: those of all ranks' parameters, those of experts)."""
    settings, groups = engine_megatron.DistributedDataParallelConfig, []

    class Counted(engine_megatron.DistributedDataParallel):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            groups.append((len(self.bucket_groups), len(self.expert_parallel_bucket_groups)))

    # without clipping: the buckets decide in which order the norm is summed, hence by what gradients would be scaled
    experts = (*DEEP, *EXPERTS, *BLOCKS, f"recipe={FP4}", "optim.clip_grad=0", "train.steps=3", "train.eval_every=3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_megatron, "DistributedDataParallel", Counted)
        patch.setattr(engine_megatron, "DistributedDataParallelConfig", partial(settings, bucket_size=MANY_BUCKETS))
        runs = [
            train(folder, f"overlap_{overlap}", (*experts, f"engine.overlap={overlap}"))
            for overlap in ("false", "true")
        ]
    return runs, groups


def test_overlapped_gathers_bring_weights_that_grouped_experts_read(folder: str) -> None:
    """No weight is read before its bucket has arrived, also none of a linear that is not called for its product."""
    first, second = run_ranks(overlapped_and_not, 2, folder, timeout=300)
    assert first == second
    (plain, overlapped), (_, (dense, of_experts)) = first
    assert dense > 1
    assert of_experts > 1
    (losses_, norms, validation), (expected, expected_norms, expected_validation) = overlapped, plain
    assert losses_ == expected
    assert validation == expected_validation
    assert norms == pytest.approx(expected_norms, rel=1e-6)


# -- FP4

WIDE = (  # sizes that every block and rotation divides on each of two ranks, also in both of its pieces of the samples
    "model.num_layers=4", "model.hidden_size=256", "model.ffn_hidden_size=256", "model.num_attention_heads=8",
    "model.num_query_groups=8", "model.seq_length=128", "train.micro_batch_size=4", "train.global_batch_size=8",
    "train.steps=2", "train.eval_every=2", "optim.lr=1e-3", "optim.eps=1e-2", "optim.schedule=constant",
)  # fmt: skip


def in_fp4(folder: str, layouts: dict[str, tuple[str, ...]]) -> dict[tuple[str, str], Found]:
    return {
        (recipe, name): train(folder, f"{recipe}_{name}", (*WIDE, f"recipe={recipe}", *layout))
        for recipe in (FP4, "quartet2")
        for name, layout in layouts.items()
    }


def test_fp4_losses_do_not_depend_on_the_layout(folder: str) -> None:
    """Pipelines give the numbers of one process; splits of a GEMM sum in another order, which flips codes.

    A flipped code re-rolls the rounding of what depends on it, and Adam's first steps follow the gradient's sign; so
    those are compared with an eps under which an update is as small as its gradient.
    """
    layouts = {name: TWO[name] for name in ("tp2sp", "vpp", "cp2")}
    (alone,) = run_ranks(in_fp4, 1, folder, {"one": ()}, timeout=300)
    first, second = run_ranks(in_fp4, 2, folder, layouts, timeout=300)
    assert first == second
    for (recipe, name), (losses_, _, validation) in first.items():
        expected, _, expected_validation = alone[recipe, "one"]
        tolerance = 1e-3 if name in ("tp2sp", "cp2") else 1e-6
        assert losses_ == pytest.approx(expected, abs=tolerance), (recipe, name)
        assert validation == pytest.approx(expected_validation, abs=tolerance), (recipe, name)


# -- recomputation

FULL, SELECTIVE = ("train.recompute=full",), ("train.recompute=selective", "train.recompute_modules=[mlp,core_attn]")


def with_and_without_recompute(folder: str, cases: dict[str, tuple[str, ...]]) -> dict[str, list[Found]]:
    return {
        name: [
            train(folder, f"{name}{i}", (*DEEP, "train.steps=2", "train.eval_every=2", *case, *recompute))
            for i, recompute in enumerate(((), FULL, SELECTIVE))
        ]
        for name, case in cases.items()
    }


def test_recomputation_changes_no_bit(folder: str) -> None:
    """Also where other micro-batches run between a layer's forward and its replay."""
    fp4 = ("recipe=quartet2", *BLOCKS)
    (alone,) = run_ranks(with_and_without_recompute, 1, folder, {"one": fp4})
    first, second = run_ranks(
        with_and_without_recompute, 2, folder, {"pp2": (*fp4, *TWO["pp2"]), "vpp": (*fp4, *TWO["vpp"])}, timeout=300
    )
    assert first == second
    for name, (off, full, selective) in {**alone, **first}.items():
        assert full == off, name
        assert selective == off, name


# -- checkpoints

# the first of two pipeline stages has none of them
LATE_EXPERTS = ("model.moe={num_experts: 4, top_k: 2, ffn_hidden_size: 64, first_dense_layers: 2}",)
MOVES = {  # from -> to; the names say which weights meet which layout
    "tp2_pp2": (TWO["tp2"], TWO["pp2"]),
    "tp2sp_vpp": (TWO["tp2sp"], TWO["vpp"]),
    "vpp_dp2": (TWO["vpp"], ()),
    "cp2_tp2": (TWO["cp2"], TWO["tp2"]),
    "experts_ep2_dp2": ((*EXPERTS, "parallel.ep=2"), EXPERTS),
    "experts_dp2_ep2_loop": (EXPERTS, TWO_WITH_EXPERTS["ep2_loop"]),
    "late_pp2_dp2": ((*LATE_EXPERTS, *TWO["pp2"]), LATE_EXPERTS),
    "late_dp2_pp2": (LATE_EXPERTS, (*LATE_EXPERTS, *TWO["pp2"])),
}


def stop_and_move(folder: str) -> dict[str, list[float]]:
    """Losses of steps 3 to 5 in another layout than steps 1 and 2."""
    found = {}
    for name, (before, after) in MOVES.items():
        train(folder, f"{name}_from", (*DEEP, *before, "train.stop_after=2"))
        load = f"checkpoint.load={folder}/{name}_from/checkpoints/step_00000002"
        found[name] = train(folder, f"{name}_to", (*DEEP, *after, load))[0]
    return found


def test_checkpoints_move_between_layouts(folder: str) -> None:
    models = {"one": (), "experts": EXPERTS, "late": LATE_EXPERTS}
    (whole,) = run_ranks(one_process, 1, folder, models, timeout=300)
    first, second = run_ranks(stop_and_move, 2, folder, timeout=400)
    assert first == second
    for name, losses_ in first.items():
        expected = whole[name.partition("_")[0] if name.startswith(("experts", "late")) else "one"][0]
        assert losses_ == pytest.approx(expected[2:], rel=1e-5), name


def stop_and_go_on(folder: str) -> tuple[list[float], list[float]]:
    """Losses of a run and of one that stopped and went on, where no rank's random states are another's."""
    layout = (*DEEP, *EXPERTS, "parallel.ep=2", *TWO["tp2sp"])
    train(folder, "stopped", (*layout, "train.stop_after=2"))
    return train(folder, "whole", layout)[0], train(folder, "stopped", layout)[0]


def test_a_checkpoint_of_experts_beside_tensor_parallelism_resumes(folder: str) -> None:
    for whole, resumed in run_ranks(stop_and_go_on, 4, folder, timeout=300):
        assert len(whole) == 5
        assert resumed == whole
