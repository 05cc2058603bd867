"""Initial weights depend on the seed and the parameter's name, not on how the model is cut into ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed import megatron_groups, run_ranks
from tests.megatron.tiny import tiny_run

pytestmark = pytest.mark.distributed

VARIANTS: list[dict[str, Any]] = [{}, {"tie_embeddings": True}, {"vocab_size": 95, "qk_norm": True}]


def weights(tp: int = 1, pp: int = 1, **model: Any) -> dict[str, Tensor]:
    """Global name -> this rank's part, of a model in the given layout."""
    from fp4dist.megatron.initialize import global_parameters
    from fp4dist.megatron.provider import build_gpt

    with megatron_groups(tp, pp) as groups:
        first, last = groups.is_pipeline_first_stage(), groups.is_pipeline_last_stage()
        config = tiny_run(tp, pp, **model)
        stage = build_gpt(config, torch.float32, pre_process=first, post_process=last, linears="megatron")
        return {name: parameter.detach() for name, parameter in global_parameters(stage)}


def test_every_layout_starts_from_the_same_weights() -> None:
    for whole, parts in run_ranks(build_layouts, 2):
        assert whole.keys() == parts.keys()
        for name, weight in whole.items():
            assert torch.equal(weight, parts[name]), name


def build_layouts() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of every variant: this rank's part of the TP = 2 and PP = 2 models, cut from the whole model and as built."""
    expected, found = {}, {}
    for number, model in enumerate(VARIANTS):
        whole = weights(**model)
        for name, part in weights(pp=2, **model).items():
            source = "embedding.word_embeddings.weight" if "tie_embeddings" in model and "output" in name else name
            expected[f"pp {number} {name}"], found[f"pp {number} {name}"] = whole[source], part
        for name, part in weights(tp=2, **model).items():
            expected[f"tp {number} {name}"], found[f"tp {number} {name}"] = cut(name, whole[name]), part
    return expected, found


def cut(name: str, whole: Tensor) -> Tensor:
    """This rank's half, written down from what each layer means instead of from Megatron's marks."""
    rank = dist.get_rank()
    if name.endswith(("linear_proj.weight", "fc2.weight")):
        return whole.chunk(2, 1)[rank]
    if name.endswith("fc1.weight"):  # gate and up, each halved
        gate, up = whole.chunk(2)
        return torch.cat([gate.chunk(2)[rank], up.chunk(2)[rank]])
    if name.endswith("linear_qkv.weight"):  # grouped by key/value head
        return whole.chunk(2)[rank]
    if name.endswith(("word_embeddings.weight", "output_layer.weight")):
        padded = torch.cat([whole, whole.new_zeros(whole.size(0) % 2, whole.size(1))])
        return padded.chunk(2)[rank]
    return whole


def test_the_distribution_is_megatrons() -> None:
    model = run_ranks(big_weights, 1)[0]
    for name, (mean, std) in model.items():
        expected = 0.02 / math.sqrt(2 * 2) if name.endswith(("proj.weight", "fc2.weight")) else 0.02
        assert std == pytest.approx(expected, rel=0.02), name
        assert abs(mean) < expected / 50, name


def big_weights() -> dict[str, tuple[float, float]]:
    model = weights(hidden_size=256, ffn_hidden_size=512)
    assert all(torch.equal(w, torch.ones_like(w)) for w in model.values() if w.dim() == 1)
    return {name: (float(w.mean()), float(w.std())) for name, w in model.items() if w.dim() == 2}


def test_seeds_and_names_give_different_weights() -> None:
    assert run_ranks(differ, 1) == [True]


def differ() -> bool:
    one, other = weights(seed=1), weights(seed=2)
    same_shape = [w.flatten() for model in (one, other) for n, w in model.items() if n.endswith("linear_qkv.weight")]
    return len({tuple(w[:8].tolist()) for w in same_shape}) == len(same_shape) == 4
