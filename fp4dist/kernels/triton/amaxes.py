# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# Triton's own language: its kernels' parameters have no types, branches on constants look like run-time ones.
"""The amax of a matrix before and after a rotation, from one reading: of x as it is, and of x^T as wgrad rotates it."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import triton
import triton.language as tl

from fp4dist.kernels.triton import arithmetic as a
from fp4dist.kernels.triton import chunks as c
from fp4dist.kernels.triton.launch import Launch, integer

_ROWS, _COLUMNS, _CHUNK, _WARPS = 64, 128, 32, 4  # of a program; columns of a thread


@triton.jit
def largest_both_kernel(
    x, stride, signs, plain, rotated, rows, cols, R: tl.constexpr, N: tl.constexpr, E: tl.constexpr,
    ROT: tl.constexpr, SIGNED: tl.constexpr, S: tl.constexpr, EVEN: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """Largest magnitude bits of [rows, cols] x into `plain`, and after the rotation into `rotated`; both start at 0.

    x as READ 1 of `chunks` has it; programs that run together read whole lines of the memory: they go down the rows.
    LINE: see `chunks._word_chunks`. Atomics are relaxed: only later launches read what they make.
    """
    G: tl.constexpr = R // S * N // E
    down = tl.cdiv(rows, R)
    row, col = tl.program_id(0) % down * R, tl.program_id(0) // down * N
    word, scale, flips = c.words_of(
        x, stride, x, signs, row, col, rows, cols, R, N, E, ROT, SIGNED, 1, S, 1, 16, False, EVEN, LINE
    )
    before, after = tl.zeros((G,), tl.int32), tl.zeros((G,), tl.int32)
    for s in range(S):
        y = c.rows_of(x, stride, x, word, scale, flips, s, row, col, rows, cols, R, N, E, 1, SIGNED, 1, S, False, EVEN)
        before = tl.maximum(before, a.magnitude_bits(a.largest(y, G, E)))
        after = tl.maximum(after, a.magnitude_bits(a.largest(a.rotate(y, G, E, ROT), G, E)))
    tl.atomic_max(plain, tl.max(before, axis=0), sem="relaxed")
    tl.atomic_max(rotated, tl.max(after, axis=0), sem="relaxed")


class LargestBoth(NamedTuple):
    """The launch of `largest_both_kernel` for matrices of one size and layout."""

    programs: int
    run: Launch

    @classmethod
    def of(
        cls, shape: tuple[int, int], stride: int, words: bool, layout: Hashable, rotation: int, signed: bool
    ) -> LargestBoth:
        """For x [rows, cols] = `shape` whose rows are contiguous in memory, in words of two bf16 or as it is.

        stride   words from one column to the next;  layout   what, of that memory, a compiled kernel depends on
        rotation   columns that are rotated together
        """
        (rows, cols), even = shape, shape[0] % _ROWS == 0 and shape[1] % _COLUMNS == 0
        constants = {
            "R": _ROWS, "N": _COLUMNS, "E": _CHUNK, "ROT": rotation, "SIGNED": signed, "S": 2 if words else 1,
            "EVEN": even, "LINE": stride if even else 0, "num_warps": _WARPS, "enable_fp_fusion": False,
        }  # fmt: skip
        form = layout, rotation, signed, even, constants["LINE"], integer(rows), integer(cols)
        run = _LAUNCHES.setdefault(form, Launch(largest_both_kernel, constants, (0,) if words else ()))
        return cls(-(-rows // _ROWS) * -(-cols // _COLUMNS), run)


_LAUNCHES: dict[Hashable, Launch] = {}
