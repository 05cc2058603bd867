# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# Triton's own language: its kernels' parameters have no types, and a launch takes options beside them.
"""Several products A B^T of bf16 carriers in one launch: those of experts, whose sizes differ and may be zero.

A table in device memory holds addresses and sizes of each product; a program finds the product of its tile in it. Every
sum has the steps and the order of `rescaled`, so its bits are that kernel's: `matmul.grouped_matmul` takes it for what
`rescaled` multiplies alone. cuBLASLt, which multiplies a product where nothing but a scale belongs to it, adds in an
order of its own, so that such products come here only after `allow`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4dist.kernels.triton import overlapped, rescaled
from fp4dist.kernels.triton.gemm import (
    Side,
    _can_be_described,
    _corner,
    _dense_rows,
    _factors,
    _finish,
    _operands,
)
from fp4dist.kernels.triton.launch import integer, launch

_FILL = (0, 0, 0)  # a product takes 16 numbers of the table: 7 addresses, sizes M N K, strides of A and B, first tile
_allowed = False


def allow(on: bool = True) -> None:
    """Take this kernel from now on where it `takes` the products, also in place of cuBLASLt, and say so."""
    global _allowed
    _allowed = on
    if on:
        print("fp4dist: experts' GEMMs in one launch, in place of cuBLASLt's: their sums are in another order")


def is_wanted(a: Sequence[Side], b: Sequence[Side]) -> bool:
    """Whether `gemm` has the bits of one product after the other, or other bits are allowed; not while a CUDA graph is
    captured, which would not hold the table.
    """
    if _allowed:
        return True
    if a[0].values.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    if not all(2 in (_kind(x), _kind(w)) and rescaled.takes(x, w) for x, w in zip(a, b, strict=True)):
        return False
    values = [(x.values, w.values) for x, w in zip(a, b, strict=True)]
    return not all(overlapped.takes(*pair) and overlapped.fills(*pair) for pair in values)


@triton.jit
def _address(row, column: tl.constexpr, TYPE: tl.constexpr):
    """What a column of the table points to."""
    return tl.load(row + column).to(tl.pointer_type(TYPE))


@triton.jit
def grouped_kernel(
    table, out, count, inverse_rotation,
    PARTS_A: tl.constexpr, PARTS_B: tl.constexpr, ADD: tl.constexpr, DESCRIPTORS: tl.constexpr, EVEN: tl.constexpr,
    STEPS: tl.constexpr, INTERPRETED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """One tile [BM, BN] of one of `count` products a program, as `rescaled.rescaled_kernel` makes it.

    PARTS_A, _B   ROWS_A, _B of that kernel;  DESCRIPTORS   read by TMA;  EVEN   every N is a multiple of 16
    out      the first result; addresses of the others are counted from it
    """
    tile = tl.program_id(0)
    of = 0
    for i in range(1, count):
        of += (tile >= tl.load(table + i * 16 + 12)).to(tl.int32)
    row = table + of * 16
    a, b = _address(row, 0, tl.bfloat16), _address(row, 1, tl.bfloat16)
    M, width, K = tl.load(row + 7).to(tl.int32), tl.load(row + 8), tl.load(row + 9).to(tl.int32)
    start, N = tl.load(row + 2), width.to(tl.int32)
    stride_a, stride_b = tl.load(row + 10), tl.load(row + 11)
    if EVEN:
        start, width = tl.multiple_of(start, 4), tl.multiple_of(width, 16)
    if DESCRIPTORS:
        a = tl.make_tensor_descriptor(a, [M, K], [stride_a, 1], [BM, BK])
        b = tl.make_tensor_descriptor(b, [N, K], [stride_b, 1], [BN, BK])
    m, n = _corner(tile - tl.load(row + 12).to(tl.int32), M, N, BM, BN, GROUP)
    r, c = m + tl.arange(0, BM), n + tl.arange(0, BN)
    rows_a, rows_b = _address(row, 5, tl.float32), _address(row, 6, tl.float32)
    total = tl.zeros((BM, BN), tl.float32)
    of_a, of_b = _factors(rows_a, rows_b, r, c, 0, M, N, PARTS_A, PARTS_B)
    for step in range(tl.cdiv(K, BK)):
        x, w = _operands(a, b, m, n, step * BK, M, N, K, stride_a, stride_b, DESCRIPTORS, INTERPRETED, BM, BN, BK)
        if (PARTS_A == 2) | (PARTS_B == 2):  # noqa: SIM102  (known when it is compiled)
            if step % STEPS == 0:
                total = rescaled._moved(total, of_a, of_b, PARTS_A, PARTS_B)
                of_a, of_b = _factors(rows_a, rows_b, r, c, step // STEPS + 1, M, N, PARTS_A, PARTS_B)
        total = tl.dot(x, w.T, total)
    total = rescaled._moved(total, of_a, of_b, PARTS_A, PARTS_B)
    factor = tl.load(_address(row, 3, tl.float32)) * tl.load(_address(row, 4, tl.float32)) * inverse_rotation
    place = out + start + r[:, None].to(tl.int64) * width + c[None, :]
    _finish(total, factor, rows_a, rows_b, place, r, c, M, N, PARTS_A, PARTS_B, ADD, INTERPRETED)


def takes(a: Sequence[Side], b: Sequence[Side], into: Sequence[Tensor | None]) -> bool:
    """Whether `gemm` multiplies the pairs: bf16, with factors of one kind, all into sums or none."""
    kinds = set()
    for x, w, total in zip(a, b, into, strict=True):
        if x.values.dtype != torch.bfloat16 or w.values.dtype != torch.bfloat16:
            return False
        parts = _kind(x), _kind(w)
        if (2 in parts and not rescaled.takes(x, w)) or not _fits(total):
            return False
        kinds.add((parts, total is None))
    return len(kinds) == 1


def gemm(
    a: Sequence[Side], b: Sequence[Side], rotation: int, out: torch.dtype, into: Sequence[Tensor | None],
    joined: bool = True,
) -> list[Tensor]:  # fmt: skip
    """A B^T / rotation of each pair in `out` (fp32 or bf16), or added to its `into`; for pairs that it `takes`.

    joined   results may be parts of one memory, see `room`
    """
    device = a[0].values.device
    described = all(_can_be_described(side.values) or not side.values.numel() for side in (*a, *b))
    one, tiling = _one(device), rescaled.tiling_of(device, described)
    table, used, tiles = [], [], 0
    results = [total for total in into if total is not None]
    if not results:
        results = room([len(side.values) for side in a], [len(side.values) for side in b], out, device, joined)
    for x, w, result in zip(a, b, results, strict=True):
        left, right = _dense_rows(x.values), _dense_rows(w.values)
        (m, k), n = left.shape, right.shape[0]
        factors = [one if f is None else f for f in (x.scale, w.scale, rescaled.ratios(x), rescaled.ratios(w))]
        start = (result.data_ptr() - results[0].data_ptr()) // result.element_size()
        addresses = left.data_ptr(), right.data_ptr(), start, *(f.data_ptr() for f in factors)
        table += [*addresses, m, n, k, left.stride(0), right.stride(0), tiles, *_FILL]
        tiles += triton.cdiv(m, tiling.m) * triton.cdiv(n, tiling.n)
        used.append((left, right, *factors))  # until the launch
    if tiles == 0:
        return results
    if described:
        triton.set_allocator(_scratch)
    on_device = torch.tensor(table, dtype=torch.int64).to(device, non_blocking=True)
    constants = {
        "PARTS_A": _kind(a[0]), "PARTS_B": _kind(b[0]), "ADD": into[0] is not None, "DESCRIPTORS": described,
        "EVEN": all(side.values.shape[0] % 16 == 0 for side in b), "STEPS": rescaled.SEGMENT // tiling.k,
        "INTERPRETED": device.type != "cuda", "BM": tiling.m, "BN": tiling.n, "BK": tiling.k, "GROUP": tiling.group,
        "num_warps": tiling.warps, "num_stages": tiling.stages, "enable_fp_fusion": False,
    }  # fmt: skip
    first = results[0]
    form = "grouped", device, first.dtype, first.data_ptr() % 16, integer(len(results)), *constants.values()
    launch(grouped_kernel, tiles, (on_device, first, len(results), 1.0 / rotation), constants, form)
    return results


def room(
    rows: Sequence[int], columns: Sequence[int], out: torch.dtype, device: torch.device, joined: bool = True
) -> list[Tensor]:
    """Memory for results [rows[i], columns[i]], if `joined` one behind the other where they are equally wide: nobody
    has to join them then.
    """
    if joined and len(set(columns)) == 1:
        return list(torch.empty((sum(rows), columns[0]), dtype=out, device=device).split(list(rows)))
    return [torch.empty(shape, dtype=out, device=device) for shape in zip(rows, columns, strict=True)]


def _kind(side: Side) -> int:
    """PARTS_A, _B of the kernel."""
    return 0 if side.rows is None else min(side.rows.shape[1], 2)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory of a launch for the descriptors of its programs."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


@cache
def _one(device: torch.device) -> Tensor:
    """[1] fp32 for operands without a factor."""
    return torch.ones(1, device=device)


def _fits(total: Tensor | None) -> bool:
    """Whether the kernel can add to it, if it is there."""
    return total is None or (total.is_contiguous() and total.data_ptr() % 16 == 0)
