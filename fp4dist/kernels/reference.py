"""The reference as a backend: `fp4dist.numerics` itself, on any device."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fp4dist.kernels.registry import kernel
from fp4dist.numerics import dequantize, matmul, quantize, requantize
from fp4dist.numerics.matmul import Operand

for _op, _fn in (("quantize", quantize), ("requantize", requantize), ("dequantize", dequantize), ("matmul", matmul)):
    kernel(_op, backend="reference")(_fn)  # type: ignore[arg-type]


@kernel("grouped_matmul", backend="reference")
def grouped_matmul(a: Sequence[Operand], b: Sequence[Operand]) -> list[Tensor]:
    """For each pair A [M, K], B [N, K] (block-scaled, or one of them plain): A B^T in fp32.

    M, N and K may differ from pair to pair (in wgrad K is the number of an expert's tokens). A grouped kernel has to
    give the bits of one `matmul` a pair.
    """
    return [matmul(*pair) for pair in zip(a, b, strict=True)]


@kernel("amax", backend="reference")
def amax(x: Tensor) -> Tensor:
    """[] fp32 max |x| of a tensor of any shape; NaN if any element is."""
    return x.abs().amax().float()
