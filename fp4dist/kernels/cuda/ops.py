"""Operators of the compiled extension: registration, what they need of a device, shapes for tracing.

Import this module only after the extension has loaded (the package's `__init__` does). Shape, type and layout are
checked here. csrc/bindings.cpp repeats the checks for callers of torch.ops; but an extension that another compiler than
torch's has built may end the process there instead of raising (seen once).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fp4dist.kernels.cuda import filters, jobs, matmul, parts, quantize, quantizers, wire
from fp4dist.kernels.registry import Request, kernel
from fp4dist.numerics.matmul import Operand

OLDEST = (8, 0)  # compute capability; the warp-wide integer reduction appeared with it


def supports(request: Request) -> str | None:
    """Why the extension cannot serve `request`, or None."""
    if request.device.type != "cuda":
        return f"needs a CUDA device, not {request.device.type}"
    capability = torch.cuda.get_device_capability(request.device)
    if capability < OLDEST:
        return f"needs compute capability {OLDEST[0]}.{OLDEST[1]} or newer, not {capability[0]}.{capability[1]}"
    return None


def supports_spec(request: Request) -> str | None:
    """Why the quantizers cannot serve `request`, or None."""
    if request.spec is None:
        return supports(request) or "needs a spec"
    return supports(request) or quantizers.why_not(request.spec)


def supports_pair(request: Request) -> str | None:
    """Why one reading of a matrix cannot serve both specs of `request`, or None."""
    if request.spec is None or request.other is None:
        return supports(request) or "needs two specs"
    return supports(request) or jobs.why_not_pair(request.spec, request.other)


def supports_filter(request: Request) -> str | None:
    """Why gradients cannot pass the quantizer of `request` here, or None."""
    if request.spec is None:
        return supports(request) or "needs a spec"
    return supports(request) or filters.why_not(request.spec)


def supports_values(request: Request) -> str | None:
    """Why codes of `request` cannot be decoded, or None."""
    return supports(request) or quantizers.why_not_values(request.spec)


def supports_parts(request: Request) -> str | None:
    """Why nothing is taken out of operands of `request` here, or None."""
    return supports(request) or parts.why_not(request.spec)


def supports_channels(request: Request) -> str | None:
    """Why chosen channels are not taken out of operands of `request` here, or None."""
    return supports(request) or parts.why_no_channels(request.spec)


def supports_slope(request: Request) -> str | None:
    """Why slopes are not those of csrc, or None."""
    return supports(request) or parts.why_no_slope(request.spec)


def quantize_pair(x: Tensor, row: tuple[Any, ...], column: tuple[Any, ...]) -> tuple[Operand, Operand]:
    """Both operands of one matrix; row, column: the arguments of `quantize` after the matrix, and `want`."""
    return quantize.quantize_pair(x, quantize.Side(*row), quantize.Side(*column))


kernel("quantize", backend="cuda", supports=supports_spec, carries=True)(quantizers.quantize)
kernel("requantize", backend="cuda", supports=supports_spec, carries=True, unrotates=True)(quantizers.requantize)
kernel("quantize_pair", backend="cuda", supports=supports_pair)(quantize_pair)
kernel("to_carrier", backend="cuda", supports=supports_spec)(quantizers.to_carrier)
kernel("dequantize", backend="cuda", supports=supports_values, sums=True)(quantizers.dequantize)
kernel("original", backend="cuda", supports=supports_values, sums=True)(quantizers.original)
kernel("mask", backend="cuda", supports=supports_filter)(filters.mask)
kernel("filter_by_mask", backend="cuda", supports=supports_filter)(filters.filter_by_mask)
kernel("filter_by_scales", backend="cuda", supports=supports_filter)(filters.filter_by_scales)
kernel("decompose", backend="cuda", supports=supports_parts, sums=True)(parts.decompose)
kernel("take_channels", backend="cuda", supports=supports_channels, sums=True)(parts.take_channels)
kernel("in_precision", backend="cuda", supports=supports_channels, sums=True)(parts.in_precision)
kernel("hot_residual", backend="cuda", supports=supports_channels, sums=True)(parts.hot_residual)
kernel("slope", backend="cuda", supports=supports_slope, sums=True)(parts.slope)
kernel("matmul", backend="cuda", supports=matmul.supports, carrier_types=matmul.carrier_types, sums=True)(matmul.matmul)
kernel("grouped_matmul", backend="cuda", supports=matmul.supports)(matmul.grouped_matmul)
kernel("wire_encode", backend="cuda", supports=supports)(wire.encode)
kernel("wire_accumulate", backend="cuda", supports=supports)(wire.accumulate)
kernel("wire_recode", backend="cuda", supports=supports)(wire.recode)
kernel("wire_sum_plain", backend="cuda", supports=supports)(wire.sum_plain)


@kernel("amax", backend="cuda", supports=supports)
def amax(x: Tensor) -> Tensor:
    """[] fp32 max |x|, on x's device and current stream; NaN if any element is.

    x        any shape with at least one element; bf16, fp16 or fp32; dense in memory, in any order of dimensions
    raises   ValueError if x is empty or has gaps, TypeError for another dtype

    Guarantee: the bits of x.abs().amax().float() (the payload of a NaN excepted), the same on every call.
    """
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(f"amax: x.dtype = {x.dtype} must be bfloat16, float16 or float32")
    if x.numel() == 0:
        raise ValueError(f"amax: x of shape {list(x.shape)} is empty; a maximum needs an element")
    if not _is_dense(x):
        raise ValueError(
            f"amax: x of shape {list(x.shape)} and strides {list(x.stride())} has gaps or overlaps;"
            " call x.contiguous() first"
        )
    return torch.ops.fp4dist.amax(x)


def _is_dense(x: Tensor) -> bool:
    """Whether x fills a stretch of memory, in any order of its dimensions: a maximum reads it as it lies."""
    expected = 1
    for stride, size in sorted((st, sz) for st, sz in zip(x.stride(), x.shape, strict=True) if sz > 1):
        if stride != expected:
            return False
        expected *= size
    return True


@torch.library.register_fake("fp4dist::amax")
def _amax_shape(x: Tensor) -> Tensor:
    return x.new_empty((), dtype=torch.float32)


def _writes_only(*_: Any) -> None:
    """The other operators write what they are given and return nothing."""


for _name in (
    "quantize", "quantize_pair", "eden_scales", "decode", "largest_byte", "swizzle", "grid_quantize", "grid_largest",
    "grid_decode", "clip_mask", "clip_filter", "turn_back",
    "take_channels", "hot_residual", "clamp_rows", "take_largest", "slope_offsets", "split_terms",
    "wire_encode", "wire_sum", "wire_recode", "wire_plain",
):  # fmt: skip
    torch.library.register_fake(f"fp4dist::{_name}")(_writes_only)
