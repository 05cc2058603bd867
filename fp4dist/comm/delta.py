"""A flat buffer of weights that each rank updates a slice of, gathered as codes of what has changed.

After an update the owner of a slice knows its new weights w and what all ranks, itself included, hold as them, s. It
sends Q(w - s), and every rank, the owner too, sets s <- s + Q(w - s), in one order of operations: all ranks keep the
same bits. What rounding loses stays in w - s and is sent with the next update, so nothing drifts: s follows w within
one update's rounding error. The optimizer works on w: where the buffer is all it has, w is put aside and put back.

Vectors, norms, routers and short tensors are gathered exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fp4dist.comm.collectives import all_gather_parts
from fp4dist.comm.compression import Compression
from fp4dist.comm.exchange import Handle
from fp4dist.comm.parts import rooms
from fp4dist.comm.policy import decide, pairs_of, span_of, why_exact
from fp4dist.comm.reduction import Bucket, Segment, views
from fp4dist.spec.wire import BF16_WIRE, FP32_WIRE, Wire

_CODED_TOO = ("embedding", "LM head")  # their gradients stay exact, but a weight's error does not add up


class DeltaBucket:
    """A flat buffer of parameters, of which each rank of `group` owns an equal slice.

    parameters   views of it, with their names
    apart        the optimizer has the exact weights elsewhere: nothing need be put aside
    seen         what all ranks hold of this rank's coded runs
    aside        what they should be, while the buffer shows `seen`
    """

    def __init__(
        self,
        data: Tensor,
        parameters: Mapping[str, Tensor],
        group: Any,
        name: str,
        compression: Compression,
        apart: bool,
    ) -> None:
        self.name, self.group, self.compression, self.apart = name, group, compression, apart
        self.data = data.view(-1)
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        itemsize, part = self.data.element_size(), self.data.numel() // self.size
        segments = []
        for parameter_name, parameter in parameters.items():
            start = (parameter.data_ptr() - self.data.data_ptr()) // itemsize
            why = why_exact(parameter_name, parameter.shape)
            why = None if why in _CODED_TOO else why
            segments.append(Segment(parameter_name, start, start + parameter.numel(), why))
        owned = tuple(((k * part, (k + 1) * part),) for k in range(self.size))
        described = Bucket(name, tuple(sorted(segments, key=lambda s: s.start)), owned)
        self.coded, self.exact = described.runs(coded=True), described.runs(coded=False)
        span = span_of(dist.get_process_group_ranks(group), compression.topology)
        pairs = pairs_of(compression.config, span, None, compression.topology)[0]
        self._options = replace(compression.options, pairs=pairs)
        self.decision = decide(
            compression.config, "param_gather", name, numel=described.numel, coded=described.coded_numel,
            itemsize=itemsize, span=span,
            topology=compression.topology, why=described.why(),
        )  # fmt: skip
        self.number = compression.register(self.decision)
        self.wire: Wire | None = self.decision.wire
        self.seen = [view.clone() for view in self._own(self.coded)]
        self.aside: Tensor | None = None
        self._changed = False

    def _own(self, runs: Sequence[Sequence[tuple[int, int]]]) -> list[Tensor]:
        return views(self.data, runs[self.rank])

    @torch.no_grad()
    def before_update(self) -> None:
        """The owner will change its weights now: it has the exact ones again."""
        if self.aside is not None:
            for view, exact in zip(self._own(self.coded), self._cut(self.aside), strict=True):
                view.copy_(exact)
            self.aside = None
        self._changed = True

    @torch.no_grad()
    def start(self) -> Iterator[Any]:
        """Start gathering what has changed; functions that finish it."""
        if not self._changed:
            return
        self._changed = False
        yield self._start_exact()
        if self.wire is not None:
            yield self._start_coded(self.wire)

    def _start_exact(self) -> Any:
        """What travels as it is: of coded buckets the exact runs, of the others everything."""
        runs = self.exact if self.wire is not None else [[run] for run in self.slices]
        outs = [views(self.data, own) for own in runs]
        wire = FP32_WIRE if self.data.dtype == torch.float32 else BF16_WIRE
        handle = self._gather(outs, outs[self.rank], wire)

        def finish() -> None:
            handle.wait()
            self.compression.ledger.book("param_gather", exact=handle.bytes_sent)

        return finish

    def _start_coded(self, wire: Wire) -> Any:
        own = self._own(self.coded)
        delta = rooms([view.numel() for view in own], self.data.device)
        for room, new, seen in zip(delta, own, self.seen, strict=True):
            torch.sub(new.float(), seen.float(), out=room)
        if not self.apart:
            self.aside = torch.cat([self.data.new_empty(0), *own])
        left = iter(rooms([b - a for runs in self.coded for a, b in runs], self.data.device))
        changes = [[next(left) for _ in runs] for runs in self.coded]
        handle = self._gather(changes, delta, wire)

        @torch.no_grad()
        def finish() -> None:
            handle.wait()
            for rank, runs in enumerate(self.coded):
                held = self.seen if rank == self.rank else views(self.data, runs)
                for view, before, change in zip(views(self.data, runs), held, changes[rank], strict=True):
                    view.copy_(before.float() + change)
            self.seen = [view.clone() for view in self._own(self.coded)]
            self.compression.ledger.book("param_gather", coded=handle.bytes_sent, plain=self.decision.before)

        return finish

    @torch.no_grad()
    def after_load(self) -> None:
        """Each slice is taken from its owner, exactly; a collective call."""
        outs = [views(self.data, [run]) for run in self.slices]
        wire = FP32_WIRE if self.data.dtype == torch.float32 else BF16_WIRE
        self._gather(outs, outs[self.rank], wire).wait()
        self.seen = [view.clone() for view in self._own(self.coded)]
        self.aside, self._changed = None, False

    def _gather(self, outs: Sequence[Sequence[Tensor]], mine: Sequence[Tensor], wire: Wire) -> Handle:
        return all_gather_parts(outs, mine, wire, self._noise(), self.group, async_op=True, options=self._options)

    @property
    def slices(self) -> list[tuple[int, int]]:
        """Elements [start, stop) that each rank owns."""
        part = self.data.numel() // self.size
        return [(k * part, (k + 1) * part) for k in range(self.size)]

    def _cut(self, flat: Tensor) -> Sequence[Tensor]:
        return flat.split([view.numel() for view in self.seen])

    def _noise(self) -> Any:
        return self.compression.noise("param_gather", self.number)
