"""Scale rules: block statistics -> stored scale, multiplier into the element's range, global decode scale.

NVFP4 arithmetic, for any budget M and target v = 6 / headroom, each operation rounded in fp32 in this order:

    S_enc = min(M v / A, FLT_MAX)         A = amax of the logical tensor; S_enc = 1 where A is 0 or S_enc is 0
    s     = E4M3(min(a_b (S_enc (1/v)), 448))      (or UE5M3; e4m3_inverse keeps 1/s)
    enc   = min(1 / (s (1/S_enc)), FLT_MAX)
    value = code * s * (1/S_enc)

S_enc belongs to the tensor, or to each row or tile of it: what the outer level says. Without one it is 1.
With M = 448, v = 6 this is Transformer Engine's quantizer bit for bit. A non-finite A makes the global scale NaN, so
that every value decodes to NaN and the step is skipped instead of being trained on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fp4dist.numerics.codes import decode_e8m0, decode_scale, encode_scale
from fp4dist.numerics.grouping import Grouping, spread, tree_sum
from fp4dist.spec.blocks import AbsMax, BestOf, Ceil, Floor, FourOverSix, MseSearch, Quest, Sawb, ScaleRule
from fp4dist.spec.formats import ElementFormat, ScaleFormat
from fp4dist.spec.recipe import QuantSpec

FLT_MAX = float(np.finfo(np.float32).max)
FLT_MIN = float(np.finfo(np.float32).tiny)  # smallest normal number


QUEST_E2M1 = 0.4870798  # 2.92247856 / 6: the step that is best for N(0, 1) on E2M1
SAWB_INT4 = (12.1, 12.2)
SQRT2_MANTISSA = 0x3504F3  # of the largest fp32 below sqrt 2, the middle of two powers of two on a logarithmic axis


@dataclass(frozen=True, slots=True)
class BlockScales:
    """What a scale rule decides. u = x * multiplier.

    stored        [R/br, C/bc] bytes or fp32, as a BlockScaledTensor keeps them
    multiplier    [R/br, C/bc] fp32
    global_scale  [], or one for each row or tile
    """

    stored: Tensor
    multiplier: Tensor
    global_scale: Tensor


@dataclass(frozen=True, slots=True)
class ScaleLadder:
    """Scales before they are rounded: `at(stretch)` stores them, stretched.

    raw     [R/br, C/bc] decode scales in units of the outer scale
    s_enc   [] or [R/br, C/bc]: the encoder's outer factor; s_dec   [] or one for each row or tile: the decoder's
    """

    raw: Tensor
    s_enc: Tensor
    s_dec: Tensor
    format: ScaleFormat
    nonzero: bool = False

    def at(self, stretch: float = 1.0) -> BlockScales:
        """The scales times `stretch`, rounded as the format stores them."""
        stored = encode_scale(self.raw * stretch if stretch != 1 else self.raw, self.format)
        if self.nonzero:
            stored = stored.clamp(min=1)
        return BlockScales(stored, encode_multiplier(stored, self.s_enc, self.format), self.s_dec)


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


def root(x: Tensor) -> Tensor:
    """Square root of fp32, correctly rounded on every device: torch's own is not on CPUs (vector libraries)."""
    return x.double().sqrt().to(torch.float32)  # 53 bits are enough for the second rounding to be the right one


def _device(*values: Tensor | float) -> torch.device:
    return next(v.device for v in values if isinstance(v, Tensor))


def global_encode(amax: Tensor, budget: float, v: float) -> tuple[Tensor, Tensor]:
    """(S_enc, 1/S_enc) for an amax A of any shape; the second is the global decode scale, NaN where A is not finite."""
    s_enc = divide(fp32(fp32(budget) * v), amax).clamp(max=FLT_MAX)
    s_enc = torch.where((amax == 0) | (s_enc == 0), 1.0, s_enc)
    return s_enc, torch.where(amax.isfinite(), divide(1.0, s_enc), float("nan"))


def raw_scale(block_amax: Tensor, s_enc: Tensor, v: float) -> Tensor:
    """a_b (S_enc (1/v)): the block scale before it is rounded."""
    return block_amax * (s_enc * fp32(1.0 / v))


def encode_multiplier(stored: Tensor, s_enc: Tensor, scale: ScaleFormat) -> Tensor:
    """min(1 / (s (1/S_enc)), FLT_MAX) from the *rounded* scale."""
    return divide(1.0, decode_scale(stored, scale) * divide(1.0, s_enc)).clamp(max=FLT_MAX)


def ladder(x: Tensor, spec: QuantSpec, grouping: Grouping) -> ScaleLadder:
    """The scales that a rule other than a power of two wants for [R, C] `x`."""
    rule = spec.rule
    if isinstance(rule, (Quest, Sawb)):
        return _ladder_of_steps(_steps(x, spec, rule, grouping), spec, grouping)
    assert isinstance(rule, (AbsMax, FourOverSix, BestOf, MseSearch))
    v = target_max(spec.format.element.max, getattr(rule, "headroom", 1.0))
    a_b = grouping.amax(x)
    if not spec.format.scale.needs_range:
        return _ladder_of_steps(divide(a_b, v), spec, grouping)
    nonzero = isinstance(rule, AbsMax) and rule.nonzero
    if spec.above == "none":
        one = torch.ones((), device=x.device)
        raw = torch.where(a_b.isfinite(), raw_scale(a_b, one, v), float("nan"))
        return ScaleLadder(raw, one, one, spec.format.scale, nonzero)
    s_enc, s_dec = global_encode(grouping.outer_amax(a_b), rule.budget, v)
    s_enc = spread(s_enc, a_b.shape)
    return ScaleLadder(raw_scale(a_b, s_enc, v), s_enc, s_dec, spec.format.scale, nonzero)


