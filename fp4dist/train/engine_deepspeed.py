"""DeepSpeed's engine over Megatron's GPTModel: ZeRO 0 to 3 for data, Megatron's groups for everything else.

A model without a pipeline runs through DeepSpeed's own forward and backward. With a pipeline Megatron's schedule runs
the bare stages and sums their micro-batches; DeepSpeed then reduces over data-parallel ranks and updates (ZeRO 0, 1).

What DeepSpeed does not know about Megatron is added here: an `mpu` over parallel_state, the sum over tensor-parallel
ranks of gradients that each rank has only a part of, the sum of tied embeddings' gradients over pipeline stages.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.checkpoint.constants import UNIVERSAL_CHECKPOINT_INFO
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.runtime.zero.utils import ZeRORuntimeException
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor, nn

from fp4dist.comm.compression import StepTraffic
from fp4dist.errors import CheckpointError, ConfigError
from fp4dist.megatron.chunks import layer_offset
from fp4dist.megatron.provider import tp_partial_parameters
from fp4dist.megatron.upstream import GPTModel, parallel_state
from fp4dist.nn.apply import AppliedRecipe
from fp4dist.nn.optimizer import OptimizerControl
from fp4dist.nn.triage import Triage, triage
from fp4dist.spec.run import RunConfig
from fp4dist.train import optim
from fp4dist.train.checkpoint import UNIVERSAL, random_states, reading, restore_random_states
from fp4dist.train.communication import code_activations, make_compression
from fp4dist.train.data import Batch
from fp4dist.train.deepspeed_gather import CodedZeroGather
from fp4dist.train.deepspeed_parameters import (
    StageParameters,
    counted_parameters,
    keep_gradients_fp32,
    load_tensors,
    save_tensors_only,
    tied_embedding,
    universal_info,
)
from fp4dist.train.deepspeed_reduce import CodedZeroReduce
from fp4dist.train.deepspeed_settings import clips_itself, flattened, make_settings
from fp4dist.train.engine import (
    OnItsWay,
    ReplicaWatch,
    StepResult,
    Watching,
    finite,
    global_mean,
    masked_mean,
    on_device,
    replicas,
    sequence_parts,
)
from fp4dist.train.graphs import wanted
from fp4dist.train.optimizer_shards import deepspeed_control, lend_gradients
from fp4dist.train.schedule import PipelineSchedule
from fp4dist.train.world import World

log = logging.getLogger("fp4dist")
_TAG = "deepspeed"
_CLIP_EPS = 1e-6  # as in torch's and DeepSpeed's clipping


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
    """This rank's chunks of a GPTModel under ZeRO."""

    def __init__(
        self, config: RunConfig, world: World, chunks: Sequence[GPTModel], applied: AppliedRecipe, dtype: torch.dtype
    ) -> None:
        _check_experts(config)
        self.config, self.world, self.applied = config, world, applied
        log.info("micro-batches as CUDA graphs: no (%s)", wanted(config, world, applied)[1])
        self._micro_batches = config.train.global_batch_size // (config.train.micro_batch_size * world.dp_size)
        self.judge: Callable[[float, float | None], bool] | None = None
        self._group, self._parts = replicas(), sequence_parts()
        self._stages = [chunk.to(world.device) for chunk in chunks]
        self.compression, self._told = make_compression(config), False
        self._delta: CodedZeroGather | None = None
        self._pipeline = None
        if config.parallel.pp > 1:
            self._pipeline = PipelineSchedule(config, world, self._stages, applied, self.compression)
        self._tied = tied_embedding(self._stages)
        module = StageParameters(self._stages) if self._pipeline else self._stages[0]
        for chunk in self._stages:
            _sum_partial_gradients(chunk)
        self._watch = ReplicaWatch(module)
        save_tensors_only(module)
        self._universal_info = universal_info(config, module)
        self._clips = clips_itself(config)
        self._adamw: Any = optim.make_optimizer(module, config, world.device)
        self._adamw.held = True  # some of DeepSpeed's optimizers take a step to make their state
        settings = make_settings(config, world, module, dtype, Mpu())
        if config.engine.deepspeed:
            passed = ", ".join(f"{path} = {value}" for path, value in flattened(config.engine.deepspeed))
            log.info("passed to DeepSpeed %s: %s", deepspeed.__version__, passed)
        with _named_refusal(config):
            self._engine, self._optimizer = _initialize(module, self._adamw, settings)
        self._adamw.held = False
        keep_gradients_fp32(module)
        _stage_in_fp32(self._optimizer, dtype)
        _look_for_overflow_once(self._optimizer)
        self._noted: OnItsWay | None = None
        if not self._clips:
            self._adamw.entered = self._note_norm
        if self.compression is not None:
            if "grad_reduce" in self.compression.config.active:
                CodedZeroReduce(
                    self._engine, self._optimizer, module, self.compression, self._group, self._micro_batches
                )
            if "param_gather" in self.compression.config.active:
                self._delta = CodedZeroGather(self._optimizer, module, self.compression)
            code_activations(config, world, chunks, applied, self.compression, dtype)
            self.compression.confirm()
        self._control: OptimizerControl | None = None
        if config.recipe.steers_optimizer:
            self._control = self._attach_control()
        self._schedule = optim.make_schedule(self._optimizer, config, applied.phases)
        self.optimizer_name = f"{optim.describe(self._adamw)} under DeepSpeed ZeRO-{config.engine.zero_stage}"

    def train_step(self, step: int, batches: Iterator[Batch]) -> StepResult:
        """Forward and backward over this rank's micro-batches, then the update, unless something is not finite."""
        self._set_training(True)
        if self.compression is not None:
            self.compression.begin_step(self.applied.clock.step)
        lr = optim.place_schedule(self._schedule, step)
        mean, tokens = self._accumulate(batches) if self._pipeline is None else self._accumulate_pipeline(batches)
        lost = self.applied.lost()
        inexact = lost > 0 and self.config.backend.strict_exact
        refused = finite(mean) and not inexact and self.judge is not None and self.judge(mean, None)
        norm, skipped = self._update(finite(mean) and not inexact and not refused)
        inexact = inexact and finite(mean, norm)
        return StepResult(
            loss=mean,
            grad_norm=norm,
            skipped=skipped,
            tokens=tokens,
            lr=lr,
            lost=lost,
            inexact=inexact,
            refused=refused,
            traffic=self._finish_traffic(skipped) if self.compression is not None else None,
        )

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Batch]) -> float:
        """Mean loss over the tokens of `batches` on all ranks."""
        self._set_training(False)
        sums = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        if self._pipeline is None:
            for index, batch in enumerate(batches):
                sums += self._loss(batch, index)[1]
            mean = global_mean(sums, self._group)[0]
        else:
            for first in count(0, self._micro_batches):
                if not (group := list(islice(batches, self._micro_batches))):
                    break
                sums += self._pipeline.run(iter(group), first, len(group), forward_only=True)
            mean = self._pipeline.global_mean(sums)[0]
        self._set_training(True)
        return mean

    def retrace(self, batches: Iterator[Batch]) -> Triage:
        """See `Engine.retrace`; forward passes only, because ZeRO reduces gradients inside of backward."""
        offsets = [layer_offset(stage) for stage in self._stages]
        with triage(self._stages, clock=self.applied.clock, layer_offset=offsets) as found:
            self.evaluate(islice(batches, self._micro_batches))
        return found

    def probe(self, batches: Iterator[Batch]) -> float:
        """Not here: DeepSpeed reduces gradients into the optimizer's own buffers, which only its step empties."""
        raise ConfigError(
            "engine.kind = deepspeed cannot measure the gradient's noise, for which a phase of the recipe waits; use"
            " engine.kind: megatron, or give the phase a step"
        )

    def observe(self, batches: Iterator[Batch], watching: Watching, noise: bool) -> None:
        """See `Engine.observe`: a forward pass alone, because ZeRO reduces gradients inside of backward."""
        with self.applied.aside(), watching():
            self.evaluate(islice(batches, 1 if self._pipeline is None else self._micro_batches))

    def save(self, folder: Path) -> None:
        """Write DeepSpeed's own checkpoint files, with the random states and what a universal checkpoint needs."""
        if self._control is not None:
            self._control.before_save()
        client = {"random": random_states(), UNIVERSAL_CHECKPOINT_INFO: self._universal_info}
        self._engine.save_checkpoint(str(folder), tag=_TAG, client_state=client, save_latest=False)

    def load(self, folder: Path, *, step: int, same_layout: bool) -> None:
        """Read them back, or, where it exists, the universal checkpoint that was made of them.

        DeepSpeed's own files fit one layout alone; a universal checkpoint fits others too (`checkpoint.check_fits`).
        """
        sharded = self.config.engine.zero_stage == 3 and self.config.parallel.tp > 1
        universal = (folder / UNIVERSAL).is_dir() and not sharded
        own = optim.own_settings(self._optimizer.param_groups)
        whole = self._delta.loading() if self._delta is not None else contextlib.nullcontext()
        with reading(folder), whole, self._reading_universal(universal):
            path, client = self._engine.load_checkpoint(
                str(folder),
                tag=UNIVERSAL if universal else _TAG,
                load_lr_scheduler_states=False,
                custom_load_fn=load_tensors,
            )
        if path is None:
            raise CheckpointError(
                f"checkpoint {folder}: DeepSpeed finds no state under {_TAG}/; use another checkpoint"
            )
        if universal:
            log.info("read the universal checkpoint %s: random states start from run.seed", folder / UNIVERSAL)
            _place_steps(self._adamw)
        else:
            restore_random_states(client["random"])
        if self._control is not None:
            self._control.after_load()
        optim.restore_settings(self._optimizer.param_groups, own)
        optim.place_schedule(self._schedule, step)

    def close(self) -> None:
        """Remove DeepSpeed's hooks, and ours in it."""
        if self._delta is not None:
            self._delta.close()
        self._engine.destroy()

    def _finish_traffic(self, skipped: bool) -> StepTraffic:
        """End the step of the `comm:` section; after the first one it is known which buckets there are."""
        assert self.compression is not None
        if not self._told:
            log.info("%s", self.compression.confirm(self._group))
            self._told = True
        return self.compression.finish_step(skipped=skipped)

    def _accumulate(self, batches: Iterator[Batch]) -> tuple[float, int]:
        """Gradients of a step through DeepSpeed's forward and backward; (mean loss, tokens)."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        scale = self.config.parallel.cp  # DeepSpeed takes the mean over the parts of a sequence too, we want their sum
        if self.config.model.moe is not None:  # scaled as the loss is, here and by DeepSpeed
            share = torch.full((1,), scale / self._micro_batches, device=self.world.device)
            MoEAuxLossAutoScaler.set_loss_scale(share)
        for index, batch in enumerate(islice(batches, self._micro_batches)):
            loss, part = self._loss(batch, index)
            sums += part
            self._engine.backward(loss * scale)
            if index + 1 < self._micro_batches:
                self._engine.step()  # only counts the micro-batch
        return global_mean(sums, self._group)

    def _accumulate_pipeline(self, batches: Iterator[Batch]) -> tuple[float, int]:
        """Gradients of a step through Megatron's schedule, reduced over data-parallel ranks; (mean loss, tokens)."""
        assert self._pipeline is not None
        sums = self._pipeline.run(batches, 0, self._micro_batches, forward_only=False)
        if self._tied is not None:
            gradient = getattr(self._tied, "_hp_grad", None)  # DeepSpeed's bf16 optimizer keeps an fp32 one
            gradient = self._tied.grad if gradient is None else gradient
            dist.all_reduce(gradient, group=cast(dist.ProcessGroup, parallel_state.get_embedding_group()))
        self._engine.allreduce_gradients()
        return self._pipeline.global_mean(sums)

    def _loss(self, batch: Batch, index: int) -> tuple[Tensor, Tensor]:
        batch = on_device(batch, self.world.device)
        self.applied.clock.micro_batch = index * self.world.dp_size + self.world.dp_rank
        loss_BS = self._engine(batch.tokens, batch.position_ids, None, labels=batch.labels)
        return masked_mean(loss_BS.float(), batch.loss_mask, self._parts)

    def _update(self, finite_loss: bool) -> tuple[float, bool]:
        """(gradient norm, skipped).

        ZeRO looks at the norm by itself and drops the gradients when it is not finite; where it does not, and for a
        loss that is not finite, AdamW is held while DeepSpeed goes through its step.
        """
        norm = self._norm() if self._clips else None
        held = not finite_loss or (norm is not None and not finite(norm))
        if self.config.parallel.tp > 1:
            held = self.world.any(self._watch.found_bad() or held)
        if norm is not None and not held:
            self._clip(self._steer_gradients(norm))
        self._adamw.held = held
        self._engine.step()
        held = held or not self._engine.was_step_applied()
        if self._control is not None and not held:
            self._control.settled(self.applied.clock.step)
        self._adamw.held = False
        if norm is None:  # noted before AdamW's kernels, for which reading it now would wait
            norm = float(self._engine.get_global_grad_norm() or 0.0) if self._noted is None else self._noted.value()
        self._noted = None
        return norm, held

    def _note_norm(self) -> None:
        """Start reading ZeRO's gradient norm, which is known when it calls AdamW."""
        norm = self._optimizer._global_grad_norm
        if self._noted is None and norm is not None:
            self._noted = OnItsWay(norm)

    def _attach_control(self) -> OptimizerControl:
        """The recipe's parts around AdamW's update, which DeepSpeed calls in the middle of its step."""
        control = deepspeed_control(self._optimizer, self._adamw, self._stages, self.applied, self.config.train.steps)
        self._adamw.before_update = lambda: control.before_update(self.applied.clock.step)
        self._adamw.after_update = lambda: control.after_update(self.applied.clock.step)
        return control

    def _steer_gradients(self, norm: float) -> float:
        """Let the recipe transform the gradients; the norm to clip them by, which is `norm` without a recipe's."""
        if self._control is None:
            return norm
        lend_gradients(self._control)
        self._control.before_step(self.applied.clock.step)
        return self._norm() if self.config.optim.clip_grad > 0 else norm

    def _norm(self) -> float:
        """L2 norm of the reduced gradients that lie in `.grad`, each shard counted once."""
        grads = [p.grad for p in counted_parameters(self._engine.module) if p.grad is not None]
        square = torch.zeros((), dtype=torch.float32, device=self.world.device)
        if grads:
            square += torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)).float()) ** 2
        dist.all_reduce(square, group=_one_replica())
        return float(square.sqrt())

    def _clip(self, norm: float) -> None:
        """Clip the gradients by their norm."""
        limit = self.config.optim.clip_grad
        if limit > 0 and norm > limit:
            every = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
            torch._foreach_mul_(every, limit / (norm + _CLIP_EPS))

    def _set_training(self, on: bool) -> None:
        self._engine.train(on)
        for chunk in self._stages:
            chunk.train(on)

    @contextlib.contextmanager
    def _reading_universal(self, on: bool) -> Iterator[None]:
        """DeepSpeed decides by its configuration which kind of checkpoint it reads."""
        self._engine._config.load_universal_checkpoint = on
        try:
            yield
        finally:
            self._engine._config.load_universal_checkpoint = False


