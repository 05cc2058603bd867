"""Coded collectives on gloo worlds of 2 to 8 ranks against plain sums of inputs; many checks in each world."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fp4dist.comm.codec import Noise
from fp4dist.comm.collectives import (
    all_gather,
    all_gather_parts,
    all_reduce,
    all_to_all,
    recv,
    reduce_scatter,
    reduce_scatter_parts,
    send,
    slices_of,
)
from fp4dist.comm.exchange import Handle, Options
from fp4dist.comm.hierarchy import GroupTree
from fp4dist.comm.levels import bytes_of_all_reduce, bytes_of_levels, reduce_scatter_levels
from fp4dist.errors import WireError
from fp4dist.spec.wire import BF16_WIRE, FP32_WIRE, Wire
from tests.comm.bits import check_all
from tests.distributed import RankError, run_ranks

NOISE = Noise(seed=5, step=6, bucket=7)
NEAREST = Wire(rounding="nearest")
CODED = Options(own="coded")


def nmse(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).double().square().sum() / exact.double().square().sum())


def near(found: Tensor, exact: Tensor, worst: float) -> bool:
    """Of vectors that may be short: the error is small for contributions of size 1."""
    return bool((found - exact).square().mean() <= worst * (1 + exact.square().mean()))


def inputs(world: int, n: int, seed: int = 1) -> Tensor:
    """[W, n]: every rank's vector, of independent normal numbers."""
    return torch.randn(world, n, generator=torch.Generator().manual_seed(seed))


def counted(handle: Handle) -> Handle:
    assert handle.bytes_sent == handle.bytes_formula, handle.traffic
    return handle


def identical(x: Tensor) -> bool:
    """Whether all ranks hold the same bits."""
    copies = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(copies, x)
    return all(torch.equal(copies[0], copy) for copy in copies)


def in_world(tree_sizes: tuple[int, ...]) -> None:
    """All that is checked in one world."""
    layouts()
    uneven_parts()
    bytes_are_the_formula()
    errors_are_those_of_the_formula()
    a_rank_with_nan()
    replay()
    swaps()
    for per_rack in tree_sizes:
        two_levels(GroupTree.of_ranks(per_rack), per_rack)
    damaged()


def layouts() -> None:
    """Exact wires give the mean over all ranks, whatever the size; coded ones are near it; gathered bits are equal."""
    world, r = dist.get_world_size(), dist.get_rank()
    for n in (1, 131, 5003):
        every = inputs(world, world * n)
        mean = every.mean(0)
        for dtype in (torch.float32, torch.bfloat16):
            x = every[r].to(dtype)
            exact = every.to(dtype).float().mean(0)
            for wire, worst in ((FP32_WIRE, 1e-12), (BF16_WIRE, 1e-5), (Wire(), 0.03), (NEAREST, 0.03)):
                out = torch.full((n,), float("nan"))
                counted(reduce_scatter(out, x, wire, NOISE))
                assert near(out, exact[r * n : (r + 1) * n], worst)
                total = torch.empty(n)
                reduce_scatter(total, x, wire, NOISE, op="sum", async_op=True).wait()
                torch.testing.assert_close(total, out * world, rtol=1e-5, atol=1e-6)
                y = x[: n + 3].clone()
                counted(all_reduce(y, wire, NOISE))
                assert identical(y)
                assert near(y.float(), mean[: n + 3], 2 * worst + 1e-5)
        inside = x.clone()  # out is a slice of the input, as Megatron has it
        reduce_scatter(inside[r * n : (r + 1) * n], inside, NEAREST, NOISE)
        apart = torch.empty(n, dtype=inside.dtype)
        reduce_scatter(apart, x, NEAREST, NOISE)
        assert torch.equal(inside[r * n : (r + 1) * n], apart)


