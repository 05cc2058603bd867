"""Block-scaled GEMMs on the exact carriers of their operands: FP8, or bf16.

Where both operands have FP8 carriers, FP8 tensor cores multiply them (`gemm`); else bf16 ones do, through cuBLASLt
where the device has it and nothing but the operands' own scales multiplies the sum, through `gemm` elsewhere. What has
no carrier is decoded by torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import TypeGuard

import torch
from torch import Tensor

from fp4dist import numerics
from fp4dist.kernels import cublaslt
from fp4dist.kernels.triton import grid_values, grouped, levels, parted, quantizers, rescaled
from fp4dist.kernels.triton.carriers import carrier_of
from fp4dist.kernels.triton.gemm import FP8, Side, gemm, takes
from fp4dist.numerics.matmul import Operand, OperandParts, Single, check_product
from fp4dist.numerics.scales import fp32
from fp4dist.numerics.tensor import BlockScaledTensor, Carrier, PartedTensor, Quantized
from fp4dist.spec.blocks import Stochastic
from fp4dist.spec.formats import E2M1
from fp4dist.spec.recipe import QuantSpec

E5M2, E4M3 = FP8


def carrier_types(
    a: QuantSpec | None, b: QuantSpec | None, device: torch.device
) -> tuple[torch.dtype, torch.dtype] | None:
    """The carrier types that the quantizers of a GEMM's two slots should be asked for; None: there are none.

    a, b   the slots' specs, None for a plain operand (one of them at least is quantized)

    FP8 where it holds both operands and the device multiplies it, else bf16 for both. Of FP8 the first operand gets
    e5m2, which has room for 29 binades of block scales and so for gradients; the second e4m3 (15 binades): cuBLASLt has
    no e5m2 x e5m2. Operands that only other types hold get those.
    """
    specs = [spec for spec in (a, b) if spec is not None]
    if not specs:
        return None
    if len(specs) == 2 and multiplies_fp8(device):
        for types in ((E5M2, E4M3), (E4M3, E4M3), (E4M3, E5M2), (E5M2, E5M2)):
            if all(_held(spec, dtype) for spec, dtype in zip(specs, types, strict=True)):
                return types
    bf16 = torch.bfloat16
    return (bf16, bf16) if all(_held(spec, bf16) for spec in specs) else None


def _held(spec: QuantSpec, dtype: torch.dtype) -> bool:
    """Whether a carrier of `dtype` can hold operands of `spec` exactly, with what multiplies rows (or their parts of 32
    elements and more) outside. Power-of-two block scales are shifted to where FP8 has its range.
    """
    if spec.has_parts:
        return False
    element, scale = spec.format.element, spec.format.scale
    if spec.samples != 1:  # their sum is one carrier
        drawn = isinstance(spec.rounding, Stochastic) and scale.name == "fp32" and spec.shape[1] == 0
        return drawn and levels.holds(element, dtype, spec.samples)
    if isinstance(spec.above, tuple) and spec.above[1] < 32:
        return False
    if scale.name in ("e4m3", "ue5m3"):  # as many significant bits again
        return dtype == torch.bfloat16 and element == E2M1
    if scale.name == "e8m0":
        return element == E2M1
    return scale.name == "fp32" and spec.shape[1] == 0 and _is_exact(element.levels, dtype)


@cache
def _is_exact(levels: tuple[float, ...], dtype: torch.dtype) -> bool:
    exact = torch.tensor(levels, dtype=torch.float64)
    return torch.equal(exact.to(dtype).double(), exact)


def multiplies_fp8(device: torch.device) -> bool:
    """Whether the device's tensor cores take FP8."""
    return device.type == "cuda" and torch.version.cuda is not None and _capability(device) >= (8, 9)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def has_carrier(q: BlockScaledTensor) -> bool:
    """Whether `carrier` can decode `q`: E2M1 under one-byte scales and one scale of the tensor."""
    return (
        q.format.element == E2M1 and q.format.scale.name in ("e4m3", "e8m0") and q.global_scale.dim() == 0
        and q.samples == 1 and q.block[1] in (16, 32, 64, 128)
    )  # fmt: skip


def carrier(q: BlockScaledTensor) -> Tensor:
    """[R, C] bf16 code * block scale, exact."""
    return carrier_of(q, torch.bfloat16).values


def matmul(
    a_MK: Operand,
    b_NK: Operand,
    *,
    out: torch.dtype = torch.float32,
    into: Tensor | None = None,
    room: Tensor | None = None,
) -> Tensor:
    """A B^T; see `fp4dist.numerics.matmul`. The carrier at an operand's side is taken where it has one.

    room   [M, N] in `out`, memory that the result may be written to
    """
    if _is_plain(a_MK) and _is_plain(b_NK) and (into is None or into.is_contiguous()):
        left, right = Side(a_MK.values, a_MK.scale), Side(b_NK.values, b_NK.scale)
        if (left.values.dtype in FP8) == (right.values.dtype in FP8):
            return _product(left, right, check_product(a_MK, b_NK, out, into), out, into, room)
    if max(parted.samples(a_MK), parted.samples(b_NK)) > 1:
        return parted.mean_of_samples(a_MK, b_NK, matmul, out=out, into=into)
    if isinstance(a_MK, PartedTensor) or isinstance(b_NK, PartedTensor):
        return parted.matmul(*with_fp8(a_MK, b_NK), matmul, out=out, into=into)
    rotation = check_product(a_MK, b_NK, out, into)
    left, right = _side(a_MK), _side(b_NK)
    wide = left is None and parted.has_terms(a_MK), right is None and parted.has_terms(b_NK)
    if any(wide) and (left is not None or wide[0]) and (right is not None or wide[1]):
        return parted.in_terms(a_MK, b_NK, matmul, wide, out=out, into=into)
    if left is None or right is None or (isinstance(a_MK, Tensor) and isinstance(b_NK, Tensor)):
        return numerics.matmul(a_MK, b_NK, out=out, into=into)
    if into is not None and not into.is_contiguous():
        return into.add_(matmul(a_MK, b_NK))
    if not takes(left, right):  # factors of differing parts
        return numerics.matmul(a_MK, b_NK, out=out, into=into)
    if (left.values.dtype in FP8) != (right.values.dtype in FP8):
        left, right = (side._replace(values=side.values.to(torch.bfloat16)) for side in (left, right))
    return _product(left, right, rotation, out, into)


