"""Activations that travel as codes inside a layer: sums under sequence parallelism, tokens to experts and back.

Noise is keyed by the linear or layer and, in forward passes, by the micro-batch that the noise clock shows, so that
recomputed layers send what they sent the first time.

    sequence parallelism    the reduce-scatter of a row-parallel output and of a column-parallel input gradient
    experts, forward        dispatch in the wire of ep_dispatch, combine in that of ep_combine
    experts, backward       the gradient of a combine goes there as in a dispatch, that of a dispatch comes back
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.transformer.moe import token_dispatcher
from torch import Tensor, nn

from fp4dist.comm.collectives import all_to_all, reduce_scatter
from fp4dist.comm.compression import Compression
from fp4dist.comm.policy import decide_message, span_of
from fp4dist.megatron.layers import TpComm
from fp4dist.nn.clock import Clock
from fp4dist.spec.wire import NVFP4_WIRE, Wire

_MICRO_BATCHES = 2**12  # of a step, in the number of a message: layer * that + micro-batch


@dataclass(slots=True)
class SequenceWire:
    """How one linear's reduce-scatter under sequence parallelism travels; see TpComm.wire.

    backward   it sums input gradients (column-parallel), not outputs: nothing replays it, its calls are counted
    """

    compression: Compression
    clock: MicroBatch
    wire: Wire
    number: int
    backward: bool
    _step: int = -1
    _calls: int = 0

    def reduce_scatter(self, t: Tensor, group: Any) -> Callable[[], Tensor]:
        """Start summing [S, ...] over the ranks of `group`; wait for this rank's [S / n, ...]."""
        out = t.new_empty((t.shape[0] // dist.get_world_size(group), *t.shape[1:]))
        noise = self.compression.noise("sp_reduce_scatter", self.number * _MICRO_BATCHES + self._message())
        whole = t.contiguous()
        handle = reduce_scatter(
            out.view(-1), whole.view(-1), self.wire, noise, group, op="sum", async_op=True,
            options=self.compression.options,
        )  # fmt: skip

        def wait() -> Tensor:
            handle.wait()
            plain = (whole.numel() - out.numel()) * whole.element_size()
            self.compression.ledger.book("sp_reduce_scatter", coded=handle.bytes_sent, plain=plain)
            return out

        return wait

    def _message(self) -> int:
        """Which of its messages in this step; equal on all ranks of the group."""
        if not self.backward:
            return self.clock.now()
        if self._step != self.compression.step:
            self._step, self._calls = self.compression.step, 0
        self._calls += 1
        return self._calls


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The number of the running micro-batch among those of one data-parallel rank, by the noise clock."""

    clock: Clock
    data_parallel: int

    def now(self) -> int:
        """From 0."""
        return self.clock.micro_batch // self.data_parallel


def code_sequence_sums(
    modules: Iterable[nn.Module],
    compression: Compression,
    clock: MicroBatch,
    numel: int,
    itemsize: int,
    micro_batches: int,
) -> None:
    """Let the linears of a model send their sums under sequence parallelism as `compression` says.

    modules   linears in a fixed order;  numel   of an output or input gradient of one micro-batch
    """
    linears = [m for m in modules if isinstance(getattr(m, "comm", None), TpComm) and _is_sequence_parallel(m)]
    if not linears:
        return
    group = cast(Any, linears[0]).comm.group
    size = dist.get_world_size(group)
    decision = decide_message(
        compression.config, "sp_reduce_scatter", f"{len(linears)} linears", numel=numel, itemsize=itemsize,
        messages=micro_batches * len(linears), topology=compression.topology,
        span=span_of(dist.get_process_group_ranks(group), compression.topology), share=(size - 1) / size,
    )  # fmt: skip
    compression.register(decision)
    if decision.wire is None:
        return
    for number, linear in enumerate(linears):
        cast(Any, linear).comm.wire = SequenceWire(
            compression, clock, decision.wire, number, backward=cast(Any, linear).comm.split == "O"
        )


def _is_sequence_parallel(linear: nn.Module) -> bool:
    layer = cast(Any, linear)
    return bool(layer.sequence_parallel) and not layer.explicit_expert_comm and layer.comm.size > 1


class CodedDispatch:
    """Tokens of mixtures of experts as codes, from construction to `close`.

    Megatron's dispatcher calls `all_to_all`, a name in its module; it is bound anew, and acts only inside the dispatch
    and the combine of the layers taken over here. Router probabilities travel as they are.

    dispatchers   MoEAlltoAllTokenDispatcher of each layer, in order
    """

    def __init__(
        self, dispatchers: Sequence[Any], compression: Compression, clock: MicroBatch, numel: int, itemsize: int,
        micro_batches: int,
    ) -> None:  # fmt: skip
        self._compression, self._clock = compression, clock
        self._active: tuple[Wire | None, Wire | None, str, str, int] | None = None
        self._plain = token_dispatcher.all_to_all
        self._dispatchers = list(dispatchers)
        if not self._dispatchers:
            return
        group = self._dispatchers[0].ep_group
        size = dist.get_world_size(group)
        wires: dict[str, Wire | None] = {}
        for direction in ("ep_dispatch", "ep_combine"):
            decision = decide_message(
                compression.config, direction, f"{len(self._dispatchers)} layers", numel=numel, itemsize=itemsize,
                messages=2 * micro_batches * len(self._dispatchers), topology=compression.topology,
                span=span_of(dist.get_process_group_ranks(group), compression.topology), share=(size - 1) / size,
            )  # fmt: skip
            compression.register(decision)
            wires[direction] = decision.wire
        token_dispatcher.all_to_all = self._all_to_all
        there, back = wires["ep_dispatch"], wires["ep_combine"]
        for number, dispatcher in enumerate(self._dispatchers):
            for name, ways in (
                ("token_dispatch", (there, _of_gradients(back), "ep_dispatch", "ep_combine", 2 * number)),
                ("token_combine", (back, _of_gradients(there), "ep_combine", "ep_dispatch", 2 * number + 1)),
            ):
                setattr(dispatcher, name, partial(self._within, ways, getattr(dispatcher, name)))

    def close(self) -> None:
        """Megatron's own again."""
        token_dispatcher.all_to_all = self._plain
        for dispatcher in self._dispatchers:
            for name in ("token_dispatch", "token_combine"):
                dispatcher.__dict__.pop(name, None)

    def _within(self, ways: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._acting(ways):
            return call(*args, **kwargs)

    @contextmanager
    def _acting(self, ways: Any) -> Any:
        before, self._active = self._active, ways
        try:
            yield
        finally:
            self._active = before

    def _all_to_all(
        self, group: Any, x: Tensor, output_splits: Any = None, input_splits: Any = None, **more: Any
    ) -> Tensor:
        """Megatron's all_to_all(group, input, output splits, input splits), rows of dimension 0.

        more   since 0.18 a choice of stream, which the coded exchange makes itself
        """
        if self._active is None or x.dim() < 2 or dist.get_world_size(group) == 1:
            return self._plain(group, x, output_splits, input_splits, **more)
        forward, backward, direction, reverse, number = self._active
        message = number * _MICRO_BATCHES + self._clock.now()
        there = _Way(self._compression, group, forward, direction, message)
        back = _Way(self._compression, group, backward, reverse, message)
        return cast(Tensor, _Exchange.apply(x, _listed(output_splits), _listed(input_splits), there, back))


@dataclass(frozen=True, slots=True)
class _Way:
    """One direction of an exchange."""

    compression: Compression
    group: Any
    wire: Wire | None
    direction: str
    number: int

    def run(self, x: Tensor, output_splits: list[int] | None, input_splits: list[int] | None) -> Tensor:
        x = x.contiguous()
        rows = sum(output_splits) if output_splits is not None else x.shape[0]
        out = x.new_empty((rows, *x.shape[1:]))
        if self.wire is None:
            dist.all_to_all_single(out, x, output_splits, input_splits, group=self.group)
            return out
        noise = self.compression.noise(self.direction, self.number)
        handle = all_to_all(
            out, x, self.wire, noise, self.group, output_splits=output_splits, input_splits=input_splits,
            options=self.compression.options,
        )  # fmt: skip
        handle.wait()
        rank, size = dist.get_rank(self.group), dist.get_world_size(self.group)
        own = input_splits[rank] if input_splits is not None else x.shape[0] // size
        plain = (x.shape[0] - own) * x[:1].numel() * x.element_size()
        self.compression.ledger.book(self.direction, coded=handle.bytes_sent, plain=plain)
        return out


class _Exchange(torch.autograd.Function):
    """Rows to other ranks; in backward their gradients come back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, output_splits: Any, input_splits: Any, there: _Way, back: _Way) -> Tensor:
        ctx.splits, ctx.back = (output_splits, input_splits), back
        return there.run(x, output_splits, input_splits)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        output_splits, input_splits = ctx.splits
        return ctx.back.run(gradient, input_splits, output_splits), None, None, None, None


def _of_gradients(wire: Wire | None) -> Wire | None:
    """For gradients, which must stay unbiased at 4 bits, where rounding to nearest serves activations."""
    return NVFP4_WIRE if wire is not None and wire.kind == "nvfp4" else wire


def _listed(splits: Any) -> list[int] | None:
    """Splits, which Megatron gives as a list, an array or a tensor."""
    return None if splits is None else [int(n) for n in splits]
