"""The published model of how Blackwell's FP4 tensor cores add up, as a GEMM: for verification, never for training.

Exact sums of 64 products, each rounded to fp32 (nearest even), are added in their order along K by fp32 additions that
round toward zero; the scales of the tensors multiply the result. arXiv:2609.02846 reports these bits for 1.3 billion
logits and gradients against Transformer Engine's NVFP4 GEMMs on Blackwell. No Blackwell GPU was at hand to repeat that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp4dist.numerics.matmul import Operand, check_product, matmul, product_of_codes
from fp4dist.numerics.tensor import BlockScaledTensor, Carrier

GROUP = 64  # products that the tensor core sums exactly
_FINEST, _LARGEST = 2.0**-10, 6 * 448.0  # of an E2M1 code times an E4M3 scale


def matmul_in_groups(
    a_MK: Operand, b_NK: Operand, *, out: torch.dtype = torch.float32, into: Tensor | None = None
) -> Tensor:
    """As `fp4dist.numerics.matmul`, for two operands of E2M1 codes with E4M3 block scales, codes or carriers.

    A product with a plain operand is not one of FP4 tensor cores, and runs as it always does.
    Raises ValueError for operands in parts, of several samples, or with other scales: fp64 would not hold their sums.
    """
    if isinstance(a_MK, Tensor) or isinstance(b_NK, Tensor):
        return matmul(a_MK, b_NK, out=out, into=into)
    for operand in (a_MK, b_NK):
        if not isinstance(operand, (BlockScaledTensor, Carrier)) or getattr(operand, "samples", 1) != 1:
            raise ValueError(f"sums of {GROUP} products are defined for codes alone, one sample of each")
    rotation = check_product(a_MK, b_NK, out, into)
    total = product_of_codes(a_MK, b_NK, rotation, sum_in_groups)  # type: ignore[arg-type]
    return total.to(out) if into is None else into.add_(total)


def sum_in_groups(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """[M, N] fp32 A B^T. Each value is a multiple of 2^-10 and at most 2,688, so fp64 holds a group's sum exactly."""
    for values in (a_MK, b_NK):
        _check_grid(values)
    a, b = a_MK.to(torch.float64), b_NK.to(torch.float64)
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float32, device=a.device)
    for first in range(0, a.shape[1], GROUP):
        partial = a[:, first : first + GROUP] @ b[:, first : first + GROUP].t()
        total = add_toward_zero(total, partial.to(torch.float32))
    return total


def _check_grid(values: Tensor) -> None:
    wide = values.to(torch.float32)
    on_grid = (wide / _FINEST).frac() == 0
    if not bool(((on_grid & (wide.abs() <= _LARGEST)) | wide.isnan()).all()):
        raise ValueError(
            f"sums of {GROUP} products: an operand is not E2M1 codes times E4M3 scales (multiples of 2^-10, at most"
            " 2,688); use fp4dist.numerics.matmul"
        )


def add_toward_zero(a: Tensor, b: Tensor) -> Tensor:
    """fp32 a + b of one shape, rounded toward zero; a sum that overflows becomes infinite.

    Knuth's two-sum: the nearest sum and `rest` add up to the exact one. Where that lies nearer to zero, so does the
    neighbour of the nearest sum that is wanted.
    """
    nearest = a + b
    taken = nearest - a
    rest = (a - (nearest - taken)) + (b - taken)
    return torch.where(rest * nearest.sign() < 0, torch.nextafter(nearest, torch.zeros_like(nearest)), nearest)
