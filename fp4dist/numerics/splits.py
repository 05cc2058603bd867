"""Operands in parts: x = rest + side, in the original basis and before any rotation; the rest becomes codes.

What a part is made from is exact and does not depend on how the operand is split over ranks: a mean over tokens is a
fixed tree of sums, a quantile is an element of the logical row or tensor (its nearest rank), found in the union of the
ranks' own largest values. Only `LowRank` needs the whole matrix; its factors are computed in fp64, whose matrix
products add in an order of the library's choice, so its bits may differ between devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fp4dist.numerics import rng
from fp4dist.numerics.grouping import ReduceMax, chunk_of, merge, tree_sum
from fp4dist.numerics.quantize import dequantize, original, quantize
from fp4dist.numerics.rotation import rotate
from fp4dist.numerics.scales import divide
from fp4dist.numerics.tensor import BlockScaledTensor, Chosen, Key, PartedTensor, Quantized, Stream
from fp4dist.spec.blocks import Ceil, Hadamard, Stochastic
from fp4dist.spec.estimators import Straight
from fp4dist.spec.formats import FP8_E4M3_TENSOR, MXFP8
from fp4dist.spec.operand import QuantSpec
from fp4dist.spec.splits import Channels, HotResidual, LowRank, Mean, Occ, Precision, TopK
from fp4dist.spec.statistics import Current

# How FP8 holds a part: to nearest, scales that never clip.
_IN_FP8 = {"e4m3": QuantSpec(format=FP8_E4M3_TENSOR), "mxfp8": QuantSpec(format=MXFP8, scale=Ceil())}


@dataclass(frozen=True, slots=True)
class Place:
    """Where an operand [R, C] lies, as parts see it.

    key          its place in the logical operand, and its noise; None: it is whole, and nothing draws noise
    reduce_max   as for `quantize`
    token_dim    0 or 1: the dimension of the tokens; None: it has none
    filled       zero tokens at the end that only fill up a block: they count in no mean and no quantile
    channels     bool: the chosen input channels, along dimension `channel_dim`; None while there are none
    index        [k] int64: their numbers, and perhaps some more; None: not known
    """

    key: Key | None = None
    reduce_max: ReduceMax | None = None
    token_dim: int | None = None
    filled: int = 0
    channels: Tensor | None = None
    channel_dim: int = 1
    index: Tensor | None = None

    @property
    def chosen(self) -> Tensor | None:
        """[1, C] or [R, 1] bool."""
        return None if self.channels is None else self.channels.unsqueeze(1 - self.channel_dim)


class Parts(NamedTuple):
    """rest [R, C] fp32 (or in x's dtype, where that holds it), to be quantized, and what stands beside it, likewise;
    None: nothing.
    """

    rest: Tensor
    side: Tensor | None


@torch.no_grad()
def decompose(x_RC: Tensor, spec: QuantSpec, place: Place) -> Parts:
    """Take out what `spec` names, the split first.

    x_RC   [R, C] bf16 or fp32. A part in the model's own precision is rounded to x's dtype

    Without rounding of the parts rest + side is x, to one fp32 rounding; for topk and channels exactly. A value that is
    not finite stays in one of them, so that the product shows it. The residual of HotResidual exists only after
    quantization: see `hot_residual`.
    """
    channels = isinstance(spec.outlier, Channels) and place.chosen is None
    waits = channels or isinstance(spec.outlier, HotResidual)
    if spec.split is None and (spec.outlier is None or waits):  # nothing yet: x need not be copied
        return Parts(x_RC, None)
    apart = spec.split is None and isinstance(spec.outlier, TopK | Channels)  # which move elements and compute nothing
    parts = Parts(x_RC if apart else x_RC.to(torch.float32), None)
    if spec.split is not None:
        parts = _on_tokens(parts.rest, place, lambda x, real: _without_split(x, spec, real))
    if isinstance(spec.outlier, Occ | TopK | Channels):
        taken = _without_outlier(parts.rest, spec.outlier, place)
        side = None
        if taken.side is not None:
            side = in_precision(taken.side, spec.outlier.precision, x_RC.dtype, place)
        rest = taken.rest if spec.split is not None else taken.rest.to(x_RC.dtype)  # of elements of x
        parts = Parts(rest, _added(parts.side, side))
    return parts


def take_channels(x_RC: Tensor, precision: Precision, place: Place) -> Parts:
    """The chosen channels of an operand whose partner has `Channels`: they stand beside it in the same precision."""
    taken = _without_channels(x_RC, place)
    side = None if taken.side is None else in_precision(taken.side, precision, x_RC.dtype, place)
    return Parts(taken.rest, side)


@torch.no_grad()
def assemble(
    main: BlockScaledTensor, side: Tensor | None, partner: Tensor | None, spec: QuantSpec, key: Key | None,
    chosen: Chosen | None = None, straight: bool = False,
) -> Quantized:  # fmt: skip
    """The operand of codes `main`, `side` and `partner` [R, C] in the original basis; the codes alone without both.

    chosen     of `PartedTensor`, in the original basis: a rotation mixes columns
    straight   of `PartedTensor`: side and partner stay in that basis
    """
    if side is None and partner is None:
        return main
    rotation = None if straight else spec.rotation
    if chosen is not None and chosen.dim == 1 and rotation is not None:
        chosen = None
    side, partner = _in_basis(side, rotation, key), _in_basis(partner, rotation, key)
    return PartedTensor(main, side, partner, chosen, straight and spec.rotation is not None)


@torch.no_grad()
def hot_residual(rest: Tensor, main: BlockScaledTensor, spec: QuantSpec, dtype: torch.dtype, place: Place) -> Tensor:
    """[R, C] the rounding error of the chosen channels, in the original basis, in `dtype`; elsewhere 0."""
    assert place.chosen is not None
    error = rest - original(main, spec.rotation, place.key)
    return torch.where(place.chosen, error.to(dtype), 0.0)


@torch.no_grad()
def in_precision(part: Tensor, precision: Precision, dtype: torch.dtype, place: Place) -> Tensor:
    """[R, C] values of `part` in `precision`: bf16 stands for `dtype`, which then holds them, fp32 holds those of FP8,
    and bf16 those that MXFP8 has of bf16. FP8 blocks keep their places in x.
    """
    if precision == "bf16":
        return part.to(dtype)
    values = dequantize(quantize(part, _IN_FP8[precision], place.key, place.reduce_max))
    # four significant bits of a multiple of bf16's smallest number: bf16 has them, too
    return values.to(part.dtype) if precision == "mxfp8" else values


@lru_cache(maxsize=256)
def bare(spec: QuantSpec) -> QuantSpec:
    """The spec of the codes alone."""
    return replace(spec, split=None, outlier=None)


def beyond(count: int, alpha: float) -> int:
    """How many of `count` elements lie above the alpha quantile by nearest rank; as many below that of 1 - alpha."""
    return count - math.ceil(round(alpha * count, 6))


def quantiles(
    x_RC: Tensor, alpha: float, per: str, key: Key | None = None, reduce_max: ReduceMax | None = None
) -> tuple[Tensor, Tensor]:
    """(lower, upper) quantile by nearest rank of each logical row [R, 1], or of the logical tensor [1, 1]; fp32."""
    shards = _Shards.of(x_RC, key, reduce_max)
    values = x_RC if per == "row" else x_RC.reshape(1, -1)
    whole = values.shape[1] * shards.columns * (1 if per == "row" else shards.rows)
    wanted = beyond(whole, alpha) + 1
    mine = min(wanted, values.shape[1])
    ends = torch.stack((values.topk(mine, dim=1).values, (-values).topk(mine, dim=1).values))
    ends = shards.everyones(ends)[shards.row] if per == "row" else shards.everyones(ends).flatten(0, 1)
    ends = ends.permute(1, 2, 0, 3).flatten(2)  # [2, rows, shards * mine]
    ends = ends.topk(wanted, dim=2).values[..., -1:]
    return 0.0 - ends[1], 0.0 + ends[0]  # which leaves no negative zero


def token_mean(x_RC: Tensor, dim: int, key: Key | None, reduce_max: ReduceMax | None) -> Tensor:
    """Mean over the logical tokens, which are dimension `dim`: [1, C] or [R, 1] fp32."""
    here, key = x_RC.shape[dim], key or Key()
    tokens, runs = ((key.rows, key.row_runs), (key.columns, key.column_runs))[dim]
    tokens = here if tokens is None or reduce_max is None else max(tokens, here)
    chunk = chunk_of(tokens)
    if tokens > here and (here % (chunk * len(runs)) or any(start % chunk for start in runs)):
        raise ValueError(
            f"the mean over {tokens} tokens is a sum of chunks of {chunk}, but a rank holds {here // len(runs)} of them"
            " at a time; use a parallel size that is a power of two, or amax_scope: shard"
        )
    parts = tree_sum(x_RC, (chunk, 1) if dim == 0 else (1, chunk))
    if tokens > here:
        assert reduce_max is not None
        tile = (chunk, 1) if dim == 0 else (1, chunk)
        parts = parts.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)  # MAX all-reduces lose NaN
        parts, row, column = merge(parts, tile, x_RC.shape, key, reduce_max, -math.inf)
        parts = parts[:, column] if dim == 0 else parts[row]
    total = tree_sum(parts, (parts.shape[0], 1) if dim == 0 else (1, parts.shape[1]))
    return divide(total, float(tokens))


class _Shards(NamedTuple):
    """This rank's part as number (row, column) of rows x columns equal parts of the logical operand."""

    rows: int
    columns: int
    row: int
    column: int
    reduce_max: ReduceMax | None

    @classmethod
    def of(cls, x: Tensor, key: Key | None, reduce_max: ReduceMax | None) -> _Shards:
        if key is None or reduce_max is None:
            return cls(1, 1, 0, 0, None)
        counts = [max((whole or size) // size, 1) for whole, size in zip((key.rows, key.columns), x.shape, strict=True)]
        numbers = [
            runs[0] // (size // len(runs)) if count > 1 else 0  # the first run tells the parts apart
            for count, runs, size in zip(counts, (key.row_runs, key.column_runs), x.shape, strict=True)
        ]
        return cls(counts[0], counts[1], numbers[0], numbers[1], reduce_max)

    def everyones(self, values: Tensor) -> Tensor:
        """[...] -> [rows, columns, ...]: what each part has."""
        if self.reduce_max is None:
            return values[None, None]
        all_values = values.new_full((self.rows, self.columns, *values.shape), -math.inf)
        all_values[self.row, self.column] = values
        return self.reduce_max(all_values)


def _on_tokens(x: Tensor, place: Place, take: Callable[[Tensor, Place], Parts]) -> Parts:
    """`take` on the tokens that do not fill up, which are on this rank alone; the others stay as they are."""
    if not place.filled or place.token_dim is None:
        return take(x, place)
    dim, key = place.token_dim, place.key
    if key is not None:
        key = replace(key, row_runs=(0,), rows=None) if dim == 0 else replace(key, column_runs=(0,), columns=None)
    taken = take(x.narrow(dim, 0, x.shape[dim] - place.filled), replace(place, key=key, filled=0))
    at_end = (0, 0, 0, place.filled) if dim == 0 else (0, place.filled)
    return Parts(pad(taken.rest, at_end), None if taken.side is None else pad(taken.side, at_end))


def _without_split(x: Tensor, spec: QuantSpec, place: Place) -> Parts:
    if isinstance(spec.split, Mean):
        return _without_mean(x, spec, spec.split, place)
    assert isinstance(spec.split, LowRank)
    return _without_low_rank(x, spec, spec.split, place)


def _without_mean(x: Tensor, spec: QuantSpec, split: Mean, place: Place) -> Parts:
    if place.token_dim is None:
        raise ValueError("split = mean takes the mean over tokens, and this operand has none")
    mean = token_mean(x, place.token_dim, place.key, place.reduce_max)
    side = mean
    if split.quantize:
        by_token = place.token_dim == 0
        key = _vector_key(place.key, Stream.RIGHT_FACTOR, columns=by_token)
        rounded = _rounded(mean if by_token else mean.t(), spec, key, place.reduce_max)
        side = rounded if by_token else rounded.t()
    return Parts(x - mean, side.expand(x.shape))


def _without_low_rank(x: Tensor, spec: QuantSpec, split: LowRank, place: Place) -> Parts:
    key = place.key
    if key is not None and ((key.rows or 0) > x.shape[0] or (key.columns or 0) > x.shape[1]):
        raise ValueError(f"split = lowrank needs the whole matrix, but a rank holds {list(x.shape)} of it; use mean")
    left, core, right = low_rank(x, split.rank, split.iterations)
    rest = (x.double() - left @ core @ right.t()).to(torch.float32)
    if split.quantize:
        stream = (Stream.LEFT_FACTOR, Stream.RIGHT_FACTOR)
        factors = [
            _rounded(f.t().to(torch.float32), spec, _vector_key(place.key, s), None).t().double()
            for f, s in zip((left, right), stream, strict=True)
        ]
        left, right = factors
    return Parts(rest, (left @ core @ right.t()).to(torch.float32))


def low_rank(x_RC: Tensor, rank: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """(U [R, r], S [r, r], V [C, r]) fp64, U and V with orthonormal columns: U S V^T is x on the span of U.

    U is that of power iterations with QR from a fixed start; S nears a diagonal one. r is at most R and C. What is not
    finite counts as 0.
    """
    x = torch.where(x_RC.isfinite(), x_RC, 0.0).double()
    rows, columns = x.shape
    rank = min(rank, rows, columns)
    start = rng.element_noise(torch.Size((rank, -(-columns // 8) * 8)), Key(), x.device)[:, :columns]
    right = (start.double() - 2.0**15).t()
    left, core = right, right
    for _ in range(iterations):
        left = torch.linalg.qr(x @ right).Q
        right, core = torch.linalg.qr(x.t() @ left)
    return left, core.t(), right


def _rounded(vectors: Tensor, spec: QuantSpec, key: Key | None, reduce_max: ReduceMax | None) -> Tensor:
    """[n, L] fp32 rows in the operand's own format, filled up with zeros to its blocks; in the original basis."""
    own = _factor_spec(spec)
    n, length = vectors.shape
    missing = (-n % own.rows_multiple, -length % own.columns_multiple)
    if missing[1] and key is not None and (key.columns or length) > length:
        raise ValueError(
            f"a part of {length} of {key.columns} elements does not fill blocks of {own.columns_multiple} of"
            f" {own.label()}; use a smaller block or rotation, or quantize: false"
        )
    if missing[1] and key is not None:
        key = replace(key, columns=length + missing[1])
    q = quantize(pad(vectors, (0, missing[1], 0, missing[0])), own, key, reduce_max)
    return original(q, own.rotation, key)[:n, :length]


@lru_cache(maxsize=256)
def _factor_spec(spec: QuantSpec) -> QuantSpec:
    """The format, scale, rounding and rotation of a spec: how its factors are rounded."""
    rounding = Stochastic() if isinstance(spec.rounding, Stochastic) else spec.rounding
    return replace(
        bare(spec), rounding=rounding, amax=Current(), estimator=Straight(), source="master", allow_bias=spec.allow_bias
    )


def _vector_key(key: Key | None, stream: Stream, columns: bool | None = None) -> Key | None:
    """The key of rows that run along the operand's columns, its rows, or (None) along neither of a shard's."""
    if key is None:
        return None
    runs, length = (0,), None
    if columns is not None:
        runs, length = (key.column_runs, key.columns) if columns else (key.row_runs, key.rows)
    return replace(key, stream=stream, row_runs=(0,), rows=None, column_runs=runs, columns=length)


def _without_outlier(x: Tensor, outlier: Occ | TopK | Channels, place: Place) -> Parts:
    if isinstance(outlier, Occ):
        return _on_tokens(x, place, lambda x, real: _clamped(x, outlier, real))
    return _without_largest(x, outlier) if isinstance(outlier, TopK) else _without_channels(x, place)


def _clamped(x: Tensor, occ: Occ, place: Place) -> Parts:
    lower, upper = quantiles(x, occ.alpha, occ.per, place.key, place.reduce_max)
    finite = x.isfinite()
    rest = torch.where((x <= upper) | ~finite, x, upper)  # libraries' clamps differ in signs of zeros
    rest = torch.where((rest >= lower) | ~finite, rest, lower)
    return Parts(rest, x - rest if occ.compensate else None)


def _without_largest(x: Tensor, top: TopK) -> Parts:
    order = x.abs().unflatten(1, (-1, top.group)).argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order[..., : top.k], True).flatten(1)
    return Parts(torch.where(mask, 0.0, x), torch.where(mask, x, 0.0))


def _without_channels(x: Tensor, place: Place) -> Parts:
    if place.chosen is None:
        return Parts(x, None)
    return Parts(torch.where(place.chosen, 0.0, x), torch.where(place.chosen, x, 0.0))


def _added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _in_basis(part: Tensor | None, rotation: Hadamard | None, key: Key | None) -> Tensor | None:
    """[R, C] original basis -> that of the codes, unnormalized. What is one row, or one column, stays so in memory."""
    if part is None:
        return None
    if rotation is None:
        return part if 0 in part.stride() else part.contiguous()
    if part.stride(0) == 0:
        return rotate(part[:1].contiguous().to(torch.float32), rotation, key).expand(part.shape)
    return rotate(part.contiguous().to(torch.float32), rotation, key)
