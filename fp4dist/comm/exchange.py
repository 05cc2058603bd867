"""Running a coded collective: encode, transfer and decode of several pieces, one after the other or overlapped.

On a GPU a call enqueues everything and returns: encoding on one stream, transfers on the process group's own, decoding
on another, so that piece p + 1 is encoded while piece p travels. A transfer needs multiprocessors, too: unless NCCL's
streams have priority (TORCH_NCCL_HIGH_PRIORITY=1) it waits until kernels that came before it have let go of some.
`Handle.wait` lets the caller's current stream wait. On a CPU the transfers are under way when the call returns, and
`wait` decodes; handles must then be waited for in the order of their calls, on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fp4dist.spec.communication import Pairs

Group = dist.ProcessGroup | None
_A_PIECE = 1 << 26  # elements that are worth a piece of their own on a GPU
_MOST_PIECES = 4


@dataclass(frozen=True, slots=True)
class Options:
    """How a collective runs; none of it changes what arrives, but `own`.

    pieces   parts that are pipelined; None: one for each 2^26 elements on a GPU, at most 4, and one on a CPU
    sms      multiprocessors that encoding and decoding may fill; None: all
    check    verify headers and tags of what arrives. None: on a CPU always, on a GPU never; True: on a GPU too, where
             `wait` then waits for the device
    pairs    how two ranks exchange equal messages: by an all-to-all (fastest over NVLink), or by an all-gather (over
             sockets, where NCCL uses more connections for it)
    urgent   whether encoding and decoding come before kernels that wait on other streams, such as a GEMM's next wave
    own      a rank's own contribution to a reduction is added as it is, or goes through the codec as the others do
    """

    pieces: int | None = None
    sms: int | None = None
    check: bool | None = None
    pairs: Pairs = "all_to_all"
    urgent: bool = False
    own: Literal["exact", "coded"] = "exact"

    def pieces_for(self, elements: int, device: torch.device) -> int:
        """Pieces for a message of so many elements."""
        if self.pieces is not None:
            return self.pieces
        return max(1, min(_MOST_PIECES, elements // _A_PIECE)) if device.type == "cuda" else 1

    def checks(self, device: torch.device) -> bool:
        """Whether tags are verified."""
        return device.type != "cuda" if self.check is None else self.check


class Traffic(NamedTuple):
    """Bytes of one collective through one level of links, as counted from the buffers that were handed over.

    level     whose links: the name that the caller gave the group
    sent, received   by this rank;  formula   what `Wire.bytes_of` says `sent` must be
    """

    level: str
    sent: int
    received: int
    formula: int


class Members(NamedTuple):
    """The ranks of a group: this one's place, their number, all their numbers in the job."""

    group: Group
    place: int
    size: int
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, group: Group) -> Members:
        """Those of `group`; None: of the job."""
        ranks = tuple(dist.get_process_group_ranks(group if group is not None else dist.group.WORLD))
        return cls(group, dist.get_rank(group), len(ranks), ranks)

    @property
    def me(self) -> int:
        """This rank's number in the job."""
        return self.ranks[self.place]

    @property
    def others(self) -> tuple[int, ...]:
        """Places of the others."""
        return tuple(i for i in range(self.size) if i != self.place)


class Exchange(Protocol):
    """One coded transfer in pieces."""

    pieces: int
    options: Options

    def encode(self, piece: int) -> Tensor:
        """The bytes of a piece that leave this rank."""
        ...

    def transfer(self, piece: int, message: Tensor) -> tuple[Tensor, Any]:
        """(where the bytes arrive, the transfer under way)."""
        ...

    def at_once(self, piece: int) -> Callable[[], None] | None:
        """Write what need not arrive, once the message is encoded; returns as `decode` does."""
        ...

    def decode(self, piece: int, received: Tensor) -> Callable[[], None] | None:
        """Write what arrived; what has to be called once the device is done, if anything."""
        ...

    @property
    def traffic(self) -> Traffic:
        """Bytes of all pieces."""
        ...

    @property
    def tensors(self) -> Sequence[Tensor]:
        """What is read and written."""
        ...

    def copied(self) -> Sequence[Tensor]:
        """What `transfer` has sent in place of the message since the last call."""
        ...


