"""What csrc/ takes out of operands: clamps to quantiles, the largest of groups, chosen channels; slopes; fp32 as terms.

The bits are those of `fp4dist.numerics.splits` and `fp4dist.numerics.estimators`, which do what a kernel does not take
(another dtype, order in memory, or split over ranks).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp4dist.kernels.cuda import quantizers
from fp4dist.numerics import estimators, splits
from fp4dist.numerics.splits import Parts, Place
from fp4dist.numerics.tensor import BlockScaledTensor
from fp4dist.spec.estimators import Dge
from fp4dist.spec.formats import E2M1, ElementFormat
from fp4dist.spec.recipe import QuantSpec
from fp4dist.spec.splits import Channels, HotResidual, Occ, Precision, TopK

_STRIP = 16  # elements of a row that a thread has
_OF_MXFP8 = 32  # under one scale
LONGEST_ROW, LONGEST_GROUP = 2**14, 256  # kLongestClamp, kLongestGroup of csrc/parts.h
_MOST_LEVELS = 16
_MOST_TAKEN = 8  # one after the other
_DTYPES = (torch.bfloat16, torch.float32)
TERMS = 3  # of 8 significant bits each: all of fp32's 24


def why_not(spec: QuantSpec | None) -> str | None:
    """Why `decompose` has nothing of its own for operands of `spec`, or None."""
    if spec is None or spec.outlier is None or spec.split is not None:
        return "csrc takes no means and no factors out of operands, torch does"
    outlier = spec.outlier
    if isinstance(outlier, Occ) and (outlier.per != "row" or outlier.precision != "bf16"):
        return "csrc clamps rows to their quantiles, with parts in bf16"
    if isinstance(outlier, TopK) and not _takes_groups(outlier):
        return f"csrc takes up to {_MOST_TAKEN} of groups of a power of two, 8 to {LONGEST_GROUP}, with parts in bf16"
    if isinstance(outlier, Channels) and outlier.precision == "e4m3":
        return "csrc has chosen channels in bf16 and in MXFP8"
    return None


def why_no_channels(spec: QuantSpec | None) -> str | None:
    """Why nothing here takes chosen channels out of operands of `spec`, or None."""
    if spec is None or not isinstance(spec.outlier, Channels | HotResidual):
        return "only chosen channels are taken out here"
    return why_not(spec)


def why_no_slope(spec: QuantSpec | None) -> str | None:
    """Why `slope` has nothing of its own for the codes of `spec`, or None."""
    if spec is None or not isinstance(spec.estimator, Dge):
        return "only the differentiable estimator has a slope"
    if len(spec.format.element.levels) > _MOST_LEVELS or spec.estimator.k <= 1:
        return f"csrc has slopes of up to {_MOST_LEVELS} levels, and of k above 1, whose power is 0 at infinity"
    return None


def decompose(x: Tensor, spec: QuantSpec, place: Place) -> Parts:
    """See `fp4dist.numerics.splits.decompose`; rest and side are in x's dtype where a kernel makes them."""
    outlier = spec.outlier
    if why_not(spec) is None and x.numel() > 0:
        if isinstance(outlier, Channels):
            return take_channels(x, outlier.precision, place)
        if isinstance(outlier, Occ) and _takes_rows(x, place):
            return _clamped(x, outlier)
        if isinstance(outlier, TopK) and _is_of_rows(x) and x.shape[1] % outlier.group == 0:
            return _without_largest(x, outlier)
    return splits.decompose(x, spec, place)


def take_channels(x: Tensor, precision: Precision, place: Place) -> Parts:
    """See `fp4dist.numerics.splits.take_channels`."""
    if place.channels is None:
        return Parts(x, None)
    if not _takes_strips(x, precision):
        return splits.take_channels(x, precision, place)
    x = x if 1 in x.stride() else x.contiguous()
    rest, side = _dense(x), _dense(x)
    chosen = place.channels.contiguous().view(torch.uint8)
    torch.ops.fp4dist.take_channels(x, chosen, place.channel_dim == 0, precision == "mxfp8", rest, side)
    return Parts(rest, side)


def in_precision(part: Tensor, precision: Precision, dtype: torch.dtype, place: Place) -> Tensor:
    """See `fp4dist.numerics.splits.in_precision`."""
    if precision != "mxfp8" or not _takes_strips(part, precision):
        return splits.in_precision(part, precision, dtype, place)
    part = part if 1 in part.stride() else part.contiguous()
    side = _dense(part)
    torch.ops.fp4dist.take_channels(part, None, False, True, None, side)
    return side


