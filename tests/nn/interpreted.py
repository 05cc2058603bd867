"""A whole linear through the Triton kernels in Triton's interpreter: the operands and results of the reference.

    TRITON_INTERPRET=1 python -m tests.nn.interpreted [RECIPE ...]      # exit status 1 if anything differs

Triton chooses its interpreter when it is imported, so this is a program that test_interpreted.py starts. Each recipe
runs with bf16 carriers, and with FP8 ones where a GPU that multiplies FP8 would get them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fp4dist.kernels import registry
from fp4dist.kernels.triton import matmul as triton_matmul
from fp4dist.nn.clock import Clock
from fp4dist.nn.comm import NoComm
from fp4dist.nn.function import fp4_linear
from fp4dist.nn.plan import LinearPlan, Operand
from fp4dist.numerics import dequantize
from fp4dist.numerics.grouping import spread
from fp4dist.numerics.tensor import BlockScaledTensor, Carrier
from fp4dist.spec.load import load_recipe
from fp4dist.spec.run import BackendConfig
from tests.nn.one_linear import INPUTS, Watched, tensors, watch

RECIPES = ("nvidia_nvfp4", "quartet2", "quartet", "tetrajet", "tetrajet_v2")
IN_TILES = ("tetrajet_v2",)  # of 128 columns; before its channels are chosen
IN_FP8 = ("luq", "sun2020")  # whose levels have FP8 carriers alone, straight from their quantizers


def pretend_to_be_a_gpu() -> None:
    """Let the Triton kernels take tensors of the CPU."""
    for at, kernel in list(registry._KERNELS.items()):
        if kernel.backend == "triton":

            def supports(request: registry.Request, of: registry.Kernel = kernel) -> str | None:
                return of.supports(replace(request, device=torch.device("cuda")))

            registry._KERNELS[at] = replace(kernel, supports=supports)


def run(recipe: str, kind: str) -> tuple[Watched, list[Tensor]]:
    """What the three GEMMs got, and (y, dX, main_grad)."""
    clock = Clock(seed=7, step=3, micro_batch=5, cache_weights=True)
    linear, config = load_recipe(recipe).linears["fp4"], BackendConfig(kind=kind)  # type: ignore[arg-type]
    watched = watch(LinearPlan.resolve("fc1", 99, linear, clock, torch.device("cpu"), config))
    x, w, dy = (t.requires_grad_() for t in tensors(torch.bfloat16, 128 if recipe in IN_TILES else INPUTS))
    w.main_grad, w.grad_added_to_main_grad = torch.zeros(w.shape), False  # type: ignore[attr-defined]
    y = fp4_linear(x, w, watched.plan, NoComm())
    y.backward(dy)
    assert x.grad is not None
    return watched, [y.detach(), x.grad, w.main_grad]  # type: ignore[attr-defined]


def values(operand: Operand) -> Tensor:
    """[R, C] fp32, times sqrt(rotation)."""
    if isinstance(operand, Carrier):
        found = operand.values.float() * operand.scale
        return found if operand.rows is None else found * spread(operand.rows, operand.shape)
    assert isinstance(operand, BlockScaledTensor)
    return dequantize(replace(operand, rotation=1))


def differences(recipe: str) -> list[str]:
    """What differs from the reference, in words."""
    fast, results = run(recipe, "triton")
    slow, expected = run(recipe, "reference")
    found = [f"{slot} is no carrier" for slot, o in fast.operands.items() if not isinstance(o, Carrier)]
    for slot, operand in slow.operands.items():
        if not torch.equal(values(fast.operands[slot]), values(operand)):
            found.append(f"{slot} differs")
    for name, one, other in zip(("y", "dX", "dW"), results, expected, strict=True):
        bound = 2**-6 * other.float().abs().max()  # two roundings of sums in another order, to bf16
        if not bool(((one.float() - other.float()).abs() <= bound).all()):
            found.append(f"{name} differs by more than the order of a sum explains")
    return found


def main(recipes: Sequence[str]) -> int:
    """Print what differs."""
    pretend_to_be_a_gpu()
    failed = 0
    for narrow in (False, True):
        triton_matmul.multiplies_fp8 = lambda _, narrow=narrow: narrow
        once = [recipe for recipe in recipes if not narrow or recipe not in IN_TILES]  # bf16 carriers alone
        for recipe in (*once, *IN_FP8) if narrow and recipes is RECIPES else once:
            found = differences(recipe)
            failed += bool(found)
            print(f"{recipe} {'fp8' if narrow else 'bf16'}: {'; '.join(found) or 'equal'}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or RECIPES))
