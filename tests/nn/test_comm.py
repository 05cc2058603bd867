"""Where a shard lies in the global operand, and that shards quantized there are pieces of the whole.

The same with real process groups is in tests/megatron/test_layers.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from fp4dist.nn.clock import Clock
from fp4dist.nn.comm import SLOT_DIMS, Dim, LinearComm, NoComm, place
from fp4dist.nn.function import fp4_linear
from fp4dist.numerics import BlockScaledTensor, Key
from fp4dist.numerics.codes import unpack
from fp4dist.spec.load import load_recipe, shipped
from fp4dist.spec.recipe import GEMMS, SLOTS
from tests.generators import normal
from tests.nn.one_linear import make_plan, watch

T, I, O = 128, 256, 512  # noqa: E741 (the dimensions' names)
SIZES: dict[Dim, int] = {"T": T, "I": I, "O": O}
RECIPES = [name for name in shipped("recipes") if load_recipe(name).linears]


@dataclass
class OneRankOfTwo:
    """A shard's view of tensor parallelism; the other rank's amax comes from the run of the whole layer."""

    split: Dim
    rank: int
    amax: dict[str, Tensor]
    size: int = 2
    pieces: int = 1
    asked: list[str] = field(default_factory=list)

    def gather_x(self, x: Tensor) -> Tensor:
        return x

    def reduce_dx(self, dx: Tensor) -> Callable[[], Tensor]:
        return lambda: dx

    def reduce_max(self, slot: str) -> Callable[[Tensor], Tensor] | None:
        if self.split not in SLOT_DIMS[slot]:
            return None
        self.asked.append(slot)
        return lambda part: torch.maximum(part, self.amax[slot])


@dataclass
class Whole(NoComm):
    """Not sharded; remembers every amax."""

    amax: dict[str, Tensor] = field(default_factory=dict)

    def reduce_max(self, slot: str) -> Callable[[Tensor], Tensor] | None:
        def remember(amax: Tensor) -> Tensor:
            self.amax[slot] = amax
            return amax

        return remember


def operands(name: str, x: Tensor, w: Tensor, dy: Tensor, comm: LinearComm) -> dict[str, BlockScaledTensor]:
    recipe = load_recipe(name)
    linear = recipe.linears[next(iter(recipe.linears))]
    watched = watch(make_plan(linear, Clock(seed=1, step=2, micro_batch=3)))
    fp4_linear(x.clone().requires_grad_(), w.clone().requires_grad_(), watched.plan, comm).backward(dy)
    found = {slot: operand for slot, operand in watched.operands.items() if isinstance(operand, BlockScaledTensor)}
    assert len(found) == len(SLOTS)
    return found


def part(t: Tensor, axis: int, rank: int, pieces: int) -> Tensor:
    """Rank's half of each of `pieces` stretches: what a rank holds of SwiGLU's gate and up."""
    return torch.cat([stretch.chunk(2, axis)[rank] for stretch in t.chunk(pieces, axis)], axis)


@pytest.mark.parametrize(("split", "pieces"), [("O", 1), ("I", 1), ("O", 2)])
@pytest.mark.parametrize("name", RECIPES)
def test_shards_are_pieces_of_the_whole(name: str, split: Dim, pieces: int) -> None:
    x, w, dy = normal(T, I), normal(O, I, seed=1), normal(T, O, seed=2)
    logical = Whole()
    whole = operands(name, x, w, dy, logical)
    for rank in range(2):
        comm = OneRankOfTwo(split, rank, logical.amax, pieces=pieces)
        mine = (
            operands(name, x, part(w, 0, rank, pieces), part(dy, 1, rank, pieces), comm)
            if split == "O"
            else operands(name, x.chunk(2, 1)[rank], w.chunk(2, 1)[rank], dy, comm)
        )
        for slot in SLOTS:
            assert_piece(mine[slot], whole[slot], SLOT_DIMS[slot], comm)
        assert set(comm.asked) <= {slot for slot in SLOTS if split in SLOT_DIMS[slot]}


def assert_piece(mine: BlockScaledTensor, whole: BlockScaledTensor, dims: tuple[Dim, Dim], comm: OneRankOfTwo) -> None:
    def piece(t: Tensor) -> Tensor:
        for axis, dim in enumerate(dims):
            t = part(t, axis, comm.rank, comm.pieces) if dim == comm.split else t
        return t

    assert torch.equal(unpack(mine.codes), piece(unpack(whole.codes)))
    assert torch.equal(mine.scales, piece(whole.scales))
    assert torch.equal(mine.global_scale, whole.global_scale)


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
        at = place(OneRankOfTwo(split, rank, {}), slot, part_rows, part_columns, Key())
        assert (at.rows, at.columns) == (rows, columns)
        covered[at.row : at.row + part_rows, at.column : at.column + part_columns] += 1
    copies = 1 if split in SLOT_DIMS[slot] else 2  # an operand that is not sharded is on both ranks
    assert (covered == copies).all()


def test_a_whole_layer_communicates_nothing() -> None:
    comm, x = NoComm(), normal(4, 4)
    assert comm.gather_x(x) is x
    assert comm.reduce_dx(x)() is x
    assert all(comm.reduce_max(slot) is None for slot in SLOTS)
    assert all(place(comm, slot, 3, 5, Key(step=7)) == Key(step=7, rows=3, columns=5) for slot in SLOTS)