def _ladder_of_steps(step: Tensor, spec: QuantSpec, grouping: Grouping) -> ScaleLadder:
    """From the size of one step of the grid: kept in fp32 (1 where it is 0), or relative to the largest."""
    one = torch.ones((), device=step.device)
    if spec.format.scale.name == "fp32":
        kept = torch.where(step == 0, 1.0, torch.where(step.isfinite(), step, float("nan")))
        return ScaleLadder(kept, one, one, spec.format.scale)
    assert isinstance(spec.rule, Quest)
    if spec.above == "none":
        return ScaleLadder(step, one, one, spec.format.scale)
    s_enc, s_dec = global_encode(grouping.outer_amax(step), spec.rule.budget, 1.0)
    s_enc = spread(s_enc, step.shape)
    return ScaleLadder(step * s_enc, s_enc, s_dec, spec.format.scale)


def _steps(x: Tensor, spec: QuantSpec, rule: Quest | Sawb, grouping: Grouping) -> Tensor:
    """[R/br, C/bc] size of one step of the grid, from the moments of each block."""
    amax, n = grouping.amax(x), float(grouping.count())
    unit = decode_e8m0(_power_below(amax))
    if isinstance(rule, Sawb):
        c1, c2 = SAWB_INT4 if rule.rms is None or rule.mean_abs is None else (rule.rms, rule.mean_abs)
        squares, magnitudes = grouping.moments(x, unit)
        clip = (root(divide(squares, n)) * fp32(c1) - divide(magnitudes, n) * fp32(c2)) * unit
        return divide(torch.where(clip > 0, clip, amax), spec.format.element.max)
    x = x * spread(divide(1.0, unit), x.shape)  # exact, and squares neither overflow nor vanish
    if rule.spread == "std":
        x = x - spread(divide(tree_sum(x, grouping.block), n), x.shape)
    factor = fp32(QUEST_E2M1 if rule.factor is None else rule.factor)
    return root(divide(grouping.total(x * x), n)) * factor * unit


def _power_below(positive: Tensor) -> Tensor:
    """uint8 exponent + 127 of 2^floor(log2 positive); 255 where it is not finite."""
    return ((positive.view(torch.int32) >> 23) & 0xFF).to(torch.uint8)


def power_of_two_scales(x: Tensor, spec: QuantSpec, grouping: Grouping) -> BlockScales:
    """Power-of-two scales, from exponent and mantissa bits; as E8M0 bytes or in fp32.

    floor: 2^(floor(log2 a) - e) with e the exponent of the element's maximum m; ceil: 2^ceil(log2(a / m)), one more
    exactly where a's mantissa exceeds m's, or 2^ceil(log2 a) and 1/m for all; quest: the power below its
    step or nearest to it.
    A non-finite block gives NaN (byte 255).
    """
    rule, element = spec.rule, spec.format.element
    found = _steps(x, spec, rule, grouping) + 1e-8 if isinstance(rule, Quest) else grouping.amax(x)
    byte = _exponent_byte(found, rule, element)
    if isinstance(rule, Ceil) and rule.finer_below:
        share = found * divide(1.0, decode_e8m0(byte))
        byte = byte - ((share < fp32(rule.finer_below)) & (byte > 0)).to(torch.uint8)
    scale = decode_e8m0(byte)
    multiplier, common = divide(1.0, scale), 1.0
    if isinstance(rule, Floor):
        common = fp32(rule.headroom)
    elif isinstance(rule, Ceil) and rule.of == "amax":
        multiplier, common = multiplier * element.max, fp32(1.0 / element.max)
    stored = byte if spec.format.scale.name == "e8m0" else scale
    return BlockScales(stored, multiplier.clamp(max=FLT_MAX), torch.full((), common, device=x.device))


def _exponent_byte(found: Tensor, rule: ScaleRule, element: ElementFormat) -> Tensor:
    """uint8 exponent + 127 of the power of two that `rule` takes for a block's amax or step."""
    bits = found.view(torch.int32)
    exponent, mantissa = (bits >> 23) & 0xFF, bits & 0x7FFFFF
    byte = exponent
    if isinstance(rule, Quest):
        if rule.power == "nearest":
            byte = byte + (mantissa > SQRT2_MANTISSA).to(torch.int32)
    elif isinstance(rule, Ceil) and rule.of == "amax":
        byte = byte + (mantissa > 0).to(torch.int32)
    else:
        byte = byte - element.exponent
        if isinstance(rule, Ceil):
            top = int(np.float32(element.max).view(np.int32)) & 0x7FFFFF
            byte = byte + (mantissa > top).to(torch.int32)
    return torch.where(exponent == 255, 255, byte.clamp(0, 254)).to(torch.uint8)


def guarded_reciprocal(d: Tensor) -> Tensor:
    """1/d, and 0 where d is 0 or subnormal: a flushed divisor must not become inf and then NaN."""
    return torch.where(d.abs() < FLT_MIN, 0.0, divide(1.0, d))
