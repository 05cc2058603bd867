"""The linears of several experts at once: three grouped GEMMs in place of three per expert, with the same bits.

The tokens of all experts lie in one matrix, sorted by expert. Each expert is a logical tensor of its own: own plan and
noise number, own amax, own scales; only the GEMMs are put together. An expert's number of tokens is whatever the router
makes it, so every operand is filled up with zero tokens to what its blocks and rotation need; a zero token changes no
amax, adds exactly nothing to dW where tokens are not rotated (and nothing but rounding of the others' rotation where
they are), and is cut from Y and dX. It does lower the moments (quest, sawb) of its block; where that is a whole row or
tensor, `nn.assign.check_shapes` refuses it. An expert without tokens runs nothing, and its weight's gradient is zero.

`expert_linear` is the same for one expert, in `function.py`'s GEMMs: what the grouped form is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fp4dist.kernels.registry import Kernel, grouped
from fp4dist.nn.assign import token_multiple
from fp4dist.nn.comm import LinearComm
from fp4dist.nn.function import fp4_linear, hand_over
from fp4dist.nn.plan import HIGH, LinearPlan, Operand
from fp4dist.numerics.tensor import BlockScaledTensor
from fp4dist.spec.recipe import GEMMS

Pair = tuple[Operand, Operand]


@dataclass(frozen=True, slots=True)
class Expert:
    """One expert's linear: W [O, I], its plan, and how W is sharded."""

    weight: Tensor
    plan: LinearPlan
    comm: LinearComm


@dataclass(frozen=True, slots=True)
class TokenPart:
    """This rank is number `index` of `size` ranks that route different tokens of one micro-batch (TP, CP).

    Their experts may be copies of one expert, which then must not share noise: the expert's linears run at micro-batch
    `micro_batch * size + index`.
    """

    index: int = 0
    size: int = 1


def expert_linear(x: Tensor, expert: Expert, part: TokenPart) -> Tensor:
    """[T, I] -> [T, O] for any T: the per-expert form."""
    plan, tokens = expert.plan, x.shape[0]
    if tokens == 0:
        if torch.is_grad_enabled():
            plan.tally.unneeded.update(GEMMS)
        return x.matmul(expert.weight.to(x.dtype).t())  # empty; backward gives the weight its zero gradient
    missing = -tokens % token_multiple(plan.recipe)
    if missing:
        x = torch.nn.functional.pad(x, (0, 0, 0, missing))
    with _at_part([plan], part):
        y = fp4_linear(x, expert.weight, plan, expert.comm)
    return y[:tokens] if missing else y


def grouped_linear(x: Tensor, experts: Sequence[Expert], counts: Sequence[int], part: TokenPart) -> Tensor:
    """[T, I] -> [T, O]: rows sorted by expert, counts[e] of them for experts[e]; bit for bit `expert_linear` on each.

    x         [T, I] bf16 or fp32; T the sum of counts
    returns   [T, O] in x's dtype
    """
    if x.shape[0] != sum(counts) or len(counts) != len(experts):
        raise ValueError(f"{x.shape[0]} rows for {len(experts)} experts with {list(counts)} tokens")
    full = [count + -count % token_multiple(expert.plan.recipe) for expert, count in zip(experts, counts, strict=True)]
    if full != list(counts):
        x = _filled(x, counts, full)
    group = _Group([e.plan for e in experts], [e.comm for e in experts], full)
    with _at_part(group.plans, part), torch.autocast(x.device.type, enabled=False):
        y = GroupedLinearFunction.apply(x, group, torch.is_grad_enabled(), *(e.weight for e in experts))
    if full == list(counts):
        return y
    return torch.cat([rows[:count] for rows, count in zip(y.split(full), counts, strict=True)])


@dataclass(slots=True)
class _Group:
    """What the experts of one call share; `counts` already filled up."""

    plans: list[LinearPlan]
    comms: list[LinearComm]
    counts: list[int]

    def busy(self, gemm: str, high: bool) -> list[int]:
        """Experts with tokens whose `gemm` has no quantized operand (high), or has one."""
        return [
            e
            for e, (plan, count) in enumerate(zip(self.plans, self.counts, strict=True))
            if count and (plan.kind(gemm) == HIGH) == high
        ]


