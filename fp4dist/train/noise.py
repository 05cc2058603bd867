"""How far the gradient stands out of its quantization noise: one micro-batch, run with that noise and without."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import get_model_config
from torch import Tensor

from fp4dist.megatron.upstream import tensor_parallel
from fp4dist.nn.apply import AppliedRecipe
from fp4dist.spec.run import RunConfig
from fp4dist.train.checkpoint import random_states, restore_random_states
from fp4dist.train.data import Batch
from fp4dist.train.schedule import PipelineSchedule
from fp4dist.train.world import World


class NoiseProbe:
    """Measures |g| / |g_q - g| under Megatron's DistributedDataParallel and distributed optimizer.

    g and g_q are the gradients of the weights of linears with quantized backward operands, in full and with those;
    forward passes and their noise are the same. Both are reduced as in training, and each rank sums over its shard.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        chunks: Sequence[Any],
        optimizer: Any,
        schedule: PipelineSchedule,
        applied: AppliedRecipe,
    ) -> None:
        self._config, self._world, self._applied = config, world, applied
        self._chunks, self._optimizer, self._schedule = list(chunks), optimizer, schedule

    def measure(
        self,
        batches: Iterator[Batch],
        watching: Callable[[], AbstractContextManager[None]] = nullcontext,
        *,
        compare: bool = True,
    ) -> float:
        """The ratio on the first micro-batch of `batches`, equal on every rank; inf without noise.

        watching   entered around the passes with quantized operands
        compare    False: those alone, and NaN

        The samples of data-parallel rank 0 alone count, so that the ratio does not depend on how many ranks there are.
        Weights, moments, buffers, kept statistics, counters and random states are as before afterwards, gradients zero.
        """
        group = self._group(batches)
        random, models = random_states(), [chunk.module for chunk in self._chunks]
        buffers = [(buffer, buffer.clone()) for model in models for buffer in model.buffers()]
        try:
            found = []
            for high in (True, False) if compare else (False,):
                found.append(self._gradients(group, high, nullcontext if high else watching))
                restore_random_states(random)
                for buffer, before in buffers:
                    buffer.copy_(before)
        finally:
            self._zero()
        if not compare:
            return float("nan")
        sums = torch.zeros(2, dtype=torch.float64, device=self._world.device)
        for g, g_q in zip(*found, strict=True):
            sums += torch.stack([_square(g), _square(g_q - g)])
        dist.all_reduce(sums)
        gradient, noise = sums.sqrt().tolist()
        return gradient / noise if noise > 0 else float("inf") if noise == 0 else float("nan")

    def _group(self, batches: Iterator[Batch]) -> list[Batch]:
        """The micro-batch, filled up for an interleaved schedule; what does not count has a loss of 0."""
        first = next(islice(batches, 1))
        empty = dataclasses.replace(first, loss_mask=torch.zeros_like(first.loss_mask))
        p = self._config.parallel
        number = p.pp if p.vpp > 1 else 1
        return [first if self._world.dp_rank == 0 else empty] + [empty] * (number - 1)

    def _gradients(
        self, group: Sequence[Batch], high: bool, watching: Callable[[], AbstractContextManager[None]]
    ) -> list[Tensor]:
        """Copies of this rank's pieces of the reduced gradients."""
        self._zero()
        with self._applied.aside(high_precision_backward=high), self._loss_scaled(len(group)), watching():
            self._schedule.run(iter(group), 0, len(group), forward_only=False)
        self._optimizer.prepare_grads()
        return [tensor.grad.clone() for tensor in self._pieces() if tensor.grad is not None]

    @contextmanager
    def _loss_scaled(self, number: int) -> Iterator[None]:
        """Inside, `number` micro-batches weigh as they do in a step, which kept statistics of gradients count on."""
        config, share = get_model_config(self._chunks[0]), self._config.train
        before, samples = config.grad_scale_func, share.micro_batch_size * self._world.dp_size
        config.grad_scale_func = lambda loss: loss * (number * samples / share.global_batch_size)
        try:
            yield
        finally:
            config.grad_scale_func = before

    def _pieces(self) -> Iterator[Tensor]:
        """The optimizer's tensors of the weights in question; copies of what another rank counts are left out."""
        wanted = {id(weight) for weight in self._applied.noisy_weights()}
        for part in self._optimizer.chained_optimizers:
            if not part.buffers or part.optimizer is None:  # it stands for the experts of other pipeline stages
                continue
            for parameter, (group, position) in part.model_param_group_index_map.items():
                is_expert = not getattr(parameter, "allreduce", True)
                counts = is_expert or tensor_parallel.param_is_not_tensor_parallel_duplicate(parameter)
                if id(parameter) in wanted and counts:
                    yield part.optimizer.param_groups[group]["params"][position]

    def _zero(self) -> None:
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()


def _square(x: Tensor) -> Tensor:
    """[] fp64 sum of squares."""
    return torch.linalg.vector_norm(x, dtype=torch.float64).square()
