"""Philox-4x32-10 (Salmon et al., SC'11) in torch, and how its counter is laid out.

Key = (seed, layer); counter = (index, global micro-batch, step, slot + 8 * stream).
Per-element noise: index = element // 8, the 16-bit half number element % 8 of the four words (low half first).
Per-scale noise:   index = block // 4, the 32-bit word number block % 4.
`element` and `block` are row-major indices in the *global* operand, so no split changes them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from fp4dist.numerics.tensor import Key

MASK = 0xFFFFFFFF
M0, M1 = 0xD2511F53, 0xCD9E8D57
W0, W1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
SLOTS_PER_STREAM = 8


Word = TypeVar("Word", Tensor, int)


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[int, int]) -> tuple[Word, Word, Word, Word]:
    """Four words of Philox-4x32-10. counter: int64 tensors in [0, 2**32), broadcastable, or ints; words likewise."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = c0 * M0, c2 * M1  # 64-bit products; a signed wrap leaves the bit pattern right
        # the low halves p1, p0 are masked where they are used: in the next round's xor, or at the end
        c0, c1, c2, c3 = ((p1 >> 32) ^ c1 ^ k0) & MASK, p1, ((p0 >> 32) ^ c3 ^ k1) & MASK, p0
        k0, k1 = (k0 + W0) & MASK, (k1 + W1) & MASK
    return c0, c1 & MASK, c2, c3 & MASK


def words(index: Tensor, key: Key) -> Tensor:
    """[..., 4] int64 words for counter indices `index` (int64) under `key`."""
    drawn = philox((index & MASK, *_run_words_on(key, index.device)), (key.seed & MASK, key.layer & MASK))
    return torch.stack(torch.broadcast_tensors(*drawn), dim=-1)


def element_noise(shape: torch.Size, key: Key, device: torch.device) -> Tensor:
    """[R, C] int32 in [0, 2**16): one half-word per element of this shard. Its column runs: multiples of 8."""
    drawn = words(_indices(shape, key, 8, device), key)
    halves = drawn.to(torch.int32).view(torch.int16)  # little-endian: the low half of each word comes first
    return halves.reshape(shape).to(torch.int32) & 0xFFFF


def scale_noise(blocks: torch.Size, key: Key, block_columns: int, device: torch.device) -> Tensor:
    """[R, C/block] int64 in [0, 2**32): one word per block of this shard."""
    width = (key.columns or blocks[1] * block_columns) // block_columns
    starts = tuple(start // block_columns for start in key.column_runs)
    in_blocks = replace(key, column_runs=starts, columns=width)
    if not any(n % 4 for n in (width, blocks[1] // len(starts), *starts)):
        return words(_indices(blocks, in_blocks, 4, device), key).reshape(blocks)  # one counter serves four blocks
    flat = _indices(blocks, in_blocks, 1, device)
    drawn = words(flat // 4, key)
    return drawn.gather(-1, (flat % 4).unsqueeze(-1)).squeeze(-1)


def random_signs(size: int, key: Key, device: torch.device) -> Tensor:
    """[size] fp32 of +-1, size <= 128: bit i of the 128-bit draw at index 0; a set bit is -1."""
    if key.moment is not None:
        nothing = torch.zeros((), dtype=torch.int64, device=device)
        words = torch.stack(philox((nothing, *_run_words_on(key, device)), (key.seed & MASK, key.layer & MASK)))
        bits = words[:, None] >> torch.arange(32, device=device) & 1
        return 1.0 - 2.0 * bits.flatten()[:size].to(torch.float32)
    drawn = philox((0, *run_words(key)), (key.seed & MASK, key.layer & MASK))
    return torch.tensor([1.0 - 2.0 * (drawn[i // 32] >> i % 32 & 1) for i in range(size)], device=device)


def run_words(key: Key) -> tuple[int, int, int]:
    """(micro-batch, step, slot and stream): the counter's 32-bit words above the index."""
    return key.micro_batch & MASK, key.step & MASK, (key.slot + SLOTS_PER_STREAM * key.stream) & MASK


def _run_words_on(key: Key, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """`run_words` as [] int64 on `device`; the first two from the key's moment, where it has one."""
    words = run_words(key)
    last = torch.full((), words[2], dtype=torch.int64, device=device)
    if key.moment is None:
        first, second = (torch.full((), word, dtype=torch.int64, device=device) for word in words[:2])
    else:
        first, second = (key.moment.time.to(device, torch.int64) & MASK).unbind()
    return first, second, last


def _indices(shape: torch.Size, key: Key, group: int, device: torch.device) -> Tensor:
    """[R, C/group]: counter index of each group of elements."""
    rows, columns = shape
    width = (key.columns or columns) // group
    row = _positions(rows, key.row_runs, device)
    column = _positions(columns // group, tuple(start // group for start in key.column_runs), device)
    return row[:, None] * width + column


def _positions(length: int, starts: tuple[int, ...], device: torch.device) -> Tensor:
    """[length] global positions of a shard's rows or columns, which are equal runs from `starts`."""
    if length % len(starts):
        raise ValueError(f"{length} rows or columns are not {len(starts)} equal runs")
    run = length // len(starts)
    return torch.cat([torch.arange(start, start + run, device=device) for start in starts])
