"""Megatron's own engine: DistributedDataParallel, distributed optimizer, pipeline schedules, torch_dist checkpoints.

Gradients accumulate and reduce in fp32, master weights and moments are fp32 and sharded over data-parallel ranks.
Experts have buffers and an optimizer of their own, over the ranks that hold the same ones; Megatron chains the two.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.utils import get_model_config
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from fp4dist.errors import CheckpointError, ConfigError
from fp4dist.megatron.chunks import layer_offset
from fp4dist.megatron.gradient_reduce import CodedGradientReduce
from fp4dist.megatron.multi_tensor import use_foreach
from fp4dist.megatron.param_delta import CodedParamGather
from fp4dist.megatron.param_gather import Fp4ParamGather
from fp4dist.megatron.upstream import GPTModel, parallel_state
from fp4dist.nn.apply import AppliedRecipe
from fp4dist.nn.optimizer import OptimizerControl
from fp4dist.nn.triage import Triage, triage
from fp4dist.spec.run import RunConfig
from fp4dist.train import optim
from fp4dist.train.checkpoint import causes, random_states, restore_random_states, vet_torch_dist
from fp4dist.train.communication import code_activations, make_compression
from fp4dist.train.data import Batch
from fp4dist.train.engine import ReplicaWatch, StepResult, Watching, finite, replicas
from fp4dist.train.graphs import GraphedSchedule, record_on, wanted
from fp4dist.train.noise import NoiseProbe
from fp4dist.train.optimizer_shards import (
    already_stepped,
    megatron_control,
    saved_slices,
    sharded_slices,
    step_masters,
    written_slices,
)
from fp4dist.train.schedule import PipelineSchedule
from fp4dist.train.world import World

log = logging.getLogger("fp4dist")


class MegatronEngine:
    """One pipeline stage of a GPTModel, in one chunk or parallel.vpp of them, under Megatron's data parallelism."""

    def __init__(
        self, config: RunConfig, world: World, chunks: Sequence[GPTModel], applied: AppliedRecipe, dtype: torch.dtype
    ) -> None:
        self.config, self.world, self.applied = config, world, applied
        self._micro_batches = config.train.global_batch_size // (config.train.micro_batch_size * world.dp_size)
        self._watches = [ReplicaWatch(chunk) for chunk in chunks]
        graphed, self._why = wanted(config, world, applied)
        log.info("micro-batches as CUDA graphs: %s (%s)", "yes" if graphed else "no", self._why)
        overlap = config.engine.overlap and _replicated(config, world) and not graphed
        self._sharded = config.optim.kind == "adamw"  # Megatron's DistributedOptimizer takes no other
        at_once = config.recipe.watches_weights
        self._overlap = overlap and self._sharded and not at_once  # gather weights in the next forward pass
        if overlap and at_once:
            log.info("engine.overlap: not of the gather, recipe %s looks at new weights at once", config.recipe.name)
        stream = torch.cuda.Stream(world.device) if graphed else None
        with _on(stream):  # gradients are accumulated on the stream on which DDP asks for them first
            self._chunks = _wrap(
                chunks, world, overlap_reduce=overlap, overlap_gather=self._overlap, sharded=self._sharded
            )
        use_foreach()
        self.compression, self._delta = make_compression(config), None
        if self.compression is not None:
            if "grad_reduce" in self.compression.config.active:
                CodedGradientReduce(self._chunks, self.compression)
            if "param_gather" in self.compression.config.active:
                self._delta = CodedParamGather(self._chunks, self.compression)
            code_activations(config, world, chunks, applied, self.compression, dtype)
        self._optimizer = _make_optimizer(self._chunks, config, dtype, overlap=self._overlap)
        self._control: OptimizerControl | None = None
        if config.recipe.steers_optimizer:
            self._control = megatron_control(self._optimizer, chunks, applied, config.train.steps)
        self._learning_rate = optim.make_schedule(self._optimizer, config, applied.phases)
        self._schedule = PipelineSchedule(config, world, self._chunks, applied, self.compression)
        if self.compression is not None:
            log.info("%s", self.compression.confirm(replicas()))
        self._graphs: GraphedSchedule | None = None
        if stream is not None:
            strict = config.train.cuda_graph is True
            self._graphs = GraphedSchedule(self._schedule, applied, world, record_on(stream), strict=strict)
        self.judge: Callable[[float, float | None], bool] | None = None
        self.host_seconds = 0.0  # until forward and backward of the last step were launched
        self._gather = Fp4ParamGather(self._chunks, applied) if config.engine.fp4_param_gather else None
        if self._gather is not None:
            log.info("%s", self._gather.report())
        inner = [o.optimizer for o in self._optimizer.chained_optimizers if o.optimizer is not None]
        kind = type(self._optimizer.chained_optimizers[0]).__name__
        self.optimizer_name = f"{', '.join(map(optim.describe, inner))} under Megatron's {kind}"

    def train_step(self, step: int, batches: Iterator[Batch]) -> StepResult:
        """Forward and backward over this rank's micro-batches, then the update, unless something is not finite."""
        for chunk in self._chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        if self.compression is not None:
            self.compression.begin_step(self.applied.clock.step)
        lr = optim.place_schedule(self._learning_rate, step)
        begin = time.perf_counter()
        if self._graphs is not None:
            sums = self._graphs.run(batches, self._micro_batches)
        else:
            sums = self._schedule.run(batches, 0, self._micro_batches, forward_only=False)
        self.host_seconds = time.perf_counter() - begin
        self._optimizer.prepare_grads()  # work of the host while the device is still in backward
        norm = float(self._optimizer.get_grad_norm())  # the first to wait for the device
        loss, tokens = self._schedule.global_mean(sums)
        skipped = not finite(loss, norm)
        if self.config.parallel.tp > 1:
            found = [watch.found_bad() for watch in self._watches]
            skipped = self.world.any(any(found) or skipped)
        lost = self.applied.lost()
        inexact = lost > 0 and self.config.backend.strict_exact and not skipped
        refused = not (skipped or inexact) and self.judge is not None and self.judge(loss, norm)
        if skipped or inexact or refused:
            self._optimizer.zero_grad()
        else:
            self._update(norm)
        skipped = skipped or inexact or refused
        return StepResult(
            loss=loss,
            grad_norm=norm,
            skipped=skipped,
            tokens=tokens,
            lr=lr,
            lost=lost,
            inexact=inexact,
            refused=refused,
            traffic=self.compression.finish_step(skipped=skipped) if self.compression is not None else None,
        )

    @property
    def graphs(self) -> str:
        """Whether micro-batches are replayed as CUDA graphs, for people."""
        if self._graphs is None:
            return f"eager ({self._why})"
        if self._graphs.failure is not None:
            return f"eager (recording failed: {self._graphs.failure})"
        return f"CUDA graphs ({self._graphs.replays} micro-batches so far)"

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Batch]) -> float:
        """Mean loss over the tokens of `batches` on all ranks."""
        if self._gather is None:  # codes are gathered by the first forward pass, whole weights are not needed
            self._finish_gathers()
        for chunk in self._chunks:
            chunk.eval()
        sums, done = torch.zeros(2, dtype=torch.float64, device=self.world.device), 0
        while group := list(islice(batches, self._micro_batches)):
            sums += self._schedule.run(iter(group), done, len(group), forward_only=True)
            done += len(group)
        for chunk in self._chunks:
            chunk.train()
        return self._schedule.global_mean(sums)[0]

    def retrace(self, batches: Iterator[Batch]) -> Triage:
        """See `Engine.retrace`; the gradients of this run are thrown away."""
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        models = [chunk.module for chunk in self._chunks]
        with triage(models, clock=self.applied.clock, layer_offset=[layer_offset(model) for model in models]) as found:
            self._schedule.run(batches, 0, self._micro_batches, forward_only=False)
        for watch in self._watches:
            watch.found_bad()  # forget what it saw now
        self._optimizer.zero_grad()
        return found

    def probe(self, batches: Iterator[Batch]) -> float:
        """See `Engine.probe`."""
        ratio = self.observe(batches, nullcontext, True)
        assert ratio is not None
        return ratio

    def observe(self, batches: Iterator[Batch], watching: Watching, noise: bool) -> float | None:
        """See `Engine.observe`."""
        for chunk in self._chunks:
            chunk.train()
        ratio = NoiseProbe(
            self.config, self.world, self._chunks, self._optimizer, self._schedule, self.applied
        ).measure(batches, watching, compare=noise)
        for watch in self._watches:
            watch.found_bad()  # forget what it saw now
        return ratio if noise else None

    def save(self, folder: Path) -> None:
        """Write model, optimizer and random states with dist_checkpointing."""
        self._finish_gathers()
        slices: Sequence[str] = ()
        if self._control is not None:
            self._control.before_save()
            slices = written_slices(self._control)
        dist_checkpointing.save(self._sharded_state(is_loading=False, with_random=True, slices=slices), str(folder))

    def load(self, folder: Path, *, step: int, same_layout: bool) -> None:
        """Read them back into any parallel layout; random states only into the same one."""
        self.world.from_rank0(lambda: vet_torch_dist(folder))
        own = optim.own_settings(self._optimizer.param_groups)
        control = self._control
        slices = saved_slices(control, folder) if control is not None else []
        with torch.no_grad():  # fp32 master weights are views of the parameters, which are leaves
            wanted = self._sharded_state(is_loading=True, with_random=same_layout, slices=slices)
            state = _read(wanted, folder)
            for key, chunk in self._keyed_chunks():
                chunk.module.load_state_dict(state[key])
            parts = self._optimizer.chained_optimizers
            saved = state["optimizer"]
            if not self._sharded:
                self._optimizer.load_state_dict(saved)
            for i, part in enumerate(parts if self._sharded else ()):
                if part.buffers:  # else it stands for the experts of other pipeline stages
                    _restore_part(part, saved if len(parts) == 1 else saved[i])
            if control is not None:
                for key in slices:
                    control.shards.scatter(key, state["control"][key])
                control.after_load()
        optim.restore_settings(self._optimizer.param_groups, own)
        if self._delta is not None:
            self._delta.after_load()
        if same_layout:
            restore_random_states(state["random"])
        else:
            log.info("the parallel layout changed: random states start from run.seed (quantization noise needs none)")
        optim.place_schedule(self._learning_rate, step)

    def close(self) -> None:
        """Nothing outlives the process groups, nor its memory the engine.

        Megatron's rotary embeddings cache by module, whose hooks hold weights, gradients and the optimizer's.
        """
        for module in (m for chunk in self._chunks for m in chunk.modules()):
            forget = getattr(type(module).forward, "cache_clear", None)
            if forget is not None:
                forget()

    def _finish_gathers(self) -> None:
        """Whole weights on every rank now, where the gather of updated ones waits for the next forward pass."""
        if self._gather is not None:
            self._gather.restore()
        elif self._overlap:
            for chunk in self._chunks:
                chunk.start_param_sync(force_sync=True)

    def _update(self, norm: float) -> None:
        """Clip by a norm that is already known and step, as Megatron's ChainedOptimizer.step does.

        What the recipe does to gradients comes before clipping, which then goes by the norm of what that has made.
        """
        limit, control, step = self.config.optim.clip_grad, self._control, self.applied.clock.step
        if self._delta is not None:
            self._delta.before_update()
        if control is not None:
            control.before_step(step)
            norm = float(self._optimizer.get_grad_norm()) if limit > 0 else norm
        for part in self._optimizer.chained_optimizers:
            parameters = part.get_parameters()
            if limit > 0 and parameters:
                clip_grad_by_total_norm_fp32(parameters, max_norm=limit, total_norm=norm)
        if control is None:
            self._optimizer.step_with_ready_grads()
            return
        control.before_update(step)
        step_masters(self._optimizer)
        control.after_update(step)
        with already_stepped(self._optimizer):
            self._optimizer.step_with_ready_grads()
        control.settled(step)

    def _keyed_chunks(self) -> list[tuple[str, DistributedDataParallel]]:
        """The chunks under Megatron's names in a state dict; the names of their tensors do not depend on the layout."""
        if len(self._chunks) == 1:
            return [("model", self._chunks[0])]
        return [(f"model{i}", chunk) for i, chunk in enumerate(self._chunks)]

    def _sharded_state(self, *, is_loading: bool, with_random: bool, slices: Sequence[str]) -> dict[str, Any]:
        """The state as Megatron's sharded state dict; `slices` of the control's belong to it.

        Optimizer tensors have the shape of their parameters, so that they can be cut anew for another layout.
        """
        metadata = {"dp_cp_group": replicas(), "distrib_optim_sharding_type": "fully_reshardable"}
        state: dict[str, Any] = {
            key: cast(GPTModel, chunk.module).sharded_state_dict(metadata=metadata)
            for key, chunk in self._keyed_chunks()
        }
        model = state["model"] if len(self._chunks) == 1 else dict(state)
        state["optimizer"] = self._sharded_optimizer(model, is_loading=is_loading, metadata=metadata)
        if slices and self._control is not None:
            state["control"] = sharded_slices(self._control, model, slices)
        if with_random:
            state["random"] = self._sharded_random_states()
        return state

    def _sharded_optimizer(
        self, model: dict[str, Any], *, is_loading: bool, metadata: dict[str, Any]
    ) -> dict[Any, Any]:
        """ChainedOptimizer.sharded_state_dict, with its keys, also on a pipeline stage that holds no experts.

        There the optimizer of experts has no state and Megatron's state_dict() asserts that it has. It still gives its
        groups, which Megatron makes equal on all ranks: what is not sharded is saved by rank 0 for all.
        """
        parts = self._optimizer.chained_optimizers
        if not self._sharded:
            return self._optimizer.sharded_state_dict(model, is_loading, metadata={"dp_cp_group": replicas()})
        if len(parts) == 1:
            return parts[0].sharded_state_dict(model, is_loading, metadata=metadata)
        states: dict[Any, Any] = {}
        for i, part in enumerate(parts):
            if part.buffers:
                states[i] = part.sharded_state_dict(model, is_loading, metadata=metadata)
                add_prefix_for_sharding(states[i], f"chained_{i}.")
        steps = [g["step"] for state in states.values() for g in state["optimizer"]["param_groups"] if "step" in g]
        for i in set(range(len(parts))) - set(states):
            groups = [{k: v for k, v in group.items() if k != "params"} for group in parts[i].optimizer.param_groups]
            states[i] = {
                "optimizer": {"param_groups": [g | ({"step": steps[0]} if steps else {}) for g in groups]},
                "param_state_sharding_type": metadata["distrib_optim_sharding_type"],
            }
        return states

    def _sharded_random_states(self) -> ShardedObject:
        """This rank's generators. Those of ranks with the same part of the model are taken to be the same; which part
        of the experts a rank has does not follow from its other coordinates, so with ep every rank has its own.
        """
        p = self.config.parallel
        shape: tuple[int, ...] = (p.pp, p.tp)
        place: tuple[int, ...]
        place = (parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank())
        replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        if p.ep > 1:
            shape, place, replica = (*shape, dist.get_world_size(replicas())), (*place, replica), 0
        return ShardedObject("random", random_states(), shape, place, replica_id=replica)


