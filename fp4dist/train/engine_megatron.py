"""Megatron's own engine: DistributedDataParallel, distributed optimizer, pipeline schedules, torch_dist checkpoints.

Gradients accumulate and reduce in fp32, master weights and moments are fp32 and sharded over data-parallel ranks. With
a pipeline the same schedule function runs 1F1B.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from fp4dist.errors import CheckpointError
from fp4dist.megatron.upstream import GPTModel, parallel_state
from fp4dist.nn.apply import AppliedRecipe
from fp4dist.spec.run import RunConfig
from fp4dist.train import optim
from fp4dist.train.checkpoint import random_states, restore_random_states, vet_torch_dist
from fp4dist.train.data import Batch
from fp4dist.train.engine import ReplicaWatch, StepResult, finite, global_mean, masked_mean, on_device, replicas
from fp4dist.train.world import World

log = logging.getLogger("fp4dist")


class MegatronEngine:
    """One pipeline stage of a GPTModel under Megatron's data parallelism."""

    def __init__(
        self, config: RunConfig, world: World, model: GPTModel, applied: AppliedRecipe, dtype: torch.dtype
    ) -> None:
        self.config, self.world, self.applied = config, world, applied
        self._micro_batches = config.train.global_batch_size // (config.train.micro_batch_size * world.dp_size)
        self._watch = ReplicaWatch(model)
        self._chunk = _wrap(model, world)
        self._optimizer = _make_optimizer(self._chunk, config, dtype)
        self._schedule = optim.make_schedule(self._optimizer, config)
        self._run = get_forward_backward_func()
        self._group = replicas()
        self._last_stage = parallel_state.get_pipeline_model_parallel_last_rank()
        self._pipeline = cast(dist.ProcessGroup, parallel_state.get_pipeline_model_parallel_group())
        inner = [o.optimizer for o in self._optimizer.chained_optimizers if o.optimizer is not None]
        self.optimizer_name = f"{', '.join(map(optim.describe, inner))} under Megatron's DistributedOptimizer"

    def train_step(self, step: int, batches: Iterator[Batch]) -> StepResult:
        """Forward and backward over this rank's micro-batches, then the update, unless something is not finite."""
        self._chunk.train()
        self._chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        lr = optim.place_schedule(self._schedule, step)
        sums = self._forward_backward(batches, count(), self._micro_batches, forward_only=False)
        loss, tokens = self._global_mean(sums)
        self._optimizer.prepare_grads()
        norm = float(self._optimizer.get_grad_norm())
        skipped = not finite(loss, norm)
        if self.config.parallel.tp > 1:
            skipped = self.world.any(self._watch.found_bad() or skipped)
        if skipped:
            self._optimizer.zero_grad()
        else:
            self._update(norm)
        return StepResult(loss=loss, grad_norm=norm, skipped=skipped, tokens=tokens, lr=lr)

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Batch]) -> float:
        """Mean loss over the tokens of `batches` on all ranks."""
        self._chunk.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        index = count()
        while group := list(islice(batches, self._micro_batches)):
            sums += self._forward_backward(iter(group), index, len(group), forward_only=True)
        self._chunk.train()
        return self._global_mean(sums)[0]

    def save(self, folder: Path) -> None:
        """Write model, optimizer and random states with dist_checkpointing."""
        dist_checkpointing.save(self._sharded_state(is_loading=False, with_random=True), str(folder))

    def load(self, folder: Path, *, step: int, same_layout: bool) -> None:
        """Read them back into any parallel layout; random states only into the same one."""
        self.world.from_rank0(lambda: vet_torch_dist(folder))
        own = optim.own_settings(self._optimizer.param_groups)
        with torch.no_grad():  # fp32 master weights are views of the parameters, which are leaves
            wanted = self._sharded_state(is_loading=True, with_random=same_layout)
            state = _read(wanted, folder)
            self._chunk.module.load_state_dict(state["model"])
            parts = self._optimizer.chained_optimizers
            saved = state["optimizer"]
            for i, part in enumerate(parts):
                _restore_part(part, saved if len(parts) == 1 else saved[i])
        optim.restore_settings(self._optimizer.param_groups, own)
        if same_layout:
            restore_random_states(state["random"])
        else:
            log.info("the parallel layout changed: random states start from run.seed (quantization noise needs none)")
        optim.place_schedule(self._schedule, step)

    def close(self) -> None:
        """Nothing outlives the process groups."""

    def _forward_backward(
        self, batches: Iterator[Batch], index: Iterator[int], number: int, *, forward_only: bool
    ) -> Tensor:
        """[loss sum, token count] of `number` micro-batches of this rank; zeros except on the last pipeline stage."""
        parts = self._run(
            forward_step_func=partial(self._forward, index=index),
            data_iterator=batches,
            model=[self._chunk],
            num_microbatches=number,
            seq_length=self.config.model.seq_length,
            micro_batch_size=self.config.train.micro_batch_size,
            forward_only=forward_only,
        )
        sums = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        for part in parts:
            sums += part["sums"]
        return sums

    def _forward(self, batches: Iterator[Batch], model: Any, index: Iterator[int]) -> tuple[Tensor, Any]:
        batch = on_device(next(batches), self.world.device)
        self.applied.clock.micro_batch = next(index) * self.world.dp_size + self.world.dp_rank
        output = model(batch.tokens, batch.position_ids, None, labels=batch.labels)
        return output, partial(_loss, batch.loss_mask)

    def _global_mean(self, sums: Tensor) -> tuple[float, int]:
        """(mean loss, tokens) over data-parallel ranks, on every pipeline stage."""
        if self.config.parallel.pp > 1:
            dist.broadcast(sums, src=self._last_stage, group=self._pipeline)
        return global_mean(sums, self._group)

    def _update(self, norm: float) -> None:
        """Clip by a norm that is already known and step, as Megatron's ChainedOptimizer.step does."""
        limit = self.config.optim.clip_grad
        for part in self._optimizer.chained_optimizers:
            parameters = part.get_parameters()
            if limit > 0 and parameters:
                clip_grad_by_total_norm_fp32(parameters, max_norm=limit, total_norm=norm)
        self._optimizer.step_with_ready_grads()

    def _sharded_state(self, *, is_loading: bool, with_random: bool) -> dict[str, Any]:
        """The state as Megatron's sharded state dict.

        Optimizer tensors have the shape of their parameters, so that they can be cut anew for another layout.
        """
        metadata = {"dp_cp_group": self._group, "distrib_optim_sharding_type": "fully_reshardable"}
        model = cast(GPTModel, self._chunk.module).sharded_state_dict(metadata=metadata)
        state = {
            "model": model,
            "optimizer": self._optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata),
        }
        if with_random:
            state["random"] = ShardedObject(
                "random",
                random_states(),
                (self.config.parallel.pp, self.config.parallel.tp),
                (parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()),
                replica_id=self.world.dp_rank,
            )
        return state


