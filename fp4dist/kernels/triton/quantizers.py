"""All quantizers of this backend under one name: the fast ones where they take a spec, else the general ones."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fp4dist.kernels.triton import carriers, grids
from fp4dist.kernels.triton import quantize as fast
from fp4dist.numerics.grouping import ReduceMax
from fp4dist.numerics.tensor import CODES, BlockScaledTensor, Carrier, Key, Want
from fp4dist.spec.blocks import Hadamard
from fp4dist.spec.formats import E2M1
from fp4dist.spec.recipe import QuantSpec


@lru_cache(maxsize=1024)
def is_fast(spec: QuantSpec) -> bool:
    """Whether the fast quantizers take `spec`."""
    return fast.why_not(spec) is None


def why_not(spec: QuantSpec) -> str | None:
    """What of `spec` neither has, or None."""
    return None if is_fast(spec) else grids.why_not(spec)


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
    chosen = fast.quantize if is_fast(spec) else grids.quantize
    return chosen(source, spec, key, reduce_max, toward, want=want)


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
    chosen = fast.requantize if is_fast(spec) and _read_by_fast(q) else grids.requantize
    return chosen(q, spec, key, reduce_max, want=want, **named)


def _read_by_fast(q: BlockScaledTensor) -> bool:
    """Whether the fast quantizers decode `q` in registers."""
    known = q.format.element == E2M1 and q.format.scale.name in ("e4m3", "e8m0")
    return known and q.global_scale.dim() == 0 and q.samples == 1


def why_not_carrier(q: BlockScaledTensor, dtype: torch.dtype) -> str | None:
    """Why `to_carrier` cannot write the values of `q` in `dtype`, or None."""
    return None if carriers.why_not_carrier(q, dtype) is None else grids.why_not_carrier(q, dtype)


def to_carrier(q: BlockScaledTensor, dtype: torch.dtype, *, transposed: bool = False) -> Carrier:
    """The values of codes `q`, or of their transpose, in `dtype`; see `carriers` and `grids`."""
    if carriers.why_not_carrier(q, dtype) is None:
        return carriers.to_carrier(q, dtype, transposed=transposed)
    return grids.to_carrier(q.transpose() if transposed else q, dtype)
