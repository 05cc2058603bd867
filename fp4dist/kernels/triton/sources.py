"""What the quantizers have in common: how they read matrices and codes, and how each side of a pair is wanted."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fp4dist.kernels.triton.launch import integer
from fp4dist.numerics.grouping import ReduceMax
from fp4dist.numerics.scales import fp32
from fp4dist.numerics.tensor import CODES, BlockScaledTensor, Key, Want
from fp4dist.spec.recipe import QuantSpec

_STRIP = 1024  # columns that a program looks through for the amax


class Source(NamedTuple):
    """What a kernel reads, in the output's orientation.

    READ   0: rows; 1: the transpose of rows; 2: codes of the transpose (see `programs`)
    tensor, stride   the memory, and elements (or words of two) from one of its rows to the next
    turn   (size, signs) of the rotation that codes are turned back from
    """

    read: int
    tensor: Tensor
    stride: int
    shape: tuple[int, int]
    codes: BlockScaledTensor | None = None
    turn: tuple[int, Tensor | None] = (1, None)

    @classmethod
    def of(cls, source: Tensor | BlockScaledTensor, turn: tuple[int, Tensor | None] = (1, None)) -> Source:
        """Of a matrix in any layout, a copy where neither rows nor columns are dense; or of the transpose of codes."""
        if not isinstance(source, Tensor):
            columns, rows = source.shape
            codes = source.codes if source.codes.stride(1) == 1 else source.codes.contiguous()
            return cls(2, codes, codes.stride(0), (rows, columns), source, turn)
        (rows, columns), (down, right) = source.shape, source.stride()
        if right == 1:
            return cls(0, source, down, (rows, columns))
        if down != 1:
            return cls.of(source.contiguous())
        if source.dtype == torch.bfloat16 and rows % 2 == right % 2 == source.data_ptr() % 4 == 0:
            return cls(1, source.t().view(torch.int32), right // 2, (rows, columns))
        return cls(1, source.t(), right, (rows, columns))

    @property
    def in_words(self) -> bool:
        """Whether kernels read a plain matrix as words of two bf16."""
        return self.codes is None and self.tensor.dtype == torch.int32

    def arguments(self) -> tuple[Any, ...]:
        """The kernels' first eight parameters."""
        q, (size, signs) = self.codes, self.turn
        scales, shared = (q.scales, q.global_scale) if q else (self.tensor, self.tensor)
        back = self.tensor if signs is None else signs
        return self.tensor, self.stride, scales, shared, back, fp32(size**-0.5), *self.shape

    def layout(self) -> tuple[Any, ...]:
        """All that decides which compiled kernel reads it: of its size only what tiles and Triton ask for."""
        q, t, (rows, cols) = self.codes, self.tensor, self.shape
        aligned = t.data_ptr() % 16 == 0 and (q is None or q.scales.data_ptr() % 16 == 0)
        block = None if q is None else (q.block, q.format.scale.name)
        uneven = (
            cols % width_of_strip(cols) != 0
        )  # 1024 and 2816 columns have strips of one width, which divides the first
        sizes = rows == 1, min(rows & -rows, 128), min(cols & -cols, 128), uneven, integer(self.stride)
        return self.read, t.dtype, sizes, aligned, block, self.turn[0], t.device

    def constants(self) -> dict[str, Any]:
        """How the memory is to be read."""
        q = self.codes
        block = q.block if q else (1, 16)
        words = self.tensor.dtype == torch.int32 or self.read == 2
        vector = 16 // self.tensor.element_size()
        return {
            "READ": self.read,
            "P": vector if self.read == 0 else 2 if words else 1,
            "QBR": block[0],
            "QBC": block[1],
            "QE8M0": bool(q) and q.format.scale.name == "e8m0",
            "BACK": self.turn[0],
        }


def width_of_strip(columns: int) -> int:
    """Of the strip that a program of `amax_kernel` looks through: one that divides, unless only narrow ones do."""
    width = min(columns & -columns, _STRIP)
    return width if width >= _STRIP // 2 else _STRIP


class Side(NamedTuple):
    """How one of the two operands of `quantize_pair` is quantized: the arguments of `quantize`."""

    spec: QuantSpec
    key: Key | None = None
    reduce_max: ReduceMax | None = None
    want: Want = CODES


_NUMBERS: dict[QuantSpec, int] = {}
_SEEN: dict[int, tuple[QuantSpec, int]] = {}


def number_of(spec: QuantSpec) -> int:
    """A number for each different spec; looked up by identity, because hashing a spec takes longer than a launch."""
    seen = _SEEN.get(id(spec))
    if seen is None:
        if len(_SEEN) > 4096:  # specs that are made anew at each call
            _SEEN.clear()
        seen = _SEEN[id(spec)] = spec, _NUMBERS.setdefault(spec, len(_NUMBERS))
    return seen[1]
