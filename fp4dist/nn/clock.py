"""Where the run is: the one mutable object behind all quantization noise."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar
from weakref import WeakSet, ref

from fp4dist.numerics.moment import Moment
from fp4dist.numerics.tensor import Key, Stream
from fp4dist.spec.recipe import SLOTS

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(slots=True, eq=False, weakref_slot=True)
class Clock:
    """Step and micro-batch, set by the training loop and read by every linear of a model.

    seed            the run's seed, half of the Philox key
    step            optimizer step
    micro_batch     global micro-batch index: i * data_parallel_size + data_parallel_rank
    cache_weights   the loop promises that weights change only between steps, so quantized weights may be kept for one;
                    not where weights are gathered for a layer at a time (ZeRO 3, FSDP): all their codes would stay
    moment          step and micro-batch in device memory, which the noise reads in place of the numbers: set while a
                    CUDA graph is captured, whose replays would repeat the noise of numbers
    """

    seed: int = 0
    step: int = 0
    micro_batch: int = 0
    cache_weights: bool = False
    moment: Moment | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Clock:
        """Also of a copy, which never sees __init__: `replayable` has to know every clock."""
        clock = object.__new__(cls)
        _LIVE.add(clock)
        return clock

    def key(self, layer: int, slot: str) -> Key:
        """The key of one whole operand of linear number `layer`; `comm.place` makes it a shard's."""
        return Key(self.seed, layer, self.step, self.micro_batch, _NUMBER[slot], moment=self.moment)

    def whole_key(self, layer: int, slot: str, rows: int, columns: int) -> Key:
        """The same of an operand [rows, columns] that no rank shares: what `comm.place` makes of it there."""
        return Key(
            self.seed, layer, self.step, self.micro_batch, _NUMBER[slot], _ROUNDING, _WHOLE, _WHOLE, rows, columns,
            self.moment,
        )  # fmt: skip

    def at(self, step: int, micro_batch: int) -> AbstractContextManager[None]:
        """Another time inside the block; the time from before it afterwards, also after an exception."""
        return _At(self, step, micro_batch)


class _At:
    """See `Clock.at`: every backward pass of a linear enters one, so it is no generator."""

    __slots__ = ("_before", "_clock", "_time")

    def __init__(self, clock: Clock, step: int, micro_batch: int) -> None:
        self._clock, self._time = clock, (step, micro_batch)

    def __enter__(self) -> None:
        clock = self._clock
        self._before = clock.step, clock.micro_batch, clock.moment
        if self._time != self._before[:2]:  # the moment is that of the time before
            (clock.step, clock.micro_batch), clock.moment = self._time, None

    def __exit__(self, *_: object) -> None:
        self._clock.step, self._clock.micro_batch, self._clock.moment = self._before


_ROUNDING, _WHOLE = Stream.ROUNDING, (0,)
_NUMBER = {slot: i for i, slot in enumerate(SLOTS)}
_LIVE: WeakSet[Clock] = WeakSet()


def replayable(fn: Callable[P, R]) -> Callable[P, R]:
    """`fn`, which runs at the present time of every clock whenever it is called: for activation recomputation.

    A recomputed forward pass must draw the noise of its first run. Wrap the function where it is given to the
    checkpoint, as `fp4dist.megatron.recompute` does for Megatron, whose pipeline schedules run other micro-batches in
    between. Where forward and backward of one micro-batch follow each other, as in a plain loop with
    torch.utils.checkpoint or Hugging Face's gradient_checkpointing_enable, the clock still shows the right time and
    nothing needs to be wrapped.
    """
    times = [(ref(clock), clock.step, clock.micro_batch) for clock in _LIVE]

    @wraps(fn)
    def replay(*args: P.args, **kwargs: P.kwargs) -> R:
        with ExitStack() as stack:
            for reference, step, micro_batch in times:
                clock = reference()
                if clock is not None:
                    stack.enter_context(clock.at(step, micro_batch))
            return fn(*args, **kwargs)

    return replay
