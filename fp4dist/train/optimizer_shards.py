"""What the tensors of each engine's optimizer are, for the parts of a recipe that act around its step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor, nn

from fp4dist.errors import ConfigError
from fp4dist.megatron.chunks import layer_offset
from fp4dist.megatron.upstream import GPTModel, parallel_state, tensor_parallel
from fp4dist.nn.apply import AppliedRecipe
from fp4dist.nn.optimizer import OptimizerControl, targets_by_weight
from fp4dist.nn.shards import LocalWeight, Shard, ShardMap
from fp4dist.nn.sites import named_parameters

_EMBEDDING = "embedding.word_embeddings.weight"
_PREFIX = "optimizer.control"  # of what a control's slices are called in a checkpoint


def megatron_control(
    optimizer: Any, chunks: Sequence[GPTModel], applied: AppliedRecipe, total_steps: int
) -> OptimizerControl:
    """The control of Megatron's chained DistributedOptimizers, whose fp32 tensors are flat pieces of parameters.

    Every piece is on one of the ranks that hold a parameter alike, so no element is seen twice; what tensor-parallel
    ranks hold alike is counted on the first.
    """
    names, targets = _names(chunks), targets_by_weight(applied)
    shards, weights, owners = {}, {}, {}
    for part in _filled(optimizer):
        pieces = part.model_param_group_index_map
        for parameter, (group, position) in pieces.items():
            tensor = part.optimizer.param_groups[group]["params"][position]
            piece = part._get_model_param_range_map(parameter)["param"]
            shards[tensor] = Shard(
                name=names[id(parameter)],
                parameter=parameter,
                start=piece.start,
                stop=piece.end,
                counted=_counted(parameter),
                target=targets.get(id(parameter)),
            )
        owners |= {id(p): part.data_parallel_group for buffer in part.buffers for p in buffer.params}
    for parameter in _parameters(chunks):
        weights[names[id(parameter)]] = LocalWeight(parameter, owners[id(parameter)])
    inner = [part.optimizer for part in _filled(optimizer)]
    return OptimizerControl(ShardMap(applied, inner, shards, weights, total_steps, collective=True))


def deepspeed_control(
    optimizer: Any, adamw: torch.optim.Optimizer, chunks: Sequence[GPTModel], applied: AppliedRecipe, total_steps: int
) -> OptimizerControl:
    """The control of AdamW under DeepSpeed without ZeRO: whole local parameters, or fp32 copies of them in bf16 runs.

    optimizer   DeepSpeed's, `adamw` itself in fp32. All data-parallel ranks hold the same; the first of them counts
    """
    names, targets = _names(chunks), targets_by_weight(applied)
    first = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    shards, weights = {}, {}
    for tensor, parameter in _pairs(optimizer, adamw):
        name = names[id(parameter)]
        counted = first and _counted(parameter) and (".local_experts." not in name or _first_of_tensor_parallel())
        shards[tensor] = Shard(name, parameter, 0, parameter.numel(), counted, targets.get(id(parameter)))
        weights[name] = LocalWeight(parameter)
    return OptimizerControl(ShardMap(applied, [adamw], shards, weights, total_steps, collective=True))


def lend_gradients(control: OptimizerControl) -> None:
    """Let each fp32 copy of a bf16 parameter share the parameter's gradient, which DeepSpeed gives it only later."""
    for tensor, shard in control.shards.shards.items():
        if tensor is not shard.parameter:
            if shard.parameter.grad is None:  # DeepSpeed updates by zeros then
                shard.parameter.grad = torch.zeros_like(shard.parameter, dtype=torch.float32)
            tensor.grad = shard.parameter.grad


@contextlib.contextmanager
def already_stepped(optimizer: Any) -> Iterator[None]:
    """Inside, Megatron's step makes the model's weights from the masters without updating these again."""
    inner = [part.optimizer for part in _filled(optimizer)]
    for one in inner:
        one.step = lambda *_, **__: None
    try:
        yield
    finally:
        for one in inner:
            del one.step