class GroupedLinearFunction(torch.autograd.Function):
    """Three grouped GEMMs; the steps of each expert are those of `Fp4LinearFunction`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: _Group, training: bool, *weights: Tensor) -> Tensor:  # type: ignore[override]
        """Quantize x and the weights expert by expert, multiply all at once, keep what backward needs."""
        x_parts, operands = x.split(group.counts), {}
        for e in group.busy("fprop", high=False):
            plan, comm = group.plans[e], group.comms[e]
            w_q = plan.quantize_weight(weights[e], comm, training)
            operands[e] = (plan.quantize("fprop.x", x_parts[e], comm), w_q)
        y = x.new_empty((x.shape[0], weights[0].shape[0]))
        y_parts = y.split(group.counts)
        for e, product in _products(group, "fprop", operands, counted=training).items():
            y_parts[e].copy_(product)
        high = group.busy("fprop", high=True)
        for e, product in _high_rows(x_parts, {e: weights[e].to(x.dtype).t() for e in high}).items():
            y_parts[e].copy_(product)
        if training:
            _count_high(group, "fprop", high, weights)
            ctx.group, ctx.weights = group, weights  # the parameters themselves: backward looks for their main_grad
            ctx.times = [(plan.clock.step, plan.clock.micro_batch) for plan in group.plans]
            _save(ctx, x, operands)
        return y

    @staticmethod
    @once_differentiable  # as Fp4LinearFunction's
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """All gradients, each expert at the step and micro-batch of its forward."""
        group, weights = ctx.group, ctx.weights
        needs_dx, needs_dw = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        for e, plan in enumerate(group.plans):
            unneeded = (("fprop", bool(group.counts[e])), ("dgrad", needs_dx), ("wgrad", needs_dw[e]))
            plan.tally.unneeded.update(gemm for gemm, needed in unneeded if not (needed and group.counts[e]))
        x_parts, codes = _restore(ctx, group)
        dy_parts = dy.split(group.counts)
        with ExitStack() as stack, torch.autocast(dy.device.type, enabled=False):
            for plan, time in zip(group.plans, ctx.times, strict=True):
                stack.enter_context(plan.clock.at(*time))
            dx = _dgrad(group, dy, dy_parts, codes, weights) if needs_dx else None
            dws = _wgrad(group, dy_parts, x_parts, codes, weights, needs_dw)
        return dx, None, None, *dws


def _dgrad(
    group: _Group,
    dy: Tensor,
    dy_parts: Sequence[Tensor],
    codes: dict[tuple[int, int], BlockScaledTensor],
    weights: Sequence[Tensor],
) -> Tensor:
    """[T, I] in dy's dtype."""
    operands = {}
    for e in group.busy("dgrad", high=False):
        plan, comm = group.plans[e], group.comms[e]
        dy_q = plan.quantize("dgrad.dy", dy_parts[e], comm)
        operands[e] = (dy_q, plan.backward_operand("dgrad.w", codes.get((e, 1)), weights[e], comm))
    dx = dy.new_empty((dy.shape[0], weights[0].shape[1]))
    dx_parts = dx.split(group.counts)
    for e, product in _products(group, "dgrad", operands).items():
        dx_parts[e].copy_(product)
    high = group.busy("dgrad", high=True)
    for e, product in _high_rows(dy_parts, {e: weights[e].to(dy.dtype) for e in high}).items():
        dx_parts[e].copy_(product)
    _count_high(group, "dgrad", high, weights)
    return dx