def hot_residual(rest: Tensor, main: BlockScaledTensor, spec: QuantSpec, dtype: torch.dtype, place: Place) -> Tensor:
    """See `fp4dist.numerics.splits.hot_residual`."""
    scale = main.format.scale.name
    known = main.format.element == E2M1 and scale in ("e4m3", "e8m0") and main.global_scale.numel() == 1
    strips = main.block[1] % _STRIP == 0 and main.samples == 1 and spec.rotation is None
    dense = rest.stride(1) == 1 and place.channel_dim == 1 and rest.dtype == dtype and dtype in _DTYPES
    if not (known and strips and dense) or place.channels is None or rest.numel() == 0:
        assert place.chosen is not None
        error = rest - quantizers.original(main, spec.rotation, place.key)
        return torch.where(place.chosen, error.to(dtype), 0.0)
    side = _dense(rest)
    torch.ops.fp4dist.hot_residual(
        rest, main.codes.contiguous(), main.scales.contiguous(), main.global_scale.contiguous(),
        place.channels.contiguous().view(torch.uint8), main.block, scale == "e8m0", side,
    )  # fmt: skip
    return side


def slope(u: Tensor, element: ElementFormat, dge: Dge) -> Tensor:
    """fp32, shape of u; see `fp4dist.numerics.estimators.slope`. The power of its fp64 argument is torch's."""
    if dge.k <= 1 or u.dtype != torch.float32 or len(element.levels) > _MOST_LEVELS or u.numel() == 0:
        return estimators.slope(u, element, dge)
    u = u.contiguous()
    offsets = torch.empty(u.shape, dtype=torch.float64, device=u.device)
    torch.ops.fp4dist.slope_offsets(u, element.levels, offsets)
    return offsets.pow_(1.0 / dge.k - 1.0).div_(dge.k).clamp_(max=dge.cap).to(torch.float32)


def split_terms(x: Tensor) -> list[Tensor]:
    """[R, C] fp32 -> bf16 tensors whose sum it is, each the nearest to what those before leave; dense, and column by
    column where `x` is.
    """
    if x.dim() == 2 and x.stride(0) == 1 and x.stride(1) == x.shape[0] > 1:
        return [term.t() for term in split_terms(x.t())]
    x = x.contiguous()
    found = [torch.empty(x.shape, dtype=torch.bfloat16, device=x.device) for _ in range(TERMS)]
    if x.numel():
        torch.ops.fp4dist.split_terms(x, *found)
    return found


def _clamped(x: Tensor, occ: Occ) -> Parts:
    rest, side = _dense(x), _dense(x) if occ.compensate else None
    torch.ops.fp4dist.clamp_rows(x, splits.beyond(x.shape[1], occ.alpha) + 1, rest, side)
    return Parts(rest, side)


def _without_largest(x: Tensor, top: TopK) -> Parts:
    rest, side = _dense(x), _dense(x)
    torch.ops.fp4dist.take_largest(x, top.group, top.k, rest, side)
    return Parts(rest, side)


def _takes_groups(top: TopK) -> bool:
    power = 8 <= top.group <= LONGEST_GROUP and top.group & (top.group - 1) == 0
    return power and top.k <= _MOST_TAKEN and top.precision == "bf16"


def _takes_rows(x: Tensor, place: Place) -> bool:
    """Whether every row is whole here, in one piece and short enough, and no token of it only fills up."""
    shared = place.reduce_max is not None and place.key is not None and (place.key.columns or 0) > x.shape[1]
    filled = place.filled and place.token_dim == 1
    return _is_of_rows(x) and x.shape[1] <= LONGEST_ROW and not (shared or filled)


def _is_of_rows(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.stride(1) == 1


def _takes_strips(x: Tensor, precision: Precision) -> bool:
    multiple = {"bf16": _STRIP, "mxfp8": _OF_MXFP8}.get(precision)
    return multiple is not None and x.shape[1] % multiple == 0 and x.dtype in _DTYPES and x.numel() > 0


def _dense(x: Tensor) -> Tensor:
    """Room for a matrix of x's shape and dtype, row by row."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
