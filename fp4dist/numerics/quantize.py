"""THE pipeline: rotate -> amax -> scale -> round -> pack, and back.

Every tensor is a matrix [R, C] whose last dimension the GEMM contracts. `reduce_max` turns a shard's statistics into
the logical tensor's (a MAX all-reduce, elementwise, over the ranks that hold its parts); without it the tensor is taken
to be whole. A block of fixed size is always whole on its rank, so only scales of rows and of the tensor ask for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fp4dist.numerics import codes as c
from fp4dist.numerics import rng, scales
from fp4dist.numerics.grouping import Grouping, ReduceMax, block_amax, blocked, flat, spread, tree_sum
from fp4dist.numerics.rotation import rotate, turned_back
from fp4dist.numerics.tensor import BlockScaledTensor, Key, PartedTensor, Quantized, unturned
from fp4dist.spec.blocks import BestOf, Ceil, Eden, Ema, Floor, FourOverSix, Hadamard, MseSearch, Nearest, Quest
from fp4dist.spec.recipe import QuantSpec


@torch.no_grad()  # how gradients pass a quantizer is the business of `fp4dist.nn`
def quantize(
    x_RC: Tensor,
    spec: QuantSpec,
    key: Key | None = None,
    reduce_max: ReduceMax | None = None,
    toward: Tensor | None = None,
) -> BlockScaledTensor:
    """Quantize a matrix along its last dimension.

    x_RC        [R, C] bf16 or fp32; R a multiple of the block's rows, C of its columns and of the rotation size
    key         required when the spec draws noise or fresh signs
    reduce_max  elementwise maximum over the shards of the logical tensor, of an fp32 tensor of any shape
    toward      [R, C] moving average of x, for a spec with ema rounding; None: that spec rounds to nearest even
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
    elif isinstance(spec.rule, BestOf):
        quantized = _best_of(x, spec, (1.0, *spec.rule.also), spec.rule.metric, key, grouping)
    elif isinstance(spec.rule, MseSearch):
        shrink = (1.0 - spec.rule.lowest) / spec.rule.steps
        quantized = _best_of(x, spec, [1.0 - i * shrink for i in range(spec.rule.steps + 1)], "mse", key, grouping)
    else:
        quantized = _plain(x, spec, key, grouping, _average(toward, spec, key, x.shape))
    return replace(quantized, rotation=spec.rotation.size if spec.rotation else 1)


@torch.no_grad()
def dequantize(q: Quantized) -> Tensor:
    """[R, C] fp32 values code * scale * global_scale / sqrt(rotation), in the rotated basis; of samples their mean.

    Of an operand in parts the sum of its parts.
    """
    if isinstance(q, PartedTensor):
        return q.plus_side(dequantize(q.main), scales.fp32(q.rotation**-0.5))
    factor = spread(q.global_scale * q.rotation**-0.5, q.shape)
    total = carrier(q.sample(0)) * factor
    for i in range(1, q.samples):
        total = total + carrier(q.sample(i)) * factor
    return total if q.samples == 1 else scales.divide(total, float(q.samples))


def requantize(
    q: Quantized, spec: QuantSpec, key: Key | None = None, reduce_max: ReduceMax | None = None
) -> BlockScaledTensor:
    """Quantize the transpose of `q`'s values: [R, C] codes -> [C, R] codes. `q` must not be rotated: see `original`."""
    if q.rotation != 1:
        raise ValueError(f"requantize needs codes in the original basis, got rotation {q.rotation}")
    return quantize(dequantize(q).t(), spec, key, reduce_max)


@torch.no_grad()
def original(q: Quantized, rotation: Hadamard | None, key: Key | None = None) -> Tensor:
    """[R, C] fp32 values of `q` turned back from the rotated basis that its codes are in.

    rotation   that basis: of the size that q was made with;  key   of its quantizer, for fresh signs
    """
    if q.rotation != (rotation.size if rotation is not None else 1):
        raise ValueError(f"codes are in a rotated basis of {q.rotation}, not in that of {rotation}")
    return dequantize(q) if rotation is None else turned_back(dequantize(unturned(q)), rotation, key)


def carrier(q: BlockScaledTensor) -> Tensor:
    """[R, C] fp32 code * scale, of one sample: exact, also in bf16, where the scale format says so."""
    decoded = c.decode_scale(q.scales, q.format.scale)
    return flat(blocked(c.decode_stored(q.codes, q.format.element), q.block) * decoded[:, None, :, None])


def _average(toward: Tensor | None, spec: QuantSpec, key: Key | None, shape: torch.Size) -> Tensor | None:
    """`toward` in the basis of the codes."""
    if toward is None:
        return None
    if not isinstance(spec.rounding, Ema):
        raise ValueError(f"{spec.label()} takes no moving average; leave `toward` out, or use rounding: ema")
    if toward.shape != shape:
        raise ValueError(f"the moving average {list(toward.shape)} must have the matrix's shape {list(shape)}")
    average = toward.to(torch.float32)
    return average if spec.rotation is None else rotate(average, spec.rotation, key)


