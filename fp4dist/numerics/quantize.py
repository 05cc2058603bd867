"""THE pipeline: rotate -> amax -> scale -> round -> pack, and back.

Every tensor is a matrix [R, C] whose last dimension the GEMM contracts. `reduce_max` turns a shard's statistics into
the logical tensor's (a MAX all-reduce, elementwise, over the ranks that hold its parts); without it the tensor is taken
to be whole. A block of fixed size is always whole on its rank, so only scales of rows and of the tensor ask for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fp4dist.numerics import codes as c
from fp4dist.numerics import rng, scales
from fp4dist.numerics.grouping import Grouping, ReduceMax, block_amax, blocked, flat, spread, tree_sum
from fp4dist.numerics.rotation import rotate
from fp4dist.numerics.tensor import BlockScaledTensor, Key
from fp4dist.spec.blocks import Ceil, Eden, Floor, FourOverSix, MseSearch, Nearest, Quest
from fp4dist.spec.recipe import QuantSpec


@torch.no_grad()  # how gradients pass a quantizer is the business of `fp4dist.nn`
def quantize(
    x_RC: Tensor, spec: QuantSpec, key: Key | None = None, reduce_max: ReduceMax | None = None
) -> BlockScaledTensor:
    """Quantize a matrix along its last dimension.

    x_RC        [R, C] bf16 or fp32; R a multiple of the block's rows, C of its columns and of the rotation size
    key         required when the spec draws noise or fresh signs
    reduce_max  elementwise maximum over the shards of the logical tensor, of an fp32 tensor of any shape
    returns     codes, scales and global_scale as BlockScaledTensor describes them

    Guarantee: nearest rounding is within half a step of the element grid times the block's scale unless it saturates;
    stochastic rounding has E[value] = x for every x inside the block's range; a NaN or Inf makes every value NaN
    (per block for formats without a tensor scale).
    """
    _check(x_RC, spec, key)
    x = x_RC.to(torch.float32)
    if spec.rotation is not None:
        x = rotate(x, spec.rotation, key)
    grouping = Grouping.of(x, spec, key, reduce_max)
    if isinstance(spec.rounding, Eden):
        quantized = _eden(x, spec, spec.rounding, _needed(key), grouping)
    elif isinstance(spec.rule, FourOverSix):
        quantized = _best_of(x, spec, (1.0, 1.5), spec.rule.metric, key, grouping)  # s4 = E4M3(1.5 a_b / (6 g))
    elif isinstance(spec.rule, MseSearch):
        shrink = (1.0 - spec.rule.lowest) / spec.rule.steps
        quantized = _best_of(x, spec, [1.0 - i * shrink for i in range(spec.rule.steps + 1)], "mse", key, grouping)
    else:
        quantized = _plain(x, spec, key, grouping)
    return replace(quantized, rotation=spec.rotation.size if spec.rotation else 1)


@torch.no_grad()
def dequantize(q: BlockScaledTensor) -> Tensor:
    """[R, C] fp32 values code * scale * global_scale / sqrt(rotation), in the rotated basis; of samples their mean."""
    factor = spread(q.global_scale * q.rotation**-0.5, q.shape)
    total = carrier(q.sample(0)) * factor
    for i in range(1, q.samples):
        total = total + carrier(q.sample(i)) * factor
    return total if q.samples == 1 else scales.divide(total, float(q.samples))


def requantize(
    q: BlockScaledTensor, spec: QuantSpec, key: Key | None = None, reduce_max: ReduceMax | None = None
) -> BlockScaledTensor:
    """Quantize the transpose of `q`'s values: [R, C] codes -> [C, R] codes. `q` must not be rotated."""
    if q.rotation != 1:
        raise ValueError(f"requantize needs codes in the original basis, got rotation {q.rotation}")
    return quantize(dequantize(q).t(), spec, key, reduce_max)


def carrier(q: BlockScaledTensor) -> Tensor:
    """[R, C] fp32 code * scale, of one sample: exact, also in bf16, where the scale format says so."""
    decoded = c.decode_scale(q.scales, q.format.scale)
    return flat(blocked(c.decode_stored(q.codes, q.format.element), q.block) * decoded[:, None, :, None])


def _plain(x: Tensor, spec: QuantSpec, key: Key | None, grouping: Grouping) -> BlockScaledTensor:
    """One scale for each block from its amax or moments."""
    power = isinstance(spec.rule, (Floor, Ceil)) or (isinstance(spec.rule, Quest) and spec.format.scale.name == "e8m0")
    chosen = scales.power_of_two_scales(x, spec, grouping) if power else scales.ladder(x, spec, grouping).at()
    if isinstance(spec.rule, Floor):  # headroom acts after the scale is chosen
        x = x * scales.fp32(1.0 / spec.rule.headroom)
    u = _scaled(x, chosen.multiplier, spec, grouping)
    draws = [_round(u, spec, key and key.sample(i)) for i in range(spec.samples)]
    codes = c.stored(draws[0] if len(draws) == 1 else torch.cat(draws, dim=1), spec.format.element)
    return BlockScaledTensor(
        codes, chosen.stored, chosen.global_scale, spec.format, grouping.block, samples=spec.samples
    )


