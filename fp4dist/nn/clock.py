"""Where the run is: the one mutable object behind all quantization noise."""

from __future__ import annotations

from dataclasses import dataclass

from fp4dist.numerics.tensor import Key
from fp4dist.spec.recipe import SLOTS


@dataclass(slots=True)
class Clock:
    """Step and micro-batch, set by the training loop and read by every linear of a model.

    seed            the run's seed, half of the Philox key
    step            optimizer step
    micro_batch     global micro-batch index: i * data_parallel_size + data_parallel_rank
    cache_weights   the loop promises that weights change only between steps, so quantized weights may be kept for one
    """

    seed: int = 0
    step: int = 0
    micro_batch: int = 0
    cache_weights: bool = False

    def key(self, layer: int, slot: str) -> Key:
        """The key of one whole operand of linear number `layer`; `comm.place` makes it a shard's."""
        return Key(self.seed, layer, self.step, self.micro_batch, SLOTS.index(slot))
