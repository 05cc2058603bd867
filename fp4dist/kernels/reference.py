"""The reference as a backend: `fp4dist.numerics` itself, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fp4dist.kernels.registry import kernel
from fp4dist.numerics import dequantize, matmul, quantize, requantize
from fp4dist.numerics.estimators import filter_by_mask, filter_by_scales, mask, slope
from fp4dist.numerics.matmul import Operand
from fp4dist.numerics.quantize import original
from fp4dist.numerics.splits import decompose, hot_residual, in_precision, take_channels

for _op, _fn in (("quantize", quantize), ("requantize", requantize), ("dequantize", dequantize), ("matmul", matmul)):
    kernel(_op, backend="reference")(_fn)  # type: ignore[arg-type]

kernel("mask", backend="reference")(mask)
kernel("filter_by_mask", backend="reference")(filter_by_mask)
kernel("filter_by_scales", backend="reference")(filter_by_scales)
kernel("slope", backend="reference")(slope)
kernel("original", backend="reference")(original)
kernel("decompose", backend="reference")(decompose)
kernel("take_channels", backend="reference")(take_channels)
kernel("in_precision", backend="reference")(in_precision)
kernel("hot_residual", backend="reference")(hot_residual)


@kernel("grouped_matmul", backend="reference")
def grouped_matmul(
    a: Sequence[Operand],
    b: Sequence[Operand],
    *,
    out: torch.dtype = torch.float32,
    into: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """For each pair A [M, K], B [N, K] (see `matmul`): A B^T in `out`, or added to its tensor of `into`.

    M, N and K may differ from pair to pair (in wgrad K is the number of an expert's tokens). A grouped kernel has to
    give the bits of one `matmul` a pair.
    """
    sums = [None] * len(a) if into is None else into
    return [matmul(x, w, out=out, into=total) for x, w, total in zip(a, b, sums, strict=True)]


@kernel("amax", backend="reference")
def amax(x: Tensor) -> Tensor:
    """[] fp32 max |x| of a tensor of any shape; NaN if any element is."""
    return x.abs().amax().float()