@contextmanager
def _on(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Inside, work goes to `stream`, which takes its turn before and after; None: where it went anyway."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def _replicated(config: RunConfig, world: World) -> bool:
    """Whether gradients are reduced, and updated weights gathered, over more than one rank."""
    return world.dp_size * config.parallel.cp > 1


def _wrap(
    chunks: Sequence[GPTModel], world: World, *, overlap_reduce: bool, overlap_gather: bool, sharded: bool
) -> list[DistributedDataParallel]:
    """Data parallelism with fp32 gradients.

    overlap_reduce   reduce the gradients of a bucket while backward goes on
    overlap_gather   gather updated weights while the next forward pass runs
    sharded          each rank updates a part of the weights
    """
    config = get_model_config(chunks[0])
    wrapped = []
    for i, chunk in enumerate(chunks):
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=sharded,
            overlap_grad_reduce=overlap_reduce,
            overlap_param_gather=overlap_gather,
        )
        for name, parameter in chunk.named_parameters():
            if ".local_experts." in name:  # an optimizer of their own at ep 1 too, so that checkpoints have one form
                setattr(parameter, "allreduce", False)  # noqa: B010 - a mark on a tensor
        # as Megatron-LM: only the first chunk's communication is on the critical path and worth cutting in buckets
        wrapped.append(DistributedDataParallel(config, ddp, chunk.to(world.device), disable_bucketing=i > 0))
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = wrapped[0].no_sync if len(wrapped) == 1 else [chunk.no_sync for chunk in wrapped]
    return wrapped


