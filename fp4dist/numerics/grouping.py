"""Which elements share a scale, and statistics over them that do not depend on how the tensor is split over ranks.

A block of fixed size is whole on its rank. A row whose columns are split, and a whole tensor, are not: their maximum is
reduced over the ranks, and their sums are sums of chunks whose borders depend on the global shape alone. A rank fills
its chunks into a vector of zeros; sums of squares are not negative, so a MAX all-reduce merges the parts, and every
rank adds the chunks in the same tree. `reduce_max` is all that is asked of the process group. A held or delayed amax
is a `reduce_max` that returns what was held.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fp4dist.numerics.tensor import Key
from fp4dist.spec.recipe import QuantSpec

ReduceMax = Callable[[Tensor], Tensor]
MOST_CHUNKS = 64  # of a dimension: at least as many as ranks and pieces can split it into


def blocked(x: Tensor, block: tuple[int, int]) -> Tensor:
    """[R, C] -> [R/br, br, C/bc, bc]."""
    rows, columns = block
    return x.reshape(x.shape[0] // rows, rows, x.shape[1] // columns, columns)


def flat(blocks: Tensor) -> Tensor:
    """[R/br, br, C/bc, bc] -> [R, C]."""
    return blocks.reshape(blocks.shape[0] * blocks.shape[1], -1)


def block_amax(x: Tensor, block: tuple[int, int]) -> Tensor:
    """[R, C] -> [R/br, C/bc] max |x| of each block."""
    return blocked(x.abs(), block).amax(dim=(1, 3))


def tree_sum(x: Tensor, block: tuple[int, int]) -> Tensor:
    """[R, C] -> [R/br, C/bc] sums over blocks: adjacent pairs, columns before rows, so every backend rounds alike.

    Where a length is odd, its last element waits for the next level.
    """
    blocks = blocked(x, block)
    for dim in (3, 1):
        while blocks.shape[dim] > 1:
            blocks = _pairs_added(blocks, dim)
    return blocks[:, 0, :, 0]


def _pairs_added(x: Tensor, dim: int) -> Tensor:
    number = x.shape[dim]
    pairs = x.narrow(dim, 0, number // 2 * 2).unflatten(dim, (-1, 2))
    added = pairs.select(dim + 1, 0) + pairs.select(dim + 1, 1)
    return torch.cat((added, x.narrow(dim, number - 1, 1)), dim) if number % 2 else added


def spread(values: Tensor, shape: tuple[int, int] | torch.Size) -> Tensor:
    """[m, n] values, each of a tile of `shape` -> expanded to `shape`; a [] value stays."""
    if values.dim() == 0:
        return values
    times = (shape[0] // values.shape[0], shape[1] // values.shape[1])
    return flat(values[:, None, :, None].expand(-1, times[0], -1, times[1]))


@dataclass(frozen=True, slots=True)
class Grouping:
    """The blocks of one matrix, which may be a shard of a larger one.

    shape       [R, C] of this rank's matrix
    block       rows and columns that share a scale, of this matrix
    key         where the matrix lies; None, or no reduce_max: it is whole
    """

    shape: torch.Size
    block: tuple[int, int]
    spec: QuantSpec
    key: Key | None
    reduce_max: ReduceMax | None

    @classmethod
    def of(cls, x: Tensor, spec: QuantSpec, key: Key | None, reduce_max: ReduceMax | None) -> Grouping:
        """The blocks of [R, C] `x` under `spec`."""
        rows, columns = spec.shape
        return cls(x.shape, (rows or x.shape[0], columns or x.shape[1]), spec, key, reduce_max)

    @property
    def grid(self) -> tuple[int, int]:
        """Number of blocks along rows and columns."""
        return self.shape[0] // self.block[0], self.shape[1] // self.block[1]

    def amax(self, x: Tensor) -> Tensor:
        """Grid-shaped max |x| of each logical block."""
        found = block_amax(x, self.block)
        if 0 not in self.spec.shape:
            return found
        return self._tensor_max(found).reshape(1, 1) if self.spec.shape[0] == 0 else self._row_max(found)

    def total(self, x: Tensor) -> Tensor:
        """Grid-shaped sums of `x`, which must not be negative, over each logical block."""
        if 0 not in self.spec.shape:
            return tree_sum(x, self.block)
        return self.total_of(tree_sum(x, self.chunk()))

    def chunk(self) -> tuple[int, int]:
        """Rows and columns that sums over logical rows, or over the logical tensor, begin with."""
        rows, columns = self._global_shape()
        return self._checked((chunk_of(rows) if self.spec.shape[0] == 0 else 1, chunk_of(columns)))

    def total_of(self, parts: Tensor) -> Tensor:
        """Sums over logical rows, or over the logical tensor, from those of this rank's chunks."""
        by_tensor = self.spec.shape[0] == 0
        if self._is_shard():
            parts = self._merged(parts, self.chunk(), rows_kept=not by_tensor)
        return tree_sum(parts, (parts.shape[0] if by_tensor else 1, parts.shape[1]))

    def moments(self, x: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
        """Grid-shaped sums of the squares and of the magnitudes of x / unit over each logical block.

        unit   grid-shaped powers of two: the division is exact, and squares neither overflow nor vanish
        """
        x = x * spread(torch.ones_like(unit) / unit, x.shape)
        return self.total(x * x), self.total(x.abs())

    def count(self) -> int:
        """Elements of a logical block."""
        rows, columns = self._global_shape()
        return (self.spec.shape[0] or rows) * (self.spec.shape[1] or columns)

    def outer_amax(self, block_values: Tensor) -> Tensor:
        """Max over each outer tile of grid-shaped values: [], [R, 1] or [R/tr, C/tc]; Inf where one is NaN."""
        above = self.spec.above
        if isinstance(above, tuple):
            tile = (above[0] // self.block[0], above[1] // self.block[1])
            return blocked(block_values, tile).amax(dim=(1, 3)).nan_to_num(nan=float("inf"), posinf=float("inf"))
        if above == "row":
            return self._row_max(block_values.amax(dim=1, keepdim=True))
        return self._tensor_max(block_values)

    def _tensor_max(self, values: Tensor) -> Tensor:
        """[] max of the logical tensor; NaN is made Inf first, because MAX all-reduces lose NaN."""
        amax = values.amax().nan_to_num(nan=float("inf"), posinf=float("inf"))
        return self.reduce_max(amax) if self.reduce_max is not None else amax

    def _row_max(self, values: Tensor) -> Tensor:
        """[R, 1] max of each logical row."""
        values = values.nan_to_num(nan=float("inf"), posinf=float("inf"))
        if not self._is_shard() or self._global_shape()[1] == self.shape[1]:
            return values
        return self._merged(values, (1, self._global_shape()[1]), rows_kept=True)

    def _merged(self, parts: Tensor, chunk: tuple[int, int], *, rows_kept: bool) -> Tensor:
        """This rank's [r, c] non-negative chunk values -> those of all ranks: every chunk, or this rank's rows of them.

        A chunk wider than a rank's part is one that several ranks hold: its values must be maxima.
        """
        assert self.key is not None
        assert self.reduce_max is not None
        merged, row, _ = merge(parts, chunk, self.shape, self.key, self.reduce_max, fill=0.0)
        return merged[row] if rows_kept else merged

    def _is_shard(self) -> bool:
        return self.reduce_max is not None and self.key is not None

    def _global_shape(self) -> tuple[int, int]:
        if self.reduce_max is None or self.key is None:
            return self.shape[0], self.shape[1]
        return self.key.rows or self.shape[0], self.key.columns or self.shape[1]

    def _checked(self, chunk: tuple[int, int]) -> tuple[int, int]:
        """`chunk`, if every run of this rank is made of whole ones."""
        if not self._is_shard() or self.key is None:
            return chunk
        for size, runs, of in (
            (self.shape[0], self.key.row_runs, chunk[0]),
            (self.shape[1], self.key.column_runs, chunk[1]),
        ):
            if size % (of * len(runs)) or any(start % of for start in runs):
                raise ValueError(
                    f"{self.spec.label()} sums a tensor in chunks of {of}, but a rank holds {size // len(runs)} rows or"
                    " columns at a time; use a parallel size that is a power of two, or amax_scope: shard"
                )
        return chunk


def merge(
    parts: Tensor, chunk: tuple[int, int], shape: torch.Size, key: Key, reduce_max: ReduceMax, fill: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(all ranks' chunk values, indices of this rank's rows of them, indices of its columns).

    parts   [r, c] this rank's chunk values;  chunk   its rows and columns;  shape   [R, C] of this rank's matrix
    fill    not above any value: 0 where none is negative, else -inf
    """
    merged = parts.new_full(((key.rows or shape[0]) // chunk[0], (key.columns or shape[1]) // chunk[1]), fill)
    row = _places(key.row_runs, shape[0], chunk[0], parts.device)
    column = _places(key.column_runs, shape[1], chunk[1], parts.device)
    merged[row[:, None], column[None, :]] = parts
    return reduce_max(merged), row, column


def chunk_of(length: int) -> int:
    """Length / the largest power of two that divides it, at most MOST_CHUNKS of them."""
    return length // min(length & -length, MOST_CHUNKS)


def _places(starts: tuple[int, ...], length: int, chunk: int, device: torch.device) -> Tensor:
    """Indices of this rank's chunks; one where the chunk is the whole dimension."""
    run = length // len(starts)
    pieces = [
        torch.arange(start // chunk, max((start + run) // chunk, start // chunk + 1), device=device) for start in starts
    ]
    return torch.cat(pieces) if chunk <= run else pieces[0]
