# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false
# Triton's own language: its functions' parameters have no types, a launch takes options beside the kernel's own.
"""A rotation's signs as four words in device memory. Fresh ones are drawn once a micro-batch, for many linears."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4dist.kernels.triton import arithmetic as a
from fp4dist.kernels.triton.launch import integer, launch
from fp4dist.kernels.triton.noise import as_int32, moment
from fp4dist.numerics.moment import Moment
from fp4dist.numerics.rng import SLOTS_PER_STREAM
from fp4dist.numerics.rotation import FIXED_SIGNS
from fp4dist.numerics.tensor import Key, Stream
from fp4dist.spec.blocks import Hadamard
from fp4dist.spec.recipe import SLOTS

_PUBLISHED = sum(1 << i for i, sign in enumerate(FIXED_SIGNS) if sign < 0)
_LINEARS = 64  # whose signs are drawn together
_GEMMS = len(SLOTS) // 2  # of a linear; both operands of one share signs


def has_signs(rotation: Hadamard | None) -> bool:
    """Whether a rotation flips anything."""
    return rotation is not None and rotation.signs != "none"


def sign_words(rotation: Hadamard | None, key: Key | None, device: torch.device) -> Tensor:
    """[4] int32, 16-byte aligned: bit i of the 128 is set where the sign of element i of a group is -1; see
    `numerics.rotation`.
    """
    if rotation is None or rotation.signs == "none":
        return _given(0, device)
    if rotation.signs == "fixed":
        return _given(_PUBLISHED if rotation.mask is None else rotation.mask, device)
    if key is None:
        raise ValueError("a rotation with fresh signs needs a key")
    linear = key.seed, key.layer
    place = _met.get(linear)
    if place is None:
        place = _met[linear] = len(_met)
    block, row = divmod(place, _LINEARS)
    known = min(len(_met) - block * _LINEARS, _LINEARS)
    rows = moment(key, device).drawn(("signs", block, known), lambda now: _draw(now, block, known))
    return rows[row * _GEMMS + key.slot // 2]


def lasting_signs(rotation: Hadamard | None, device: torch.device) -> Tensor | None:
    """`sign_words` of a rotation whose signs are always the same; None: fresh ones."""
    return None if rotation is not None and rotation.signs == "fresh" else sign_words(rotation, None, device)


_met: dict[tuple[int, int], int] = {}  # (seed, layer) of linears with fresh signs, in the order in which they came


@lru_cache(maxsize=256)
def _given(mask: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # they outlive the pass
        return torch.tensor([as_int32(mask >> 32 * i) for i in range(4)], dtype=torch.int32, device=device)


def _draw(now: Moment, block: int, known: int) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
    """The words of each GEMM of a block's `known` linears, and what fills them for the present time."""
    device, number = now.time.device, known * _GEMMS
    words = torch.empty((number, 4), dtype=torch.int32, device=device)
    arguments = now.time, _keys(block, known, device), words, number
    constants = {
        "GEMMS": _GEMMS, "STREAM": SLOTS_PER_STREAM * int(Stream.SIGNS), "num_warps": 4,
        "B": triton.next_power_of_2(_LINEARS * _GEMMS),
    }  # fmt: skip

    def fill() -> None:
        launch(signs_kernel, 1, arguments, constants, ("signs", integer(number), device))

    fill()
    return words.unbind(), fill


@lru_cache(maxsize=256)
def _keys(block: int, known: int, device: torch.device) -> Tensor:
    """[known, 2] int32: seed and layer of a block's linears."""
    linears = list(_met)[block * _LINEARS : block * _LINEARS + known]
    return torch.tensor(
        [[as_int32(seed), as_int32(layer)] for seed, layer in linears], device=device, dtype=torch.int32
    )


@triton.jit
def signs_kernel(when, keys, words, number, GEMMS: tl.constexpr, STREAM: tl.constexpr, B: tl.constexpr):
    """The 128-bit draw at index 0 for every GEMM of the linears with `keys` [number / GEMMS, 2]. words: [number, 4]."""
    i = tl.arange(0, B)
    inside = i < number
    seed = tl.load(keys + i // GEMMS * 2, mask=inside, other=0)
    layer = tl.load(keys + i // GEMMS * 2 + 1, mask=inside, other=0)
    zero = tl.zeros_like(i).to(tl.uint32)
    w0, w1, w2, w3 = a.philox(
        zero, zero + tl.load(when).to(tl.uint32), zero + tl.load(when + 1).to(tl.uint32),
        (STREAM + i % GEMMS * 2).to(tl.uint32), seed.to(tl.uint32), layer.to(tl.uint32),
    )  # fmt: skip
    tl.store(words + i * 4, w0.to(tl.int32), mask=inside)
    tl.store(words + i * 4 + 1, w1.to(tl.int32), mask=inside)
    tl.store(words + i * 4 + 2, w2.to(tl.int32), mask=inside)
    tl.store(words + i * 4 + 3, w3.to(tl.int32), mask=inside)


@triton.jit
def word_of(i, signs, ROT: tl.constexpr):
    """int32 word that holds the sign bit of element `i` of a group of ROT."""
    word = tl.load(signs)
    if ROT > 32:
        word = tl.where(i < 32, word, tl.load(signs + 1))
    if ROT > 64:
        word = tl.where(i < 64, word, tl.where(i < 96, tl.load(signs + 2), tl.load(signs + 3)))
    return word


@triton.jit
def flip(c, signs, ROT: tl.constexpr):
    """int32 sign bit, set where the sign of columns `c` (of groups of ROT) is -1."""
    i = c % ROT
    return (word_of(i, signs, ROT) >> (i & 31)) << 31
