"""DeepSpeed's engine over Megatron's GPTModel: ZeRO 0 to 3 for data, Megatron's groups for tensor parallelism.

What DeepSpeed does not know about Megatron is added here: an `mpu` over parallel_state, and the sum over
tensor-parallel ranks of gradients that each rank has only a part of.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, cast

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fp4dist.errors import CheckpointError, ConfigError
from fp4dist.megatron.provider import tp_partial_parameters
from fp4dist.megatron.upstream import GPTModel, parallel_state
from fp4dist.nn.apply import AppliedRecipe
from fp4dist.spec.run import RunConfig
from fp4dist.train import optim
from fp4dist.train.checkpoint import random_states, restore_random_states
from fp4dist.train.data import Batch
from fp4dist.train.engine import ReplicaWatch, StepResult, finite, global_mean, masked_mean, on_device, replicas
from fp4dist.train.world import World

_TAG = "deepspeed"
_LARGEST_BUCKET = 200_000_000  # elements; DeepSpeed allocates what it is told, also for a small model


class Mpu:
    """Megatron's process groups under the names that DeepSpeed asks for: "model parallel" is tensor x pipeline."""

    _SAME = (
        "get_tensor_model_parallel_group",
        "get_tensor_model_parallel_rank",
        "get_tensor_model_parallel_world_size",
        "get_tensor_model_parallel_src_rank",
        "get_pipeline_model_parallel_group",
        "get_pipeline_model_parallel_rank",
        "get_pipeline_model_parallel_world_size",
        "get_model_parallel_group",
    )

    def __getattr__(self, name: str) -> Any:
        """The functions that parallel_state has under the same name; nothing else exists."""
        if name in self._SAME:
            return getattr(parallel_state, name)
        raise AttributeError(name)

    def get_model_parallel_rank(self) -> int:
        """Rank in the model-parallel group."""
        return dist.get_rank(_one_replica())

    def get_model_parallel_world_size(self) -> int:
        """Ranks that share one replica of the model."""
        return dist.get_world_size(_one_replica())

    def get_model_parallel_src_rank(self) -> int:
        """Global rank of the first of them."""
        return dist.get_process_group_ranks(_one_replica())[0]

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Replicas, context parallelism included."""
        return replicas()

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Their global ranks."""
        return dist.get_process_group_ranks(self.get_data_parallel_group())

    def get_data_parallel_rank(self) -> int:
        """Rank among the replicas."""
        return parallel_state.get_data_parallel_rank(with_context_parallel=True)

    def get_data_parallel_world_size(self) -> int:
        """Number of replicas."""
        return parallel_state.get_data_parallel_world_size(with_context_parallel=True)