def _is_plain(operand: Operand) -> TypeGuard[Carrier]:
    """Whether nothing but its scale multiplies a carrier: the most frequent operand."""
    return isinstance(operand, Carrier) and operand.rows is None


def grouped_matmul(
    a: Sequence[Operand],
    b: Sequence[Operand],
    *,
    out: torch.dtype = torch.float32,
    into: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """One `matmul` a pair; see `fp4dist.kernels.reference.grouped_matmul`. Without `into` results may be parts of one
    memory, one behind the other.
    """
    sums = [None] * len(a) if into is None else into
    if len(a) > 1 and all(isinstance(x, Carrier) for x in (*a, *b)):
        left, right = ([_side_of(x) for x in operands if isinstance(x, Carrier)] for operands in (a, b))
        rotations = {check_product(x, w, out, total) for x, w, total in zip(a, b, sums, strict=True)}
        if len(rotations) == 1 and grouped.is_wanted(left, right) and grouped.takes(left, right, sums):
            return grouped.gemm(left, right, rotations.pop(), out, sums, joined=into is None)
    rooms: Sequence[Tensor | None] = [None] * len(a)
    first = a[0] if into is None and len(a) > 1 and all(_is_plain(x) for x in (*a, *b)) else None
    if isinstance(first, Carrier):
        rooms = grouped.room([x.shape[0] for x in a], [w.shape[0] for w in b], out, first.values.device)
    pairs = zip(a, b, sums, rooms, strict=True)
    return [matmul(x, w, out=out, into=total, room=room) for x, w, total, room in pairs]


def with_fp8(a: Operand, b: Operand) -> tuple[Operand, Operand]:
    """Operands in parts; their codes with FP8 carriers where fp32 scales multiply whole rows of both, or the tensor."""
    mains = OperandParts.of(a).main, OperandParts.of(b).main
    if not (_fits_fp8(mains[0]) and _fits_fp8(mains[1])):
        return a, b
    return _carried(a), _carried(b)


def _fits_fp8(q: Single) -> bool:
    if not isinstance(q, BlockScaledTensor) or q.carrier is not None or q.format.scale.name != "fp32":
        return False
    whole = q.block[1] == q.shape[1]
    return whole and multiplies_fp8(q.codes.device) and quantizers.why_not_carrier(q, E4M3) is None


def _carried(operand: Operand) -> Operand:
    if isinstance(operand, PartedTensor):
        return replace(operand, main=replace(operand.main, carrier=quantizers.to_carrier(operand.main, E4M3)))
    assert isinstance(operand, BlockScaledTensor)
    return replace(operand, carrier=quantizers.to_carrier(operand, E4M3))


def _side(operand: Operand) -> Side | None:
    """The operand as the GEMM reads it; None: it has no carrier."""
    if isinstance(operand, Tensor):
        return Side(operand) if operand.dtype == torch.bfloat16 else None
    if isinstance(operand, BlockScaledTensor):
        if operand.carrier is not None:
            operand = operand.carrier
        elif has_carrier(operand):
            return Side(carrier(operand), operand.global_scale)
        elif quantizers.why_not_carrier(operand, torch.bfloat16) is None:
            operand = quantizers.to_carrier(operand, torch.bfloat16)
    if not isinstance(operand, Carrier):
        return None
    return _side_of(operand)


def _side_of(carrier: Carrier) -> Side:
    return Side(carrier.values, carrier.scale, carrier.rows, carrier.near)


def _product(
    a: Side, b: Side, rotation: int, out: torch.dtype, into: Tensor | None, room: Tensor | None = None
) -> Tensor:
    """Of two bf16 or two FP8 operands. room: of `matmul`, taken where it is aligned as new memory is."""
    whole = (a.rows is None or a.rows.shape[1] == 1) and (b.rows is None or b.rows.shape[1] == 1)
    if whole and cublaslt.why_not(a.values.device) is None:
        done = cublaslt.matmul(
            a.values, b.values, a.scale, b.scale, rotation, rows_a=a.rows, rows_b=b.rows, out=out, into=into,
            room=room if room is not None and room.data_ptr() % cublaslt.ALIGNMENT == 0 else None,
        )  # fmt: skip
        if done is not None:
            return done
    if rescaled.takes(a, b):
        return rescaled.gemm(a, b, rotation, out=out, into=into)
    return gemm(a, b, rotation, out=out, into=into)


def dequantize(q: Quantized) -> Tensor:
    """[R, C] fp32 values; see `fp4dist.numerics.dequantize`."""
    if isinstance(q, PartedTensor):
        return q.plus_side(dequantize(q.main), fp32(q.rotation**-0.5))
    if not has_carrier(q):
        return grid_values.dequantize(q) if grid_values.has_values(q) else numerics.dequantize(q)
    return carrier(q).to(torch.float32) * (q.global_scale * q.rotation**-0.5)
