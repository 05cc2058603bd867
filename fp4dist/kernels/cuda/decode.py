"""What csrc/ makes of codes: values, carriers for GEMMs without FP4 tensor cores, scales in their order."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from fp4dist.kernels.cuda import filters
from fp4dist.numerics.codes import decode_packed
from fp4dist.numerics.layout import TILE_COLUMNS, TILE_ROWS
from fp4dist.numerics.rotation import turned_back
from fp4dist.numerics.scales import fp32
from fp4dist.numerics.tensor import BlockScaledTensor, Carrier, Key
from fp4dist.spec.blocks import Hadamard
from fp4dist.spec.formats import E2M1

FP8_TYPES = (torch.float8_e5m2, torch.float8_e4m3fn)
TO = {torch.float32: 0, torch.bfloat16: 1, torch.float8_e5m2: 2, torch.float8_e4m3fn: 3}  # enum Carrier


def why_not_codes(q: BlockScaledTensor) -> str | None:
    """Why these kernels cannot read `q`, or None."""
    lacks = (
        (q.format.element != E2M1, f"elements {q.format.element.name}"),
        (q.format.scale.name not in ("e4m3", "e8m0"), f"{q.format.scale.name} scales"),
        (q.global_scale.dim() != 0, "scales of rows or tiles"),
        (q.samples != 1, "several samples"),
        (q.block[1] % 8 != 0, f"blocks {list(q.block)}"),
    )
    return next((f"csrc reads no codes with {what}" for missing, what in lacks if missing), None)


def why_not_carrier(q: BlockScaledTensor, dtype: torch.dtype) -> str | None:
    """Why `to_carrier` cannot write the values of `q` in `dtype`, or None."""
    reason = why_not_codes(q)
    if reason is None and dtype in FP8_TYPES and q.format.scale.name != "e8m0":
        return f"E4M3 scales, whose values need bf16, have no carrier in {dtype}"
    if reason is None and dtype not in (torch.bfloat16, *FP8_TYPES):
        return f"no carrier of {dtype}"
    return reason


def dequantize(q: BlockScaledTensor) -> Tensor:
    """[R, C] fp32; see `fp4dist.numerics.dequantize`."""
    values = torch.empty(q.shape, dtype=torch.float32, device=q.codes.device)
    _decode(q, values, turned=False, factor=fp32(q.rotation**-0.5))
    return values


def original(q: BlockScaledTensor, rotation: Hadamard | None, key: Key | None = None) -> Tensor:
    """[R, C] fp32 values of `q`, turned back from the rotated basis that its codes are in."""
    if rotation is not None and filters.why_no_original(q) is None:
        return filters.original(q, rotation, key)
    return dequantize(q) if rotation is None else turned_back(dequantize(replace(q, rotation=1)), rotation, key)


def to_carrier(q: BlockScaledTensor, dtype: torch.dtype, *, transposed: bool = False) -> Carrier:
    """The values of codes `q` [R, C], or of their transpose, in bf16 or FP8: as the Triton backend's `to_carrier`."""
    reason = why_not_carrier(q, dtype)
    if reason is not None:
        raise ValueError(f"{reason}; ask for bf16, or multiply the dequantized matrix")
    if transposed and (q.rotation != 1 or (q.block[0] != q.block[1] and q.scales.numel() != 1)):
        raise ValueError(f"codes with block {q.block} and rotation {q.rotation} cannot be read transposed")
    return carrier_of(q, dtype, transposed=transposed)


def carrier_of(
    q: BlockScaledTensor, dtype: torch.dtype, *, transposed: bool = False, counters: Tensor | None = None
) -> Carrier:
    """`to_carrier` where nothing speaks against it.

    counters   [2] int32: the largest byte of the scales, where their quantizer has found it, and 0; for FP8
    """
    rows, cols = q.shape
    values = torch.empty((cols, rows) if transposed else (rows, cols), dtype=dtype, device=q.codes.device)
    if dtype == torch.bfloat16:
        _decode(q, values, turned=transposed)
        return Carrier(values, q.global_scale, q.rotation)
    scale = torch.empty((), dtype=torch.float32, device=values.device)
    if counters is None:
        counters = torch.zeros(2, dtype=torch.int32, device=values.device)
        torch.ops.fp4dist.largest_byte(q.scales.contiguous(), counters[0])
    _decode(q, values, turned=transposed, top=counters[0], scale=scale, lost=counters[1])
    return Carrier(values, scale, q.rotation, lost=counters[1])


def finished(q: BlockScaledTensor, values: Tensor, memory: Tensor, lost: Tensor | None) -> Carrier:
    """The carrier whose FP8 `values` the quantizer of `q` has written at the shift that follows from a slot's memory:
    decoded again where they did not fit. See `Want` and enum Memory of csrc/decode.h.
    """
    scale = torch.empty((), dtype=torch.float32, device=values.device)
    count = memory[3] if lost is None else lost
    _decode(q, values, turned=False, scale=scale, lost=count, memory=memory)
    return Carrier(values, scale, q.rotation, lost=count)


def values_e4m3(q: BlockScaledTensor) -> Tensor:
    """[R, C] float8_e4m3fn: the element values alone, without scales. E4M3 holds every one."""
    return _pairs_e4m3(q.codes.device)[q.codes.to(torch.int32)].view(torch.float8_e4m3fn)


@lru_cache(maxsize=8)
def _pairs_e4m3(device: torch.device) -> Tensor:
    """[256] int16: the two E4M3 bytes of each byte of codes."""
    byte = torch.arange(256, dtype=torch.uint8)[:, None]
    return decode_packed(byte, E2M1).to(torch.float8_e4m3fn).view(torch.int16).flatten().to(device)


def swizzled(q: BlockScaledTensor) -> Tensor:
    """Flat uint8 scales of `q` in 128 x 4 tiles; see `fp4dist.numerics.layout.swizzle`."""
    rows, columns = q.scales.shape[0] * q.block[0], q.scales.shape[1]
    size = (rows + -rows % TILE_ROWS) * (columns + -columns % TILE_COLUMNS)
    out = torch.empty(size, dtype=torch.uint8, device=q.scales.device)
    torch.ops.fp4dist.swizzle(q.scales.contiguous(), q.block[0], out)
    return out


def _decode(
    q: BlockScaledTensor, values: Tensor, *, turned: bool, factor: float = 1.0, top: Tensor | None = None,
    scale: Tensor | None = None, lost: Tensor | None = None, memory: Tensor | None = None,
) -> None:  # fmt: skip
    torch.ops.fp4dist.decode(
        q.codes.contiguous(), q.scales.contiguous(), q.global_scale, q.block, q.format.scale.name == "e8m0", turned,
        TO[values.dtype], factor, top, values, scale, lost, memory,
    )  # fmt: skip
