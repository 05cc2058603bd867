"""What quantizers do to the operands of every linear: counted on the device while a pass runs, read afterwards.

    watch = OperandWatch(applied, rows=512)
    with applied.aside(), watch.watching():
        model(batch).backward()
    for (path, slot), found in watch.read().items(): ...

Counted is on the first rows of each operand, in the basis of its codes (rotated where the slot rotates); of an operand
in parts what its codes hold, without what stands beside them. Results do not change; pairs of operands that one kernel
makes are made by two, with the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fp4dist.nn.apply import AppliedRecipe
from fp4dist.nn.plan import LinearPlan
from fp4dist.numerics import codes as c
from fp4dist.numerics.grouping import spread
from fp4dist.numerics.quantize import dequantize, original
from fp4dist.numerics.rotation import rotate
from fp4dist.numerics.tensor import BlockScaledTensor, PartedTensor
from fp4dist.spec.operand import QuantSpec
from fp4dist.spec.recipe import SLOTS

_SUMS = 5  # elements, lost, clipped, signal, error
_SLACK = 1 + 2**-10  # a value on the bound is not beyond it


@dataclass(frozen=True, slots=True)
class Operand:
    """One slot of one linear.

    underflow    share of the elements that are not zero and became zero
    saturation   share beyond the largest value that their block can hold
    qsnr         signal over quantization error, dB; inf without error
    amax         largest |value| of the whole operand, before any rotation
    """

    underflow: float
    saturation: float
    qsnr: float
    amax: float


class OperandWatch:
    """Counters of every linear of the whole model, in the same order on every rank.

    counts   False on ranks whose samples are not looked at
    """

    def __init__(self, applied: AppliedRecipe, rows: int, *, counts: bool = True) -> None:
        self._applied, self._rows, self._counts = applied, rows, counts
        self.paths = tuple(sorted(row.site.path for row in applied.rows))
        self._number = {path: i for i, path in enumerate(self.paths)}
        device = applied.targets[0].device if applied.targets else torch.device("cpu")
        shape = (len(self.paths), len(SLOTS))
        self._sums = torch.zeros(*shape, _SUMS, dtype=torch.float64, device=device)
        self._amax = torch.zeros(shape, dtype=torch.float64, device=device)
        self._zeros = torch.zeros(len(self.paths), 2, dtype=torch.float64, device=device)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count what the linears' present plans quantize inside the block."""
        if not self._counts:
            yield
            return
        with ExitStack() as stack:
            for target in self._applied.targets:
                plan = target.module.plan
                if plan is None:
                    continue
                stack.callback(setattr, plan, "kernels", plan.kernels)
                plan.kernels = {
                    name: replace(kernel, fn=partial(self._quantized, plan, name.removesuffix(":codes"), kernel.fn))
                    if name.removesuffix(":codes") in SLOTS
                    else kernel
                    for name, kernel in plan.kernels.items()
                }
                for name in ("pair", "pair_x"):
                    stack.callback(setattr, plan, name, getattr(plan, name))
                    setattr(plan, name, None)
            yield
            self._count_gradients()

    def read(self) -> dict[tuple[str, str], Operand]:
        """(path, slot) -> what was counted on all ranks together. A collective call of the world that waits."""
        sums, amax = _reduced(self._sums, "sum").cpu(), _reduced(self._amax, "max").cpu()
        found = {}
        for i, path in enumerate(self.paths):
            for j, slot in enumerate(SLOTS):
                n, lost, clipped, signal, error = sums[i, j].tolist()
                if n:
                    ratio = signal / error if error > 0 else math.inf
                    qsnr = 10 * math.log10(ratio) if ratio > 0 else -math.inf
                    found[path, slot] = Operand(lost / n, clipped / n, qsnr, float(amax[i, j]))
        return found

    def zero_gradients(self) -> dict[str, float]:
        """Path -> share of exactly zero entries of the weight gradient. A collective call, likewise."""
        zeros = _reduced(self._zeros, "sum").cpu().tolist()
        return {path: z / n for path, (z, n) in zip(self.paths, zeros, strict=True) if n}

    # ---------- counting

    def _quantized(self, plan: LinearPlan, slot: str, fn: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Run a slot's kernel and count. What is decoded for a GEMM in high precision has nothing to count."""
        result = fn(*args, **named)
        spec = plan.spec(slot)
        codes = result if isinstance(result, BlockScaledTensor) else None
        if codes is not None and spec is not None and plan.path in self._number:
            place = self._number[plan.path], SLOTS.index(slot)
            self._count(place, args[0], codes, spec, args[2], named.get("back"))
        return result

    @torch.no_grad()
    def _count(
        self, place: tuple[int, int], source: Tensor | BlockScaledTensor, q: BlockScaledTensor, spec: QuantSpec,
        key: Any, back: Any,
    ) -> None:  # fmt: skip
        part = first_rows(q, self._rows)
        rows = part.shape[0]
        if isinstance(source, Tensor):
            self._amax[place] = torch.maximum(self._amax[place], source.detach().abs().amax().double())
            x = source.detach()[:rows].float()
        else:  # codes of the transpose
            x = original(first_columns(source, rows), *(back or (None, None))).t()[:rows]
            self._amax[place] = torch.maximum(self._amax[place], x.abs().amax().double())
        if spec.rotation is not None:
            x = rotate(x.contiguous(), spec.rotation, key) * spec.rotation.size**-0.5
        values = dequantize(part)
        lost = ((values == 0) & (x != 0)).sum()
        clipped = (x.abs() > largest(part) * _SLACK).sum()
        error = (x - values).square().sum()
        counted = torch.tensor(float(x.numel()), device=x.device)
        self._sums[place] += torch.stack([counted, lost.float(), clipped.float(), x.square().sum(), error]).double()

    @torch.no_grad()
    def _count_gradients(self) -> None:
        """Zeros of the weight gradients that the block has left: Megatron's `main_grad`, or torch's own."""
        for target in self._applied.targets:
            weight = getattr(target.module, "weight", None)
            gradient = getattr(weight, "main_grad", None)
            gradient = gradient if gradient is not None else getattr(weight, "grad", None)
            if isinstance(gradient, Tensor):
                zeros = (gradient == 0).sum().double()
                total = torch.tensor(float(gradient.numel()), dtype=torch.float64, device=zeros.device)
                self._zeros[self._number[target.site.path]] += torch.stack([zeros, total])


def first_rows(q: BlockScaledTensor, rows: int) -> BlockScaledTensor:
    """The first rows of a matrix, a multiple of its blocks; the whole where its scales cannot be cut."""
    rows = min(rows, q.shape[0]) // q.block[0] * q.block[0]
    if q.global_scale.dim() or q.samples > 1 or not rows:
        return replace(q, carrier=None)
    return replace(q, codes=q.codes[:rows], scales=q.scales[: rows // q.block[0]], carrier=None)


def first_columns(q: BlockScaledTensor, columns: int) -> BlockScaledTensor:
    """The first columns likewise; the whole too where `columns` cuts a block or rotation."""
    whole = q.global_scale.dim() or q.samples > 1 or columns % q.block[1] or columns % q.rotation
    if whole or columns >= q.shape[1]:
        return replace(q, carrier=None)
    width = columns // (2 if q.format.element.packed else 1)
    return replace(q, codes=q.codes[:, :width], scales=q.scales[:, : columns // q.block[1]], carrier=None)


def largest(q: BlockScaledTensor) -> Tensor:
    """[R, C] fp32 the largest magnitude that each element's block can hold, in the basis of the codes."""
    scale = c.decode_scale(q.scales, q.format.scale)
    scale = scale.repeat_interleave(q.block[0], 0).repeat_interleave(q.block[1], 1)
    return scale * spread(q.global_scale * q.rotation**-0.5, q.shape) * q.format.element.max


def _reduced(counts: Tensor, how: str) -> Tensor:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        counts = counts.clone()
        dist.all_reduce(counts, op=dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX)
    return counts


@torch.no_grad()
def weight_codes(applied: AppliedRecipe, rows: int) -> dict[str, Tensor]:
    """Path -> the first rows of the forward weight's codes, as they would be now; where they have no noise.

    Collective among the ranks that share a layer. Weights that are not whole here (ZeRO 3) are left out.
    """
    found = {}
    for target in applied.targets:
        plan, weight = target.module.plan, getattr(target.module, "weight", None)
        spec = plan.spec("fprop.w") if plan is not None else None
        if plan is None or spec is None or not spec.is_deterministic or not isinstance(weight, Tensor):
            continue
        if weight.dim() == 2 and not plan.controls:
            q = plan.aside(False).quantize_weight(weight, target.module.comm, False)
            q = q.main if isinstance(q, PartedTensor) else q
            if isinstance(q, BlockScaledTensor):
                found[target.site.path] = first_rows(q, rows).codes.clone()
    return found


def oscillation(before: Tensor, between: Tensor, after: Tensor, packed: bool) -> tuple[int, int]:
    """(codes that changed and changed back, codes) of three samples of one weight's stored codes."""
    masks = (0x0F, 0xF0) if packed else (0xFF,)
    back = sum(int((((before ^ between) & m != 0) & ((before ^ after) & m == 0)).sum()) for m in masks)
    return back, before.numel() * len(masks)
