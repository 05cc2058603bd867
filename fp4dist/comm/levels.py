"""Gradient buckets reduced on two levels: inside a domain in high precision, across domains coded.

What a rank's link to the network carries is then 1/L of the bucket, L being the ranks of its domain: a flat coded
all-to-all would put more there than a ring of bf16 does from L = 4 on. `GroupTree` has the order of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fp4dist.comm.codec import Noise
from fp4dist.comm.exchange import Handle, Members, Options, start
from fp4dist.comm.exchanges import Op, Scatter
from fp4dist.comm.hierarchy import INNER, OUTER, GroupTree
from fp4dist.spec.wire import Wire

_WHOLE = Options(pieces=1)


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
    *, op: Op, async_op: bool = False,
) -> Handle:  # fmt: skip
    """`reduce_scatter_parts` over the ranks of `tree`: parts[k] are the tensors that its rank k is to own."""
    rack, place = Members.of(tree.intra), Members.of(tree.inter)
    owners = [[r * rack.size + here for r in range(place.size)] for here in range(rack.size)]
    by_place = [[t for k in ranks for t in parts[k]] for ranks in owners]
    sums = [torch.empty(t.numel(), dtype=torch.float32, device=t.device) for t in by_place[rack.place]]
    left = iter(sums)
    by_rack = [[next(left) for _ in parts[k]] for k in owners[rack.place]]
    first = Scatter(sums, by_place, inner, noise, rack, "sum", _WHOLE, INNER)
    second = Scatter(out, by_rack, outer, noise.after, place, "sum", _WHOLE, OUTER, first.pieces)
    second.factor = 1.0 / tree.world if op == "mean" else 1.0
    return start(list(out), [first, second], first.device, async_op)


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
