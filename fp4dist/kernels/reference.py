"""The reference as a backend: `fp4dist.numerics` itself, on any device."""

from __future__ import annotations

from torch import Tensor

from fp4dist.kernels.registry import kernel
from fp4dist.numerics import dequantize, matmul, quantize, requantize

for _op, _fn in (("quantize", quantize), ("requantize", requantize), ("dequantize", dequantize), ("matmul", matmul)):
    kernel(_op, backend="reference")(_fn)  # type: ignore[arg-type]


@kernel("amax", backend="reference")
def amax(x: Tensor) -> Tensor:
    """[] fp32 max |x| of a tensor of any shape; NaN if any element is."""
    return x.abs().amax().float()
