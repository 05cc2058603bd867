# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
# Triton's own language: its kernels' parameters have no types, a launch takes options beside the kernel's parameters.
"""Grids of eight levels under fp32 scales of rows or of the tensor: FP8 carriers straight from the quantizer.

The scale stays outside of the carrier, so that its values are the levels themselves. Two samples under stochastic
rounding are neighbouring levels: their sum is one carrier, and their mean one GEMM instead of two.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4dist.kernels.triton import arithmetic as a
from fp4dist.kernels.triton import programs as p
from fp4dist.kernels.triton.noise import PLACE, place
from fp4dist.kernels.triton.quantize import _Source
from fp4dist.kernels.triton.signs import sign_words
from fp4dist.numerics.scales import BlockScales
from fp4dist.numerics.tensor import BlockScaledTensor, Carrier, Key, Want
from fp4dist.spec.blocks import Ema, Floor, Stochastic
from fp4dist.spec.formats import ElementFormat
from fp4dist.spec.recipe import QuantSpec

_FP8 = (torch.float8_e5m2, torch.float8_e4m3fn)
_ROWS, _COLUMNS, _CHUNK, _WARPS = 32, 128, 16, 4  # of a program; columns of a thread
_TURNED_ROWS = 64  # of a program that reads codes of the transpose


@triton.jit
def _nearest(u, table, LAST: tl.constexpr, KIND: tl.constexpr):
    """|u| -> int32 index."""
    if KIND == 1:
        index = a.bits(u + 12582912.0) & 7  # 1.5 * 2^23: the sum is rounded to an integer, ties to even
    else:
        index = tl.zeros_like(a.bits(u))
        for i in tl.static_range(7):
            index += (u > tl.load(table + i)).to(tl.int32)
    return tl.where(u == u, index, LAST)


@triton.jit
def _stochastic(u, threshold, table, LAST: tl.constexpr, KIND: tl.constexpr):
    """|u| and noise as `programs._thresholds` gives it -> int32 index."""
    if KIND == 1:
        index = u.to(tl.int32)
        distance = u - index.to(tl.float32)
    elif KIND == 2:
        level = tl.where(u < 1.0, 0.0, a.floats(a.bits(u) & 0x7F800000))
        index = tl.maximum((a.bits(u) >> 23) - 126, 0)
        distance = (u - level) * a.floats((254 << 23) - tl.maximum(a.bits(level), 0x3F800000))
    else:
        index, level = tl.zeros_like(a.bits(u)), tl.load(table + 16) + tl.zeros_like(u)
        inverse = tl.load(table + 24) + tl.zeros_like(u)
        for i in tl.static_range(1, 8):
            over = u >= tl.load(table + 16 + i)
            index += over.to(tl.int32)
            level = tl.where(over, tl.load(table + 16 + i), level)
            inverse = tl.where(over, tl.load(table + 24 + i), inverse)
        distance = (u - level) * inverse
    index += (distance > (threshold >> 5).to(tl.float32) * 7.62939453125e-06).to(tl.int32)
    return tl.where(u == u, index, LAST)


@triton.jit
def _byte(index, words):
    """Byte `index` (0 to 7) of the two int32 that `words` points to."""
    four = tl.where(index < 4, tl.load(words), tl.load(words + 1))
    return (four >> ((index & 3) << 3)) & 0xFF


@triton.jit
def _store_bytes(byte, values, row, col, rows, cols, R: tl.constexpr, N: tl.constexpr, E: tl.constexpr,
                 EVEN: tl.constexpr):  # fmt: skip
    """[G, E] int32 bytes -> values [rows, cols / 4] words of four."""
    words = tl.reshape(a.words_of_bytes(byte, R * N // E, E), (R, N // 4))
    r = tl.arange(0, R)[:, None]
    at = col // 4 + tl.arange(0, N // 4)[None, :]
    to = values + (row.to(tl.int64) * (cols // 4) + r * (cols // 4) + at)
    if EVEN:
        tl.store(to, words)
    else:
        tl.store(to, words, mask=(row + r < rows) & (at < cols // 4))


@triton.jit(do_not_specialize=[*PLACE, "c3_next"])
def level_kernel(
    x, stride, signs, given, given_stride, table, bytes, codes, values, rows, cols,
    k0, k1, when, c3, width, row_run, r0, r1, column_run, q0, q1, c3_next,
    R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, ROT: tl.constexpr, SIGNED: tl.constexpr, READ: tl.constexpr,
    P: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr, NOISY: tl.constexpr, SAMPLES: tl.constexpr,
    LAST: tl.constexpr, KIND: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """FP8 values (words of four), and codes (words of eight) if CODES, of the tile [R, N] of programs.

    given     [rows] or [] fp32 multipliers;  table   as in `grid_programs`;  c3_next   the second sample's counter word
    bytes     [4] int32: the FP8 bytes of the eight levels, or of the sums of two neighbours, where an even number 2 i
              is twice level i
    KIND      of the levels: 1 integers; 2 powers of two from 1 on; 0 others
    """
    G: tl.constexpr = R * N // E
    row, col = tl.program_id(0) * R, tl.program_id(1) * N
    y = p._tile(
        x, stride, x, x, signs, row, col, rows, cols, R, N, E, ROT, SIGNED, READ, P, W, EVEN, 1, E, False
    )  # fmt: skip
    r = row + tl.arange(0, R)
    multiplier = tl.load(given + r * given_stride, mask=r < rows, other=0.0)
    multiplier = tl.reshape(tl.broadcast_to(multiplier[:, None], (R, N // E)), (G,))
    u = a.below(tl.abs(y * multiplier[:, None]), tl.load(table + 16 + LAST))
    if NOISY:
        noise = p._thresholds(y, row, col, k0, k1, when, c3, width, row_run, r0, r1, column_run, q0, q1, R, N, E)
        index = _stochastic(u, noise, table, LAST, KIND)
    else:
        index = _nearest(u, table, LAST, KIND)
    if SAMPLES == 2:
        noise = p._thresholds(
            y, row, col, k0, k1, when, c3_next, width, row_run, r0, r1, column_run, q0, q1, R, N, E
        )  # fmt: skip
        sums = index + _stochastic(u, noise, table, LAST, KIND)
        byte = tl.where(sums < 8, _byte(sums & 7, bytes), _byte(sums & 7, bytes + 2))
    else:
        byte = _byte(index, bytes)
    signed = tl.where(u == u, y, 0.0)  # a NaN has no sign
    if CODES:
        p._store_codes(a.pack(index << 28, signed, G, E), codes, row, col, rows, cols, R, N, EVEN)
    byte = byte | ((a.bits(signed) >> 24) & 128)
    _store_bytes(byte, values, row, col, rows, cols, R, N, E, EVEN)


@triton.jit
def turned_kernel(
    codes, stride, table, values, rows, cols,
    R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """FP8 values [rows, cols / 4] (words of four) of the transpose of codes [cols, rows / 2].

    table   [2] int32: the FP8 bytes of the grid's eight levels
    """
    row, col = tl.program_id(0) * R, tl.program_id(1) * N
    both = p._turned(codes, stride, row, col, rows, cols, R, N, E, 2, W, EVEN).to(tl.int32)
    code = tl.reshape(tl.permute(tl.join(both & 15, both >> 4), (0, 1, 4, 2, 3)), (R * N // E, E))
    byte = _byte(code & 7, table) | ((code & 8) << 4)
    _store_bytes(byte, values, row, col, rows, cols, R, N, E, EVEN)


@lru_cache(maxsize=64)
def holds(element: ElementFormat, dtype: torch.dtype, samples: int) -> bool:
    """Whether `dtype` has every level, or every sum of two neighbours of which each sample is one."""
    if dtype not in _FP8 or samples > 2 or element.mantissa is not None or len(element.levels) > 8:
        return False
    levels = torch.tensor(element.levels, dtype=torch.float64)
    sums = levels if samples == 1 else torch.cat((2 * levels, levels[1:] + levels[:-1]))
    return torch.equal(sums.to(dtype).double(), sums)


def takes(spec: QuantSpec, want: Want, columns: int, toward: Tensor | None) -> bool:
    """Whether `quantize` is made for `spec` and a matrix of so many columns."""
    if want.carrier is None or want.mask or 0 not in spec.shape or spec.format.scale.name != "fp32":
        return False
    element, rotation = spec.format.element, spec.rotation.size if spec.rotation is not None else 1
    plain = element.bits == 4 and spec.above == "none" and toward is None and columns % 8 == 0
    neighbours = spec.samples == 1 or (isinstance(spec.rounding, Stochastic) and not want.codes)
    ties = isinstance(spec.rounding, Stochastic) or getattr(spec.rounding, "ties", "even") != "up"
    known = plain and neighbours and ties and not isinstance(spec.rounding, Ema) and not isinstance(spec.rule, Floor)
    return known and columns % rotation == 0 and rotation <= _COLUMNS and holds(element, want.carrier, spec.samples)


def quantize(
    x: Tensor, spec: QuantSpec, key: Key | None, want: Want, chosen: BlockScales, table: Tensor
) -> tuple[Tensor | None, Carrier]:
    """([R, C/2] codes if wanted, carrier) of x [R, C] under chosen scales of rows or of the tensor.

    table   of `grids` for the element
    """
    assert want.carrier is not None
    src, (rows, cols), device = _Source.of(x), x.shape, x.device
    codes = torch.empty((rows, cols // 8), dtype=torch.int32, device=device) if want.codes else None
    values = torch.empty((rows, cols // 4), dtype=torch.int32, device=device)
    rotation, noisy = spec.rotation.size if spec.rotation is not None else 1, isinstance(spec.rounding, Stochastic)
    drawn = key if noisy else None
    where = place(drawn, rows, cols, 8, device)
    after = place(drawn.sample(1), rows, cols, 8, device)[3] if drawn is not None and spec.samples == 2 else where[3]
    read = src.constants()
    level_kernel[-(-rows // _ROWS), -(-cols // _COLUMNS)](
        src.tensor, src.stride, sign_words(spec.rotation, key, device), chosen.multiplier,
        0 if chosen.multiplier.numel() == 1 else 1, table,
        _bytes(spec.format.element, want.carrier, spec.samples, device), values if codes is None else codes, values,
        rows, cols, *where, after, R=_ROWS, N=_COLUMNS, E=_CHUNK, ROT=rotation,
        SIGNED=spec.rotation is not None and spec.rotation.signs != "none", READ=read["READ"], P=read["P"],
        W=32 * _CHUNK // _COLUMNS, EVEN=rows % _ROWS == 0 and cols % _COLUMNS == 0, NOISY=noisy,
        SAMPLES=spec.samples, LAST=len(spec.format.element.levels) - 1,
        KIND=_kind(spec.format.element), CODES=want.codes, num_warps=_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    scale, of_rows = chosen.global_scale, None
    if chosen.stored.numel() == 1:
        scale = chosen.stored.reshape(()) * scale
    else:
        of_rows = chosen.stored
    scale = scale if spec.samples == 1 else scale * (1.0 / spec.samples)  # of two: a power of two
    carrier = Carrier(values.view(want.carrier), scale, rotation, of_rows)
    return codes.view(torch.uint8) if codes is not None else None, carrier


def turns(q: BlockScaledTensor, dtype: torch.dtype) -> bool:
    """Whether `turned` reads the codes `q` transposed."""
    one = q.scales.numel() == 1 and q.global_scale.dim() == 0 and q.rotation == q.samples == 1
    known = q.format.scale.name == "fp32" and q.format.element.bits == 4 and q.codes.stride(1) == 1
    return one and known and q.shape[0] % 4 == 0 and holds(q.format.element, dtype, 1)


def turned(q: BlockScaledTensor, dtype: torch.dtype) -> Carrier:
    """The carrier [C, R] of the transpose of codes `q` [R, C] under one scale."""
    (cols, rows), device = q.shape, q.codes.device
    values = torch.empty((rows, cols // 4), dtype=torch.int32, device=device)
    turned_kernel[-(-rows // _TURNED_ROWS), -(-cols // _COLUMNS)](
        q.codes, q.codes.stride(0), _bytes(q.format.element, dtype, 1, device), values, rows, cols, R=_TURNED_ROWS,
        N=_COLUMNS, E=_CHUNK, W=32 * _CHUNK // _COLUMNS, EVEN=rows % _TURNED_ROWS == 0 and cols % _COLUMNS == 0,
        num_warps=_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return Carrier(values.view(dtype), q.scales.reshape(()) * q.global_scale)


@lru_cache(maxsize=64)
def _bytes(element: ElementFormat, dtype: torch.dtype, samples: int, device: torch.device) -> Tensor:
    """[4] int32 of the kernels: FP8 bytes by index, or by the sum of two samples' indices."""
    levels = torch.tensor(element.levels)
    if samples == 2:
        levels = torch.stack((2 * levels, levels + torch.cat((levels[1:], levels[-1:])))).t().flatten()
    found = torch.zeros(16, dtype=torch.uint8)
    found[: len(levels)] = levels.to(dtype).view(torch.uint8)
    return found.view(torch.int32).to(device)


def _kind(element: ElementFormat) -> int:
    """KIND of `level_kernel`."""
    levels = element.levels
    if levels == tuple(float(i) for i in range(len(levels))):
        return 1
    return 2 if levels[1:] == tuple(2.0**i for i in range(len(levels) - 1)) else 0
