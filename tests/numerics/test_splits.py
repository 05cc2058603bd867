"""Operands in parts, against formulas and numpy: what is taken out, what remains, and products of sums."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fp4dist.numerics import dequantize, matmul, quantize, requantize
from fp4dist.numerics.grouping import ReduceMax
from fp4dist.numerics.quantize import original
from fp4dist.numerics.rotation import rotate
from fp4dist.numerics.splits import (
    Parts,
    Place,
    assemble,
    bare,
    decompose,
    hot_residual,
    in_precision,
    low_rank,
    quantiles,
    take_channels,
    token_mean,
)  # fmt: skip
from fp4dist.numerics.tensor import BlockScaledTensor, Key, PartedTensor, Quantized, pack, unpack
from fp4dist.spec.blocks import Ceil, Hadamard
from fp4dist.spec.formats import E1M2, FP4_ROW, FP32, MXFP8, NVFP4, Format
from fp4dist.spec.operand import QuantSpec
from fp4dist.spec.splits import Channels, HotResidual, LowRank, Mean, Occ, Outlier, TopK
from tests.compare import assert_same_bits
from tests.generators import normal, spec

NV, SR = QuantSpec(format=NVFP4), spec("nvfp4_sr")
RHT = replace(NV, rotation=Hadamard(size=16, signs="fixed"))
KEY = Key(seed=5, layer=2, step=3, slot=0)


WHOLE = Place()


def operand(x: Tensor, of: QuantSpec, place: Place = WHOLE) -> Quantized:
    """A matrix as codes and what stands beside them, as a plan makes it."""
    parts = decompose(x, of, place)
    main = quantize(parts.rest, bare(of), place.key, place.reduce_max)
    side = parts.side
    if isinstance(of.outlier, HotResidual):
        side = hot_residual(parts.rest, main, bare(of), x.dtype, place)
    return assemble(main, side, None, bare(of), place.key)


def on_ranks(number: int, work: Callable[[int, ReduceMax], Parts | tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """`work(rank, reduce_max)` of all ranks in threads; reduce_max is their elementwise maximum."""
    given: list[Tensor | None] = [None] * number
    barrier, results = threading.Barrier(number, timeout=20), [() for _ in range(number)]

    def run(rank: int) -> None:
        def reduce_max(values: Tensor) -> Tensor:
            given[rank] = values
            barrier.wait()
            merged = torch.stack([t for t in given if t is not None]).amax(0)
            barrier.wait()
            return merged

        results[rank] = tuple(work(rank, reduce_max))  # type: ignore[call-overload]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(results)
    return results  # type: ignore[return-value]


def heavy(rows: int = 1024, columns: int = 4096) -> Tensor:
    """N e^{.6 N} with 20 channels 20 times as large (methods.md, OCC synthetic)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, columns, generator=generator)
    x = x * torch.exp(0.6 * torch.randn(rows, columns, generator=generator))
    x[:, torch.randperm(columns, generator=generator)[:20]] *= 20
    return x


def similarity(a: Tensor, b: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), 0).item()


# -- quantiles


@pytest.mark.parametrize("per", ["row", "tensor"])
@pytest.mark.parametrize("alpha", [0.9, 0.99, 0.997])
def test_quantiles_are_elements_of_nearest_rank(per: str, alpha: float) -> None:
    x = normal(6, 200, seed=1)
    ordered = np.sort(x.numpy(), axis=1) if per == "row" else np.sort(x.numpy().reshape(1, -1), axis=1)
    rank = math.ceil(round(alpha * ordered.shape[1], 6))  # 1-based
    lower, upper = quantiles(x, alpha, per)
    assert torch.equal(upper, torch.from_numpy(ordered[:, rank - 1 : rank]))
    assert torch.equal(lower, torch.from_numpy(ordered[:, -rank : ordered.shape[1] - rank + 1]))


