"""How a gradient passes a quantizer: the factor of each element, and the gradient of a learned amax.

Both follow from u, the scaled value that the quantizer rounds, in the codes' (possibly rotated) basis. It is made again
from the matrix and the scales that the quantizer has stored, so whichever backend quantized, and whichever rule chose
between scales, the judgement is about what has happened.

With M the factor (trust mask, or the slope of the differentiable estimator) and H the rotation of the quantizer:

    dL/dx = H^-1 (M * (H dL/dQ(x)))
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fp4dist.numerics import codes as c
from fp4dist.numerics import scales
from fp4dist.numerics.grouping import spread
from fp4dist.numerics.quantize import dequantize
from fp4dist.numerics.rotation import filtered, rotate
from fp4dist.numerics.tensor import BlockScaledTensor, Key
from fp4dist.spec.blocks import Ceil, Floor, Hadamard
from fp4dist.spec.estimators import Dge
from fp4dist.spec.formats import ElementFormat
from fp4dist.spec.operand import QuantSpec


def scaled(x_RC: Tensor, stored: Tensor, global_scale: Tensor, spec: QuantSpec, key: Key | None) -> Tensor:
    """[R, C] fp32 u of `x`, before saturation: the very value that gave its code, in the codes' basis.

    x_RC                   [R, C] bf16 or fp32, in the original basis
    stored, global_scale   the scales of its BlockScaledTensor under `spec` (any rounding but eden)
    key                    that of the quantizer; needed for a rotation with fresh signs alone
    """
    x = x_RC.to(torch.float32)
    if spec.rotation is not None:
        x = rotate(x, spec.rotation, key)
    decoded = c.decode_scale(stored, spec.format.scale)
    if isinstance(spec.rule, Floor):
        x, multiplier = x * scales.fp32(1.0 / spec.rule.headroom), scales.divide(1.0, decoded)
    elif isinstance(spec.rule, Ceil) and spec.rule.of == "amax":
        multiplier = scales.divide(1.0, decoded) * spec.format.element.max
    else:
        multiplier = scales.divide(1.0, decoded * spread(global_scale, decoded.shape))
    return x * spread(multiplier.clamp(max=scales.FLT_MAX), x.shape)


def mask(x_RC: Tensor, stored: Tensor, global_scale: Tensor, spec: QuantSpec, key: Key | None) -> Tensor:
    """[R, ceil(C / 8)] packed bits: where the quantizer of `x` did not clip. Arguments as for `scaled`."""
    return pack_bits(inside(scaled(x_RC, stored, global_scale, spec, key), spec.format.element))


def filter_by_mask(gradient_RC: Tensor, kept: Tensor, rotation: Hadamard | None, key: Key | None) -> Tensor:
    """[R, C] H^-1 (M * (H g)) in g's dtype, bf16 or fp32, rounded once from fp32.

    kept   [R, ceil(C / 8)] packed bits M;  rotation, key   of the quantizer
    """
    factor = unpack_bits(kept, gradient_RC.shape[1]).to(torch.float32)
    return filtered(gradient_RC, factor, rotation, key).to(gradient_RC.dtype)


def filter_by_scales(
    gradient_RC: Tensor, x_RC: Tensor, stored: Tensor, global_scale: Tensor, spec: QuantSpec, key: Key | None
) -> Tensor:
    """`filter_by_mask` with the mask of `x_RC`, which is made again from the scales of its codes (`scaled`)."""
    factor = inside(scaled(x_RC, stored, global_scale, spec, key), spec.format.element).to(torch.float32)
    return filtered(gradient_RC, factor, spec.rotation, key).to(gradient_RC.dtype)


def rows(q: BlockScaledTensor, first: int, last: int) -> BlockScaledTensor:
    """Rows first to last of `q`, with scales for each row of its own (block rows 1), or the one of the tensor."""
    count = q.shape[0]
    parts = {}
    for name in ("scales", "global_scale"):
        value = getattr(q, name)
        if value.dim() == 2 and value.shape[0] > 1:
            value = value.repeat_interleave(count // value.shape[0], 0)[first:last]
        parts[name] = value
    several = q.scales.shape[0] > 1
    block = (1, q.block[1]) if several else (last - first, q.block[1])
    return replace(q, codes=q.codes[first:last], block=block, carrier=None, inside=None, **parts)


def inside(u: Tensor, element: ElementFormat) -> Tensor:
    """Bool, shape of u: whether the quantizer did not clip; a value at the end of the grid has not been clipped."""
    return u.abs() <= element.max


def slope(u: Tensor, element: ElementFormat, dge: Dge) -> Tensor:
    """fp32, shape of u: min(|2 (z - l) / d - 1|^(1/k - 1) / k, cap); 0 beyond the grid (arXiv:2501.17116).

    On a level it is 1/k, in the middle of a bin the cap. It is computed in fp64 and rounded once: powers of fp32
    differ between devices.
    """
    magnitude = u.abs().to(torch.float64)
    levels = torch.tensor(element.levels, dtype=torch.float64, device=u.device)
    upper = torch.bucketize(magnitude, levels[1:-1], right=True) + 1
    low, high = levels[upper - 1], levels[upper]
    offset = (2.0 * (magnitude - low) / (high - low) - 1.0).abs()
    found = (offset.pow(1.0 / dge.k - 1.0) / dge.k).clamp(max=dge.cap)
    return torch.where(inside(u, element), found, 0.0).to(torch.float32)


def amax_direction(u: Tensor, q: BlockScaledTensor) -> Tensor:
    """[R, C] fp32 d Q(x) / d log(amax) in the normalized basis of q's values, for one scale of the whole tensor.

    Q = s r(u), s proportional to the amax: s (r(u) - u) inside the grid, s r(u) where it clips (LSQ,
    arXiv:1902.08153). Its further factor 1 / sqrt(N Qp) belongs to SGD: AdamW's step does not depend on it.
    """
    values = dequantize(q)
    step = spread(c.decode_scale(q.scales, q.format.scale), q.shape) * q.global_scale * q.rotation**-0.5
    return torch.where(inside(u, q.format.element), values - u * step, values)


def pack_bits(mask: Tensor) -> Tensor:
    """Bool [R, C] -> uint8 [R, ceil(C / 8)], element 8j in the lowest bit."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[1] % 8))
    weights = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=mask.device)
    return (padded.unflatten(1, (-1, 8)) * weights).sum(2, dtype=torch.uint8)


def unpack_bits(bits: Tensor, columns: int) -> Tensor:
    """Inverse of `pack_bits`: bool [R, columns]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, :, None] >> shifts) & 1).flatten(1)[:, :columns].to(torch.bool)
