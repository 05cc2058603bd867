"""Counters that begin at 0, and single numbers that kernels write, handed out of blocks: one allocation, and one launch
that clears, serve some layers of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

WORDS = 8  # of a counter: what lies in one 32-byte sector of memory
_COUNTERS = 512  # of a block
_SPACING = 4  # words from one number to the next, so that all have the alignment that kernels are compiled for


class _Blocks:
    """Tensors of one kind, of which nobody is given one twice. make: a new block of them, on a device."""

    def __init__(self, make: Callable[[torch.device, int], Sequence[Tensor]]) -> None:
        self._make = make
        self.left: dict[tuple[torch.device, int], list[Tensor]] = {}  # by device and stream
        self.of_graph: list[list[Tensor]] = []  # what is left of the graph that is being recorded

    def take(self, device: torch.device) -> Tensor:
        """One for kernels of the current stream."""
        stream = torch._C._cuda_getCurrentRawStream(device.index or 0) if device.type == "cuda" else 0
        if stream and torch.cuda.is_current_stream_capturing():
            if not self.of_graph:  # somebody else's graph: a replay has to clear again what it counts in
                return self._make(device, 1)[0]
            left = self.of_graph[-1]
        else:
            left = self.left.get((device, stream))
            if left is None:
                left = self.left[device, stream] = []
        if not left:
            with torch.inference_mode(False):  # they outlive the pass, and backward may keep them
                left.extend(self._make(device, _COUNTERS))
        return left.pop()


def _zeros(device: torch.device, number: int) -> Sequence[Tensor]:
    return torch.zeros((number, WORDS), dtype=torch.int32, device=device).unbind()


def _single_zeros(device: torch.device, number: int) -> Sequence[Tensor]:
    return torch.zeros((number, WORDS), dtype=torch.int32, device=device)[:, 0].unbind()


def _unset(device: torch.device, number: int) -> Sequence[Tensor]:
    return torch.empty((number, _SPACING), dtype=torch.float32, device=device)[:, 0].unbind()


_counters, _numbers, _factors = _Blocks(_zeros), _Blocks(_single_zeros), _Blocks(_unset)


def zeroed(device: torch.device) -> Tensor:
    """[WORDS] int32 zeros for kernels of the current stream, aligned to 32 bytes; nobody else is given them."""
    return _counters.take(device)


def zero(device: torch.device) -> Tensor:
    """[] int32 0, likewise; the sector of memory around it is nobody else's."""
    return _numbers.take(device)


def unset(device: torch.device) -> Tensor:
    """[] fp32 for a kernel of the current stream to write, aligned to 16 bytes; nobody else is given it."""
    return _factors.take(device)


@contextmanager
def recorded() -> Iterator[None]:
    """Around the recording of one CUDA graph: blocks of its own, which each replay clears."""
    kinds = _counters, _numbers, _factors
    for blocks in kinds:
        blocks.of_graph.append([])
    try:
        yield
    finally:
        for blocks in kinds:
            blocks.of_graph.pop()
