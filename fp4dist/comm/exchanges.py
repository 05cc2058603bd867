"""The exchanges behind the collectives: which records go where, and what is done with those that come.

All of them cut every tensor at the same elements into pieces, whatever the wire, so that one exchange can begin with a
piece as soon as the one before it has written that piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from fp4dist.comm.codec import Noise
from fp4dist.comm.exchange import Members, Options, Traffic
from fp4dist.comm.parts import Parts, Runs, decode_parts, encode_parts, raise_if_wrong, recode_parts
from fp4dist.spec.wire import LONGEST, Wire

Op = Literal["mean", "sum"]
# torch 2.13 renames it; the old name warns there
_all_gather: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def _share(elements: int, piece: int, pieces: int) -> tuple[int, int]:
    """[first, last) of the elements of a piece, whole records of any wire; a chained exchange has the same pieces."""
    last = elements if piece == pieces - 1 else elements * (piece + 1) // pieces // LONGEST * LONGEST
    return elements * piece // pieces // LONGEST * LONGEST, last


class _Numbered:
    """Tensors of several ranks as one sequence of records: which records belong to which rank."""

    def __init__(self, by_rank: Sequence[Sequence[Tensor]], wire: Wire, chunk: int) -> None:
        self.parts = Parts.of([t for tensors in by_rank for t in tensors], wire, chunk)
        self.unit = 1 if wire.plain else chunk
        self.sizes = [[t.numel() for t in tensors] for tensors in by_rank]
        self.firsts: list[list[int]] = []
        first = 0
        for sizes in self.sizes:
            self.firsts.append([])
            for n in sizes:
                self.firsts[-1].append(first)
                first += -(-n // self.unit)

    def runs(self, places: Sequence[int], piece: int, pieces: int) -> Runs:
        """Of a piece, the records of the ranks at `places`."""
        found: list[tuple[int, int]] = []
        for i in places:
            for n, start_ in zip(self.sizes[i], self.firsts[i], strict=True):
                first, last = _share(n, piece, pieces)
                if first < last:
                    found.append((start_ + first // self.unit, start_ + -(-last // self.unit)))
        return tuple(found)

    def bytes(self, place: int, piece: int, pieces: int) -> int:
        """Of a piece, for one rank."""
        return sum(last - first for first, last in self.runs([place], piece, pieces)) * self.parts.unit


def _chunk(tensors: Sequence[Tensor], wire: Wire) -> int:
    return wire.chunk_of(max((t.numel() for t in tensors), default=0))


def _formula(tensors: Sequence[Tensor], wire: Wire, chunk: int) -> int:
    return sum(wire.bytes_of(t.numel(), chunk) for t in tensors)


def _pieces(tensors: Sequence[Tensor], options: Options, pieces: int | None) -> int:
    """`pieces` where an exchange before has them; none where no rank has an element: an empty message has no device."""
    if pieces is not None:
        return pieces
    elements = sum(t.numel() for t in tensors)
    return options.pieces_for(elements, tensors[0].device) if elements else 0


def _call(functions: Sequence[Callable[[], None]]) -> None:
    for function in functions:
        function()


class _Coded:
    """What the exchanges share: wire, noise, members, counted bytes."""

    def __init__(self, wire: Wire, noise: Noise, members: Members, options: Options, level: str) -> None:
        self.wire, self.noise, self.members, self.options, self.level = wire, noise, members, options, level
        self.sent = self.received = self.formula = 0
        self.pieces = 1
        self._copies: list[Tensor] = []

    @property
    def traffic(self) -> Traffic:
        """Bytes so far."""
        return Traffic(self.level, self.sent, self.received, self.formula)

    def copied(self) -> list[Tensor]:
        """What was sent in place of messages since the last call: to be held until it has left."""
        found, self._copies = self._copies, []
        return found

    def at_once(self, piece: int) -> Callable[[], None] | None:
        """See `Exchange`: nothing."""
        return None

    def place(self, what: str) -> str:
        """Text that begins an error's message."""
        return f"{what} ({self.level}) on rank {dist.get_rank()}, bucket {self.noise.bucket}"

    def write(
        self, parts: Parts, messages: Tensor, ranks: Sequence[int], runs: Runs, what: str, own: Parts | None = None,
        factor: float = 1.0, own_at: int | None = None,
    ) -> Callable[[], None] | None:  # fmt: skip
        """Decode into `parts`; see `decode_parts`."""
        check = self.options.checks(messages.device)
        place = self.place(what)
        bad = decode_parts(
            parts, messages, self.noise, ranks, own, factor, runs, check, place, self.options.sms, own_at
        )
        return None if bad is None else lambda: raise_if_wrong(bad, parts, messages, ranks, place, runs)

    def write_each(
        self, outs: _Numbered, places: Sequence[int], piece: int, received: Tensor, what: str
    ) -> Callable[[], None] | None:  # fmt: skip
        """Decode what came from each of `places`: at once, where neither signs nor errors tell them apart."""
        apart = self.wire.signs == "per_rank" or self.options.checks(received.device)
        checks: list[Callable[[], None]] = []
        at = 0
        for some in [(i,) for i in places] if apart else [tuple(places)]:
            size = sum(outs.bytes(i, piece, self.pieces) for i in some)
            if size:
                runs = outs.runs(some, piece, self.pieces)
                senders = [self.members.ranks[some[0]]]
                check = self.write(outs.parts, received[at : at + size][None], senders, runs, what)
                checks += [] if check is None else [check]
            at += size
        return (lambda: _call(checks)) if checks else None

    def swap(self, message: Tensor, out_sizes: list[int], in_sizes: list[int]) -> tuple[Tensor, Any]:
        """All-to-all of bytes, counted."""
        received = torch.empty(sum(out_sizes), dtype=torch.uint8, device=message.device)
        self.sent += message.numel()
        self.received += received.numel()
        work = dist.all_to_all_single(received, message, out_sizes, in_sizes, group=self.members.group, async_op=True)
        return received, work

    def gather(self, message: Tensor) -> tuple[Tensor, Any]:
        """All-gather of messages of equal sizes, counted."""
        size = self.members.size
        received = torch.empty(size * message.numel(), dtype=torch.uint8, device=message.device)
        self.sent += (size - 1) * message.numel()
        self.received += (size - 1) * message.numel()
        return received, _all_gather(received, message, group=self.members.group, async_op=True)


