"""GEMMs on FP4 tensor cores (compute capability 10.0 and newer), through torch's `scaled_mm`.

NVFP4 x NVFP4 runs on codes. MXFP4 x MXFP4 does where this build of torch multiplies it, which one small product finds
out; elsewhere its codes go as E4M3 values, which hold them exactly, to the FP8 tensor cores, under the same scales.
Everything else (a plain operand, two formats, sizes that the instructions do not take) is multiplied as bf16 carriers,
and what bf16 does not hold, or stands beside codes, as sums of three bf16 terms (`terms`, `parted`). Scales of the
tensors, and the rotation's 1/n, multiply the fp32 sum.
torch has no form that adds to fp32 `into`: where `gemm` has none either, the product is written and added afterwards.

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
from fp4dist.kernels.cuda import decode, gemm, parts, quantizers, terms
from fp4dist.kernels.registry import NATIVE, Request
from fp4dist.kernels.triton import parted
from fp4dist.numerics.matmul import Operand, Single, check_product
from fp4dist.numerics.scales import divide
from fp4dist.numerics.tensor import BlockScaledTensor, PartedTensor
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
    return quantizers.why_not_values(request.spec)


def carrier_types(
    a: QuantSpec | None, b: QuantSpec | None, device: torch.device
) -> tuple[torch.dtype, torch.dtype] | None:
    """None where FP4 tensor cores read the codes of both slots; else bf16, if that holds what is quantized."""
    del device
    specs = [spec for spec in (a, b) if spec is not None]
    if not specs or not all(_has_bf16(spec) for spec in specs):
        return None
    both = len(specs) == 2 and all(map(_is_native, specs)) and specs[0].format == specs[1].format
    return None if both else (torch.bfloat16, torch.bfloat16)


def _is_native(spec: QuantSpec) -> bool:
    """Whether FP4 tensor cores have the format."""
    one_scale = spec.above in ("none", "tensor") and 0 not in spec.shape
    return spec.format.element == E2M1 and spec.format.scale.name in _KINDS and one_scale


def _has_bf16(spec: QuantSpec) -> bool:
    """Whether bf16 holds codes times their block scales, all else multiplying whole rows, or the tensor."""
    if spec.samples != 1 or spec.has_parts or isinstance(spec.above, tuple):
        return False
    element, scale = spec.format.element, spec.format.scale
    if scale.name == "fp32":
        return spec.shape[1] == 0 and _is_exact(element.levels)
    return scale.bf16_exact and element == E2M1


@cache
def _is_exact(levels: tuple[float, ...]) -> bool:
    exact = torch.tensor(levels, dtype=torch.float64)
    return torch.equal(exact.to(torch.bfloat16).double(), exact)


def matmul(a_MK: Operand, b_NK: Operand, *, out: torch.dtype = torch.float32, into: Tensor | None = None) -> Tensor:
    """A B^T; see `fp4dist.numerics.matmul`."""
    rotation = check_product(a_MK, b_NK, out, into)
    if not (isinstance(a_MK, BlockScaledTensor) and isinstance(b_NK, BlockScaledTensor) and takes(a_MK, b_NK)):
        if isinstance(a_MK, PartedTensor) or isinstance(b_NK, PartedTensor):
            return parted.matmul(a_MK, b_NK, matmul, out=out, into=into, split=parts.split_terms)
        pairs = [(x, y) for x in _draws(a_MK) for y in _draws(b_NK)]
        if len(pairs) == 1:
            left, right = _in_bf16(a_MK), _in_bf16(b_NK)
            quantized = not (isinstance(left, Tensor) and isinstance(right, Tensor))
            if quantized and (terms.is_wide(left) or terms.is_wide(right)):
                return terms.matmul(left, right, matmul, out=out, into=into)
            return numerics.matmul(left, right, out=out, into=into)
        total = matmul(*pairs[0])
        for x, y in pairs[1:]:
            total = matmul(x, y, into=total)
        total = divide(total, float(len(pairs)))
        return total.to(out) if into is None else into.add_(total)
    if into is not None and gemm.is_there(into.device) and gemm.takes([(a_MK, b_NK)], [into], out):
        return gemm.multiply([(a_MK, b_NK)], [into], [rotation])[0]
    product = _scaled(a_MK, b_NK, rotation, torch.float32 if into is not None else out)
    return product if into is None else into.add_(product)


def grouped_matmul(
    a: Sequence[Operand],
    b: Sequence[Operand],
    *,
    out: torch.dtype = torch.float32,
    into: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """In one launch where csrc/cutlass can (`gemm`); else one `matmul` a pair, as each has tensor scales of its own and
    `scaled_grouped_mm` has one pair for all groups.
    """
    sums = [None] * len(a) if into is None else into
    pairs = [
        (x, w)
        for x, w in zip(a, b, strict=True)
        if isinstance(x, BlockScaledTensor) and isinstance(w, BlockScaledTensor) and takes(x, w)
    ]
    added = [total for total in sums if total is not None]
    if len(a) == len(pairs) > 1 and len(added) in (0, len(a)) and gemm.is_there(pairs[0][0].codes.device):
        rotations = [check_product(*pair, out, total) for pair, total in zip(pairs, sums, strict=True)]
        if gemm.takes(pairs, added or None, out):
            return gemm.multiply(pairs, added or None, rotations)
    return [matmul(x, w, out=out, into=total) for x, w, total in zip(a, b, sums, strict=True)]


def takes(a: BlockScaledTensor, b: BlockScaledTensor) -> bool:
    """Whether FP4 tensor cores multiply these codes as they are."""
    codes = all(decode.why_not_codes(q) is None and q.block[1] == (16, 32)[_is_mx(q)] for q in (a, b))
    return codes and _is_mx(a) == _is_mx(b) and a.shape[1] % _COLUMNS == 0 and b.shape[0] % _ROWS == 0


def _is_mx(q: BlockScaledTensor) -> bool:
    return q.format.scale.name == "e8m0"


def _in_bf16(operand: Single) -> Single:
    """Codes that bf16 holds as their carrier; the others as they are."""
    if isinstance(operand, BlockScaledTensor):
        if operand.carrier is not None:
            return operand.carrier
        if quantizers.why_not_carrier(operand, torch.bfloat16) is None:
            return quantizers.to_carrier(operand, torch.bfloat16)
    return operand


def _draws(operand: Single) -> list[Single]:
    """Each sample alone, where there are several."""
    if not isinstance(operand, BlockScaledTensor) or operand.samples == 1:
        return [operand]
    return [operand.sample(i) for i in range(operand.samples)]


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
