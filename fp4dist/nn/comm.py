"""What a linear layer asks of its process groups. The autograd code sees this protocol and no `torch.distributed`.

Two things may be split over ranks: the weight (tensor parallelism) and the tokens (context parallelism, and sequence
parallelism before a layer's gather). An operand's amax is that of the logical tensor, over all ranks that hold a part
of it, and its noise is keyed by its place in the logical tensor; so a split changes no code and no scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

from torch import Tensor

from fp4dist.errors import RecipeMismatch
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

    @property
    def token_shard(self) -> Literal["x", "y"] | None:
        """Whether only this rank's part of the tokens is in the input (x) or wanted in the output (y).

        Sequence parallelism: rank r of `size` holds the r-th of `size` equal runs. The other tensor has all tokens.
        """
        ...

    @property
    def context(self) -> tuple[int, int]:
        """(rank, size) in context parallelism: rank r holds pieces r and 2 size - 1 - r of 2 size of the sequence."""
        ...

    def all_gather(self, part: Tensor) -> Callable[[], Tensor]:
        """Start gathering the ranks' parts [n, ...] along the first dimension; the returned function waits."""
        ...

    def reduce_dx(self, dx: Tensor) -> Callable[[], Tensor]:
        """Start summing the partial input gradient over ranks; the returned function waits, gives this rank's part."""
        ...

    def reduce_y(self, y: Tensor) -> Tensor:
        """Where `token_shard` is y: this rank's part of the summed partial outputs; elsewhere y itself."""
        ...

    def reduce_max(self, slot: str, token_shard: bool = False) -> ReduceMax | None:
        """For an operand that is a shard of a larger one: its amax over all ranks. None where the operand is whole.

        token_shard   the operand is made from this rank's part of the tokens
        """
        ...


class NoComm:
    """A layer that is whole on its rank."""

    split: Dim | None = None
    rank = 0
    size = 1
    pieces = 1
    token_shard: Literal["x", "y"] | None = None
    context = (0, 1)

    def all_gather(self, part: Tensor) -> Callable[[], Tensor]:
        """The part is everything."""
        return lambda: part

    def reduce_dx(self, dx: Tensor) -> Callable[[], Tensor]:
        """The gradient itself."""
        return lambda: dx

    def reduce_y(self, y: Tensor) -> Tensor:
        """The output itself."""
        return y

    def reduce_max(self, slot: str, token_shard: bool = False) -> ReduceMax | None:
        """Nothing to reduce over."""
        return None


def place(comm: LinearComm, slot: str, rows: int, columns: int, key: Key, token_shard: bool = False) -> Key:
    """`key`, for this rank's [rows, columns] part of operand `slot`: where that part lies in the global operand.

    token_shard   the part is made from this rank's part of the tokens (sequence parallelism)
    """
    if comm.size == comm.pieces == comm.context[1] == 1:  # nothing is split
        return Key(
            key.seed, key.layer, key.step, key.micro_batch, key.slot, key.stream, (0,), (0,), rows, columns, key.moment
        )  # fmt: skip
    row_dim, column_dim = SLOT_DIMS[slot]
    row_runs, all_rows = _runs(comm, row_dim, rows, token_shard)
    column_runs, all_columns = _runs(comm, column_dim, columns, token_shard)
    return Key(
        key.seed,
        key.layer,
        key.step,
        key.micro_batch,
        key.slot,
        key.stream,
        row_runs,
        column_runs,
        all_rows,
        all_columns,
        key.moment,
    )


def token_runs(comm: LinearComm, tokens: int, token_shard: bool) -> tuple[tuple[int, ...], int]:
    """(starts of the equal runs that this rank's `tokens` tokens are, all tokens of the micro-batch).

    The T index of a token is sequence position * B + b.
    """
    rank, size = (comm.rank, comm.size) if token_shard else (0, 1)
    context_rank, contexts = comm.context
    first, held = rank * tokens, size * tokens  # this shard begins at `first` of what the context-parallel rank holds
    if contexts == 1:
        return (first,), held
    half = held // 2
    early, late = context_rank * half, (2 * contexts - 1 - context_rank) * half
    runs = [(piece + max(first - begin, 0), min(first + tokens, begin + half) - max(first, begin))
            for piece, begin in ((early, 0), (late, half))]  # fmt: skip
    lengths = {length for _, length in runs if length > 0}
    if held % 2 or len(lengths) > 1:
        raise RecipeMismatch(
            f"{tokens} tokens on rank {rank} of {size} are not equal runs of the two pieces of the sequence that a"
            f" context-parallel rank holds; make the sequence length a multiple of 2 * cp * tp = {2 * contexts * size}"
        )
    return tuple(start for start, length in runs if length > 0), contexts * held


def _runs(comm: LinearComm, dim: Dim, length: int, token_shard: bool) -> tuple[tuple[int, ...], int]:
    """(starts, global size) of one dimension of this rank's part."""
    if dim == "T":
        return token_runs(comm, length, token_shard)
    if dim != comm.split:
        return (0,), length
    run = length // comm.pieces
    return tuple((piece * comm.size + comm.rank) * run for piece in range(comm.pieces)), comm.size * length
