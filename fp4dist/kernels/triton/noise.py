# pyright: basic, reportArgumentType=false, reportOperatorIssue=false
# Triton's own language: its functions' parameters have no types.
"""Philox words by their place in the global operand: what `fp4dist.numerics.rng` draws, for one tile."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4dist.kernels.triton import arithmetic as a
from fp4dist.numerics.moment import Moment
from fp4dist.numerics.rng import MASK, run_words
from fp4dist.numerics.tensor import Key

# Parameters that change from step to step: their values must not be compiled in.
# Beside them goes, after k1, `when`: micro-batch and step, int32[2] in memory, so that a CUDA graph draws anew.
PLACE = ["k0", "k1", "c3", "width", "row_run", "r0", "r1", "column_run", "q0", "q1"]


def place(key: Key | None, rows: int, columns: int, group: int, device: torch.device) -> tuple[Any, ...]:
    """The values of PLACE and of `when` for a shard of [rows, columns] in groups of `group` columns: key, time, counter
    word, groups in a global row, and the runs of rows and of groups.
    """
    if key is None:
        return (0, 0, _unread(device), 0, 1, rows, 0, 0, columns // group, 0, 0)
    k0, k1, *where = _where(
        key.seed, key.layer, key.slot, key.stream, key.row_runs, key.column_runs, key.columns, rows, columns, group
    )
    return k0, k1, moment(key, device).time, *where


@lru_cache(maxsize=4096)
def _where(
    seed: int, layer: int, slot: int, stream: int, row_runs: tuple[int, ...], column_runs: tuple[int, ...],
    all_columns: int | None, rows: int, columns: int, group: int,
) -> tuple[int, ...]:  # fmt: skip
    """PLACE, which does not change from step to step."""
    if len(row_runs) > 2 or len(column_runs) > 2:
        raise ValueError(f"at most two runs of rows and columns, got {row_runs} and {column_runs}")
    counted = columns // group
    width = all_columns // group if all_columns else counted
    r = (*row_runs, 0)[:2]
    c = (*(start // group for start in column_runs), 0)[:2]
    c3 = run_words(Key(slot=slot, stream=stream))[2]
    runs = rows // len(row_runs), *r, counted // len(column_runs), *c
    return as_int32(seed), as_int32(layer), as_int32(c3), width, *runs


@lru_cache(maxsize=16)
def _unread(device: torch.device) -> Tensor:
    """[2] int32 for kernels that draw nothing."""
    with torch.inference_mode(False):  # they outlive the pass
        return Moment(device).time


def moment(key: Key, device: torch.device) -> Moment:
    """The time of a key on a device: the key's own, or one that all keys of the same time share."""
    if key.moment is not None:
        return key.moment
    stream = torch._C._cuda_getCurrentRawStream(device.index or 0) if device.type == "cuda" else 0
    if stream and torch.cuda.is_current_stream_capturing():  # memory of the graph: nobody else may read it
        return Moment(device, key.step, key.micro_batch)
    return _shared(device, stream, key.step, key.micro_batch)


@lru_cache(maxsize=256)
def _shared(device: torch.device, _stream: int, step: int, micro_batch: int) -> Moment:
    """Of one stream: what another one fills might be read too early."""
    return Moment(device, step, micro_batch)


def as_int32(word: int) -> int:
    """The int32 of the same 32 bits, so that a kernel is compiled for one type."""
    word &= MASK
    return word - (1 << 32) if word >= 1 << 31 else word


@triton.jit
def positions(i, run, first, second):
    """Global positions of local ones: two runs of length `run` from `first` and `second`, or one run of everything."""
    return tl.where(i < run, first + i, second + i - run).to(tl.int64)


@triton.jit
def global_positions(i, run, first, second):
    """The same as uint32."""
    return tl.where(i < run, first + i, second + i - run).to(tl.uint32)


@triton.jit
def words(index, k0, k1, when, c3):
    """Four uint32 words for uint32 counters; everything else as the int32 of the same bits."""
    zero = tl.zeros_like(index)
    return a.philox(
        index, zero + tl.load(when).to(tl.uint32), zero + tl.load(when + 1).to(tl.uint32), zero + c3.to(tl.uint32),
        zero + k0.to(tl.uint32), zero + k1.to(tl.uint32),
    )  # fmt: skip


@triton.jit
def element_noise(row, col, k0, k1, when, c3, width, row_run, r0, r1, column_run, q0, q1,
                  R: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """[R, N] int32 in [0, 2^16) of the tile at (row, col); one counter for eight elements of a row."""
    r = positions(row + tl.arange(0, R), row_run, r0, r1)
    c = positions(col // 8 + tl.arange(0, N // 8), column_run, q0, q1)
    w0, w1, w2, w3 = words((r[:, None] * width + c[None, :]).to(tl.uint32), k0, k1, when, c3)
    j0 = tl.join(w0 & 0xFFFF, w0 >> 16)
    j1 = tl.join(w1 & 0xFFFF, w1 >> 16)
    j2 = tl.join(w2 & 0xFFFF, w2 >> 16)
    j3 = tl.join(w3 & 0xFFFF, w3 >> 16)
    halves = tl.permute(tl.join(tl.join(j0, j2), tl.join(j1, j3)), (0, 1, 3, 4, 2))  # word, then half
    return tl.reshape(halves, (R, N)).to(tl.int32)


@triton.jit
def scale_noise(row, col, k0, k1, when, c3, width, row_run, r0, r1, column_run, q0, q1,
                R: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """[R, N] uint32 words, one of each block of the tile of blocks at (row, col); one counter for four blocks."""
    r = positions(row + tl.arange(0, R), row_run, r0, r1)
    c = positions(col + tl.arange(0, N), column_run, q0, q1)
    block = r[:, None] * width + c[None, :]
    w0, w1, w2, w3 = words((block // 4).to(tl.uint32), k0, k1, when, c3)
    which = (block % 4).to(tl.int32)
    return tl.where(which == 0, w0, tl.where(which == 1, w1, tl.where(which == 2, w2, w3)))
