"""Activation recomputation in Megatron: the replayed forward draws the noise of its first run.

Under a pipeline schedule other micro-batches run between a layer's forward and its replay, so the clock has moved on.
Megatron restores its own random states there, which our noise, counted from the clock, does not use.

Covered: `recompute_granularity` full and selective, that is everything that goes through `tensor_parallel.checkpoint`
or `tensor_parallel.CheckpointWithoutOutput`. Transformer Engine's checkpoint, which Megatron takes while its own fp8 or
fp4 setting is on, is not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from fp4dist.megatron.upstream import tensor_parallel
from fp4dist.nn.clock import replayable

_KEEPS_CLOCK = "_fp4dist_keeps_clock"


def keep_clock_on_replay() -> tuple[str, ...]:
    """Make every checkpointed function re-enter the time of its first call when it is replayed.

    Megatron's layers look both names up at each call, so it does not matter whether models exist already. Without live
    clocks (no recipe applied) nothing changes. Calling it again does nothing.

    returns   what was rebound, () if it had been before
    """
    rebound = []
    for owner, name, path in (
        (tensor_parallel, "checkpoint", "megatron.core.tensor_parallel.checkpoint"),
        (tensor_parallel.random, "checkpoint", "megatron.core.tensor_parallel.random.checkpoint"),
    ):
        if not hasattr(getattr(owner, name), _KEEPS_CLOCK):
            setattr(owner, name, _function_first(getattr(owner, name)))
            rebound.append(path)
    without_output = tensor_parallel.CheckpointWithoutOutput
    if not hasattr(without_output.checkpoint, _KEEPS_CLOCK):
        without_output.checkpoint = _method_first(without_output.checkpoint)  # type: ignore[method-assign]
        rebound.append("megatron.core.tensor_parallel.CheckpointWithoutOutput.checkpoint")
    return tuple(rebound)


def _function_first(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(checkpoint)
    def keeping(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return checkpoint(replayable(function), *args, **kwargs)

    setattr(keeping, _KEEPS_CLOCK, True)
    return keeping


def _method_first(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(checkpoint)
    def keeping(self: Any, run_function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self, replayable(run_function), *args, **kwargs)

    setattr(keeping, _KEEPS_CLOCK, True)
    return keeping
