"""Reducing one flat bucket of gradients, some runs of which are coded and the others exact.

`Bucket` says which runs of elements go to which rank; `Reduction` sends them: coded runs as one message in the bucket's
wire, exact runs as one in fp32, sums in fp32 everywhere. Where the bucket has nothing coded (policy, guard) the caller
uses the engine's own collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fp4dist.comm.canary import compare
from fp4dist.comm.codec import Noise
from fp4dist.comm.collectives import Op, all_reduce, reduce_scatter_parts, slices_of
from fp4dist.comm.compression import Compression
from fp4dist.comm.exchange import Handle
from fp4dist.comm.hierarchy import INNER
from fp4dist.comm.levels import bytes_of_all_reduce, bytes_of_levels, reduce_scatter_levels
from fp4dist.comm.parts import Parts, decode_parts, encode_parts, rooms
from fp4dist.comm.policy import Decision, decide, levels, pairs_of, span_of, why_exact
from fp4dist.spec.communication import CommConfig
from fp4dist.spec.wire import FP32_WIRE, Wire

_BUCKETS = 2**16  # numbers of buckets come before those of further calls in one step
Run = tuple[int, int]  # elements [start, stop) of a flat bucket


class Waitable(Protocol):
    """A collective under way."""

    def wait(self) -> Any:
        """Block the current stream (on a CPU, the caller) until it is done."""
        ...


@dataclass(frozen=True, slots=True)
class Segment:
    """A parameter's gradient in a bucket, or the part of one: elements [start, stop); why it is exact, or None."""

    name: str
    start: int
    stop: int
    exact: str | None

    @classmethod
    def of(cls, name: str, shape: Sequence[int], start: int, stop: int) -> Segment:
        """The segment of parameter `name` of this `shape`."""
        return cls(name, start, stop, why_exact(name, shape))


