"""Counters that begin at 0, handed out of blocks: one launch clears as many as some layers of a model need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

WORDS = 8  # of a counter: what lies in one 32-byte sector of memory
_COUNTERS = 512  # of a block
_left: dict[tuple[torch.device, int], list[Tensor]] = {}  # by device and stream
_of_graph: list[list[Tensor]] = []  # what is left of the graph that is being recorded


def zeroed(device: torch.device) -> Tensor:
    """[WORDS] int32 zeros for kernels of the current stream, aligned to 32 bytes; nobody else is given them."""
    stream = torch._C._cuda_getCurrentRawStream(device.index or 0) if device.type == "cuda" else 0
    if stream and torch.cuda.is_current_stream_capturing():
        if not _of_graph:  # somebody else's graph: a replay has to clear again what it counts in
            return torch.zeros(WORDS, dtype=torch.int32, device=device)
        left = _of_graph[-1]
    else:
        left = _left.setdefault((device, stream), [])
    if not left:
        left.extend(torch.zeros((_COUNTERS, WORDS), dtype=torch.int32, device=device).unbind())
    return left.pop()


@contextmanager
def recorded() -> Iterator[None]:
    """Around the recording of one CUDA graph: blocks of its own, which each replay clears."""
    _of_graph.append([])
    try:
        yield
    finally:
        _of_graph.pop()
