"""Gradient buckets reduced on two levels: inside a domain in high precision, across domains coded.

What a rank's link to the network carries is then 1/L of the bucket, L being the ranks of its domain: a flat coded
all-to-all would put more there than a ring of bf16 does from L = 4 on. `GroupTree` has the order of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from fp4dist.comm.codec import Noise
from fp4dist.comm.collectives import DEFAULT
from fp4dist.comm.exchange import Handle, Members, Options, start
from fp4dist.comm.exchanges import Op, Scatter
from fp4dist.comm.hierarchy import INNER, OUTER, GroupTree, passes_on
from fp4dist.comm.parts import rooms
from fp4dist.spec.wire import Wire


def make_trees(levels: dict[tuple[int, ...], int]) -> dict[tuple[int, ...], GroupTree]:
    """The GroupTree of each of this rank's groups; a collective call of the whole job, also of ranks with none.

    levels   the group's ranks in the job -> how many neighbours of them share a domain
    """
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, levels)
    wanted = sorted({item for mine in everyone for item in mine.items()})
    me, trees = dist.get_rank(), {}
    for ranks, inside in wanted:
        racks = [list(ranks[i : i + inside]) for i in range(0, len(ranks), inside)]
        both = [_own_group(racks, me), _own_group([list(place) for place in zip(*racks, strict=True)], me)]
        if me in ranks:
            trees[ranks] = GroupTree(both[0], both[1])
    return trees


def _own_group(groups: Sequence[Sequence[int]], me: int) -> Any:
    """Make all `groups`, as every rank of the job must; the one with this rank in it."""
    made = [(dist.new_group(list(ranks)), ranks) for ranks in groups]
    return next((group for group, ranks in made if me in ranks), None)


def reduce_scatter_levels(
    tree: GroupTree, out: Sequence[Tensor], parts: Sequence[Sequence[Tensor]], inner: Wire, outer: Wire, noise: Noise,
    *, op: Op, async_op: bool = False, options: Options = DEFAULT,
) -> Handle:  # fmt: skip
    """`reduce_scatter_parts` over the ranks of `tree`: parts[k] are the tensors that its rank k is to own.

    options   pieces are pipelined through both levels; `pairs` is for the outer one, where two domains exchange
    """
    rack, place = Members.of(tree.intra), Members.of(tree.inter)
    owners = [[r * rack.size + here for r in range(place.size)] for here in range(rack.size)]
    by_place = [[t for k in ranks for t in parts[k]] for ranks in owners]
    mine = by_place[rack.place]
    sums = rooms([t.numel() for t in mine], mine[0].device) if mine else []
    left = iter(sums)
    by_rack = [[next(left) for _ in parts[k]] for k in owners[rack.place]]
    first = Scatter(sums, by_place, inner, noise, rack, "sum", replace(options, pairs="all_to_all"), INNER)
    second = Scatter(out, by_rack, outer, noise.after, place, "sum", options, OUTER, first.pieces)
    second.device = first.device  # also where this place's ranks own nothing
    second.factor = 1.0 / tree.world if op == "mean" else 1.0
    return start(list(out), [first, second], first.device, async_op)


def bytes_of_all_reduce(slices: Sequence[int], rank: int, inside: int, inner: Wire, outer: Wire) -> int:
    """Bytes that rank `rank` of a GroupTree sends in its all_reduce; slices[k] are the elements that rank k sums."""
    racks, place = len(slices) // inside, rank % inside
    held = [slices[r * inside + place] for r in range(racks)]  # that this rank passes on in its rack
    across = outer.chunk_of(max(slices if passes_on(inner, outer) else held))
    back = (racks - 1) * outer.bytes_of(slices[rank], across)
    back += (inside - 1) * sum(inner.bytes_of(n, inner.chunk_of(max(slices))) for n in held)
    return sum(bytes_of_levels([[n] for n in slices], rank, inside, inner, outer)) + back


def bytes_of_levels(
    sizes: Sequence[Sequence[int]], rank: int, inside: int, inner: Wire, outer: Wire
) -> tuple[int, int]:
    """(inside, across) bytes that rank `rank` of the tree sends: sizes[k] are the elements of the tensors of rank k."""
    racks, place, mine = len(sizes) // inside, rank % inside, rank // inside
    longest = max(n for tensors in sizes for n in tensors)
    here = inner.chunk_of(longest)
    first = sum(
        inner.bytes_of(n, here)
        for other in range(inside) if other != place for r in range(racks) for n in sizes[r * inside + other]
    )  # fmt: skip
    there = outer.chunk_of(max((n for r in range(racks) for n in sizes[r * inside + place]), default=0))
    second = sum(
        outer.bytes_of(n, there) for r in range(racks) if r != mine for n in sizes[r * inside + place]
    )  # fmt: skip
    return first, second
