# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportPossiblyUnboundVariable=false
# Triton's own language: its kernels' parameters have no types, a launch takes options beside the kernel's parameters.
"""Chosen channels taken out of a matrix, and what they have in MXFP8 or as a rounding error, from one reading of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4dist.kernels.triton import arithmetic as a
from fp4dist.kernels.triton import originals, terms
from fp4dist.kernels.triton.launch import start
from fp4dist.numerics import splits
from fp4dist.numerics.splits import Parts, Place
from fp4dist.numerics.tensor import BlockScaledTensor
from fp4dist.spec.formats import E2M1
from fp4dist.spec.recipe import QuantSpec
from fp4dist.spec.splits import Channels, HotResidual, Precision

BLOCK = 32  # elements of a row under one scale of MXFP8
_DTYPES = (torch.bfloat16, torch.float32)


class _Tile(NamedTuple):
    """Of a program."""

    rows: int
    columns: int

    def programs(self, rows: int, columns: int) -> int:
        """How many cover a matrix."""
        return -(-rows // self.rows) * -(-columns // self.columns)


_OF_ROWS, _OF_COLUMNS = _Tile(16, 256), _Tile(64, 64)  # by the order of the matrix in memory


@triton.jit
def in_mxfp8(y, R: tl.constexpr, N: tl.constexpr):
    """[R, N] fp32 -> the nearest values of E4M3 under E8M0 scales, rounded up, of 32 elements of a row.

    p is the larger of |u|'s and the smallest normal number's power of two: adding 3 * 2^19 p rounds to the grid's step
    of p / 8, ties to even. Nothing is above 448, by the choice of the scale.
    """
    top = tl.max(tl.reshape(a.magnitude_bits(y), (R, N // 32, 32)), axis=2)
    scale = a.decode_e8m0(a.power_byte(a.floats(top), 2, 0.0, 8, 0x600000))
    inverse = tl.div_rn(tl.full((R, N // 32), 1.0, tl.float32), scale)
    scale = tl.reshape(tl.broadcast_to(scale[:, :, None], (R, N // 32, 32)), (R, N))
    inverse = tl.reshape(tl.broadcast_to(inverse[:, :, None], (R, N // 32, 32)), (R, N))
    u = tl.abs(y * inverse)
    p = a.floats(tl.maximum(a.bits(u), 0x3C800000) & 0x7F800000)
    level = tl.fma(p, -1572864.0, tl.fma(p, 1572864.0, u))
    return a.with_sign(level * scale, a.bits(y) < 0)


@triton.jit
def take_kernel(
    x, chosen, rest, side, rows, cols, down, right,
    MASKED: tl.constexpr, MX: tl.constexpr, REST: tl.constexpr, BF16: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Of x [rows, cols], the bits of bf16 in int16 or fp32: rest, zero where `chosen`, and side, zero elsewhere.

    MASKED   1: chosen [cols]; 2: chosen [rows]; 0: all are;  MX   the side in MXFP8, whose values x's type holds
    """
    across = tl.cdiv(cols, N)
    row = tl.program_id(0) // across * R + tl.arange(0, R)
    col = tl.program_id(0) % across * N + tl.arange(0, N)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    at = row[:, None].to(tl.int64) * down + col[None, :].to(tl.int64) * right
    found = tl.load(x + at, mask=inside, other=0)
    if MASKED == 1:
        taken = (tl.load(chosen + col, mask=col < cols, other=0) != 0)[None, :] & inside
    elif MASKED == 2:
        taken = (tl.load(chosen + row, mask=row < rows, other=0) != 0)[:, None] & inside
    else:
        taken = inside
    out = row[:, None].to(tl.int64) * cols + col[None, :]
    zero = tl.zeros((R, N), found.dtype)
    if REST:
        tl.store(rest + out, tl.where(taken, zero, found), mask=inside)
    kept = tl.where(taken, found, zero)
    if MX:
        if BF16:
            value = in_mxfp8(a.floats(kept.to(tl.int32) << 16), R, N)
            kept = (terms.bf16_word(value) >> 16).to(tl.int16)
        else:
            kept = in_mxfp8(kept, R, N)
    tl.store(side + out, kept, mask=inside)


