"""Several ranks' buckets in one process, the collectives done by hand: codes of the whole weight on every rank."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fp4dist.megatron.coded_bucket import CodedBucket, CodedWeight, why_whole
from fp4dist.nn.apply import apply_recipe
from fp4dist.nn.linear import Fp4Linear
from fp4dist.numerics.quantize import quantize
from fp4dist.spec.formats import NVFP4
from fp4dist.spec.load import load_recipe, shipped
from fp4dist.spec.recipe import Dgrad, Fprop, LinearRecipe, QuantSpec, Recipe, Rule

SHAPES = ((48, 64), (32, 96), (80, 32))  # [O, I]; a norm's 24 elements between any two of them
SQUARE, FLAT = QuantSpec(format=NVFP4, block=(16, 16)), QuantSpec(format=NVFP4)


def linear_recipe(weight: QuantSpec) -> LinearRecipe:
    return LinearRecipe(
        fprop=Fprop(x=FLAT, w=weight), dgrad=Dgrad(dy=FLAT, w=QuantSpec(format=NVFP4, source="requant"))
    )


def make_bucket(values: Tensor, rank: int, ranks: int, weight: QuantSpec) -> tuple[CodedBucket, list[Fp4Linear]]:
    """The bucket of one rank, which knows its own slice of `values` and nothing else."""
    model = nn.ModuleList(nn.Linear(inputs, outputs, bias=False) for outputs, inputs in SHAPES)
    recipe = Recipe(name="r", linears={"a": linear_recipe(weight)}, rules=(Rule(path="*", linear="a"),))
    applied = apply_recipe(model, recipe)
    data = torch.full_like(values, -3.0)
    size = values.numel() // ranks
    data[rank * size : (rank + 1) * size] = values[rank * size : (rank + 1) * size]
    parameters: list[nn.Parameter] = []
    weights, at = {}, 0
    for target in applied.targets:
        module: Any = target.module
        module.weight.data = data[at : at + module.weight.numel()].view_as(module.weight)
        weights[module.weight] = CodedWeight(target.site.path, module, module.weight)
        weights[module.weight].judge()
        at += module.weight.numel() + 40
        norm = nn.Parameter(data[at : at + 24])
        parameters += [module.weight, norm]
        at += 64
    bucket = SimpleNamespace(param_data=data, params_list=parameters[::-1])  # in no order
    return CodedBucket(bucket, weights, rank, ranks), [target.module for target in applied.targets]  # type: ignore[misc]


@pytest.mark.parametrize("ranks", [2, 3, 7])
@pytest.mark.parametrize("weight", [SQUARE, FLAT], ids=["16x16", "1x16"])
def test_every_rank_gets_the_codes_of_the_whole(weight: QuantSpec, ranks: int) -> None:
    values = torch.randn(ranks * (9000 // ranks + 5), generator=torch.Generator().manual_seed(ranks))
    made = [make_bucket(values, rank, ranks, weight) for rank in range(ranks)]
    buckets = [bucket for bucket, _ in made]
    layout = buckets[0].layout
    assert layout.tails, "some slice must cut a block row"
    for tail in layout.tails:
        buckets[tail.owner].data[tail.start : tail.end] = buckets[tail.sender].data[tail.start : tail.end]
    amaxes = torch.stack([torch.stack(bucket.own_amaxes()) for bucket in buckets]).amax(0)
    payloads = []
    for bucket in buckets:
        own = {i: amaxes[n] for n, i in enumerate(bucket.weights) if bucket.own_rows(i).numel()}
        payloads.append(bucket.payload(own))
    assert tuple(p.numel() for p in payloads) == layout.payloads
    padded = [torch.nn.functional.pad(p, (0, layout.contribution - p.numel())) for p in payloads]
    gathered = torch.cat(payloads if layout.is_balanced else padded)
    for bucket, linears in made:
        bucket.deliver(gathered)
        for index, parameter in enumerate(bucket.parameters):
            place = bucket.layout.extents[index]
            whole = values[place.start : place.end].view_as(parameter)
            if index not in bucket.weights:
                assert torch.equal(parameter, whole)
                continue
            expected = quantize(whole, weight)
            plan = linears[index // 2].plan
            assert plan is not None
            delivered = plan.delivered
            assert delivered is not None
            assert torch.equal(delivered.codes, expected.codes)
            assert torch.equal(delivered.scales, expected.scales)
            assert torch.equal(delivered.global_scale, expected.global_scale)
            own = torch.zeros_like(values, dtype=torch.bool)
            own[slice(*layout.slice_of(bucket.rank))] = True
            mine = own[place.start : place.end].view_as(parameter)
            assert torch.equal(parameter[mine], whole[mine]), "its own slice stays"
            assert parameter[~mine].isnan().all()


def test_which_shipped_recipes_can_send_codes() -> None:
    """By hand: whose forward weight is rounded to nearest, unrotated, and the source of dgrad's."""
    for name in ("nvidia_nvfp4", "nvidia_nvfp4_46", "nvidia_nvfp4_te", "quartet2", "tetrajet_v2_core"):
        assert why_whole(load_recipe(name).linears["fp4"]) is None, name
    tail = load_recipe("nvidia_nvfp4").linears["fp4_fprop_bf16"]
    assert why_whole(tail) == "its forward GEMM reads the weight in high precision"
    for name in shipped("recipes"):
        for linear in load_recipe(name).linears.values():
            w, wt = linear.slot("fprop.w"), linear.slot("dgrad.w")
            if w is None or wt is None or wt.source == "master" or w.draws_noise or w.rotation is not None:
                assert why_whole(linear), name
