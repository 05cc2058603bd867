# pyright: reportCallIssue=false, reportArgumentType=false
# (a launch takes options beside the kernel's own parameters)
"""Carriers of codes: exact values of a wider type, which is what a GEMM without FP4 tensor cores reads."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fp4dist.kernels.triton.counters import zeroed
from fp4dist.kernels.triton.decoding import carrier_of_codes_kernel, largest_byte_kernel
from fp4dist.kernels.triton.launch import integer, launch
from fp4dist.numerics.tensor import BlockScaledTensor, Carrier
from fp4dist.spec.formats import E2M1

FP8_TYPES = (torch.float8_e5m2, torch.float8_e4m3fn)
_KINDS = {torch.bfloat16: 0, torch.float8_e5m2: 5, torch.float8_e4m3fn: 4}


class _Tile(NamedTuple):
    """Of a program; side, chunk: threads side by side along the memory, and columns that each has (transposed)."""

    rows: int
    columns: int
    side: int
    chunk: int
    warps: int


_TILES = {False: _Tile(16, 256, 1, 1, 4), True: _Tile(32, 128, 4, 16, 4)}


def why_not_carrier(q: BlockScaledTensor, dtype: torch.dtype) -> str | None:
    """Why `to_carrier` cannot write the values of `q` in `dtype`, or None."""
    lacks = (
        (dtype != torch.bfloat16 and dtype not in FP8_TYPES, f"{dtype}"),
        (q.format.element != E2M1, f"elements {q.format.element.name}"),
        (q.format.scale.name not in ("e4m3", "e8m0"), f"{q.format.scale.name} scales"),
        (q.format.scale.name == "e4m3" and dtype != torch.bfloat16, f"E4M3 scales, whose values need bf16, in {dtype}"),
        (q.global_scale.dim() != 0, "scales of rows or tiles"),
        (q.samples != 1, "several samples"),
    )
    return next((f"no carrier of {what}" for missing, what in lacks if missing), None)


def to_carrier(q: BlockScaledTensor, dtype: torch.dtype, *, transposed: bool = False) -> Carrier:
    """The values of codes `q` [R, C], or of their transpose [C, R], in `dtype`, without waiting for the device.

    dtype    bf16 holds every value. float8_e5m2 (float8_e4m3fn) takes codes under power-of-two scales: 2^shift puts the
             largest block scale at the top of its range, so 29 (15) binades of scales are exact; elements of smaller
             ones are cut towards 0, and those that this changes are counted in `lost`.
    """
    reason = why_not_carrier(q, dtype)
    if reason is not None:
        raise ValueError(f"{reason}; ask for bf16, or multiply the dequantized matrix")
    if transposed and (q.rotation != 1 or (q.block[0] != q.block[1] and q.scales.numel() != 1)):
        raise ValueError(f"codes with block {q.block} and rotation {q.rotation} cannot be read transposed")
    return carrier_of(q, dtype, transposed=transposed)


def carrier_of(q: BlockScaledTensor, dtype: torch.dtype, *, transposed: bool = False) -> Carrier:
    """`to_carrier` where nothing speaks against it."""
    device, shape = q.codes.device, q.shape
    rows, cols = (shape[1], shape[0]) if transposed else shape
    values = torch.empty((rows, cols), dtype=dtype, device=device)
    codes = q.codes if q.codes.is_contiguous() else q.codes.contiguous()
    stored = q.scales if q.scales.is_contiguous() else q.scales.contiguous()
    form = (
        dtype, transposed, integer(rows), integer(cols), q.block, q.format.scale.name, codes.data_ptr() % 16,
        stored.data_ptr() % 16, device,
    )  # fmt: skip
    scale, top, lost = q.global_scale, stored, None
    if dtype != torch.bfloat16:
        scale = torch.empty((), dtype=torch.float32, device=device)
        counters, number = zeroed(device), stored.numel()
        options = {"B": 16384, "num_warps": 8}
        programs = -(-number // 16384)
        launch(largest_byte_kernel, programs, (stored, counters, number), options, ("top", integer(number), form))
        top, lost = counters, counters[1]
    tile = _TILES[transposed]
    constants = {
        "R": tile.rows, "N": tile.columns, "BR": q.block[0], "BC": q.block[1], "TURNED": transposed, "W": tile.side,
        "E": tile.chunk, "E8M0": q.format.scale.name == "e8m0", "FP8": _KINDS[dtype], "num_warps": tile.warps,
        "enable_fp_fusion": False,
    }  # fmt: skip
    arguments = (
        codes if transposed else codes.view(torch.int32), stored, q.global_scale, top, values.view(torch.int32), scale,
        stored if lost is None else lost, rows, cols,
    )  # fmt: skip
    programs = -(-rows // tile.rows) * -(-cols // tile.columns)
    launch(carrier_of_codes_kernel, programs, arguments, constants, form)
    return Carrier(values, scale, q.rotation, lost=lost)