def _plain(
    x: Tensor, spec: QuantSpec, key: Key | None, grouping: Grouping, toward: Tensor | None = None
) -> BlockScaledTensor:
    """One scale for each block from its amax or moments."""
    power = isinstance(spec.rule, (Floor, Ceil)) or (isinstance(spec.rule, Quest) and spec.format.scale.name == "e8m0")
    chosen = scales.power_of_two_scales(x, spec, grouping) if power else scales.ladder(x, spec, grouping).at()
    if isinstance(spec.rule, Floor):  # headroom acts after the scale is chosen
        headroom = scales.fp32(1.0 / spec.rule.headroom)
        x, toward = x * headroom, toward * headroom if toward is not None else None
    u = _scaled(x, chosen.multiplier, spec, grouping)
    if toward is not None:
        draws = [c.encode_toward(u, _scaled(toward, chosen.multiplier, spec, grouping), spec.format.element)]
    else:
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
    s_enc = s_dec = None
    if eden.align == "pre":
        s_enc, s_dec = scales.global_encode(grouping.outer_amax(a_b), eden.budget, v)
        wanted = scales.raw_scale(a_b, s_enc, v)
    else:
        wanted = scales.divide(a_b, v)
    found = _eden_codes(y, wanted, s_enc, spec, eden)
    if eden.four_over_six != "none":
        found = _smaller_error(y, found, _eden_codes(y, wanted * 1.5, s_enc, spec, eden), s_enc, spec, eden, grouping)
    corrected = found.scale * _correction(found, spec, eden)
    if s_dec is None:
        s_dec = scales.divide(grouping.outer_amax(corrected), eden.budget)
        corrected = corrected / torch.where(s_dec == 0, 1.0, s_dec)
        s_dec = torch.where(s_dec.isfinite(), torch.where(s_dec == 0, 1.0, s_dec), float("nan"))
    noise = rng.scale_noise(corrected.shape, key, spec.shape[1], y.device)
    scale_bytes = c.encode_e4m3_stochastic(corrected, noise)
    return BlockScaledTensor(c.pack(found.codes), scale_bytes, s_dec, spec.format, spec.shape)


class _Uncorrected(NamedTuple):
    """Nearest codes [R, C] of u [R, C] = y / (scale [R/br, C/bc] in units of the outer scale)."""

    u: Tensor
    codes: Tensor
    scale: Tensor


def _eden_codes(y: Tensor, wanted: Tensor, s_enc: Tensor | None, spec: QuantSpec, eden: Eden) -> _Uncorrected:
    """Codes under the `wanted` block scales: in E4M3 where there is an outer scale, else in fp32 or cut off there."""
    if s_enc is None:
        scale = _cut(wanted, eden.truncate)
        multiplier = scales.guarded_reciprocal(scale)
    else:
        scale_bytes = c.encode_e4m3(wanted)
        multiplier = scales.encode_multiplier(scale_bytes, s_enc, spec.format.scale)
        multiplier = torch.where(scale_bytes == 0, 0.0, multiplier)
        scale = c.decode_e4m3(scale_bytes)
    u = flat(blocked(y, spec.shape) * multiplier[:, None, :, None])
    return _Uncorrected(u, c.encode_nearest(u, spec.format.element), scale)


def _cut(scale: Tensor, mantissa: int) -> Tensor:
    """Fp32 `scale` with only its first `mantissa` bits of mantissa; 0: with all."""
    if mantissa == 0:
        return scale
    return (scale.view(torch.int32) & -(1 << 23 - mantissa)).view(torch.float32)


def _smaller_error(
    y: Tensor, a: _Uncorrected, b: _Uncorrected, s_enc: Tensor | None, spec: QuantSpec, eden: Eden, grouping: Grouping
) -> _Uncorrected:
    """Block by block the one with the smaller error before the correction; `a` on a tie, and where b's scale would
    saturate once corrected.
    """
    unit = torch.ones((), device=y.device) if s_enc is None else scales.divide(1.0, s_enc)

    def error(found: _Uncorrected) -> Tensor:
        values = c.decode(found.codes, spec.format.element) * spread(found.scale, y.shape) * unit
        return _block_error(y - values, eden.four_over_six, grouping)

    better = error(b) < error(a)
    if s_enc is not None:
        better &= b.scale * _correction(b, spec, eden) <= spec.format.scale.max
    wide = spread(better, y.shape)
    return _Uncorrected(
        torch.where(wide, b.u, a.u), torch.where(wide, b.codes, a.codes), torch.where(better, b.scale, a.scale)
    )


def _correction(found: _Uncorrected, spec: QuantSpec, eden: Eden) -> Tensor:
    """[R/br, C/bc] S = <u,u>/<u,c> of each block, or of its rotation's group; 1 where the denominator is 0."""
    group = spec.shape
    if eden.group == "rotation" and spec.rotation is not None:
        group = (1, spec.rotation.size)
    denominator = tree_sum(found.u * c.decode(found.codes, spec.format.element), group)
    s = tree_sum(found.u * found.u, group) / denominator
    return spread(torch.where(denominator == 0, 1.0, s), found.scale.shape)


def _round(u: Tensor, spec: QuantSpec, key: Key | None) -> Tensor:
    """[R, C] codes, one a byte."""
    if isinstance(spec.rounding, Ema):
        return c.encode_nearest(u, spec.format.element)
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
    if spec.has_parts:
        raise ValueError(f"{spec.label()} takes parts out: call numerics.splits.decompose, then quantize the rest")
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
