# pyright: basic, reportArgumentType=false, reportOperatorIssue=false
# Triton's own language: its functions' parameters have no types.
"""A rotation's signs as four words that a launch takes by value: nothing is copied to the device, nothing waits."""

from __future__ import annotations

import triton
import triton.language as tl

from fp4dist.kernels.triton.noise import as_int32
from fp4dist.numerics.rng import MASK, philox, run_words
from fp4dist.numerics.rotation import FIXED_SIGNS
from fp4dist.numerics.tensor import Key
from fp4dist.spec.blocks import Hadamard

Words = tuple[int, int, int, int]
_PUBLISHED = sum(1 << i for i, sign in enumerate(FIXED_SIGNS) if sign < 0)


def sign_words(rotation: Hadamard | None, key: Key | None) -> Words:
    """128 bits as int32s, bit i set where the sign of element i of a group is -1; see `numerics.rotation`."""
    if rotation is None or rotation.signs == "none":
        return 0, 0, 0, 0
    if rotation.signs == "fixed":
        mask = _PUBLISHED if rotation.mask is None else rotation.mask
        words = [mask >> 32 * i & MASK for i in range(4)]
    else:
        if key is None:
            raise ValueError("a rotation with fresh signs needs a key")
        k = key.signs()
        words = philox((0, *run_words(k)), (k.seed & MASK, k.layer & MASK))
    first, second, third, fourth = (as_int32(word) for word in words)
    return first, second, third, fourth


@triton.jit
def flip(c, s0, s1, s2, s3, ROT: tl.constexpr):
    """int32 sign bit, set where the sign of columns `c` (of groups of ROT) is -1."""
    i = c % ROT
    word = tl.where(i < 32, s0, tl.where(i < 64, s1, tl.where(i < 96, s2, s3)))
    return (word >> (i & 31)) << 31
