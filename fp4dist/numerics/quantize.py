"""THE pipeline: rotate -> amax -> scale -> round -> pack, and back.

Every tensor is a matrix [R, C] whose last dimension the GEMM contracts. `reduce_max` turns a shard's amax into the
logical tensor's (a MAX all-reduce over the tensor-parallel group); without it the tensor is taken to be whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fp4dist.numerics import codes as c
from fp4dist.numerics import rng, scales
from fp4dist.numerics.rotation import rotate
from fp4dist.numerics.tensor import BlockScaledTensor, Key
from fp4dist.spec.blocks import AbsMax, Eden, Floor, FourOverSix, Nearest
from fp4dist.spec.recipe import QuantSpec

ReduceMax = Callable[[Tensor], Tensor]


@torch.no_grad()  # how gradients pass a quantizer is the business of `fp4dist.nn`
def quantize(
    x_RC: Tensor, spec: QuantSpec, key: Key | None = None, reduce_max: ReduceMax | None = None
) -> BlockScaledTensor:
    """Quantize a matrix along its last dimension.

    x_RC        [R, C] bf16 or fp32; R a multiple of the block's rows, C of its columns and of the rotation size
    key         required when the spec draws noise or fresh signs
    reduce_max  maps the shard's amax ([] fp32) to the logical tensor's
    returns     codes [R, C/2], scales [R/br, C/bc], global_scale []

    Guarantee: nearest rounding is within half a step of the element grid times the block's scale unless it saturates;
    stochastic rounding has E[value] = x for every x inside the block's range; a NaN or Inf makes every value NaN
    (per block for formats without a tensor scale).
    """
    _check(x_RC, spec, key)
    x = x_RC.to(torch.float32)
    if spec.rotation is not None:
        x = rotate(x, spec.rotation, key)
    if isinstance(spec.rounding, Eden):
        quantized = _eden(x, spec, spec.rounding, _needed(key), reduce_max)
    elif isinstance(spec.rule, FourOverSix):
        quantized = _four_over_six(x, spec, spec.rule, key, reduce_max)
    else:
        quantized = _plain(x, spec, key, reduce_max)
    return replace(quantized, rotation=spec.rotation.size if spec.rotation else 1)


def dequantize(q: BlockScaledTensor) -> Tensor:
    """[R, C] fp32 values code * scale * global_scale / sqrt(rotation), in the rotated basis."""
    return carrier(q) * (q.global_scale * q.rotation**-0.5)


def requantize(
    q: BlockScaledTensor, spec: QuantSpec, key: Key | None = None, reduce_max: ReduceMax | None = None
) -> BlockScaledTensor:
    """Quantize the transpose of `q`'s values: [R, C] codes -> [C, R] codes. `q` must not be rotated."""
    if q.rotation != 1:
        raise ValueError(f"requantize needs codes in the original basis, got rotation {q.rotation}")
    return quantize(dequantize(q).t(), spec, key, reduce_max)


def carrier(q: BlockScaledTensor) -> Tensor:
    """[R, C] fp32 code * scale: exact, also in bf16 (E2M1 x E4M3 has at most 6 significant bits)."""
    decode = c.decode_e4m3 if q.format.scale.name == "e4m3" else c.decode_e8m0
    blocks = _blocked(c.decode_packed(q.codes, q.format.element), q.block)
    return _flat(blocks * decode(q.scales)[:, None, :, None])


def block_amax(x: Tensor, block: tuple[int, int]) -> Tensor:
    """[R, C] -> [R/br, C/bc] max |x| of each block."""
    return _blocked(x.abs(), block).amax(dim=(1, 3))


def tree_sum(x: Tensor, block: tuple[int, int]) -> Tensor:
    """[R, C] -> [R/br, C/bc] sums over blocks: adjacent pairs, columns before rows, so every backend rounds alike."""
    blocks = _blocked(x, block)
    while blocks.shape[3] > 1:
        blocks = blocks[..., 0::2] + blocks[..., 1::2]
    while blocks.shape[1] > 1:
        blocks = blocks[:, 0::2] + blocks[:, 1::2]
    return blocks[:, 0, :, 0]


def _plain(x: Tensor, spec: QuantSpec, key: Key | None, reduce_max: ReduceMax | None) -> BlockScaledTensor:
    """One scale for each block from its amax."""
    a_b = block_amax(x, spec.shape)
    if isinstance(spec.rule, AbsMax):
        v = scales.target_max(spec.format.element.max, spec.rule.headroom)
        chosen = scales.e4m3_scales(a_b, _logical_amax(a_b, reduce_max), spec.rule.budget, v)
    else:
        chosen = scales.e8m0_scales(a_b, spec.rule)  # type: ignore[arg-type] (FourOverSix went elsewhere)
        if isinstance(spec.rule, Floor):  # headroom acts after the scale is chosen
            x = x * scales.fp32(1.0 / spec.rule.headroom)
    codes = _round(_scaled(x, chosen.multiplier, spec), spec, key)
    return BlockScaledTensor(c.pack(codes), chosen.bytes, chosen.global_scale, spec.format, spec.shape)