class Scatter(_Coded):
    """The exchange of a reduce-scatter."""

    def __init__(
        self, out: Sequence[Tensor], parts: Sequence[Sequence[Tensor]], wire: Wire, noise: Noise, members: Members,
        op: Op, options: Options, level: str, pieces: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(wire, noise, members, options, level)
        mine = parts[members.place]
        if len(parts) != members.size or [t.numel() for t in out] != [t.numel() for t in mine]:
            raise ValueError(
                f"reduce_scatter over {members.size} ranks: {len(parts)} lists of parts; this rank's have"
                f" {[t.numel() for t in mine]} elements, out has {[t.numel() for t in out]}"
            )
        every = [t for tensors in parts for t in tensors]
        chunk = _chunk(every, wire)
        self.source = _Numbered(parts, wire, chunk)
        self.out, self.own = _Numbered([out], wire, chunk), Parts.of(mine, wire, chunk)
        self.factor = 1.0 / members.size if op == "mean" else 1.0
        self.tensors = [*every, *out]
        self.device = every[0].device if every else torch.device("cpu")
        self.pieces = _pieces(every, options, pieces)
        self.coded = options.own == "coded" and not wire.plain
        self.then: Gather | None = None
        self.formula = sum(_formula(parts[i], wire, chunk) for i in members.others)

    def encode(self, piece: int) -> Tensor:
        """The records of all others."""
        runs = self.source.runs(self.members.others, piece, self.pieces)
        if not runs:
            return torch.empty(0, dtype=torch.uint8, device=self.device)
        return encode_parts(self.source.parts, self.noise, self.members.me, runs, sms=self.options.sms)

    def transfer(self, piece: int, message: Tensor) -> tuple[Tensor, Any]:
        """To each its own."""
        members, mine = self.members, self.source.bytes(self.members.place, piece, self.pieces)
        leaving = [0 if i == members.place else self.source.bytes(i, piece, self.pieces) for i in range(members.size)]
        if members.size == 2 and self.options.pairs == "all_gather" and sum(leaving) == mine:
            both, work = self.gather(message)
            return both[(1 - members.place) * mine :][:mine], work
        coming = [0 if i == members.place else mine for i in range(members.size)]
        return self.swap(message, coming, leaving)

    def decode(self, piece: int, received: Tensor) -> Callable[[], None] | None:
        """The sum of what came and of the own contribution."""
        members = self.members
        runs = self.out.runs([0], piece, self.pieces)
        if not runs:
            return None
        messages, senders = received.view(members.size - 1, -1) if members.size > 1 else received, members.others
        if self.coded:
            coded = encode_parts(
                self.source.parts, self.noise, members.me, self.source.runs([members.place], piece, self.pieces)
            )
            at = members.place
            messages = torch.cat((received[: at * coded.numel()], coded, received[at * coded.numel() :]))
            messages, senders = messages.view(members.size, -1), tuple(range(members.size))
        elif members.size == 1:
            return _alone(self.out.parts, self.own, self.factor, piece)
        ranks = [members.ranks[i] for i in senders]
        if self.then is not None:
            return self.recode(self.then, piece, messages, ranks, runs)
        own = None if self.coded else self.own
        return self.write(self.out.parts, messages, ranks, runs, "reduce-scatter", own, self.factor, members.place)

    @staticmethod
    def chains(wire: Wire, after: Wire, options: Options, device: torch.device, size: int) -> bool:
        """Whether a sum can become records of `after` in the kernel that makes it; set `then` to the gather."""
        coded = wire == after and not wire.plain and options.own == "exact"
        return coded and device.type == "cuda" and size > 1

    def recode(
        self, gather: Gather, piece: int, messages: Tensor, ranks: list[int], runs: Runs
    ) -> Callable[[], None] | None:  # fmt: skip
        """`decode` and the gather's `encode` in one kernel."""
        check, place = self.options.checks(messages.device), self.place("reduce-scatter")
        gather.made[piece], bad = recode_parts(
            self.out.parts, messages, self.noise, ranks, self.own, self.factor, runs, gather.noise, gather.members.me,
            check, self.options.sms,
        )  # fmt: skip
        parts = self.out.parts
        return None if bad is None else lambda: raise_if_wrong(bad, parts, messages, ranks, place, runs)


def _alone(out: Parts, own: Parts, factor: float, piece: int) -> None:
    """A group of one: the contribution itself, written with the first piece."""
    if piece == 0:
        for target, t in zip(out.tensors, own.tensors, strict=True):
            target.copy_(t.to(torch.float32) * factor)


class Gather(_Coded):
    """The exchange of an all-gather."""

    def __init__(
        self, outs: Sequence[Sequence[Tensor]], mine: Sequence[Tensor], wire: Wire, noise: Noise, members: Members,
        options: Options, level: str, pieces: int | None = None, chunk: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(wire, noise, members, options, level)
        if len(outs) != members.size or [t.numel() for t in mine] != [t.numel() for t in outs[members.place]]:
            raise ValueError(
                f"all_gather over {members.size} ranks: {len(outs)} lists of outputs; this rank's part has"
                f" {[t.numel() for t in mine]} elements, its place {[t.numel() for t in outs[members.place]]}"
            )
        every = [t for tensors in outs for t in tensors]
        chunk = chunk or _chunk(every, wire)
        self.mine, self.outs = _Numbered([mine], wire, chunk), _Numbered(outs, wire, chunk)
        self.tensors = [*every, *mine]
        self.device = every[0].device if every else torch.device("cpu")
        self.pieces = _pieces(every, options, pieces)
        self.formula = (members.size - 1) * _formula(mine, wire, chunk)
        self.made: dict[int, Tensor] = {}  # records of pieces that the exchange before has made already
        self.in_pairs = members.size == 2 and options.pairs == "all_to_all"
        self._own: dict[int, Tensor] = {}  # in pairs: this rank's records, which go to the other alone

    def encode(self, piece: int) -> Tensor:
        """This rank's records."""
        if piece in self.made:
            return self.made.pop(piece)
        runs = self.mine.runs([0], piece, self.pieces)
        return encode_parts(self.mine.parts, self.noise, self.members.me, runs, sms=self.options.sms)

    def transfer(self, piece: int, message: Tensor) -> tuple[Tensor, Any]:
        """To all."""
        members = self.members
        sizes = [self.outs.bytes(i, piece, self.pieces) for i in range(members.size)]
        if self.in_pairs:
            self._own[piece] = message
            coming = [0 if i == members.place else size for i, size in enumerate(sizes)]
            return self.swap(message, coming, [0 if i == members.place else message.numel() for i in range(2)])
        if len(set(sizes)) == 1:
            return self.gather(message)
        self.sent += (members.size - 1) * message.numel()
        self.received += sum(sizes) - message.numel()
        received = torch.empty(sum(sizes), dtype=torch.uint8, device=message.device)
        self._copies.append(message.repeat(members.size))
        leaving = [message.numel()] * members.size
        return received, dist.all_to_all_single(
            received, self._copies[-1], sizes, leaving, group=members.group, async_op=True
        )

    def at_once(self, piece: int) -> Callable[[], None] | None:
        """In pairs: this rank's own values."""
        if not self.in_pairs:
            return None
        return self.write_each(self.outs, [self.members.place], piece, self._own.pop(piece), "all-gather")

    def decode(self, piece: int, received: Tensor) -> Callable[[], None] | None:
        """All ranks' values, this one's too, as far as `at_once` has not written them."""
        places = self.members.others if self.in_pairs else range(self.members.size)
        return self.write_each(self.outs, places, piece, received, "all-gather")


class Swap(_Coded):
    """The exchange of an all-to-all."""

    def __init__(
        self, outs: list[Tensor], inputs: list[Tensor], wire: Wire, noise: Noise, members: Members, options: Options
    ) -> None:
        super().__init__(wire, noise, members, options, "flat")
        self.outs = _Numbered([[t] for t in outs], wire, wire.chunk)
        self.inputs = _Numbered([[t] for t in inputs], wire, wire.chunk)
        self.tensors = [*outs, *inputs]
        self.device = outs[0].device
        self.pieces = options.pieces or 1
        self.formula = sum(wire.bytes_of(inputs[i].numel(), wire.chunk) for i in members.others)

    def encode(self, piece: int) -> Tensor:
        """The records of all others."""
        runs = self.inputs.runs(self.members.others, piece, self.pieces)
        if not runs:
            return torch.empty(0, dtype=torch.uint8, device=self.device)
        return encode_parts(self.inputs.parts, self.noise, self.members.me, runs, sms=self.options.sms)

    def transfer(self, piece: int, message: Tensor) -> tuple[Tensor, Any]:
        """To each its own."""
        me = self.members.place
        places = range(self.members.size)
        leaving = [0 if i == me else self.inputs.bytes(i, piece, self.pieces) for i in places]
        coming = [0 if i == me else self.outs.bytes(i, piece, self.pieces) for i in places]
        return self.swap(message, coming, leaving)

    def decode(self, piece: int, received: Tensor) -> Callable[[], None] | None:
        """What came, and the own rows."""
        members = self.members
        if piece == 0:
            self.outs.parts.tensors[members.place].copy_(self.inputs.parts.tensors[members.place])
        return self.write_each(self.outs, members.others, piece, received, "all-to-all")


class Transfer(_Coded):
    """The exchange of a send or of its receive."""

    def __init__(
        self, x: Tensor, wire: Wire, noise: Noise, members: Members, other: int, sends: bool, options: Options
    ) -> None:
        super().__init__(wire, noise, members, options, "flat")
        if not 0 <= other < members.size or other == members.place:
            raise ValueError(f"place {other} of {members.size} ranks is not another rank than {members.place}")
        self.x = _Numbered([[x]], wire, wire.chunk_of(x.numel()))
        self.other, self.sends = members.ranks[other], sends
        self.tensors, self.device, self.pieces = [x], x.device, options.pieces or 1
        self.formula = wire.bytes_of(x.numel()) if sends else 0

    def encode(self, piece: int) -> Tensor:
        """The records of the piece; of a receiver room for them."""
        if self.sends:
            runs = self.x.runs([0], piece, self.pieces)
            return encode_parts(self.x.parts, self.noise, self.members.me, runs, sms=self.options.sms)
        return torch.empty(self.x.bytes(0, piece, self.pieces), dtype=torch.uint8, device=self.device)

    def transfer(self, piece: int, message: Tensor) -> tuple[Tensor, Any]:
        """From sender to receiver."""
        group = self.members.group
        if self.sends:
            self.sent += message.numel()
            return message, dist.isend(message, self.other, group=group)
        self.received += message.numel()
        return message, dist.irecv(message, self.other, group=group)

    def decode(self, piece: int, received: Tensor) -> Callable[[], None] | None:
        """What came; a sender has nothing to do."""
        if self.sends:
            return None
        runs = self.x.runs([0], piece, self.pieces)
        return self.write(self.x.parts, received[None], [self.other], runs, "receive")
