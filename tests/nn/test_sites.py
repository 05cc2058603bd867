"""Module paths -> roles and global layer numbers, the same words for Megatron, Hugging Face and plain models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fp4dist.errors import RecipeMismatch
from fp4dist.nn.linear import Fp4Linear
from fp4dist.nn.sites import (
    ROLE_NAMES,
    Fp4Module,
    LinearSite,
    check_numbers,
    find_linears,
    global_path,
    layer_of,
    role_of,
)
from fp4dist.spec.recipe import ROLES
from tests.tiny_llama import TinyLlama, make_sites

ROLE_TABLE = [
    # Megatron
    ("decoder.layers.3.self_attention.linear_qkv", "qkv"),
    ("decoder.layers.3.self_attention.linear_proj", "proj"),
    ("decoder.layers.3.mlp.linear_fc1", "fc1"),
    ("decoder.layers.3.mlp.linear_fc2", "fc2"),
    ("decoder.layers.3.mlp.experts.local_experts.0.linear_fc1", "expert"),
    ("decoder.layers.3.mlp.router", "router"),
    ("output_layer", "head"),
    ("embedding.word_embeddings", "embedding"),
    # Hugging Face: Llama, Mixtral, GPT-2, GPT-NeoX, Falcon, OPT
    ("model.layers.0.self_attn.q_proj", "qkv"),
    ("model.layers.0.self_attn.k_proj", "qkv"),
    ("model.layers.0.self_attn.v_proj", "qkv"),
    ("model.layers.0.self_attn.o_proj", "proj"),
    ("model.layers.0.mlp.gate_proj", "fc1"),
    ("model.layers.0.mlp.up_proj", "fc1"),
    ("model.layers.0.mlp.down_proj", "fc2"),
    ("model.layers.0.block_sparse_moe.experts.7.w1", "expert"),
    ("model.layers.0.block_sparse_moe.gate", "router"),
    ("lm_head", "head"),
    ("model.embed_tokens", "embedding"),
    ("transformer.h.0.attn.c_attn", "qkv"),
    ("transformer.h.0.attn.c_proj", "proj"),
    ("transformer.h.0.mlp.c_fc", "fc1"),
    ("transformer.h.0.mlp.c_proj", "fc2"),
    ("gpt_neox.layers.0.attention.query_key_value", "qkv"),
    ("gpt_neox.layers.0.attention.dense", "proj"),
    ("gpt_neox.layers.0.mlp.dense_h_to_4h", "fc1"),
    ("gpt_neox.layers.0.mlp.dense_4h_to_h", "fc2"),
    ("transformer.h.0.self_attention.dense", "proj"),
    ("model.decoder.layers.0.self_attn.out_proj", "proj"),
    ("model.decoder.layers.0.fc1", "fc1"),
    # plain
    ("blocks.0.wq", "qkv"),
    ("blocks.0.wo", "proj"),
    ("layers.0.feed_forward.w1", "fc1"),
    ("layers.0.feed_forward.w3", "fc1"),
    ("layers.0.feed_forward.w2", "fc2"),
    ("output", "head"),
    # nothing we know
    ("pooler.dense", ""),
    ("encoder.adapter", ""),
    ("", ""),
]


@pytest.mark.parametrize(("path", "role"), ROLE_TABLE)
def test_roles(path: str, role: str) -> None:
    assert role_of(path) == role
    assert role == "" or role in ROLES


def test_a_name_has_one_role() -> None:
    names = [name for group in ROLE_NAMES.values() for name in group.split()]
    assert len(names) == len(set(names))
    assert set(ROLE_NAMES) | {"expert"} == set(ROLES)


@pytest.mark.parametrize(
    ("path", "layer"),
    [
        ("decoder.layers.12.mlp.linear_fc1", 12),
        ("transformer.h.3.attn.c_attn", 3),
        ("blocks.0.wq", 0),
        ("encoder.layer.5.output", 5),
        ("model.layers.2.mlp.experts.7.w1", 2),
        ("encoder.block.1.layer.0.q", 1),
        ("lm_head", None),
        ("sublayers.3.fc1", None),
        ("layers.3", None),
    ],
)
def test_layer_numbers(path: str, layer: int | None) -> None:
    assert layer_of(path) == layer


def test_a_pipeline_stage_is_renumbered() -> None:
    assert global_path("decoder.layers.0.mlp.linear_fc1", 8) == "decoder.layers.8.mlp.linear_fc1"
    assert global_path("decoder.layers.1.mlp.experts.local_experts.1.linear_fc1", 4) == (
        "decoder.layers.5.mlp.experts.local_experts.1.linear_fc1"
    )
    assert global_path("output_layer", 8) == "output_layer"


def test_numbers_are_those_of_the_path() -> None:
    """Part of the Philox key: a change of this function changes the noise of every run."""

    def site(path: str) -> LinearSite:
        return LinearSite(path=path, role="", layer=None, in_features=1, out_features=1)

    assert site("decoder.layers.0.mlp.linear_fc1").number == 0xB0628489
    assert site("lm_head").number == 0x3FA8AF17
    numbers = {s.number for s in make_sites(8)}
    assert len(numbers) == 8 * 7 + 1
    assert all(0 <= n < 2**32 for n in numbers)


def test_equal_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    sites = make_sites(1)
    check_numbers([*sites, *sites])
    monkeypatch.setattr(LinearSite, "number", property(lambda self: 7))
    with pytest.raises(RecipeMismatch, match=r"q_proj and .*k_proj hash to the same noise number 7"):
        check_numbers(sites)


def test_linears_of_a_plain_model() -> None:
    found = list(find_linears(TinyLlama(num_layers=1), layer_offset=4))
    assert [
        (site.path, path, site.role, site.layer, site.out_features, site.in_features) for site, path, _ in found
    ] == [
        ("model.layers.4.self_attn.q_proj", "model.layers.0.self_attn.q_proj", "qkv", 4, 128, 128),
        ("model.layers.4.self_attn.k_proj", "model.layers.0.self_attn.k_proj", "qkv", 4, 128, 128),
        ("model.layers.4.self_attn.v_proj", "model.layers.0.self_attn.v_proj", "qkv", 4, 128, 128),
        ("model.layers.4.self_attn.o_proj", "model.layers.0.self_attn.o_proj", "proj", 4, 128, 128),
        ("model.layers.4.mlp.gate_proj", "model.layers.0.mlp.gate_proj", "fc1", 4, 256, 128),
        ("model.layers.4.mlp.up_proj", "model.layers.0.mlp.up_proj", "fc1", 4, 256, 128),
        ("model.layers.4.mlp.down_proj", "model.layers.0.mlp.down_proj", "fc2", 4, 128, 256),
        ("lm_head", "lm_head", "head", None, 64, 128),
    ]


def test_who_can_have_a_plan() -> None:
    assert isinstance(Fp4Linear(16, 16), Fp4Module)
    assert not isinstance(nn.Linear(16, 16), Fp4Module)
    assert not list(find_linears(nn.Conv1d(4, 4, 1)))


def test_tensor_parallel_splits_by_role() -> None:
    splits = {role_of(s.path): s.split for s in make_sites(1)}
    assert splits == {"qkv": "O", "proj": "I", "fc1": "O", "fc2": "I", "head": "O"}
    with torch.device("meta"):
        assert LinearSite(path="x", role="", layer=None, in_features=1, out_features=1).split is None
