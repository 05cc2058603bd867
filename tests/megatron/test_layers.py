"""Megatron's tensor-parallel linears under a plan: bits of all six operands do not depend on the split.

Given the same logical x, W and dY, a column- or row-parallel linear on two ranks, with and without sequence
parallelism, quantizes to exactly the codes and scales of one rank; with recipe bf16 it gives Megatron's own bits.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from fp4dist.nn.apply import apply_recipe
from fp4dist.nn.comm import SLOT_DIMS
from fp4dist.numerics import BlockScaledTensor
from fp4dist.numerics.codes import unpack
from fp4dist.spec.load import load_recipe, shipped
from fp4dist.spec.recipe import Recipe, Rule
from tests.distributed import run_ranks
from tests.generators import normal

TOKENS, BATCH, INPUTS, OUTPUTS = 128, 1, 256, 512
QUANTIZED = [name for name in shipped("recipes") if load_recipe(name).linears]
CASES = [(name, kind, sp) for name in QUANTIZED for kind in ("column", "row") for sp in (False, True)]


def everywhere(name: str) -> Recipe:
    """A recipe's first LinearRecipe on every linear."""
    recipe = load_recipe(name)
    linear = next(iter(recipe.linears))
    return Recipe(name=name, linears={linear: recipe.linears[linear]}, rules=(Rule(path="*", linear=linear),))


def make_layer(kind: str, sequence_parallel: bool, ours: bool = True) -> torch.nn.Module:
    """A Megatron linear whose logical weight is the same for every tensor-parallel size."""
    from megatron.core import parallel_state as ps
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    from fp4dist.megatron.layers import Fp4ColumnParallelLinear, Fp4RowParallelLinear

    tp = ps.get_tensor_model_parallel_world_size()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=64,
        num_attention_heads=4,
        use_cpu_initialization=True,
        tensor_model_parallel_size=tp,
        sequence_parallel=sequence_parallel,
        gradient_accumulation_fusion=False,
    )
    common: dict[str, Any] = dict(config=config, init_method=torch.nn.init.normal_, bias=False)
    if kind == "column":
        layer = (Fp4ColumnParallelLinear if ours else ColumnParallelLinear)(INPUTS, OUTPUTS, **common)
    else:
        cls = Fp4RowParallelLinear if ours else RowParallelLinear
        layer = cls(INPUTS, OUTPUTS, input_is_parallel=True, skip_bias_add=True, **common)
    weight = normal(OUTPUTS, INPUTS, seed=1).chunk(tp, 0 if kind == "column" else 1)[
        ps.get_tensor_model_parallel_rank()
    ]
    layer.weight.data = weight.clone()
    return layer


def run_layer(layer: torch.nn.Module, kind: str, sequence_parallel: bool) -> dict[str, torch.Tensor]:
    """Forward and backward on this rank's part of the logical x and dY."""
    from megatron.core import parallel_state as ps

    tp, rank = ps.get_tensor_model_parallel_world_size(), ps.get_tensor_model_parallel_rank()
    x = normal(TOKENS, INPUTS, seed=2).reshape(TOKENS, BATCH, INPUTS)
    dy = normal(TOKENS, OUTPUTS, seed=3).reshape(TOKENS, BATCH, OUTPUTS)
    split_x = 2 if kind == "row" else 0 if sequence_parallel else None
    split_dy = 2 if kind == "column" else 0 if sequence_parallel else None
    x = (x if split_x is None else x.chunk(tp, split_x)[rank]).clone().requires_grad_()
    dy = dy if split_dy is None else dy.chunk(tp, split_dy)[rank]
    y, _ = layer(x)
    y.backward(dy)
    assert x.grad is not None
    return {"y": y.detach(), "dx": x.grad, "dw": layer.weight.grad}


def codes_of_all_cases() -> list[dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """For every case: slot -> this rank's (codes [R, C], scales, global scale)."""
    from megatron.core import parallel_state as ps

    from fp4dist.megatron.cpu import install_cpu_shims

    install_cpu_shims()
    ps.initialize_model_parallel(dist.get_world_size(), create_gloo_process_groups=False)
    results = []
    for name, kind, sequence_parallel in CASES:
        layer = make_layer(kind, sequence_parallel and dist.get_world_size() > 1)
        applied = apply_recipe(torch.nn.ModuleDict({"layer": layer}), everywhere(name), seed=5)
        applied.clock.step, applied.clock.micro_batch = 7, 3
        captured: dict[str, Any] = {}
        _capture(layer, captured)
        run_layer(layer, kind, sequence_parallel and dist.get_world_size() > 1)
        applied.check_counts()
        results.append(captured)
    return results


def _capture(layer: Any, captured: dict[str, Any]) -> None:
    """Record what every quantizing kernel of the layer's plan returns."""
    kernels = layer.plan.kernels
    for slot in [s for s in SLOT_DIMS if s in kernels]:

        def recording(*args: Any, _slot: str = slot, _kernel: Any = kernels[slot]) -> BlockScaledTensor:
            q = _kernel(*args)
            captured[_slot] = (unpack(q.codes), q.scales, q.global_scale)
            return q

        kernels[slot] = recording


@pytest.mark.distributed
def test_codes_do_not_depend_on_the_split() -> None:
    whole = run_ranks(codes_of_all_cases, 1)[0]
    parts = run_ranks(codes_of_all_cases, 2)
    for i, (name, kind, sequence_parallel) in enumerate(CASES):
        split = "O" if kind == "column" else "I"
        case = f"{name} {kind} sequence_parallel={sequence_parallel}"
        assert set(whole[i]) == set(parts[0][i]), case
        for slot, (codes, scales, global_scale) in whole[i].items():
            pieces = [rank[i][slot] for rank in parts]
            dims = SLOT_DIMS[slot]
            if split in dims:
                axis = dims.index(split)
                got = [torch.cat([p[j] for p in pieces], axis) for j in (0, 1)]
            else:
                got = [pieces[0][0], pieces[0][1]]
                assert torch.equal(pieces[0][0], pieces[1][0]), f"{case} {slot}: ranks differ"
            assert torch.equal(got[0], codes), f"{case} {slot}: {(got[0] != codes).sum()} codes differ"
            assert torch.equal(got[1], scales), f"{case} {slot}: scales differ"
            assert all(torch.equal(p[2], global_scale) for p in pieces), f"{case} {slot}: global scales differ"


def bits_against_megatron() -> None:
    """Recipe bf16 and no plan at all, against Megatron's classes, in the same layout."""
    from megatron.core import parallel_state as ps

    from fp4dist.megatron.cpu import install_cpu_shims

    install_cpu_shims()
    ps.initialize_model_parallel(dist.get_world_size(), create_gloo_process_groups=False)
    for kind in ("column", "row"):
        for sequence_parallel in (False, True):
            theirs = run_layer(make_layer(kind, sequence_parallel, ours=False), kind, sequence_parallel)
            for recipe in ("bf16", None):
                layer = make_layer(kind, sequence_parallel)
                if recipe is not None:
                    apply_recipe(torch.nn.ModuleDict({"layer": layer}), recipe)
                ours = run_layer(layer, kind, sequence_parallel)
                for name, value in theirs.items():
                    assert torch.equal(value, ours[name]), (
                        f"{kind} sequence_parallel={sequence_parallel} {recipe} {name}"
                    )


@pytest.mark.distributed
def test_bf16_recipe_gives_megatrons_bits() -> None:
    run_ranks(bits_against_megatron, 2)