def _make_optimizer(
    chunks: Sequence[DistributedDataParallel], config: RunConfig, dtype: torch.dtype, *, overlap: bool
) -> Any:
    """Megatron's optimizer with all its state in place, so that it can be saved before the first update."""
    o = config.optim
    sharded = o.kind == "adamw"
    settings = OptimizerConfig(
        optimizer="adam" if sharded else "sgd",
        lr=o.lr,
        min_lr=o.min_lr,
        weight_decay=o.weight_decay,
        adam_beta1=o.beta1,
        adam_beta2=o.beta2,
        adam_eps=o.eps,
        sgd_momentum=o.momentum,
        clip_grad=o.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=sharded,
        overlap_param_gather=overlap,
    )
    optimizer: Any = get_megatron_optimizer(settings, list(chunks), use_gloo_process_groups=False)
    for part in optimizer.chained_optimizers:
        if part.optimizer is not None:
            optim.use_fused_step(part.optimizer)
            optim.materialize_state(part.optimizer)
        elif not sharded:
            raise ConfigError(
                f"optim.kind = {o.kind} with parallel.pp = {config.parallel.pp}: a pipeline stage without experts has"
                " no optimizer for them, which Megatron's whole optimizers cannot save; use adamw, or pp 1"
            )
        if not sharded:
            part.init_state_fn = lambda inner, *_: optim.materialize_state(inner)  # Megatron has none for SGD
    return optimizer


