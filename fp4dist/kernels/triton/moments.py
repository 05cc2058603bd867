# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# Triton's own language: its kernels' parameters have no types, a launch takes options beside the kernel's parameters.
"""Sums of squares and of magnitudes over chunks of a matrix, from one reading, in the reference's order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4dist.kernels.triton import arithmetic as a
from fp4dist.kernels.triton import chunks as c
from fp4dist.numerics import grouping

_ROWS, _COLUMNS = 32, 128  # of a program
_CHUNKS = (32, 16)  # columns of a thread


@triton.jit
def moments_kernel(
    x, stride, unit, squares, magnitudes, rows, cols, R: tl.constexpr, N: tl.constexpr, E: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Sums of (x / unit)^2 and of |x / unit| over E columns of a row of [rows, cols] x."""
    G: tl.constexpr = R * N // E
    row, col = tl.program_id(0) * R, tl.program_id(1) * N
    y = c.rows_of(x, stride, x, 0, 0, 0, 0, row, col, rows, cols, R, N, E, 1, False, 0, 1, False, EVEN)
    y = y * tl.div_rn(1.0, tl.load(unit))
    c.store(a.row_tree_sum(y * y, G, E), squares, row, col // E, rows, cols // E, R, 1, N // E, EVEN)
    c.store(a.row_tree_sum(tl.abs(y), G, E), magnitudes, row, col // E, rows, cols // E, R, 1, N // E, EVEN)


def has_sums(x: Tensor, chunk: tuple[int, int]) -> bool:
    """Whether `sums` takes the matrix in chunks of this size."""
    return x.stride(1) == 1 and chunk[1] % _CHUNKS[-1] == 0


def sums(x: Tensor, unit: Tensor, chunk: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """[R/cr, C/cc] sums of (x / unit)^2 and of |x / unit| over each chunk of [R, C] x. unit: one fp32 power of two."""
    rows, cols = x.shape
    columns = next(n for n in _CHUNKS if chunk[1] % n == 0)
    found = torch.empty((2, rows, cols // columns), device=x.device)
    moments_kernel[-(-rows // _ROWS), -(-cols // _COLUMNS)](
        x, x.stride(0), unit, found[0], found[1], rows, cols, R=_ROWS, N=_COLUMNS, E=columns,
        EVEN=rows % _ROWS == 0 and cols % _COLUMNS == 0, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    left = chunk[0], chunk[1] // columns
    return grouping.tree_sum(found[0], left), grouping.tree_sum(found[1], left)
