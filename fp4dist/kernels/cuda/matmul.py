"""GEMMs on FP4 tensor cores (compute capability 10.0 and newer), through torch's `scaled_mm`.

NVFP4 x NVFP4 runs on codes. MXFP4 x MXFP4 does where this build of torch multiplies it, which one small product finds
out; elsewhere its codes go as E4M3 values, which hold them exactly, to the FP8 tensor cores, under the same scales.
Everything else (a plain operand, two formats, sizes that the instructions do not take) is multiplied as bf16 carriers,
and what has none in the reference's way. Scales of the tensors, and the rotation's 1/n, multiply the fp32 sum.
torch has no form that adds to fp32 `into`: the product is written in fp32 and added by one more kernel.

No GEMM of this file has run: no machine of this project has FP4 tensor cores (docs/blackwell.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fp4dist import numerics
from fp4dist.kernels.cuda import decode
from fp4dist.kernels.registry import NATIVE, Request
from fp4dist.numerics.matmul import Operand, check_product
from fp4dist.numerics.scales import fp32
from fp4dist.numerics.tensor import BlockScaledTensor, PartedTensor, Quantized
from fp4dist.spec.formats import E2M1
from fp4dist.spec.recipe import QuantSpec

_COLUMNS = 32  # of the contracted dimension: 16 bytes of codes
_ROWS = 16  # of B


class _Kind(NamedTuple):
    """A block-scaled format as `scaled_mm` is told of it: its recipe and the dtype of its scales."""

    recipe: str
    scales: torch.dtype


_KINDS = {
    "e4m3": _Kind("BlockWise1x16", torch.float8_e4m3fn),
    "e8m0": _Kind("BlockWise1x32", getattr(torch, "float8_e8m0fnu", torch.uint8)),
}


def supports(request: Request) -> str | None:
    """Why there are no FP4 GEMMs for `request`, or None."""
    if request.device.type != "cuda":
        return f"needs a CUDA device, not {request.device.type}"
    capability = torch.cuda.get_device_capability(request.device)
    if capability < NATIVE:
        return f"needs FP4 tensor cores (compute capability 10.0), not {capability[0]}.{capability[1]}"
    if not hasattr(functional, "scaled_mm") or not hasattr(torch, "float4_e2m1fn_x2"):
        return f"torch {torch.__version__} has no scaled_mm for FP4"
    return supports_codes(request)


def supports_codes(request: Request) -> str | None:
    """Why csrc/ cannot read the codes that `request` is about, or None."""
    if request.spec is not None and not _has_bf16(request.spec):
        return f"reads E2M1 codes under one-byte scales and one scale of the tensor, not {request.spec.label()}"
    return None


def carrier_types(
    a: QuantSpec | None, b: QuantSpec | None, device: torch.device
) -> tuple[torch.dtype, torch.dtype] | None:
    """None where FP4 tensor cores read the codes of both slots; else bf16, if that holds what is quantized."""
    del device
    specs = [spec for spec in (a, b) if spec is not None]
    if not specs or not all(_has_bf16(spec) for spec in specs):
        return None
    both = len(specs) == 2 and specs[0].format == specs[1].format
    return None if both else (torch.bfloat16, torch.bfloat16)


def _has_bf16(spec: QuantSpec) -> bool:
    one_scale = spec.above in ("none", "tensor") and 0 not in spec.shape
    return (
        spec.format.element == E2M1 and spec.format.scale.name in _KINDS and one_scale and spec.samples == 1
        and not spec.has_parts
    )  # fmt: skip


def matmul(a_MK: Operand, b_NK: Operand, *, out: torch.dtype = torch.float32, into: Tensor | None = None) -> Tensor:
    """A B^T; see `fp4dist.numerics.matmul`."""
    rotation = check_product(a_MK, b_NK, out, into)
    if not (isinstance(a_MK, BlockScaledTensor) and isinstance(b_NK, BlockScaledTensor) and takes(a_MK, b_NK)):
        return numerics.matmul(_in_bf16(a_MK), _in_bf16(b_NK), out=out, into=into)
    product = _scaled(a_MK, b_NK, rotation, torch.float32 if into is not None else out)
    return product if into is None else into.add_(product)


def grouped_matmul(
    a: Sequence[Operand],
    b: Sequence[Operand],
    *,
    out: torch.dtype = torch.float32,
    into: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """One `matmul` a pair: each has tensor scales of its own, `scaled_grouped_mm` has one pair for all groups."""
    sums = [None] * len(a) if into is None else into
    return [matmul(x, w, out=out, into=total) for x, w, total in zip(a, b, sums, strict=True)]


def takes(a: BlockScaledTensor, b: BlockScaledTensor) -> bool:
    """Whether FP4 tensor cores multiply these codes as they are."""
    codes = all(decode.why_not_codes(q) is None and q.block[1] == (16, 32)[_is_mx(q)] for q in (a, b))
    return codes and _is_mx(a) == _is_mx(b) and a.shape[1] % _COLUMNS == 0 and b.shape[0] % _ROWS == 0


def dequantize(q: Quantized) -> Tensor:
    """[R, C] fp32 values; see `fp4dist.numerics.dequantize`."""
    if isinstance(q, PartedTensor):
        values = dequantize(q.main)
        return values if q.side is None else values + q.side * fp32(q.rotation**-0.5)
    return decode.dequantize(q)


def _is_mx(q: BlockScaledTensor) -> bool:
    return q.format.scale.name == "e8m0"


def _in_bf16(operand: Operand) -> Operand:
    """Codes that bf16 holds as their carrier; the others as they are."""
    if isinstance(operand, BlockScaledTensor):
        if operand.carrier is not None:
            return operand.carrier
        if decode.why_not_codes(operand) is None:
            return decode.carrier_of(operand, torch.bfloat16)
    return operand


def _scaled(a: BlockScaledTensor, b: BlockScaledTensor, rotation: int, out: torch.dtype) -> Tensor:
    """[M, N] in `out`."""
    kind, mx = _KINDS[a.format.scale.name], _is_mx(a)
    scales = [decode.swizzled(q).view(kind.scales) for q in (a, b)]
    shared = [a.global_scale * (1.0 / rotation), b.global_scale]  # 1/n is a power of two: exact
    if not mx:
        recipe = [functional.ScalingType[kind.recipe], functional.ScalingType.TensorWise]
        swizzle = [functional.SwizzleType.SWIZZLE_32_4_4, functional.SwizzleType.NO_SWIZZLE]
        fp4 = [q.codes.view(torch.float4_e2m1fn_x2) for q in (a, b)]
        return functional.scaled_mm(
            fp4[0], fp4[1].t(), [scales[0], shared[0]], recipe, [scales[1], shared[1]], recipe, swizzle, swizzle,
            output_dtype=out,
        )  # fmt: skip
    values = [
        q.codes.view(torch.float4_e2m1fn_x2) if multiplies_mxfp4(q.codes.device) else decode.values_e4m3(q)
        for q in (a, b)
    ]
    product = _powers_of_two(values, scales, torch.float32)
    return (product * (shared[0] * shared[1])).to(out)


def _powers_of_two(values: list[Tensor], scales: list[Tensor], out: torch.dtype) -> Tensor:
    """A B^T of values (FP4 codes, or E4M3) under E8M0 block scales."""
    recipe, swizzle = functional.ScalingType.BlockWise1x32, functional.SwizzleType.SWIZZLE_32_4_4
    return functional.scaled_mm(
        values[0], values[1].t(), scales[0], recipe, scales[1], recipe, swizzle, swizzle, output_dtype=out
    )


@cache
def multiplies_mxfp4(device: torch.device) -> bool:
    """Whether this build of torch multiplies MXFP4 codes on `device`: one product of ones says."""
    codes = torch.full((128, 64), 0x22, dtype=torch.uint8, device=device).view(torch.float4_e2m1fn_x2)
    scales = torch.full((128 * 4,), 127, dtype=torch.uint8, device=device).view(_KINDS["e8m0"].scales)
    try:
        product = _powers_of_two([codes, codes], [scales, scales], torch.float32)
    except (RuntimeError, ValueError, NotImplementedError):
        return False
    return bool((product == 128.0).all())
