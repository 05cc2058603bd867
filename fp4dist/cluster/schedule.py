"""Pipeline schedules as data: which forward or backward pass each stage runs, in which order.

The orders are Megatron-core's: 1F1B (arXiv:1806.03377, as in arXiv:2104.04473 section 2.2.1) where a stage holds one
chunk of the model, interleaved 1F1B (section 2.2.2) where it holds several.
"""

from __future__ import annotations

from typing import NamedTuple

from fp4dist.errors import ConfigError


class Pass(NamedTuple):
    """One micro-batch through one chunk of a stage, forward or backward."""

    forward: bool
    micro_batch: int
    chunk: int  # of the stage, from 0; the model's chunk is chunk * stages + stage


def program(stage: int, stages: int, chunks: int, micro_batches: int) -> list[Pass]:
    """All passes of `stage` in the order in which it starts them.

    Raises ConfigError where the interleaved schedule cannot run: its micro-batches go around in groups of `stages`.
    """
    if chunks > 1 and micro_batches % stages:
        raise ConfigError(
            f"pipeline: {micro_batches} micro-batches are not a multiple of pp = {stages}, which the interleaved"
            f" schedule (vpp = {chunks}) needs; change the batch sizes or set vpp to 1"
        )
    table = _visits(stages, chunks, micro_batches)
    forwards = [Pass(True, micro_batch, chunk) for micro_batch, chunk in table]
    backwards = [Pass(False, micro_batch, chunks - 1 - chunk) for micro_batch, chunk in table]
    ahead = min(_warmup(stage, stages, chunks), len(forwards))
    order = forwards[:ahead]
    for k in range(ahead, len(forwards)):
        order += [forwards[k], backwards[k - ahead]]
    return order + backwards[len(forwards) - ahead :]


def _visits(stages: int, chunks: int, micro_batches: int) -> list[tuple[int, int]]:
    """(micro-batch, chunk) in forward order: groups of `stages` micro-batches pass through chunk after chunk."""
    group = stages if chunks > 1 else micro_batches
    return [
        (micro_batch, chunk)
        for first in range(0, micro_batches, group)
        for chunk in range(chunks)
        for micro_batch in range(first, min(first + group, micro_batches))
    ]


def _warmup(stage: int, stages: int, chunks: int) -> int:
    """Forward passes that a stage runs before its first backward one."""
    if chunks == 1:
        return stages - stage - 1
    return (stages - stage - 1) * 2 + (chunks - 1) * stages
