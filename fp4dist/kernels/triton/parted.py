"""GEMMs that are sums of GEMMs: of operands in parts, (A + a)(B + b)^T; of several samples; of values in fp32.

What stands beside codes is fp32, and so are codes under fp32 scales of short blocks. Tensor cores multiply fp32 exactly
as the sum of three bf16 terms. What is one row for all tokens, or one column, is multiplied as such.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fp4dist.kernels.triton import grid_values, terms
from fp4dist.kernels.triton.rescaled import SEGMENT
from fp4dist.numerics.matmul import Operand, OperandParts, Single, basis_of_side, check_product
from fp4dist.numerics.scales import divide
from fp4dist.numerics.tensor import BlockScaledTensor, Carrier, Chosen

Multiply = Callable[..., Tensor]
Split = Callable[[Tensor], list[Tensor]]
_TERMS = terms.COUNT  # of 8 significant bits each: all of fp32's 24
_ROWS = 8  # of the thin GEMMs that multiply one row


def matmul(
    a: Operand, b: Operand, multiply: Multiply, *, out: torch.dtype = torch.float32, into: Tensor | None = None,
    split: Split | None = None,
) -> Tensor:  # fmt: skip
    """A B^T of operands of which one or both are in parts; see `fp4dist.numerics.matmul`.

    multiply   the GEMM of operands without parts, called as that one
    split      fp32 -> its bf16 terms; None: `terms.split` on a GPU
    """
    rotation = check_product(a, b, out, into)
    left, right = OperandParts.of(a), OperandParts.of(b)
    bases = [basis_of_side(x, y, rotation) for x, y in ((left, right), (right, left)) if x.side is not None]
    apart = _cleared(left, right)  # no codes of the one stand where the other has a side
    alone = (left.main, right.main) if not bases else _joined(left, right) if apart else None
    if alone is not None:
        return multiply(*alone, into=into) if into is not None else multiply(*alone, out=out)
    total = _Sum(multiply(left.main, right.main, into=into), multiply, bases[0], split or _split)
    if left.side is not None:
        if right.partner is not None:
            total.add(left.side, right.partner, left.chosen)
        else:
            if not apart:
                total.add(left.side, right.main, left.chosen)
            if right.side is not None and left.partner is None:  # a partner of ours meets their side instead
                total.add(left.side, right.side, left.chosen)
    if right.side is not None:
        if left.partner is not None:
            total.add(left.partner, right.side, right.chosen, second=True)
        elif not apart:
            total.add(left.main, right.side, right.chosen, second=True)
    return total.value if into is not None else total.value.to(out)


def samples(operand: Operand) -> int:
    """Independent draws of an operand."""
    return 1 if isinstance(operand, Tensor | Carrier) else operand.samples


def mean_of_samples(
    a: Operand, b: Operand, multiply: Multiply, *, out: torch.dtype = torch.float32, into: Tensor | None = None
) -> Tensor:
    """The mean of the products of all draws of A with all draws of B."""
    check_product(a, b, out, into)
    total: Tensor | None = None
    for x in _draws(a):
        for y in _draws(b):
            total = multiply(x, y, into=total)
    assert total is not None
    total = divide(total, float(samples(a) * samples(b)))
    return total.to(out) if into is None else into.add_(total)


def _draws(operand: Operand) -> list[Operand]:
    if isinstance(operand, Tensor | Carrier):
        return [operand]
    return [operand.sample(i) for i in range(operand.samples)]


def has_terms(operand: Operand) -> bool:
    """Whether `in_terms` makes bf16 terms of an operand that has no carrier."""
    if isinstance(operand, BlockScaledTensor):
        return grid_values.has_values(operand) and operand.global_scale.dim() == 0
    return isinstance(operand, Tensor) and operand.dtype == torch.float32


def in_terms(
    a: Single, b: Single, multiply: Multiply, split: tuple[bool, bool], *, out: torch.dtype = torch.float32,
    into: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A B^T, where what `split` names is fp32 (or codes whose values are) and enters as three terms."""
    first, second = (_as_terms(x) if wide else [x] for x, wide in zip((a, b), split, strict=True))
    total = into
    for i, x in enumerate(first):
        for j, y in enumerate(second):
            if i + j < _TERMS:  # what is left out is below the last bit of fp32
                total = multiply(x, y, into=total)
    assert total is not None
    return total if into is not None else total.to(out)


def _as_terms(x: Single) -> list[Carrier]:
    if isinstance(x, BlockScaledTensor):
        values = grid_values.dequantize(
            replace(x, global_scale=torch.ones_like(x.global_scale), rotation=1, carrier=None)
        )
        return [Carrier(term, x.global_scale, x.rotation) for term in _split(values)]
    assert isinstance(x, Tensor)
    return [Carrier(term, torch.ones((), device=x.device)) for term in _split(x)]


