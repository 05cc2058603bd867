"""Block-scaled GEMM: exact products, fp32 accumulation, all global factors applied once to the fp32 result."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fp4dist.numerics.codes import decode_stored
from fp4dist.numerics.grouping import spread
from fp4dist.numerics.quantize import carrier
from fp4dist.numerics.scales import divide, fp32
from fp4dist.numerics.tensor import BlockScaledTensor, Carrier, Chosen, PartedTensor, Quantized

Single = BlockScaledTensor | Carrier | Tensor  # an operand without parts
Operand = Quantized | Carrier | Tensor


def matmul(a_MK: Operand, b_NK: Operand, *, out: torch.dtype = torch.float32, into: Tensor | None = None) -> Tensor:
    """A B^T: [M, K] x [N, K] -> [M, N], summed in fp32, rounded to `out` (fp32 or bf16) once, after all scales.

    into   [M, N] fp32: the product is added to it in fp32 and it is returned

    Operands are block-scaled tensors, carriers, or plain (bf16, fp32) tensors. A quantized operand enters as code *
    block scale, which bf16 holds exactly for one-byte scales; the scales of the tensor and of whole rows and the
    rotation's 1/n multiply the fp32 sum. Scales of tiles, and fp32 scales of blocks, cannot leave the sum: they
    multiply the operand in fp32.
    An operand of several samples gives the mean of their products. Two quantized operands must share a rotation.

    An operand in parts is a sum, and what stands beside its codes is multiplied in fp32:
    (A + a)(B + b)^T = A B^T + a (B + b)^T + A b^T. Where B has a `partner`, a meets that in place of B + b.
    """
    rotation = check_product(a_MK, b_NK, out, into)
    pairs = [(a, b) for a in _samples(a_MK) for b in _samples(b_NK)]
    total = _product(*pairs[0], rotation)
    for a, b in pairs[1:]:
        total = total + _product(a, b, rotation)
    total = total if len(pairs) == 1 else divide(total, float(len(pairs)))
    return total.to(out) if into is None else into.add_(total)


def check_product(a_MK: Operand, b_NK: Operand, out: torch.dtype, into: Tensor | None) -> int:
    """The rotation that both operands share; ValueError where they do not fit each other or the result."""
    rotation = _common_rotation(a_MK, b_NK)
    if a_MK.shape[1] != b_NK.shape[1]:
        raise ValueError(f"contracted dimensions differ: {list(a_MK.shape)} and {list(b_NK.shape)}")
    if out not in (torch.float32, torch.bfloat16):
        raise ValueError(f"out = {out} must be torch.float32 or torch.bfloat16")
    if into is None:
        return rotation
    shape = [a_MK.shape[0], b_NK.shape[0]]
    if out != torch.float32:
        raise ValueError(f"out = {out} has no meaning with `into`, which is fp32; leave it out")
    if into.dtype != torch.float32 or list(into.shape) != shape:
        raise ValueError(f"into is {into.dtype} {list(into.shape)}; it must be torch.float32 {shape}, as the product")
    return rotation


def _product(a: Operand, b: Operand, rotation: int) -> Tensor:
    """[M, N] of one sample each."""
    if not isinstance(a, PartedTensor) and not isinstance(b, PartedTensor):
        return _codes_product(a, b, rotation)
    left, right = OperandParts.of(a), OperandParts.of(b)
    total = _codes_product(left.main, right.main, rotation)
    if left.side is not None:
        total = total + _gemm(left.side, right.met_by(left)) * fp32(1.0 / basis_of_side(left, right, rotation))
    if right.side is not None:
        met = _values(left.main) if left.partner is None else left.partner
        total = total + _gemm(met, right.side) * fp32(1.0 / basis_of_side(right, left, rotation))
    return total


def basis_of_side(one: OperandParts, other: OperandParts, rotation: int) -> int:
    """The rotation of the side of `one`, and of what it meets; ValueError where these are in two bases."""
    if one.straight != other.straight or (one.straight and other.partner is None):
        raise ValueError("a side in the original basis has to meet a partner in it; assemble both operands `straight`")
    return 1 if one.straight else rotation


class OperandParts(NamedTuple):
    """An operand's parts, unnormalized in its rotated basis."""

    main: Single
    side: Tensor | None
    partner: Tensor | None
    chosen: Chosen | None = None  # which a backend may use; products are the same without
    straight: bool = False  # side and partner are in the original basis

    @classmethod
    def of(cls, operand: Operand) -> OperandParts:
        """A plain or quantized operand has its main part alone."""
        if isinstance(operand, PartedTensor):
            chosen, straight = operand.chosen, operand.straight
            if chosen is not None and chosen.alone:
                return cls(operand.main, operand.added, operand.partner, chosen._replace(alone=False), straight)
            return cls(operand.main, operand.side, operand.partner, chosen, straight)
        return cls(operand, None, None)

    def met_by(self, left: OperandParts) -> Tensor:
        """[N, K] fp32 what the side of `left` multiplies; a partner of left's already meets our side."""
        if self.partner is not None:
            return self.partner
        values = _values(self.main)
        return values if self.side is None or left.partner is not None else values + self.side


