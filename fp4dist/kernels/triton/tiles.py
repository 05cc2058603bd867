# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
# Triton's own language: its kernels' parameters have no types, a launch takes options beside the kernel's parameters.
"""NVFP4 under outer scales of 1 x 128 tiles: all scales are local, so one pass over the data is enough.

The carrier holds code * block scale in bf16; the tiles' scales stand beside it as factors of parts of rows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4dist.kernels.triton import arithmetic as a
from fp4dist.kernels.triton import programs as p
from fp4dist.kernels.triton.grid_programs import encode_outer
from fp4dist.kernels.triton.noise import PLACE, place
from fp4dist.kernels.triton.quantize import _Source
from fp4dist.kernels.triton.signs import sign_words
from fp4dist.numerics.scales import fp32, target_max
from fp4dist.numerics.tensor import BlockScaledTensor, Carrier, Key, Want
from fp4dist.spec.blocks import AbsMax, Nearest, Stochastic
from fp4dist.spec.formats import E2M1
from fp4dist.spec.recipe import QuantSpec

_TILE, _ROWS, _WARPS = 128, 32, 4
_BLOCK = 16


@triton.jit(do_not_specialize=PLACE)
def tile_kernel(
    x, stride, signs, codes, scales, values, outers, rows, cols, numerator, inverse_v,
    k0, k1, when, c3, width, row_run, r0, r1, column_run, q0, q1,
    R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, ROT: tl.constexpr, SIGNED: tl.constexpr, READ: tl.constexpr,
    P: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr, NOISY: tl.constexpr, NONZERO: tl.constexpr,
    CODES: tl.constexpr, CARRIER: tl.constexpr,
):  # fmt: skip
    """Codes (words of eight), E4M3 bytes, bf16 values (words of two), outer scales of the tile [R, N] of programs."""
    G: tl.constexpr = R * N // E
    K: tl.constexpr = N // E  # blocks of an outer tile: it is as wide as the program
    row, col = tl.program_id(0) * R, tl.program_id(1) * N
    y = p._tile(
        x, stride, x, x, signs, row, col, rows, cols, R, N, E, ROT, SIGNED, READ, P, W, EVEN, 1, E, False
    )  # fmt: skip
    found = p._block_amax(y, R, N, E, 1)
    top = tl.minimum(tl.max(tl.reshape(a.magnitude_bits(found), (R, K)), axis=1), 0x7F800000)
    s_enc, decoder = encode_outer(a.floats(top), numerator)
    r = tl.arange(0, R)
    across = cols // N
    tl.store(outers + (row.to(tl.int64) + r) * across + tl.program_id(1), decoder, mask=row + r < rows)
    s_enc = tl.reshape(tl.broadcast_to(s_enc[:, None], (R, K)), (G,))
    stored = a.encode_e4m3(found * (s_enc * inverse_v))
    if NONZERO:
        stored = tl.maximum(stored, 1)
    scale = a.decode_e4m3(stored)
    multiplier = a.below(tl.div_rn(1.0, scale * tl.div_rn(1.0, s_enc)), a.FLT_MAX)
    u = a.at_most(tl.abs(y * multiplier[:, None]), 6.0)
    if NOISY:
        noise = p._thresholds(y, row, col, k0, k1, when, c3, width, row_run, r0, r1, column_run, q0, q1, R, N, E)
        level, index = a.stochastic(u, noise)
    else:
        level, index = a.nearest(u)
    if CODES:
        words = tl.where((scale == scale)[:, None], a.pack(index, y, G, E), 0x77777777)  # a NaN has no sign
        p._store_codes(words, codes, row, col, rows, cols, R, N, EVEN)
        p._store_scales(stored, scales, row, col, rows, cols, R, N, E, 1, EVEN)
    if CARRIER:
        p._store_carrier(level, y, scale, values, row, col, rows, cols, R, N, E, EVEN)


def takes(spec: QuantSpec, want: Want) -> bool:
    """Whether `quantize` is made for `spec`."""
    known = spec.format.element == E2M1 and spec.format.scale.name == "e4m3" and spec.above == (1, _TILE)
    plain = spec.shape == (1, _BLOCK) and isinstance(spec.rule, AbsMax) and spec.samples == 1 and not spec.has_parts
    rounds = isinstance(spec.rounding, Stochastic) or (
        isinstance(spec.rounding, Nearest) and spec.rounding.ties == "even"
    )
    return known and plain and rounds and want.carrier in (None, torch.bfloat16)


def quantize(x: Tensor, spec: QuantSpec, key: Key | None, want: Want) -> BlockScaledTensor | Carrier:
    """Codes, a carrier, or both; see `fp4dist.numerics.quantize`. No maximum is asked of other ranks."""
    assert isinstance(spec.rule, AbsMax)
    src = _Source.of(x)
    (rows, cols), device = src.shape, x.device
    rotation = spec.rotation.size if spec.rotation is not None else 1
    v = target_max(E2M1.max, spec.rule.headroom)
    codes = torch.empty((rows, cols // 8), dtype=torch.int32, device=device) if want.codes else None
    scales = torch.empty((rows, cols // _BLOCK), dtype=torch.uint8, device=device) if want.codes else None
    values = torch.empty((rows, cols // 2), dtype=torch.int32, device=device) if want.carrier is not None else None
    outers = torch.empty((rows, cols // _TILE), device=device)
    read = src.constants()
    noisy = isinstance(spec.rounding, Stochastic)
    tile_kernel[-(-rows // _ROWS), cols // _TILE](
        src.tensor, src.stride, sign_words(spec.rotation, key, device), outers if codes is None else codes,
        outers if scales is None else scales, outers if values is None else values, outers, rows, cols,
        fp32(fp32(spec.rule.budget) * v), fp32(1.0 / v), *place(key if noisy else None, rows, cols, 8, device),
        R=_ROWS, N=_TILE, E=_BLOCK, ROT=rotation,
        SIGNED=spec.rotation is not None and spec.rotation.signs != "none", READ=read["READ"], P=read["P"],
        W=32 * _BLOCK // _TILE, EVEN=rows % _ROWS == 0, NOISY=noisy, NONZERO=spec.rule.nonzero,
        CODES=want.codes, CARRIER=values is not None, num_warps=_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    carrier = None
    if values is not None:
        carrier = Carrier(values.view(torch.bfloat16), torch.ones((), device=device), rotation, outers)
    if codes is None or scales is None:
        assert carrier is not None
        return carrier
    q = BlockScaledTensor(codes.view(torch.uint8), scales, outers, spec.format, spec.shape, rotation)
    return q if carrier is None else replace(q, carrier=carrier)