def uneven_parts() -> None:
    """Parts of any size, none at all, several to a rank; holes between them stay as they are."""
    world, r = dist.get_world_size(), dist.get_rank()
    sizes = [[700 * i % 2100, 5] if i % 2 else [1031] for i in range(world)]
    sizes[0] = [0]
    every = inputs(world, sum(map(sum, sizes)) + 10 * world, seed=3)

    def cut(x: Tensor) -> Iterator[list[Tensor]]:
        at = 0
        for some in sizes:
            row = []
            for n in some:
                row.append(x[at : at + n])
                at += n
            yield row
            at += 10

    for wire in (Wire(), FP32_WIRE):
        out = [torch.empty(n) for n in sizes[r]]
        counted(reduce_scatter_parts(out, list(cut(every[r])), wire, NOISE))
        for found, exact in zip(out, list(cut(every.mean(0)))[r], strict=True):
            if found.numel():
                assert nmse(found, exact) < (1e-12 if wire.plain else 0.04)
        gathered = torch.full_like(every[0], -9.0)
        counted(all_gather_parts(list(cut(gathered)), out, wire, NOISE))
        assert identical(gathered)
        assert int((gathered == -9.0).sum()) == 10 * world


def bytes_are_the_formula() -> None:
    """Counted bytes are the sums of what the spec says, element by element."""
    world = dist.get_world_size()
    for n, records, chunk in ((4096 * 2, 2, 4096), (4097, 2, 4096), (4096, 1, 4096), (100, 1, 512)):
        handle = reduce_scatter(torch.empty(n), torch.ones(world * n), Wire(), NOISE)
        assert handle.bytes_sent == (world - 1) * records * (chunk // 2 + chunk // 16 + 16)
        gathered = all_gather(torch.empty(world * n), torch.ones(n), Wire(), NOISE)
        assert gathered.bytes_sent == gathered.bytes_received == handle.bytes_sent
    swapped = all_to_all(torch.empty(world, 64), torch.ones(world, 64), BF16_WIRE, NOISE)
    assert swapped.bytes_sent == (world - 1) * 128


def errors_are_those_of_the_formula() -> None:
    """NMSE of the mean of W vectors with pairwise correlation c: e / (1 + c (W - 1)); equal vectors do not average."""
    world, r = dist.get_world_size(), dist.get_rank()
    n = 1 << 15
    for c, wire, expected in (
        (0.0, Wire(), Wire().nmse),
        (0.5, Wire(), Wire().nmse / (1 + 0.5 * (world - 1))),
        (0.5, NEAREST, NEAREST.nmse / (1 + 0.5 * (world - 1))),
        (1.0, Wire(signs="per_rank"), Wire().nmse / world),
        (1.0, Wire(), None),
    ):
        every = (1 - c) ** 0.5 * inputs(world, world * n) + c**0.5 * inputs(1, world * n, seed=2)
        exact = every.mean(0)[r * n : (r + 1) * n]
        out = torch.empty(n)
        reduce_scatter(out, every[r], wire, NOISE, options=CODED)
        found = nmse(out, exact)
        if expected is None:  # shared signs and equal vectors: only the rounding of the scales differs
            assert found > 0.75 * Wire().nmse
            continue
        assert found == pytest.approx(expected, rel=0.05)
        reduce_scatter(out, every[r], wire, NOISE)  # the own contribution is exact: one error of W less
        assert nmse(out, exact) == pytest.approx(expected * (world - 1) / world, rel=0.06)


def a_rank_with_nan() -> None:
    """What one rank has lost shows on the owner of that record, in the whole of it, and nowhere else."""
    world, r = dist.get_world_size(), dist.get_rank()
    n = 3 * 512
    wire = Wire(chunk=512)
    for bad in (float("nan"), float("inf")):
        x = inputs(world, world * n)[r]
        if r == world - 1:
            x[512 + 5] = bad  # rank 0 owns it, in its second record
        out = torch.empty(n)
        reduce_scatter(out, x, wire, NOISE)
        lost = out.view(3, 512).isnan()
        assert lost.sum(1).tolist() == ([0, 512, 0] if r == 0 else [0, 0, 0])
        y = x[:n].clone()
        all_reduce(y, wire, NOISE)
        assert identical(y.isnan().float())
        assert bool(y.isnan().any())


def replay() -> None:
    """The same step gives the same bits, also in a run that begins there; another step or bucket gives others."""
    world, r = dist.get_world_size(), dist.get_rank()
    n = 2000
    x = inputs(world, world * n)[r]

    def run(noise: Noise, options: Options = CODED) -> Tensor:
        out = torch.empty(n)
        reduce_scatter(out, x, Wire(), noise, options=options)
        return out

    first = [run(Noise(1, step, 4)) for step in range(3)]
    assert torch.equal(first[2], run(Noise(1, 2, 4)))
    assert torch.equal(first[2], run(Noise(1, 2, 4), Options(own="coded", pieces=3)))
    assert not torch.equal(first[2], first[1])
    assert not torch.equal(first[2], run(Noise(1, 2, 5)))
    assert not torch.equal(first[2], run(Noise(2, 2, 4)))


def swaps() -> None:
    """All-to-all of uneven runs of rows, and messages from neighbour to neighbour."""
    world, r = dist.get_world_size(), dist.get_rank()
    rows = [[(3 * i + 2 * j) % 5 for j in range(world)] for i in range(world)]  # from i to j
    every = [inputs(sum(row), 96, seed=10 + i) for i, row in enumerate(rows)]
    out = torch.empty(sum(row[r] for row in rows), 96)
    arriving = [row[r] for row in rows]
    for wire in (NEAREST, FP32_WIRE, Wire(signs="per_rank")):
        counted(all_to_all(out, every[r], wire, NOISE, output_splits=arriving, input_splits=rows[r]))
        exact = torch.cat([every[i].split(rows[i])[r] for i in range(world)])
        own = sum(arriving[:r])
        assert nmse(out, exact) < (1e-12 if wire.plain else 0.012)
        assert torch.equal(out[own : own + arriving[r]], exact[own : own + arriving[r]])
    x, y = inputs(world, 1000)[r], torch.empty(1000)
    for wire in (Wire(), BF16_WIRE):
        handles = [
            send(x, wire, NOISE, (r + 1) % world, async_op=True),
            recv(y, wire, NOISE, (r - 1) % world, async_op=True),
        ]
        for handle in handles:
            handle.wait()
        assert handles[0].bytes_sent == handles[1].bytes_received == wire.bytes_of(1000)
        assert nmse(y, inputs(world, 1000)[(r - 1) % world]) < 0.02


def two_levels(tree: GroupTree, per_rack: int) -> None:
    """Every rank of the job ends with its own slice of the mean over all of it, coded in none, one or both levels."""
    world, r = dist.get_world_size(), dist.get_rank()
    n = 2051
    every = inputs(world, world * n)
    exact = every.mean(0)
    racks = world // per_rack
    fp8 = Wire(kind="fp8")
    for inner, outer, error in (
        (FP32_WIRE, FP32_WIRE, 0.0),
        (BF16_WIRE, Wire(), Wire().nmse * (racks - 1) / racks),
        (fp8, Wire(rounding="stochastic"), fp8.nmse * (per_rack - 1) / per_rack + 0.0235 * (racks - 1) / racks),
        (Wire(), Wire(), Wire().nmse * ((per_rack - 1) / per_rack + (racks - 1) / racks)),
    ):
        for options in (Options(), Options(pieces=2, pairs="all_gather")):
            out = torch.empty(n)
            handle = counted(tree.reduce_scatter(out, every[r], inner, outer, NOISE, options=options))
            squares = torch.stack(((out - exact[r * n : (r + 1) * n]).square().sum(), exact.square().sum() / world))
            dist.all_reduce(squares)
            assert float(squares[0] / squares[1]) == pytest.approx(error, rel=0.08, abs=1e-5)
            chunk = outer.chunk_of(n)
            inner_bytes = racks * (per_rack - 1) * inner.bytes_of(n, inner.chunk_of(n))
            assert [t.level for t in handle.traffic] == ["intra", "inter"]
            assert [t.sent for t in handle.traffic] == [inner_bytes, (racks - 1) * outer.bytes_of(n, chunk)]
            gathered = torch.empty(world * n)
            counted(tree.all_gather(gathered, every[r][:n].contiguous(), inner, outer, NOISE, options=options))
            assert identical(gathered)
            assert nmse(gathered.view(world, n), every[:, :n]) < 0.026
            for short in (0, 1900, world * n - 5):  # elements that are missing: slices are uneven, the last ones empty
                y = every[r][short:].clone()
                handle = counted(tree.all_reduce(y, inner, outer, NOISE, options=options))
                assert identical(y)
                assert nmse(y, exact[short:]) < 0.06
                sizes = [t.numel() for t in slices_of(y, world)]
                assert handle.bytes_sent == bytes_of_all_reduce(sizes, r, per_rack, inner, outer)
            by_rank = [[part[:700], part[700:]] for part in every[r].split(n)]
            runs = [torch.empty(700), torch.empty(n - 700)]
            handle = reduce_scatter_levels(tree, runs, by_rank, inner, outer, NOISE, op="mean", options=options)
            squares = torch.stack(((torch.cat(runs) - exact[r * n : (r + 1) * n]).square().sum(), exact.square().sum()))
            dist.all_reduce(squares[:1])
            assert float(squares[0] / squares[1]) == pytest.approx(error, rel=0.12, abs=1e-5)
            two = bytes_of_levels([[700, n - 700]] * world, r, per_rack, inner, outer)
            assert [t.sent for t in counted(handle).traffic] == list(two)
    unbiased_in_two_stages(tree, per_rack)
    pieces_change_no_bit(tree)


def pieces_change_no_bit(tree: GroupTree) -> None:
    """Slices long enough to be cut, through both levels and back."""
    every, found = inputs(1, 40_000 * dist.get_world_size(), seed=dist.get_rank())[0], []
    for pieces in (1, 3):
        y, options = every.clone(), Options(pieces=pieces, pairs="all_gather")
        counted(tree.all_reduce(y, BF16_WIRE, NEAREST, NOISE, options=options))
        found.append(y)
    assert torch.equal(*found)


def unbiased_in_two_stages(tree: GroupTree, per_rack: int) -> None:
    """Of B codings of the same vectors the mean has 1/B of the error, with two codings one after the other too."""
    world, r = dist.get_world_size(), dist.get_rank()
    n, times = 1024, 24
    every = inputs(world, world * n, seed=8)
    exact = every.mean(0)[r * n : (r + 1) * n]
    found = torch.empty(times, n)
    for step in range(times):
        tree.reduce_scatter(found[step], every[r], Wire(), Wire(), Noise(1, step, 2))
    error = found - exact
    squares = torch.stack((error.mean(0).square().sum() * times, error.square().mean(0).sum()))
    dist.all_reduce(squares)
    assert float(squares[0] / squares[1]) == pytest.approx(1.0, abs=0.12)


def damaged() -> None:
    """One rank sends another format of equal size: all others name it. Last: the world is of no use afterwards."""
    world, r = dist.get_world_size(), dist.get_rank()
    wire = Wire(rounding="stochastic") if r == 1 else NEAREST
    out = torch.empty(5000)
    with pytest.raises(WireError, match="bucket 7") as caught:
        reduce_scatter(out, torch.ones(world * 5000), wire, NOISE)
    assert (r == 1) == ("from rank 1," not in str(caught.value))
    assert caught.value.exit_code == 24


@pytest.mark.distributed
@pytest.mark.parametrize(("world", "trees"), [(2, ()), (3, ()), (4, (2,)), (5, ()), (8, (4, 2))])
def test_world(world: int, trees: tuple[int, ...]) -> None:
    run_ranks(in_world, world, trees)


@pytest.mark.distributed
def test_bits_are_those_of_one_process() -> None:
    assert run_ranks(check_all, 2, torch.device("cpu"), (9001,)) == [[], []]


def waits_for_other_sizes() -> None:
    """A rank that has less to send: the process group, or the records, must say so."""
    n = 4096 if dist.get_rank() == 0 else 4000
    reduce_scatter(torch.empty(n), torch.ones(2 * n), NEAREST, NOISE)


@pytest.mark.distributed
def test_ranks_that_disagree_about_sizes_end_with_an_error() -> None:
    with pytest.raises(RankError, match="disagree about sizes"):
        run_ranks(waits_for_other_sizes, 2, timeout=20)