def _read(wanted: dict[str, Any], folder: Path) -> dict[str, Any]:
    """dist_checkpointing.load with its ways to fail as ours."""
    try:
        return cast("dict[str, Any]", dist_checkpointing.load(wanted, str(folder)))
    except (CheckpointingException, CheckpointException, OSError) as e:
        raise CheckpointError(
            f"checkpoint {folder}: cannot be read ({causes(e)}); it is damaged, or of another optim.kind: use another"
            " checkpoint (checkpoint.load), or remove its folder: a run goes on from the newest that is left"
        ) from e


def _restore_part(part: Any, state: dict[str, Any]) -> None:
    """Load one DistributedOptimizer.

    Its own load_state_dict does not know torch's AdamW here (megatron-core 0.16 to 0.20): it looks for `step` among
    the reshardable tensors, where it is not, and gives all parameters one and the same `step` tensor, which each
    parameter's update would then advance. So `step` stays out of the way while the tensors are read, and comes back as
    copies. What a recipe keeps there stays out too: it is read by itself.
    """
    tensors = state.pop("param_state")
    state.pop("param_state_sharding_type")
    part.load_state_dict(state)
    inner: torch.optim.Optimizer = part.optimizer
    steps = {p: s.pop("step") for p, s in inner.state.items() if isinstance(s.get("step"), Tensor)}
    for kept in inner.state.values():
        for key in set(kept) - {"exp_avg", "exp_avg_sq"}:
            del kept[key]
    part.load_parameter_state_from_fully_reshardable(tensors)
    for p, step in steps.items():
        inner.state[p]["step"] = step.clone()
    optim.use_fused_step(inner)
