"""A time of the run in device memory: kernels read it there, so that a replayed CUDA graph draws new noise."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

_WORD = 0xFFFFFFFF


class Moment:
    """(micro-batch, step) on a device, and what kernels draw once for it.

    time   [2] int32, the counter words of `fp4dist.numerics.rng.run_words` in that order
    """

    __slots__ = ("_both", "_drawn", "time")

    def __init__(self, device: torch.device, step: int = 0, micro_batch: int = 0) -> None:
        self._both = torch.full((1,), _in_one(step, micro_batch), dtype=torch.int64, device=device)
        self.time = self._both.view(torch.int32)  # little-endian: the low word comes first
        self._drawn: dict[Hashable, tuple[Any, Callable[[], None]]] = {}

    def set(self, step: int, micro_batch: int) -> None:
        """Another time, in the same memory and on the current stream; what was drawn is drawn again."""
        self._both.fill_(_in_one(step, micro_batch))
        for _, draw in self._drawn.values():
            draw()

    def drawn(self, name: Hashable, new: Callable[[Moment], tuple[Any, Callable[[], None]]]) -> Any:
        """What belongs to this moment under `name`. new: gives it, and the function that has filled and refills it."""
        found = self._drawn.get(name)
        if found is None:
            found = self._drawn[name] = new(self)
        return found[0]


def _in_one(step: int, micro_batch: int) -> int:
    """The int64 whose 32-bit words are (micro_batch, step)."""
    whole = (step & _WORD) << 32 | micro_batch & _WORD
    return whole - (1 << 64) if whole >> 63 else whole