def _wgrad(
    group: _Group,
    dy_parts: Sequence[Tensor],
    x_parts: Sequence[Tensor] | None,
    codes: dict[tuple[int, int], BlockScaledTensor],
    weights: Sequence[Tensor],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """The gradient of each weight as autograd gets it: zero for an expert without tokens, None if nobody asked."""
    operands = {}
    for e in group.busy("wgrad", high=False):
        if needed[e]:
            plan, comm = group.plans[e], group.comms[e]
            dyt_q = plan.quantize("wgrad.dy", dy_parts[e].t(), comm)
            master = x_parts[e] if x_parts is not None else None
            operands[e] = (dyt_q, plan.backward_operand("wgrad.x", codes.get((e, 0)), master, comm))
    dws = _products(group, "wgrad", operands)
    high = [e for e in group.busy("wgrad", high=True) if needed[e]]
    if high:
        assert x_parts is not None
        dws |= _high_weights(dy_parts, x_parts, high)
        _count_high(group, "wgrad", high, weights)
    return [
        None if not wanted else hand_over(weight, dws[e]) if e in dws else torch.zeros_like(weight)
        for e, (weight, wanted) in enumerate(zip(weights, needed, strict=True))
    ]


def _products(group: _Group, gemm: str, operands: dict[int, Pair], counted: bool = True) -> dict[int, Tensor]:
    """A B^T in fp32 of every pair, in one call for each kernel that the plans have chosen."""
    by_kernel: dict[Kernel, list[int]] = {}
    for e in operands:
        by_kernel.setdefault(group.plans[e].kernels[gemm], []).append(e)
    found: dict[int, Tensor] = {}
    for kernel, members in by_kernel.items():
        results = grouped(kernel)([operands[e][0] for e in members], [operands[e][1] for e in members])
        found.update(zip(members, results, strict=True))
    if counted:
        for e, (a, b) in operands.items():
            group.plans[e].count(gemm, a.shape[0], b.shape[0], a.shape[1])
    return found


def _high_rows(rows: Sequence[Tensor], matrices: dict[int, Tensor]) -> dict[int, Tensor]:
    """rows[e] [T_e, K] times matrices[e] [K, N] in high precision."""
    parts, chosen = [rows[e] for e in matrices], list(matrices.values())
    if not matrices:
        return {}
    if fits_grouped_mm(parts[0], chosen[0]):
        product = torch.nn.functional.grouped_mm(torch.cat(parts), torch.stack(chosen), offs=_ends(parts))
        return dict(zip(matrices, product.split([len(part) for part in parts]), strict=True))
    return {e: part.matmul(matrix) for e, part, matrix in zip(matrices, parts, chosen, strict=True)}


def _high_weights(dys: Sequence[Tensor], xs: Sequence[Tensor], members: Sequence[int]) -> dict[int, Tensor]:
    """dys[e]^T xs[e]: [O, I] in high precision."""
    dy, x = [dys[e] for e in members], [xs[e] for e in members]
    if fits_grouped_mm(dy[0], x[0]):
        product = torch.nn.functional.grouped_mm(torch.cat(dy).t(), torch.cat(x), offs=_ends(dy))
        return dict(zip(members, product.unbind(), strict=True))
    return {e: a.t().matmul(b) for e, a, b in zip(members, dy, x, strict=True)}


def fits_grouped_mm(a: Tensor, b: Tensor) -> bool:
    """Whether torch's grouped GEMM takes the operands: bf16 on a GPU, rows of a multiple of 16 bytes."""
    return a.is_cuda and a.dtype == b.dtype == torch.bfloat16 and not any(n % 8 for n in (a.shape[-1], *b.shape[-2:]))


def _ends(parts: Sequence[Tensor]) -> Tensor:
    """[E] int32: the row behind each part's last."""
    lengths = torch.tensor([len(part) for part in parts], dtype=torch.int32)
    return lengths.cumsum(0, dtype=torch.int32).to(parts[0].device)


def _count_high(group: _Group, gemm: str, members: Sequence[int], weights: Sequence[Tensor]) -> None:
    outputs, inputs = weights[0].shape
    sizes: Callable[[int], tuple[int, int, int]] = {
        "fprop": lambda tokens: (tokens, outputs, inputs),
        "dgrad": lambda tokens: (tokens, inputs, outputs),
        "wgrad": lambda tokens: (outputs, inputs, tokens),
    }[gemm]
    for e in members:
        group.plans[e].count(gemm, *sizes(group.counts[e]))


def _save(ctx: Any, x: Tensor, operands: dict[int, Pair]) -> None:
    """Keep for backward what `Fp4LinearFunction` would, expert by expert; x whole, if any expert needs it."""
    group, tensors = ctx.group, []
    needs_dx, needs_dw = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
    ctx.codes, keep_x = {}, False
    for e, plan in enumerate(group.plans):
        kept_x = False
        for i, slot, needed in ((0, "wgrad.x", needs_dw[e]), (1, "dgrad.w", needs_dx)):
            spec = plan.recipe.slot(slot)
            operand = operands[e][i] if e in operands else None
            if needed and spec is not None and spec.source != "master" and isinstance(operand, BlockScaledTensor):
                ctx.codes[e, i] = (len(tensors), (operand.format, operand.block, operand.rotation))
                tensors += [operand.codes, operand.scales, operand.global_scale]
                kept_x |= i == 0
        keep_x |= bool(needs_dw[e] and group.counts[e] and not kept_x)
    ctx.x_index = len(tensors) if keep_x else None
    ctx.save_for_backward(*tensors, *([x] if keep_x else []))


def _restore(ctx: Any, group: _Group) -> tuple[Sequence[Tensor] | None, dict[tuple[int, int], BlockScaledTensor]]:
    """(parts of x, (expert, 0 for x or 1 for w) -> forward codes)."""
    saved = ctx.saved_tensors
    codes = {at: BlockScaledTensor(*saved[i : i + 3], *rest) for at, (i, rest) in ctx.codes.items()}
    return saved[ctx.x_index].split(group.counts) if ctx.x_index is not None else None, codes


def _filled(x: Tensor, counts: Sequence[int], full: Sequence[int]) -> Tensor:
    """[sum counts, I] -> [sum full, I]: zero rows behind each expert's."""
    parts = zip(x.split(list(counts)), counts, full, strict=True)
    return torch.cat([piece for part, n, m in parts for piece in (part, x.new_zeros((m - n, x.shape[1])))])


def _at_part(plans: Sequence[LinearPlan], part: TokenPart) -> ExitStack:
    """The clocks of `plans` at this rank's part of the micro-batch."""
    stack = ExitStack()
    if part.size > 1:
        for clock in {id(plan.clock): plan.clock for plan in plans}.values():
            stack.enter_context(clock.at(clock.step, clock.micro_batch * part.size + part.index))
    return stack
