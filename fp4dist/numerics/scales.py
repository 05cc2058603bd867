"""Scale rules: block amax -> stored scale byte, multiplier into the element's range, global decode scale.

NVFP4 arithmetic, for any budget M and target v = 6 / headroom, each operation rounded in fp32 in this order:

    S_enc = min(M v / A, FLT_MAX)         A = amax of the logical tensor; S_enc = 1 where A is 0 or S_enc is 0
    s     = E4M3(min(a_b (S_enc (1/v)), 448))
    enc   = min(1 / (s (1/S_enc)), FLT_MAX)
    value = code * s * (1/S_enc)

With M = 448, v = 6 this is Transformer Engine's quantizer bit for bit. A non-finite A makes the global scale NaN, so
that every value decodes to NaN and the step is skipped instead of being trained on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fp4dist.numerics.codes import decode_e4m3, decode_e8m0, encode_e4m3
from fp4dist.spec.blocks import Ceil, Floor

FLT_MAX = float(np.finfo(np.float32).max)
FLT_MIN = float(np.finfo(np.float32).tiny)  # smallest normal number


@dataclass(frozen=True, slots=True)
class BlockScales:
    """What a scale rule decides. bytes, multiplier: [R/br, C/bc]; global_scale: []. u = x * multiplier."""

    bytes: Tensor
    multiplier: Tensor
    global_scale: Tensor


def fp32(value: float) -> float:
    """`value` rounded to fp32, as a Python float."""
    return float(np.float32(value))


def target_max(element_max: float, headroom: float) -> float:
    """v: what a block's amax maps to, in fp32."""
    return fp32(element_max / headroom)


def divide(a: Tensor | float, b: Tensor | float) -> Tensor:
    """A / b, correctly rounded in fp32 on every device. One of them is a tensor.

    torch computes `number / tensor` as number * reciprocal and, on CUDA, `tensor / number` as tensor * (1 / number):
    both round twice. Dividing two device tensors does not.
    """
    a, b = (v if isinstance(v, Tensor) else torch.full((), v, device=_device(a, b)) for v in (a, b))
    return a / b


def _device(*values: Tensor | float) -> torch.device:
    return next(v.device for v in values if isinstance(v, Tensor))


def global_encode(amax: Tensor, budget: float, v: float) -> tuple[Tensor, Tensor]:
    """(S_enc, 1/S_enc) of a tensor with amax A []; the second is the global decode scale, NaN when A is not finite."""
    s_enc = divide(fp32(fp32(budget) * v), amax).clamp(max=FLT_MAX)
    s_enc = torch.where((amax == 0) | (s_enc == 0), 1.0, s_enc)
    return s_enc, torch.where(amax.isfinite(), divide(1.0, s_enc), float("nan"))


def raw_e4m3_scale(block_amax: Tensor, s_enc: Tensor, v: float) -> Tensor:
    """a_b (S_enc (1/v)): the block scale before it is rounded to E4M3."""
    return block_amax * (s_enc * fp32(1.0 / v))


def encode_multiplier(scale_bytes: Tensor, s_enc: Tensor) -> Tensor:
    """min(1 / (s (1/S_enc)), FLT_MAX) from the *rounded* scale."""
    return divide(1.0, decode_e4m3(scale_bytes) * divide(1.0, s_enc)).clamp(max=FLT_MAX)


def e4m3_scales(block_amax: Tensor, amax: Tensor, budget: float, v: float) -> BlockScales:
    """Two-level scales: E4M3 for each block, one fp32 for the tensor."""
    s_enc, s_dec = global_encode(amax, budget, v)
    scale_bytes = encode_e4m3(raw_e4m3_scale(block_amax, s_enc, v))
    return BlockScales(scale_bytes, encode_multiplier(scale_bytes, s_enc), s_dec)


def e8m0_scales(block_amax: Tensor, rule: Floor | Ceil) -> BlockScales:
    """Power-of-two scales from the exponent and mantissa bits of the block amax.

    floor: 2^(floor(log2 a) - 2); ceil: 2^ceil(log2(a / 6)), one more exactly where a's mantissa exceeds 1.5.
    A non-finite amax gives the byte 255 (NaN).
    """
    bits = block_amax.view(torch.int32)
    exponent = bits >> 23
    byte = exponent - 2
    if isinstance(rule, Ceil):
        byte = byte + ((bits & 0x7FFFFF) > 0x400000).to(torch.int32)
    byte = torch.where(exponent == 255, 255, byte.clamp(0, 254)).to(torch.uint8)
    headroom = fp32(rule.headroom) if isinstance(rule, Floor) else 1.0
    return BlockScales(byte, divide(1.0, decode_e8m0(byte)), torch.full((), headroom, device=block_amax.device))


def guarded_reciprocal(d: Tensor) -> Tensor:
    """1/d, and 0 where d is 0 or subnormal: a flushed divisor must not become inf and then NaN."""
    return torch.where(d.abs() < FLT_MIN, 0.0, divide(1.0, d))
