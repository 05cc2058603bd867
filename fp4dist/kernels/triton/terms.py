# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# Triton's own language: its kernels' parameters have no types, a launch takes options beside the kernel's parameters.
"""fp32 as the sum of three bf16 terms, of 8 significant bits each, from one reading of a matrix."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4dist.kernels.triton import arithmetic as a
from fp4dist.kernels.triton.launch import start

COUNT = 3
_ELEMENTS = 2048  # of a program


@triton.jit
def bf16_word(x):
    """fp32 -> int32 whose upper half is the nearest bf16, the even one of two; the rest is 0."""
    word = a.bits(x)
    return tl.where(x == x, word + 0x7FFF + ((word >> 16) & 1), word | 0x400000) & -65536


@triton.jit
def terms_kernel(x, first, second, third, count, N: tl.constexpr):
    """`count` fp32 -> the bits of its terms in int16."""
    at = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    inside = at < count
    y = tl.load(x + at, mask=inside, other=0.0)
    word = bf16_word(y)
    tl.store(first + at, (word >> 16).to(tl.int16), mask=inside)
    y = y - a.floats(word)
    word = bf16_word(y)
    tl.store(second + at, (word >> 16).to(tl.int16), mask=inside)
    tl.store(third + at, (bf16_word(y - a.floats(word)) >> 16).to(tl.int16), mask=inside)


def split(x: Tensor) -> list[Tensor]:
    """[R, C] fp32 -> three bf16 tensors whose sum it is, each the nearest to what those before leave; dense, and column
    by column where `x` is.
    """
    if x.stride(0) == 1 and x.stride(1) == x.shape[0]:
        return [term.t() for term in split(x.t())] if x.shape[1] > 1 else _split(x.contiguous())
    return _split(x.contiguous())


def _split(x: Tensor) -> list[Tensor]:
    found = [torch.empty(x.shape, dtype=torch.bfloat16, device=x.device) for _ in range(COUNT)]
    count = x.numel()
    if count:
        arguments = x, *(term.view(torch.int16) for term in found), count
        constants = {"N": _ELEMENTS, "num_warps": 4, "enable_fp_fusion": False}
        start(terms_kernel, -(-count // _ELEMENTS), arguments, constants)
    return found
