# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# Triton's own language: its kernels' parameters have no types, and a launch takes options beside them.
"""A B^T of bf16 operands whose rows have a factor for every 128 columns, or a multiple, in a single accumulator.

The sum over segments s of f[s] P[s], f = a's factor times b's, is kept as T = (sum so far) / f[s]: before segment s is
added T is multiplied by f[s - 1] / f[s], and by the last f at the end. Tensor cores add to T itself, so that a program
needs half the registers of one that scales a second accumulator, and a tile of twice the size: less to read from L2.

Factors must lie near each other, or T leaves fp32's range: `Carrier.near`, which its quantizer gives by moving powers
of two into the carrier's values. A segment costs the sum four more roundings (a ratio and a product for each operand),
of 2^-24 each, where a partial sum that is scaled costs two and its 128 additions 128.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4dist.kernels.triton import overlapped
from fp4dist.kernels.triton.gemm import (
    Side,
    Tiling,
    _can_be_described,
    _capability,
    _corner,
    _dense_rows,
    _factors,
    _finish,
    _operand,
    _operands,
)
from fp4dist.kernels.triton.launch import integer, launch

SEGMENT = 128  # columns between two multiplications of T
_BLOCK = 1024  # of the kernel that makes ratios


@triton.jit
def ratios_kernel(rows, down, right, ratios, R, filled, n, EACH: tl.constexpr, B: tl.constexpr):
    """Ratios [n * EACH + 1, filled]: what T is multiplied by before a segment; in the last row the last of n factors.

    EACH   segments under one factor: all but the first of them leave T as it is
    """
    across = tl.cdiv(filled, B)
    r = tl.program_id(0) % across * B + tl.arange(0, B)
    segment = tl.program_id(0) // across
    part = segment // EACH
    own = tl.load(rows + r.to(tl.int64) * down + tl.minimum(part, n - 1) * right, mask=r < R, other=1.0)
    before = tl.load(rows + r.to(tl.int64) * down + tl.maximum(part - 1, 0) * right, mask=r < R, other=1.0)
    ratio = tl.div_rn(before, own)
    if segment % EACH != 0:
        ratio = tl.full((B,), 1.0, tl.float32)
    if segment == n * EACH:
        ratio = own
    tl.store(ratios + segment.to(tl.int64) * filled + r, ratio, mask=r < filled)


@triton.jit
def _moved(total, of_a, of_b, ROWS_A: tl.constexpr, ROWS_B: tl.constexpr):
    """T under the factors of the next segment, where there are such."""
    if ROWS_A == 2:
        total = total * of_a[:, None]
    if ROWS_B == 2:
        total = total * of_b[None, :]
    return total


@triton.jit
def rescaled_kernel(
    a, b, out, scale_a, scale_b, inverse_rotation, ratios_a, ratios_b, M, N, K, stride_a, stride_b,
    HAS_A: tl.constexpr, HAS_B: tl.constexpr, ROWS_A: tl.constexpr, ROWS_B: tl.constexpr, ADD: tl.constexpr,
    DESCRIPTORS: tl.constexpr, STEPS: tl.constexpr, INTERPRETED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile [BM, BN] a program.

    ROWS_A, _B   2: ratios_a, ratios_b are what `ratios_kernel` writes; 1: factors [M], [N] of whole rows; 0: none
    STEPS        of BK columns, in a segment
    INTERPRETED  as in `gemm`
    """
    m, n = _corner(tl.program_id(0), M, N, BM, BN, GROUP)
    r, c = m + tl.arange(0, BM), n + tl.arange(0, BN)
    segments = K // (BK * STEPS)
    total = tl.zeros((BM, BN), tl.float32)
    of_a, of_b = _factors(ratios_a, ratios_b, r, c, 0, M, N, ROWS_A, ROWS_B)
    for step in range(segments * STEPS):
        x, w = _operands(a, b, m, n, step * BK, M, N, K, stride_a, stride_b, DESCRIPTORS, INTERPRETED, BM, BN, BK)
        if step % STEPS == 0:
            total = _moved(total, of_a, of_b, ROWS_A, ROWS_B)
            # those of the next segment are on their way while tensor cores work on this one
            of_a, of_b = _factors(ratios_a, ratios_b, r, c, step // STEPS + 1, M, N, ROWS_A, ROWS_B)
        total = tl.dot(x, w.T, total)
    factor = tl.load(scale_a) if HAS_A else 1.0
    factor = (factor * tl.load(scale_b) if HAS_B else factor) * inverse_rotation
    total = _moved(total, of_a, of_b, ROWS_A, ROWS_B)
    place = out + r[:, None].to(tl.int64) * N + c[None, :]
    _finish(total, factor, ratios_a, ratios_b, place, r, c, M, N, ROWS_A, ROWS_B, ADD, INTERPRETED)


def takes(a_MK: Side, b_NK: Side) -> bool:
    """Whether `gemm` multiplies the operands: bf16, with factors that lie near each other of equal parts of k * 128
    columns in one or both; what factors the other has are of whole rows.
    """
    bf16 = a_MK.values.dtype == b_NK.values.dtype == torch.bfloat16
    found = [side for side in (a_MK, b_NK) if _parts(side) > 1]
    if not found or not bf16 or not all(side.near for side in found):
        return False
    parts, k = _parts(found[0]), a_MK.values.shape[1]
    return all(_parts(side) == parts for side in found) and k % (parts * SEGMENT) == 0


def gemm(
    a_MK: Side, b_NK: Side, rotation: int = 1, *, out: torch.dtype = torch.float32, into: Tensor | None = None
) -> Tensor:
    """A B^T / rotation in `out` (fp32 or bf16), or added to `into` ([M, N] fp32, dense), with one rounding each.

    Only for operands that it `takes`.
    """
    a, b = _dense_rows(a_MK.values), _dense_rows(b_NK.values)
    (m, k), n = a.shape, b.shape[0]
    result = into if into is not None else torch.empty((m, n), dtype=out, device=a.device)
    if not (m and n):
        return result
    if overlapped.takes(a, b):
        filled = (ratios(side, overlapped.COLUMNS) for side in (a_MK, b_NK))
        overlapped.gemm(a_MK, b_NK, (next(filled), next(filled)), rotation, result, into is not None)
        return result
    described = _can_be_described(a) and _can_be_described(b)
    tiling = tiling_of(a.device, described)
    rows = min(_parts(a_MK), 2), min(_parts(b_NK), 2)
    sizes = m, n, k, a.stride(0), b.stride(0)
    beside = a_MK.scale, b_NK.scale, 1.0 / rotation, ratios(a_MK), ratios(b_NK)
    arguments = (
        _operand(a, tiling.m, tiling.k, described), _operand(b, tiling.n, tiling.k, described), result, *beside, *sizes,
    )  # fmt: skip
    constants = {
        "HAS_A": a_MK.scale is not None, "HAS_B": b_NK.scale is not None, "ROWS_A": rows[0], "ROWS_B": rows[1],
        "ADD": into is not None, "DESCRIPTORS": described, "STEPS": SEGMENT // tiling.k, "INTERPRETED": not a.is_cuda,
        "BM": tiling.m, "BN": tiling.n, "BK": tiling.k, "GROUP": tiling.group, "num_warps": tiling.warps,
        "num_stages": tiling.stages, "enable_fp_fusion": False,
    }  # fmt: skip
    form = (
        "rescaled", a.device, result.dtype, *map(integer, sizes),
        *(x.data_ptr() % 16 for x in (a, b, result, *beside) if isinstance(x, Tensor)), *constants.values(),
    )  # fmt: skip
    launch(rescaled_kernel, triton.cdiv(m, tiling.m) * triton.cdiv(n, tiling.n), arguments, constants, form)
    return result


def ratios(side: Side, multiple: int = 1) -> Tensor | None:
    """[K / SEGMENT + 1, R] fp32 of an operand whose parts have factors, its rows filled up with ones to a multiple;
    [R, 1] the factors of whole rows; or None.
    """
    rows = side.rows
    if rows is None or rows.shape[1] == 1:
        return None if rows is None else rows.contiguous()
    (count, parts), segments = rows.shape, side.values.shape[1] // SEGMENT
    filled = count + -count % multiple
    found = torch.empty((segments + 1, filled), device=rows.device)
    sizes = count, filled, parts
    arguments = rows, *rows.stride(), found, *sizes
    constants = {"EACH": segments // parts, "B": _BLOCK, "num_warps": 4, "enable_fp_fusion": False}
    form = "ratios", rows.device, rows.data_ptr() % 16, *map(integer, (*rows.stride(), *sizes)), segments // parts
    launch(ratios_kernel, triton.cdiv(filled, _BLOCK) * (segments + 1), arguments, constants, form)
    return found


def tiling_of(device: torch.device, described: bool) -> Tiling:
    """Fixed for a class of shapes, as `gemm.tiling_of`; measured on an H200: two programs of four warps share a
    multiprocessor, and tensor cores work for one while the other multiplies its sum.
    """
    if device.type != "cuda":
        return Tiling(64, 64, 64, 4, 1)  # the interpreter's
    if _capability(device)[0] < 9:
        return Tiling(128, 128, 32, 8, 3)
    return Tiling(128, 128, 64, 4 if described else 8, 3)


def _parts(side: Side) -> int:
    return 0 if side.rows is None else side.rows.shape[1]
