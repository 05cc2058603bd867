# pyright: reportCallIssue=false, reportArgumentType=false
# (a launch takes options beside the kernel's own parameters)
"""Block-scaled GEMMs on the exact bf16 carriers of their operands."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4dist import numerics
from fp4dist.kernels.triton.programs import carrier_kernel
from fp4dist.numerics.matmul import Operand
from fp4dist.numerics.tensor import BlockScaledTensor, Quantized
from fp4dist.spec.formats import E2M1


def has_carrier(q: BlockScaledTensor) -> bool:
    """Whether `carrier` can decode `q`: E2M1 under one-byte scales and one scale of the tensor."""
    return (
        q.format.element == E2M1 and q.format.scale.name in ("e4m3", "e8m0") and q.global_scale.dim() == 0
        and q.samples == 1 and q.block[1] in (16, 32, 64, 128)
    )  # fmt: skip


def carrier(q: BlockScaledTensor) -> Tensor:
    """[R, C] bf16 code * block scale, exact."""
    rows, cols = q.shape
    out = torch.empty((rows, cols), dtype=torch.bfloat16, device=q.codes.device)
    carrier_kernel[-(-rows // 16), -(-cols // 128)](
        q.codes, q.scales, out, rows, cols, R=16, N=128, BR=q.block[0], BC=q.block[1],
        E8M0=q.format.scale.name == "e8m0", num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def matmul(a_MK: Operand, b_NK: Operand) -> Tensor:
    """A B^T in fp32; see `fp4dist.numerics.matmul`. Operands without a carrier are decoded by torch."""
    if not all(isinstance(o, BlockScaledTensor) and has_carrier(o) for o in (a_MK, b_NK)):
        return numerics.matmul(a_MK, b_NK)
    assert isinstance(a_MK, BlockScaledTensor)
    assert isinstance(b_NK, BlockScaledTensor)
    if a_MK.rotation != b_NK.rotation or a_MK.shape[1] != b_NK.shape[1]:
        return numerics.matmul(a_MK, b_NK)  # which says what is wrong
    left, right = carrier(a_MK), carrier(b_NK)
    if left.is_cuda:
        total = torch.mm(left, right.t(), out_dtype=torch.float32)
    else:
        total = torch.mm(left.float(), right.float().t())
    return total * (a_MK.global_scale * b_NK.global_scale / a_MK.rotation)


def dequantize(q: Quantized) -> Tensor:
    """[R, C] fp32 values; see `fp4dist.numerics.dequantize`."""
    if not isinstance(q, BlockScaledTensor) or not has_carrier(q):
        return numerics.dequantize(q)
    return carrier(q).to(torch.float32) * (q.global_scale * q.rotation**-0.5)
