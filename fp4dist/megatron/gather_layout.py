"""Which bytes of a bucket travel when updated weights are gathered as codes: decided once, the same on every rank.

Megatron cuts a bucket's flat parameter buffer into equal slices, one for each data-parallel rank, wherever the cut
falls. A weight that travels as codes is made of block rows (the rows that share scales: 16 of a 16x16 block, 1 of a
1x16 block); a block row belongs to the rank whose slice holds its first element. What the cut has left of a block row
in later slices, its `tail`, goes to that owner in high precision, so that every block is encoded whole, by one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal

Kind = Literal["raw", "codes", "scales", "global_scale"]
GLOBAL_SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class Extent:
    """A parameter in its bucket.

    start   first element in the bucket's flat buffer;  rows, columns   the parameter as a matrix
    block   rows and columns that share a scale; None where the parameter travels as it is
    """

    start: int
    rows: int
    columns: int
    block: tuple[int, int] | None = None

    @property
    def end(self) -> int:
        """One past the last element."""
        return self.start + self.rows * self.columns

    @property
    def block_row(self) -> int:
        """Elements of the rows that share scales."""
        assert self.block is not None
        return self.block[0] * self.columns

    @property
    def scale_columns(self) -> int:
        """Scales of a block row, which are bytes."""
        assert self.block is not None
        return self.columns // self.block[1]

    def owned(self, first: int, last: int) -> tuple[int, int]:
        """The block rows whose first element lies in [first, last) of the bucket, as [begin, end)."""
        assert self.block is not None
        count = self.rows // self.block[0]
        begin, end = (min(max(-((self.start - at) // self.block_row), 0), count) for at in (first, last))
        return begin, end


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of one rank for one parameter.

    extent   index of the parameter;  at   first byte in the target (parameter, codes or scales)
    size     bytes;  offset   first byte in the rank's payload
    """

    rank: int
    extent: int
    kind: Kind
    at: int
    size: int
    offset: int


@dataclass(frozen=True, slots=True)
class Tail:
    """Elements [start, end) of the bucket that `sender` gives to `owner`, which encodes the block row they end."""

    sender: int
    owner: int
    start: int
    end: int


@dataclass(frozen=True)
class GatherLayout:
    """What every rank contributes to one bucket's gather.

    extents   the bucket's parameters in the order of the buffer
    numel     elements of the buffer, a multiple of `ranks`
    itemsize  bytes of an element in high precision
    """

    extents: tuple[Extent, ...]
    numel: int
    itemsize: int
    ranks: int

    def slice_of(self, rank: int) -> tuple[int, int]:
        """The elements that `rank` owns."""
        size = self.numel // self.ranks
        return rank * size, (rank + 1) * size

    @cached_property
    def tails(self) -> tuple[Tail, ...]:
        """At most one of each rank: the beginning of its slice, where that cuts a block row."""
        tails = []
        for rank in range(1, self.ranks):
            first, last = self.slice_of(rank)
            for extent in self.extents:
                if extent.block is None or not extent.start < first < extent.end:
                    continue
                inside = (first - extent.start) % extent.block_row
                if inside:
                    begin = first - inside
                    owner = begin // (self.numel // self.ranks)
                    tails.append(Tail(rank, owner, first, min(last, begin + extent.block_row)))
        return tuple(tails)

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """Every rank's payload, in order."""
        return tuple(piece for rank in range(self.ranks) for piece in self._payload(rank))

    @cached_property
    def payloads(self) -> tuple[int, ...]:
        """Bytes of each rank's payload."""
        sizes = [0] * self.ranks
        for piece in self.pieces:
            sizes[piece.rank] += piece.size
        return tuple(sizes)

    @cached_property
    def is_balanced(self) -> bool:
        """Whether payloads are made equal before the gather (an all-to-all) rather than padded to the largest.

        The cheaper of both: slices of an embedding hold more bytes than slices of weights that travel as codes.
        """
        moved = sum(sum(row) - row[rank] for rank, row in enumerate(self.moves))
        # every byte of the gather reaches ranks - 1 others
        return moved + (self.ranks - 1) * self.ranks * self.share < (self.ranks - 1) * self.ranks * max(self.payloads)

    @cached_property
    def share(self) -> int:
        """Bytes of each rank once payloads are equal."""
        return -(-sum(self.payloads) // self.ranks)

    @cached_property
    def moves(self) -> tuple[tuple[int, ...], ...]:
        """[from][to] bytes that make payloads equal: rank r gets bytes [r share, (r + 1) share) of all of them."""
        ends = list(accumulate(self.payloads))
        return tuple(
            tuple(
                max(0, min(end, (to + 1) * self.share) - max(end - size, to * self.share)) for to in range(self.ranks)
            )
            for size, end in zip(self.payloads, ends, strict=True)
        )

    @property
    def contribution(self) -> int:
        """Bytes that each rank puts into the gather."""
        return self.share if self.is_balanced else max(self.payloads)

    @cached_property
    def bytes_in(self) -> tuple[int, ...]:
        """Bytes that reach each rank from others: tails, evened-out payloads, the gather."""
        received = [(self.ranks - 1) * self.contribution] * self.ranks
        for tail in self.tails:
            received[tail.owner] += (tail.end - tail.start) * self.itemsize
        for sender, row in enumerate(self.moves if self.is_balanced else ()):
            for receiver, size in enumerate(row):
                received[receiver] += size if receiver != sender else 0
        return tuple(received)

    @property
    def bytes_in_whole(self) -> int:
        """Bytes that reach each rank in Megatron's gather of the whole buffer."""
        return self.numel * self.itemsize * (self.ranks - 1) // self.ranks

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """The first byte in what was gathered of each of `pieces`."""
        evened = [0, *accumulate(self.payloads)]
        return tuple(
            (evened[p.rank] if self.is_balanced else p.rank * self.contribution) + p.offset for p in self.pieces
        )

    def _payload(self, rank: int) -> list[Piece]:
        first, last = self.slice_of(rank)
        pieces: list[Piece] = []
        offset = 0
        for index, extent in enumerate(self.extents):
            for kind, at, size in self._parts(extent, first, last):
                pieces.append(Piece(rank, index, kind, at, size, offset))
                offset += size
        return pieces

    def _parts(self, extent: Extent, first: int, last: int) -> Sequence[tuple[Kind, int, int]]:
        """(kind, first byte in the target, bytes) of what the slice [first, last) holds of a parameter."""
        if extent.block is None:
            begin, end = max(first, extent.start), min(last, extent.end)
            if begin >= end:
                return []
            return [("raw", (begin - extent.start) * self.itemsize, (end - begin) * self.itemsize)]
        begin, end = extent.owned(first, last)
        if begin == end:
            return []
        codes, scales = extent.block_row // 2, extent.scale_columns
        parts: list[tuple[Kind, int, int]] = [
            ("codes", begin * codes, (end - begin) * codes),
            ("scales", begin * scales, (end - begin) * scales),
        ]
        return [*parts, ("global_scale", 0, GLOBAL_SCALE_BYTES)] if begin == 0 else parts
