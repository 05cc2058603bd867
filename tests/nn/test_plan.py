"""A plan: its kernels are chosen before the first step, for exactly what the recipe quantizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fp4dist.errors import KernelUnavailable
from fp4dist.nn.comm import NoComm
from fp4dist.nn.plan import LinearPlan, Tally, gemm_kind, resolve_kernels
from fp4dist.numerics import BlockScaledTensor
from fp4dist.spec.blocks import MseSearch
from fp4dist.spec.load import load_recipe
from fp4dist.spec.recipe import GEMMS, Dgrad, Fprop, LinearRecipe, Wgrad
from fp4dist.spec.run import BackendConfig
from tests.compare import assert_same_bits
from tests.generators import normal, spec
from tests.nn.one_linear import NUMBER, make_plan
from tests.numerics.quantizers import extra

NV, SQUARE = spec("nvfp4"), spec("nvfp4_16x16")
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_kinds_of_gemms() -> None:
    recipe = LinearRecipe(fprop=Fprop(x=NV, w=NV), dgrad=Dgrad(w=NV))
    assert [gemm_kind(recipe, gemm) for gemm in GEMMS] == ["fp4", "mixed", "bf16"]
    assert [make_plan(recipe).kind(gemm) for gemm in GEMMS] == ["fp4", "mixed", "bf16"]


@pytest.mark.parametrize(
    ("name", "ops"),
    [
        (
            "nvidia_nvfp4",
            {
                "fprop.x": "quantize", "fprop.w": "quantize", "dgrad.dy": "quantize",  # dgrad.w reuses codes: no kernel
                "wgrad.dy": "quantize", "wgrad.x": "quantize",
            },
        ),
        (
            "quartet2",
            {
                "fprop.x": "quantize", "fprop.w": "quantize", "dgrad.dy": "quantize", "dgrad.w": "requantize",
                "wgrad.dy": "quantize", "wgrad.x": "requantize",
            },
        ),
    ],
)  # fmt: skip
def test_kernels_of_a_recipe(name: str, ops: dict[str, str]) -> None:
    kernels = resolve_kernels(load_recipe(name).linears["fp4"], CPU, BackendConfig())
    assert {k: v.op for k, v in kernels.items()} == {**ops, **dict.fromkeys(GEMMS, "matmul")}
    assert {v.backend for v in kernels.values()} == {"reference"}


def test_a_bf16_layer_needs_no_kernel_even_on_a_gpu() -> None:
    assert resolve_kernels(LinearRecipe(), GPU, BackendConfig()) == {}


def test_a_missing_kernel_is_found_when_the_plan_is_made() -> None:
    searched = replace(extra("int4_1x128"), scale=MseSearch())  # which no kernel but the reference's does
    recipe = LinearRecipe(wgrad=Wgrad(x=searched))
    with pytest.raises(KernelUnavailable, match=r"no backend can run quantize\(int4 1x128 mse.*\) on cuda"):
        LinearPlan.resolve("a", 1, recipe, make_plan(recipe).clock, GPU, BackendConfig())


def test_operands_of_the_three_sources() -> None:
    w = normal(64, 128)
    recipe = LinearRecipe(fprop=Fprop(w=SQUARE), dgrad=Dgrad(w=replace(SQUARE, source="reuse")))
    plan = make_plan(recipe)
    forward = plan.quantize("fprop.w", w, NoComm())
    assert isinstance(forward, BlockScaledTensor)
    reused = plan.backward_operand("dgrad.w", forward, None, NoComm())
    again = make_plan(LinearRecipe(dgrad=Dgrad(w=SQUARE))).backward_operand("dgrad.w", None, w, NoComm())
    assert isinstance(reused, BlockScaledTensor)
    assert isinstance(again, BlockScaledTensor)
    assert_same_bits(reused, again)
    requant = make_plan(LinearRecipe(fprop=Fprop(w=SQUARE), dgrad=Dgrad(w=replace(NV, source="requant"))))
    made = requant.backward_operand("dgrad.w", forward, None, NoComm())
    assert isinstance(made, BlockScaledTensor)
    assert made.shape == (128, 64)
    plain = make_plan(LinearRecipe()).backward_operand("dgrad.w", None, w, NoComm())
    assert torch.equal(plain, w.t())  # type: ignore[arg-type]


def test_an_unquantized_slot_passes_through() -> None:
    x = normal(4, 4)
    assert make_plan(LinearRecipe()).quantize("fprop.x", x, NoComm()) is x


def test_only_the_counted_gemms_are_counted() -> None:
    plan = make_plan(LinearRecipe(fprop=Fprop(x=NV, w=NV)))
    a = plan.quantize("fprop.x", normal(4, 32), NoComm())
    plan.matmul("fprop", a, a, counted=False)
    assert plan.tally == Tally()
    plan.matmul("fprop", a, a)
    assert plan.tally.flops == {("fprop", "fp4"): 2 * 4 * 4 * 32}


def test_a_plan_knows_its_layer() -> None:
    plan = make_plan(LinearRecipe())
    assert (plan.path, plan.number) == ("layers.0.fc1", NUMBER)
