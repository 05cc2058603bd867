"""A GPT of 0.1 M parameters and its batches, for every test of fp4dist.megatron."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fp4dist.spec.load import load_recipe
from fp4dist.spec.run import (
    DataConfig,
    ModelConfig,
    MoeConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    RunSection,
    TrainConfig,
)

VOCAB, SEQUENCE = 96, 32
MODEL: dict[str, Any] = dict(  # also of tests/train, with other vocabularies
    name="tiny",
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=VOCAB,
    seq_length=SEQUENCE,
)


def tiny_model(**changes: Any) -> ModelConfig:
    """Two layers of grouped-query attention; any field can be changed."""
    return ModelConfig(**(MODEL | changes))


def tiny_experts(**changes: Any) -> dict[str, Any]:
    """Fields of a ModelConfig with four experts, wide enough for every recipe's blocks."""
    moe: dict[str, Any] = dict(num_experts=4, top_k=2, ffn_hidden_size=128)
    return dict(hidden_size=128, ffn_hidden_size=256, moe=MoeConfig(**(moe | changes)))


def tiny_run(
    tp: int = 1, pp: int = 1, sequence_parallel: bool = False, seed: int = 1, ep: int = 1, **model: Any
) -> RunConfig:
    """A run of the tiny model with recipe bf16."""
    return RunConfig(
        run=RunSection(name="tiny", seed=seed),
        model=tiny_model(**model),
        data=DataConfig(train=("unused",)),
        optim=OptimConfig(lr=1e-3),
        train=TrainConfig(steps=3, global_batch_size=2, micro_batch_size=2, dtype="fp32"),
        recipe=load_recipe("bf16"),
        parallel=ParallelConfig(tp=tp, pp=pp, ep=ep, sequence_parallel=sequence_parallel),
    )


def tiny_batch(seed: int = 0, size: int = 2, vocab: int = VOCAB) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, position_ids, labels, each int64 [size, SEQUENCE]."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, vocab, (size, SEQUENCE + 1), generator=generator)
    positions = torch.arange(SEQUENCE).expand(size, -1).contiguous()
    return text[:, :-1].contiguous(), positions, text[:, 1:].contiguous()


def loss_of(model: nn.Module, seed: int = 0, vocab: int = VOCAB) -> Tensor:
    """Mean loss of one batch."""
    tokens, positions, labels = tiny_batch(seed, vocab=vocab)
    return model(tokens, positions, None, labels=labels).float().mean()