def _four_over_six(
    x: Tensor, spec: QuantSpec, rule: FourOverSix, key: Key | None, reduce_max: ReduceMax | None
) -> BlockScaledTensor:
    """Quantize with amax -> 6 and with amax -> 4, keep for each block what has strictly less error (a tie keeps 6)."""
    v = scales.target_max(spec.format.element.max, rule.headroom)
    a_b = block_amax(x, spec.shape)
    s_enc, s_dec = scales.global_encode(_logical_amax(a_b, reduce_max), rule.budget, v)
    raw = scales.raw_e4m3_scale(a_b, s_enc, v)
    tries = []
    for stretch, draw in ((1.0, key), (1.5, key and key.second_try())):  # s4 = E4M3(1.5 a_b / (6 g))
        scale_bytes = c.encode_e4m3(raw * stretch)
        codes = _round(_scaled(x, scales.encode_multiplier(scale_bytes, s_enc), spec), spec, draw)
        tried = BlockScaledTensor(c.pack(codes), scale_bytes, scales.divide(1.0, s_enc), spec.format, spec.shape)
        tries.append((codes, scale_bytes, _block_error(x, tried, rule)))
    (codes6, bytes6, error6), (codes4, bytes4, error4) = tries
    four = error4 < error6
    wide = _flat(four[:, None, :, None].expand(-1, spec.shape[0], -1, spec.shape[1]))
    codes = torch.where(wide, codes4, codes6)
    return BlockScaledTensor(c.pack(codes), torch.where(four, bytes4, bytes6), s_dec, spec.format, spec.shape)


def _block_error(x: Tensor, tried: BlockScaledTensor, rule: FourOverSix) -> Tensor:
    """[R/br, C/bc] error of each block on the unscaled values."""
    difference = x - carrier(tried) * tried.global_scale
    if rule.metric == "mse":
        return tree_sum(difference * difference, tried.block)
    if rule.metric == "mae":
        return tree_sum(difference.abs(), tried.block)
    return block_amax(difference, tried.block)


def _eden(y: Tensor, spec: QuantSpec, eden: Eden, key: Key, reduce_max: ReduceMax | None) -> BlockScaledTensor:
    """Nearest codes, then the block scale times S = <u,u>/<u,c>, rounded stochastically in E4M3 (arXiv:2601.22813)."""
    v = scales.target_max(spec.format.element.max, eden.headroom)
    a_b = block_amax(y, spec.shape)
    if eden.align == "pre":
        s_enc, s_dec = scales.global_encode(_logical_amax(a_b, reduce_max), eden.budget, v)
        scale_bytes = c.encode_e4m3(scales.raw_e4m3_scale(a_b, s_enc, v))
        multiplier = torch.where(scale_bytes == 0, 0.0, scales.encode_multiplier(scale_bytes, s_enc))
        u = _flat(_blocked(y, spec.shape) * multiplier[:, None, :, None])
        relative_scale = c.decode_e4m3(scale_bytes)
    else:
        s_dec = None
        q = scales.divide(a_b, v)
        u = _flat(_blocked(y, spec.shape) * scales.guarded_reciprocal(q)[:, None, :, None])
        relative_scale = q
    codes = c.encode_nearest(u, spec.format.element)
    corrected = relative_scale * _correction(u, codes, spec)
    if s_dec is None:
        s_dec = scales.divide(_logical_amax(corrected, reduce_max), eden.budget)
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
        return c.encode_nearest(u, spec.format.element)
    noise = rng.element_noise(u.shape, _needed(key), u.device)
    return c.encode_stochastic(u, spec.format.element, noise)


def _scaled(x: Tensor, multiplier: Tensor, spec: QuantSpec) -> Tensor:
    limit = spec.format.element.max
    return _flat((_blocked(x, spec.shape) * multiplier[:, None, :, None]).clamp_(-limit, limit))


def _logical_amax(block_values: Tensor, reduce_max: ReduceMax | None) -> Tensor:
    """[] amax of the logical tensor; NaN is made Inf first, because MAX all-reduces lose NaN."""
    amax = block_values.amax().nan_to_num(nan=float("inf"), posinf=float("inf"))
    return reduce_max(amax) if reduce_max is not None else amax


def _blocked(x: Tensor, block: tuple[int, int]) -> Tensor:
    """[R, C] -> [R/br, br, C/bc, bc]."""
    rows, columns = block
    return x.reshape(x.shape[0] // rows, rows, x.shape[1] // columns, columns)


def _flat(blocks: Tensor) -> Tensor:
    """[R/br, br, C/bc, bc] -> [R, C]."""
    return blocks.reshape(blocks.shape[0] * blocks.shape[1], -1)


def _needed(key: Key | None) -> Key:
    if key is None:
        raise ValueError("this spec draws noise: pass a key")
    return key


def _check(x: Tensor, spec: QuantSpec, key: Key | None) -> None:
    rows, _ = spec.shape
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
