"""The model as known from its config equals the model that is built."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fp4dist.megatron.sites import count_parameters, flops_per_token, gpt_sites
from fp4dist.spec.run import ModelConfig
from tests.distributed import megatron_groups, run_ranks
from tests.megatron.tiny import tiny_experts, tiny_model, tiny_run

VARIANTS: list[dict[str, Any]] = [
    {},
    {"tie_embeddings": True},
    {"qk_norm": True, "num_query_groups": None},
    {"head_dim": 8, "num_layers": 3, "ffn_hidden_size": 96},
    tiny_experts(),
    tiny_experts(shared_ffn_hidden_size=64, first_dense_layers=1, num_experts=3, top_k=1),
]


@pytest.mark.distributed
def test_sites_and_parameters_are_those_of_the_model() -> None:
    for changes, (linears, parameters) in zip(VARIANTS, run_ranks(build, 1)[0], strict=True):
        model = tiny_model(**changes)
        assert {site.path: (site.in_features, site.out_features) for site in gpt_sites(model)} == linears
        assert count_parameters(model) == parameters


def build() -> list[tuple[dict[str, tuple[int, int]], int]]:
    """For each variant: path -> (in, out) of every linear, and the number of parameters."""
    from fp4dist.megatron.provider import build_gpt
    from fp4dist.megatron.upstream import ColumnParallelLinear, RowParallelLinear, TopKRouter

    found = []
    with megatron_groups():
        for changes in VARIANTS:
            model = build_gpt(tiny_run(**changes), torch.float32, linears="megatron")
            linears = {
                name: (module.input_size, module.output_size)
                for name, module in model.named_modules()
                if isinstance(module, ColumnParallelLinear | RowParallelLinear)
            }
            linears |= {
                name: (module.weight.shape[1], module.weight.shape[0])
                for name, module in model.named_modules()
                if isinstance(module, TopKRouter)
            }
            found.append((linears, sum(parameter.numel() for parameter in model.parameters())))
    return found


def test_order_roles_and_layers() -> None:
    sites = gpt_sites(tiny_model())
    assert [site.role for site in sites] == ["qkv", "proj", "fc1", "fc2"] * 2 + ["head"]
    assert [site.layer for site in sites] == [0] * 4 + [1] * 4 + [None]


def test_experts_in_forward_order() -> None:
    model = tiny_model(**tiny_experts(num_experts=2, shared_ffn_hidden_size=64, first_dense_layers=1))
    roles = [site.role for site in gpt_sites(model)]
    assert roles == ["qkv", "proj", "fc1", "fc2", "qkv", "proj", "router", *["expert"] * 4, "fc1", "fc2", "head"]
    assert [site.pieces for site in gpt_sites(model)][7:13] == [2, 1] * 3


def test_a_token_costs_the_experts_that_it_passes() -> None:
    """One of four experts with the dense model's MLP: the dense model's cost and the router's."""
    dense = tiny_model(hidden_size=128, ffn_hidden_size=128)
    moe = tiny_model(**(tiny_experts(top_k=1) | {"ffn_hidden_size": 128}))
    assert flops_per_token(moe) == flops_per_token(dense) + 6 * 2 * 4 * 128
    assert count_parameters(moe) == count_parameters(dense) + 2 * (3 * 3 * 128 * 128 + 4 * 128)


def test_a_known_model() -> None:
    """GPT-2 small's shape with SwiGLU, worked out by hand."""
    model = ModelConfig(
        name="m",
        num_layers=12,
        hidden_size=768,
        ffn_hidden_size=2048,
        num_attention_heads=12,
        vocab_size=32768,
        seq_length=1024,
        tie_embeddings=True,
    )
    per_layer = 4 * 768 * 768 + 3 * 768 * 2048
    assert count_parameters(model) == 12 * (per_layer + 2 * 768) + 768 + 32768 * 768
    assert flops_per_token(model) == 6 * (12 * per_layer + 32768 * 768) + 6 * 12 * 1024 * 768
