"""What a linear layer asks of its process group. The autograd code sees this protocol and no `torch.distributed`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, Protocol

from torch import Tensor

from fp4dist.numerics.quantize import ReduceMax
from fp4dist.numerics.tensor import Key

Dim = Literal["T", "I", "O"]
# Rows and columns of each operand in its GEMM; the columns are contracted.
SLOT_DIMS: dict[str, tuple[Dim, Dim]] = {
    "fprop.x": ("T", "I"),
    "fprop.w": ("O", "I"),
    "dgrad.dy": ("T", "O"),
    "dgrad.w": ("I", "O"),
    "wgrad.dy": ("O", "T"),
    "wgrad.x": ("I", "T"),
}


class LinearComm(Protocol):
    """How the linear is sharded and what moves between its ranks."""

    @property
    def split(self) -> Dim | None:
        """The dimension of W that is sharded: O (column-parallel), I (row-parallel), None."""
        ...

    @property
    def rank(self) -> int:
        """This rank's place among those that share the layer."""
        ...

    @property
    def size(self) -> int:
        """Ranks that share the layer."""
        ...

    @property
    def pieces(self) -> int:
        """Equal runs that a rank holds of the sharded dimension: 2 where W stacks SwiGLU's gate and up, else 1."""
        ...

    def gather_x(self, x: Tensor) -> Tensor:
        """The full input [..., I] from this rank's part (sequence parallelism), or x itself."""
        ...

    def reduce_dx(self, dx: Tensor) -> Callable[[], Tensor]:
        """Start summing the partial input gradient over ranks; the returned function waits, gives this rank's part."""
        ...

    def reduce_max(self, slot: str) -> ReduceMax | None:
        """For an operand that is a shard of a larger one: its amax over all ranks. None where the operand is whole."""
        ...


class NoComm:
    """A layer that is whole on its rank."""

    split: Dim | None = None
    rank = 0
    size = 1
    pieces = 1

    def gather_x(self, x: Tensor) -> Tensor:
        """The input itself."""
        return x

    def reduce_dx(self, dx: Tensor) -> Callable[[], Tensor]:
        """The gradient itself."""
        return lambda: dx

    def reduce_max(self, slot: str) -> ReduceMax | None:
        """Nothing to reduce over."""
        return None


def place(comm: LinearComm, slot: str, rows: int, columns: int, key: Key) -> Key:
    """`key`, for this rank's [rows, columns] part of operand `slot`: where that part lies in the global operand."""
    row_dim, column_dim = SLOT_DIMS[slot]
    if comm.split == row_dim:
        start = comm.rank * (rows // comm.pieces)
        return replace(key, row=start, rows=comm.size * rows, columns=columns, row_pieces=comm.pieces)
    if comm.split == column_dim:
        start = comm.rank * (columns // comm.pieces)
        return replace(key, column=start, rows=rows, columns=comm.size * columns, column_pieces=comm.pieces)
    return replace(key, rows=rows, columns=columns)
