"""The Gluon kernel of `kernels.triton.overlapped`, run by Python: copies and products as late as the kernel lets them.

Triton's interpreter has no Gluon. Here the kernel's own Python source runs with a small model of what it calls: a copy
arrives when its barrier is waited for, and its buffer holds NaN until then; a product is calculated when it is waited
for, from what its buffers hold at that time. An error is raised where a GPU would read what has not arrived, hang,
overwrite what is still read, or touch a sum that tensor cores still work on.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fp4dist.kernels.triton import overlapped

FUNCTIONS = ("place_of", "fetch", "scaled", "write", "overlapped_kernel")


class Pointer:
    """Elements of a dense tensor from an offset on."""

    def __init__(self, memory: Tensor, offset: Any = 0) -> None:
        self.memory, self.offset = memory.view(-1), offset
        self.dtype = types.SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.memory, self.offset + more)


class Buffer:
    """One buffer of a ring: its contents, products that read it, whether all warps know that those are through."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.data = torch.full(tuple(shape), float("nan"))
        self.readers, self.known = 0, True

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
    """An mbarrier: the parity of the phase that is not complete, bytes that are expected, copies on their way."""

    def __init__(self) -> None:
        self.parity, self.expected = 0, 0
        self.coming: list[tuple[Buffer, Tensor]] = []


class InFlight:
    """A sum that tensor cores work on."""

    def __init__(self, a: Buffer, b: Buffer, before: Tensor, kept: bool) -> None:
        self.a, self.b, self.before, self.kept = a, b, before, kept
        self.result: Tensor | None = None

    def finish(self) -> None:
        product = self.a.data @ self.b.data.t()
        self.result = self.before + product if self.kept else product
        for buffer in (self.a, self.b):
            buffer.readers, buffer.known = buffer.readers - 1, False


class Model:
    """One program of the grid."""

    def __init__(self, number: int, programs: int) -> None:
        self.number, self.programs, self.buffers = number, programs, []
        self.flying: list[InFlight] = []

    def names(self) -> dict[str, Any]:
        """What the kernel's globals are."""
        language = types.SimpleNamespace(
            program_id=lambda axis: self.number, num_programs=lambda axis: self.programs, cdiv=lambda a, b: -(-a // b),
            minimum=min, maximum=max, where=lambda c, a, b: a if c else b, static_range=range,
            expand_dims=lambda x, d: x.unsqueeze(d),
            arange=lambda start, end, layout: torch.arange(start, end), full=lambda shape, v, *_: torch.full(shape, v),
            zeros=lambda shape, *_: torch.zeros(shape), convert_layout=lambda x, layout: x, load=load, store=store,
            thread_barrier=self.thread_barrier, allocate_shared_memory=self.allocate, float32=torch.float32,
            bfloat16=torch.bfloat16, int64=torch.int64, SliceLayout=lambda *_: None, BlockedLayout=lambda *_: None,
            NVMMADistributedLayout=lambda **_: None,
        )  # fmt: skip
        return {
            "gl": language, "range": range, "warpgroup_mma": self.multiply, "warpgroup_mma_wait": self.wait_for,
            "mbarrier": types.SimpleNamespace(
                MBarrierLayout=lambda: "barriers", init=lambda bar, count: None, expect=expect, wait=wait
            ),
            "tma": types.SimpleNamespace(async_copy_global_to_shared=self.copy),
        }  # fmt: skip

    def allocate(self, dtype: Any, shape: Sequence[int], layout: Any) -> Ring:
        if layout == "barriers":
            return Ring([Barrier() for _ in range(shape[0])])
        found = [Buffer(shape[1:]) for _ in range(shape[0])]
        self.buffers += found
        return Ring(found)

    def thread_barrier(self) -> None:
        for buffer in self.buffers:
            buffer.known = True

    def copy(self, source: Any, at: list[int], barrier: Barrier, buffer: Buffer, pred: bool) -> None:
        if not pred:
            return
        assert buffer.readers == 0, "overwrites what a product still reads"
        assert buffer.known, "overwrites what another warp may still read"
        assert barrier.expected > 0, "nobody waits for the copy"
        rows, columns = buffer.data.shape
        block, (r, c) = torch.zeros(rows, columns), at
        found = source.values[r : r + rows, c : c + columns].float()
        block[: found.shape[0], : found.shape[1]] = found
        buffer.data = torch.full((rows, columns), float("nan"))
        barrier.coming.append((buffer, block))

    def multiply(self, a: Buffer, b: Turned, total: Any, *, use_acc: bool, is_async: bool) -> InFlight:
        assert is_async
        assert isinstance(total, Tensor), "adds to a sum that tensor cores still work on"
        for buffer in (a, b.of):
            assert not buffer.data.isnan().all(), "reads what has not arrived"
        a.readers, b.of.readers = a.readers + 1, b.of.readers + 1
        self.flying.append(InFlight(a, b.of, total, use_acc))
        return self.flying[-1]

    def wait_for(self, left: int, deps: list[Any]) -> Any:
        while len(self.flying) > left:
            self.flying.pop(0).finish()
        done = [dep.result if isinstance(dep, InFlight) and dep.result is not None else dep for dep in deps]
        return done[0] if len(done) == 1 else tuple(done)


def expect(barrier: Barrier, count: int, pred: bool) -> None:
    """See `mbarrier.expect`."""
    barrier.expected += count if pred else 0


def wait(barrier: Barrier, phase: int) -> None:
    """See `mbarrier.wait`: what is on its way arrives now."""
    if barrier.parity != phase:
        return
    assert barrier.coming, "waits for ever"
    assert sum(2 * block.numel() for _, block in barrier.coming) == barrier.expected, "waits for other bytes"
    for buffer, block in barrier.coming:
        buffer.data = block
    barrier.parity, barrier.expected, barrier.coming = 1 - barrier.parity, 0, []


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
    kinds: tuple[int, int], programs: int, add: bool,
) -> None:  # fmt: skip
    """`overlapped_kernel` on bf16 [M, K] and [N, K]. kinds: ROWS_A and ROWS_B, both with scales."""
    for number in range(programs):
        names: dict[str, Any] = Model(number, programs).names()
        for name in FUNCTIONS:
            source: Callable[..., Any] = getattr(overlapped, name).fn
            names[name] = types.FunctionType(source.__code__, names, name, source.__defaults__)
        sides = (types.SimpleNamespace(values=x, dtype=x.dtype, layout="blocks") for x in (a, b))
        names["overlapped_kernel"](
            *sides, Pointer(out), *map(Pointer, scales), 1.0, *map(Pointer, ratios), *(r.shape[-1] for r in ratios),
            *out.shape, a.shape[1], True, True, *kinds, add, overlapped.GROUP,
        )  # fmt: skip
