"""Optional kernels change how a linear is computed and none of its bits; which linears have them."""

from __future__ import annotations

import pytest
import torch

from fp4dist.kernels import registry
from fp4dist.kernels.registry import Kernel, Op
from fp4dist.nn.comm import NoComm
from fp4dist.nn.function import fp4_linear
from fp4dist.nn.passing import (
    FILTER_W,
    FILTER_W_BITS,
    FILTER_X,
    MASK_X,
    ORIGINAL,
    PARTS,
    PRECISION,
    RESIDUAL,
    TAKEN_W,
    passing_kernels,
)
from fp4dist.spec.load import load_recipe
from fp4dist.spec.recipe import LinearRecipe
from fp4dist.spec.run import BackendConfig
from tests.generators import normal
from tests.nn.one_linear import make_plan

OPERATIONS: dict[str, Op] = {
    MASK_X: "mask",
    FILTER_X: "filter_by_mask",
    FILTER_W: "filter_by_scales",
    ORIGINAL["dgrad.w"]: "original",
    ORIGINAL["wgrad.x"]: "original",
}


def recipe(name: str) -> LinearRecipe:
    return load_recipe(name).linears["fp4"]


def run(name: str, kernels: dict[str, Kernel]) -> list[torch.Tensor]:
    """y, dX, dW of two tokens' worth of batch, in bf16."""
    plan = make_plan(recipe(name))
    plan.kernels = plan.kernels | kernels
    x, w = (normal(128, 128, seed=i).bfloat16().requires_grad_() for i in range(2))
    y = fp4_linear(x, w, plan, NoComm())
    y.backward(normal(128, 128, seed=2).bfloat16())
    assert x.grad is not None
    assert w.grad is not None
    return [y.detach(), x.grad, w.grad]


@pytest.mark.parametrize("name", ["quartet", "quest_mxfp4", "cage"])
def test_optional_kernels_change_no_bit(name: str) -> None:
    calls: list[str] = []

    def counted(name: str, op: Op) -> Kernel:
        found = registry._KERNELS[op, "reference"]

        def fn(*args: object) -> object:
            calls.append(name)
            return found.fn(*args)

        return Kernel(op, "reference", fn, found.supports)

    with_kernels = run(name, {key: counted(key, op) for key, op in OPERATIONS.items()})
    assert sorted(calls) == sorted(OPERATIONS)
    for a, b in zip(with_kernels, run(name, {}), strict=True):
        assert torch.equal(a, b)


def test_which_linears_have_them() -> None:
    gpu, triton = torch.device("cuda"), BackendConfig(kind="triton")
    pytest.importorskip("triton")
    assert set(passing_kernels(recipe("quartet"), gpu, triton)) == {*OPERATIONS, FILTER_W_BITS}  # for masks of codes
    chosen = {PARTS["fprop.x"], PARTS["wgrad.x"], TAKEN_W, RESIDUAL, PRECISION}  # how its parts are made
    assert set(passing_kernels(recipe("tetrajet_v2"), gpu, triton)) == {*ORIGINAL.values(), *chosen}
    for name in ("quartet2", "nvidia_nvfp4"):  # requantized from codes without a rotation; reused
        assert passing_kernels(recipe(name), gpu, triton) == {}
    assert passing_kernels(recipe("quartet"), gpu, BackendConfig(kind="reference")) == {}
    assert passing_kernels(recipe("quartet"), torch.device("cpu"), BackendConfig()) == {}
