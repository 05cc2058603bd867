# pyright: reportCallIssue=false, reportArgumentType=false
# (a launch takes options beside the kernel's own parameters)
"""Values of the codes that `grids` makes: decoded, and as carriers of every type that holds them."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fp4dist.kernels import grid_facts
from fp4dist.kernels.triton import carriers, levels
from fp4dist.kernels.triton import grid_programs as p
from fp4dist.numerics import codes as c
from fp4dist.numerics.grouping import spread
from fp4dist.numerics.tensor import BlockScaledTensor, Carrier
from fp4dist.spec.formats import E2M1, ElementFormat

SCALES = {"e4m3": p.E4M3, "e8m0": p.E8M0, "ue5m3": p.UE5M3, "e4m3_inverse": p.INVERSE, "fp32": p.FP32}


def has_values(q: BlockScaledTensor) -> bool:
    """Whether `dequantize` can decode `q`."""
    element = q.format.element
    known = element.mantissa in (2, 3) or (element.mantissa is None and len(element.levels) <= 8)
    rows = q.global_scale.shape if q.global_scale.dim() else (1, 1)
    return known and q.samples == 1 and _shared(q.block[1]) > 1 and _shared(q.shape[1] // rows[1]) > 1


def dequantize(q: BlockScaledTensor) -> Tensor:
    """[R, C] fp32 values; see `fp4dist.numerics.dequantize`."""
    return _decoded(q, torch.float32, scaled=True)


def why_not_carrier(q: BlockScaledTensor, dtype: torch.dtype) -> str | None:
    """Why `to_carrier` cannot write the values of `q` in `dtype`, or None."""
    return grid_facts.why_not_carrier(q, dtype, has_values(q))


def to_carrier(q: BlockScaledTensor, dtype: torch.dtype, *, transposed: bool = False) -> Carrier:
    """The values of `q`, or of its transpose, in `dtype`, exact; scales in fp32 (outer ones, of rows and their parts)
    stay beside them.
    """
    if transposed:
        return levels.turned(q, dtype) if levels.turns(q, dtype) else to_carrier(q.transpose(), dtype)
    if q.samples > 1 and levels.holds(q.format.element, dtype, q.samples):
        return _mean(q, dtype)
    if carriers.why_not_carrier(q, dtype) is None:
        return carriers.to_carrier(q, dtype)
    reason = why_not_carrier(q, dtype)
    if reason is not None:
        raise ValueError(f"{reason}; multiply the dequantized matrix")
    outside, outer, powers, factors = grid_facts.of_parts_of_rows(q), q.global_scale, None, None
    if outer.dim() and outer.shape[1] > 1 and q.format.element == E2M1 and q.format.scale.name == "e4m3":
        powers, factors = _parted(outer)
    values = _decoded(q, dtype, scaled=not outside, powers=powers)
    if outside and q.scales.numel() == 1:
        return Carrier(values, q.scales.reshape(()) * outer, q.rotation)
    if outside:
        return Carrier(values, outer, q.rotation, spread(q.scales, (q.shape[0], q.scales.shape[1])))
    if outer.dim() == 0:
        return Carrier(values, outer, q.rotation)
    of_rows = spread(outer if factors is None else factors, (q.shape[0], outer.shape[1]))
    return Carrier(values, torch.ones((), device=outer.device), q.rotation, of_rows, near=factors is not None)


def _mean(q: BlockScaledTensor, dtype: torch.dtype) -> Carrier:
    """The mean of neighbouring samples, whose sum `dtype` holds."""
    drawn = [to_carrier(q.sample(i), torch.bfloat16) for i in range(q.samples)]
    total = torch.stack([one.values for one in drawn]).sum(0, dtype=torch.float32)
    return replace(drawn[0], values=total.to(dtype), scale=drawn[0].scale * (1.0 / q.samples))


@lru_cache(maxsize=64)
def table_of(element: ElementFormat, ties: str, device: torch.device) -> Tensor:
    """[5, 8] fp32 of `grid_programs`; FP8 has no use for it."""
    table = torch.full((5, 8), float("inf"))
    if element.mantissa is None:
        last = len(element.levels) - 1
        for row, way in enumerate((ties, ties) if ties != "up" else ("away", "to_zero")):
            table[row, :last] = torch.tensor(c.nearest_boundaries(element, way))
        table[2:4, : last + 1] = c.levels_and_gaps(element, torch.device("cpu")).t()
        table[4, : last + 1] = c.middles(element, torch.device("cpu"))
    return table.to(device)


def grid_constants(element: ElementFormat) -> dict[str, Any]:
    """Constants of the kernels of `grid_programs` that name the grid."""
    return {
        "E2M1": element == E2M1, "FP8": element.mantissa or 0, "SIGN": 1 << element.bits - 1, "PACKED": element.packed,
    }  # fmt: skip


def _shared(columns: int) -> int:
    """Columns, a power of two of at most 16, that are known to share what `columns` share."""
    return min(columns & -columns, 16)


def _parted(outer: Tensor) -> tuple[Tensor, Tensor]:
    """As `tiles.parted`."""
    exponent = (outer.view(torch.int32) >> 23).clamp(min=7)
    power = (exponent << 23).view(torch.float32)
    factor = outer * (254 - exponent << 23).view(torch.float32)
    known = outer == outer
    return torch.where(known, power, outer), torch.where(known, factor, 1.0)


def _decoded(q: BlockScaledTensor, dtype: torch.dtype, *, scaled: bool, powers: Tensor | None = None) -> Tensor:
    """[R, C] values in `dtype`; unless `scaled` those of the elements alone. powers: in place of outer scales."""
    rows, cols = q.shape
    codes = q.codes if q.codes.stride(1) == 1 else q.codes.contiguous()  # those of a transpose need not be rows
    out = torch.empty((rows, cols), dtype=dtype, device=q.codes.device)
    factors = powers if powers is not None else q.global_scale * q.rotation**-0.5
    factors = factors.reshape(1, 1) if factors.dim() == 0 else factors
    per_factor = (rows // factors.shape[0], cols // factors.shape[1])
    p.decode_kernel[-(-rows // 16), -(-cols // 128)](
        codes, codes.stride(0), q.scales.contiguous(), factors, table_of(q.format.element, "even", q.codes.device),
        out if dtype in (torch.float32, torch.bfloat16) else out.view(torch.uint8), rows, cols, *q.block, *per_factor,
        R=16, N=128, G=min(_shared(q.block[1]), _shared(per_factor[1])), SCALE=SCALES[q.format.scale.name],
        SCALED=scaled, FACTORED=dtype == torch.float32 or powers is not None, OUT=grid_facts.OUT[dtype], num_warps=4,
        enable_fp_fusion=False, **grid_constants(q.format.element),
    )  # fmt: skip
    return out
