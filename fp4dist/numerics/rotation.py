"""Randomized Hadamard transform along the contracted dimension: signs on the input, then +-1 butterflies in fp32.

The factor 1/sqrt(n) is not applied to the data: it is folded into the GEMM's output scale (1/n for a pair of operands),
because 1/sqrt(128) is not exact in bf16 and would shrink every backward GEMM by 2e-4.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fp4dist.numerics.rng import random_signs
from fp4dist.numerics.tensor import Key
from fp4dist.spec.blocks import Hadamard

# The constant vector of Transformer Engine's NVFP4 recipe (bit i set where the sign is -1: 0xD7E8).
FIXED_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


def butterflies(x: Tensor, size: int) -> Tensor:
    """Multiply each group of `size` along the last dimension by the Sylvester matrix of +-1, strides 1, 2, 4 ..."""
    shape = x.shape
    stride = 1
    while stride < size:
        low, high = x.reshape(-1, 2, stride).unbind(1)
        x = torch.empty((low.shape[0], 2, stride), dtype=x.dtype, device=x.device)
        torch.add(low, high, out=x[:, 0])
        torch.sub(low, high, out=x[:, 1])
        stride *= 2
    return x.reshape(shape)


def sign_vector(rotation: Hadamard, key: Key | None, device: torch.device) -> Tensor | None:
    """[size] fp32 of +-1, or None when the rotation has no signs."""
    if rotation.signs == "none":
        return None
    if rotation.signs == "fixed":
        return _fixed_signs(rotation, device)
    if key is None:
        raise ValueError("a rotation with fresh signs needs a key")
    return random_signs(rotation.size, key.signs(), device)


@lru_cache(maxsize=64)
def _fixed_signs(rotation: Hadamard, device: torch.device) -> Tensor:
    mask = rotation.mask
    signs = FIXED_SIGNS if mask is None else [-1 if mask >> i & 1 else 1 for i in range(rotation.size)]
    return torch.tensor(signs, dtype=torch.float32, device=device)


def rotate(x: Tensor, rotation: Hadamard, key: Key | None) -> Tensor:
    """[R, C] fp32 -> its unnormalized rotation; the norm of each row grows by sqrt(size)."""
    signs = sign_vector(rotation, key, x.device)
    if signs is not None:
        x = (x.unflatten(-1, (-1, rotation.size)) * signs).flatten(-2)
    return butterflies(x, rotation.size)


def unrotate(y: Tensor, rotation: Hadamard, key: Key | None) -> Tensor:
    """Inverse of the *normalized* rotation: y holds values in the rotated basis, the result is in the original one."""
    return _turned_back(y, rotation.size**-0.5, rotation, key)


def turned_back(y: Tensor, rotation: Hadamard, key: Key | None) -> Tensor:
    """Inverse of the *unnormalized* rotation, as codes hold it: by 1 / size, a power of two.

    Of codes under power-of-two scales the result is exact. A factor 1 / sqrt(size) before the butterflies is rounded,
    and leaves 2^-24 of a value where codes cancel: blocks of such remains spread a matrix' scales over 28 binades.
    """
    return _turned_back(y, 1.0 / rotation.size, rotation, key)


def _turned_back(y: Tensor, factor: float, rotation: Hadamard, key: Key | None) -> Tensor:
    x = butterflies(y, rotation.size) * factor
    signs = sign_vector(rotation, key, x.device)
    if signs is not None:
        x = (x.unflatten(-1, (-1, rotation.size)) * signs).flatten(-2)
    return x


def filtered(x: Tensor, factor: Tensor, rotation: Hadamard | None, key: Key | None) -> Tensor:
    """[R, C] `x` times `factor`, elementwise in the rotated basis; back in the original one. In fp32."""
    if rotation is None:
        return x.to(torch.float32) * factor
    y = butterflies(rotate(x.to(torch.float32), rotation, key) * factor, rotation.size) * (1.0 / rotation.size)
    signs = sign_vector(rotation, key, x.device)
    return y if signs is None else (y.unflatten(-1, (-1, rotation.size)) * signs).flatten(-2)
