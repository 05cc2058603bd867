"""The only autograd code: fprop, dgrad, wgrad of a linear layer, each contracting the last dimension of both operands.

    Y [T,O] = X [T,I] (W  [O,I])^T      forward
    dX[T,I] = dY[T,O] (W^T[I,O])^T      backward, communication of dX overlaps the next line
    dW[O,I] = dY^T[O,T] (X^T[I,T])^T

Kept between forward and backward is what the backward slots' sources ask for: packed codes for `requant` and `reuse`
(0.5625 bytes an element), the high-precision tensor for `master` and bf16. A GEMM without quantized operands runs the
very calls of Megatron-core's own linear, so that an all-bf16 recipe gives its bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fp4dist.nn.comm import LinearComm
from fp4dist.nn.plan import HIGH, LinearPlan, Operand
from fp4dist.numerics.tensor import BlockScaledTensor

Codes = BlockScaledTensor | None


def fp4_linear(x: Tensor, weight: Tensor, plan: LinearPlan, comm: LinearComm) -> Tensor:
    """Y = X W^T under a plan.

    x        [..., I] this rank's input (a sequence-parallel part, if `comm` gathers)
    weight   [O, I] this rank's shard; a `main_grad` attribute (fp32) receives the FP4 weight gradient directly
    returns  [..., O] in x's dtype
    """
    with torch.autocast(x.device.type, enabled=False):  # it would run the fp32 arithmetic of a GEMM in bf16
        return Fp4LinearFunction.apply(x, weight, plan, comm, torch.is_grad_enabled())


class Fp4LinearFunction(torch.autograd.Function):
    """Three GEMMs under one LinearPlan."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, plan: LinearPlan, comm: LinearComm, training: bool
    ) -> Tensor:
        """Quantize x and w, multiply, keep what backward needs."""
        full_x = comm.gather_x(x)
        if plan.kind("fprop") == HIGH:
            x_q, w_q = full_x, weight
            y = torch.matmul(full_x, weight.to(full_x.dtype).t())  # the dtypes differ under autocast only
            if training:
                plan.count("fprop", full_x.numel() // full_x.shape[-1], weight.shape[0], weight.shape[1])
        else:
            x_q = plan.quantize("fprop.x", full_x.flatten(0, -2), comm)
            w_q = plan.quantize_weight(weight, comm, training)
            y = plan.matmul("fprop", x_q, w_q, counted=training).to(x.dtype).unflatten(0, full_x.shape[:-1])
        if training:
            ctx.plan, ctx.comm, ctx.clock = plan, comm, (plan.clock.step, plan.clock.micro_batch)
            ctx.weight = weight  # the parameter itself: backward looks for its main_grad
            _save(ctx, x, x_q, w_q)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # type: ignore[override]
        """Both gradients; noise is keyed by the step and micro-batch of this layer's forward."""
        plan, comm, weight = ctx.plan, ctx.comm, ctx.weight
        needs_dx, needs_dw = ctx.needs_input_grad[:2]
        plan.tally.unneeded.update(g for g, needed in (("dgrad", needs_dx), ("wgrad", needs_dw)) if not needed)
        x, x_q, w_q = _restore(ctx)
        now = (plan.clock.step, plan.clock.micro_batch)
        plan.clock.step, plan.clock.micro_batch = ctx.clock
        dy_TO = dy.flatten(0, -2)
        try:
            with torch.autocast(dy.device.type, enabled=False):
                finish_dx = comm.reduce_dx(_dgrad(plan, comm, dy, dy_TO, w_q, weight)) if needs_dx else None
                dw = _wgrad(plan, comm, dy_TO, x, x_q) if needs_dw else None
        finally:
            plan.clock.step, plan.clock.micro_batch = now
        dx = finish_dx() if finish_dx is not None else None
        return dx, _hand_over(weight, dw) if dw is not None else None, None, None, None


def _dgrad(plan: LinearPlan, comm: LinearComm, dy: Tensor, dy_TO: Tensor, w_q: Codes, weight: Tensor) -> Tensor:
    """[..., I] in dy's dtype; under tensor parallelism a partial sum."""
    if plan.kind("dgrad") == HIGH:
        plan.count("dgrad", dy_TO.shape[0], weight.shape[1], weight.shape[0])
        return dy.matmul(weight.to(dy.dtype))
    dy_q = plan.quantize("dgrad.dy", dy_TO, comm)
    wt_q = plan.backward_operand("dgrad.w", w_q, weight, comm)
    return plan.matmul("dgrad", dy_q, wt_q).to(dy.dtype).unflatten(0, dy.shape[:-1])


def _wgrad(plan: LinearPlan, comm: LinearComm, dy_TO: Tensor, x: Tensor | None, x_q: Codes) -> Tensor:
    """[O, I]: fp32 if quantized, else in dy's dtype."""
    x_TI = comm.gather_x(x).flatten(0, -2) if x is not None else None
    if plan.kind("wgrad") == HIGH:
        assert x_TI is not None
        plan.count("wgrad", dy_TO.shape[1], x_TI.shape[1], x_TI.shape[0])
        return dy_TO.t().matmul(x_TI)
    dyt_q = plan.quantize("wgrad.dy", dy_TO.t(), comm)
    xt_q = plan.backward_operand("wgrad.x", x_q, x_TI, comm)
    return plan.matmul("wgrad", dyt_q, xt_q)


def _hand_over(weight: Tensor, dw: Tensor) -> Tensor:
    """Give dW to autograd, or add it in fp32 to Megatron's `main_grad`.

    With `grad_added_to_main_grad` set, Megatron's gradient hook ignores the returned tensor but still has to fire; its
    value never reaches an optimizer, so a zero stands in, in the parameter's dtype.
    """
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None or dw.dtype != torch.float32 or not hasattr(weight, "grad_added_to_main_grad"):
        return dw.to(weight.dtype)
    main_grad.add_(dw)
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.zeros_like(weight)


def _save(ctx: Any, x: Tensor, x_q: Operand, w_q: Operand) -> None:
    """Keep for backward: the codes a slot reuses, the input where a slot starts from the master; nothing for a gradient
    that nobody asked for.
    """
    recipe = ctx.plan.recipe
    needs_dx, needs_dw = ctx.needs_input_grad[:2]
    tensors: list[Tensor] = []
    ctx.codes = {}
    for name, operand, slot, needed in (("x", x_q, "wgrad.x", needs_dw), ("w", w_q, "dgrad.w", needs_dx)):
        spec = recipe.slot(slot)
        if needed and spec is not None and spec.source != "master" and isinstance(operand, BlockScaledTensor):
            ctx.codes[name] = (len(tensors), operand)
            tensors += [operand.codes, operand.scales, operand.global_scale]
    ctx.x_index = len(tensors) if needs_dw and "x" not in ctx.codes else None
    if ctx.x_index is not None:
        tensors.append(x)
    ctx.codes = {name: (i, (q.format, q.block, q.rotation)) for name, (i, q) in ctx.codes.items()}
    ctx.save_for_backward(*tensors)


def _restore(ctx: Any) -> tuple[Tensor | None, Codes, Codes]:
    """(x, forward codes of x, forward codes of w), each None where it was not kept."""
    saved = ctx.saved_tensors
    codes = {name: BlockScaledTensor(*saved[i : i + 3], *rest) for name, (i, rest) in ctx.codes.items()}
    return saved[ctx.x_index] if ctx.x_index is not None else None, codes.get("x"), codes.get("w")
