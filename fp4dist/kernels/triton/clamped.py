# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# Triton's own language: its kernels' parameters have no types, a launch takes options beside the kernel's parameters.
"""Rows clamped to their own quantiles, and what that cuts off, from one reading of a bf16 matrix.

A quantile by nearest rank is an element of the row. The elements' bits, as integers in the order of their values, are
few enough that bisection finds it: 16 counts over a row that stays in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4dist.kernels.triton import arithmetic as a
from fp4dist.kernels.triton import terms
from fp4dist.kernels.triton.launch import start
from fp4dist.numerics import splits
from fp4dist.numerics.splits import Parts, Place
from fp4dist.spec.recipe import QuantSpec
from fp4dist.spec.splits import Occ

COLUMNS = 2**14  # of a row at most: two counts share an integer, and a row has to fit in registers
_TILE, _OF_THREAD = 2048, 32  # elements of a program at least, and of one thread


@triton.jit
def clamp_kernel(x, stride, rest, side, rows, cols, wanted, R: tl.constexpr, N: tl.constexpr, SIDE: tl.constexpr):
    """Rows of int16 bits of bf16 [rows, cols] x, clamped between their `wanted`-th smallest and `wanted`-th largest.

    SIDE   write x - rest as well
    """
    row, col = tl.program_id(0) * R + tl.arange(0, R)[:, None], tl.arange(0, N)[None, :]
    inside = (row < rows) & (col < cols)
    word = tl.load(x + row.to(tl.int64) * stride + col, mask=inside, other=0x7FFF).to(tl.int32)  # NaN outside
    magnitude = word & 0x7FFF
    key = tl.where(word < 0, -magnitude, magnitude)
    key = tl.where(magnitude > 0x7F80, 0x7FFF, key)  # NaN is the largest to the one quantile, the smallest to the other
    unordered = tl.sum((key == 0x7FFF).to(tl.int32), axis=1, keep_dims=True)
    beyond, upper = N - cols, tl.full((R, 1), -0x8000, tl.int32)
    lower = upper  # negated
    for i in tl.static_range(16):
        high, low = upper + (0x8000 >> i), lower + (0x8000 >> i)
        counts = tl.sum((key >= high).to(tl.int32) + ((key <= -low).to(tl.int32) << 16), axis=1, keep_dims=True)
        upper = tl.where((counts & 0xFFFF) - beyond >= wanted, high, upper)
        lower = tl.where((counts >> 16) + unordered - beyond >= wanted, low, lower)
    kept = tl.where(key > upper, upper, key)
    kept = tl.where(kept < -lower, -lower, kept)
    clamped = tl.where(kept == key, word, tl.where(kept < 0, -kept | -0x8000, kept))  # of equals the sign of zero stays
    clamped = tl.where(upper == 0x7FFF, 0x7FC0, clamped)  # NaN are as many for the lower one
    clamped = tl.where(magnitude >= 0x7F80, word, clamped)
    at = row.to(tl.int64) * cols + col
    tl.store(rest + at, clamped.to(tl.int16), mask=inside)
    if SIDE:
        cut = terms.bf16_word(a.floats(word << 16) - a.floats(clamped << 16))
        tl.store(side + at, (cut >> 16).to(tl.int16), mask=inside)


def why_not(spec: QuantSpec | None) -> str | None:
    """Why `decompose` has nothing of its own for operands of `spec`, or None."""
    if spec is None or spec.split is not None or not isinstance(spec.outlier, Occ):
        return "only elements beyond quantiles are taken out in one pass"
    if spec.outlier.per != "row" or spec.outlier.precision != "bf16":
        return "only quantiles of rows, and parts in bf16"
    return None


def decompose(x: Tensor, spec: QuantSpec, place: Place) -> Parts:
    """See `fp4dist.numerics.splits.decompose`; rest and side are in bf16, which holds them, where `x` is."""
    outlier = spec.outlier
    if why_not(spec) is not None or not isinstance(outlier, Occ) or not _takes(x, place):
        return splits.decompose(x, spec, place)
    (rows, cols), columns = x.shape, triton.next_power_of_2(x.shape[1])
    rest, side = (torch.empty((rows, cols), dtype=torch.bfloat16, device=x.device) for _ in range(2))
    at_once = max(1, _TILE // columns)
    arguments = (
        x.view(torch.int16), x.stride(0), rest.view(torch.int16), side.view(torch.int16), rows, cols,
        splits.beyond(cols, outlier.alpha) + 1,
    )  # fmt: skip
    constants = {
        "R": at_once, "N": columns, "SIDE": outlier.compensate,
        "num_warps": min(max(at_once * columns // (32 * _OF_THREAD), 4), 16), "enable_fp_fusion": False,
    }  # fmt: skip
    start(clamp_kernel, -(-rows // at_once), arguments, constants)
    return Parts(rest, side if outlier.compensate else None)


def _takes(x: Tensor, place: Place) -> bool:
    """Whether every row is whole here, in one piece and short enough, and no token of it only fills up."""
    shared = place.reduce_max is not None and place.key is not None and (place.key.columns or 0) > x.shape[1]
    filled = place.filled and place.token_dim == 1
    return x.dtype == torch.bfloat16 and x.stride(1) == 1 and 0 < x.shape[1] <= COLUMNS and not (shared or filled)
