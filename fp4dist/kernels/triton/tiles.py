# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
# Triton's own language: its kernels' parameters have no types, a launch takes options beside the kernel's parameters.
"""NVFP4 under outer scales of 1 x 128 tiles: all scales are local, so one pass over the data is enough.

The carrier holds code * block scale * 2^e in bf16; what remains of the tiles' scales stands beside it as factors of
parts of rows, all near 1, so that a GEMM may divide one by another (`Carrier.near`).
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4dist.kernels.triton import arithmetic as a
from fp4dist.kernels.triton import lanes
from fp4dist.kernels.triton import programs as p
from fp4dist.kernels.triton.grid_programs import encode_outer
from fp4dist.kernels.triton.launch import integer, launch
from fp4dist.kernels.triton.noise import PLACE, place
from fp4dist.kernels.triton.quantize import _Source
from fp4dist.kernels.triton.signs import sign_words
from fp4dist.numerics.scales import fp32, target_max
from fp4dist.numerics.tensor import BlockScaledTensor, Carrier, Key, Want
from fp4dist.spec.blocks import AbsMax, Nearest, Stochastic
from fp4dist.spec.formats import E2M1
from fp4dist.spec.recipe import QuantSpec

_TILE = 128
_PROGRAMS = {0: (32, 4), 1: (32, 4), 2: (64, 8)}  # rows and warps, by what is read: see `programs`
_BLOCK = 16


@triton.jit
def parted(outer):
    """fp32 outer scales -> (power of two, remaining factor), whose product is exact: see `Carrier.near`. A NaN goes to
    the power.
    """
    exponent = tl.maximum(a.bits(outer) >> 23, 7)  # 2^-120: values keep all their bits above bf16's smallest number
    power = a.floats(exponent << 23)
    factor = outer * a.floats((254 - exponent) << 23)
    return tl.where(outer == outer, power, outer), tl.where(outer == outer, factor, 1.0)


@triton.jit
def _decoded(
    x, stride, qscales, qouters, row, col, rows, cols, R: tl.constexpr, N: tl.constexpr, E: tl.constexpr,
    W: tl.constexpr, EVEN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """[G, E] fp32 values of the transpose of codes x [cols, rows / 2] in blocks of [1, E] under tiles of [1, TILE]."""
    byte = p._turned(x, stride, row, col, rows, cols, R, N, E, 2, W, EVEN).to(tl.int32)
    r, c = lanes.words(R // 2, N, E, W)
    at = (col + c) * (rows // E) + (row + r * 2) // E  # two rows of a byte share a block
    tile = (col + c) * (rows // TILE) + row // TILE  # all rows share a tile
    if EVEN:
        stored = tl.load(qscales + at)
        outer = tl.load(qouters + tile)
    else:
        inside = (row + r * 2 < rows) & (col + c < cols)
        stored = tl.load(qscales + at, mask=inside, other=0)
        outer = tl.load(qouters + tile, mask=inside, other=0.0)
    scale = a.decode_e4m3(lanes.of_words(stored, R // 2, N, E, W).to(tl.int32))
    outer = lanes.of_words(outer, R // 2, N, E, W)
    low = a.e2m1_signed(byte << 28) * scale * outer
    high = a.e2m1_signed(byte << 24) * scale * outer
    return tl.reshape(tl.permute(tl.join(low, high), (0, 1, 4, 2, 3)), (R * N // E, E))


@triton.jit(do_not_specialize=PLACE)
def tile_kernel(
    x, stride, qscales, qouters, signs, codes, scales, values, outers, factors, rows, cols, numerator, inverse_v,
    k0, k1, when, c3, width, row_run, r0, r1, column_run, q0, q1,
    R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, ROT: tl.constexpr, SIGNED: tl.constexpr, READ: tl.constexpr,
    P: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr, NOISY: tl.constexpr, NONZERO: tl.constexpr,
    CODES: tl.constexpr, CARRIER: tl.constexpr,
):  # fmt: skip
    """Codes (words of eight), E4M3 bytes and outer scales, or bf16 values (words of two) and factors [cols / N, rows],
    or both, of the tile [R, N] of programs, which go down the rows first. READ 2: of codes that are in tiles as well.
    """
    G: tl.constexpr = R * N // E
    K: tl.constexpr = N // E  # blocks of an outer tile: it is as wide as the program
    down = tl.cdiv(rows, R)
    row, part = tl.program_id(0) % down * R, tl.program_id(0) // down
    col = part * N
    if READ == 2:
        y = _decoded(x, stride, qscales, qouters, row, col, rows, cols, R, N, E, W, EVEN, N)
        y = p._rotated(y, signs, R, N, E, ROT, SIGNED)
    else:
        y = p._tile(
            x, stride, x, x, signs, row, col, rows, cols, R, N, E, ROT, SIGNED, READ, P, W, EVEN, 1, E, False
        )  # fmt: skip
    found = p._block_amax(y, R, N, E, 1)
    top = tl.minimum(tl.max(tl.reshape(a.magnitude_bits(found), (R, K)), axis=1), 0x7F800000)
    s_enc, decoder = encode_outer(a.floats(top), numerator)
    r = tl.arange(0, R)
    across = cols // N
    if CODES:
        tl.store(outers + (row.to(tl.int64) + r) * across + part, decoder, mask=row + r < rows)
    power, factor = parted(decoder)
    unit = tl.where(decoder == decoder, decoder, 1.0)  # 1 / s_enc
    unit = tl.reshape(tl.broadcast_to(unit[:, None], (R, K)), (G,))
    encoder = tl.reshape(tl.broadcast_to((s_enc * inverse_v)[:, None], (R, K)), (G,))
    stored = a.encode_e4m3(found * encoder)
    if NONZERO:
        stored = tl.maximum(stored, 1)
    scale = a.decode_e4m3(stored)
    multiplier = a.below(tl.div_rn(1.0, scale * unit), a.FLT_MAX)
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
        tl.store(factors + part.to(tl.int64) * rows + row + r, factor, mask=row + r < rows)
        scale = scale * tl.reshape(tl.broadcast_to(power[:, None], (R, K)), (G,))
        p._store_carrier(level, y, scale, values, row, col, rows, cols, R, N, E, EVEN)


@lru_cache(maxsize=16)
def _one(device: torch.device) -> Tensor:
    """[] fp32, the scale of all carriers, made by a copy that is complete when this returns."""
    with torch.inference_mode(False):  # it outlives the pass
        return torch.tensor(1.0, device=device)


def takes(spec: QuantSpec, want: Want) -> bool:
    """Whether `quantize` is made for `spec`."""
    known = spec.format.element == E2M1 and spec.format.scale.name == "e4m3" and spec.above == (1, _TILE)
    plain = spec.shape == (1, _BLOCK) and isinstance(spec.rule, AbsMax) and spec.samples == 1 and not spec.has_parts
    rounds = isinstance(spec.rounding, Stochastic) or (
        isinstance(spec.rounding, Nearest) and spec.rounding.ties == "even"
    )
    return known and plain and rounds and want.carrier in (None, torch.bfloat16)


def reads(q: BlockScaledTensor) -> bool:
    """Whether `quantize` decodes the transpose of `q` in registers."""
    known = q.format.element == E2M1 and q.format.scale.name == "e4m3" and q.block == (1, _BLOCK)
    rows, columns = q.shape
    tiled = q.global_scale.shape == (rows, columns // _TILE) and columns % _TILE == 0
    dense = q.scales.is_contiguous() and q.global_scale.is_contiguous()
    return known and tiled and dense and q.samples == q.rotation == 1 and q.scales.numel() < 2**31


def quantize(
    source: Tensor | BlockScaledTensor, spec: QuantSpec, key: Key | None, want: Want
) -> BlockScaledTensor | Carrier:
    """Codes, a carrier, or both, of a matrix or of the transpose of codes that it `reads`; see
    `fp4dist.numerics.quantize`. No maximum is asked of other ranks.
    """
    assert isinstance(spec.rule, AbsMax)
    src = _Source.of(source)
    (rows, cols), device = src.shape, src.tensor.device
    rotation = spec.rotation.size if spec.rotation is not None else 1
    v = target_max(E2M1.max, spec.rule.headroom)
    codes = torch.empty((rows, cols // 8), dtype=torch.int32, device=device) if want.codes else None
    scales = torch.empty((rows, cols // _BLOCK), dtype=torch.uint8, device=device) if want.codes else None
    outers = torch.empty((rows, cols // _TILE), device=device) if want.codes else None
    values = torch.empty((rows, cols // 2), dtype=torch.int32, device=device) if want.carrier is not None else None
    factors = torch.empty((cols // _TILE, rows), device=device) if want.carrier is not None else None
    read, none = src.constants(), sign_words(None, None, device)
    beside = (source.scales, source.global_scale) if isinstance(source, BlockScaledTensor) else (none, none)
    noisy, (high, warps) = isinstance(spec.rounding, Stochastic), _PROGRAMS[src.read]
    where = place(key if noisy else None, rows, cols, 8, device)
    arguments = (
        src.tensor, src.stride, *beside, sign_words(spec.rotation, key, device),
        *(none if x is None else x for x in (codes, scales, values, outers, factors)), rows, cols,
        fp32(fp32(spec.rule.budget) * v), fp32(1.0 / v), *where,
    )  # fmt: skip
    constants = {
        "R": high, "N": _TILE, "E": _BLOCK, "ROT": rotation,
        "SIGNED": spec.rotation is not None and spec.rotation.signs != "none", "READ": read["READ"], "P": read["P"],
        "W": 32 * _BLOCK // _TILE, "EVEN": rows % high == 0, "NOISY": noisy, "NONZERO": spec.rule.nonzero,
        "CODES": want.codes, "CARRIER": values is not None, "num_warps": warps, "enable_fp_fusion": False,
    }  # fmt: skip
    form = (
        "tile", device, src.tensor.dtype, *(integer(n) for n in (src.stride, rows, cols)),
        *(x.data_ptr() % 16 for x in (src.tensor, *beside, where[2])), *constants.values(),
    )  # fmt: skip
    launch(tile_kernel, -(-rows // high) * (cols // _TILE), arguments, constants, form)
    carrier = None
    if values is not None and factors is not None:
        near = factors.shape[0] > 1
        carrier = Carrier(values.view(torch.bfloat16), _one(device), rotation, factors.t(), near=near)
    if codes is None or scales is None or outers is None:
        assert carrier is not None
        return carrier
    q = BlockScaledTensor(codes.view(torch.uint8), scales, outers, spec.format, spec.shape, rotation)
    return q if carrier is None else replace(q, carrier=carrier)
