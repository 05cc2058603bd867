"""MEANING: the plain-torch reference that defines every bit. Fast kernels obtain the same bits, never other ones.

The numerics contract
 1. Quantizer maths is fp32, one rounding per operation, in the order written here; no FMA contraction, no flush to 0.
 2. Encodings (E2M1, E4M3, E8M0) are comparisons and integer arithmetic of our own, never a compiler's cast.
 3. Noise is Philox-4x32-10 keyed by (seed, layer) and counted by (element index in the *global* tensor, global
    micro-batch, step, slot): the same bits for every backend, tensor-parallel split, recompute and call order.
 4. `max` is order-free; sums inside a quantizer are one fixed tree over the block: adjacent pairs, columns before rows.
 5. Block-scaled GEMMs accumulate in fp32. On exactly summable inputs every implementation gives the same result.
 6. An amax or a moment is that of the *logical* row or tensor: a caller whose tensor is a shard passes `reduce_max`.
"""

from __future__ import annotations

from fp4dist.numerics.matmul import matmul
from fp4dist.numerics.quantize import dequantize, quantize, requantize
from fp4dist.numerics.tensor import BlockScaledTensor, Key

__all__ = ["BlockScaledTensor", "Key", "dequantize", "matmul", "quantize", "requantize"]
