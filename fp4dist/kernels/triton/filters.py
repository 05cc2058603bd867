# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# Triton's own language: its kernels' parameters have no types, a launch takes options beside the kernel's parameters.
"""How gradients pass quantizers with a trust mask, in one pass over each tensor: H^-1 (M * (H g)).

    mask               M as packed bits, from the quantizer's input and the scales that it chose
    filter_by_mask     the gradient under these bits
    filter_by_scales   the gradient under the M of a matrix that is still there, which is made again on the way
    original           the values of codes, turned back from their rotated basis

The bits are those of `fp4dist.numerics.estimators`.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4dist.kernels.triton import arithmetic as a
from fp4dist.kernels.triton import lanes
from fp4dist.kernels.triton.launch import Launch, integer, keep, launch
from fp4dist.kernels.triton.signs import flip, lasting_signs, sign_words
from fp4dist.numerics.scales import fp32
from fp4dist.numerics.tensor import BlockScaledTensor, Key
from fp4dist.spec.blocks import Ceil, Floor, Hadamard
from fp4dist.spec.estimators import TrustMask
from fp4dist.spec.formats import E2M1
from fp4dist.spec.recipe import QuantSpec

_ROWS, _COLUMNS, _WARPS = 32, 128, 4  # of a program
_WORDS = {16: torch.int16, 32: torch.int32}  # of packed bits, one for the columns that a thread holds


@triton.jit
def _load(x, stride, row, col, rows, cols, R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, EVEN: tl.constexpr):
    """[G, E] fp32 values of the tile [R, N] of a row-major matrix, G = R * N / E chunks of E columns; 0 outside."""
    P: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth  # elements of a thread's vector
    run, place = lanes.runs(R * N // E, E, P)
    r, c = run // (N // E), run % (N // E) * E + place
    start = x + (row.to(tl.int64) * stride + col)
    if EVEN:
        y = tl.load(start + (r * stride + c))
    else:
        y = tl.load(start + (r * stride + c), mask=(row + r < rows) & (col + c < cols), other=0.0)
    y = lanes.of_runs(y, R * N // E, E)
    if y.dtype == tl.bfloat16:  # by bits: the interpreter's cast loses subnormal numbers
        y = a.floats(y.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return y


@triton.jit
def _chunks(x, row, col, rows, cols, R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, BR: tl.constexpr,
            EVEN: tl.constexpr):  # fmt: skip
    """[G] what is stored once for every E columns of BR rows."""
    r = row // BR + tl.arange(0, R)[:, None] // BR
    c = col // E + tl.arange(0, N // E)[None, :]
    at = x + (r.to(tl.int64) * (cols // E) + c)
    if EVEN:
        found = tl.load(at)
    else:
        found = tl.load(at, mask=(r < rows // BR) & (c < cols // E), other=0)
    return tl.reshape(found, (R * N // E,))


@triton.jit
def _flipped(y, signs, R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, ROT: tl.constexpr):
    i = tl.arange(0, R * N // E)[:, None] % (N // E) * E + tl.arange(0, E)[None, :]
    return a.floats(a.bits(y) ^ flip(i, signs, ROT))


@triton.jit
def _rotated(y, signs, R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, ROT: tl.constexpr,
             SIGNED: tl.constexpr):  # fmt: skip
    """The unnormalized rotation of [G, E]."""
    if SIGNED:
        y = _flipped(y, signs, R, N, E, ROT)
    if ROT > 1:
        y = a.rotate(y, R * N // E, E, ROT)
    return y


@triton.jit
def _inside(y, stored, outer, before, after, largest, E8M0: tl.constexpr):
    """[G, E] bool: whether the quantizer of rotated values `y` did not clip; see `numerics.estimators.scaled`."""
    if E8M0:
        multiplier = tl.div_rn(1.0, a.decode_e8m0(stored.to(tl.int32))) * after
        y = y * before
    else:
        multiplier = tl.div_rn(1.0, a.decode_e4m3(stored.to(tl.int32)) * tl.load(outer))
    return tl.abs(y * a.below(multiplier, a.FLT_MAX)[:, None]) <= largest


@triton.jit
def mask_kernel(
    x, stride, scales, outer, signs, out, rows, cols, before, after, largest,
    R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, BR: tl.constexpr, ROT: tl.constexpr, SIGNED: tl.constexpr,
    E8M0: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """M of [rows, cols] x: a word of E bits for every E columns, the first in the lowest bit."""
    row, col = tl.program_id(0) * R, tl.program_id(1) * N
    y = _rotated(_load(x, stride, row, col, rows, cols, R, N, E, EVEN), signs, R, N, E, ROT, SIGNED)
    stored = _chunks(scales, row, col, rows, cols, R, N, E, BR, EVEN)
    passes = _inside(y, stored, outer, before, after, largest, E8M0)
    word = tl.sum(passes.to(tl.int32) << tl.arange(0, E)[None, :], axis=1)
    r = tl.arange(0, R)[:, None]
    c = col // E + tl.arange(0, N // E)[None, :]
    at = out + (row.to(tl.int64) * (cols // E) + r * (cols // E) + c)
    word = tl.reshape(word, (R, N // E)).to(out.dtype.element_ty)
    tl.store(at, word, mask=(row + r < rows) & (c < cols // E))


@triton.jit
def filter_kernel(
    g, stride, bits, x, x_stride, scales, outer, signs, out, rows, cols, before, after, largest, inverse,
    R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, BR: tl.constexpr, ROT: tl.constexpr, SIGNED: tl.constexpr,
    E8M0: tl.constexpr, KEPT: tl.constexpr, ADD: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Out = H^-1 (M * (H g)), M from words of E `bits` if KEPT, else from x and its scales. inverse: 1 / ROT.

    out   fp32 (to which the result is added if ADD), or words of two bf16
    """
    across = tl.cdiv(cols, N)
    row, col = tl.program_id(0) // across * R, tl.program_id(0) % across * N
    if KEPT:
        word = _chunks(bits, row, col, rows, cols, R, N, E, 1, EVEN).to(tl.int32)
        passes = ((word[:, None] >> tl.arange(0, E)[None, :]) & 1) != 0
    else:
        y = _rotated(_load(x, x_stride, row, col, rows, cols, R, N, E, EVEN), signs, R, N, E, ROT, SIGNED)
        stored = _chunks(scales, row, col, rows, cols, R, N, E, BR, EVEN)
        passes = _inside(y, stored, outer, before, after, largest, E8M0)
    y = _rotated(_load(g, stride, row, col, rows, cols, R, N, E, EVEN), signs, R, N, E, ROT, SIGNED)
    y = y * tl.where(passes, 1.0, 0.0)  # a product and not a choice: Inf and NaN that do not pass must still show
    if ROT > 1:
        y = a.rotate(y, R * N // E, E, ROT) * inverse
    if SIGNED:
        y = _flipped(y, signs, R, N, E, ROT)
    if ADD:
        y = _load(out, cols, row, col, rows, cols, R, N, E, EVEN) + y
    _store_in(y, out, row, col, rows, cols, R, N, E, EVEN, ASM)


@triton.jit
def _store_in(y, out, row, col, rows, cols, R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, EVEN: tl.constexpr,
              ASM: tl.constexpr):  # fmt: skip
    """[G, E] of the tile at (row, col) into a contiguous matrix of fp32, or of words of two bf16, rounded to even."""
    G: tl.constexpr = R * N // E
    if out.dtype.element_ty == tl.float32:
        _store(y, out, row, col, rows, cols, R, N, EVEN)
    elif ASM:
        low, high = tl.split(tl.reshape(y, (G, E // 2, 2)))
        words = tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [low, high], tl.int32, True, 1)
        _store(words, out, row, col // 2, rows, cols // 2, R, N // 2, EVEN)
    else:  # by bits: the interpreter's cast cuts off
        b = a.bits(y)
        b = tl.where(y != y, 0x7FC00000, b + 0x7FFF + ((b >> 16) & 1))
        _store(a.bf16_pairs(a.floats(b), G, E), out, row, col // 2, rows, cols // 2, R, N // 2, EVEN)


@triton.jit
def _store(y, out, row, col, rows, cols, R: tl.constexpr, N: tl.constexpr, EVEN: tl.constexpr):
    """R * N values of the tile at (row, col) into a contiguous matrix."""
    r = tl.arange(0, R)[:, None]
    c = col + tl.arange(0, N)[None, :]
    at = out + (row.to(tl.int64) * cols + r * cols + c)
    if EVEN:
        tl.store(at, tl.reshape(y, (R, N)))
    else:
        tl.store(at, tl.reshape(y, (R, N)), mask=(row + r < rows) & (c < cols))


@triton.jit
def original_kernel(
    codes, scales, outer, signs, out, rows, cols, nth,
    R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, BR: tl.constexpr, ROT: tl.constexpr, SIGNED: tl.constexpr,
    E8M0: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Values of E2M1 codes in words of eight, in the original basis. nth: 1 / ROT;  out as for `filter_kernel`."""
    row, col = tl.program_id(0) * R, tl.program_id(1) * N
    run, place = lanes.runs(R * N // E, E // 8, E // 8)
    r, w = run // (N // E), run % (N // E) * (E // 8) + place
    at = codes + (row.to(tl.int64) * (cols // 8) + col // 8 + r * (cols // 8) + w)
    if EVEN:
        words = tl.load(at)
    else:
        words = tl.load(at, mask=(row + r < rows) & (col + w * 8 < cols), other=0)
    stored = _chunks(scales, row, col, rows, cols, R, N, E, BR, EVEN).to(tl.int32)
    scale = a.decode_e8m0(stored) if E8M0 else a.decode_e4m3(stored)
    nibble = tl.reshape(words, (R * N // E, E // 8, 1)) << (28 - 4 * tl.arange(0, 8))[None, None, :]
    y = a.e2m1_signed(tl.reshape(nibble, (R * N // E, E)))
    y = y * scale[:, None] * tl.load(outer)
    y = a.rotate(y, R * N // E, E, ROT) * nth
    if SIGNED:
        y = _flipped(y, signs, R, N, E, ROT)
    _store_in(y, out, row, col, rows, cols, R, N, E, EVEN, ASM)


def why_not(spec: QuantSpec) -> str | None:
    """What of `spec` these kernels lack, or None."""
    rows, columns = spec.shape
    lacks = (
        (not isinstance(spec.estimator, TrustMask), f"estimator {spec.estimator.kind}"),
        (spec.outlier is not None or spec.split is not None, "operands in parts"),
        (spec.format.scale.name not in ("e4m3", "e8m0"), f"{spec.format.scale.name} scales"),
        ((rows, columns) not in ((1, 16), (1, 32), (16, 16), (32, 32)), f"blocks {[rows, columns]}"),
        (spec.above not in ("none", "tensor"), f"outer {spec.above}"),
    )
    return next((f"the Triton filters have no {what}" for missing, what in lacks if missing), None)


def mask(x: Tensor, stored: Tensor, global_scale: Tensor, spec: QuantSpec, key: Key | None) -> Tensor:
    """See `fp4dist.numerics.estimators.mask`."""
    x = _row_major(x)
    rows, cols = x.shape
    out = torch.empty((rows, cols // 8), dtype=torch.uint8, device=x.device)
    columns = _block_columns(x, stored)
    programs, constants = _tiles(x, spec.rotation, columns)
    mask_kernel[programs](
        x, x.stride(0), stored.contiguous(), global_scale, sign_words(spec.rotation, key, x.device),
        out.view(_WORDS[columns]), rows, cols, *_factors(spec), BR=_block_rows(x, stored),
        E8M0=spec.format.scale.name == "e8m0", **constants,
    )  # fmt: skip
    return out


def filter_by_mask(
    gradient: Tensor, kept: Tensor, rotation: Hadamard | None, key: Key | None, *, out: torch.dtype | None = None,
    into: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `fp4dist.numerics.estimators.filter_by_mask`.

    out    dtype of the result, fp32 or bf16, which is rounded once; None: the gradient's
    into   fp32 matrix without gaps that the result is added to, and which is returned
    """
    gradient = _row_major(gradient)
    result = torch.empty_like(gradient, dtype=out) if into is None else into
    kept = kept if kept.is_contiguous() else kept.contiguous()
    found = _ByMask.of(gradient, kept, result, rotation, into is not None)
    signs = sign_words(rotation, key, gradient.device) if found.signs is None else found.signs
    found.run(
        found.programs, gradient, found.stride, kept, gradient, 0, gradient, gradient, signs, result, *found.shape,
        1.0, 1.0, 1.0, found.inverse,
    )  # fmt: skip
    return result


class _ByMask(NamedTuple):
    """What is the same for all gradients of one size and layout that pass a mask.

    signs   of a rotation whose signs are always the same; None: fresh ones
    """

    run: Launch
    programs: int
    stride: int
    shape: tuple[int, int]
    inverse: float
    signs: Tensor | None

    @classmethod
    def of(cls, gradient: Tensor, kept: Tensor, out: Tensor, rotation: Hadamard | None, adds: bool) -> _ByMask:
        turned = None if rotation is None else (rotation.size, rotation.signs, rotation.mask)
        kinds = gradient.dtype, kept.dtype, out.dtype
        aligned = gradient.data_ptr() % 16, kept.data_ptr() % 16, out.data_ptr() % 16
        at = gradient.shape, gradient.stride(0), kinds, aligned, turned, adds, gradient.device
        found = _BY_MASK.get(at)
        if found is None:
            found = keep(_BY_MASK, at, cls._new(gradient, out, rotation, adds, (kinds, aligned)))
        return found

    @classmethod
    def _new(cls, gradient: Tensor, out: Tensor, rotation: Hadamard | None, adds: bool, memory: Hashable) -> _ByMask:
        stride, (rows, cols), device = gradient.stride(0), gradient.shape, gradient.device
        columns = 16 if cols % 32 else 32
        (across, down), constants = _tiles(gradient, rotation, columns)
        constants |= {"BR": 1, "E8M0": True, "KEPT": True, "ADD": adds, "ASM": _has_asm(device)}
        form = memory, *map(integer, (stride, rows, cols)), *constants.values(), device
        words, halves = (2,) * (columns == 32) + (8,) * (out.dtype != torch.float32), (2,) * (columns == 16)
        run = _RUNS.setdefault(form, Launch(filter_kernel, constants, words, halves))
        return cls(
            run, across * down, stride, (rows, cols), 1.0 / constants["ROT"], lasting_signs(rotation, device)
        )  # fmt: skip


_BY_MASK: dict[Hashable, _ByMask] = {}
_RUNS: dict[Hashable, Launch] = {}


def filter_by_scales(
    gradient: Tensor, x: Tensor, stored: Tensor, global_scale: Tensor, spec: QuantSpec, key: Key | None
) -> Tensor:
    """See `fp4dist.numerics.estimators.filter_by_scales`."""
    gradient, x, stored = _row_major(gradient), _row_major(x), stored.contiguous()
    out, device = torch.empty_like(gradient), gradient.device
    columns, rows, e8m0 = _block_columns(x, stored), _block_rows(x, stored), spec.format.scale.name == "e8m0"
    (across, down), constants = _tiles(gradient, spec.rotation, columns)
    constants |= {"BR": rows, "E8M0": e8m0, "KEPT": False, "ADD": False, "ASM": _has_asm(device)}
    signs, sizes = sign_words(spec.rotation, key, device), (gradient.stride(0), *gradient.shape, x.stride(0))
    given = gradient, stored, x, stored, global_scale, signs, _in_words(out)
    aligned = (t.data_ptr() % 16 == 0 for t in given)
    form = "filter", *aligned, *(t.dtype for t in given), *map(integer, sizes), *constants.values(), device
    arguments = (
        gradient, gradient.stride(0), stored, x, x.stride(0), *given[3:], *gradient.shape, *_factors(spec),
        1.0 / constants["ROT"],
    )  # fmt: skip
    launch(filter_kernel, across * down, arguments, constants, form)
    return out


def why_no_original(q: BlockScaledTensor) -> str | None:
    """Why `original` cannot decode `q`, or None."""
    lacks = (
        (q.rotation == 1, "codes without a rotation"),
        (q.format.element != E2M1, f"elements {q.format.element.name}"),
        (q.format.scale.name not in ("e4m3", "e8m0"), f"{q.format.scale.name} scales"),
        (q.block[1] not in _WORDS, f"blocks {list(q.block)}"),
        (q.global_scale.dim() > 0, "outer scales of rows or tiles"),
        (q.samples > 1, "several samples"),
    )
    return next((f"the Triton inverse rotation has no {what}" for missing, what in lacks if missing), None)


def original(
    q: BlockScaledTensor, rotation: Hadamard, key: Key | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[R, C] values of `q` in the original basis, in fp32 or rounded once to bf16; see `numerics.quantize.original`."""
    rows, cols = q.shape
    out = torch.empty((rows, cols), dtype=dtype, device=q.codes.device)
    programs, constants = _tiles(out, rotation, q.block[1])
    original_kernel[programs](
        q.codes.contiguous().view(torch.int32), q.scales.contiguous(), q.global_scale,
        sign_words(rotation, key, out.device), _in_words(out), rows, cols, 1.0 / rotation.size,
        BR=q.block[0], E8M0=q.format.scale.name == "e8m0", ASM=_has_asm(out.device), **constants,
    )  # fmt: skip
    return out


@cache
def _has_asm(device: torch.device) -> bool:
    """Whether kernels there may hold NVIDIA's instructions, of Ampere and newer: conversions in pairs."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _tiles(x: Tensor, rotation: Hadamard | None, columns: int) -> tuple[tuple[int, int], dict[str, Any]]:
    """(programs, constants) for a row-major [R, C] in chunks of `columns`, one of which a thread holds."""
    rows, cols = x.shape
    constants = {
        "R": _ROWS, "N": _COLUMNS, "E": columns, "ROT": rotation.size if rotation is not None else 1,
        "SIGNED": rotation is not None and rotation.signs != "none", "EVEN": not (rows % _ROWS or cols % _COLUMNS),
        "num_warps": _WARPS, "enable_fp_fusion": False,
    }  # fmt: skip
    return (-(-rows // _ROWS), -(-cols // _COLUMNS)), constants


def _block_columns(x: Tensor, stored: Tensor) -> int:
    """Columns that share one of `stored`."""
    return x.shape[1] // stored.shape[1]


def _block_rows(x: Tensor, stored: Tensor) -> int:
    """Rows that share one of `stored`: a part of gathered rows has scales of its own for each of them."""
    return max(x.shape[0], 1) // max(stored.shape[0], 1)


def _in_words(out: Tensor) -> Tensor:
    """fp32 as it is, bf16 as words of two."""
    return out if out.dtype == torch.float32 else out.view(torch.int32)


def _row_major(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _factors(spec: QuantSpec) -> tuple[float, float, float]:
    """(before, after, largest) of `_inside`: what x is multiplied with, what 1 / scale is, the end of the grid."""
    before = fp32(1.0 / spec.rule.headroom) if isinstance(spec.rule, Floor) else 1.0
    after = spec.format.element.max if isinstance(spec.rule, Ceil) and spec.rule.of == "amax" else 1.0
    return before, after, spec.format.element.max
