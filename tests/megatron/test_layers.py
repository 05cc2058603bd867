"""Megatron's tensor-parallel linears under a plan: bits of all six operands do not depend on the split.

Given the same logical x, W and dY, a column- or row-parallel linear split over tensor-parallel ranks, with and without
sequence parallelism, and over context-parallel ranks, multiplies exactly the codes and scales of one rank; with recipe
bf16 it gives Megatron's own bits. What sequence parallelism gathers travels packed, and the bytes are counted.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from fp4dist.errors import RecipeMismatch
from fp4dist.nn.apply import AppliedRecipe, apply_recipe
from fp4dist.nn.comm import SLOT_DIMS, Dim
from fp4dist.numerics import BlockScaledTensor
from fp4dist.numerics.codes import unpack
from fp4dist.numerics.tensor import PartedTensor
from fp4dist.spec.load import load_recipe, shipped
from fp4dist.spec.recipe import GEMMS, SLOTS, Dgrad, Fprop, LinearRecipe, Recipe, Rule, Wgrad
from tests.distributed import megatron_groups, run_ranks
from tests.generators import normal, spec

BATCH, INPUTS, OUTPUTS = 2, 128, 256
NV, SQUARE, SR = spec("nvfp4"), spec("nvfp4_16x16"), spec("nvfp4_sr")
LINEARS: dict[str, LinearRecipe] = {
    **{
        f"{name}:{linear}": load_recipe(name).linears[linear]
        for name in shipped("recipes")
        for linear in load_recipe(name).linears
    },
    "x reused": LinearRecipe(fprop=Fprop(x=SQUARE), wgrad=Wgrad(dy=SR, x=replace(SQUARE, source="reuse"))),
    "dy mixed": LinearRecipe(dgrad=Dgrad(dy=SR), wgrad=Wgrad(x=NV)),
    "forward noise": LinearRecipe(fprop=Fprop(x=SR, w=SR), wgrad=Wgrad(x=replace(SR, source="requant"))),
    "mxfp4": LinearRecipe(dgrad=Dgrad(dy=spec("mxfp4_34_sr")), wgrad=Wgrad(dy=spec("mxfp4_ceil_sr"), x=spec("mxfp4"))),
}


class Layout(NamedTuple):
    tp: int = 1
    cp: int = 1
    sequence_parallel: bool = False


class Case(NamedTuple):
    linear: str
    kind: str
    tokens: int


def fits(linear: LinearRecipe, kind: str) -> bool:
    """Whether a rank of two has whole blocks and rotations."""
    (inputs, outputs) = (INPUTS, OUTPUTS // 2) if kind == "column" else (INPUTS // 2, OUTPUTS)
    sizes = {"fprop.x": inputs, "fprop.w": inputs, "dgrad.dy": outputs, "dgrad.w": outputs}
    return not any(n % s.columns_multiple for slot, n in sizes.items() if (s := linear.slot(slot)) is not None)


CASES = [Case(name, kind, 512) for name, it in LINEARS.items() for kind in ("column", "row") if fits(it, kind)]
# 64 tokens a rank: less than a rotation of 128, so what contracts tokens falls back
SMALL = [Case(name, kind, 128) for name in ("quartet2:fp4", "nvidia_nvfp4:fp4") for kind in ("column", "row")]


def everywhere(linear: LinearRecipe) -> Recipe:
    """One LinearRecipe on every linear."""
    return Recipe(name="test", linears={"it": linear}, rules=(Rule(path="*", linear="it"),))


def make_layer(kind: str, sequence_parallel: bool, ours: bool = True, **settings: Any) -> Any:
    """A Megatron linear whose logical weight is the same for every tensor-parallel size."""
    from megatron.core import parallel_state as ps
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    from fp4dist.megatron.layers import Fp4ColumnParallelLinear, Fp4RowParallelLinear

    tp = ps.get_tensor_model_parallel_world_size()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=64,
        num_attention_heads=4,
        use_cpu_initialization=True,
        tensor_model_parallel_size=tp,
        sequence_parallel=sequence_parallel,
        gradient_accumulation_fusion=False,
    )
    common: dict[str, Any] = dict(config=config, init_method=torch.nn.init.normal_, bias=False) | settings
    if kind == "column":
        layer = (Fp4ColumnParallelLinear if ours else ColumnParallelLinear)(INPUTS, OUTPUTS, **common)
    else:
        cls = Fp4RowParallelLinear if ours else RowParallelLinear
        row: dict[str, Any] = dict(input_is_parallel=True, skip_bias_add=True) | common
        layer = cls(INPUTS, OUTPUTS, **row)
    weight = normal(OUTPUTS, INPUTS, seed=1).chunk(tp, 0 if kind == "column" else 1)[
        ps.get_tensor_model_parallel_rank()
    ]
    layer.weight.data = weight.clone()  # type: ignore[union-attr]
    return layer


def sequence_of(cp: int, rank: int, length: int) -> torch.Tensor:
    """Sequence positions of a context-parallel rank: an early and a late piece (Megatron's zigzag)."""
    pieces = torch.arange(length).chunk(2 * cp)
    return torch.cat((pieces[rank], pieces[2 * cp - 1 - rank])) if cp > 1 else torch.arange(length)


def my_part(whole: torch.Tensor, features_split: bool, tokens_split: bool) -> torch.Tensor:
    """This rank's part of [S, B, features]."""
    from megatron.core import parallel_state as ps

    tp, rank = ps.get_tensor_model_parallel_world_size(), ps.get_tensor_model_parallel_rank()
    cp, context_rank = ps.get_context_parallel_world_size(), ps.get_context_parallel_rank()
    part = whole[sequence_of(cp, context_rank, len(whole))]
    for axis, split in ((2, features_split), (0, tokens_split)):
        part = part.chunk(tp, axis)[rank] if split else part
    return part.clone()


def run_layer(
    layer: Any, kind: str, sequence_parallel: bool, tokens: int = 128, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Forward and backward on this rank's part of the logical x and dY."""
    column = kind == "column"
    x = normal(tokens, INPUTS, seed=2).reshape(-1, BATCH, INPUTS).to(dtype)
    dy = normal(tokens, OUTPUTS, seed=3).reshape(-1, BATCH, OUTPUTS).to(dtype)
    x = my_part(x, not column, column and sequence_parallel).requires_grad_()
    y, _ = layer(x)
    y.backward(my_part(dy, column, not column and sequence_parallel))
    assert x.grad is not None
    return {"y": y.detach(), "dx": x.grad, "dw": layer.weight.grad}


def apply(layer: torch.nn.Module, linear: LinearRecipe, tokens: int | None = None) -> AppliedRecipe:
    whole = layer if hasattr(layer, "layer") else torch.nn.ModuleDict({"layer": layer})
    applied = apply_recipe(whole, everywhere(linear), seed=5, tokens=tokens)
    applied.clock.step, applied.clock.micro_batch = 7, 3
    return applied


def codes_of(q: BlockScaledTensor) -> torch.Tensor:
    """[samples, R, C], one code a byte."""
    samples = [q.sample(i).codes for i in range(q.samples)]
    return torch.stack([unpack(codes) if q.format.element.packed else codes for codes in samples])


def capture(layer: Any) -> dict[str, Any]:
    """Slot -> (codes [samples, R, C], scales, global scale) that the layer's GEMMs get, from now on."""
    captured: dict[str, Any] = {}
    kernels = layer.plan.kernels
    for gemm in [g for g in GEMMS if g in kernels]:

        def recording(*operands: Any, _gemm: str = gemm, _kernel: Any = kernels[gemm], **named: Any) -> torch.Tensor:
            for slot, q in zip([s for s in SLOTS if s.startswith(_gemm)], operands, strict=True):
                q = q.main if isinstance(q, PartedTensor) else q
                if isinstance(q, BlockScaledTensor):
                    captured[slot] = (codes_of(q), q.scales, q.global_scale)
            return _kernel(*operands, **named)

        kernels[gemm] = recording
    return captured


class Outcome(NamedTuple):
    place: tuple[int, int]  # (tp rank, cp rank)
    operands: dict[str, Any]
    results: dict[str, torch.Tensor]
    planned: dict[str, str]
    gathers: dict[tuple[str, str], int]


def all_cases(layouts: list[Layout], cases: list[Case]) -> list[Outcome]:
    """For every layout and case, in this order: what this rank multiplied, and what came out."""
    outcomes = []
    for layout in layouts:
        with megatron_groups(layout.tp, cp=layout.cp) as ps:
            for case in cases:
                layer = make_layer(case.kind, layout.sequence_parallel)
                applied = apply(layer, LINEARS[case.linear], case.tokens // layout.cp)
                operands = capture(layer)
                results = run_layer(layer, case.kind, layout.sequence_parallel, case.tokens)
                applied.check_counts()
                at = (ps.get_tensor_model_parallel_rank(), ps.get_context_parallel_rank())
                gathers = dict(applied.targets[0].module.plan.tally.gathers)  # type: ignore[union-attr]
                outcomes.append(Outcome(at, operands, results, applied.rows[0].gather, gathers))
    return outcomes


def index_of(dim: Dim, length: int, split: str, layout: Layout, place: tuple[int, int]) -> torch.Tensor:
    """Global positions along one dimension of what this rank multiplies."""
    if dim == "T":
        positions = torch.arange(length).reshape(-1, BATCH)
        return positions[sequence_of(layout.cp, place[1], len(positions))].flatten()
    return torch.arange(length).chunk(layout.tp)[place[0]] if dim == split else torch.arange(length)


def shared(values: torch.Tensor, codes: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """Of [m, n] values, each shared by a tile of the matrix, those of rows i and columns j; a [] value itself."""
    if values.dim() == 0:
        return values
    rows, columns = codes.shape[1] // values.shape[0], codes.shape[2] // values.shape[1]
    return values[i[::rows] // rows][:, j[::columns] // columns]


def assert_part_of(whole: Outcome, part: Outcome, case: Case, layout: Layout) -> None:
    name, split = f"{case} {layout} {part.place}", "O" if case.kind == "column" else "I"
    assert set(whole.operands) == set(part.operands), name
    for slot, (codes, scales, global_scale) in whole.operands.items():
        i, j = (
            index_of(d, n, split, layout, part.place) for d, n in zip(SLOT_DIMS[slot], codes.shape[1:], strict=True)
        )
        got = part.operands[slot]
        wanted = codes[:, i][:, :, j]
        assert torch.equal(got[0], wanted), f"{name} {slot}: {(got[0] != wanted).sum()} codes differ"
        assert torch.equal(got[1], shared(scales, codes, i, j)), f"{name} {slot}: scales"
        assert torch.equal(got[2], shared(global_scale, codes, i, j)), f"{name} {slot}: global scales differ"


def assert_same_results(whole: Outcome, parts: list[Outcome], case: Case, layout: Layout) -> None:
    """y, dX and dW put together again; equal codes, so only the order of fp32 sums differs."""
    column = case.kind == "column"
    y_tokens, x_tokens = (layout.sequence_parallel and not column, layout.sequence_parallel and column)
    sizes = {"y": ("O", OUTPUTS, column, y_tokens), "dx": ("I", INPUTS, not column, x_tokens)}
    for name, (_, features, split, tokens_split) in sizes.items():
        built = torch.full((case.tokens // BATCH, BATCH, features), float("nan"))
        for part in parts:
            s = sequence_of(layout.cp, part.place[1], case.tokens // BATCH)
            s = s.chunk(layout.tp)[part.place[0]] if tokens_split else s
            f = torch.arange(features).chunk(layout.tp)[part.place[0]] if split else torch.arange(features)
            built[s[:, None, None], torch.arange(BATCH)[None, :, None], f[None, None]] = part.results[name]
        torch.testing.assert_close(built, whole.results[name], rtol=1e-4, atol=1e-3, msg=f"{case} {layout} {name}")
    shards = [sum(p.results["dw"] for p in parts if p.place[0] == rank) for rank in range(layout.tp)]
    dw = torch.cat(shards, 0 if column else 1)  # type: ignore[arg-type]
    torch.testing.assert_close(dw, whole.results["dw"], rtol=1e-4, atol=1e-3, msg=f"{case} {layout} dw")


def compare(layouts: list[Layout], cases: list[Case], world: int) -> list[list[Outcome]]:
    """Run on one rank and in `layouts`; every part must be that of the whole. Returns outcomes[rank][layout, case]."""
    whole = run_ranks(all_cases, 1, [Layout()], cases)[0]
    ranks = run_ranks(all_cases, world, layouts, cases)
    for number, layout in enumerate(layouts):
        for i, case in enumerate(cases):
            outcomes = [rank[number * len(cases) + i] for rank in ranks]
            parts = list({outcome.place: outcome for outcome in outcomes}.values())  # data-parallel ranks are copies
            for part in parts:
                assert_part_of(whole[i], part, case, layout)
                ran = {slot: how for slot, how in part.gathers}
                assert ran == part.planned or _gathered_once(part), f"{case}: planned {part.planned}, ran {ran}"
            assert_same_results(whole[i], parts, case, layout)
    return ranks


def _gathered_once(part: Outcome) -> bool:
    """A row-parallel layer that gathers dY once in high precision counts it under the first slot."""
    return set(part.planned.values()) == {"high"} and dict(part.gathers) == {("dgrad.dy", "high"): 1}


@pytest.mark.distributed
def test_codes_do_not_depend_on_the_split() -> None:
    ranks = compare([Layout(tp=2), Layout(tp=2, sequence_parallel=True)], CASES, 2)
    packed = dict(zip(CASES, [o.planned for o in ranks[0][len(CASES) : 2 * len(CASES)]], strict=True))
    for name in ("nvidia_nvfp4:fp4", "nvidia_nvfp4_46:fp4", "quartet2:fp4", "tetrajet_v2_core:fp4"):
        assert packed[Case(name, "column", 512)] == {"fprop.x": "packed", "wgrad.x": "packed"}
        assert packed[Case(name, "row", 512)] == {"dgrad.dy": "packed", "wgrad.dy": "packed"}
    tail = Case("nvidia_nvfp4:fp4_fprop_bf16", "column", 512)
    assert packed[tail] == {"fprop.x": "high", "wgrad.x": "packed"}
    assert packed[Case("dy mixed", "row", 512)] == {"dgrad.dy": "high", "wgrad.dy": "high"}
    assert all(o.planned == {} for o in ranks[0][: len(CASES)])


@pytest.mark.distributed
def test_codes_do_not_depend_on_context_parallelism_with_and_without_the_others() -> None:
    names = ("nvidia_nvfp4:fp4", "quartet2:fp4", "tetrajet_v2_core:fp4", "x reused", "forward noise", "mxfp4")
    names = (*names, "averis:fp4")  # a mean over tokens
    cases = [Case(name, kind, 512) for name in names for kind in ("column", "row")]
    compare([Layout(2, 2, True), Layout(2, 2), Layout(cp=2)], cases, 4)


@pytest.mark.distributed
def test_too_few_tokens_for_a_packed_shard_fall_back() -> None:
    ranks = compare([Layout(tp=2, sequence_parallel=True)], SMALL, 2)
    planned = dict(zip(SMALL, [o.planned for o in ranks[0]], strict=True))
    rotated = SMALL[0].linear
    assert planned[Case(rotated, "column", 128)] == {"fprop.x": "packed", "wgrad.x": "packed"}  # forward codes again
    assert planned[Case(rotated, "row", 128)] == {"dgrad.dy": "high", "wgrad.dy": "high"}


# ---------- bytes


def gathered_bytes() -> list[tuple[int, int, dict[tuple[str, str], int]]]:
    """(bytes received, in high precision, gathers) of a bf16 column- and row-parallel layer."""
    found = []
    with megatron_groups(2):
        for kind in ("column", "row"):
            layer = make_layer(kind, True).bfloat16()
            applied = apply(layer, LINEARS["quartet2:fp4"])
            with torch.no_grad():
                layer(my_part(torch.ones(256, BATCH, INPUTS).bfloat16(), kind == "row", kind == "column"))
            assert applied.counts()["gathered_bytes"] == 0  # as GEMMs: evaluation is not counted
            run_layer(layer, kind, True, 512, torch.bfloat16)
            counts = applied.counts()
            tally = applied.targets[0].module.plan.tally  # type: ignore[union-attr]
            found.append((counts["gathered_bytes"], counts["gathered_bytes_high"], dict(tally.gathers)))
    return found


@pytest.mark.distributed
def test_packed_gathers_save_what_the_format_promises() -> None:
    elements = {"column": 256 * INPUTS, "row": 256 * OUTPUTS}  # of the other rank's part
    for column, row in run_ranks(gathered_bytes, 2):
        packed = 2 * elements["column"] * 9 // 16  # 4 bits and an 8-bit scale for 16: x rows, then x columns
        assert column == (packed, 2 * 2 * elements["column"], {("fprop.x", "packed"): 1, ("wgrad.x", "packed"): 1})
        assert column[1] / column[0] == pytest.approx(2 / 0.5625)  # 3.56
        packed = 2 * elements["row"] * 9 // 16  # dY rows and dY columns, against one gather in bf16
        assert row == (packed, 2 * elements["row"], {("dgrad.dy", "packed"): 1, ("wgrad.dy", "packed"): 1})


# ---------- Megatron's own bits


def bits_against_megatron() -> None:
    """Recipe bf16 and no plan at all, against Megatron's classes, in the same layout."""
    with megatron_groups(2):
        for kind in ("column", "row"):
            for sequence_parallel in (False, True):
                for settings in ({}, {"bias": True, "skip_bias_add": False}, {"bias": True, "skip_bias_add": True}):
                    theirs = run_layer(
                        make_layer(kind, sequence_parallel, ours=False, **settings), kind, sequence_parallel
                    )
                    for recipe in ("bf16", None):
                        layer = make_layer(kind, sequence_parallel, **settings)
                        if recipe is not None:
                            apply_recipe(torch.nn.ModuleDict({"layer": layer}), recipe)
                        ours = run_layer(layer, kind, sequence_parallel)
                        for name, value in theirs.items():
                            assert torch.equal(value, ours[name]), (
                                f"{kind} sequence_parallel={sequence_parallel} {settings} {recipe} {name}"
                            )


@pytest.mark.distributed
def test_bf16_recipe_gives_megatrons_bits() -> None:
    run_ranks(bits_against_megatron, 2)


def biased_outputs() -> None:
    """The bias is added once, after the reduce-scatter, or handed out."""
    with megatron_groups(2):
        for skip in (False, True):
            layer = make_layer("row", True, bias=True, skip_bias_add=skip)
            layer.bias.data.copy_(torch.arange(OUTPUTS))
            plain = make_layer("row", True, bias=False)
            for it in (layer, plain):
                apply(it, LINEARS["nvidia_nvfp4:fp4"])
            x = my_part(normal(128, INPUTS, seed=2).reshape(-1, BATCH, INPUTS), True, False)
            (y, bias), (expected, _) = layer(x), plain(x)
            assert (bias is layer.bias) == skip
            assert torch.equal(y if skip else y - layer.bias, expected if skip else expected + layer.bias - layer.bias)


@pytest.mark.distributed
def test_bias_of_a_row_parallel_layer() -> None:
    run_ranks(biased_outputs, 2)


# ---------- experts: tensor-parallel, but their tokens come from the dispatcher and Megatron moves nothing


def expert_codes() -> list[dict[str, Any]]:
    """Operands of a column- and a row-parallel expert linear over all ranks as one expert-tensor-parallel group."""
    found = []
    with megatron_groups(dist.get_world_size(), etp=dist.get_world_size()):
        for kind in ("column", "row"):
            layer = make_layer(kind, dist.get_world_size() > 1, is_expert=True)
            apply(layer, LINEARS["quartet2:fp4"], 256)
            operands = capture(layer)
            results = run_layer(layer, kind, False, 256)  # all tokens on every rank, also under sequence parallelism
            assert layer.plan.tally.gathers == {}  # type: ignore[union-attr]
            found.append(operands | {"dx": results["dx"], "y": results["y"]})
    return found


@pytest.mark.distributed
def test_an_experts_codes_do_not_depend_on_its_split() -> None:
    whole, parts = run_ranks(expert_codes, 1)[0], run_ranks(expert_codes, 2)
    for i, kind in enumerate(("column", "row")):
        for rank, part in enumerate(parts):
            one, some = (Outcome((rank, 0), {s: o[i][s] for s in SLOTS}, {}, {}, {}) for o in (whole, part))
            assert_part_of(one, some, Case("quartet2:fp4", kind, 256), Layout(2))
        partial, name = ("dx", "dx") if kind == "column" else ("y", "y")
        summed = parts[0][i][partial] + parts[1][i][partial]  # the dispatcher's business
        torch.testing.assert_close(summed, whole[i][name], rtol=1e-4, atol=1e-3)


# ---------- weight gradients in fp32


def accumulated(overlap: bool) -> dict[str, torch.Tensor]:
    """main_grad of a bf16 weight after three micro-batches under Megatron's DDP, and the fp32 gradients of each."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from fp4dist.megatron.upstream import MegatronModule

    with megatron_groups():
        layer = make_layer("column", False).bfloat16()
        model = MegatronModule(layer.config)
        model.add_module("layer", layer)
        applied = apply(model, LINEARS["quartet2:fp4"])
        seen: list[torch.Tensor] = []
        kernels: Any = layer.plan.kernels  # type: ignore[union-attr]
        wgrad = kernels["wgrad"]

        def recording(*operands: Any, into: torch.Tensor | None = None) -> torch.Tensor:
            assert into is layer.weight.main_grad, "the GEMM adds to it by itself"
            seen.append(wgrad(*operands))
            return into.add_(seen[-1])

        kernels["wgrad"] = recording
        ddp = DistributedDataParallel(
            layer.config,
            DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=overlap, bucket_size=None),
            model,
        )
        ddp.zero_grad_buffer()
        for micro_batch in range(3):
            applied.clock.micro_batch = micro_batch * 2 + dist.get_rank()
            x = normal(256, INPUTS, seed=10 + applied.clock.micro_batch).reshape(-1, BATCH, INPUTS).bfloat16()
            with ddp.no_sync() if micro_batch < 2 else contextlib.nullcontext():
                y, _ = layer(x)
                y.square().mean().backward()
        ddp.finish_grad_sync()
        return {"main_grad": layer.weight.main_grad, **{str(i): dw for i, dw in enumerate(seen)}}  # type: ignore[dict-item]


@pytest.mark.distributed
@pytest.mark.parametrize("overlap", [False, True])
def test_weight_gradients_accumulate_in_fp32(overlap: bool) -> None:
    """Over micro-batches and over data-parallel ranks, bit for bit: no bf16 on the way."""
    ranks = run_ranks(accumulated, 2, overlap)
    assert all(rank["0"].dtype == torch.float32 for rank in ranks)
    local = [rank["0"] + rank["1"] + rank["2"] for rank in ranks]
    expected = local[0] / 2 + local[1] / 2  # Megatron scales by 1 / ranks before it sums
    for rank in ranks:
        assert torch.equal(rank["main_grad"], expected)
    assert not torch.equal(expected, expected.bfloat16().float())


# ---------- what is refused


def refusals() -> tuple[str, str]:
    """The errors of a context-parallel split that cuts a rotation, at once and at the first step."""
    with megatron_groups(cp=2):
        layer = make_layer("column", False)
        with pytest.raises(RecipeMismatch) as early:
            apply(layer, LINEARS["quartet2:fp4"], tokens=128)
        apply(layer, LINEARS["quartet2:fp4"])
        with pytest.raises(RecipeMismatch) as late:
            run_layer(layer, "column", False, 256)
        return str(early.value), str(late.value)


@pytest.mark.distributed
def test_a_piece_of_the_sequence_smaller_than_a_rotation_is_refused() -> None:
    for early, late in run_ranks(refusals, 2):
        assert "tokens per micro-batch = 128 / 2 pieces of the sequence = 64 is not a multiple of 128" in early
        assert "128 columns are 2 separate runs" in late
