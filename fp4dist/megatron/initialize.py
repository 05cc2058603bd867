"""Initial weights that depend on the seed and on the parameter's name only.

Megatron draws weights in the order in which a rank builds its layers, so tensor, pipeline and device placement change
them. Here each weight is drawn whole, in fp32, on the CPU, by a generator of its own, and each rank keeps its shard:
a model starts from the same weights under every TP, PP and EP, on a CPU and on a GPU, which makes their losses
comparable. An expert's name carries its global number.
Costs 7 ns a weight and rank: 2.5 s for 350M parameters.

The distribution is Megatron's: normal with standard deviation init_std, divided by sqrt(2 * num_layers) for the two
projections that write to the residual stream; norms start at one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fp4dist.megatron.chunks import layer_offset
from fp4dist.megatron.upstream import GPTModel, SequentialMLP
from fp4dist.nn.sites import expert_path, global_path
from fp4dist.spec.run import ModelConfig, RunConfig

EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"
RESIDUAL = ("self_attention.linear_proj.weight", ".linear_fc2.weight")  # of MLPs, experts and shared experts


def keep_values(weight: Tensor) -> Tensor:
    """The init_method that Megatron gets: it marks the weight as sharded, and initialize_weights fills it later."""
    return weight


@torch.no_grad()
def initialize_weights(model: GPTModel, config: RunConfig) -> None:
    """Fill every matrix of this rank's part of the model in place; vectors (norms) keep their ones.

    Rows that pad the vocabulary are zero. Two copies of a tied embedding on two pipeline stages get the same values.
    """
    group = model.pg_collection.tp
    for name, parameter in global_parameters(model):
        if parameter.dim() != 2:
            continue
        if name == HEAD and config.model.tie_embeddings:
            name = EMBEDDING
        if not getattr(parameter, "tensor_model_parallel", False) or ".local_experts." in name:  # whole on every rank
            parameter.copy_(_draw(name, (parameter.shape[0], parameter.shape[1]), config))
            continue
        full = _draw(name, _global_shape(name, parameter, group.size(), config.model), config)
        parameter.copy_(_shard(full, parameter, group.rank(), group.size()))


def global_parameters(model: GPTModel) -> Iterator[tuple[str, nn.Parameter]]:
    """named_parameters() with the layer and expert numbers of the whole model instead of this rank's."""
    first = layer_offset(model)
    experts = {
        name: module.ep_group.rank() * module.num_local_experts
        for name, module in model.named_modules()
        if isinstance(module, SequentialMLP)
    }
    for name, parameter in model.named_parameters():
        yield global_path(expert_path(name, experts), first), parameter


def _draw(name: str, shape: tuple[int, int], config: RunConfig) -> Tensor:
    """A whole matrix [rows, columns] fp32 on the CPU."""
    std = config.model.init_std
    if name.endswith(RESIDUAL):
        std /= math.sqrt(2.0 * config.model.num_layers)
    digest = hashlib.blake2b(f"{config.run.seed}:{name}".encode(), digest_size=4).digest()
    # torch's CPU generator uses 32 bits of a seed
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator)


def _global_shape(name: str, parameter: nn.Parameter, tp: int, model: ModelConfig) -> tuple[int, int]:
    """Rows and columns over all tensor-parallel ranks, without the rows that pad the vocabulary."""
    shape = list(parameter.shape)
    shape[getattr(parameter, "partition_dim")] *= tp  # noqa: B009 - a mark on a tensor
    if name in (EMBEDDING, HEAD):
        shape[0] = model.vocab_size
    return shape[0], shape[1]


def _shard(full: Tensor, parameter: nn.Parameter, rank: int, tp: int) -> Tensor:
    """This rank's part, cut as Megatron cuts it: `partition_stride` interleaved pieces (2 for SwiGLU's gate and up)."""
    dim, pieces = getattr(parameter, "partition_dim"), getattr(parameter, "partition_stride")  # noqa: B009
    missing = parameter.size(dim) * tp - full.size(dim)
    if missing:  # the vocabulary's padding
        full = torch.cat([full, full.new_zeros(missing, full.size(1))])
    chunks = full.split(parameter.size(dim) // pieces, dim)
    return torch.cat(chunks[rank::tp], dim)
