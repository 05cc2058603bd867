"""The Gluon kernel of `kernels.triton.overlapped`, run by Python: copies and products as late as the kernel lets them.

Triton's interpreter has no Gluon. Here the kernel's own Python source runs with a small model of what it calls: each
partition of warps is a thread that runs until it has to wait for a barrier; a copy arrives when its barrier is waited
for, and its buffer holds NaN until then; a product is calculated when it is waited for, from what its buffers hold at
that time. An error is raised where a GPU would read what has not arrived, hang, overwrite what is still read, or touch
a sum that tensor cores still work on.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fp4dist.kernels.triton import overlapped

FUNCTIONS = ("place_of", "copy_all", "multiply_all", "overlapped_kernel")


class Pointer:
    """Elements of a dense tensor from an offset on."""

    def __init__(self, memory: Tensor, offset: Any = 0) -> None:
        self.memory, self.offset = memory.view(-1), offset
        self.dtype = types.SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.memory, self.offset + more)


class Buffer:
    """One buffer of a ring: its contents, products that read it, partitions some of whose warps may still read it."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.data = torch.full(tuple(shape), float("nan"))
        self.readers = 0
        self.unsure: set[int] = set()
        self.fresh, self.leaving = False, False

    def store(self, value: Tensor) -> None:
        """Rows that are to leave."""
        assert not self.leaving, "overwrites rows that have not left"
        self.data, self.fresh = value, True

    def permute(self, order: tuple[int, int]) -> Turned:
        assert order == (1, 0)
        return Turned(self)


class Turned:
    def __init__(self, of: Buffer) -> None:
        self.of = of


class Ring:
    def __init__(self, parts: list[Any]) -> None:
        self._parts = parts

    def index(self, i: int) -> Any:
        return self._parts[i]


class Barrier:
    """An mbarrier: the parity of the phase that is not complete, what it waits for, copies on their way."""

    def __init__(self) -> None:
        self.parity, self.count, self.arrived, self.expected = 0, 0, 0, 0
        self.coming: list[tuple[Buffer, Tensor]] = []

    def advance(self) -> None:
        """Go on to the next phase, if everything has arrived but the copies on their way, which do now."""
        come = sum(2 * block.numel() for _, block in self.coming)
        assert come <= self.expected, "more bytes than are expected"
        if self.arrived < self.count or come < self.expected:
            return
        assert self.arrived == self.count, "more arrivals than are waited for"
        for buffer, block in self.coming:
            buffer.data = block
        self.parity, self.arrived, self.expected, self.coming = 1 - self.parity, 0, 0, []


class InFlight:
    """A sum that tensor cores work on."""

    def __init__(self, a: Buffer, b: Buffer, before: Tensor | InFlight, partition: int) -> None:
        self.a, self.b, self.before, self.partition = a, b, before, partition
        self.result: Tensor | None = None

    def finish(self) -> None:
        before = self.before.result if isinstance(self.before, InFlight) else self.before
        assert before is not None
        self.result = before + self.a.data @ self.b.data.t()
        for buffer in (self.a, self.b):
            buffer.readers -= 1
            buffer.unsure.add(self.partition)


class Turns:
    """Threads of which one runs at a time: the next one when it waits, or has arrived somewhere."""

    def __init__(self, number: int) -> None:
        self._change, self._now, self._idle = threading.Condition(), 0, 0
        self._left = list(range(number))
        self.failed: BaseException | None = None

    def begin(self, me: int) -> None:
        with self._change:
            self._change.wait_for(lambda: self._now == me)

    def give_up(self, me: int, waits: bool = True) -> None:
        """Let the others run first. waits: for something that one of them has to do."""
        self._idle = self._idle + 1 if waits else 0
        if self.failed is None and self._idle > 2 * len(self._left):
            raise AssertionError("waits for ever")
        with self._change:
            self._now = self._left[(self._left.index(me) + 1) % len(self._left)]
            self._change.notify_all()
            self._change.wait_for(lambda: self._now == me)
        if self.failed is not None:
            raise SystemExit

    def end(self, me: int) -> None:
        with self._change:
            following = self._left[(self._left.index(me) + 1) % len(self._left)]
            self._left.remove(me)
            self._now, self._idle = following, 0
            self._change.notify_all()