def _best_of(
    x: Tensor, spec: QuantSpec, stretches: Sequence[float], metric: str, key: Key | None, grouping: Grouping
) -> BlockScaledTensor:
    """Quantize with the scale times each of `stretches`, keep for each block what has strictly less error than all
    before. Under noise (two stretches at most) the draws are independent.
    """
    ladder = scales.ladder(x, spec, grouping)
    unit = scales.divide(1.0, ladder.s_enc)  # finite where the outer scale is not
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for i, stretch in enumerate(stretches):
        chosen = ladder.at(stretch)
        codes = _round(_scaled(x, chosen.multiplier, spec, grouping), spec, key and (key.second_try() if i else key))
        stored = c.stored(codes, spec.format.element)
        tried = BlockScaledTensor(stored, chosen.stored, unit, spec.format, grouping.block)
        error = _block_error(x - carrier(tried) * spread(unit, x.shape), metric, grouping)
        if best is None:
            best = codes, chosen.stored, error
            continue
        better = error < best[2]
        best = (
            torch.where(spread(better, x.shape), codes, best[0]),
            torch.where(better, chosen.stored, best[1]),
            torch.where(better, error, best[2]),
        )
    assert best is not None
    return BlockScaledTensor(c.stored(best[0], spec.format.element), best[1], ladder.s_dec, spec.format, grouping.block)


def _block_error(difference: Tensor, metric: str, grouping: Grouping) -> Tensor:
    """[R/br, C/bc] error of each block on the unscaled values."""
    if metric == "mse":
        return grouping.total(difference * difference)
    if metric == "mae":
        return grouping.total(difference.abs())
    return grouping.amax(difference)


def _eden(y: Tensor, spec: QuantSpec, eden: Eden, key: Key, grouping: Grouping) -> BlockScaledTensor:
    """Nearest codes, then the block scale times S = <u,u>/<u,c>, rounded stochastically in E4M3 (arXiv:2601.22813)."""
    v = scales.target_max(spec.format.element.max, eden.headroom)
    a_b = block_amax(y, spec.shape)
    if eden.align == "pre":
        s_enc, s_dec = scales.global_encode(grouping.outer_amax(a_b), eden.budget, v)
        scale_bytes = c.encode_e4m3(scales.raw_scale(a_b, s_enc, v))
        multiplier = scales.encode_multiplier(scale_bytes, s_enc, spec.format.scale)
        multiplier = torch.where(scale_bytes == 0, 0.0, multiplier)
        u = flat(blocked(y, spec.shape) * multiplier[:, None, :, None])
        relative_scale = c.decode_e4m3(scale_bytes)
    else:
        s_dec = None
        q = scales.divide(a_b, v)
        u = flat(blocked(y, spec.shape) * scales.guarded_reciprocal(q)[:, None, :, None])
        relative_scale = q
    codes = c.encode_nearest(u, spec.format.element)
    corrected = relative_scale * _correction(u, codes, spec)
    if s_dec is None:
        s_dec = scales.divide(grouping.outer_amax(corrected), eden.budget)
        corrected = corrected / torch.where(s_dec == 0, 1.0, s_dec)
        s_dec = torch.where(s_dec.isfinite(), torch.where(s_dec == 0, 1.0, s_dec), float("nan"))
    noise = rng.scale_noise(corrected.shape, key, spec.shape[1], y.device)
    scale_bytes = c.encode_e4m3_stochastic(corrected, noise)
    return BlockScaledTensor(c.pack(codes), scale_bytes, s_dec, spec.format, spec.shape)


def _correction(u: Tensor, codes: Tensor, spec: QuantSpec) -> Tensor:
    """S = <u,u>/<u,c> of each block; 1 where the denominator is 0."""
    denominator = tree_sum(u * c.decode(codes, spec.format.element), spec.shape)
    s = tree_sum(u * u, spec.shape) / denominator
    return torch.where(denominator == 0, 1.0, s)


def _round(u: Tensor, spec: QuantSpec, key: Key | None) -> Tensor:
    """[R, C] codes, one a byte."""
    if isinstance(spec.rounding, Nearest):
        return c.encode_nearest(u, spec.format.element, spec.rounding.ties)
    noise = rng.element_noise(u.shape, _needed(key), u.device)
    return c.encode_stochastic(u, spec.format.element, noise)


def _scaled(x: Tensor, multiplier: Tensor, spec: QuantSpec, grouping: Grouping) -> Tensor:
    limit = spec.format.element.max
    return flat((blocked(x, grouping.block) * multiplier[:, None, :, None]).clamp_(-limit, limit))


def _needed(key: Key | None) -> Key:
    if key is None:
        raise ValueError("this spec draws noise: pass a key")
    return key


def _check(x: Tensor, spec: QuantSpec, key: Key | None) -> None:
    rows = spec.rows_multiple
    if x.dim() != 2:
        raise ValueError(f"expected a matrix [R, C], got shape {list(x.shape)}; flatten the leading dimensions")
    if x.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"expected bf16 or fp32, got {x.dtype}")
    if x.shape[0] % rows or x.shape[1] % spec.columns_multiple or x.numel() == 0:
        raise ValueError(
            f"shape {list(x.shape)} does not fit {spec.label()}: rows must be a multiple of {rows},"
            f" columns of {spec.columns_multiple}, and neither may be 0"
        )
    if spec.draws_noise:
        _needed(key)