def _one_replica() -> dist.ProcessGroup:
    """The ranks that share one replica of the model."""
    return cast(dist.ProcessGroup, parallel_state.get_model_parallel_group())


def _check_experts(config: RunConfig) -> None:
    if config.parallel.ep > 1:
        raise ConfigError(
            f"parallel.ep = {config.parallel.ep} with engine.kind = deepspeed: ZeRO would need its own groups for the"
            " experts' gradients; use engine.kind: megatron, or ep 1 (every rank holds all experts)"
        )
    if config.model.moe is not None and config.parallel.tp > 1:
        raise ConfigError(
            f"model.moe and parallel.tp = {config.parallel.tp} with engine.kind = deepspeed: tensor-parallel ranks hold"
            " copies of the experts that see different tokens, and DeepSpeed takes them for experts of its own; use"
            " engine.kind: megatron, or tp 1"
        )


@contextlib.contextmanager
def _named_refusal(config: RunConfig) -> Iterator[None]:
    """Some combinations of settings DeepSpeed refuses only while it builds its engine, with an assertion."""
    try:
        yield
    except (AssertionError, NotImplementedError, ValueError, ZeRORuntimeException) as e:
        if not config.engine.deepspeed:
            raise
        raise ConfigError(
            f"engine.deepspeed: DeepSpeed {deepspeed.__version__} refuses these settings ({e}); change or remove"
            f" {', '.join(path for path, _ in flattened(config.engine.deepspeed))}"
        ) from e


