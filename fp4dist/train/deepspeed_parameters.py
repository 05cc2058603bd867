"""A rank's parameters as DeepSpeed has to see them: under the names of the whole model, and with what it needs to know.

Megatron numbers the layers of a pipeline stage from 0 and gives the last stage a copy of tied embeddings of its own.
DeepSpeed keys its checkpoints by name, so stages are presented to it under global names; then
`deepspeed/checkpoint/ds_to_universal.py` can put any layout together, and any other layout can take it apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from deepspeed.checkpoint.constants import (
    ORIGINAL_VOCAB_SIZE,
    PARAMETER_WITH_2_SUB_PARAMS_CAT_DIM_0,
    PARAMETER_WITH_ROW_PARALLELISM_PATTERNS,
    PIPELINE_REPLICATED_PARAMETER_PATTERNS,
    TP_REPLICATED_PARAMETER_PATTERNS,
    UNIVERSAL_CHECKPOINT_VERSION_KEY,
    UNIVERSAL_CHECKPOINT_VERSION_VALUE,
    VOCABULARY_PARAMETER_PATTERNS,
)
from torch import Tensor, nn

from fp4dist.errors import CheckpointError
from fp4dist.megatron.chunks import layer_offset
from fp4dist.megatron.upstream import GPTModel, parallel_state
from fp4dist.nn.sites import global_path
from fp4dist.spec.run import RunConfig

_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
_PLACEHOLDER = "._extra_state"


class StageParameters(nn.Module):
    """The parameters and saved buffers of this rank's pipeline chunks in one module that has no forward.

    The tensors are the chunks' own. Names are those of the model without a pipeline: decoder.layers counts all layers,
    and the last stage's copy of tied embeddings is the embedding.
    """

    def __init__(self, chunks: Sequence[GPTModel]) -> None:
        super().__init__()
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                node, leaf = self._node(_whole_name(chunk, name))
                node.register_parameter(leaf, parameter)
            saved = chunk.state_dict(keep_vars=True)
            for name, buffer in chunk.named_buffers():
                if name in saved:
                    node, leaf = self._node(_whole_name(chunk, name))
                    node.register_buffer(leaf, buffer)

    def _node(self, name: str) -> tuple[nn.Module, str]:
        """The submodule that holds `name`, made if need be, and the last part of the name."""
        *path, leaf = name.split(".")
        node: nn.Module = self
        for part in path:
            if part not in node._modules:
                node.add_module(part, nn.Module())
            node = cast(nn.Module, node._modules[part])
        return node, leaf


def tied_embedding(chunks: Sequence[GPTModel]) -> nn.Parameter | None:
    """This rank's copy of embeddings that the first and the last pipeline stage share; None where there is none.

    The last stage's copy is marked, so that DeepSpeed's gradient norm counts the parameter once.
    """
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    if stages == 1 or not chunks[0].share_embeddings_and_output_weights:
        return None
    for chunk in chunks:
        if chunk.pre_process or chunk.post_process:
            weight = cast(nn.Parameter, chunk.shared_embedding_or_output_weight())
            weight.ds_pipe_replicated = not chunk.pre_process  # type: ignore[attr-defined]
            return weight
    return None


def counted_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that this rank adds to a norm over one replica: each shard, and each whole one on one rank."""
    first = parallel_state.get_tensor_model_parallel_rank() == 0
    for parameter in module.parameters():
        whole = not getattr(parameter, "tensor_model_parallel", False)
        if (first or not whole) and not getattr(parameter, "ds_pipe_replicated", False):
            yield parameter


def keep_gradients_fp32(module: nn.Module) -> None:
    """Let `.grad` of bf16 parameters be fp32.

    A weight gradient that our autograd function has in fp32 then reaches ZeRO's fp32 accumulation without being rounded
    to bf16, and several micro-batches add up in fp32 also where DeepSpeed leaves that to torch (ZeRO 0). To be called
    when DeepSpeed's optimizer exists: some of them assign bf16 gradients once, to make their state.
    """
    for parameter in module.parameters():
        if parameter.dtype == torch.bfloat16:
            parameter.grad_dtype = torch.float32


