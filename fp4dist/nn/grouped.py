"""The linears of several experts at once: three grouped GEMMs in place of three per expert, with the same bits.

The tokens of all experts lie in one matrix, sorted by expert. Each expert is a logical tensor of its own: own plan and
noise number, own amax, own scales; only the GEMMs are put together. An expert's number of tokens is whatever the router
makes it, so every operand is filled up with zero tokens to what its blocks and rotation need (`nn.filling`). An expert
without tokens runs nothing, and its weight's gradient is zero.

`expert_linear` is the same for one expert, in `function.py`'s GEMMs: what the grouped form is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fp4dist.kernels.registry import Kernel, grouped
from fp4dist.nn.comm import LinearComm
from fp4dist.nn.estimators import keep_w, keep_x, pass_w, pass_x
from fp4dist.nn.filling import token_multiple
from fp4dist.nn.function import (
    Kept,
    codes_for,
    dtype_of_gradient,
    filled_linear,
    hand_over,
    high_precision_weight,
    in_dtype,
    main_grad_for,
    no_autocast,
    restore,
    save,
)
from fp4dist.nn.gather import TokenGather, Wait
from fp4dist.nn.plan import HIGH, LinearPlan, Operand, gemm_keywords
from fp4dist.spec.recipe import GEMMS

Pair = tuple[Operand, Operand]
Gradient = tuple[Wait, Wait, Callable[[], Tensor]]


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
    plan = expert.plan
    if x.shape[0] == 0:
        if torch.is_grad_enabled():
            plan.tally.unneeded.update(GEMMS)
        return x.matmul(expert.weight.to(x.dtype).t())  # empty; backward gives the weight its zero gradient
    with _at_part([plan], part):
        return filled_linear(x, expert.weight, plan, expert.comm)


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
    added = [m - n for m, n in zip(full, counts, strict=True)]
    group = _Group([e.plan for e in experts], [e.comm for e in experts], full, added)
    with _at_part(group.plans, part), no_autocast(x):
        y = GroupedLinearFunction.apply(x, group, torch.is_grad_enabled(), *(e.weight for e in experts))
    if full == list(counts):
        return y
    return torch.cat([rows[:count] for rows, count in zip(y.split(full), counts, strict=True)])


@dataclass(slots=True)
class _Group:
    """What the experts of one call share; `counts` already filled up, by `added` zero tokens."""

    plans: list[LinearPlan]
    comms: list[LinearComm]
    counts: list[int]
    added: list[int]

    def enter(self, training: bool) -> None:
        """Begin a pass."""
        for plan, added in zip(self.plans, self.added, strict=True):
            plan.training, plan.filled = training, added

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
        group.enter(training)
        x_parts, operands = x.split(group.counts), {}
        for e in group.busy("fprop", high=False):
            plan, comm = group.plans[e], group.comms[e]
            w_q = plan.quantize_weight(weights[e], comm, training)
            operands[e] = (plan.quantize("fprop.x", x_parts[e], comm), w_q)
        high = group.busy("fprop", high=True)
        products = _products(group, "fprop", operands, counted=training, out=x.dtype)
        products |= _high_rows(x_parts, {e: weights[e].to(x.dtype).t() for e in high})
        y = _in_order(products, x, weights[0].shape[0])
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
        group.enter(training=True)
        needs_dx, needs_dw = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        for e, plan in enumerate(group.plans):
            unneeded = (("fprop", bool(group.counts[e])), ("dgrad", needs_dx), ("wgrad", needs_dw[e]))
            plan.tally.unneeded.update(gemm for gemm, needed in unneeded if not (needed and group.counts[e]))
        *kept, whole = restore(ctx)
        x_parts = whole.x.split(group.counts) if whole.x is not None else None
        dy_parts = dy.split(group.counts)
        with ExitStack() as stack, no_autocast(dy):
            times = zip(group.plans, ctx.times, strict=True)
            for clock, time in {id(plan.clock): (plan.clock, time) for plan, time in times}.values():
                stack.enter_context(clock.at(*time))
            dys = [
                TokenGather(plan, comm).gradient(part, needs_dx, needed)
                for plan, comm, part, needed in zip(group.plans, group.comms, dy_parts, needs_dw, strict=True)
            ]
            dx = _dgrad(group, dy, dy_parts, dys, kept, weights) if needs_dx else None
            dws = _wgrad(group, dy_parts, dys, x_parts, kept, weights, needs_dw)
        return dx, None, None, *dws


def _dgrad(
    group: _Group,
    dy: Tensor,
    dy_parts: Sequence[Tensor],
    dys: Sequence[Gradient],
    kept: Sequence[Kept],
    weights: Sequence[Tensor],
) -> Tensor:
    """[T, I] in dy's dtype. dys: each expert's dY as `TokenGather.gradient` gives it."""
    operands = {}
    for e in group.busy("dgrad", high=False):
        plan, comm = group.plans[e], group.comms[e]
        w_q = plan.backward_operand("dgrad.w", kept[e].w_q, weights[e], comm)
        operands[e] = (dys[e][0](), in_dtype(w_q, dy.dtype))
    products = _products(group, "dgrad", operands, out=dy.dtype)
    high = group.busy("dgrad", high=True)
    plain = {e: high_precision_weight(group.plans[e], kept[e].w_q, weights[e], group.comms[e]) for e in high}
    products |= _high_rows(dy_parts, {e: w.to(dy.dtype) for e, w in plain.items()})
    _count_high(group, "dgrad", high, weights)
    passed = {e: pass_x(group.plans[e], dx, kept[e].passing_x) for e, dx in products.items() if kept[e].passing_x}
    return _in_order(products | passed, dy, weights[0].shape[1])


def _in_order(parts: Mapping[int, Tensor], like: Tensor, columns: int) -> Tensor:
    """[T, columns] in the dtype of `like`: the rows of all experts that have any."""
    rows = [part for e in sorted(parts) if len(part := parts[e].to(like.dtype))]
    if not rows:
        return like.new_empty((0, columns))
    whole = rows[0].as_strided((sum(map(len, rows)), columns), (columns, 1)) if _in_a_row(rows) else None
    return torch.cat(rows) if whole is None else whole


def _in_a_row(rows: Sequence[Tensor]) -> bool:
    """Whether dense matrices lie one behind the other in one memory, as grouped GEMMs may leave them."""
    start, memory = rows[0].data_ptr(), rows[0].untyped_storage().data_ptr()
    for part in rows:
        if part.data_ptr() != start or part.untyped_storage().data_ptr() != memory or not part.is_contiguous():
            return False
        start += part.numel() * part.element_size()
    return True


def _wgrad(
    group: _Group,
    dy_parts: Sequence[Tensor],
    dys: Sequence[Gradient],
    x_parts: Sequence[Tensor] | None,
    kept: Sequence[Kept],
    weights: Sequence[Tensor],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """The gradient of each weight as autograd gets it: zero for an expert without tokens, None if nobody asked."""
    operands = {}
    for e in group.busy("wgrad", high=False):
        if needed[e]:
            plan, comm = group.plans[e], group.comms[e]
            master = x_parts[e] if x_parts is not None else None
            x_q = plan.backward_operand("wgrad.x", kept[e].x_q, master, comm)
            operands[e] = (dys[e][1](), in_dtype(x_q, dy_parts[e].dtype))
    totals = {e: main_grad_for(group.plans[e], weights[e], bool(kept[e].passing_w)) for e in operands}
    alone = all(total is None for total in totals.values())  # else sums in fp32
    rounded = alone and all(dtype_of_gradient(weights[e]) and not kept[e].passing_w for e in operands)
    dws = _products(group, "wgrad", operands, out=torch.bfloat16 if rounded else torch.float32, into=totals)
    high = [e for e in group.busy("wgrad", high=True) if needed[e]]
    if high:
        dws |= _high_weights(dy_parts, {e: _high_input(group, e, x_parts, kept[e], dy_parts[e].dtype) for e in high})
        _count_high(group, "wgrad", high, weights)
    return [
        None
        if not wanted
        else hand_over(weight, pass_w(group.plans[e], dws[e], weight, kept[e].passing_w))
        if e in dws
        else torch.zeros_like(weight)
        for e, (weight, wanted) in enumerate(zip(weights, needed, strict=True))
    ]


def _products(
    group: _Group,
    gemm: str,
    operands: dict[int, Pair],
    counted: bool = True,
    *,
    out: torch.dtype = torch.float32,
    into: Mapping[int, Tensor | None] | None = None,
) -> dict[int, Tensor]:
    """A B^T of every pair, in one call for each kernel that the plans have chosen; out, into: of `LinearPlan.matmul`"""
    by_kernel: dict[Kernel, list[int]] = {}
    for e in operands:
        by_kernel.setdefault(group.plans[e].kernels[gemm], []).append(e)
    found: dict[int, Tensor] = {}
    for kernel, members in by_kernel.items():
        pairs = [group.plans[e].operands(gemm, *operands[e]) for e in members]
        named = gemm_keywords(out, None)
        if into is not None:  # also where none has a sum: each result is then a tensor of its own
            named["into"] = [into[e] for e in members]
        found.update(zip(members, grouped(kernel)([a for a, _ in pairs], [b for _, b in pairs], **named), strict=True))
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


def _high_input(
    group: _Group, e: int, x_parts: Sequence[Tensor] | None, kept: Kept, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """[T_e, I] what expert e's wgrad without quantized operands multiplies."""
    if group.plans[e].recipe.dequantized("wgrad.x"):
        x_IT = in_dtype(group.plans[e].backward_operand("wgrad.x", kept.x_q, None, group.comms[e]), dtype)
        assert isinstance(x_IT, Tensor)
        return x_IT.t()
    assert x_parts is not None
    return x_parts[e]


def _high_weights(dys: Sequence[Tensor], xs: dict[int, Tensor]) -> dict[int, Tensor]:
    """dys[e]^T xs[e]: [O, I] in high precision."""
    members = list(xs)
    dy, x = [dys[e] for e in members], list(xs.values())
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
    group, several, keep_whole = ctx.group, [], False
    needs_dx, needs_dw = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
    x_parts = x.split(group.counts)
    for e, (plan, comm) in enumerate(zip(group.plans, group.comms, strict=True)):
        kept = Kept()
        if e in operands:
            x_q, w_q = operands[e]
            kept = Kept(
                x_q=codes_for(plan, "wgrad.x", x_q) if needs_dw[e] else None,
                w_q=codes_for(plan, "dgrad.w", w_q) if needs_dx else None,
                passing_x=keep_x(plan, comm, x_parts[e], x_q) if needs_dx else [],
                passing_w=keep_w(plan, w_q) if needs_dw[e] else [],
            )
        keep_whole |= bool(needs_dw[e] and group.counts[e] and kept.x_q is None)
        several.append(kept)
    save(ctx, *several, Kept(x=x if keep_whole else None))


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