class Model:
    """One program of the grid."""

    def __init__(self, number: int, programs: int) -> None:
        self.number, self.programs, self.buffers = number, programs, []
        self.flying: dict[int, list[InFlight]] = {}
        self.leaving: dict[int, list[tuple[Buffer, Any, list[int]]]] = {}
        self.left: list[tuple[int, Buffer]] = []
        self.place = threading.local()
        self.turns: Turns | None = None

    @property
    def partition(self) -> int:
        return getattr(self.place, "partition", 0)

    def names(self) -> dict[str, Any]:
        """What the kernel's globals are."""
        language = types.SimpleNamespace(
            program_id=lambda axis: self.number, num_programs=lambda axis: self.programs, cdiv=lambda a, b: -(-a // b),
            minimum=min, static_range=range, expand_dims=lambda x, d: x.unsqueeze(d),
            arange=lambda start, end, layout: torch.arange(start, end), zeros=lambda shape, *_: torch.zeros(shape),
            load=load, store=store, thread_barrier=self.thread_barrier, allocate_shared_memory=self.allocate,
            warp_specialize=self.warp_specialize, float32=torch.float32, int64=torch.int64,
            bfloat16=torch.bfloat16,
            SliceLayout=lambda *_: None, NVMMADistributedLayout=lambda **_: None,
        )  # fmt: skip
        return {
            "gl": language, "range": range, "warpgroup_mma": self.multiply, "warpgroup_mma_wait": self.wait_for,
            "fence_async_shared": lambda: None,
            "mbarrier": types.SimpleNamespace(
                MBarrierLayout=lambda: "barriers", init=init, expect=self.expect, arrive=self.arrive, wait=self.wait
            ),
            "tma": types.SimpleNamespace(
                async_copy_global_to_shared=self.copy, async_copy_shared_to_global=self.leave,
                store_wait=self.wait_for_leaving,
            ),
        }  # fmt: skip

    def warp_specialize(self, parts: Sequence[tuple[Any, tuple[Any, ...]]], warps: Any, registers: Any) -> None:
        assert len(warps) == len(registers) == len(parts) - 1
        turns = self.turns = Turns(len(parts))

        def run(number: int) -> None:
            self.place.partition = number
            turns.begin(number)
            try:
                function, arguments = parts[number]
                function(*arguments)
                assert not self.flying.get(number), "products that nobody waits for"
                assert not self.leaving.get(number), "rows that nobody waits for"
            except BaseException as error:
                turns.failed = turns.failed or error
            turns.end(number)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(len(parts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if turns.failed is not None:
            raise turns.failed

    def allocate(self, dtype: Any, shape: Sequence[int], layout: Any) -> Ring:
        if layout == "barriers":
            return Ring([Barrier() for _ in range(shape[0])])
        found = [Buffer(shape[1:]) for _ in range(shape[0])]
        self.buffers += found
        return Ring(found)

    def thread_barrier(self) -> None:
        """All warps of this partition are here."""
        for buffer in self.buffers:
            buffer.unsure.discard(self.partition)
            buffer.fresh = False
        for _, buffer in [gone for gone in self.left if gone[0] == self.partition]:
            buffer.leaving = False
        self.left = [gone for gone in self.left if gone[0] != self.partition]

    def copy(self, source: Any, at: list[int], barrier: Barrier, buffer: Buffer) -> None:
        assert buffer.readers == 0, "overwrites what a product still reads"
        assert not buffer.unsure, "overwrites what another warp may still read"
        assert barrier.expected > 0, "nobody waits for the copy"
        rows, columns = buffer.data.shape
        block, (r, c) = torch.zeros(rows, columns), at
        found = source.values[r : r + rows, c : c + columns].float()
        block[: found.shape[0], : found.shape[1]] = found
        buffer.data = torch.full((rows, columns), float("nan"))
        barrier.coming.append((buffer, block))

    def leave(self, target: Any, at: list[int], buffer: Buffer) -> None:
        """See `tma.async_copy_shared_to_global`."""
        assert not buffer.fresh, "other warps may not have stored their rows"
        buffer.leaving = True
        self.leaving.setdefault(self.partition, []).append((buffer, target, at))

    def wait_for_leaving(self, pending: int) -> None:
        """See `tma.store_wait`: rows leave now, which the other warps do not know."""
        assert pending == 0
        for buffer, target, (r, c) in self.leaving.pop(self.partition, []):
            into = target.values[r : r + buffer.data.shape[0], c : c + buffer.data.shape[1]]
            into.copy_(buffer.data[: into.shape[0], : into.shape[1]])
            self.left.append((self.partition, buffer))

    def multiply(self, a: Buffer, b: Turned, total: Any, *, is_async: bool) -> InFlight:
        assert is_async
        flying = self.flying.setdefault(self.partition, [])
        if isinstance(total, InFlight):
            assert flying, "adds to a sum that nobody gave back"
            assert total is flying[-1], "adds to a sum that tensor cores still work on"
        for buffer in (a, b.of):
            assert not buffer.data.isnan().all(), "reads what has not arrived"
            buffer.readers += 1
        flying.append(InFlight(a, b.of, total, self.partition))
        return flying[-1]

    def wait_for(self, left: int, deps: list[Any]) -> Any:
        flying = self.flying[self.partition]
        while len(flying) > left:
            flying.pop(0).finish()
        (dep,) = deps
        return dep if dep.result is None else dep.result

    def expect(self, barrier: Barrier, count: int) -> None:
        """See `mbarrier.expect`, which also arrives."""
        barrier.expected += count
        barrier.arrived += 1

    def arrive(self, barrier: Barrier, count: int) -> None:
        """See `mbarrier.arrive`: others see it at once."""
        barrier.arrived += count
        barrier.advance()
        if self.turns is not None:
            self.turns.give_up(self.partition, waits=False)

    def wait(self, barrier: Barrier, phase: int) -> None:
        """See `mbarrier.wait`: what is on its way arrives now."""
        while barrier.parity == phase:
            if barrier.arrived == barrier.count:
                barrier.advance()
            if barrier.parity == phase:
                assert self.turns is not None, "waits for ever"
                self.turns.give_up(self.partition)


def init(barrier: Barrier, count: int) -> None:
    """See `mbarrier.init`."""
    barrier.count = count


def load(at: Pointer, mask: Any = None, other: float = 0.0) -> Any:
    """See `gl.load`."""
    if not isinstance(at.offset, Tensor):
        return float(at.memory[at.offset])
    inside = torch.ones_like(at.offset, dtype=torch.bool) if mask is None else mask
    found = at.memory[torch.where(inside, at.offset, 0)]
    return torch.where(inside, found, torch.tensor(other, dtype=found.dtype))


def store(at: Pointer, value: Tensor, mask: Tensor) -> None:
    """See `gl.store`."""
    at.memory[at.offset[mask]] = value[mask].to(at.memory.dtype)


def run(
    a: Tensor, b: Tensor, out: Tensor, scales: tuple[Tensor, Tensor], ratios: tuple[Tensor, Tensor],
    kinds: tuple[int, int], programs: int, add: bool, turns: int,
) -> None:  # fmt: skip
    """`overlapped_kernel` on bf16 [M, K] and [N, K]. kinds: ROWS_A and ROWS_B, both with scales; turns: TURNS."""
    for number in range(programs):
        names: dict[str, Any] = Model(number, programs).names()
        for name in FUNCTIONS:
            source: Callable[..., Any] = getattr(overlapped, name).fn
            names[name] = types.FunctionType(source.__code__, names, name, source.__defaults__)
        sides = (types.SimpleNamespace(values=x, dtype=x.dtype, layout="blocks") for x in (a, b, out))
        staged = out.dtype == torch.bfloat16
        names["overlapped_kernel"](
            *sides, Pointer(out), *map(Pointer, scales), 1.0, *map(Pointer, ratios), *(r.shape[-1] for r in ratios),
            *out.shape, a.shape[1], True, True, *kinds, add, overlapped.GROUP,
            overlapped.STAGES - staged, turns, staged,
        )  # fmt: skip