class DeepSpeedEngine:
    """A whole GPTModel (pp = 1) under ZeRO."""

    def __init__(
        self, config: RunConfig, world: World, model: GPTModel, applied: AppliedRecipe, dtype: torch.dtype
    ) -> None:
        if config.parallel.pp > 1:
            raise ConfigError(
                f"parallel.pp = {config.parallel.pp} with engine.kind = deepspeed: this engine runs whole models;"
                " use engine.kind: megatron for pipelines"
            )
        self.config, self.world, self.applied = config, world, applied
        self._micro_batches = config.train.global_batch_size // (config.train.micro_batch_size * world.dp_size)
        self._group = replicas()
        model = model.to(world.device)
        _sum_partial_gradients(model)
        self._watch = ReplicaWatch(model)
        self._adamw: Any = optim.make_adamw(model, config, world.device)
        self._adamw.held = True  # some of DeepSpeed's optimizers take a step to make their state
        self._engine, self._optimizer = _initialize(model, self._adamw, _settings(config, world, model, dtype))
        self._adamw.held = False
        self._schedule = optim.make_schedule(self._optimizer, config)
        self.optimizer_name = f"{optim.describe(self._adamw)} under DeepSpeed ZeRO-{config.engine.zero_stage}"

    def train_step(self, step: int, batches: Iterator[Batch]) -> StepResult:
        """Forward and backward over this rank's micro-batches, then the update, unless something is not finite."""
        self._engine.train()
        lr = optim.place_schedule(self._schedule, step)
        sums = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        for index, batch in enumerate(islice(batches, self._micro_batches)):
            loss, part = self._loss(batch, index)
            sums += part
            self._engine.backward(loss)
            if index + 1 < self._micro_batches:
                self._engine.step()  # only counts the micro-batch
        mean, tokens = global_mean(sums, self._group)
        norm, skipped = self._update(finite(mean))
        return StepResult(loss=mean, grad_norm=norm, skipped=skipped, tokens=tokens, lr=lr)

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Batch]) -> float:
        """Mean loss over the tokens of `batches` on all ranks."""
        self._engine.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        for index, batch in enumerate(batches):
            sums += self._loss(batch, index)[1]
        self._engine.train()
        return global_mean(sums, self._group)[0]

    def save(self, folder: Path) -> None:
        """Write DeepSpeed's own checkpoint files, with the random states in them."""
        self._engine.save_checkpoint(str(folder), tag=_TAG, client_state={"random": random_states()}, save_latest=False)

    def load(self, folder: Path, *, step: int, same_layout: bool) -> None:
        """Read them back; the layout is the same by `checkpoint.check_fits`."""
        own = optim.own_settings(self._optimizer.param_groups)
        path, client = self._engine.load_checkpoint(str(folder), tag=_TAG, load_lr_scheduler_states=False)
        if path is None:
            raise CheckpointError(
                f"checkpoint {folder}: DeepSpeed finds no state under {_TAG}/; use another checkpoint"
            )
        optim.restore_settings(self._optimizer.param_groups, own)
        restore_random_states(client["random"])
        optim.place_schedule(self._schedule, step)

    def close(self) -> None:
        """Remove DeepSpeed's hooks."""
        self._engine.destroy()

    def _loss(self, batch: Batch, index: int) -> tuple[Tensor, Tensor]:
        batch = on_device(batch, self.world.device)
        self.applied.clock.micro_batch = index * self.world.dp_size + self.world.dp_rank
        loss_BS = self._engine(batch.tokens, batch.position_ids, None, labels=batch.labels)
        return masked_mean(loss_BS.float(), batch.loss_mask)

    def _update(self, finite_loss: bool) -> tuple[float, bool]:
        """(gradient norm, skipped).

        ZeRO looks at the norm by itself and drops the gradients when it is not finite; where it does not, and for a
        loss that is not finite, AdamW is held while DeepSpeed goes through its step.
        """
        plain = self._optimizer is self._adamw  # ZeRO 0 in fp32: DeepSpeed wraps nothing and tells no norm
        norm = self._full_norm() if plain else None
        held = not finite_loss or (norm is not None and not finite(norm))
        if self.config.parallel.tp > 1:
            held = self.world.any(self._watch.found_bad() or held)
        self._adamw.held = held
        self._engine.step()
        self._adamw.held = False
        if norm is None:
            norm = float(self._engine.get_global_grad_norm() or 0.0)
        return norm, held or not self._engine.was_step_applied()

    def _full_norm(self) -> float:
        """L2 norm of the reduced gradients that lie in `.grad`, each shard counted once."""
        first = parallel_state.get_tensor_model_parallel_rank() == 0
        grads = [
            p.grad
            for p in self._engine.module.parameters()
            if p.grad is not None and (first or p.tensor_model_parallel)
        ]
        square = torch.zeros((), dtype=torch.float32, device=self.world.device)
        if grads:
            square += torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)).float()) ** 2
        dist.all_reduce(square, group=_one_replica())
        return float(square.sqrt())


def _one_replica() -> dist.ProcessGroup:
    """The ranks that share one replica of the model."""
    return cast(dist.ProcessGroup, parallel_state.get_model_parallel_group())


def _initialize(model: GPTModel, adamw: torch.optim.Optimizer, settings: dict[str, Any]) -> tuple[Any, Any]:
    """DeepSpeed's engine and optimizer over the process group that exists."""
    # On a CPU DeepSpeed would compile a shared-memory all-reduce for inference (30 s, needs a compiler); gloo serves.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.ERROR)  # it warns that our AdamW is not a class it knows
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    with contextlib.redirect_stdout(io.StringIO()):  # one of its optimizers prints memory tables while it is built
        engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=adamw, config=settings, mpu=Mpu())
    logger.setLevel(logging.WARNING)
    return engine, optimizer


def _settings(config: RunConfig, world: World, model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's configuration file, as far as it decides anything here."""
    t, stage = config.train, config.engine.zero_stage
    bucket = min(_LARGEST_BUCKET, sum(p.numel() for p in model.parameters()))
    settings: dict[str, Any] = {
        "train_batch_size": t.global_batch_size,
        "train_micro_batch_size_per_gpu": t.micro_batch_size,
        "gradient_accumulation_steps": t.global_batch_size // (t.micro_batch_size * world.dp_size),
        "gradient_clipping": config.optim.clip_grad,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": world.device.type == "cuda" and world.dp_size > 1,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
    }
    if dtype == torch.bfloat16:
        settings["bf16"] = {"enabled": True}
        settings["communication_data_type"] = "fp32"
        if stage > 0:
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _sum_partial_gradients(model: GPTModel) -> None:
    """Sum over tensor-parallel ranks what Megatron's finalize_model_grads would sum, before ZeRO sees it."""
    group = parallel_state.get_tensor_model_parallel_group()

    def summed(grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad, group=group)
        return grad

    for _, parameter in tp_partial_parameters(model):
        parameter.register_hook(summed)
