# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false, reportOptionalCall=false, reportAssignmentType=false
# pyright: reportGeneralTypeIssues=false
# Triton's own language: its kernels' parameters have no types, and a launch takes options beside them.
"""A B^T on tensor cores with the scales in the epilogue: bf16 and FP8 operands of any sizes.

FP8 tensor cores of Hopper add up in fewer bits than fp32 has. Products therefore go through partial sums over
`PROMOTED` elements of K, which are added in fp32; tools/measure_accumulation.py shows what error that leaves. K is not
split among programs and nothing is added atomically, so a result has the same bits in every run.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # before Triton 3.4: operands are read through pointers
    TensorDescriptor = None

FP8 = (torch.float8_e5m2, torch.float8_e4m3fn)
PROMOTED = 128  # elements of K in a partial sum of FP8 products; cuBLASLt's own interval, too
DESCRIBED = 16  # bytes that addresses and row lengths must be multiples of for a tensor descriptor


class Side(NamedTuple):
    """An operand [R, K] as values, times a factor in device memory, times factors of rows or of their parts."""

    values: Tensor
    scale: Tensor | None = None  # [] fp32; None: 1
    rows: Tensor | None = None  # [R, n] fp32: of n equal parts of each row; None: 1
    near: bool = False  # the factors of parts lie near each other: see `Carrier`


class Tiling(NamedTuple):
    """Sizes of a program's tile and of its loop; fixed for a class of shapes, since no bit may depend on a timing."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 8  # rows of tiles that are walked together


