"""GEMMs of values that bf16 does not hold (codes under fp32 scales of short blocks, under scales of tiles; fp32 beside
them): three bf16 terms hold every fp32, so tensor cores multiply those, and fp32 sums take all but what is below the
last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fp4dist.kernels.cuda import parts, quantizers
from fp4dist.numerics.matmul import Single
from fp4dist.numerics.tensor import BlockScaledTensor, Carrier


def is_wide(operand: Single) -> bool:
    """Whether `operand` is split: fp32, or codes without a carrier in bf16."""
    if isinstance(operand, BlockScaledTensor):
        return operand.carrier is None and quantizers.why_not_carrier(operand, torch.bfloat16) is not None
    return isinstance(operand, Tensor) and operand.dtype == torch.float32


def matmul(a: Single, b: Single, multiply: Callable[..., Tensor], *, out: torch.dtype, into: Tensor | None) -> Tensor:
    """A B^T of operands of one sample, in `out` or added to `into`; multiply: that of operands that bf16 holds."""
    total = into
    for i, x in enumerate(_terms(a)):
        for j, y in enumerate(_terms(b)):
            if i + j < parts.TERMS:
                total = multiply(x, y, into=total)
    assert total is not None
    return total if into is not None else total.to(out)


def _terms(operand: Single) -> list[Single]:
    if not is_wide(operand):
        return [operand]
    rotation, rest = 1, operand
    if isinstance(operand, BlockScaledTensor):
        rotation, rest = operand.rotation, quantizers.dequantize(replace(operand, rotation=1, carrier=None))
    assert isinstance(rest, Tensor)
    return [Carrier(term, torch.ones((), device=term.device), rotation) for term in parts.split_terms(rest)]
