"""One bucket of Megatron's parameter buffer, some of whose weights other ranks know as codes only.

Everything here happens on one rank; `param_gather` moves the bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from fp4dist.megatron.gather_layout import Extent, GatherLayout, Piece
from fp4dist.nn.plan import LinearPlan
from fp4dist.nn.sites import Fp4Module
from fp4dist.numerics.tensor import BlockScaledTensor
from fp4dist.spec.blocks import AbsMax, BestOf, Ceil, Floor, FourOverSix, Nearest
from fp4dist.spec.estimators import Straight
from fp4dist.spec.recipe import LinearRecipe, QuantSpec
from fp4dist.spec.splits import Channels, HotResidual
from fp4dist.spec.statistics import Current


def why_whole(recipe: LinearRecipe) -> str | None:
    """Why a weight under `recipe` must travel in high precision; None where its codes are all that is ever read."""
    forward, backward = recipe.fprop.w, recipe.slot("dgrad.w")
    if forward is None:
        return "its forward GEMM reads the weight in high precision"
    chooser = recipe.fprop.x.outlier if recipe.fprop.x is not None else None
    if isinstance(chooser, Channels | HotResidual):
        return f"fprop.x has outlier = {chooser.kind}, for which the weight needs more than its codes"
    if forward.draws_noise:
        return f"fprop.w ({forward.label()}) draws noise for each micro-batch"
    if forward.has_parts or not isinstance(forward.rounding, Nearest) or not isinstance(forward.estimator, Straight):
        return f"fprop.w ({forward.label()}) needs more than its own codes"
    if not isinstance(forward.amax, Current):
        return f"fprop.w ({forward.label()}) is scaled by an amax that is kept between steps"
    if forward.rotation is not None:
        return f"fprop.w ({forward.label()}) is rotated"
    if not _is_blockwise(forward):
        return f"fprop.w ({forward.label()}) is not 4 bits and a byte a block, given by the block and one amax alone"
    if backward is None:
        return "its dgrad GEMM reads the weight in high precision"
    if backward.source == "master":
        return f"dgrad.w ({backward.label()}) is quantized from the weight itself, not from its forward codes"
    return None


def _is_blockwise(spec: QuantSpec) -> bool:
    """Whether a rank that holds a block and the logical amax can encode that block, into half bytes and one byte."""
    return spec.joins and isinstance(spec.rule, AbsMax | FourOverSix | BestOf | Floor | Ceil)


@dataclass(slots=True)
class CodedWeight:
    """A linear's weight that may travel as codes.

    plan       the plan by which this was decided last;  whole   why it travels in high precision, or None
    is_stale   the parameter holds NaN where other ranks own it, and the plan has been given codes
    """

    path: str
    module: Fp4Module
    parameter: nn.Parameter
    plan: LinearPlan | None = None
    whole: str | None = None
    is_stale: bool = False

    @property
    def spec(self) -> QuantSpec:
        """How its codes are made."""
        spec = self.plan.spec("fprop.w") if self.plan is not None else None
        assert spec is not None
        return spec

    @property
    def follows_plan(self) -> bool:
        """Whether its module still has the plan by which it was judged."""
        return self.plan is self.module.plan

    def judge(self) -> None:
        """Decide by the plan that its module has now."""
        self.plan = self.module.plan
        self.whole = why_whole(self.plan.recipe) if self.plan is not None else "it has no recipe"

    def encode(self, rows: Tensor, amax: Tensor) -> BlockScaledTensor:
        """[rows, I] whole block rows by the kernel that would encode the whole weight, given the logical amax []."""
        assert self.plan is not None
        return self.plan.kernels["fprop.w"](rows, self.spec, None, lambda _: amax)

    def deliver(self, codes: BlockScaledTensor) -> None:
        """The codes stand for the weight from now on."""
        assert self.plan is not None
        self.plan.delivered, self.is_stale = codes, True

    def set_whole(self, *_: Any) -> None:
        """The parameter holds the weight again, and the plan quantizes it itself."""
        self.is_stale = False
        if self.plan is not None:
            self.plan.delivered = None


class CodedBucket:
    """One of Megatron's buckets, on rank `rank` of the `ranks` that each own a slice of it.

    bucket    with `param_data`, the flat buffer [numel], and `params_list`, views of it
    weights   parameter -> those that may travel as codes; which of them do is decided here
    """

    def __init__(self, bucket: Any, weights: Mapping[nn.Parameter, CodedWeight], rank: int, ranks: int) -> None:
        self.data: Tensor = bucket.param_data.view(-1)
        self.rank = rank
        size = self.data.element_size()
        start = {p: (p.data_ptr() - self.data.data_ptr()) // size for p in bucket.params_list}
        self.parameters: list[nn.Parameter] = sorted(bucket.params_list, key=start.__getitem__)
        self.weights = {
            i: weights[p] for i, p in enumerate(self.parameters) if p in weights and weights[p].whole is None
        }
        extents = tuple(
            Extent(start[p], prod(p.shape[:-1]), p.shape[-1], self.weights[i].spec.shape if i in self.weights else None)
            for i, p in enumerate(self.parameters)
        )
        self.layout = GatherLayout(extents, self.data.numel(), size, ranks)

    def own_rows(self, index: int) -> Tensor:
        """[rows, I] view of the block rows of a weight that this rank encodes, the tail it was sent included."""
        extent = self.layout.extents[index]
        begin, end = extent.owned(*self.layout.slice_of(self.rank))
        flat = self.data[extent.start + begin * extent.block_row : extent.start + end * extent.block_row]
        return flat.view(-1, extent.columns)

    def own_amaxes(self) -> list[Tensor]:
        """[] fp32 of each weight: max |w| of the rows that this rank encodes, 0 where there are none.

        NaN is made Inf, because MAX all-reduces lose NaN.
        """
        inf = float("inf")
        zero = self.data.new_zeros((), dtype=torch.float32)
        rows = [self.own_rows(index) for index in self.weights]
        return [r.abs().amax().float().nan_to_num(nan=inf, posinf=inf) if r.numel() else zero for r in rows]

    def payload(self, amaxes: Mapping[int, Tensor]) -> Tensor:
        """[bytes] uint8: this rank's pieces in order.

        amaxes   weight -> [] fp32 amax of the logical weight, for those of which this rank encodes rows
        """
        made = {index: self.weights[index].encode(self.own_rows(index), amax) for index, amax in amaxes.items()}
        own = [piece for piece in self.layout.pieces if piece.rank == self.rank]
        parts = [
            self._raw(piece) if piece.kind == "raw" else as_bytes(getattr(made[piece.extent], piece.kind))
            for piece in own
        ]
        return torch.cat([self.data.new_empty(0, dtype=torch.uint8), *parts])

    @torch.no_grad()
    def deliver(self, gathered: Tensor) -> None:
        """Parameters into their buffer, codes to their plans; what other ranks own of a coded weight becomes NaN.

        gathered   [bytes] uint8: all ranks' contributions
        """
        codes = {index: self._empty_codes(index) for index in self.weights}
        for piece, start in zip(self.layout.pieces, self.layout.offsets, strict=True):
            received = gathered[start : start + piece.size]
            if piece.kind == "raw":
                self._raw(piece).copy_(received)
            else:
                target = as_bytes(getattr(codes[piece.extent], piece.kind))
                target[piece.at : piece.at + piece.size] = received
        for index, weight in self.weights.items():
            if not weight.is_stale:
                self._forget_others(index)
            weight.deliver(codes[index])

    def _raw(self, piece: Piece) -> Tensor:
        """The bytes of a parameter that travels as it is."""
        return as_bytes(self.parameters[piece.extent].detach())[piece.at : piece.at + piece.size]

    def _empty_codes(self, index: int) -> BlockScaledTensor:
        extent, spec = self.layout.extents[index], self.weights[index].spec
        empty = partial(torch.empty, device=self.data.device)
        codes = empty((extent.rows, extent.columns // 2), dtype=torch.uint8)
        scales = empty((extent.rows // spec.shape[0], extent.scale_columns), dtype=torch.uint8)
        return BlockScaledTensor(codes, scales, empty((), dtype=torch.float32), spec.format, spec.shape)

    def _forget_others(self, index: int) -> None:
        extent, (first, last) = self.layout.extents[index], self.layout.slice_of(self.rank)
        self.data[extent.start : max(extent.start, min(first, extent.end))] = float("nan")
        self.data[min(extent.end, max(last, extent.start)) : extent.end] = float("nan")


def as_bytes(x: Tensor) -> Tensor:
    """A contiguous tensor as its bytes, flat, sharing memory."""
    return x.view(-1).view(torch.uint8)