def step_masters(optimizer: Any) -> None:
    """The first half of Megatron's step: update the masters by their gradients."""
    for part in _filled(optimizer):
        part.optimizer.step()


def sharded_slices(control: OptimizerControl, model: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """What the control keeps under `keys` as Megatron's sharded tensors, in the shapes of the parameters.

    model   the sharded state dict of the chunks, whose tensors are the parameters themselves
    returns key -> name -> sharded tensor; all ranks that hold pieces of a parameter call this together
    """
    records = {id(record.data): record for record in nested_values(cast("dict[Any, Any]", model))}
    found: dict[str, Any] = {}
    for key in keys:
        found[key] = {}
        for name, whole in control.shards.gather(key).items():
            record = records[id(control.shards.weights[name].parameter)]
            changes: dict[str, Any] = {"key": f"{_PREFIX}.{key}.{record.key}", "data": whole, "dtype": whole.dtype}
            if isinstance(record, ShardedTensorFactory):
                del changes["dtype"]
            found[key][name] = replace(record, **changes)
    return found


def written_slices(control: OptimizerControl) -> list[str]:
    """Which of the control's keys any rank has something under now; what a window keeps is there while it is open."""
    state = control.shards.state
    there = [any(key in state(tensor) for tensor in control.shards.shards) for key in control.slices]
    flags = torch.tensor(there, dtype=torch.float32, device=control.shards.device)
    if control.shards.collective and there:
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return [key for key, flag in zip(control.slices, flags.tolist(), strict=True) if flag]


def saved_slices(control: OptimizerControl, folder: Path) -> list[str]:
    """Which of the control's keys a checkpoint holds."""
    if not control.slices:
        return []
    there = dist_checkpointing.load_tensors_metadata(str(folder))
    return [key for key in control.slices if any(name.startswith(f"{_PREFIX}.{key}.") for name in there)]


def _filled(optimizer: Any) -> list[Any]:
    """Megatron's chained optimizers without those that stand for experts of other pipeline stages."""
    return [part for part in optimizer.chained_optimizers if part.buffers and part.optimizer is not None]


def _parameters(chunks: Sequence[GPTModel]) -> list[nn.Parameter]:
    return [p for chunk in chunks for p in chunk.parameters() if p.requires_grad]


def _names(chunks: Sequence[GPTModel]) -> dict[int, str]:
    """Whole-model names by id(); the copy of tied embeddings on the last pipeline stage is the embedding."""
    return {
        id(parameter): _EMBEDDING if getattr(parameter, "shared", False) else name
        for chunk in chunks
        for name, parameter in named_parameters(chunk, layer_offset(chunk))
    }


def _pairs(optimizer: Any, adamw: torch.optim.Optimizer) -> Iterator[tuple[Tensor, nn.Parameter]]:
    """(tensor that AdamW updates, parameter of the model)."""
    if optimizer is adamw:
        for group in adamw.param_groups:
            yield from ((p, p) for p in group["params"])
        return
    if not (hasattr(optimizer, "fp32_groups") and hasattr(optimizer, "fp16_groups")):
        raise ConfigError(
            f"engine.kind = deepspeed with zero_stage 0: DeepSpeed's {type(optimizer).__name__} keeps no fp32 copy for"
            " each parameter, which the recipe works on; use engine.kind: megatron, or train.dtype: fp32"
        )
    for masters, parameters in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
        yield from zip(masters, parameters, strict=True)


def _counted(parameter: nn.Parameter) -> bool:
    """Whether this rank, of those that hold the parameter alike by tensor or pipeline parallelism, counts it."""
    if getattr(parameter, "shared", False):  # the last stage's copy of tied embeddings
        return False
    if not getattr(parameter, "allreduce", True):  # an expert's: ranks of one expert data group hold its pieces
        return True
    return tensor_parallel.param_is_not_tensor_parallel_duplicate(parameter)


def _first_of_tensor_parallel() -> bool:
    return parallel_state.get_tensor_model_parallel_rank() == 0