class _Sum:
    """[M, N] fp32 that products are added to, each divided by the rotation."""

    def __init__(self, value: Tensor, multiply: Multiply, rotation: int, split: Split) -> None:
        self.value, self._multiply, self._rotation, self._split = value, multiply, rotation, split

    def add(self, a: Single, b: Single, chosen: Chosen | None = None, *, second: bool = False) -> None:
        """Add a b^T, of which one is a side, in fp32 or bf16; both are tensors where both stand beside codes.

        chosen   where a alone may differ from zero, or b where it is the `second` that has a side
        """
        thin = _is_thin(a), _is_thin(b)
        if any(thin):
            self.value += self._thin(a, b, thin)
        elif chosen is not None and chosen.dim == 0:
            a, b = (a, _picked(b, chosen)) if second else (_picked(a, chosen), b)
            self.value.index_add_(int(second), chosen.numbers, self._product(a, b, None))
        elif chosen is not None and isinstance(a, Tensor) and isinstance(b, Tensor):
            self.value = self._product(_picked(a, chosen), _picked(b, chosen), self.value, joined=True)
        else:
            self.value = self._product(a, b, self.value)

    def _product(self, a: Single, b: Single, into: Tensor | None, *, joined: bool = False) -> Tensor:
        """[M, N] a b^T, added to `into`. joined: of tensors, all their terms in one GEMM."""
        first, second = (self._terms(x) if isinstance(x, Tensor) else [x] for x in (a, b))
        # what is left out is below the last bit of fp32
        pairs = [(x, y) for i, x in enumerate(first) for j, y in enumerate(second) if i + j < _TERMS]
        if joined and len(pairs) > 1:
            pairs = [(torch.cat([x for x, _ in pairs], dim=1), torch.cat([y for _, y in pairs], dim=1))]  # type: ignore[misc]
        for x, y in pairs:
            into = self._multiply(self._wrapped(x), self._wrapped(y), into=into)
        assert into is not None
        return into

    def _thin(self, a: Single, b: Single, thin: tuple[bool, bool]) -> Tensor:
        """A b^T, broadcast to [M, N], where a or b is one row or one column."""
        if not thin[0]:
            return self._thin(b, a, (True, False)).t()
        assert isinstance(a, Tensor)
        if a.stride(0) == 0:  # one row: a row of products
            return self._row_times(a[:1].to(torch.float32), b)
        return a[:, :1].to(torch.float32) * self._row_times(torch.ones_like(a[:1], dtype=torch.float32), b)

    def _row_times(self, row: Tensor, b: Single) -> Tensor:
        """[1, N] fp32 row [1, K] times b^T."""
        if isinstance(b, Tensor) and b.dtype == torch.float32:
            return row @ b.t() * (1.0 / self._rotation)
        stacked = torch.cat(self._terms(row))
        padded = torch.nn.functional.pad(stacked, (0, 0, 0, _ROWS - len(stacked)))
        return self._multiply(self._wrapped(padded), b).sum(0, keepdim=True)

    def _terms(self, x: Tensor) -> list[Tensor]:
        """bf16 tensors whose sum is `x`."""
        return [x] if x.dtype == torch.bfloat16 else self._split(x)

    def _wrapped(self, x: Single) -> Single:
        """Values without codes in the basis of the codes."""
        if not isinstance(x, Tensor):
            return x
        return Carrier(x, torch.ones((), device=x.device), self._rotation)


def _split(x: Tensor) -> list[Tensor]:
    return terms.split(x) if x.is_cuda else in_torch(x)


def in_torch(x: Tensor) -> list[Tensor]:
    """The terms of fp32 `x`, in a pass over memory for each step."""
    found: list[Tensor] = []
    for _ in range(_TERMS):
        found.append(x.to(torch.bfloat16))
        x = x - found[-1].to(torch.float32)
    return found


def _picked(x: Single, chosen: Chosen) -> Tensor:
    """The chosen columns or rows of a side, or the same of what meets it."""
    assert isinstance(x, Tensor)
    return x.index_select(chosen.dim, chosen.numbers)


def _cleared(left: OperandParts, right: OperandParts) -> bool:
    """Whether both sides lie in the same columns, and neither operand has codes there."""
    a, b = left.chosen, right.chosen
    if a is None or b is None or left.side is None or right.side is None:
        return False
    return a.numbers is b.numbers and a.dim == b.dim == 1 and a.cleared and b.cleared


def _joined(left: OperandParts, right: OperandParts) -> tuple[Carrier, Carrier] | None:
    """Operands whose sum of products has that of both sides behind it: of bf16, where the codes' columns have a factor
    for every segment, as the chosen columns then are segments with the factor 1.
    """
    if left.partner is not None or right.partner is not None:
        return None
    found = _lengthened(left), _lengthened(right)
    return (found[0], found[1]) if found[0] is not None and found[1] is not None else None


def _lengthened(parts: OperandParts) -> Carrier | None:
    """The carrier of the codes, and behind it the chosen columns of the side, filled up to whole segments."""
    q, side, chosen = parts.main, parts.side, parts.chosen
    assert side is not None
    assert chosen is not None
    if not isinstance(q, BlockScaledTensor) or q.global_scale.dim() != 2 or side.dtype != torch.bfloat16:
        return None
    if q.shape[1] != q.global_scale.shape[1] * SEGMENT:
        return None
    carrier = q.carrier  # a GEMM that multiplies codes would lose by carriers
    if carrier is None or carrier.rows is None or not carrier.near:  # whose common scale is 1
        return None
    taken, missing = _picked(side, chosen), -chosen.numbers.numel() % SEGMENT
    taken = torch.nn.functional.pad(taken, (0, missing)) if missing else taken
    ones = carrier.rows.new_ones(side.shape[0], taken.shape[1] // SEGMENT)
    return replace(
        carrier, values=torch.cat((carrier.values, taken), dim=1), rows=torch.cat((carrier.rows, ones), dim=1)
    )


def _is_thin(x: Single) -> bool:
    """Whether all rows, or all columns, of a tensor are one in memory."""
    return isinstance(x, Tensor) and 0 in x.stride()