@pytest.mark.parametrize("per", ["row", "tensor"])
@pytest.mark.parametrize("ways", [(1, 4), (4, 1), (2, 2)])
def test_quantiles_do_not_depend_on_the_split(per: str, ways: tuple[int, int]) -> None:
    x = heavy(16, 64)
    whole = quantiles(x, 0.9, per)
    height, width = 16 // ways[0], 64 // ways[1]

    def work(rank: int, reduce_max: ReduceMax) -> tuple[Tensor, ...]:
        i, j = divmod(rank, ways[1])
        key = replace(KEY, row_runs=(i * height,), rows=16, column_runs=(j * width,), columns=64)
        return quantiles(x[i * height :][:height, j * width :][:, :width], 0.9, per, key, reduce_max)

    for rank, found in enumerate(on_ranks(ways[0] * ways[1], work)):
        mine = slice(rank // ways[1] * height, (rank // ways[1] + 1) * height)
        for value, expected in zip(found, whole, strict=True):
            assert torch.equal(value, expected[mine] if per == "row" else expected)


# -- occ


@pytest.mark.parametrize(
    ("alpha", "nnz", "published"), [(0.999, 0.002, 98.6), (0.99, 0.02, 99.85), (0.97, 0.06, 99.92)]
)
def test_occ_similarity_and_share_of_the_rest(alpha: float, nnz: float, published: float) -> None:
    x = heavy()
    of = QuantSpec(format=FP4_ROW, outlier=Occ(alpha=alpha, per="tensor"))
    parts = decompose(x, of, Place())
    assert parts.side is not None
    assert parts.side.ne(0).double().mean().item() == pytest.approx(nnz, rel=1e-4)
    found = 100 * similarity(x, dequantize(operand(x, of)))
    assert found == pytest.approx(published, abs=0.15)
    assert 100 * similarity(x, dequantize(quantize(x, bare(of)))) == pytest.approx(89.4, abs=0.5)


def test_occ_clamps_and_keeps_the_rest_exactly() -> None:
    x = normal(8, 128, seed=3)
    rest, side = decompose(x, replace(NV, outlier=Occ(alpha=0.95)), Place())
    lower, upper = quantiles(x, 0.95, "row")
    expected = np.clip(x.numpy(), lower.numpy(), upper.numpy())
    assert torch.equal(rest, torch.from_numpy(expected))
    assert side is not None
    assert torch.equal(side, x - torch.from_numpy(expected))
    dropped = decompose(x, replace(NV, outlier=Occ(alpha=0.95, compensate=False)), Place())
    assert torch.equal(dropped.rest, rest)
    assert dropped.side is None


@pytest.mark.parametrize("compensate", [True, False])
def test_occ_shows_what_is_not_finite(compensate: bool) -> None:
    x = normal(8, 128, seed=3)
    x[2, 5] = float("inf")
    q = operand(x, replace(NV, outlier=Occ(alpha=0.95, compensate=compensate)))
    assert not matmul(q, normal(16, 128))[2].isfinite().any()


# -- mean


@pytest.mark.parametrize("dim", [0, 1])
def test_mean_is_that_of_the_tokens_and_leaves_it_in_no_column(dim: int) -> None:
    x = normal(96, 64, seed=1) + 3 * normal(96, 1, seed=2) + 2 * normal(1, 64, seed=3)
    parts = decompose(x, replace(NV, split=Mean(quantize=False)), Place(token_dim=dim))
    expected = x.double().mean(dim, keepdim=True)
    assert parts.side is not None
    torch.testing.assert_close(parts.side.double(), expected.expand(x.shape), rtol=1e-6, atol=1e-6)
    assert torch.equal(parts.rest, x - parts.side)
    assert parts.rest.double().mean(dim).abs().max() < 1e-6


def test_a_product_of_mean_and_representable_residuals_is_exact() -> None:
    """With r on the grid x = 1 mu^T + r loses nothing, so Y is X W^T up to the order of fp32 sums."""
    grid = torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])[torch.arange(32 * 64).reshape(32, 64) % 7]
    r = torch.cat((grid, -grid))
    r[:, ::16], r[32:, ::16] = 6.0, -6.0  # every block has the grid's maximum: its scale is 1
    mu = torch.arange(64.0)[None] - 20
    x, w = r + mu, torch.randint(-3, 4, (16, 64), generator=torch.Generator().manual_seed(0)).float()
    q = operand(x, replace(NV, split=Mean(quantize=False), scale=None), Place(token_dim=0))
    torch.testing.assert_close(dequantize(q), x, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(matmul(q, w), x @ w.t(), rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("runs", [((0,), (64,)), ((0, 96), (32, 64))])
def test_mean_does_not_depend_on_the_split_of_tokens(dim: int, runs: Sequence[tuple[int, ...]]) -> None:
    """Two ranks with a half of 128 tokens each, as halves or as context parallelism's early and late quarters."""
    x = normal(128, 32, seed=4) * torch.exp(normal(128, 32, seed=5)) - 0.7
    whole = token_mean(x if dim == 0 else x.t(), dim, None, None)

    def work(rank: int, reduce_max: ReduceMax) -> tuple[Tensor, ...]:
        size = 64 // len(runs[rank])
        mine = torch.cat([x[start : start + size] for start in runs[rank]])
        if dim == 0:
            key = replace(KEY, row_runs=runs[rank], rows=128, columns=32)
            return (token_mean(mine, 0, key, reduce_max),)
        key = replace(KEY, column_runs=runs[rank], columns=128, rows=32)
        return (token_mean(mine.t(), 1, key, reduce_max),)

    assert bool((whole < 0).any())  # signs survive the maximum
    assert all(torch.equal(found, whole) for (found,) in on_ranks(2, work))


def test_mean_in_both_dimensions_split() -> None:
    x = normal(64, 32, seed=4) - 0.5
    whole = token_mean(x, 0, None, None)

    def work(rank: int, reduce_max: ReduceMax) -> tuple[Tensor, ...]:
        i, j = divmod(rank, 2)
        key = replace(KEY, row_runs=(i * 32,), rows=64, column_runs=(j * 16,), columns=32)
        return (token_mean(x[i * 32 :][:32, j * 16 :][:, :16], 0, key, reduce_max),)

    for rank, (found,) in enumerate(on_ranks(4, work)):
        assert torch.equal(found, whole[:, rank % 2 * 16 :][:, :16])


def test_tokens_that_do_not_form_whole_chunks_are_refused() -> None:
    key = replace(KEY, row_runs=(0,), rows=96, columns=16)  # chunks of 3 tokens
    with pytest.raises(ValueError, match="chunks of 3"):
        token_mean(normal(32, 16), 0, key, lambda t: t)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("of", [NV, SR, RHT], ids=["nearest", "stochastic", "rotated"])
def test_the_mean_itself_is_rounded_in_the_operands_format(dim: int, of: QuantSpec) -> None:
    x = normal(64, 64, seed=1) + 3
    place = Place(key=KEY, token_dim=dim)
    parts = decompose(x, replace(of, split=Mean()), place)
    exact = decompose(x, replace(of, split=Mean(quantize=False)), place)
    assert parts.side is not None
    assert exact.side is not None
    assert torch.equal(parts.rest, exact.rest)  # the residual is that of the exact mean, as published
    mean, rounded = (s.select(dim, 0) for s in (exact.side, parts.side))
    assert torch.equal(parts.side, rounded.unsqueeze(dim).expand(64, 64))
    assert not torch.equal(mean, rounded)
    torch.testing.assert_close(rounded, mean, rtol=0.4, atol=0.5)
    if of is NV:
        assert torch.equal(rounded, dequantize(quantize(mean[None], NV))[0])


def test_rounding_the_mean_stochastically_is_unbiased() -> None:
    x = normal(16, 64, seed=1) + 2
    sides = [
        decompose(x, replace(SR, split=Mean()), Place(key=replace(KEY, step=step), token_dim=0)).side
        for step in range(400)
    ]
    drawn = torch.stack([s[0] for s in sides if s is not None]).double()
    error = (drawn.mean(0) - x.double().mean(0)).abs()
    assert bool((error < 5 * drawn.std(0) / 400**0.5 + 1e-6).all())
    assert drawn.std(0).max() > 0.05


def test_tokens_that_fill_up_count_in_no_mean_and_no_quantile() -> None:
    x = normal(33, 64, seed=1) + 3
    filled = torch.cat((x, torch.zeros(15, 64)))
    for of in (replace(NV, split=Mean()), replace(NV, split=LowRank(rank=4)), replace(NV, outlier=Occ(per="tensor"))):
        alone = decompose(x, of, Place(token_dim=0))
        parts = decompose(filled, of, Place(replace(KEY, rows=48, columns=64), token_dim=0, filled=15))
        by_column = decompose(filled.t(), of, Place(token_dim=1, filled=15))
        for found, wanted in zip(parts, alone, strict=True):
            assert found is not None
            assert wanted is not None
            assert torch.equal(found[:33], wanted)
            assert torch.equal(found[33:], torch.zeros(15, 64))
        if isinstance(of.split, Mean):
            assert torch.equal(by_column.rest.t(), parts.rest)


# -- lowrank


def test_low_rank_part_takes_out_what_svd_says() -> None:
    x = normal(128, 96, seed=1) + 4 * normal(128, 4, seed=2) @ normal(4, 96, seed=3)
    rest, side = decompose(x, replace(NV, split=LowRank(rank=4, quantize=False)), Place())
    assert side is not None
    torch.testing.assert_close(rest + side, x, rtol=0, atol=1e-5)
    values = np.linalg.svd(x.numpy().astype(np.float64), compute_uv=False)
    assert rest.double().square().sum().item() == pytest.approx((values[4:] ** 2).sum(), rel=2e-3)
    assert np.linalg.matrix_rank(side.numpy(), tol=1e-3) == 4


def test_low_rank_factors_are_orthonormal_and_in_the_operands_format() -> None:
    x = normal(128, 96, seed=1) + 4 * normal(128, 4, seed=2) @ normal(4, 96, seed=3)
    left, core, right = low_rank(x, 4, 2)
    for factor in (left, right):
        torch.testing.assert_close(factor.t() @ factor, torch.eye(4, dtype=torch.float64))
    parts = decompose(x, replace(NV, split=LowRank(rank=4)), Place())
    rounded = [dequantize(quantize(f.t().float().contiguous(), NV)).double() for f in (left, right)]
    assert parts.side is not None
    torch.testing.assert_close(parts.side, (rounded[0].t() @ core @ rounded[1]).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts.rest.double(), x.double() - left @ core @ right.t(), rtol=0, atol=1e-5)


def test_low_rank_of_a_shard_is_refused() -> None:
    place = Place(replace(KEY, columns=128), lambda t: t)
    with pytest.raises(ValueError, match="lowrank needs the whole matrix"):
        decompose(normal(32, 64), replace(NV, split=LowRank()), place)


# -- topk


def test_the_largest_of_each_group_stay_exact_and_a_tie_keeps_the_first() -> None:
    x = normal(8, 64, seed=1)
    x[3] = 1.0
    of = QuantSpec(format=Format(element=E1M2, scale=FP32, block=(1, 32)), outlier=TopK(k=2, group=32))
    rest, side = decompose(x, of, Place())
    assert side is not None
    for row in range(8):
        for group in range(2):
            values = x[row, group * 32 : group * 32 + 32].numpy()
            order = sorted(range(32), key=lambda i: (-abs(values[i]), i))[:2]
            kept = side[row, group * 32 : group * 32 + 32]
            assert sorted(kept.nonzero().flatten().tolist()) == sorted(order)
            assert kept[order].tolist() == [values[i] for i in order]
    assert torch.equal(rest + side, x)
    assert not bool((rest.ne(0) & side.ne(0)).any())


@pytest.mark.parametrize(("precision", "step"), [("bf16", 0.0), ("e4m3", 2.0**-4), ("mxfp8", 2.0**-4)])
def test_precision_of_what_is_kept(precision: str, step: float) -> None:
    x = normal(8, 64, seed=1)
    side = decompose(x, replace(NV, outlier=TopK(k=4, group=32, precision=precision)), Place()).side  # type: ignore[arg-type]
    assert side is not None
    kept = side != 0
    assert int(kept.sum()) == 8 * 2 * 4
    error = ((side - x) / x)[kept].abs().max().item()
    assert error <= step
    assert (error > 0) == (step > 0)


def test_bf16_parts_have_the_operands_dtype() -> None:
    x = (normal(8, 64, seed=1) * 1.001).bfloat16()
    side = decompose(x, replace(NV, outlier=Occ(alpha=0.9)), Place()).side
    assert side is not None
    assert torch.equal(side, side.bfloat16().float())


def test_bf16_holds_what_mxfp8_has_of_it() -> None:
    x = (normal(70, 96, seed=6) * torch.exp2(torch.arange(70.0) * 4 - 152)[:, None]).bfloat16()  # all its binades
    x[60, 3] = torch.finfo(torch.bfloat16).max  # whose values round to Inf
    found = in_precision(x, "mxfp8", torch.bfloat16, Place())
    wide = in_precision(x.float(), "mxfp8", torch.bfloat16, Place())
    assert (found.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(found.float(), wide)
    assert not torch.equal(wide, x.float())


# -- channels


def test_all_channels_taken_out_give_the_exact_product() -> None:
    x, w = normal(32, 64, seed=1), normal(16, 64, seed=2)
    place = Place(channels=torch.ones(64, dtype=torch.bool))
    a = operand(x, replace(NV, outlier=Channels(precision="bf16")), place)
    taken = take_channels(w, "bf16", place)
    b = assemble(quantize(taken.rest, NV), taken.side, None, NV, None)
    assert torch.equal(matmul(a, b), x @ w.t())


@pytest.mark.parametrize("precision", ["bf16", "mxfp8"])
def test_channels_split_the_contracted_dimension(precision: str) -> None:
    x, w = normal(32, 64, seed=1), normal(16, 64, seed=2)
    chosen = torch.zeros(64, dtype=torch.bool)
    chosen[[0, 5, 17, 40, 63]] = True
    place = Place(channels=chosen)
    a = operand(x, replace(NV, outlier=Channels(precision=precision)), place)  # type: ignore[arg-type]
    taken = take_channels(w, precision, place)  # type: ignore[arg-type]
    b = assemble(quantize(taken.rest, NV), taken.side, None, NV, None)
    high = [t.clone() for t in (x, w)]
    if precision == "mxfp8":
        high = [dequantize(quantize(torch.where(chosen, t, 0.0), QuantSpec(format=MXFP8, scale=Ceil()))) for t in high]
    low = [dequantize(quantize(torch.where(chosen, 0.0, t), NV)).double() for t in (x, w)]
    expected = low[0] @ low[1].t() + high[0][:, chosen].double() @ high[1][:, chosen].double().t()
    torch.testing.assert_close(matmul(a, b).double(), expected, rtol=1e-5, atol=1e-4)
    assert not bool(low[0][:, chosen].any())


def test_before_the_choice_everything_is_codes() -> None:
    x = normal(32, 64, seed=1)
    q = operand(x, replace(NV, outlier=Channels()))
    assert isinstance(q, BlockScaledTensor)
    assert_same_bits(q, quantize(x, NV))


# -- hot residual


@pytest.mark.parametrize("of", [NV, RHT], ids=["plain", "rotated"])
def test_the_residual_of_hot_channels_meets_the_others_high_precision(of: QuantSpec) -> None:
    x, w = normal(32, 64, seed=1), normal(16, 64, seed=2)
    chosen = torch.zeros(64, dtype=torch.bool)
    chosen[[3, 4, 50]] = True
    a = operand(x, replace(of, outlier=HotResidual()), Place(channels=chosen))
    main_w = quantize(w, of)
    b = assemble(main_w, None, torch.where(chosen, w, 0.0), of, None)
    x_q, w_q = (original(quantize(t, of), of.rotation).double() for t in (x, w))
    expected = x_q @ w_q.t() + (x - x_q.float()).double()[:, chosen] @ w.double()[:, chosen].t()
    torch.testing.assert_close(matmul(a, b).double(), expected, rtol=1e-5, atol=1e-4)
    assert_same_bits(b.main, main_w)  # type: ignore[union-attr]


# -- products of sums


@pytest.mark.parametrize("of", [NV, RHT, replace(SR, rotation=RHT.rotation)], ids=["nearest", "rotated", "stochastic"])
@pytest.mark.parametrize("left", [None, Occ(alpha=0.9), TopK(k=3, group=32)])
@pytest.mark.parametrize("right", [None, Occ(alpha=0.9)])
def test_a_product_of_sums_is_that_of_their_values(of: QuantSpec, left: Outlier | None, right: Outlier | None) -> None:
    place = Place(key=KEY)
    a = operand(normal(32, 64, seed=1), replace(of, outlier=left), place)
    b = operand(normal(16, 64, seed=2), replace(of, outlier=right, split=LowRank(rank=2)), place)
    expected = dequantize(a).double() @ dequantize(b).double().t()
    torch.testing.assert_close(matmul(a, b).double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(matmul(b, a).double(), expected.t(), rtol=1e-5, atol=1e-4)


def test_a_product_with_a_plain_operand() -> None:
    a, w = operand(normal(32, 64, seed=1), replace(NV, outlier=Occ(alpha=0.9))), normal(16, 64, seed=2).bfloat16()
    expected = dequantize(a).double() @ w.double().t()
    torch.testing.assert_close(matmul(a, w).double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(matmul(w, a).double(), expected.t(), rtol=1e-5, atol=1e-4)


def test_partners_are_met_by_the_other_side_alone() -> None:
    """Sides a and b, P and Q partners: A B^T + a Q^T + P b^T, where a partner lacks what it stands for."""
    mains = [quantize(normal(16, 32, seed=i), NV) for i in (1, 2)]
    side = [normal(16, 32, seed=i) for i in (3, 4)]
    partner = [normal(16, 32, seed=i) for i in (5, 6)]
    big_a, big_b = (dequantize(main).double() for main in mains)
    (a, b), (p, q) = ([t.double() for t in pair] for pair in (side, partner))
    cases = {
        (None, None): big_a @ big_b.t() + a @ (big_b + b).t() + big_a @ b.t(),
        (None, 1): big_a @ big_b.t() + a @ q.t() + big_a @ b.t(),
        (0, None): big_a @ big_b.t() + a @ big_b.t() + p @ b.t(),
        (0, 1): big_a @ big_b.t() + a @ q.t() + p @ b.t(),
    }
    for (left, right), expected in cases.items():
        operands = [
            PartedTensor(main, s, partner[i] if i is not None else None)
            for main, s, i in zip(mains, side, (left, right), strict=True)
        ]
        torch.testing.assert_close(matmul(*operands).double(), expected, rtol=1e-5, atol=1e-4)


def test_samples_average_with_the_same_side() -> None:
    two = replace(SR, rounding=replace(SR.rounding, samples=2), outlier=Occ(alpha=0.9))  # type: ignore[type-var]
    a, w = operand(normal(32, 64, seed=1), two, Place(key=KEY)), normal(16, 64, seed=2)
    torch.testing.assert_close(matmul(a, w), dequantize(a) @ w.t(), rtol=1e-5, atol=1e-4)


# -- the operand itself


def test_value_pack_and_transpose() -> None:
    of = replace(NV, block=(16, 16), outlier=TopK(k=1, group=16))
    x = normal(32, 64, seed=1)
    parted = operand(x, of)
    assert isinstance(parted, PartedTensor)
    assert parted.side is not None
    torch.testing.assert_close(dequantize(parted), dequantize(parted.main) + parted.side)
    assert torch.equal(dequantize(parted.transpose()), dequantize(parted).t())
    for q in (parted, parted.main, replace(parted, partner=x)):
        tensors, layout = pack(q)
        back = unpack(tensors, layout)
        assert torch.equal(dequantize(back), dequantize(q))
        assert type(back) is type(q)
        assert not isinstance(back, PartedTensor) or back.partner is None
    requantized = requantize(parted, NV)
    assert_same_bits(requantized, quantize(dequantize(parted).t(), NV))


def test_what_stands_beside_rotated_codes_is_rotated() -> None:
    x = normal(16, 64, seed=1)
    of = replace(RHT, outlier=TopK(k=2, group=32))
    side = decompose(x, of, Place()).side
    q = operand(x, of)
    assert isinstance(q, PartedTensor)
    assert side is not None
    assert of.rotation is not None
    assert torch.equal(q.side, rotate(side, of.rotation, None))  # type: ignore[arg-type]
    torch.testing.assert_close(original(q, of.rotation), original(q.main, of.rotation) + side, rtol=1e-5, atol=1e-5)
