"""What holds for every block of the vocabulary: decoding, shards, zeros, non-finite inputs, transposes, GEMMs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from threading import Barrier, Thread

import numpy as np
import pytest
import torch
from torch import Tensor

from fp4dist.numerics import BlockScaledTensor, Key, dequantize, matmul, quantize, requantize
from fp4dist.numerics.codes import decode_scale, decode_stored
from fp4dist.numerics.grouping import Grouping, spread, tree_sum
from fp4dist.numerics.quantize import carrier
from fp4dist.numerics.rotation import rotate, unrotate
from fp4dist.numerics.scales import root
from tests.generators import families, normal
from tests.numerics.quantizers import EXTRA, extra

KEY = Key(seed=3, layer=0x89ABCDEF, step=4, micro_batch=5, slot=2)
ROWS, COLUMNS = 64, 512


def outer(q: BlockScaledTensor, row: int, column: int) -> float:
    """The outer scale of one element, by the documented layout."""
    g = q.global_scale
    return (g if g.dim() == 0 else g[row * g.shape[0] // q.shape[0], column * g.shape[1] // q.shape[1]]).item()


@pytest.mark.parametrize("name", list(EXTRA))
def test_a_value_is_code_times_scale_times_outer_scale(name: str) -> None:
    """The invariant of BlockScaledTensor, element by element, of the first sample."""
    q = quantize(normal(ROWS, COLUMNS, seed=2), extra(name), KEY)
    first = q.sample(0)
    codes, scales = decode_stored(first.codes, q.format.element), decode_scale(q.scales, q.format.scale)
    assert codes.shape == q.shape == first.shape == (ROWS, COLUMNS)
    values = dequantize(first) * q.rotation**0.5
    for row, column in ((0, 0), (1, 17), (33, 300), (63, 511)):
        scale = scales[row // q.block[0], column // q.block[1]].item()
        expected = codes[row, column].item() * scale * outer(q, row, column)
        assert values[row, column].item() == pytest.approx(expected, rel=1e-6, abs=0)
    assert set(codes.abs().unique().tolist()) <= set(q.format.element.levels)
    assert q.nbytes >= q.samples * (ROWS * COLUMNS // (2 if q.format.element.packed else 1))


@pytest.mark.parametrize("name", [n for n in EXTRA if extra(n).is_deterministic and extra(n).rotation is None])
def test_nearest_rounding_takes_the_nearest_level(name: str) -> None:
    """Whatever scale was chosen: no other level is closer to the value than the one taken."""
    x, s = normal(ROWS, COLUMNS, seed=3), extra(name)
    q = quantize(x, s)
    unit = spread(decode_scale(q.scales, q.format.scale), q.shape).double()
    u = x.double() / (unit * spread(q.global_scale, q.shape).double())
    levels = torch.tensor(q.format.element.levels, dtype=torch.float64)
    best = (u.abs().reshape(-1, 1) - levels).abs().amin(-1).reshape(u.shape)
    taken = decode_stored(q.codes, q.format.element).double()
    assert ((taken - u).abs() - best <= 1e-5 * q.format.element.max).all()


class Ranks:
    """An elementwise MAX all-reduce among threads, each of which plays a rank."""

    def __init__(self, number: int) -> None:
        self.barrier, self.parts = Barrier(number, timeout=60), [torch.empty(0)] * number

    def reduce_max(self, rank: int) -> Callable[[Tensor], Tensor]:
        def reduce(part: Tensor) -> Tensor:
            self.parts[rank] = part
            self.barrier.wait()
            result = torch.stack(self.parts).amax(dim=0)
            self.barrier.wait()
            return result

        return reduce


def on_ranks(work: list[Callable[[Callable[[Tensor], Tensor]], BlockScaledTensor]]) -> list[BlockScaledTensor]:
    """Run each rank's work, given its all-reduce."""
    ranks, results = Ranks(len(work)), {}

    def run(rank: int) -> None:
        results[rank] = work[rank](ranks.reduce_max(rank))

    threads = [Thread(target=run, args=(rank,)) for rank in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [results[rank] for rank in range(len(work))]


Runs = tuple[int, ...]


def placed(x: Tensor, rows: Runs, columns: Runs, height: int, width: int) -> tuple[Tensor, Key, Tensor, Tensor]:
    """(this rank's elements, its key, their row and column numbers) for runs of `height` rows and `width` columns."""
    i = torch.cat([torch.arange(start, start + height) for start in rows])
    j = torch.cat([torch.arange(start, start + width) for start in columns])
    key = replace(KEY, row_runs=rows, column_runs=columns, rows=x.shape[0], columns=x.shape[1])
    return x[i][:, j], key, i, j


# Runs of rows, runs of columns, height and width of a run: one line a rank.
SPLITS: dict[str, list[tuple[Runs, Runs, int, int]]] = {
    "rows": [((0,), (0,), 32, 512), ((32,), (0,), 32, 512)],
    "columns": [((0,), (0,), 64, 256), ((0,), (256,), 64, 256)],
    "stacked rows and columns": [
        ((0, 32), (0,), 16, 256),
        ((0, 32), (256,), 16, 256),
        ((16, 48), (0,), 16, 256),
        ((16, 48), (256,), 16, 256),
    ],
    "early and late columns": [((0,), (0, 384), 64, 128), ((0,), (128, 256), 64, 128)],
}


def fits(name: str, height: int, width: int) -> bool:
    s = extra(name)
    return height % s.rows_multiple == 0 and width % s.columns_multiple == 0


@pytest.mark.parametrize("split", list(SPLITS))
@pytest.mark.parametrize("name", list(EXTRA))
def test_shards_have_the_bits_of_the_whole(name: str, split: str) -> None:
    """Each rank holds a part and an all-reduce of maxima; together they have the codes and scales of one process."""
    s, x = extra(name), families(ROWS, COLUMNS, seed=5)["row_scales"]
    if not all(fits(name, height, width) for _, _, height, width in SPLITS[split]):
        assert "32x32" in name or "1x256" in name or "finer" in name  # blocks larger than a rank's run
        return
    whole, parts = quantize(x, s, KEY), [placed(x, *place) for place in SPLITS[split]]
    got = on_ranks([lambda r, p=p: quantize(p[0], s, p[1], r) for p in parts])  # type: ignore[misc]
    scales = spread(decode_scale(whole.scales, s.format.scale), whole.shape) * spread(whole.global_scale, whole.shape)
    for mine, (_, _, i, j) in zip(got, parts, strict=True):
        for n in range(whole.samples):
            all_codes = decode_stored(whole.sample(n).codes, s.format.element)
            assert torch.equal(decode_stored(mine.sample(n).codes, s.format.element), all_codes[i][:, j])
        here = spread(decode_scale(mine.scales, s.format.scale), mine.shape) * spread(mine.global_scale, mine.shape)
        assert torch.equal(here, scales[i][:, j])


def test_blocks_that_are_whole_on_a_rank_ask_for_no_reduction() -> None:
    def refuse(_: Tensor) -> Tensor:
        raise AssertionError("a MAX all-reduce was asked for")

    for name in (
        "e1m2_1x16",
        "mxfp8",
        "nvfp4_tile",
        "nvfp4_tile_16x64",
        "quest",
        "mxfp4_finer",
        "nvfp4_no_outer",
        "luq_1x32",
    ):
        quantize(normal(64, 256), extra(name), replace(KEY, columns=512), refuse)
    quantize(
        normal(64, 256), extra("fp4_row"), replace(KEY, rows=128, columns=256), refuse
    )  # rows split: rows are whole
    with pytest.raises(AssertionError, match="was asked for"):
        quantize(normal(64, 256), extra("fp4_row"), replace(KEY, columns=512), refuse)


def test_moments_refuse_shards_that_cut_their_chunks() -> None:
    key = replace(KEY, column_runs=(100,), rows=64, columns=512)
    with pytest.raises(ValueError, match=r"sums a tensor in chunks of 8, .* amax_scope: shard"):
        quantize(normal(64, 100), extra("sawb"), key, lambda part: part)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", list(EXTRA))
def test_a_non_finite_input_makes_everything_under_its_scales_nan(name: str, bad: float) -> None:
    x, s = normal(ROWS, COLUMNS), extra(name)
    x[5, 7] = bad
    q = quantize(x, s, KEY)
    nan = dequantize(q).isnan()
    size = max(q.block[1], q.rotation)
    assert nan[5, :size].all()
    if s.above == "tensor" or s.shape[0] == 0:
        assert nan.all()
    elif s.above == "row" or s.shape == (1, 0):
        assert nan[5].all()
        assert int(nan.sum()) == COLUMNS


@pytest.mark.parametrize("name", list(EXTRA))
def test_zeros_stay_zero_and_every_family_decodes_to_finite_values(name: str) -> None:
    s = extra(name)
    assert torch.equal(dequantize(quantize(torch.zeros(ROWS, COLUMNS), s, KEY)), torch.zeros(ROWS, COLUMNS))
    for x in families(ROWS, COLUMNS).values():
        q = quantize(x, s, KEY)
        assert dequantize(q).isfinite().all()
        if s.format.scale.bf16_exact:
            values = carrier(q.sample(0))
            usual = values.abs() >= 2.0**-126
            assert torch.equal(values.bfloat16().float()[usual], values[usual])


@pytest.mark.parametrize("name", list(EXTRA))
def test_a_gemm_is_the_product_of_the_values(name: str) -> None:
    """Against float64, within the bound of fp32 accumulation; scales of rows and tensors wait outside the sum."""
    s = extra(name)
    a, b = normal(64, 256), normal(32, 256, seed=1)
    qa = quantize(a, s, KEY)
    other = replace(s, rounding=replace(s.rounding, samples=1)) if s.samples > 1 else s  # type: ignore[type-var]
    qb = quantize(b, other, replace(KEY, slot=3))
    da, db = dequantize(qa).double(), dequantize(qb).double()
    bound = (256 + 8) * 2.0**-23 * (da.abs() @ db.abs().t()) + 1e-30
    assert ((matmul(qa, qb).double() - da @ db.t()).abs() <= bound).all()
    if s.rotation is None:
        plain = b.double()
        assert (
            (matmul(qa, b).double() - da @ plain.t()).abs() <= (256 + 8) * 2.0**-23 * (da.abs() @ plain.abs().t())
        ).all()


def test_samples_are_independent_draws_and_their_products_are_averaged() -> None:
    s, x, b = extra("nvfp4_sr3"), normal(16, 256), normal(32, 256, seed=1)
    q = quantize(x, s, KEY)
    single = replace(s, rounding=replace(s.rounding, samples=1))  # type: ignore[type-var]
    assert torch.equal(q.sample(0).codes, quantize(x, single, KEY).codes)
    draws = [q.sample(i) for i in range(3)]
    assert len({d.codes.numpy().tobytes() for d in draws}) == 3
    torch.testing.assert_close(dequantize(q), sum(map(dequantize, draws)) / 3)  # type: ignore[arg-type]
    torch.testing.assert_close(matmul(q, b), sum(matmul(d, b) for d in draws) / 3)  # type: ignore[arg-type]
    errors = torch.stack([dequantize(d) - x for d in draws]).flatten(1)
    assert torch.corrcoef(errors).triu(1).abs().max() < 0.06


@pytest.mark.parametrize("name", ["sawb", "fp4_tensor", "fp8_e4m3", "luq", "nvfp4_32x32", "mxfp4_finer", "radix4_odd"])
def test_square_and_tensor_blocks_are_read_transposed(name: str) -> None:
    q = quantize(normal(64, 128), extra(name), KEY)
    turned = q.transpose()
    assert turned.shape == (128, 64)
    assert torch.equal(dequantize(turned), dequantize(q).t())


@pytest.mark.parametrize("name", ["fp4_row", "nvfp4_tile", "nvfp4_row", "e1m2_1x16", "luq_smp2", "rht32"])
def test_what_lies_along_a_dimension_is_not_read_transposed(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be read transposed"):
        quantize(normal(64, 128), extra(name), KEY).transpose()


def test_requantize_starts_from_the_values() -> None:
    for name in ("fp4_row", "nvfp4_tile", "sawb"):
        forward = quantize(normal(128, 256), extra(name))
        again = requantize(forward, extra("fp8_e4m3"))
        expected = quantize(dequantize(forward).t(), extra("fp8_e4m3"))
        assert torch.equal(again.codes, expected.codes)
        assert torch.equal(again.scales, expected.scales)


def test_a_constant_sign_vector_is_the_masks_bits() -> None:
    s = extra("rht32")
    assert s.rotation is not None
    x = torch.eye(32)
    q = quantize(x, s)
    back = unrotate(dequantize(q), s.rotation, None)
    torch.testing.assert_close(back, x)  # a rotated unit vector has 32 equal magnitudes: exact in E2M1
    signs = rotate(x, s.rotation, None)[:, 0]  # the first column of H is all ones
    assert sum(1 << i for i in range(32) if signs[i] < 0) == 0xD7E8D7E8


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 5), (3, 7), (4, 8)])
def test_tree_sum_of_any_size(shape: tuple[int, int]) -> None:
    x = torch.randint(0, 9, (shape[0] * 2, shape[1] * 3)).float()
    expected = x.reshape(2, shape[0], 3, shape[1]).sum(dim=(1, 3))
    assert torch.equal(tree_sum(x, shape), expected)


def test_the_number_of_elements_of_a_logical_block() -> None:
    key = replace(KEY, rows=128, columns=512)
    for name, count in (("sawb", 128 * 512), ("sawb_row", 512), ("quest", 32)):
        grouping = Grouping.of(normal(64, 256), extra(name), key, lambda part: part)
        assert grouping.count() == count
        assert Grouping.of(normal(64, 256), extra(name), None, None).count() == min(
            count, 64 * 256 if name == "sawb" else 256
        )


def test_roots_are_correctly_rounded() -> None:
    """Torch's own square root is not, on CPUs with vector libraries; numpy's is the hardware's."""
    x = torch.rand(1 << 20) * 3 + 1e-3
    assert np.array_equal(root(x).numpy(), np.sqrt(x.numpy()))
