"""Where a shard lies in the global operand, and that shards quantized there are pieces of the whole.

The same with real process groups is in tests/megatron/test_layers.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from fp4dist.errors import RecipeMismatch
from fp4dist.nn.clock import Clock
from fp4dist.nn.comm import SLOT_DIMS, Dim, LinearComm, NoComm, place, token_runs
from fp4dist.nn.function import fp4_linear
from fp4dist.numerics import BlockScaledTensor, Key, quantize
from fp4dist.numerics.codes import unpack
from fp4dist.numerics.tensor import PartedTensor, Quantized
from fp4dist.spec.load import load_recipe, shipped
from fp4dist.spec.recipe import GEMMS, SLOTS, LinearRecipe
from tests.generators import normal
from tests.nn.one_linear import make_plan, watch

T, I, O = 128, 512, 512  # noqa: E741 (the dimensions' names)
SIZES: dict[Dim, int] = {"T": T, "I": I, "O": O}
RECIPES = [name for name in shipped("recipes") if load_recipe(name).linears]


class Meeting:
    """An elementwise MAX all-reduce between two threads."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=60.0)
        self.parts: dict[int, Tensor] = {}

    def largest(self, rank: int, part: Tensor) -> Tensor:
        self.parts[rank] = part
        self.barrier.wait()
        whole = torch.maximum(self.parts[0], self.parts[1])
        self.barrier.wait()
        return whole

    def run(self, fn: Callable[[int], Any]) -> list[Any]:
        """fn(rank) on both ranks; if one fails the other does not wait for it."""

        def guarded(rank: int) -> Any:
            try:
                return fn(rank)
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(2) as threads:
            return list(threads.map(guarded, range(2)))


@dataclass
class OneRankOfTwo:
    """A shard's view of tensor parallelism; the ranks are threads that meet in `meeting`."""

    split: Dim
    rank: int
    meeting: Meeting | None = None
    size: int = 2
    pieces: int = 1
    token_shard: Literal["x", "y"] | None = None
    context: tuple[int, int] = (0, 1)
    asked: list[str] = field(default_factory=list)

    def all_gather(self, part: Tensor) -> Callable[[], Tensor]:
        raise AssertionError("nothing to gather without sequence parallelism")

    def reduce_y(self, y: Tensor) -> Tensor:
        return y

    def reduce_dx(self, dx: Tensor) -> Callable[[], Tensor]:
        return lambda: dx

    def reduce_max(self, slot: str, token_shard: bool = False) -> Callable[[Tensor], Tensor] | None:
        if self.split not in SLOT_DIMS[slot]:
            return None
        self.asked.append(slot)
        return lambda part: self.meeting.largest(self.rank, part) if self.meeting else part


def operands(name: str, x: Tensor, w: Tensor, dy: Tensor, comm: LinearComm) -> dict[str, Quantized]:
    """The quantized operands of GEMMs with at least one."""
    recipe = load_recipe(name)
    linear = recipe.linears[next(iter(recipe.linears))]
    watched = watch(make_plan(linear, Clock(seed=1, step=2, micro_batch=3)))
    fp4_linear(x.clone().requires_grad_(), w.clone().requires_grad_(), watched.plan, comm).backward(dy)
    found = {slot: operand for slot, operand in watched.operands.items() if not isinstance(operand, Tensor)}
    assert set(found) == {slot for slot in SLOTS if linear.slot(slot) is not None}
    return found


def part(t: Tensor, axis: int, rank: int, pieces: int) -> Tensor:
    """Rank's half of each of `pieces` stretches: what a rank holds of SwiGLU's gate and up."""
    return torch.cat([stretch.chunk(2, axis)[rank] for stretch in t.chunk(pieces, axis)], axis)


@pytest.mark.parametrize(("split", "pieces"), [("O", 1), ("I", 1), ("O", 2)])
@pytest.mark.parametrize("name", RECIPES)
def test_shards_are_pieces_of_the_whole(name: str, split: Dim, pieces: int) -> None:
    x, w, dy = normal(T, I), normal(O, I, seed=1), normal(T, O, seed=2)
    whole = operands(name, x, w, dy, NoComm())
    meeting = Meeting()
    comms = [OneRankOfTwo(split, rank, meeting, pieces=pieces) for rank in range(2)]

    def shard(rank: int) -> dict[str, Quantized]:
        if split == "O":
            return operands(name, x, part(w, 0, rank, pieces), part(dy, 1, rank, pieces), comms[rank])
        return operands(name, x.chunk(2, 1)[rank], w.chunk(2, 1)[rank], dy, comms[rank])

    for comm, mine in zip(comms, meeting.run(shard), strict=True):
        assert set(mine) == set(whole)
        for slot in whole:
            assert_piece(mine[slot], whole[slot], SLOT_DIMS[slot], comm)
        assert set(comm.asked) <= {slot for slot in SLOTS if split in SLOT_DIMS[slot]}


def assert_piece(mine: Quantized, whole: Quantized, dims: tuple[Dim, Dim], comm: OneRankOfTwo) -> None:
    def piece(t: Tensor) -> Tensor:
        for axis, dim in enumerate(dims if t.dim() else ()):
            shared = t.shape[axis] == 1  # one scale for the whole dimension
            t = part(t, axis, comm.rank, comm.pieces) if dim == comm.split and not shared else t
        return t

    assert type(mine) is type(whole)
    if isinstance(mine, PartedTensor) and isinstance(whole, PartedTensor):
        if mine.side is not None and whole.side is not None:
            assert torch.equal(mine.side, piece(whole.side))
        assert (mine.side is None) == (whole.side is None)
        mine, whole = mine.main, whole.main
    assert isinstance(mine, BlockScaledTensor)
    assert isinstance(whole, BlockScaledTensor)
    assert mine.samples == whole.samples
    for i in range(whole.samples):
        ours, theirs = (q.sample(i).codes for q in (mine, whole))
        if whole.format.element.packed:
            ours, theirs = unpack(ours), unpack(theirs)
        assert torch.equal(ours, piece(theirs))
    assert torch.equal(mine.scales, piece(whole.scales))
    assert torch.equal(mine.global_scale, piece(whole.global_scale))


