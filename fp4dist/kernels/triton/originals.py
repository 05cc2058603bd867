"""Values of codes in the basis that their matrix came in."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4dist.kernels.triton import filters
from fp4dist.kernels.triton.matmul import dequantize
from fp4dist.numerics.rotation import turned_back
from fp4dist.numerics.tensor import BlockScaledTensor, Key, Quantized, unturned
from fp4dist.spec.blocks import Hadamard


def original(
    q: Quantized, rotation: Hadamard | None, key: Key | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[R, C] values in fp32, or rounded once to bf16; see `fp4dist.numerics.quantize.original`."""
    if rotation is None:
        return dequantize(q).to(dtype)
    if isinstance(q, BlockScaledTensor) and filters.why_no_original(q) is None:
        return filters.original(q, rotation, key, dtype)
    return turned_back(dequantize(unturned(q)), rotation, key).to(dtype)
