"""The only autograd code: fprop, dgrad, wgrad of a linear layer, each contracting the last dimension of both operands.

    Y [T,O] = X [T,I] (W  [O,I])^T      forward
    dX[T,I] = dY[T,O] (W^T[I,O])^T      backward, communication of dX overlaps the next line
    dW[O,I] = dY^T[O,T] (X^T[I,T])^T

Kept between forward and backward is what the backward slots' sources ask for: packed codes for `requant`, `reuse` and
`dequant` (0.5625 bytes an element), the high-precision tensor for `master` and bf16, or codes of it where forward can
make those for wgrad from the same reading of x; under sequence parallelism this
rank's part of either; and what gradients need to pass the forward quantizers (`nn.estimators`). A GEMM without
quantized operands runs the very calls of Megatron-core's own linear, so that an all-bf16 recipe gives its bits (those
that it gives without Apex's fused accumulation into `main_grad`, which is not used here). A quantized GEMM rounds its
fp32 sum to the model's dtype itself, and that of wgrad adds to `main_grad` in fp32.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fp4dist.errors import RecipeMismatch
from fp4dist.nn.comm import LinearComm
from fp4dist.nn.estimators import keep_w, keep_x, pass_w, pass_x, passes_late, refuse_untrained
from fp4dist.nn.filling import may_fill, why_not_filled
from fp4dist.nn.gather import TokenGather, Wait
from fp4dist.nn.plan import HIGH, LinearPlan, Operand
from fp4dist.numerics.tensor import BlockScaledTensor, PartedTensor, Quantized, pack, unpack

Codes = Quantized | None
_CODES = ("x_q", "w_q", "xt_q")  # fields of Kept, in their order


def fp4_linear(x: Tensor, weight: Tensor, plan: LinearPlan, comm: LinearComm) -> Tensor:
    """Y = X W^T under a plan.

    x        [..., I] this rank's input (a sequence-parallel part, if `comm` gathers)
    weight   [O, I] this rank's shard; a `main_grad` attribute (fp32) receives the FP4 weight gradient directly
    returns  [..., O] in x's dtype (likewise a part, if `comm` scatters)

    Tokens that no block divides are filled up with zeros (`nn.filling`), or refused with a RecipeMismatch. On a GPU
    nothing waits for the device, and both passes can be captured as a CUDA graph. Its replays draw the noise of the
    time that the clock's `moment` shows then; captured without a moment, they repeat the noise of the captured step.
    """
    tokens = x.shape[:-1].numel()
    if tokens % plan.multiple() and may_fill(comm) and (reason := why_not_filled(plan.recipe)) is not None:
        raise RecipeMismatch(
            f"{plan.path} {reason}; change the {tokens} tokens of a micro-batch, or give this layer to bf16 with a rule"
        )
    return filled_linear(x, weight, plan, comm)


def filled_linear(x: Tensor, weight: Tensor, plan: LinearPlan, comm: LinearComm) -> Tensor:
    """`fp4_linear` that fills up tokens without asking whether zeros among them change anything."""
    tokens = x.shape[:-1].numel()
    plan.filled = -tokens % plan.multiple() if may_fill(comm) else 0
    whole = torch.nn.functional.pad(x.flatten(0, -2), (0, 0, 0, plan.filled)) if plan.filled else x
    with no_autocast(x):
        y = Fp4LinearFunction.apply(whole, weight, plan, comm, torch.is_grad_enabled())
    return y[:tokens].unflatten(0, x.shape[:-1]) if whole is not x else y


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Inside, no autocast for x's device: it would run the fp32 arithmetic of a GEMM in bf16."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


class Fp4LinearFunction(torch.autograd.Function):
    """Three GEMMs under one LinearPlan."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, plan: LinearPlan, comm: LinearComm, training: bool
    ) -> Tensor:
        """Quantize x and w, multiply, keep what backward needs."""
        plan.training = training
        gather, turned = TokenGather(plan, comm, counted=training), None
        if plan.kind("fprop") == HIGH:
            full_x = gather.whole("fprop.x", x)() if comm.token_shard == "x" else x
            x_q, w_q = x, weight
            y = torch.matmul(full_x, weight.to(full_x.dtype).t())  # the dtypes differ under autocast only
            if training:
                plan.count("fprop", full_x.numel() // full_x.shape[-1], weight.shape[0], weight.shape[1])
        else:
            every_x, x_q, turned = gather.forward_x(x, training and ctx.needs_input_grad[1])
            w_q = plan.quantize_weight(weight, comm, training)
            y = plan.matmul("fprop", every_x(), w_q, counted=training, out=x.dtype)
            y = y.view(*_leading(x, comm, "x"), y.shape[1])  # `unflatten` takes the host four times as long
        if training:
            ctx.plan, ctx.comm, ctx.clock = plan, comm, (plan.clock.step, plan.clock.micro_batch)
            ctx.filled = plan.filled
            ctx.weight = weight  # the parameter itself: backward looks for its main_grad
            if not any(ctx.needs_input_grad[:2]):  # frozen up to here: autograd never calls backward
                plan.tally.unneeded.update(("dgrad", "wgrad"))
            _save(ctx, x, x_q, w_q, turned)
        return comm.reduce_y(y)

    @staticmethod
    @once_differentiable  # the gradient of a rounded gradient would silently be wrong: autograd raises instead
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # type: ignore[override]
        """Both gradients; noise is keyed by the step and micro-batch of this layer's forward."""
        plan, comm, weight = ctx.plan, ctx.comm, ctx.weight
        plan.training, plan.filled = True, ctx.filled
        needs_dx, needs_dw = ctx.needs_input_grad[:2]
        plan.tally.unneeded.update(g for g, needed in (("dgrad", needs_dx), ("wgrad", needs_dw)) if not needed)
        (kept,) = restore(ctx)
        x, x_q, w_q = kept.x, kept.x_q, kept.w_q
        gather, leading = TokenGather(plan, comm), _leading(dy, comm, "y")
        with plan.clock.at(*ctx.clock), no_autocast(dy):
            dy_TO, dy_OT, whole_dy = gather.gradient(dy, needs_dx, needs_dw)
            tokens = leading.numel()
            x_IT = kept.turned_x() if needs_dw else None
            if needs_dw and x_IT is None:
                x_IT = gather.backward_x(x, x_q, tokens, dy.element_size())  # travels under dgrad
            dx = _dgrad(plan, comm, dy_TO, whole_dy, w_q, weight, dy.dtype, leading) if needs_dx else None
            if dx is not None and not passes_late(comm):
                dx = pass_x(plan, dx, kept.passing_x)
            operands = (dy_OT(), x_IT()) if x_IT is not None else None  # before: their amax would wait for dX behind it
            finish_dx = comm.reduce_dx(dx) if dx is not None else None  # travels under wgrad's GEMM
            total = main_grad_for(plan, weight, bool(kept.passing_w))
            rounded = dtype_of_gradient(weight)
            early = None if kept.passing_w else rounded
            dw = _wgrad(plan, *operands, dy.dtype, total, early) if operands is not None else None
            if dw is not None and kept.passing_w:
                dw = pass_w(plan, dw, weight, kept.passing_w, main_grad_for(plan, weight, False), rounded)
            dx = finish_dx() if finish_dx is not None else None
            if dx is not None and passes_late(comm):
                dx = pass_x(plan, dx, kept.passing_x)
        return dx, hand_over(weight, dw) if dw is not None else None, None, None, None


def _leading(t: Tensor, comm: LinearComm, name: str) -> torch.Size:
    """Leading dimensions of x or y with all tokens, from this rank's tensor."""
    first = t.shape[0] * (comm.size if comm.token_shard == name else 1)
    return torch.Size((first, *t.shape[1:-1]))


def _dgrad(
    plan: LinearPlan, comm: LinearComm, dy_TO: Wait, whole_dy: Wait, w_q: Codes, weight: Tensor, dtype: torch.dtype,
    leading: torch.Size,
) -> Tensor:  # fmt: skip
    """[..., I] in dY's dtype; under tensor parallelism a partial sum."""
    if plan.kind("dgrad") == HIGH:
        plan.count("dgrad", leading.numel(), weight.shape[1], weight.shape[0])
        w = high_precision_weight(plan, w_q, weight, comm)
        return whole_dy().matmul(w.to(dtype))  # type: ignore[arg-type]
    wt_q = in_dtype(plan.backward_operand("dgrad.w", w_q, weight, comm), dtype)
    dx = plan.matmul("dgrad", dy_TO(), wt_q, out=dtype)
    return dx.view(*leading, dx.shape[1])


def high_precision_weight(plan: LinearPlan, w_q: Codes, weight: Tensor, comm: LinearComm) -> Tensor:
    """[O, I] what a dgrad without quantized operands multiplies: the weight, or the values that its codes have."""
    if "dgrad.w" not in plan.facts.dequantized:
        return weight
    w_IO = plan.backward_operand("dgrad.w", w_q, None, comm)
    assert isinstance(w_IO, Tensor)
    return w_IO.t()


def in_dtype(operand: Operand, dtype: torch.dtype) -> Operand:
    """A high-precision operand in the model's dtype."""
    return operand.to(dtype) if isinstance(operand, Tensor) else operand


def _wgrad(
    plan: LinearPlan, dy_OT: Operand, x_IT: Operand, dtype: torch.dtype, total: Tensor | None, out: torch.dtype | None
) -> Tensor:
    """[O, I]: if quantized in dtype `out`, or else fp32, else in dY's dtype. total: of `main_grad_for`; returned with
    dW in it.
    """
    x_IT = in_dtype(x_IT, dtype)
    if plan.kind("wgrad") == HIGH:
        assert isinstance(dy_OT, Tensor)
        assert isinstance(x_IT, Tensor)
        plan.count("wgrad", dy_OT.shape[0], x_IT.shape[0], dy_OT.shape[1])
        return dy_OT.matmul(x_IT.t())
    return plan.matmul("wgrad", dy_OT, x_IT, into=total, out=torch.float32 if out is None else out)


def main_grad_for(plan: LinearPlan, weight: Tensor, passes: bool) -> Tensor | None:
    """[O, I] fp32 that wgrad's GEMM may add dW to by itself: Megatron's `main_grad`. None where dW is wanted alone.

    passes   an estimator still changes dW
    """
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None or passes or plan.kind("wgrad") == HIGH or not hasattr(weight, "grad_added_to_main_grad"):
        return None
    fits = main_grad.dtype == torch.float32 and main_grad.shape == weight.shape and main_grad.is_contiguous()
    return main_grad if fits else None


def dtype_of_gradient(weight: Tensor) -> torch.dtype | None:
    """bf16, where that is what dW is rounded to in the end, so that a kernel may round it; None: it stays fp32."""
    if hasattr(weight, "main_grad") and hasattr(weight, "grad_added_to_main_grad"):
        return None
    wanted = weight.grad_dtype if weight.is_leaf else weight.dtype
    return wanted if wanted == torch.bfloat16 else None


def hand_over(weight: Tensor, dw: Tensor) -> Tensor:
    """Give dW to autograd, or add it in fp32 to Megatron's `main_grad`, unless the GEMM has: then `dw` is that.

    With `grad_added_to_main_grad` set, Megatron's gradient hook ignores the returned tensor but still has to fire; its
    value never reaches an optimizer, so a zero stands in, in the parameter's dtype.
    """
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None or dw.dtype != torch.float32 or not hasattr(weight, "grad_added_to_main_grad"):
        wanted = weight.grad_dtype if weight.is_leaf else weight.dtype  # ZeRO keeps fp32 gradients of bf16 weights
        return dw if wanted is None else dw.to(wanted)
    if dw is not main_grad:
        main_grad.add_(dw)
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return _zeros(weight.shape, weight.dtype, weight.device).detach()  # another tensor: autograd takes it uncopied


@lru_cache(maxsize=32)
def _zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Shared by all weights of a shape: nobody adds anything but zeros to it."""
    return torch.zeros(shape, dtype=dtype, device=device)


def _save(ctx: Any, x: Tensor, x_q: Operand, w_q: Operand, turned: Operand | None) -> None:
    """Keep for backward: the codes a slot starts from, the input where a slot starts from the master, what gradients
    need to pass the quantizers; nothing for a gradient that nobody asked for.
    """
    plan, (needs_dx, needs_dw) = ctx.plan, ctx.needs_input_grad[:2]
    if not needs_dx:
        refuse_untrained(plan)
    kept = Kept(
        x_q=codes_for(plan, "wgrad.x", x_q) if needs_dw else None,
        w_q=codes_for(plan, "dgrad.w", w_q) if needs_dx else None,
        xt_q=turned if isinstance(turned, BlockScaledTensor) else None,
        passing_x=keep_x(plan, ctx.comm, x, x_q) if needs_dx else [],
        passing_w=keep_w(plan, w_q) if needs_dw else [],
    )
    kept.x = x if needs_dw and kept.x_q is None and kept.xt_q is None else None
    save(ctx, kept)


def codes_for(plan: LinearPlan, slot: str, operand: Operand) -> Codes:
    """The forward `operand`, if backward `slot` starts from its codes."""
    return operand if slot in plan.facts.reads_codes and isinstance(operand, BlockScaledTensor | PartedTensor) else None


@dataclass(slots=True)
class Kept:
    """What one linear keeps between forward and backward; each None or empty where nothing needs it.

    x             [..., I] this rank's input;  x_q, w_q   forward codes;  xt_q   codes of wgrad.x, in place of x
    passing_x     of `nn.estimators.keep_x`;  passing_w   of `keep_w`
    """

    x: Tensor | None = None
    x_q: Codes = None
    w_q: Codes = None
    xt_q: Codes = None
    passing_x: list[Tensor] = field(default_factory=list)
    passing_w: list[Tensor] = field(default_factory=list)

    def turned_x(self) -> Wait | None:
        """wgrad.x [I, T], where forward has made it."""
        operand = self.xt_q
        return None if operand is None else lambda: operand


def save(ctx: Any, *several: Kept) -> None:
    """Save all tensors of `several` for backward, and in `ctx.kept` how they go together."""
    tensors: list[Tensor] = []
    ctx.kept = []

    def add(new: list[Tensor]) -> slice:
        tensors.extend(new)
        return slice(len(tensors) - len(new), len(tensors))

    for kept in several:
        where: dict[str, Any] = {}
        for name in _CODES:
            codes = getattr(kept, name)
            if codes is not None:
                parts, layout = pack(codes)
                where[name] = (add(parts), layout)
        where["x"] = add([kept.x]) if kept.x is not None else None
        where["passing"] = add(kept.passing_x), add(kept.passing_w)
        ctx.kept.append(where)
    ctx.save_for_backward(*tensors)


def restore(ctx: Any) -> list[Kept]:
    """What `save` was given."""
    saved = ctx.saved_tensors
    several = []
    for where in ctx.kept:
        codes = {name: unpack(saved[where[name][0]], where[name][1]) for name in _CODES if name in where}
        x = saved[where["x"]][0] if where["x"] is not None else None
        passing = [list(saved[part]) for part in where["passing"]]
        several.append(Kept(x, codes.get("x_q"), codes.get("w_q"), codes.get("xt_q"), *passing))
    return several
