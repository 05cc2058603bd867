"""Block-scaled GEMM: exact products, fp32 accumulation, all global factors applied once to the fp32 result."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4dist.numerics.quantize import carrier
from fp4dist.numerics.tensor import BlockScaledTensor

Operand = BlockScaledTensor | Tensor


def matmul(a_MK: Operand, b_NK: Operand) -> Tensor:
    """A B^T in fp32: [M, K] x [N, K] -> [M, N].

    Operands are block-scaled or plain (bf16, fp32) tensors. A quantized operand enters as code * scale, which bf16
    holds exactly; the global scales and the rotation's 1/n multiply the fp32 sum. Two quantized operands must share a
    rotation.
    """
    rotation = _common_rotation(a_MK, b_NK)
    alpha = _global_scale(a_MK) * _global_scale(b_NK)
    if a_MK.shape[1] != b_NK.shape[1]:
        raise ValueError(f"contracted dimensions differ: {list(a_MK.shape)} and {list(b_NK.shape)}")
    return _gemm(_exact(a_MK), _exact(b_NK)) * (alpha / rotation)


def _gemm(a: Tensor, b: Tensor) -> Tensor:
    """fp32 [M, N]. On a GPU bf16 operands run on tensor cores with an fp32 accumulator and output."""
    if a.is_cuda and a.dtype == b.dtype == torch.bfloat16:
        return torch.mm(a, b.t(), out_dtype=torch.float32)
    return torch.mm(a.to(torch.float32), b.to(torch.float32).t())


def _exact(operand: Operand) -> Tensor:
    if isinstance(operand, Tensor):
        return operand
    values = carrier(operand)
    return values.to(torch.bfloat16) if values.is_cuda else values


def _global_scale(operand: Operand) -> Tensor:
    return torch.ones((), device=operand.device) if isinstance(operand, Tensor) else operand.global_scale


def _common_rotation(a: Operand, b: Operand) -> int:
    sizes = [1 if isinstance(o, Tensor) else o.rotation for o in (a, b)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"operands are in different rotated bases: {sizes[0]} and {sizes[1]}")
    return sizes[0]
