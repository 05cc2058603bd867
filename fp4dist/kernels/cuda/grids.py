"""The general quantizer of csrc/grid.cu: the grids, scale formats, outer levels and ties that specialised kernels lack.

Blocks of fixed size are scaled in the pass that rounds them. Where one scale serves a row or the tensor, a first pass
finds the amax, the scale is computed by `fp4dist.numerics.scales` (moments too, in torch), and a second pass rounds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fp4dist import numerics
from fp4dist.kernels import grid_facts
from fp4dist.kernels.cuda import jobs
from fp4dist.kernels.cuda.grid_jobs import (
    CORRECTED,
    GIVEN,
    LEVELS,
    SCALES,
    SEARCHES,
    STRIP,
    is_post_hoc,
    job,
    rule_of,
    stretches,
    when,
)
from fp4dist.numerics import scales
from fp4dist.numerics.grouping import Grouping, ReduceMax, spread
from fp4dist.numerics.rotation import rotate
from fp4dist.numerics.tensor import CODES, BlockScaledTensor, Carrier, Key, Want
from fp4dist.spec.blocks import Ceil, Eden, Ema, Floor, Nearest, Quest, Sawb
from fp4dist.spec.formats import E2M1
from fp4dist.spec.recipe import QuantSpec

_LARGEST_BLOCK = 256  # columns
_MOST_ELEMENTS = 4096  # of a block
_MOST_TRIES = 128
_INFINITY = 0x7F800000


def why_not(spec: QuantSpec) -> str | None:
    """The first block of `spec` that this quantizer lacks, or None."""
    (rows, columns), above = spec.shape, spec.above
    element, rule, rounding, scale = spec.format.element, spec.rule, spec.rounding, spec.format.scale.name
    whole, tile = 0 in spec.shape, above[1] if isinstance(above, tuple) else 16
    lacks = (
        (element.mantissa is None and len(element.levels) > LEVELS, f"grid of {len(element.levels)} levels"),
        (element.mantissa not in (None, 2, 3), f"elements {element.name}"),
        (element.mantissa is not None and not isinstance(rounding, Nearest), f"{rounding.kind} rounding to FP8"),
        (not whole and not _is_block(rows, columns), f"blocks {[rows, columns]}"),
        (rows > 1 and spec.rotation is not None, f"rotated blocks {[rows, columns]}"),
        (isinstance(rule, Quest | Sawb) and scale != "e8m0" and not whole, f"{rule.kind} under {scale} scales"),
        (isinstance(rule, Floor | Ceil) and scale == "fp32" and not whole, f"{rule.kind} under {scale} scales"),
        (isinstance(rule, SEARCHES) and whole, f"{rule.kind} of whole rows or tensors"),
        (isinstance(rule, SEARCHES) and isinstance(rounding, Eden), f"{rule.kind} with eden"),
        (len(stretches(spec)) > _MOST_TRIES, f"search over more than {_MOST_TRIES} scales"),
        (isinstance(rounding, Eden) and (rows, scale) != (1, "e4m3"), "eden of square blocks, or without E4M3 scales"),
        (isinstance(rounding, Eden) and (above == "none" or element != E2M1), f"eden of {element.name}, outer {above}"),
        (is_post_hoc(spec) and above != "tensor", f"eden with align: post_hoc, outer {above}"),
        (isinstance(above, tuple) and (above[0] != 1 or not _is_block(1, tile) or columns > tile), f"outer {above}"),
        (above == "row" and rows != 1, f"outer rows above blocks {[rows, columns]}"),
        (spec.has_parts, "operands in parts"),
    )
    return next((f"csrc's general quantizer has no {what}" for missing, what in lacks if missing), None)


def _is_block(rows: int, columns: int) -> bool:
    powers = not (rows & (rows - 1) or columns & (columns - 1))
    return powers and rows >= 1 and STRIP <= columns <= _LARGEST_BLOCK and rows * columns <= _MOST_ELEMENTS


def quantize(
    source: Tensor | BlockScaledTensor, spec: QuantSpec, key: Key | None = None, reduce_max: ReduceMax | None = None,
    toward: Tensor | None = None, *, want: Want = CODES,
) -> BlockScaledTensor | Carrier:  # fmt: skip
    """The codes of a matrix, or of the transpose of codes; see `fp4dist.numerics.quantize`."""
    if isinstance(source, BlockScaledTensor):
        source = (dequantize(source) if has_values(source) else numerics.dequantize(source)).t()
    _check(source, spec)
    launch = _Launch(source, spec, key, reduce_max, toward if isinstance(spec.rounding, Ema) else None)
    if is_post_hoc(spec):
        q = launch.corrected()
    else:
        q = launch.under_given_scales() if 0 in spec.shape else launch.in_blocks()
    if want.carrier is None:
        return q
    carrier = to_carrier(q, want.carrier)
    return replace(q, carrier=carrier) if want.codes else carrier


def _check(x: Tensor, spec: QuantSpec) -> None:
    if x.dim() != 2 or x.dtype not in (torch.bfloat16, torch.float32):
        raise TypeError(f"quantize: expected a bf16 or fp32 matrix, got {x.dtype} {list(x.shape)}")
    if x.shape[0] % spec.rows_multiple or x.shape[1] % spec.columns_multiple or not x.numel():
        raise ValueError(
            f"shape {list(x.shape)} does not fit {spec.label()}: rows must be a multiple of {spec.rows_multiple},"
            f" columns of {spec.columns_multiple}, and neither may be 0"
        )


def has_values(q: BlockScaledTensor) -> bool:
    """Whether `dequantize` can decode `q`."""
    element = q.format.element
    known = element.mantissa in (2, 3) or (element.mantissa is None and len(element.levels) <= LEVELS)
    return known and q.samples == 1


def dequantize(q: BlockScaledTensor) -> Tensor:
    """[R, C] fp32 values; see `fp4dist.numerics.dequantize`."""
    return _decoded(q, torch.float32, scaled=True)


def why_not_carrier(q: BlockScaledTensor, dtype: torch.dtype) -> str | None:
    """Why `to_carrier` cannot write the values of `q` in `dtype`, or None."""
    return grid_facts.why_not_carrier(q, dtype, has_values(q))


def to_carrier(q: BlockScaledTensor, dtype: torch.dtype) -> Carrier:
    """The values of `q` in `dtype`, exact; scales in fp32 (outer ones, of rows and their parts) stay beside them."""
    reason = why_not_carrier(q, dtype)
    if reason is not None:
        raise ValueError(f"{reason}; multiply the dequantized matrix")
    outside, outer = grid_facts.of_parts_of_rows(q), q.global_scale
    values = _decoded(q, dtype, scaled=not outside)
    if outside and q.scales.numel() == 1:
        return Carrier(values, q.scales.reshape(()) * outer, q.rotation)
    if outside:
        return Carrier(values, outer, q.rotation, spread(q.scales, (q.shape[0], q.scales.shape[1])))
    if outer.dim() == 0:
        return Carrier(values, outer, q.rotation)
    of_rows = spread(outer, (q.shape[0], outer.shape[1]))
    return Carrier(values, torch.ones((), device=outer.device), q.rotation, of_rows)


def _decoded(q: BlockScaledTensor, dtype: torch.dtype, *, scaled: bool) -> Tensor:
    """[R, C] values in `dtype`; unless `scaled` those of the elements alone."""
    (rows, cols), element = q.shape, q.format.element
    codes = q.codes if q.codes.stride(1) == 1 else q.codes.contiguous()  # those of a transpose need not be rows
    values = torch.empty((rows, cols), dtype=dtype, device=codes.device)
    factors = (q.global_scale * q.rotation**-0.5).reshape(q.global_scale.shape or (1, 1)).contiguous()
    levels = [*element.levels, *([0.0] * LEVELS)][:LEVELS] if element.mantissa is None else [0.0] * LEVELS
    torch.ops.fp4dist.grid_decode(
        codes, q.scales.contiguous(), factors,
        (
            codes.stride(0), rows, cols, *q.block, rows // factors.shape[0], cols // factors.shape[1],
            SCALES[q.format.scale.name], int(scaled), grid_facts.OUT[dtype], element.mantissa or 0, int(element.packed),
            1 << element.bits - 1,
        ),
        levels, values,
    )  # fmt: skip
    return values


@dataclass(frozen=True, slots=True)
class _Measured(Grouping):
    """A Grouping whose amax a kernel has found: [rows, 1], or [1, 1]."""

    found: Tensor

    def amax(self, x: Tensor) -> Tensor:
        """Grid-shaped amax of the logical rows, or of the logical tensor."""
        return self._tensor_max(self.found).reshape(1, 1) if self.spec.shape[0] == 0 else self._row_max(self.found)


@dataclass(frozen=True, slots=True)
class _Launch:
    """One matrix [R, C] under one spec."""

    x: Tensor
    spec: QuantSpec
    key: Key | None
    reduce_max: ReduceMax | None
    toward: Tensor | None

    def under_given_scales(self) -> BlockScaledTensor:
        """One scale for each row, or for the tensor."""
        rows, cols = self.x.shape
        by_row = self.spec.shape[0] != 0
        block = (1 if by_row else rows, cols)
        grouping = _Measured(self.x.shape, block, self.spec, self.key, self.reduce_max, self.largest(by_row))
        rule = self.spec.rule
        if isinstance(rule, Floor | Ceil):
            chosen = scales.power_of_two_scales(self.x, self.spec, grouping)
        else:
            values = self.in_basis() if isinstance(rule, Quest | Sawb) else self.x
            chosen = scales.ladder(values, self.spec, grouping).at()
        codes = self.run(GIVEN, given=chosen.multiplier)
        return BlockScaledTensor(
            codes, chosen.stored, chosen.global_scale, self.spec.format, block, self.rotation, self.spec.samples
        )

    def in_blocks(self) -> BlockScaledTensor:
        """A scale for each block, and outer scales above them."""
        spec, grouping = self.spec, Grouping.of(self.x, self.spec, self.key, self.reduce_max)
        stored, outer, outers = grid_facts.room_for_scales(self.x, spec, grouping, self.largest)
        codes = self.run(rule_of(spec), outer=outer, stored=stored, outers=outers)
        return BlockScaledTensor(codes, stored, outers, spec.format, spec.shape, self.rotation, spec.samples)

    def corrected(self) -> BlockScaledTensor:
        """MS-EDEN: codes under fp32 scales, which are corrected, then rounded under the largest of them."""
        spec, (rows, cols), device = self.spec, self.x.shape, self.x.device
        assert isinstance(spec.rounding, Eden)
        assert self.key is not None
        columns = spec.shape[1]
        fp32 = torch.empty((rows, cols // columns), dtype=torch.float32, device=device)
        top = torch.zeros((), dtype=torch.int32, device=device)
        codes = self.run(CORRECTED, stored=fp32, outers=top)
        found = top.clamp(max=_INFINITY).view(torch.float32)
        if self.reduce_max is not None:
            found = self.reduce_max(found)
        stored, outer = torch.empty_like(fp32, dtype=torch.uint8), torch.empty((), device=device)
        torch.ops.fp4dist.eden_scales(
            fp32, found.view(torch.int32), codes, when(self.key), cols // columns, spec.rounding.budget, False,
            jobs.place(self.key, rows, cols, columns), stored, None, outer,
        )  # fmt: skip
        return BlockScaledTensor(codes, stored, outer, spec.format, spec.shape, self.rotation)

    @property
    def rotation(self) -> int:
        """Size of the Hadamard groups, 1 for none."""
        return self.spec.rotation.size if self.spec.rotation is not None else 1

    def in_basis(self) -> Tensor:
        """[R, C] fp32 in the basis of the codes."""
        x = self.x.to(torch.float32)
        return x if self.spec.rotation is None else rotate(x, self.spec.rotation, self.key)

    def largest(self, by_row: bool) -> Tensor:
        """[R, 1] or [1, 1] fp32 max |x| in the basis of the codes; NaN where something is NaN."""
        rows = self.x.shape[0]
        top = torch.zeros((rows if by_row else 1, 1), dtype=torch.int32, device=self.x.device)
        how, factors = job(self.x, self.spec, self.key, None, GIVEN)
        torch.ops.fp4dist.grid_largest(self.x, when(self.key), how, factors, by_row, top)
        return top.view(torch.float32)

    def run(
        self, rule: int, *, given: Tensor | None = None, outer: Tensor | None = None, stored: Tensor | None = None,
        outers: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """[R, samples * width] the codes; fills `stored` and `outers`."""
        spec, (rows, cols) = self.spec, self.x.shape
        width = cols // 2 if spec.format.element.packed else cols
        codes = torch.empty((rows, spec.samples * width), dtype=torch.uint8, device=self.x.device)
        given, toward = given.contiguous() if given is not None else None, self.toward
        for i in range(spec.samples):
            by_row = given is not None and given.numel() > 1
            how, factors = job(self.x, spec, self.key, toward, rule, i, by_row)
            torch.ops.fp4dist.grid_quantize(
                self.x, toward, given, outer, when(self.key), how,
                factors, codes[:, i * width : (i + 1) * width], stored, outers,
            )  # fmt: skip
        return codes