@triton.jit
def residual_kernel(
    x, down, codes, scales, factor, chosen, side, rows, cols,
    BR: tl.constexpr, BC: tl.constexpr, E8M0: tl.constexpr, BF16: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """What x [rows, cols] (as in `take_kernel`) has more than its E2M1 codes, in chosen columns; elsewhere zero."""
    across = tl.cdiv(cols, N)
    row = tl.program_id(0) // across * R + tl.arange(0, R)
    col = tl.program_id(0) % across * N + tl.arange(0, N)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    taken = (tl.load(chosen + col, mask=col < cols, other=0) != 0)[None, :] & inside
    r, c = row[:, None].to(tl.int64), col[None, :]
    found = tl.load(x + r * down + c, mask=inside, other=0)  # all: in words
    nibble = tl.load(codes + r * (cols // 2) + c // 2, mask=taken, other=0).to(tl.int32) >> ((c & 1) * 4)
    byte = tl.load(scales + r // BR * (cols // BC) + c // BC, mask=taken, other=0).to(tl.int32)
    scale = a.decode_e8m0(byte) if E8M0 else a.decode_e4m3(byte)
    value = a.e2m1_signed(nibble << 28) * scale * tl.load(factor)
    out = r * cols + c
    if BF16:
        error = a.floats(found.to(tl.int32) << 16) - value
        tl.store(side + out, tl.where(taken, terms.bf16_word(error) >> 16, 0).to(tl.int16), mask=inside)
    else:
        tl.store(side + out, tl.where(taken, found - value, 0.0), mask=inside)


def why_not(spec: QuantSpec | None) -> str | None:
    """Why nothing here takes channels out of operands of `spec`, or None."""
    if spec is None or spec.split is not None or not isinstance(spec.outlier, Channels | HotResidual):
        return "only chosen channels are taken out here"
    if isinstance(spec.outlier, Channels) and spec.outlier.precision == "e4m3":
        return "only parts in bf16 and in MXFP8"
    return None


def decompose(x: Tensor, spec: QuantSpec, place: Place) -> Parts:
    """See `fp4dist.numerics.splits.decompose`."""
    if spec.split is not None or not isinstance(spec.outlier, Channels):
        return splits.decompose(x, spec, place)
    return take_channels(x, spec.outlier.precision, place)


def take_channels(x: Tensor, precision: Precision, place: Place) -> Parts:
    """See `fp4dist.numerics.splits.take_channels`."""
    if place.channels is None:
        return Parts(x, None)
    if not _takes(x, precision):
        return splits.take_channels(x, precision, place)
    return _taken(x, place.channels, 2 - place.channel_dim, precision)


def in_precision(part: Tensor, precision: Precision, dtype: torch.dtype, place: Place) -> Tensor:
    """See `fp4dist.numerics.splits.in_precision`."""
    if precision != "mxfp8" or not _takes(part, precision):
        return splits.in_precision(part, precision, dtype, place)
    side = _taken(part, None, 0, precision).side
    assert side is not None
    return side


def hot_residual(rest: Tensor, main: BlockScaledTensor, spec: QuantSpec, dtype: torch.dtype, place: Place) -> Tensor:
    """See `fp4dist.numerics.splits.hot_residual`."""
    known = main.format.element == E2M1 and main.format.scale.name in ("e4m3", "e8m0") and main.global_scale.dim() == 0
    dense = rest.stride(1) == 1 and place.channel_dim == 1 and rest.dtype == dtype and dtype in _DTYPES
    if not known or not dense or spec.rotation is not None or main.samples != 1 or place.channels is None:
        assert place.chosen is not None
        error = rest - originals.original(main, spec.rotation, place.key)
        return torch.where(place.chosen, error.to(dtype), 0.0)
    (rows, cols), bf16 = rest.shape, dtype == torch.bfloat16
    side, tile = torch.empty((rows, cols), dtype=dtype, device=rest.device), _OF_ROWS
    arguments = (
        _bits(rest), rest.stride(0), main.codes.contiguous(), main.scales.contiguous(), main.global_scale,
        place.channels.contiguous().view(torch.uint8), _bits(side), rows, cols,
    )  # fmt: skip
    constants = {
        "BR": main.block[0], "BC": main.block[1], "E8M0": main.format.scale.name == "e8m0", "BF16": bf16,
        "R": tile.rows, "N": tile.columns, "num_warps": 4, "enable_fp_fusion": False,
    }  # fmt: skip
    start(residual_kernel, tile.programs(rows, cols), arguments, constants)
    return side


def _takes(x: Tensor, precision: Precision) -> bool:
    whole = precision == "bf16" or (precision == "mxfp8" and x.shape[1] % BLOCK == 0)
    return whole and x.dtype in _DTYPES and x.numel() > 0


def _taken(x: Tensor, channels: Tensor | None, masked: int, precision: Precision) -> Parts:
    """Rest and side of `take_kernel`, dense; no rest where no channels are named."""
    x = x if 1 in x.stride() else x.contiguous()
    (rows, cols), tile = x.shape, _OF_ROWS if x.stride(1) == 1 else _OF_COLUMNS
    side = torch.empty((rows, cols), dtype=x.dtype, device=x.device)
    rest = side if channels is None else torch.empty_like(side)
    mask = _bits(side) if channels is None else channels.contiguous().view(torch.uint8)
    constants = {
        "MASKED": masked, "MX": precision == "mxfp8", "REST": channels is not None,
        "BF16": x.dtype == torch.bfloat16, "R": tile.rows, "N": tile.columns, "num_warps": 4,
        "enable_fp_fusion": False,
    }  # fmt: skip
    arguments = _bits(x), mask, _bits(rest), _bits(side), rows, cols, *x.stride()
    start(take_kernel, tile.programs(rows, cols), arguments, constants)
    return Parts(rest, side)


def _bits(x: Tensor) -> Tensor:
    """bf16 as int16, which Triton's interpreter reads."""
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x