def _initialize(module: nn.Module, adamw: torch.optim.Optimizer, settings: dict[str, Any]) -> tuple[Any, Any]:
    """DeepSpeed's engine and optimizer over the process group that exists."""
    # On a CPU DeepSpeed would compile a shared-memory all-reduce for inference (30 s, needs a compiler); gloo serves.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.ERROR)  # it warns that our AdamW is not a class it knows
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    with contextlib.redirect_stdout(io.StringIO()):  # one of its optimizers prints memory tables while it is built
        engine, optimizer, _, _ = deepspeed.initialize(model=module, optimizer=adamw, config=settings, mpu=Mpu())
    logger.setLevel(logging.WARNING)
    return engine, optimizer


def _stage_in_fp32(optimizer: Any, dtype: torch.dtype) -> None:
    """Make ZeRO 2 collect gradients for its reduction in fp32: it would round them to the parameters' dtype there.

    Its buffer's dtype is the answer of one method; ZeRO 1 and 3 collect in fp32 by themselves.
    """
    if dtype == torch.bfloat16 and hasattr(optimizer, "_gradient_reduction_buffer_dtype"):
        optimizer._gradient_reduction_buffer_dtype = lambda: torch.float32


def _look_for_overflow_once(optimizer: Any) -> None:
    """Let ZeRO 1 and 2 look for gradients that are not finite by the norm of each, in a few kernels.

    Their own way writes three masks and a copy of every gradient: at 0.4 billion parameters, on one H100, several
    milliseconds and a thousand kernels a step.
    """

    def found() -> Tensor:
        grads = [g for group in optimizer.averaged_gradients.values() for g in group or () if g is not None]
        norms = torch.stack(torch._foreach_norm(grads)) if grads else torch.zeros(1, device=optimizer.device)
        return ~norms.isfinite().all().view(1)

    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        optimizer.has_overflow_partitioned_grads_serial = found


def _place_steps(adamw: torch.optim.Optimizer) -> None:
    """Put AdamW's step counters beside their parameters, as its fused step wants them; one counter for each."""
    for parameter, state in adamw.state.items():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].to(parameter.device, copy=True)


def _sum_partial_gradients(model: GPTModel) -> None:
    """Sum over tensor-parallel ranks what Megatron's finalize_model_grads would sum, before ZeRO sees it."""
    group = parallel_state.get_tensor_model_parallel_group()

    def summed(grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad, group=group)
        return grad

    for _, parameter in tp_partial_parameters(model):
        parameter.register_hook(summed)
