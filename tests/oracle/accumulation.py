"""How Blackwell's FP4 tensor cores were observed to add, as an oracle for kernels and for parity with native runs.

Partial sums of 64 products are rounded to fp32 (nearest even); the partials are added in order in fp32 with rounding
toward zero; alpha multiplies last (arXiv:2609.02846, section on GEMM output; reported bit-exact against Transformer
Engine for losses, logits and gradients of a 1.3B model). Numpy only, nothing of fp4dist.
"""

from __future__ import annotations

import numpy as np

GROUP = 64  # products of one instruction


def add_toward_zero(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """fp32 a + b, rounded toward zero.

    Two-sum gives the exact rounding error of the nearest sum; where that sum lies further from zero than the exact one,
    its neighbour toward zero is the answer.
    """
    total = a + b
    back = total - a
    error = (a - (total - back)) + (b - back)  # exact: total + error == a + b
    away = (total > 0) & (error < 0) | (total < 0) & (error > 0)
    return np.where(away, np.nextafter(total, np.float32(0)), total).astype(np.float32)


def grouped_matmul(a_MK: np.ndarray, b_NK: np.ndarray, alpha: float = 1.0) -> np.ndarray:
    """[M, K] x [N, K] -> [M, N] fp32 as the hardware was observed to compute it.

    The operands are fp64 values code * block scale; products and sums of 64 of them are exact in fp64 for E2M1 with
    E4M3 scales (at most 12 significant bits a product over a range of 2**36), or within its 2**-53.
    """
    rows, columns, k = a_MK.shape[0], b_NK.shape[0], a_MK.shape[1]
    total = np.zeros((rows, columns), dtype=np.float32)
    for start in range(0, k, GROUP):
        exact = a_MK[:, start : start + GROUP] @ b_NK[:, start : start + GROUP].T
        total = add_toward_zero(total, exact.astype(np.float32))
    return (total * np.float32(alpha)).astype(np.float32)
