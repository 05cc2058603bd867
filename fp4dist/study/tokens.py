"""The samples of a study: token files as one stream, cut into sequences, in an order drawn from a seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fp4dist.errors import DataError
from fp4dist.train.token_files import read_index


class Stream:
    """The tokens of several files one after the other, on one device.

    tokens   [N] int32;  identity   sha256 of each file's index, for configuration hashes
    """

    def __init__(self, prefixes: Sequence[str], device: torch.device) -> None:
        indexes = [read_index(prefix) for prefix in prefixes]
        parts = [np.fromfile(f"{i.prefix}.bin", dtype=i.dtype).astype(np.int32) for i in indexes]
        self.tokens = torch.from_numpy(np.concatenate(parts)).to(device)
        self.identity: dict[str, Any] = {
            Path(i.prefix).name: [i.sha256[:16], len(p)] for i, p in zip(indexes, parts, strict=True)
        }
        self.ends = np.cumsum([len(p) for p in parts]).tolist()

    def check(self, vocab_size: int, name: str) -> None:
        """Raise DataError where a token is beyond the model's vocabulary."""
        largest = int(self.tokens.max())
        if largest >= vocab_size:
            raise DataError(f"{name}: token {largest}, but the model's vocabulary has {vocab_size}; use its tokenizer")

    def samples(self, length: int) -> int:
        """Sequences of `length` tokens with one more for the last label."""
        return (len(self.tokens) - 1) // length

    def cut(self, numbers_B: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """(inputs, labels) [B, length] int64 of the sequences with these numbers."""
        offsets = torch.arange(length + 1, device=self.tokens.device)
        text = self.tokens[(numbers_B * length)[:, None] + offsets].long()
        return text[:, :-1], text[:, 1:]


def training_batches(
    stream: Stream, *, seed: int, batch: int, micro_batch: int, length: int, start: int, steps: int, epochs: int
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """For each step from `start` on its micro-batches, each epoch in a new order; the same for a seed on any device.

    Raises DataError where `epochs` passes over the stream are too few for `steps`.
    """
    available = stream.samples(length)
    if steps * batch > available * epochs:
        raise DataError(
            f"{steps} steps of {batch} sequences need {steps * batch:,}, and {epochs} epochs of the training files have"
            f" {available * epochs:,} of {length} tokens; add files, lower the budget or raise `epochs`"
        )
    needed = -(-steps * batch // available)
    generators = [np.random.Generator(np.random.Philox(key=(seed, epoch))) for epoch in range(needed)]
    order = torch.from_numpy(np.concatenate([g.permutation(available) for g in generators])).to(stream.tokens.device)
    for step in range(start, steps):
        numbers = order[step * batch : (step + 1) * batch]
        yield [stream.cut(part, length) for part in numbers.split(micro_batch)]


def held_out_batches(stream: Stream, batch: int, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs, labels) over every whole sequence in order; the last batch is filled up with sequences labelled -1, so
    that all have one shape.
    """
    samples = stream.samples(length)
    for begin in range(0, samples, batch):
        numbers = torch.arange(begin, begin + batch, device=stream.tokens.device)
        text, labels = stream.cut(numbers % samples, length)
        yield text, labels.where((numbers < samples)[:, None], -1)
