"""Whole linears, forward and backward, under a plan of Triton kernels and under one of the reference.

    TRITON_INTERPRET=1 python -m tests.kernels.triton.linears_parity [RECIPE ...]      # exit status 1 if one differs

On a GPU all shipped recipes; in Triton's interpreter those whose linears go ways of their own. Recipes that choose
channels run as they do after the choice, on a GPU before it as well.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fp4dist.kernels.triton import matmul
from fp4dist.nn.clock import Clock
from fp4dist.nn.comm import NoComm
from fp4dist.nn.controllers import Choice, SlotControl
from fp4dist.nn.function import fp4_linear
from fp4dist.nn.plan import LinearPlan
from fp4dist.spec.load import load_recipe, shipped
from fp4dist.spec.recipe import LinearRecipe
from fp4dist.spec.run import BackendConfig
from fp4dist.spec.splits import Channels, HotResidual
from tests.generators import normal
from tests.nn.one_linear import NUMBER

# parts and several samples, scales of tiles, of rows, of short blocks, a rotated basis under masks, moving averages
CHOSEN = ("averis", "chon", "luq", "quest_mxfp4", "stable_spam_fp4", "tetrajet_qema", "tetrajet_v2", "ufp4", "wang2501")
ROUNDING = 2e-3  # of results in bf16, where the order of a sum has moved a few of them to a neighbour
TOKENS, INPUTS, OUTPUTS = 128, 256, 128


def differences(names: Iterable[str], device: torch.device, backend: str = "triton") -> Iterator[str]:
    """Of y, dX and dW, relative to their norms."""
    for name in names:
        for linear, recipe in load_recipe(name).linears.items():
            for marks in (False, True)[chooses(recipe) and device.type == "cpu" : 1 + chooses(recipe)]:
                found = run(recipe, device, backend, marks)
                expected = run(recipe, torch.device("cpu"), "reference", marks)
                for what, a, b in zip(("y", "dX", "dW"), found, expected, strict=True):
                    error = float((a - b).norm() / b.norm())
                    if not error <= ROUNDING:
                        yield f"{name} {linear} {what}{' with channels chosen' * marks}: {error:.1e}"


def chooses(recipe: LinearRecipe) -> bool:
    """Whether it chooses channels."""
    return recipe.fprop.x is not None and isinstance(recipe.fprop.x.outlier, Channels | HotResidual)


def choose(plan: LinearPlan, device: torch.device) -> None:
    """Give fprop.x the choice of every eighth channel and a few others, as a controller would."""
    block = plan.recipe.fprop.x.outlier if plan.recipe.fprop.x is not None else None
    assert isinstance(block, Channels | HotResidual)
    choice = Choice(block, plan.path, INPUTS, device)
    choice.chosen = (torch.arange(INPUTS, device=device) % 8 == 3) | (torch.arange(INPUTS, device=device) < 5)
    plan.controls = {"fprop.x": SlotControl(None, choice, None, lambda: 1.0)}


def run(recipe: LinearRecipe, device: torch.device, backend: str, marks: bool = False) -> list[Tensor]:
    """y, dX, dW on the CPU, in fp32. marks: some channels are chosen."""
    config = BackendConfig(kind=backend)  # type: ignore[arg-type]
    of = torch.device("cpu" if backend == "reference" else "cuda")  # the interpreter runs a GPU's plan on a CPU
    plan = LinearPlan.resolve("layers.0.fc1", NUMBER, recipe, Clock(seed=7, step=3, micro_batch=5), of, config)
    if marks:
        choose(plan, device)
    shapes = ((TOKENS, INPUTS), (OUTPUTS, INPUTS), (TOKENS, OUTPUTS))
    x, w, dy = (normal(*shape, seed=i).bfloat16().to(device) for i, shape in enumerate(shapes))
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = fp4_linear(x, w, plan, NoComm())
    y.backward(dy)
    assert x.grad is not None
    assert w.grad is not None
    return [t.float().cpu() for t in (y.detach(), x.grad, w.grad)]


def main() -> int:
    """Print every difference."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        matmul.multiplies_fp8 = lambda device: False  # which would ask the device
    names = sys.argv[1:] or (shipped("recipes") if on_gpu else CHOSEN)
    found = list(differences(names, torch.device("cuda" if on_gpu else "cpu")))
    print("\n".join(found) if found else f"no difference in linears of {len(names)} recipes")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
