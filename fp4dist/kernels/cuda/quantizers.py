"""All quantizers of csrc/ under one name: those made for hot formats where they take a spec, else the general one."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from fp4dist import numerics
from fp4dist.kernels.cuda import decode, filters, grids, jobs
from fp4dist.kernels.cuda import quantize as fast
from fp4dist.numerics.grouping import ReduceMax
from fp4dist.numerics.rotation import turned_back
from fp4dist.numerics.scales import divide, fp32
from fp4dist.numerics.tensor import CODES, BlockScaledTensor, Carrier, Key, PartedTensor, Quantized, Want, unturned
from fp4dist.spec.blocks import Ema, Hadamard, Nearest
from fp4dist.spec.recipe import QuantSpec

Side = fast.Side


@lru_cache(maxsize=1024)
def _made_for(spec: QuantSpec) -> QuantSpec | None:
    """What a specialised kernel takes for `spec` without a moving average, or None."""
    plain = replace(spec, rounding=Nearest()) if isinstance(spec.rounding, Ema) else spec
    return plain if jobs.why_not(plain) is None else None


def is_fast(spec: QuantSpec) -> bool:
    """Whether quantizers that are made for some specs take `spec`."""
    return jobs.why_not(spec) is None


@lru_cache(maxsize=1024)
def why_not(spec: QuantSpec) -> str | None:
    """What of `spec` none has, or None."""
    reason = jobs.why_not(spec)
    return None if reason is None or grids.why_not(spec) is None else f"{reason}; {grids.why_not(spec)}"


def quantize(
    source: Tensor | BlockScaledTensor, spec: QuantSpec, key: Key | None = None, reduce_max: ReduceMax | None = None,
    toward: Tensor | None = None, *, want: Want = CODES,
) -> BlockScaledTensor | Carrier:  # fmt: skip
    """The codes of a matrix, or of the transpose of codes; see `fp4dist.numerics.quantize`."""
    made_for = _made_for(spec) if toward is None else None
    if made_for is None:
        return grids.quantize(source, spec, key, reduce_max, toward, want=want)
    if isinstance(source, BlockScaledTensor) and decode.why_not_codes(source) is not None:
        source = dequantize(source).t()
    return fast.quantize(source, made_for, key, reduce_max, want=want)


def requantize(
    q: BlockScaledTensor, spec: QuantSpec, key: Key | None = None, reduce_max: ReduceMax | None = None, *,
    want: Want = CODES, back: tuple[Hadamard | None, Key | None] | None = None,
) -> BlockScaledTensor | Carrier:  # fmt: skip
    """The codes of `q`'s transpose; see `fp4dist.numerics.requantize`. back: (rotation, key) of the basis of `q`."""
    if is_fast(spec) and decode.why_not_codes(q) is None:
        return fast.requantize(q, spec, key, reduce_max, want=want, back=back)
    if back is None and q.rotation != 1:
        raise ValueError(f"requantize needs codes in the original basis, or that basis, got rotation {q.rotation}")
    values = dequantize(q) if back is None else original(q, *back)
    return quantize(values.t(), spec, key, reduce_max, want=want)


def dequantize(q: Quantized) -> Tensor:
    """[R, C] fp32 values; see `fp4dist.numerics.dequantize`."""
    if isinstance(q, PartedTensor):
        values = dequantize(q.main)
        return q.plus_side(values, fp32(q.rotation**-0.5))
    if q.samples > 1:
        total = dequantize(q.sample(0))
        for i in range(1, q.samples):
            total = total + dequantize(q.sample(i))
        return divide(total, float(q.samples))
    if decode.why_not_codes(q) is None:
        return decode.dequantize(q)
    return grids.dequantize(q) if grids.has_values(q) else numerics.dequantize(q)


def original(
    q: Quantized, rotation: Hadamard | None, key: Key | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[R, C] values in fp32, or rounded once to bf16; see `fp4dist.numerics.quantize.original`."""
    if rotation is None:
        return dequantize(q).to(dtype)
    if isinstance(q, BlockScaledTensor) and filters.why_no_original(q) is None:
        return filters.original(q, rotation, key, dtype)
    return turned_back(dequantize(unturned(q)), rotation, key).to(dtype)


def why_not_values(spec: QuantSpec | None) -> str | None:
    """Why codes of `spec` cannot be decoded here, or None."""
    element = spec.format.element if spec is not None else None
    if element is None or element.mantissa in (2, 3) or (element.mantissa is None and len(element.levels) <= 8):
        return None
    return f"csrc decodes grids of at most 8 levels and FP8, not {element.name}"


def why_not_carrier(q: BlockScaledTensor, dtype: torch.dtype) -> str | None:
    """Why `to_carrier` cannot write the values of `q` in `dtype`, or None."""
    return None if decode.why_not_carrier(q, dtype) is None else grids.why_not_carrier(q, dtype)


def to_carrier(q: BlockScaledTensor, dtype: torch.dtype, *, transposed: bool = False) -> Carrier:
    """The values of codes `q`, or of their transpose, in `dtype`; see `decode` and `grids`."""
    if decode.why_not_carrier(q, dtype) is None:
        return decode.to_carrier(q, dtype, transposed=transposed)
    return grids.to_carrier(q.transpose() if transposed else q, dtype)