class Handle:
    """A collective under way. `wait` must be called once; what was read and written must be left alone until then."""

    def __init__(self, out: Any, exchanges: Sequence[Exchange], finish: Callable[[], None]) -> None:
        self._out, self._exchanges, self._finish = out, exchanges, finish
        self._done = False

    def wait(self) -> Any:
        """Let the current stream (on a CPU: the caller) wait for the result, and return it."""
        if not self._done:
            self._finish()
            self._done = True
        return self._out

    @property
    def traffic(self) -> tuple[Traffic, ...]:
        """One entry for each transfer."""
        return tuple(exchange.traffic for exchange in self._exchanges)

    @property
    def bytes_sent(self) -> int:
        """By this rank, over all levels."""
        return sum(t.sent for t in self.traffic)

    @property
    def bytes_received(self) -> int:
        """By this rank, over all levels."""
        return sum(t.received for t in self.traffic)

    @property
    def bytes_formula(self) -> int:
        """What `bytes_sent` has to be."""
        return sum(t.formula for t in self.traffic)


def start(out: Any, exchanges: Sequence[Exchange], device: torch.device, async_op: bool) -> Handle:
    """Run exchanges, each of which reads what the one before has written, piece by piece; all have as many pieces."""
    run = _on_gpu if device.type == "cuda" else _on_cpu
    handle = Handle(out, exchanges, run(exchanges, device))
    if not async_op:
        handle.wait()
    return handle


def _on_cpu(exchanges: Sequence[Exchange], device: torch.device) -> Callable[[], None]:
    """Transfers of the first exchange are begun; the returned function does the rest."""
    under_way = _begun(exchanges[0]) if exchanges else []

    def finish() -> None:
        found = under_way
        for i, exchange in enumerate(exchanges):
            if i > 0:
                found = _begun(exchange)
            for piece, (received, work) in enumerate(found):
                exchange.at_once(piece)
                work.wait()
                exchange.copied()
                exchange.decode(piece, received)

    return finish


def _begun(exchange: Exchange) -> list[tuple[Tensor, Any]]:
    return [exchange.transfer(piece, exchange.encode(piece)) for piece in range(exchange.pieces)]


def _on_gpu(exchanges: Sequence[Exchange], device: torch.device) -> Callable[[], None]:
    """Everything is enqueued; the returned function lets the current stream wait."""
    urgent = exchanges[0].options.urgent
    decoding, *sending = streams = [_stream(device, role, urgent) for role in range(len(exchanges) + 1)]
    begun = torch.cuda.current_stream(device).record_event()
    for stream in streams:
        stream.wait_event(begun)
    memory = {t.untyped_storage().data_ptr(): t for exchange in exchanges for t in exchange.tensors}
    for t, stream in product(memory.values(), streams):
        t.record_stream(stream)
    checks: list[Callable[[], None]] = []
    written: dict[tuple[int, int], Any] = {}  # events, by exchange and piece
    for i, piece in _order(exchanges):
        exchange = exchanges[i]
        with torch.cuda.stream(sending[i]):
            if i > 0:
                sending[i].wait_event(written[i - 1, piece])
            message = exchange.encode(piece)
            encoded = sending[i].record_event()
            received, work = exchange.transfer(piece, message)
        with torch.cuda.stream(decoding):
            decoding.wait_event(encoded)
            found = [exchange.at_once(piece)]
            work.wait()
            found.append(exchange.decode(piece, received))
            written[i, piece] = decoding.record_event()
        for t in (message, received, *exchange.copied()):  # made on either stream; NCCL lets go of them at `work.wait`
            t.record_stream(sending[i])
            t.record_stream(decoding)
        checks += [check for check in found if check is not None]
    done = decoding.record_event()

    def finish() -> None:
        torch.cuda.current_stream(device).wait_event(done)
        for check in checks:
            check()

    return finish


def _order(exchanges: Sequence[Exchange]) -> Iterator[tuple[int, int]]:
    """(exchange, piece): a piece's next exchange comes a turn later, so that transfers need not wait for its coding."""
    pieces = exchanges[0].pieces if exchanges else 0
    for turn in range(pieces + len(exchanges) - 1):
        for i in range(len(exchanges)):
            if 0 <= turn - i < pieces:
                yield i, turn - i


@lru_cache(maxsize=32)
def _stream(device: torch.device, role: int, urgent: bool) -> torch.cuda.Stream:
    """For decoding (role 0), or for encoding and sending in the role-th exchange, each of which has its own: what waits
    for a sum must not hold up the next piece of the exchange before it.
    """
    with torch.cuda.device(device) if device.index is not None else nullcontext():
        return torch.cuda.Stream(device, priority=-urgent)
