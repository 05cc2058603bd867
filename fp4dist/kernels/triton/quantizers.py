"""All quantizers of this backend under one name: the fast ones where they take a spec, else the general ones."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fp4dist.kernels.triton import carriers, eden, grid_values, grids, powers
from fp4dist.kernels.triton import quantize as fast
from fp4dist.kernels.triton.quantize import Side
from fp4dist.numerics.grouping import ReduceMax
from fp4dist.numerics.tensor import CODES, BlockScaledTensor, Carrier, Key, Want
from fp4dist.spec.blocks import Hadamard
from fp4dist.spec.formats import E2M1
from fp4dist.spec.recipe import QuantSpec


def _taker(spec: QuantSpec) -> Any:
    """The module whose `quantize` and `requantize` take `spec`: `eden`, `powers`, `quantize`, or else `grids`."""
    seen = _SEEN.get(id(spec))  # because hashing a spec takes longer than a launch
    if seen is None:
        if len(_SEEN) > 4096:  # specs that are made anew at each call
            _SEEN.clear()
        seen = _SEEN[id(spec)] = spec, _find_taker(spec)
    return seen[1]


_SEEN: dict[int, tuple[QuantSpec, Any]] = {}


@lru_cache(maxsize=1024)
def _find_taker(spec: QuantSpec) -> Any:
    for module in (eden, powers):
        if module.why_not(spec) is None:
            return module
    return fast if fast.why_not(spec) is None else grids


def is_fast(spec: QuantSpec) -> bool:
    """Whether quantizers that are made for some specs take `spec`."""
    return _taker(spec) is not grids


def why_not(spec: QuantSpec) -> str | None:
    """What of `spec` none has, or None."""
    if is_fast(spec):
        return None
    return eden.why_not(spec) if eden.is_eden(spec) else grids.why_not(spec)


def why_not_pair(row: QuantSpec, column: QuantSpec) -> str | None:
    """Why `quantize_pair` cannot take these two specs, or None."""
    slow = next((spec for spec in (row, column) if not is_fast(spec)), None)
    return None if slow is None else f"only the general quantizers take {slow.label()}"


def quantize(
    source: Tensor | BlockScaledTensor,
    spec: QuantSpec,
    key: Key | None = None,
    reduce_max: ReduceMax | None = None,
    toward: Tensor | None = None,
    *,
    want: Want = CODES,
) -> BlockScaledTensor | Carrier:
    """See `fp4dist.numerics.quantize`."""
    return _taker(spec).quantize(source, spec, key, reduce_max, toward, want=want)


def requantize(
    q: BlockScaledTensor,
    spec: QuantSpec,
    key: Key | None = None,
    reduce_max: ReduceMax | None = None,
    *,
    want: Want = CODES,
    back: tuple[Hadamard | None, Key | None] | None = None,
) -> BlockScaledTensor | Carrier:
    """See `fp4dist.numerics.requantize`. back: the (rotation, key) whose basis the codes are in."""
    named: dict[str, Any] = {} if back is None else {"back": back}
    taker = _taker(spec) if _read_by_fast(q) else grids
    return taker.requantize(q, spec, key, reduce_max, want=want, **named)


def quantize_pair(
    x: Tensor, row: Side, column: Side
) -> tuple[BlockScaledTensor | Carrier, BlockScaledTensor | Carrier]:
    """The operands of x [T, O] and of x^T [O, T]; bits as of two calls of `quantize`."""
    taker = _taker(row.spec)
    if taker is _taker(column.spec):
        return taker.quantize_pair(x, row, column)
    return _alone(x, row), _alone(x.t(), column)


def _alone(x: Tensor, side: Side) -> BlockScaledTensor | Carrier:
    return quantize(x, side.spec, side.key, side.reduce_max, want=side.want)


def _read_by_fast(q: BlockScaledTensor) -> bool:
    """Whether the fast quantizers decode `q` in registers."""
    known = q.format.element == E2M1 and q.format.scale.name in ("e4m3", "e8m0")
    return known and q.global_scale.dim() == 0 and q.samples == 1


def why_not_carrier(q: BlockScaledTensor, dtype: torch.dtype) -> str | None:
    """Why `to_carrier` cannot write the values of `q` in `dtype`, or None."""
    return None if carriers.why_not_carrier(q, dtype) is None else grid_values.why_not_carrier(q, dtype)


def to_carrier(q: BlockScaledTensor, dtype: torch.dtype, *, transposed: bool = False) -> Carrier:
    """The values of codes `q`, or of their transpose, in `dtype`; see `carriers` and `grids`."""
    if carriers.why_not_carrier(q, dtype) is None:
        return carriers.to_carrier(q, dtype, transposed=transposed)
    return grid_values.to_carrier(q, dtype, transposed=transposed)