@triton.jit
def _operands(
    a, b, m, n, k, M, N, K, stride_a, stride_b,
    DESCRIPTORS: tl.constexpr, INTERPRETED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """[BM, BK] of A at (m, k) and [BN, BK] of B at (n, k), 0 outside."""
    if DESCRIPTORS:
        x, w = a.load([m, k]), b.load([n, k])
    else:
        r, c, inner = m + tl.arange(0, BM), n + tl.arange(0, BN), k + tl.arange(0, BK)
        inside = inner[None, :] < K
        at = r[:, None].to(tl.int64) * stride_a + inner[None, :]
        x = tl.load(a + at, mask=(r[:, None] < M) & inside, other=0.0)
        at = c[:, None].to(tl.int64) * stride_b + inner[None, :]
        w = tl.load(b + at, mask=(c[:, None] < N) & inside, other=0.0)
    if INTERPRETED and x.dtype == tl.bfloat16:
        x = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
        w = (w.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif INTERPRETED:
        x, w = _interpreted_fp8(x), _interpreted_fp8(w)
    return x, w


@triton.jit
def _interpreted_fp8(x):
    """FP8 as fp32, by its bits: the interpreter's cast has no subnormal numbers."""
    b = x.to(tl.int8, bitcast=True).to(tl.int32) & 0xFF
    shift: tl.constexpr = 21 if x.dtype == tl.float8e5 else 20
    factor: tl.constexpr = 2.0**112 if x.dtype == tl.float8e5 else 2.0**120
    value = ((b & 0x7F) << shift).to(tl.float32, bitcast=True) * factor
    beyond = (b & 0x7F) > 0x7B if x.dtype == tl.float8e5 else (b & 0x7F) == 0x7F  # no shipped quantizer gives Inf
    return tl.where(beyond, float("nan"), tl.where(b > 0x7F, -value, value))


@triton.jit
def _factors(rows_a, rows_b, r, c, block, M, N, ROWS_A: tl.constexpr, ROWS_B: tl.constexpr):
    """Factors of part `block` of rows r of A and c of B; something else where there are none."""
    of_a, of_b = r.to(tl.float32), c.to(tl.float32)
    if ROWS_A == 2:
        of_a = tl.load(rows_a + block * M + r, mask=r < M, other=0.0)
    if ROWS_B == 2:
        of_b = tl.load(rows_b + block * N + c, mask=c < N, other=0.0)
    return of_a, of_b


@triton.jit
def _added(total, part, of_a, of_b, ROWS_A: tl.constexpr, ROWS_B: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Total + part * its factors."""
    if (ROWS_A == 2) & (ROWS_B == 2):
        total = tl.fma(part, of_a[:, None] * of_b[None, :], total)
    elif ROWS_A == 2:
        total = tl.fma(part, tl.broadcast_to(of_a[:, None], (BM, BN)), total)
    elif ROWS_B == 2:
        total = tl.fma(part, tl.broadcast_to(of_b[None, :], (BM, BN)), total)
    else:
        total += part
    return total


@triton.jit
def _corner(tile, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """(row, column) of a tile's first element. GROUP rows of tiles are walked together, column by column, so that L2
    holds what they share.
    """
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = tile // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    return (first + tile % (GROUP * tiles_n) % height) * BM, tile % (GROUP * tiles_n) // height * BN


@triton.jit
def _finish(
    total, factor, rows_a, rows_b, place, r, c, M, N, ROWS_A: tl.constexpr, ROWS_B: tl.constexpr, ADD: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A tile of sums times `factor` and (ROWS 1) factors of whole rows, to `place`, or added to what is there."""
    total = total * factor
    if ROWS_A == 1:
        total = total * tl.load(rows_a + r, mask=r < M, other=0.0)[:, None]
    if ROWS_B == 1:
        total = total * tl.load(rows_b + c, mask=c < N, other=0.0)[None, :]
    kept = (r[:, None] < M) & (c[None, :] < N)
    if ADD:
        total = tl.load(place, mask=kept, other=0.0) + total
    if place.dtype.element_ty == tl.bfloat16 and INTERPRETED:
        word = total.to(tl.int32, bitcast=True)
        word = tl.where(total == total, word + 0x7FFF + ((word >> 16) & 1), word | 0x400000)
        tl.store(place, (word >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), mask=kept)
    else:
        tl.store(place, total.to(place.dtype.element_ty), mask=kept)


@triton.jit
def _gemm_kernel(
    a, b, out, scale_a, scale_b, inverse_rotation, rows_a, rows_b, M, N, K, stride_a, stride_b,
    HAS_A: tl.constexpr, HAS_B: tl.constexpr, ROWS_A: tl.constexpr, ROWS_B: tl.constexpr, ADD: tl.constexpr,
    DESCRIPTORS: tl.constexpr, STEPS: tl.constexpr, INTERPRETED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A B^T, tile by tile. `a` and `b` are descriptors of [M, K] and [N, K], or pointers to them.

    ROWS_A, _B    rows_a, rows_b hold factors: 1 of whole rows, 2 of parts of STEPS * BK elements, all rows' first parts
                  first; 0: there are none
    STEPS         loop steps in a partial sum; 0: one sum, the tensor cores' own, is enough
    INTERPRETED   go round the interpreter: its dot multiplies bf16's bits as integers, its cast to bf16 truncates
    """
    FLAT: tl.constexpr = STEPS == 0 and out.dtype.element_ty == tl.bfloat16  # an fp32 tile beside the stages: too much
    factor = tl.load(scale_a) if HAS_A else 1.0
    factor = (factor * tl.load(scale_b) if HAS_B else factor) * inverse_rotation
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BM) * tl.cdiv(N, BN), tl.num_programs(0), flatten=FLAT):
        m, n = _corner(tile, M, N, BM, BN, GROUP)
        r, c = m + tl.arange(0, BM), n + tl.arange(0, BN)
        total = tl.zeros((BM, BN), tl.float32)
        if STEPS == 0:
            for step in range(tl.cdiv(K, BK)):
                x, w = _operands(
                    a, b, m, n, step * BK, M, N, K, stride_a, stride_b, DESCRIPTORS, INTERPRETED, BM, BN, BK
                )  # fmt: skip
                total = tl.dot(x, w.T, total)
        else:
            for block in range(tl.cdiv(K, BK * STEPS)):
                of_a, of_b = _factors(rows_a, rows_b, r, c, block, M, N, ROWS_A, ROWS_B)
                part = tl.zeros((BM, BN), tl.float32)
                for step in range(STEPS):
                    x, w = _operands(
                        a, b, m, n, (block * STEPS + step) * BK, M, N, K, stride_a, stride_b, DESCRIPTORS, INTERPRETED,
                        BM, BN, BK,
                    )  # fmt: skip
                    part = tl.dot(x, w.T, part)
                total = _added(total, part, of_a, of_b, ROWS_A, ROWS_B, BM, BN)
        place = out + r[:, None].to(tl.int64) * N + c[None, :]
        _finish(total, factor, rows_a, rows_b, place, r, c, M, N, ROWS_A, ROWS_B, ADD, INTERPRETED)


def gemm(
    a_MK: Side,
    b_NK: Side,
    rotation: int = 1,
    *,
    out: torch.dtype = torch.float32,
    into: Tensor | None = None,
    promoted: int = PROMOTED,
) -> Tensor:
    """A B^T / rotation in `out` (fp32 or bf16), or added to `into` ([M, N] fp32, dense), with one rounding each.

    promoted   elements of K in a partial sum of FP8 products: 32, 64 or a multiple of 128; 0: no partial sums

    The values of A and B are both bf16 or both FP8 (e5m2, e4m3: any pair). Factors of parts of rows: see `takes`.
    """
    a, b = _dense_rows(a_MK.values), _dense_rows(b_NK.values)
    (m, k), n = a.shape, b.shape[0]
    result = into if into is not None else torch.empty((m, n), dtype=out, device=a.device)
    if not (m and n):
        return result
    parts, described = (_parts(a_MK), _parts(b_NK)), _can_be_described(a) and _can_be_described(b)
    tiling = tiling_of(a.dtype, m, n, a.device, described, max(parts) > 1)
    summed = promoted if a.dtype in FP8 else 0  # elements in a partial sum
    if max(parts) > 1:
        summed = k // max(parts)
    if summed:
        tiling = tiling._replace(k=min(tiling.k, summed))
    tiles = triton.cdiv(m, tiling.m) * triton.cdiv(n, tiling.n)
    # where a tile's end is long, the next program's start hides it better than this one's
    _gemm_kernel[tiles if max(parts) > 1 else min(tiles, _programs(a.device)),](
        _operand(a, tiling.m, tiling.k, described), _operand(b, tiling.n, tiling.k, described), result,
        a_MK.scale, b_NK.scale, 1.0 / rotation, _by_part(a_MK.rows), _by_part(b_NK.rows), m, n, k,
        a.stride(0), b.stride(0),
        HAS_A=a_MK.scale is not None, HAS_B=b_NK.scale is not None, ROWS_A=min(parts[0], 2), ROWS_B=min(parts[1], 2),
        ADD=into is not None, DESCRIPTORS=described, STEPS=summed // tiling.k, INTERPRETED=not a.is_cuda,
        BM=tiling.m, BN=tiling.n, BK=tiling.k, GROUP=tiling.group,
        num_warps=tiling.warps, num_stages=tiling.stages, enable_fp_fusion=False,
    )  # fmt: skip
    return result


def takes(a_MK: Side, b_NK: Side) -> bool:
    """Whether `gemm` can apply the operands' factors: those of parts of rows are of 32, 64 or k * 128 elements, and
    both operands have equal parts if both have any.
    """
    parts, k = (_parts(a_MK), _parts(b_NK)), a_MK.values.shape[1]
    if max(parts) <= 1:
        return True
    width = k // max(parts)
    return (min(parts) <= 1 or parts[0] == parts[1]) and (width in (32, 64) or (width % 128 == 0 and width > 0))


def _by_part(rows: Tensor | None) -> Tensor | None:
    """[R, n] factors part by part, so that a program reads neighbours."""
    return rows if rows is None or rows.shape[1] == 1 else rows.t().contiguous()


def _parts(side: Side) -> int:
    return 0 if side.rows is None else side.rows.shape[1]


def tiling_of(dtype: torch.dtype, m: int, n: int, device: torch.device, described: bool, of_parts: bool) -> Tiling:
    """The tiling for a type of operands and a size of the result, from measurements on an H100.

    of_parts   rows' parts have factors: a second accumulator is scaled and added all the time
    """
    if device.type != "cuda":
        return Tiling(64, 64, 64, 4, 1)  # the interpreter's: little memory, few programs
    if _capability(device)[0] < 9:
        return Tiling(128, 128, 64, 8, 3) if dtype in FP8 else Tiling(128, 128, 32, 8, 3)
    k = 128 if dtype in FP8 or of_parts else 64
    if not described or of_parts or min(m, n) <= 1024:
        return Tiling(128, 128, k, 8, 3)
    return Tiling(128, 256, k, 8, 3)


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _can_be_described(x: Tensor) -> bool:
    """Whether a tensor descriptor (TMA) can read the matrix: Hopper and newer, aligned rows."""
    if TensorDescriptor is None or not x.is_cuda or _capability(x.device)[0] < 9 or x.numel() == 0:
        return False
    step = x.stride(0) * x.element_size()
    return x.data_ptr() % DESCRIBED == 0 and step % DESCRIBED == 0 and step > 0


def _operand(x: Tensor, rows: int, columns: int, described: bool) -> object:
    return TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [rows, columns]) if described else x


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _programs(device: torch.device) -> int:
    """How many programs run at a time where one fills a multiprocessor; each goes over many tiles."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
