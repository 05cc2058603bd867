"""Two levels of links: inside a rack (fast), then across racks (slow), each with a wire of its own.

W = R L ranks: rack r of R, place l of L in it, rank r L + l. A reduce-scatter first sums inside each rack what the
ranks of place l, in any rack, are to own: slices l, L + l, 2 L + l ... of the vector, which lie apart and are read
there. The second exchange runs among the ranks of equal place, so each link across racks carries 1/L of what a flat one
would. What is coded twice is coded with fresh noise; the mean is over all W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fp4dist.comm.codec import Noise
from fp4dist.comm.collectives import DEFAULT, slices_of
from fp4dist.comm.exchange import Exchange, Group, Handle, Members, Options, start
from fp4dist.comm.exchanges import Gather, Op, Scatter
from fp4dist.comm.parts import rooms
from fp4dist.spec.wire import Wire

INNER, OUTER = "intra", "inter"


@dataclass(frozen=True, slots=True)
class GroupTree:
    """The two groups of this rank.

    intra   the ranks of its rack, in the order of their places;  inter   the ranks of its place, in the order of racks
    """

    intra: dist.ProcessGroup
    inter: dist.ProcessGroup

    @classmethod
    def of_ranks(cls, per_rack: int, group: Group = None) -> GroupTree:
        """Make the groups of runs of `per_rack` neighbours in `group`; all ranks of the job must call it together."""
        ranks = Members.of(group).ranks
        if len(ranks) % per_rack:
            raise ValueError(f"{len(ranks)} ranks are not whole racks of {per_rack}")
        racks = [list(ranks[i : i + per_rack]) for i in range(0, len(ranks), per_rack)]
        intra, _ = dist.new_subgroups_by_enumeration(racks)
        inter, _ = dist.new_subgroups_by_enumeration([list(place) for place in zip(*racks, strict=True)])
        assert isinstance(intra, dist.ProcessGroup)
        assert isinstance(inter, dist.ProcessGroup)
        return cls(intra, inter)

    @property
    def world(self) -> int:
        """W, ranks of both levels."""
        return self.intra.size() * self.inter.size()

    def slices(self, flat: Tensor) -> list[list[Tensor]]:
        """[l][r]: the slice of a vector [W n] that place l of rack r owns; views."""
        places, racks = self.intra.size(), self.inter.size()
        if flat.numel() % (places * racks):
            raise ValueError(f"{flat.numel()} elements are not {places * racks} equal slices")
        n = flat.numel() // (places * racks)
        return [[flat[(r * places + i) * n : (r * places + i + 1) * n] for r in range(racks)] for i in range(places)]

    def reduce_scatter(
        self, out: Tensor, inp: Tensor, inner: Wire, outer: Wire, noise: Noise, *, op: Op = "mean",
        async_op: bool = False, options: Options = DEFAULT,
    ) -> Handle:  # fmt: skip
        """Out [n] = this rank's slice of the mean (or sum) over all W ranks of `inp` [W n]."""
        parts = self.slices(inp.view(-1))
        return start(out, self._scatter([out], parts, inner, outer, noise, op, options), out.device, async_op)

    def all_gather(
        self, out: Tensor, part: Tensor, inner: Wire, outer: Wire, noise: Noise, *, async_op: bool = False,
        options: Options = DEFAULT,
    ) -> Handle:  # fmt: skip
        """Out [W n] = all ranks' parts [n], with equal bits on all ranks.

        Where both wires are the same, records pass through the rack as they came: values are coded once.
        """
        exchanges = self._gather(self.slices(out.view(-1)), part, inner, outer, noise, options, None)
        return start(out, exchanges, out.device, async_op)

    def all_reduce(
        self, x: Tensor, inner: Wire, outer: Wire, noise: Noise, *, op: Op = "mean", async_op: bool = False,
        options: Options = DEFAULT,
    ) -> Handle:  # fmt: skip
        """The mean (or sum) over all W ranks of `x` of any number of elements, in place; equal bits on all ranks."""
        places, racks = self.intra.size(), self.inter.size()
        slices = slices_of(x.view(-1), places * racks)
        parts = [[slices[r * places + i] for r in range(racks)] for i in range(places)]
        mine = slices[self.inter.rank() * places + self.intra.rank()]
        shard = torch.empty(mine.numel(), dtype=torch.float32, device=x.device)
        first = self._scatter([shard], parts, inner, outer, noise, op, options)
        second = self._gather(parts, shard, inner, outer, noise.after.after, options, first[0].pieces)
        return start(x, [*first, *second], x.device, async_op)

    def _scatter(
        self, out: Sequence[Tensor], parts: Sequence[Sequence[Tensor]], inner: Wire, outer: Wire, noise: Noise, op: Op,
        options: Options,
    ) -> list[Exchange]:  # fmt: skip
        rack, place = Members.of(self.intra), Members.of(self.inter)
        mine = parts[rack.place]
        sums = rooms([t.numel() for t in mine], mine[0].device)
        first = Scatter(sums, parts, inner, noise, rack, "sum", options, INNER)
        second = Scatter(out, [[t] for t in sums], outer, noise.after, place, "sum", options, OUTER, first.pieces)
        second.factor = 1.0 / self.world if op == "mean" else 1.0
        return [first, second]

    def _gather(
        self, outs: Sequence[Sequence[Tensor]], part: Tensor, inner: Wire, outer: Wire, noise: Noise,
        options: Options, pieces: int | None,
    ) -> list[Exchange]:  # fmt: skip
        rack, place = Members.of(self.intra), Members.of(self.inter)
        mine = outs[rack.place]
        across = Gather([[t] for t in mine], [part], outer, noise, place, options, OUTER, pieces)
        # every rack codes the same values of a place: with the same noise, or racks would get different bits
        rack = rack._replace(ranks=tuple(range(rack.size)))
        inside = Gather(outs, mine, inner, noise.after, rack, options, INNER, across.pieces)
        if not passes_on(inner, outer):
            return [across, inside]
        chunk = outer.chunk_of(max(t.numel() for tensors in outs for t in tensors))  # of both, also of uneven slices
        arriving = _Arriving([[t] for t in mine], [part], outer, noise, place, options, OUTER, pieces, chunk)
        return [arriving, _Relay(arriving, outs, mine, Members.of(self.intra))]


def passes_on(inner: Wire, outer: Wire) -> bool:
    """Whether a gather's records go through the rack as they came."""
    return inner == outer and not outer.plain and outer.signs != "per_rank"


class _Arriving(Gather):
    """The first half of a gather whose records are passed on: it decodes nothing."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.in_pairs = False  # the records of all are passed on, those of this rank, too
        self.arrived: dict[int, Tensor] = {}

    def decode(self, piece: int, received: Tensor) -> None:
        """Keep the records."""
        self.arrived[piece] = received


class _Relay(Gather):
    """The second half: what arrived in the rack goes to all of it, and is decoded there."""

    def __init__(
        self, first: _Arriving, outs: Sequence[Sequence[Tensor]], mine: Sequence[Tensor], members: Members
    ) -> None:
        super().__init__(outs, mine, first.wire, first.noise, members, first.options, INNER, first.pieces)
        self.first = first

    def encode(self, piece: int) -> Tensor:
        """The records that arrived from the other racks."""
        return self.first.arrived.pop(piece)