def test_operand_dimensions_agree_with_the_gemms() -> None:
    """Both operands of a GEMM contract the same, last dimension, and together cover T, I and O."""
    assert tuple(SLOT_DIMS) == SLOTS
    for gemm in GEMMS:
        (row_a, contracted_a), (row_b, contracted_b) = (SLOT_DIMS[s] for s in SLOTS if s.startswith(gemm))
        assert contracted_a == contracted_b
        assert {row_a, row_b, contracted_a} == {"T", "I", "O"}


@pytest.mark.parametrize("split", ["O", "I"])
@pytest.mark.parametrize("slot", SLOTS)
def test_shards_tile_the_global_operand(slot: str, split: Dim) -> None:
    rows, columns = (SIZES[d] for d in SLOT_DIMS[slot])
    covered = torch.zeros(rows, columns, dtype=torch.int32)
    for rank in range(2):
        part_rows, part_columns = (SIZES[d] // 2 if d == split else SIZES[d] for d in SLOT_DIMS[slot])
        at = place(OneRankOfTwo(split, rank), slot, part_rows, part_columns, Key())
        assert (at.rows, at.columns) == (rows, columns)
        (row,), (column,) = at.row_runs, at.column_runs
        covered[row : row + part_rows, column : column + part_columns] += 1
    copies = 1 if split in SLOT_DIMS[slot] else 2  # an operand that is not sharded is on both ranks
    assert (covered == copies).all()


def test_a_whole_layer_communicates_nothing() -> None:
    comm, x = NoComm(), normal(4, 4)
    assert comm.all_gather(x)() is x
    assert comm.reduce_dx(x)() is x
    assert comm.reduce_y(x) is x
    assert all(comm.reduce_max(slot) is None for slot in SLOTS)
    assert all(place(comm, slot, 3, 5, Key(step=7)) == Key(step=7, rows=3, columns=5) for slot in SLOTS)


def everyone(tp: int, cp: int) -> list[OneRankOfTwo]:
    """All ranks of a layout; tensor-parallel ranks are neighbours."""
    return [OneRankOfTwo("O", t, size=tp, context=(c, cp)) for c in range(cp) for t in range(tp)]


@pytest.mark.parametrize("cp", [1, 2, 3, 4])
@pytest.mark.parametrize("tp", [1, 2, 3, 4])
def test_runs_of_tokens_are_those_of_the_sequence_split(tp: int, cp: int) -> None:
    """Against the split itself: number the tokens, cut them as Megatron does, and read the numbers."""
    total = 2 * tp * cp * 8
    pieces = torch.arange(total).chunk(2 * cp)
    for comm in everyone(tp, cp):
        c = comm.context[0]
        held = torch.cat((pieces[c], pieces[2 * cp - 1 - c])) if cp > 1 else torch.arange(total)
        for mine, shard in ((held, False), (held.chunk(tp)[comm.rank], True)):
            starts, everything = token_runs(comm, len(mine), shard)
            assert everything == total
            run = len(mine) // len(starts)
            assert torch.cat([torch.arange(s, s + run) for s in starts]).equal(mine)
            assert len(starts) == 1 or cp > 1


def test_tokens_that_do_not_split_evenly_are_refused() -> None:
    with pytest.raises(RecipeMismatch, match=r"5 tokens on rank 0 of 1 .* multiple of 2 \* cp \* tp = 4"):
        token_runs(OneRankOfTwo("O", 0, size=1, context=(0, 2)), 5, False)


@pytest.mark.parametrize("split", ["O", "I"])
def test_shard_scope_asks_nobody(split: Dim) -> None:
    """amax_scope: shard quantizes a shard by itself."""
    x, w, dy = normal(T, I), normal(O, I, seed=1), normal(T, O, seed=2)
    w[0, 0] = 100.0  # the other rank's
    shipped_linear = load_recipe("quartet2").linears["fp4"]
    specs = {slot: replace(shipped_linear.slot(slot), amax_scope="shard") for slot in SLOTS}  # type: ignore[type-var]
    linear = LinearRecipe(
        **{
            g: type(getattr(shipped_linear, g))(**{s.split(".")[1]: specs[s] for s in SLOTS if s.startswith(g)})
            for g in GEMMS
        }
    )
    comm = OneRankOfTwo(split, 1)
    watched = watch(make_plan(linear, Clock(seed=1, step=2, micro_batch=3)))
    mine = (w.chunk(2, 0)[1], x, dy.chunk(2, 1)[1]) if split == "O" else (w.chunk(2, 1)[1], x.chunk(2, 1)[1], dy)
    fp4_linear(mine[1].clone().requires_grad_(), mine[0].clone().requires_grad_(), watched.plan, comm).backward(mine[2])
    assert comm.asked == []
    got = watched.operands["fprop.w"]
    assert isinstance(got, BlockScaledTensor)
    assert torch.equal(got.global_scale, quantize(mine[0], specs["fprop.w"]).global_scale)
    assert not torch.equal(got.global_scale, quantize(w, specs["fprop.w"]).global_scale)
