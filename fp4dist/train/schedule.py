"""Forward and backward of one step's micro-batches through Megatron's schedules: no pipeline, 1F1B, interleaved 1F1B.

Both engines run their pipelines here. The schedule divides each loss by the number of micro-batches and scales the
load-balancing loss of a mixture of experts alike; what reduces gradients (Megatron's DDP, ZeRO) is the engine's affair,
through the callbacks in the chunks' TransformerConfig.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, count, islice, repeat, tee
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from torch import Tensor, nn

from fp4dist.comm.compression import Compression
from fp4dist.megatron.pipeline_wire import CodedPipeline
from fp4dist.megatron.upstream import parallel_state
from fp4dist.nn.apply import AppliedRecipe
from fp4dist.spec.run import RunConfig
from fp4dist.train.data import Batch
from fp4dist.train.engine import global_mean, masked_mean, on_device, replicas, sequence_parts
from fp4dist.train.world import World

Numbered = tuple[int, Batch]  # a micro-batch with its number among this rank's of the step


class PipelineSchedule:
    """Runs micro-batches through this rank's chunks of the model, with the noise clock set for each.

    chunks   GPTModels in the order of their layers, bare or wrapped by Megatron's DDP: one, or parallel.vpp of them;
             they share one TransformerConfig
    compression   of a `comm:` section, to be confirmed after this
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        chunks: Sequence[nn.Module],
        applied: AppliedRecipe,
        compression: Compression | None = None,
    ) -> None:
        self._config, self._world, self._applied = config, world, applied
        self._chunks = list(chunks)
        self._schedule = get_forward_backward_func()
        self._group = replicas()
        self._parts = sequence_parts()
        self._last_stage = parallel_state.get_pipeline_model_parallel_last_rank()
        self._pipeline = cast(dist.ProcessGroup, parallel_state.get_pipeline_model_parallel_group())
        self._messages = self._coded_messages(compression) if compression is not None else {}

    def run(self, batches: Iterator[Batch], first: int, number: int, *, forward_only: bool) -> Tensor:
        """[loss sum, token count], fp64 [2] on the world's device; zeros except on the last pipeline stage.

        batches   this rank's micro-batches (under context parallelism its part of them); `number` are taken
        first     number of the first of them among this rank's micro-batches of the step: the clock counts from it
        """
        numbered: Iterator[Numbered] = zip(count(first), islice(batches, number), strict=False)
        if forward_only:
            numbered, number = self._filled_up(numbered, number)
        iterators = list(tee(numbered, len(self._chunks)))
        parts = self._schedule(
            forward_step_func=self._forward,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self._chunks,
            num_microbatches=number,
            seq_length=self._config.model.seq_length,
            micro_batch_size=self._config.train.micro_batch_size,
            forward_only=forward_only,
            **self._messages,
        )
        sums = torch.zeros(2, dtype=torch.float64, device=self._world.device)
        for part in parts:
            sums += part["sums"]
        return sums

    def one(self, batch: Batch, number: int) -> Tensor:
        """What `run` does for one micro-batch of a training step's `number`, which is on the device already. The clock
        must show it (`enter`), and `finish` ends the step. Without pipeline parallelism.
        """
        config = get_model_config(self._chunks[0])
        finish, config.finalize_model_grads_func = config.finalize_model_grads_func, None
        try:
            (part,) = self._schedule(
                forward_step_func=partial(self._forward_here, number),
                data_iterator=iter([batch]),
                model=self._chunks,
                num_microbatches=1,
                seq_length=self._config.model.seq_length,
                micro_batch_size=self._config.train.micro_batch_size,
                forward_only=False,
            )
        finally:
            config.finalize_model_grads_func = finish
        return cast(Tensor, part["sums"])

    def finish(self) -> None:
        """Reduce the gradients of all micro-batches that `one` has run."""
        config = get_model_config(self._chunks[0])
        if config.finalize_model_grads_func is not None:
            config.finalize_model_grads_func(self._chunks, None)

    def enter(self, index: int) -> None:
        """Let the noise clock show this rank's micro-batch number `index`."""
        self._applied.clock.micro_batch = index * self._world.dp_size + self._world.dp_rank

    def global_mean(self, sums: Tensor) -> tuple[float, int]:
        """(mean loss, tokens) of all ranks from what `run` gave, equal on every rank and pipeline stage."""
        if self._config.parallel.pp > 1:
            dist.broadcast(sums, src=self._last_stage, group=self._pipeline)
        return global_mean(sums, self._group)

    def _coded_messages(self, compression: Compression) -> dict[str, Any]:
        """Arguments for Megatron's schedule by which pipeline messages travel as `compression` says."""
        if not {"pp_forward", "pp_backward"} & set(compression.config.active):
            return {}
        c, p, train = self._config.model, self._config.parallel, self._config.train
        tokens = c.seq_length // p.cp // (p.tp if p.sequence_parallel else 1)
        shape = (tokens, train.micro_batch_size, c.hidden_size)
        number = train.global_batch_size // (train.micro_batch_size * self._world.dp_size)
        coded = CodedPipeline(self._pipeline, get_model_config(self._chunks[0]), compression, shape, number * p.vpp)
        return {
            "p2p_communicator": coded,
            "pg_collection": ProcessGroupCollection.use_mpu_process_groups(),
        }

    def _filled_up(self, batches: Iterator[Numbered], number: int) -> tuple[Iterator[Numbered], int]:
        """Whole groups of micro-batches, as the interleaved schedule wants them; what is added counts no token."""
        group = self._config.parallel.pp if self._config.parallel.vpp > 1 else 1
        missing = -number % group
        if not missing:
            return batches, number
        given = list(batches)
        index, last = given[-1]
        empty = dataclasses.replace(last, loss_mask=torch.zeros_like(last.loss_mask))
        return chain(given, zip(count(index + 1), repeat(empty, missing), strict=False)), number + missing

    def _forward(self, batches: Iterator[Numbered], chunk: Any) -> tuple[Tensor, Any]:
        index, batch = next(batches)
        batch = on_device(batch, self._world.device)
        self.enter(index)
        output = chunk(batch.tokens, batch.position_ids, None, labels=batch.labels)
        return output, partial(self._loss, batch.loss_mask)

    def _forward_here(self, number: int, batches: Iterator[Batch], chunk: Any) -> tuple[Tensor, Any]:
        batch = next(batches)

        def loss(loss_BS: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            mean, parts = self._loss(batch.loss_mask, loss_BS)
            return mean / number, parts  # the schedule divides by its own number, 1

        return chunk(batch.tokens, batch.position_ids, None, labels=batch.labels), loss

    def _loss(self, mask_BS: Tensor, loss_BS: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        mean, sums = masked_mean(loss_BS.float(), mask_BS, self._parts)
        return mean, {"sums": sums}