def _wrap(model: GPTModel, world: World) -> DistributedDataParallel:
    """Data parallelism with fp32 gradients; the reduction overlaps backward where there is someone to reduce with."""
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=world.device.type == "cuda" and world.dp_size > 1,
    )
    config = get_model_config(model)
    chunk = DistributedDataParallel(config, ddp, model.to(world.device))
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = chunk.no_sync
    return chunk


def _make_optimizer(chunk: DistributedDataParallel, config: RunConfig, dtype: torch.dtype) -> Any:
    """Megatron's optimizer with all its state in place, so that it can be saved before the first update."""
    o = config.optim
    settings = OptimizerConfig(
        optimizer="adam",
        lr=o.lr,
        min_lr=o.min_lr,
        weight_decay=o.weight_decay,
        adam_beta1=o.beta1,
        adam_beta2=o.beta2,
        adam_eps=o.eps,
        clip_grad=o.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
    )
    optimizer: Any = get_megatron_optimizer(settings, [chunk], use_gloo_process_groups=False)
    for part in optimizer.chained_optimizers:
        if part.optimizer is not None:
            optim.use_fused_step(part.optimizer)
            optim.materialize_state(part.optimizer)
    return optimizer


def _read(wanted: dict[str, Any], folder: Path) -> dict[str, Any]:
    """dist_checkpointing.load with its ways to fail as ours."""
    try:
        return cast("dict[str, Any]", dist_checkpointing.load(wanted, str(folder)))
    except (CheckpointingException, CheckpointException, OSError) as e:
        raise CheckpointError(f"checkpoint {folder}: cannot be read ({e}); use another checkpoint") from e


def _restore_part(part: Any, state: dict[str, Any]) -> None:
    """Load one DistributedOptimizer.

    Its own load_state_dict does not know torch's AdamW here (megatron-core 0.16 to 0.20): it looks for `step` among
    the reshardable tensors, where it is not, and gives all parameters one and the same `step` tensor, which each
    parameter's update would then advance. So `step` stays out of the way while the tensors are read, and comes back as
    copies.
    """
    tensors = state.pop("param_state")
    state.pop("param_state_sharding_type")
    part.load_state_dict(state)
    inner: torch.optim.Optimizer = part.optimizer
    steps = {p: s.pop("step") for p, s in inner.state.items() if isinstance(s.get("step"), Tensor)}
    part.load_parameter_state_from_fully_reshardable(tensors)
    for p, step in steps.items():
        inner.state[p]["step"] = step.clone()
    optim.use_fused_step(inner)


def _loss(mask_BS: Tensor, loss_BS: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    mean, sums = masked_mean(loss_BS.float(), mask_BS)
    return mean, {"sums": sums}
