"""GEMMs of values that bf16 does not hold (codes under fp32 scales of short blocks, under scales of tiles; fp32 beside
them): three bf16 terms hold every fp32, so tensor cores multiply those, and fp32 sums take all but what is below the
last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fp4dist.kernels.cuda import quantizers
from fp4dist.numerics.matmul import Single
from fp4dist.numerics.tensor import BlockScaledTensor, Carrier

_TERMS = 3  # of 8 significant bits each: all of fp32's 24


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
            if i + j < _TERMS:
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
    found: list[Single] = []
    for _ in range(_TERMS):
        term = rest.to(torch.bfloat16)
        found.append(Carrier(term, torch.ones((), device=term.device), rotation))
        rest = rest - term.to(torch.float32)
    return found
