"""How gradients pass quantizers with a trust mask, and codes turned back from their basis: csrc/filter.cu.

The bits are those of `fp4dist.numerics.estimators` and `fp4dist.numerics.quantize.original`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp4dist.kernels.cuda import jobs
from fp4dist.kernels.cuda.grid_jobs import SCALES, STRIP, when
from fp4dist.numerics.scales import fp32
from fp4dist.numerics.tensor import BlockScaledTensor, Key
from fp4dist.spec.blocks import Ceil, Floor, Hadamard
from fp4dist.spec.estimators import TrustMask
from fp4dist.spec.formats import E2M1
from fp4dist.spec.recipe import QuantSpec

_NONE = (0, 0)
_Factors = tuple[float, float, float]


def why_not(spec: QuantSpec) -> str | None:
    """What of `spec` these kernels lack, or None."""
    rows, columns = spec.shape
    lacks = (
        (not isinstance(spec.estimator, TrustMask), f"estimator {spec.estimator.kind}"),
        (spec.has_parts, "operands in parts"),
        (not rows or not columns or columns % STRIP != 0, f"blocks {[rows, columns]}"),
    )
    return next((f"csrc's filters have no {what}" for missing, what in lacks if missing), None)


def mask(x: Tensor, stored: Tensor, global_scale: Tensor, spec: QuantSpec, key: Key | None) -> Tensor:
    """See `fp4dist.numerics.estimators.mask`."""
    x = _row_major(x)
    rows, cols = x.shape
    out = torch.empty((rows, cols // 8), dtype=torch.uint8, device=x.device)
    how = (rows, cols, *_NONE, *_lines(x), *_of_scales(x, stored, global_scale, spec), *_size(spec.rotation), 0, 0)
    torch.ops.fp4dist.clip_mask(
        x, stored.contiguous(), global_scale.contiguous(), when(key), (*how, *jobs.signs(spec.rotation, key)),
        (*_factors(spec), 1.0), out,
    )  # fmt: skip
    return out


def filter_by_mask(
    gradient: Tensor, kept: Tensor, rotation: Hadamard | None, key: Key | None, *, out: torch.dtype | None = None,
    into: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `fp4dist.numerics.estimators.filter_by_mask`.

    out    dtype of the result, fp32 or bf16, which is rounded once; None: the gradient's
    into   fp32 matrix without gaps that the result is added to, and which is returned
    """
    result = into if into is not None else torch.empty(gradient.shape, dtype=out or gradient.dtype, device=kept.device)
    nothing = (*_NONE, 1, STRIP, 1, STRIP, SCALES["e8m0"], 1)
    _filter(gradient, kept.contiguous(), None, None, None, rotation, key, nothing, (1.0, 1.0, 1.0), result, into)
    return result


def filter_by_scales(
    gradient: Tensor, x: Tensor, stored: Tensor, global_scale: Tensor, spec: QuantSpec, key: Key | None
) -> Tensor:
    """See `fp4dist.numerics.estimators.filter_by_scales`."""
    x = _row_major(x)
    result = torch.empty(gradient.shape, dtype=gradient.dtype, device=x.device)
    of_x = (*_lines(x), *_of_scales(x, stored, global_scale, spec))
    scales = stored.contiguous(), global_scale.contiguous()
    _filter(gradient, None, x, *scales, spec.rotation, key, of_x, _factors(spec), result, None)
    return result


def _filter(
    gradient: Tensor, kept: Tensor | None, x: Tensor | None, stored: Tensor | None, outer: Tensor | None,
    rotation: Hadamard | None, key: Key | None, of_x: tuple[int, ...], factors: _Factors, out: Tensor,
    into: Tensor | None,
) -> None:  # fmt: skip
    """Fill `out`. of_x: from the stride of x to `powers`."""
    gradient = _row_major(gradient)
    size = _size(rotation)
    how = (
        *gradient.shape, *_lines(gradient), *of_x, *size, int(out.dtype == torch.float32), int(into is not None),
        *jobs.signs(rotation, key),
    )  # fmt: skip
    torch.ops.fp4dist.clip_filter(gradient, kept, x, stored, outer, when(key), how, (*factors, 1.0 / size[0]), out)


def why_no_original(q: BlockScaledTensor) -> str | None:
    """Why `original` cannot decode `q`, or None."""
    lacks = (
        (q.rotation == 1, "codes without a rotation"),
        (q.format.element != E2M1, f"elements {q.format.element.name}"),
        (q.block[1] % STRIP != 0, f"blocks {list(q.block)}"),
        (q.global_scale.dim() > 0, "outer scales of rows or tiles"),
        (q.samples > 1, "several samples"),
    )
    return next((f"csrc's inverse rotation has no {what}" for missing, what in lacks if missing), None)


def original(
    q: BlockScaledTensor, rotation: Hadamard, key: Key | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[R, C] values of `q` in the original basis, in fp32 or rounded once to bf16; see `numerics.quantize.original`."""
    rows, cols = q.shape
    out = torch.empty((rows, cols), dtype=dtype, device=q.codes.device)
    how = (
        rows, cols, *_NONE, cols // 2, 0, *q.block, rows, cols, SCALES[q.format.scale.name], 0, rotation.size,
        int(dtype == torch.float32), 0, *jobs.signs(rotation, key),
    )  # fmt: skip
    torch.ops.fp4dist.turn_back(
        q.codes.contiguous(), q.scales.contiguous(), q.global_scale, when(key), how,
        (1.0, 1.0, 1.0, 1.0 / rotation.size), out,
    )  # fmt: skip
    return out


def _of_scales(x: Tensor, stored: Tensor, outer: Tensor, spec: QuantSpec) -> tuple[int, ...]:
    """From the rows of a block to `powers`. A part of gathered rows has scales of its own for each of them."""
    (rows, cols), of_outer = x.shape, outer.shape if outer.dim() else (1, 1)
    powers = isinstance(spec.rule, Floor) or (isinstance(spec.rule, Ceil) and spec.rule.of == "amax")
    return (
        max(rows // max(stored.shape[0], 1), 1), cols // stored.shape[1], max(rows // max(of_outer[0], 1), 1),
        cols // of_outer[1], SCALES[spec.format.scale.name], int(powers),
    )  # fmt: skip


def _factors(spec: QuantSpec) -> _Factors:
    """(before, after, largest): what x is multiplied with, what 1 / scale is, the end of the grid."""
    before = fp32(1.0 / spec.rule.headroom) if isinstance(spec.rule, Floor) else 1.0
    after = spec.format.element.max if isinstance(spec.rule, Ceil) and spec.rule.of == "amax" else 1.0
    return before, after, spec.format.element.max


def _size(rotation: Hadamard | None) -> tuple[int]:
    return (rotation.size if rotation is not None else 1,)


def _lines(x: Tensor) -> tuple[int, int]:
    """(elements between rows, whether they are fp32)."""
    if x.dtype not in (torch.bfloat16, torch.float32):
        raise TypeError(f"filters take bf16 or fp32 matrices, got {x.dtype}")
    return x.stride(0), int(x.dtype == torch.float32)


def _row_major(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()
