"""One linear layer under a plan: run it, and see the six operands that its three GEMMs really got."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fp4dist.nn.clock import Clock
from fp4dist.nn.comm import LinearComm, NoComm
from fp4dist.nn.function import fp4_linear
from fp4dist.nn.plan import LinearPlan, Operand
from fp4dist.spec.recipe import GEMMS, SLOTS, LinearRecipe
from fp4dist.spec.run import BackendConfig
from tests.generators import normal

TOKENS, INPUTS, OUTPUTS = 256, 96, 128  # T and O divide by every shipped rotation; I is no multiple of 64
NUMBER = 0xABCD1234


def make_plan(recipe: LinearRecipe, clock: Clock | None = None, number: int = NUMBER) -> LinearPlan:
    """A plan on the CPU."""
    clock = clock or Clock(seed=7, step=3, micro_batch=5)
    return LinearPlan.resolve("layers.0.fc1", number, recipe, clock, torch.device("cpu"), BackendConfig())


@dataclass
class Watched:
    """A plan's kernels, recorded: operands of each GEMM, and how often each slot was quantized."""

    plan: LinearPlan
    operands: dict[str, Operand] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)


def watch(plan: LinearPlan) -> Watched:
    """Record what `plan` does from now on."""
    watched = Watched(plan)

    def recording(name: str, fn: Any) -> Any:
        def run(*args: Any, **named: Any) -> Any:
            watched.calls[name] = watched.calls.get(name, 0) + 1
            if name in GEMMS:
                slots = [slot for slot in SLOTS if slot.startswith(name)]
                watched.operands.update(zip(slots, args, strict=True))
            return fn(*args, **named)

        return run

    plan.kernels = {name: replace(k, fn=recording(name, k.fn)) for name, k in plan.kernels.items()}
    return watched


@dataclass
class Result:
    """Outcome of forward and backward."""

    y: Tensor
    dx: Tensor
    dw: Tensor
    operands: dict[str, Operand]

    def tensors(self) -> list[Tensor]:
        """y, dX, dW."""
        return [self.y, self.dx, self.dw]


def tensors(dtype: torch.dtype = torch.float32, inputs: int = INPUTS) -> tuple[Tensor, Tensor, Tensor]:
    """(x [T, I], w [O, I], dy [T, O])."""
    shapes = ((TOKENS, inputs), (OUTPUTS, inputs), (TOKENS, OUTPUTS))
    x, w, dy = (normal(*shape, seed=i).to(dtype) for i, shape in enumerate(shapes))
    return x, w, dy


def run_linear(
    recipe: LinearRecipe,
    clock: Clock | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, ...] = (TOKENS,),
    comm: LinearComm | None = None,
    data: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Result:
    """Forward and backward of one linear on fixed tensors; `shape` is x's without its last dimension.

    data   (x [T, I], w [O, I], dy [T, O]) in place of those of `tensors`
    """
    x, w, dy = (t.clone() for t in data) if data is not None else tensors(dtype)
    x = x.reshape(*shape, x.shape[-1]).requires_grad_()
    w = w.requires_grad_()
    watched = watch(make_plan(recipe, clock))
    y = fp4_linear(x, w, watched.plan, comm or NoComm())
    y.backward(dy.reshape(*shape, OUTPUTS))
    assert x.grad is not None
    assert w.grad is not None
    return Result(y.detach(), x.grad, w.grad, watched.operands)


def same(a: Result, b: Result) -> list[bool]:
    """Whether y, dX, dW are equal bit for bit."""
    return [torch.equal(p, q) for p, q in zip(a.tensors(), b.tensors(), strict=True)]