@dataclass(frozen=True, slots=True)
class Bucket:
    """A flat bucket: rank k owns `owned[k]` of it; segments in order; elements in no segment are padding (exact).

    An all-reduce has one owner of everything.
    """

    name: str
    segments: tuple[Segment, ...]
    owned: tuple[tuple[Run, ...], ...]

    @property
    def numel(self) -> int:
        """Elements of all segments."""
        return sum(s.stop - s.start for s in self.segments)

    @property
    def coded_numel(self) -> int:
        """Elements that may be coded."""
        return sum(s.stop - s.start for s in self.segments if s.exact is None)

    def runs(self, *, coded: bool) -> list[list[Run]]:
        """The runs that are coded, or exact, of each owner, in order; neighbours are joined."""
        wanted = [(s.start, s.stop) for s in self.segments if (s.exact is None) == coded]
        return [joined(cut(wanted, own)) for own in self.owned]

    def why(self) -> str:
        """What stays exact, in words."""
        words: dict[str, int] = {}
        for s in self.segments:
            if s.exact is not None:
                words[s.exact] = words.get(s.exact, 0) + s.stop - s.start
        return ", ".join(f"{word} ({numel:,})" for word, numel in words.items())

    def decision(self, compression: Compression, group: Any, itemsize: int, *, halves: int = 1) -> Decision:
        """What the policy makes of it for this rank of `group`.

        itemsize   bytes in which the engine would send an element;  halves   2 for an all-reduce
        """
        span = span_of(dist.get_process_group_ranks(group or dist.group.WORLD), compression.topology)
        decision = decide(
            compression.config, "grad_reduce", self.name, numel=self.numel, coded=self.coded_numel, itemsize=itemsize,
            span=span, topology=compression.topology, why=self.why(), halves=halves,
        )  # fmt: skip
        if decision.wire is None:
            return decision
        wire, rank, size = decision.wire, dist.get_rank(group), span.size
        two = levels(compression.config, span, self.name)
        if two is not None:
            text = f"{two[0]} x {two[1]} ranks: {compression.config.inner.label()} inside; {decision.why}"
            decision = replace(decision, why=text.removesuffix("; "), levels=two)
        pairs, told = pairs_of(compression.config, span, two, compression.topology)
        decision = replace(decision, pairs=pairs, why="; ".join(filter(None, (told, decision.why))))
        if halves == 2:
            after = self._reduced(wire, rank, size, itemsize, two, compression.config)
        else:
            after = self._scattered(wire, rank, size, two, compression.config)
        return replace(decision, after=after)

    def _scattered(self, wire: Wire, rank: int, size: int, two: tuple[int, int] | None, config: CommConfig) -> int:
        """Bytes that `rank` sends in a reduce-scatter."""
        coded, exact = self.runs(coded=True), self.runs(coded=False)
        chunk = wire.chunk_of(max(stop - start for runs in coded for start, stop in runs))
        others = [k for k in range(size) if k != rank]
        if two is not None:
            found, wide = 0, config.exact_wire
            for runs, inner, outer in ((coded, config.inner, wire), (exact, wide, wide)):
                sizes = [[stop - start for start, stop in own] for own in runs]
                found += sum(bytes_of_levels(sizes, rank, two[0], inner, outer)) if any(sizes) else 0
            return found
        codes = sum(wire.bytes_of(stop - start, chunk) for k in others for start, stop in coded[k])
        return codes + sum(config.exact_wire.bytes_of(length(exact[k])) for k in others)

    def _reduced(
        self, wire: Wire, rank: int, size: int, itemsize: int, two: tuple[int, int] | None, config: CommConfig
    ) -> int:
        """Bytes that `rank` sends in an all-reduce; of its exact part what a ring sends."""
        n, rest = length(self.runs(coded=True)[0]), length(self.runs(coded=False)[0])
        slices = [t.numel() for t in slices_of(torch.empty(n, device="meta"), size)]
        ring = 2 * itemsize * rest * (size - 1) // size
        if two is not None:
            return ring + bytes_of_all_reduce(slices, rank, two[0], config.inner, wire)
        chunk = wire.chunk_of(max(slices))
        own = wire.bytes_of(slices[rank], chunk)
        others = sum(wire.bytes_of(slices[k], chunk) for k in range(size) if k != rank)
        return others + (size - 1) * own + ring


def cut(runs: Sequence[Run], into: Sequence[Run]) -> list[Run]:
    """The parts of `runs` that lie in `into`, in the order of `into`, then of `runs`."""
    both = [(max(a, c), min(b, d)) for c, d in into for a, b in runs]
    return [(a, b) for a, b in both if a < b]


def joined(runs: Sequence[Run]) -> list[Run]:
    """Neighbouring runs as one."""
    out: list[Run] = []
    for start, stop in runs:
        if out and out[-1][1] == start:
            out[-1] = (out[-1][0], stop)
        else:
            out.append((start, stop))
    return out


def length(runs: Sequence[Run]) -> int:
    """Elements of all runs."""
    return sum(stop - start for start, stop in runs)


def taken(flat: Tensor, runs: Sequence[Run]) -> Tensor:
    """The elements of `runs` one after the other: a view where they are one run."""
    if len(runs) == 1:
        return flat[runs[0][0] : runs[0][1]]
    return torch.cat([flat.new_empty(0), *(flat[start:stop] for start, stop in runs)])


def put(flat: Tensor, runs: Sequence[Run], values: Tensor) -> None:
    """The inverse of `taken`."""
    at = 0
    for start, stop in runs:
        flat[start:stop] = values[at : at + stop - start]
        at += stop - start


def views(flat: Tensor, runs: Sequence[Run]) -> list[Tensor]:
    """The runs of `flat`, where they lie."""
    return [flat[start:stop] for start, stop in runs]