def save_tensors_only(module: nn.Module) -> None:
    """Leave Megatron's placeholders for Transformer Engine's state, all None, out of the module's state dict.

    ds_to_universal.py takes every entry for a tensor.
    """

    def without_placeholders(_: nn.Module, state: dict[str, Any], *__: Any) -> None:
        for key in [key for key, value in state.items() if value is None and key.endswith(_PLACEHOLDER)]:
            del state[key]

    module.register_state_dict_post_hook(without_placeholders)


def load_tensors(src: dict[str, Any], dst: nn.Module) -> None:
    """Load a state dict with or without those placeholders; every tensor must be there, and no other."""
    missing, unexpected = dst.load_state_dict(src, strict=False)
    wrong = [key for key in (*missing, *unexpected) if not key.endswith(_PLACEHOLDER)]
    if wrong:
        raise CheckpointError(
            f"checkpoint: its parameters are not this model's ({len(wrong)} names differ, such as {wrong[0]});"
            " use a checkpoint of the same model"
        )


def universal_info(config: RunConfig, module: nn.Module) -> dict[str, Any]:
    """What ds_to_universal.py has to know to join the shards of tensor and pipeline parallelism.

    module   this rank's parameters under whole-model names; all ranks of a replica call this together
    """
    kinds: dict[str, set[str]] = {
        key: set()
        for key in (
            TP_REPLICATED_PARAMETER_PATTERNS,
            PARAMETER_WITH_ROW_PARALLELISM_PATTERNS,
            PARAMETER_WITH_2_SUB_PARAMS_CAT_DIM_0,
            VOCABULARY_PARAMETER_PATTERNS,
            PIPELINE_REPLICATED_PARAMETER_PATTERNS,
        )
    }
    for name, parameter in module.named_parameters():
        for kind in _kinds(name, parameter, config):
            kinds[kind].add(_pattern(name))
    pipeline = cast(dist.ProcessGroup, parallel_state.get_pipeline_model_parallel_group())
    stages: list[Any] = [None] * dist.get_world_size(pipeline)
    dist.all_gather_object(stages, kinds, group=pipeline)
    return {
        UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE,
        ORIGINAL_VOCAB_SIZE: config.model.vocab_size,
        **{key: sorted(set().union(*(stage[key] for stage in stages))) for key in kinds},
    }


def _kinds(name: str, parameter: Tensor, config: RunConfig) -> Iterator[str]:
    """The lists of ds_to_universal.py that a parameter belongs to; one in none of them is cut along its rows."""
    if not getattr(parameter, "tensor_model_parallel", False):
        yield TP_REPLICATED_PARAMETER_PATTERNS
    elif getattr(parameter, "partition_dim", 0) == 1:
        yield PARAMETER_WITH_ROW_PARALLELISM_PATTERNS
    elif name.endswith("linear_fc1.weight"):
        yield PARAMETER_WITH_2_SUB_PARAMS_CAT_DIM_0  # SwiGLU's gate and up, each cut by itself
    if name in (_EMBEDDING, _HEAD):
        yield VOCABULARY_PARAMETER_PATTERNS
    if name == _EMBEDDING and config.model.tie_embeddings:
        yield PIPELINE_REPLICATED_PARAMETER_PATTERNS


def _pattern(name: str) -> str:
    """A regular expression for this parameter in every layer and expert."""
    return re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name)) + "$"


def _whole_name(chunk: GPTModel, name: str) -> str:
    """The name that a chunk's parameter has in a model without a pipeline."""
    if name == _HEAD and chunk.share_embeddings_and_output_weights and not chunk.pre_process:
        return _EMBEDDING
    return global_path(name, layer_offset(chunk))