def _values(main: Single) -> Tensor:
    """[R, K] fp32, not divided by the rotation's sqrt(n)."""
    if isinstance(main, Tensor):
        return main.to(torch.float32)
    if isinstance(main, Carrier):
        scaled = main.values.to(torch.float32) * main.scale
        return scaled if main.rows is None else scaled * spread(main.rows, main.shape)
    return carrier(main) * spread(main.global_scale, main.shape)


def _codes_product(a: Single, b: Single, rotation: int) -> Tensor:
    """[M, N], factors of rows last."""
    return product_of_codes(a, b, rotation, _gemm)


def product_of_codes(a: Single, b: Single, rotation: int, gemm: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """[M, N] fp32 of operands without parts; `gemm` adds up A B^T of what stands inside the sum."""
    left, right = _factors(a), _factors(b)
    total = gemm(left.inner, right.inner) * (left.scale * right.scale / rotation)
    if left.rows is not None:
        total = total * left.rows
    return total if right.rows is None else total * right.rows.t()


def _gemm(a: Tensor, b: Tensor) -> Tensor:
    """fp32 [M, N]. On a GPU bf16 operands run on tensor cores with an fp32 accumulator and output."""
    if a.is_cuda and a.dtype == b.dtype == torch.bfloat16:
        return torch.mm(a, b.t(), out_dtype=torch.float32)
    return torch.mm(a.to(torch.float32), b.to(torch.float32).t())


class Factors(NamedTuple):
    """An operand as inner [R, K] * rows [R, 1] * scale []."""

    inner: Tensor
    rows: Tensor | None
    scale: Tensor


def _factors(operand: Single) -> Factors:
    if isinstance(operand, Tensor):
        return Factors(operand, None, torch.ones((), device=operand.device))
    if isinstance(operand, Carrier):
        if operand.rows is not None and operand.rows.shape[1] > 1:
            inner = operand.values.to(torch.float32) * spread(operand.rows, operand.shape)
            return Factors(inner, None, operand.scale)
        return Factors(_narrowed(operand.values), operand.rows, operand.scale)
    q, outer = operand, operand.global_scale
    if not q.format.scale.bf16_exact:
        if q.scales.dtype == torch.float32 and q.scales.shape[1] == 1:  # of whole rows, or of the tensor
            values = decode_stored(q.codes, q.format.element)
            if q.scales.numel() == 1:
                return Factors(_narrowed(values), None, q.scales.reshape(()) * outer)
            return Factors(_narrowed(values), spread(q.scales, (q.shape[0], 1)), outer)
        return _outside(carrier(q), outer, fp32=True)
    return _outside(carrier(q), outer, fp32=outer.dim() == 2 and outer.shape[1] > 1)


def _outside(values: Tensor, outer: Tensor, *, fp32: bool) -> Factors:
    """`values` for the GEMM (in fp32 where bf16 would round them), with the outer scale of the tensor or of rows
    outside and that of tiles inside.
    """
    one = torch.ones((), device=values.device)
    if outer.dim() == 2 and outer.shape[1] > 1:
        return Factors(values * spread(outer, values.shape), None, one)
    values = values if fp32 else _narrowed(values)
    if outer.dim() == 0:
        return Factors(values, None, outer)
    return Factors(values, spread(outer, (values.shape[0], 1)), one)


def _narrowed(values: Tensor) -> Tensor:
    """In bf16 where tensor cores can use it; every value is exact there."""
    return values.to(torch.bfloat16) if values.is_cuda else values


def _samples(operand: Operand) -> list[Operand]:
    if isinstance(operand, (Tensor, Carrier)):
        return [operand]
    return [operand.sample(i) for i in range(operand.samples)]


def _common_rotation(a: Operand, b: Operand) -> int:
    sizes = [1 if isinstance(o, Tensor) else o.rotation for o in (a, b)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"operands are in different rotated bases: {sizes[0]} and {sizes[1]}")
    return sizes[0]
