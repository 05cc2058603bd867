"""Collectives whose bytes are a `Wire`'s: reduce-scatter, all-reduce, all-gather, all-to-all, send and receive.

On any process group, of any size, for any number of elements, bf16 or fp32; sums are made in fp32. `*_parts` take a
vector as tensors that lie anywhere, of any sizes, the others are short forms of them. What travels is uint8. Every rank
must give the same wire, noise and options; what differs between ranks is found by the records' headers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fp4dist.comm.codec import Noise
from fp4dist.comm.exchange import Group, Handle, Members, Options, start
from fp4dist.comm.exchanges import Gather, Op, Scatter, Swap, Transfer
from fp4dist.spec.wire import Wire

DEFAULT = Options()


def reduce_scatter(
    out: Tensor, inp: Tensor, wire: Wire, noise: Noise, group: Group = None, *, op: Op = "mean",
    async_op: bool = False, options: Options = DEFAULT,
) -> Handle:  # fmt: skip
    """Out [n] = this rank's slice of the mean (or sum) over ranks of `inp` [W n]; rank r owns the r-th of W slices.

    Out may be that slice of inp itself. Each rank codes what it sends to the others once; see Options for its own.
    """
    size = Members.of(group).size
    if inp.numel() != size * out.numel():
        raise ValueError(f"reduce_scatter over {size} ranks: {inp.numel()} elements are not {size} x {out.numel()}")
    parts = [[t] for t in inp.view(-1).split(out.numel())] if out.numel() else [[inp.view(-1)]] * size
    return reduce_scatter_parts([out], parts, wire, noise, group, op=op, async_op=async_op, options=options)


def reduce_scatter_parts(
    out: Sequence[Tensor], parts: Sequence[Sequence[Tensor]], wire: Wire, noise: Noise, group: Group = None, *,
    op: Op = "mean", async_op: bool = False, options: Options = DEFAULT, level: str = "flat",
) -> Handle:  # fmt: skip
    """`reduce_scatter` of a vector in parts: parts[r] are the tensors that rank r is to own, out those of this rank.

    Sizes are the same on all ranks, but need not be equal; 0 is allowed.
    """
    scatter = Scatter(out, parts, wire, noise, Members.of(group), op, options, level)
    return start(list(out) if len(out) != 1 else out[0], [scatter], scatter.device, async_op)


def all_reduce(
    x: Tensor, wire: Wire, noise: Noise, group: Group = None, *, op: Op = "mean", gather: Wire | None = None,
    async_op: bool = False, options: Options = DEFAULT,
) -> Handle:  # fmt: skip
    """The mean (or sum) over ranks of `x`, in place: a reduce-scatter, then an all-gather; equal bits on all ranks.

    gather   wire of the second half, whose values are coded again, from fp32, with fresh noise; None: the same wire
    """
    members = Members.of(group)
    flat = x.view(-1)
    slices = [[t] for t in slices_of(flat, members.size)]
    mine = slices[members.place][0]
    chained = Scatter.chains(wire, gather or wire, options, x.device, members.size)
    shard = mine if chained else torch.empty(mine.numel(), dtype=torch.float32, device=x.device)
    scatter = Scatter([shard], slices, wire, noise, members, op, options, "flat")
    second = Gather(slices, [shard], gather or wire, noise.after, members, options, "flat", scatter.pieces)
    scatter.then = second if chained else None
    return start(x, [scatter, second], x.device, async_op)


def all_gather(
    out: Tensor, part: Tensor, wire: Wire, noise: Noise, group: Group = None, *, async_op: bool = False,
    options: Options = DEFAULT,
) -> Handle:  # fmt: skip
    """Out [W n] = the parts [n] of all ranks side by side, as decoded: equal bits on all ranks, the sender included."""
    size = Members.of(group).size
    if out.numel() != size * part.numel():
        raise ValueError(f"all_gather over {size} ranks: {out.numel()} elements are not {size} x {part.numel()}")
    outs = [[t] for t in out.view(-1).split(part.numel())] if part.numel() else [[out.view(-1)]] * size
    gather = Gather(outs, [part], wire, noise, Members.of(group), options, "flat")
    return start(out, [gather], out.device, async_op)


def all_gather_parts(
    outs: Sequence[Sequence[Tensor]], mine: Sequence[Tensor], wire: Wire, noise: Noise, group: Group = None, *,
    async_op: bool = False, options: Options = DEFAULT, level: str = "flat",
) -> Handle:  # fmt: skip
    """`all_gather` in parts: rank r's tensors `mine` arrive in outs[r], on itself too. Sizes need not be equal."""
    gather = Gather(outs, mine, wire, noise, Members.of(group), options, level)
    return start(outs, [gather], gather.device, async_op)


def all_to_all(
    out: Tensor, inp: Tensor, wire: Wire, noise: Noise, group: Group = None, *,
    output_splits: Sequence[int] | None = None, input_splits: Sequence[int] | None = None, async_op: bool = False,
    options: Options = DEFAULT,
) -> Handle:  # fmt: skip
    """Rows of dimension 0 change ranks: the r-th run of `inp` goes to rank r, `out` holds what came, by sender.

    splits   rows of each run; None: equal runs. Rows that stay on their rank are copied as they are
    """
    members = Members.of(group)
    swap = Swap(_runs(out, output_splits, members.size), _runs(inp, input_splits, members.size), wire, noise, members,
                options)  # fmt: skip
    return start(out, [swap], out.device, async_op)


def send(
    x: Tensor, wire: Wire, noise: Noise, dst: int, group: Group = None, *, async_op: bool = False,
    options: Options = DEFAULT,
) -> Handle:  # fmt: skip
    """Send `x` to place `dst` of the group; its `recv` must be given the same wire, noise and number of elements."""
    transfer = Transfer(x, wire, noise, Members.of(group), dst, True, options)
    return start(x, [transfer], x.device, async_op)


def recv(
    out: Tensor, wire: Wire, noise: Noise, src: int, group: Group = None, *, async_op: bool = False,
    options: Options = DEFAULT,
) -> Handle:  # fmt: skip
    """Receive into `out` what place `src` of the group sends."""
    transfer = Transfer(out, wire, noise, Members.of(group), src, False, options)
    return start(out, [transfer], out.device, async_op)


def slices_of(flat: Tensor, size: int) -> list[Tensor]:
    """What each of `size` ranks sums in an all-reduce: equal runs of whole 128s, the last ones shorter or empty."""
    each = -(-flat.numel() // size)
    each += -each % 128
    return [flat[min(i * each, flat.numel()) : min((i + 1) * each, flat.numel())] for i in range(size)]


def _runs(rows: Tensor, splits: Sequence[int] | None, size: int) -> list[Tensor]:
    """The runs of rows for each rank."""
    if splits is None:
        if len(rows) % size:
            raise ValueError(f"all_to_all over {size} ranks: {len(rows)} rows are not equal runs; give the splits")
        splits = [len(rows) // size] * size
    if sum(splits) != len(rows) or len(splits) != size:
        raise ValueError(f"all_to_all: splits {list(splits)} are not {size} runs of {len(rows)} rows")
    return list(rows.split(list(splits)))
