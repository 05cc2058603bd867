# pyright: basic, reportArgumentType=false, reportOperatorIssue=false
# Triton's own language: its functions' parameters have no types.
"""Philox words by their place in the global operand: what `fp4dist.numerics.rng` draws, for one tile."""

from __future__ import annotations

import triton
import triton.language as tl

from fp4dist.kernels.triton import arithmetic as a
from fp4dist.numerics.rng import MASK, run_words
from fp4dist.numerics.tensor import Key

# Parameters that change from step to step: their values must not be compiled in.
PLACE = ["k0", "k1", "c1", "c2", "c3", "width", "row_run", "r0", "r1", "column_run", "q0", "q1"]
PER_ELEMENT = 8  # elements of a row that share one counter


def place(key: Key | None, rows: int, columns: int, group: int) -> tuple[int, ...]:
    """The values of PLACE for a shard of [rows, columns] in groups of `group` columns: key, counter words, groups in a
    global row, and the runs of rows and of groups.
    """
    counted = columns // group
    if key is None:
        return (0, 0, 0, 0, 0, 1, rows, 0, 0, counted, 0, 0)
    if len(key.row_runs) > 2 or len(key.column_runs) > 2:
        raise ValueError(f"at most two runs of rows and columns, got {key.row_runs} and {key.column_runs}")
    width = key.columns // group if key.columns else counted
    r = (*key.row_runs, 0)[:2]
    c = (*(start // group for start in key.column_runs), 0)[:2]
    words = (as_int32(word) for word in (key.seed, key.layer, *run_words(key)))
    return (*words, width, rows // len(key.row_runs), *r, counted // len(key.column_runs), *c)


def as_int32(word: int) -> int:
    """The int32 of the same 32 bits, so that a kernel is compiled for one type."""
    word &= MASK
    return word - (1 << 32) if word >= 1 << 31 else word


@triton.jit
def positions(i, run, first, second):
    """Global positions of local ones: two runs of length `run` from `first` and `second`, or one run of everything."""
    return tl.where(i < run, first + i, second + i - run).to(tl.int64)


@triton.jit
def words(index, k0, k1, c1, c2, c3):
    """Four uint32 words for uint32 counters; everything else as the int32 of the same bits."""
    zero = tl.zeros_like(index)
    return a.philox(
        index, zero + c1.to(tl.uint32), zero + c2.to(tl.uint32), zero + c3.to(tl.uint32), zero + k0.to(tl.uint32),
        zero + k1.to(tl.uint32),
    )  # fmt: skip


@triton.jit
def element_noise(row, col, k0, k1, c1, c2, c3, width, row_run, r0, r1, column_run, q0, q1,
                  R: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """[R, N] int32 in [0, 2^16) of the tile at (row, col); one counter for eight elements of a row."""
    r = positions(row + tl.arange(0, R), row_run, r0, r1)
    c = positions(col // 8 + tl.arange(0, N // 8), column_run, q0, q1)
    w0, w1, w2, w3 = words((r[:, None] * width + c[None, :]).to(tl.uint32), k0, k1, c1, c2, c3)
    j0 = tl.join(w0 & 0xFFFF, w0 >> 16)
    j1 = tl.join(w1 & 0xFFFF, w1 >> 16)
    j2 = tl.join(w2 & 0xFFFF, w2 >> 16)
    j3 = tl.join(w3 & 0xFFFF, w3 >> 16)
    halves = tl.permute(tl.join(tl.join(j0, j2), tl.join(j1, j3)), (0, 1, 3, 4, 2))  # word, then half
    return tl.reshape(halves, (R, N)).to(tl.int32)


@triton.jit
def scale_noise(row, col, k0, k1, c1, c2, c3, width, row_run, r0, r1, column_run, q0, q1,
                R: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """[R, N] uint32 words, one of each block of the tile of blocks at (row, col); one counter for four blocks."""
    r = positions(row + tl.arange(0, R), row_run, r0, r1)
    c = positions(col + tl.arange(0, N), column_run, q0, q1)
    block = r[:, None] * width + c[None, :]
    w0, w1, w2, w3 = words((block // 4).to(tl.uint32), k0, k1, c1, c2, c3)
    which = (block % 4).to(tl.int32)
    return tl.where(which == 0, w0, tl.where(which == 1, w1, tl.where(which == 2, w2, w3)))
