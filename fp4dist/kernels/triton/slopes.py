# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# Triton's own language: its kernels' parameters have no types, a launch takes options beside the kernel's parameters.
"""The slope of the differentiable estimator: its fp64 argument in one pass, its power by torch, as in the reference."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4dist.kernels.triton.launch import start
from fp4dist.numerics import estimators
from fp4dist.spec.estimators import Dge
from fp4dist.spec.formats import ElementFormat
from fp4dist.spec.recipe import QuantSpec

_ELEMENTS = 1024  # of a program


@triton.jit
def offset_kernel(u, levels, offset, count, last: tl.constexpr, N: tl.constexpr):
    """|2 (z - l) / d - 1| of the bin that z = |u| lies in, in fp64; infinite beyond levels[last]."""
    at = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    inside = at < count
    z = tl.abs(tl.load(u + at, mask=inside, other=0.0)).to(tl.float64)
    low, high = tl.zeros((N,), tl.float64) + tl.load(levels), tl.zeros((N,), tl.float64) + tl.load(levels + 1)
    for i in tl.static_range(1, last):
        above = z >= tl.load(levels + i)
        low = tl.where(above, tl.load(levels + i), low)
        high = tl.where(above, tl.load(levels + i + 1), high)
    found = tl.abs((2.0 * (z - low)) / (high - low) - 1.0)
    tl.store(offset + at, tl.where(z <= tl.load(levels + last), found, float("inf")), mask=inside)


def why_not(spec: QuantSpec | None) -> str | None:
    """Why `slope` has nothing of its own for the codes of `spec`, or None."""
    if spec is None or not isinstance(spec.estimator, Dge):
        return "only the differentiable estimator has a slope"
    if spec.format.element.mantissa is not None or spec.estimator.k <= 1:
        return "only short lists of levels, and k above 1, whose power is 0 at infinity"
    return None


def slope(u: Tensor, element: ElementFormat, dge: Dge) -> Tensor:
    """fp32, shape of u; see `fp4dist.numerics.estimators.slope`."""
    if dge.k <= 1 or u.dtype != torch.float32:
        return estimators.slope(u, element, dge)
    u = u.contiguous()
    found = torch.empty(u.shape, dtype=torch.float64, device=u.device)
    constants = {"last": len(element.levels) - 1, "N": _ELEMENTS, "num_warps": 4, "enable_fp_fusion": False}
    arguments = u, _levels(element, u.device), found, u.numel()
    start(offset_kernel, -(-u.numel() // _ELEMENTS), arguments, constants)
    return found.pow_(1.0 / dge.k - 1.0).div_(dge.k).clamp_(max=dge.cap).to(torch.float32)


@lru_cache(maxsize=64)
def _levels(element: ElementFormat, device: torch.device) -> Tensor:
    return torch.tensor(element.levels, dtype=torch.float64, device=device)