def _side_by_side(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    """Flat tensors as one in fp32; of the device of `like` where there is none."""
    return torch.cat([torch.empty(0, device=like.device), *(t.reshape(-1).float() for t in tensors)])


class Reduction:
    """Reduces one Bucket over `group`, step by step.

    decision    from Bucket.decision, with a wire;  number   what Compression.register gave
    """

    def __init__(self, compression: Compression, bucket: Bucket, decision: Decision, number: int, group: Any) -> None:
        self.compression, self.bucket, self.decision, self.number, self.group = (
            compression, bucket, decision, number, group,
        )  # fmt: skip
        self._coded, self._exact = bucket.runs(coded=True), bucket.runs(coded=False)
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)
        self._options = replace(compression.options, pairs=decision.pairs)
        self._step, self._calls = -1, 0

    @property
    def wire(self) -> Wire | None:
        """The wire of this step; None: use the engine's own collective."""
        return self.compression.wire_of(self.decision)

    def reduce_scatter(self, flat: Tensor, *, mean: bool) -> Waitable:
        """Start the reduction of `flat` [n]; when waited for, this rank's runs of it hold the result, in place.

        What other ranks own of `flat` keeps what this rank had put in.
        """
        wire = self.wire
        assert wire is not None
        noise = self._noise()
        op: Op = "mean" if mean else "sum"
        parts = [views(flat, runs) for runs in self._coded]
        mine, watch = parts[self._rank], None
        if self.compression.watched(self.bucket.name):
            watch = self._exactly(parts, op, noise)
        if self.compression.feedback.on:
            parts = self._with_feedback(parts, wire, noise)
        handle = self._start(mine, parts, self.compression.config.inner, wire, noise, op)
        rest = None
        if any(self._exact):
            exact = [views(flat, runs) for runs in self._exact]
            wide = self.compression.config.exact_wire
            rest = self._start(exact[self._rank], exact, wide, wide, noise, op)

        def finish() -> None:
            handle.wait()
            inside = sum(level.sent for level in handle.traffic if level.level == INNER)
            self._book(coded=handle.bytes_sent - inside, exact=inside, plain=self.decision.before)
            if rest is not None:
                rest.wait()
                self._book(exact=rest.bytes_sent)
            if watch is not None:
                exactly, own = watch
                self._observe(_side_by_side(mine, flat), exactly, own, wire, mean=mean, cut=True)

        return _Finishing(finish)

    def all_reduce(self, flat: Tensor, *, mean: bool) -> Waitable:
        """Start the reduction of all of `flat` [n], in place."""
        wire = self.wire
        assert wire is not None
        noise = self._noise()
        op: Op = "mean" if mean else "sum"
        runs, what = self._coded[0], self.bucket.name
        coded = taken(flat, runs)
        watch = None
        if self.compression.watched(what):
            exact, own = coded.float().clone(), coded.float().clone()
            dist.all_reduce(exact, group=self.group)
            self._book(extra=2 * exact.nbytes * (self._size - 1) // self._size)
            watch = (exact / self._size if mean else exact, own)
        if self.compression.feedback.on:
            slices = [[t] for t in slices_of(coded, self._size)]
            coded = torch.cat([t for tensors in self._with_feedback(slices, wire, noise) for t in tensors])
        handle = self._start_all(coded, wire, noise, op)
        short = taken(flat, self._exact[0])
        rest = dist.all_reduce(short, group=self.group, async_op=True) if short.numel() else None

        def finish() -> None:
            handle.wait()
            inside = sum(level.sent for level in handle.traffic if level.level == INNER)
            self._book(coded=handle.bytes_sent - inside, exact=inside, plain=self.decision.before)
            if watch is not None:
                self._observe(coded, watch[0], watch[1], wire, mean=mean, cut=False)
            put(flat, runs, coded)
            if rest is not None:
                rest.wait()
                if mean:
                    short.div_(torch.tensor(float(self._size), device=short.device))
                put(flat, self._exact[0], short)
                self._book(exact=2 * short.nbytes * (self._size - 1) // self._size)

        return _Finishing(finish)

    def _start(
        self, out: Sequence[Tensor], parts: Sequence[Sequence[Tensor]], inner: Wire, wire: Wire, noise: Noise, op: Op
    ) -> Handle:
        """Start a reduce-scatter on one level or two, of which the inner one has a wire of its own."""
        how: dict[str, Any] = {"op": op, "async_op": True, "options": self._options}
        if self.decision.levels is None:
            return reduce_scatter_parts(out, parts, wire, noise, self.group, **how)
        tree = self.compression.tree(self.group)
        return reduce_scatter_levels(tree, out, parts, inner, wire, noise, **how)

    def _start_all(self, coded: Tensor, wire: Wire, noise: Noise, op: Op) -> Handle:
        """Start the coded all-reduce, on one level or two."""
        how: dict[str, Any] = {"op": op, "async_op": True, "options": self._options}
        if self.decision.levels is None:
            return all_reduce(coded, wire, noise, self.group, **how)
        return self.compression.tree(self.group).all_reduce(coded, self.compression.config.inner, wire, noise, **how)

    def _noise(self) -> Noise:
        """Of this call: engines that reduce after every micro-batch call several times in a step."""
        if self._step != self.compression.step:
            self._step, self._calls = self.compression.step, 0
        self._calls += 1
        return self.compression.noise("grad_reduce", self.number + _BUCKETS * (self._calls - 1))

    def _book(self, *, coded: int = 0, exact: int = 0, plain: int = 0, extra: int = 0) -> None:
        self.compression.ledger.book("grad_reduce", coded=coded, exact=exact, plain=plain, extra=extra)

    def _exactly(self, parts: Sequence[Sequence[Tensor]], op: Op, noise: Noise) -> tuple[Tensor, Tensor]:
        """(this rank's part of the exact reduction, what this rank has put in), fp32."""
        every = [tensor for tensors in parts for tensor in tensors]
        outs = rooms([tensor.numel() for tensor in parts[self._rank]], every[0].device)
        left = iter(rooms([tensor.numel() for tensor in every], every[0].device))
        whole = [[next(left).copy_(tensor) for tensor in tensors] for tensors in parts]
        handle = reduce_scatter_parts(outs, whole, FP32_WIRE, noise, self.group, op=op)
        self._book(extra=handle.bytes_sent)
        return _side_by_side(outs, every[0]), _side_by_side(every, every[0]).clone()

    def _observe(self, coded: Tensor, exact: Tensor, own: Tensor, wire: Wire, *, mean: bool, cut: bool) -> None:
        compression = self.compression
        compression.observe(
            compare(self.bucket.name, compression.step, coded, exact, own, wire, self.group, mean=mean, cut=cut)
        )

    def _with_feedback(self, parts: Sequence[Sequence[Tensor]], wire: Wire, noise: Noise) -> list[list[Tensor]]:
        """Each part that leaves this rank as z = g + e; what it loses is kept for the next step."""
        feedback, what = self.compression.feedback, self.bucket.name
        every = [tensor for tensors in parts for tensor in tensors]
        stays = [len(parts) > 1 and k == self._rank for k, tensors in enumerate(parts) for _ in tensors]
        sizes = [tensor.numel() for tensor in every]
        errors = feedback.error(what, sum(sizes), every[0].device).split(sizes)
        sent, seen = rooms(sizes, every[0].device), rooms(sizes, every[0].device)
        for z, t, e, own in zip(sent, every, errors, stays, strict=True):
            z.copy_(t if own else t + e)
        chunk = wire.chunk_of(max(sizes))
        message = encode_parts(Parts.of(sent, wire, chunk), noise, dist.get_rank())
        decode_parts(Parts.of(seen, wire, chunk), message[None], noise, [dist.get_rank()])
        lost = [torch.zeros_like(z) if own else z - q for z, q, own in zip(sent, seen, stays, strict=True)]
        feedback.keep(what, torch.cat(lost))
        left = iter(sent)
        return [[next(left) for _ in tensors] for tensors in parts]


class _Finishing:
    """Work whose end is a function; it is called once."""

    def __init__(self, finish: Any) -> None:
        self._finish = finish

    def wait(self) -> None:
        """Finish."""
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()
