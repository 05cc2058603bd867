# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false
# Triton's own language: its kernels' parameters have no types, a launch takes options beside the kernel's parameters.
"""The largest elements of each group of a row taken out of a bf16 matrix, from one reading of it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4dist.kernels.triton.launch import start
from fp4dist.numerics import splits
from fp4dist.numerics.splits import Parts, Place
from fp4dist.spec.recipe import QuantSpec
from fp4dist.spec.splits import TopK

MOST, LONGEST = 8, 4096  # elements that are taken of a group, one after the other; elements of a group
_TILE = 4096  # elements of a program


@triton.jit
def largest_kernel(x, stride, rest, side, groups, across, K: tl.constexpr, R: tl.constexpr, G: tl.constexpr):
    """Groups of G int16 bits of bf16, `across` of them in a row: K elements in `side` and the others in `rest`.

    A key holds the magnitude, of which NaN have the largest, and below it the place: the first of equals is taken.
    """
    group, place = tl.program_id(0) * R + tl.arange(0, R)[:, None], tl.arange(0, G)[None, :]
    inside = (group < groups) & (place < G)
    at = (group // across).to(tl.int64) * stride + group % across * G + place
    word = tl.load(x + at, mask=inside, other=0)
    magnitude = word.to(tl.int32) & 0x7FFF
    key = (tl.minimum(magnitude, 0x7F81) << 16) | (G - 1 - place)
    for _ in tl.static_range(K):
        key = tl.where(key == tl.max(key, axis=1, keep_dims=True), -1, key)
    zero = tl.zeros((R, G), tl.int16)
    out = group.to(tl.int64) * G + place
    tl.store(rest + out, tl.where(key < 0, zero, word), mask=inside)
    tl.store(side + out, tl.where(key < 0, word, zero), mask=inside)


def why_not(spec: QuantSpec | None) -> str | None:
    """Why `decompose` has nothing of its own for operands of `spec`, or None."""
    if spec is None or spec.split is not None or not isinstance(spec.outlier, TopK):
        return "only the largest elements of groups are taken out here"
    top = spec.outlier
    if top.precision != "bf16" or top.k > MOST or top.group > LONGEST or top.group & (top.group - 1):
        return f"only parts in bf16, up to {MOST} elements of groups of a power of two, at most {LONGEST}"
    return None


def decompose(x: Tensor, spec: QuantSpec, place: Place) -> Parts:
    """See `fp4dist.numerics.splits.decompose`."""
    top = spec.outlier
    taken = x.dtype == torch.bfloat16 and x.stride(1) == 1 and x.numel() > 0
    if why_not(spec) is not None or not isinstance(top, TopK) or not taken or x.shape[1] % top.group:
        return splits.decompose(x, spec, place)
    rest, side = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    at_once, groups = max(1, _TILE // top.group), x.numel() // top.group
    arguments = (
        x.view(torch.int16), x.stride(0), rest.view(torch.int16), side.view(torch.int16), groups,
        x.shape[1] // top.group,
    )  # fmt: skip
    constants = {"K": top.k, "R": at_once, "G": top.group, "num_warps": 4, "enable_fp_fusion": False}
    start(largest_kernel, triton.cdiv(groups, at_once), arguments, constants)
    return Parts(rest, side)
