# pyright: reportCallIssue=false, reportArgumentType=false
# (a launch takes options beside the kernel's own parameters)
"""The quantizers of everything that `quantize` is not made for: other grids and scale formats, outer tiles, other ties.

Blocks of fixed size are scaled in the pass that rounds them. Where one scale serves a row or the tensor, a first pass
finds the amax, the scale is computed by `fp4dist.numerics.scales` (moments too, in torch), and a second pass rounds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fp4dist import numerics
from fp4dist.kernels import grid_facts
from fp4dist.kernels.triton import filters, levels, moments, tiles
from fp4dist.kernels.triton import grid_programs as p
from fp4dist.kernels.triton.grid_values import (
    SCALES,
    dequantize,
    grid_constants,
    has_values,
    table_of,
    to_carrier,
)
from fp4dist.kernels.triton.noise import place
from fp4dist.kernels.triton.signs import sign_words
from fp4dist.numerics import scales
from fp4dist.numerics.grouping import Grouping, ReduceMax
from fp4dist.numerics.quantize import original
from fp4dist.numerics.rotation import rotate
from fp4dist.numerics.tensor import CODES, BlockScaledTensor, Carrier, Key, Want
from fp4dist.spec.blocks import AbsMax, Ceil, Eden, Ema, Floor, FourOverSix, Hadamard, Nearest, Quest, Sawb, Stochastic
from fp4dist.spec.recipe import QuantSpec

_METRICS = {"mse": 0, "mae": 1, "absmax": 2}
_TIES = {"even": 0, "up": 2}
_LARGEST_BLOCK = 256  # columns, and rows of square blocks below


def why_not(spec: QuantSpec) -> str | None:
    """The first block of `spec` that these kernels lack, or None."""
    rows, columns = spec.shape
    element, rule, rounding, scale = spec.format.element, spec.rule, spec.rounding, spec.format.scale.name
    whole = 0 in spec.shape
    lacks = (
        (element.mantissa is None and len(element.levels) > 8, f"grid of {len(element.levels)} levels"),
        (element.mantissa not in (None, 2, 3), f"elements {element.name}"),
        (element.mantissa is not None and not isinstance(rounding, Nearest), f"{rounding.kind} rounding to FP8"),
        (not whole and (not 16 <= columns <= _LARGEST_BLOCK or rows not in (1, 16, 32)), f"blocks {[rows, columns]}"),
        (not isinstance(rule, AbsMax | FourOverSix | Floor | Ceil | Quest | Sawb), f"scale rule {rule.kind}"),
        (isinstance(rule, Quest | Sawb) and scale != "e8m0" and not whole, f"{rule.kind} under {scale} scales"),
        (isinstance(rule, Floor | Ceil) and scale == "fp32" and not whole, f"{rule.kind} under {scale} scales"),
        (isinstance(rule, FourOverSix) and not isinstance(rounding, Nearest), f"four-over-six with {rounding.kind}"),
        (isinstance(rule, FourOverSix) and scale == "fp32", "four-over-six under fp32 scales"),
        (isinstance(rounding, Eden) and rounding.align != "pre", "eden with align: post_hoc"),
        (isinstance(rounding, Eden) and rounding.four_over_six != "none", "eden with four-over-six"),
        (
            isinstance(spec.above, tuple) and (spec.above[0] != 1 or spec.above[1] > _LARGEST_BLOCK),
            f"outer {spec.above}",
        ),
        (spec.has_parts, "operands in parts"),
    )
    return next((f"the Triton grids have no {what}" for missing, what in lacks if missing), None)


def quantize(
    source: Tensor | BlockScaledTensor,
    spec: QuantSpec,
    key: Key | None = None,
    reduce_max: ReduceMax | None = None,
    toward: Tensor | None = None,
    *,
    want: Want = CODES,
) -> BlockScaledTensor | Carrier:
    """The codes of a matrix, or of the transpose of codes; see `fp4dist.numerics.quantize`."""
    tiled = tiles.takes(spec, want)
    if isinstance(source, BlockScaledTensor) and not (tiled and tiles.reads(source)):
        source = (dequantize(source) if has_values(source) else numerics.dequantize(source)).t()
    if tiled:
        return tiles.quantize(source, spec, key, want)
    assert isinstance(source, Tensor)
    if levels.takes(spec, want, source.shape[1], toward):
        return _Launch(source, spec, key, reduce_max, None).levels(want)
    q = _codes(source, spec, key, reduce_max, toward)
    if want.carrier is None:
        return q
    carrier = to_carrier(q, want.carrier)
    return replace(q, carrier=carrier) if want.codes else carrier


def requantize(
    q: BlockScaledTensor,
    spec: QuantSpec,
    key: Key | None = None,
    reduce_max: ReduceMax | None = None,
    *,
    want: Want = CODES,
    back: tuple[Hadamard | None, Key | None] | None = None,
) -> BlockScaledTensor | Carrier:
    """The codes of `q`'s transpose; see `fp4dist.numerics.requantize`. back: (rotation, key) of the basis of `q`."""
    if back is not None:
        turn = filters.original if back[0] is not None and filters.why_no_original(q) is None else original
        return quantize(turn(q, *back).t(), spec, key, reduce_max, want=want)
    if q.rotation != 1:
        raise ValueError(f"requantize needs codes in the original basis, got rotation {q.rotation}")
    return quantize(q, spec, key, reduce_max, want=want)


@torch.no_grad()
def _codes(
    x: Tensor, spec: QuantSpec, key: Key | None, reduce_max: ReduceMax | None, toward: Tensor | None
) -> BlockScaledTensor:
    launch = _Launch(x, spec, key, reduce_max, toward)
    if 0 in spec.shape:
        return launch.under_given_scales()
    return launch.in_blocks()


@dataclass(frozen=True, slots=True)
class _Measured(Grouping):
    """A Grouping whose amax a kernel has found: [rows, 1], or [1, 1]."""

    found: Tensor

    def amax(self, x: Tensor) -> Tensor:
        """Grid-shaped amax of the logical rows, or of the logical tensor."""
        return self._tensor_max(self.found).reshape(1, 1) if self.spec.shape[0] == 0 else self._row_max(self.found)

    def moments(self, x: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
        """From one reading, where one kernel can."""
        if unit.numel() > 1 or not moments.has_sums(x, self.chunk()):
            return Grouping.moments(self, x.to(torch.float32), unit)
        squares, magnitudes = moments.sums(x, unit, self.chunk())
        return self.total_of(squares), self.total_of(magnitudes)


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
        chosen, block = self.given_scales()
        codes = self.run(p.GIVEN, given=chosen.multiplier)
        return BlockScaledTensor(
            codes, chosen.stored, chosen.global_scale, self.spec.format, block, self.rotation, self.spec.samples
        )

    @torch.no_grad()
    def levels(self, want: Want) -> BlockScaledTensor | Carrier:
        """`under_given_scales` with an FP8 carrier, in one pass."""
        chosen, block = self.given_scales()
        table = table_of(self.spec.format.element, getattr(self.spec.rounding, "ties", "even"), self.x.device)
        codes, carrier = levels.quantize(self.x, self.spec, self.key, want, chosen, table)
        if codes is None:
            return carrier
        return BlockScaledTensor(
            codes, chosen.stored, chosen.global_scale, self.spec.format, block, self.rotation, carrier=carrier
        )

    def given_scales(self) -> tuple[scales.BlockScales, tuple[int, int]]:
        """(scales of rows or of the tensor, the rows and columns of one)."""
        rows, cols = self.x.shape
        by_row = self.spec.shape[0] != 0
        block = (1 if by_row else rows, cols)
        grouping = _Measured(self.x.shape, block, self.spec, self.key, self.reduce_max, self.largest(by_row))
        rule = self.spec.rule
        if isinstance(rule, Floor | Ceil):
            return scales.power_of_two_scales(self.x, self.spec, grouping), block
        turned = isinstance(rule, Quest) or self.spec.rotation is not None
        of_moments = isinstance(rule, Quest | Sawb) and turned
        return scales.ladder(self.in_basis() if of_moments else self.x, self.spec, grouping).at(), block

    def in_blocks(self) -> BlockScaledTensor:
        """A scale for each block, and outer scales above them."""
        spec, grouping = self.spec, Grouping.of(self.x, self.spec, self.key, self.reduce_max)
        stored, outer, outers = grid_facts.room_for_scales(self.x, spec, grouping, self.largest)
        codes = self.run(_rule(spec), outer=outer, scales=stored, outers=outers)
        return BlockScaledTensor(codes, stored, outers, spec.format, spec.shape, self.rotation, spec.samples)

    @property
    def rotation(self) -> int:
        """Size of the Hadamard groups, 1 for none."""
        return self.spec.rotation.size if self.spec.rotation is not None else 1

    def in_basis(self) -> Tensor:
        """[R, C] fp32 in the basis of the codes."""
        x = self.x.to(torch.float32)
        return x if self.spec.rotation is None else rotate(x, self.spec.rotation, self.key)

    def tile(self) -> tuple[tuple[int, int], dict[str, Any]]:
        """(programs, constants): wide tiles along the dimension that is contiguous in memory."""
        rows, cols = self.x.shape
        outer = self.spec.above[1] if isinstance(self.spec.above, tuple) else 1
        needed = max(self.spec.shape[1], self.rotation, outer)
        r, n = (16, max(128, needed)) if self.x.stride(1) == 1 else (64, max(32, needed))
        r = max(r, self.spec.shape[0])
        signed = self.spec.rotation is not None and self.spec.rotation.signs != "none"
        constants = {"R": r, "N": n, "ROT": self.rotation, "SIGNED": signed, "enable_fp_fusion": False}
        return (-(-rows // r), -(-cols // n)), {**constants, "num_warps": 8 if r * n > 4096 else 4}

    def source(self) -> tuple[object, ...]:
        """The kernels' first parameters."""
        return self.x, self.x.stride(0), self.x.stride(1)

    def largest(self, by_row: bool) -> Tensor:
        """[R, 1] or [1, 1] fp32 max |x| in the basis of the codes; NaN where something is NaN."""
        rows = self.x.shape[0]
        top = torch.zeros((rows if by_row else 1, 1), dtype=torch.int32, device=self.x.device)
        programs, tile = self.tile()
        steps = min(16, programs[1])
        p.largest_kernel[programs[0], -(-programs[1] // steps)](
            *self.source(), sign_words(self.spec.rotation, self.key, self.x.device), top, *self.x.shape, **tile,
            STEPS=steps, BY_ROW=by_row,
        )  # fmt: skip
        return top.view(torch.float32)

    def run(
        self, rule: int, *, given: Tensor | None = None, outer: Tensor | None = None, scales: Tensor | None = None,
        outers: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """[R, samples * width] the codes; fills `scales` and `outers`."""
        spec, (rows, cols) = self.spec, self.x.shape
        element = spec.format.element
        width = cols // 2 if element.packed else cols
        codes = torch.empty((rows, spec.samples * width), dtype=torch.uint8, device=self.x.device)
        for i in range(spec.samples):
            self._launch(rule, codes[:, i * width :], i, given, outer, scales, outers)
        return codes

    def _launch(
        self, rule: int, codes: Tensor, sample: int, given: Tensor | None, outer: Tensor | None, stored: Tensor | None,
        outers: Tensor | None,
    ) -> None:  # fmt: skip
        spec, (rows, cols), rounding = self.spec, self.x.shape, self.spec.rounding
        programs, tile = self.tile()
        toward = self.toward if isinstance(rounding, Ema) and self.toward is not None else None
        key = self.key.sample(sample) if self.key is not None and spec.draws_noise else None
        blocks = place(key if isinstance(rounding, Eden) else None, rows, cols, max(spec.shape[1], 1), self.x.device)
        ties = rounding.ties if isinstance(rounding, Nearest) else "even"
        factors = _Factors.of(spec)
        none = self.x
        p.grid_kernel[programs](
            *self.source(), toward if toward is not None else none,
            *(toward.stride() if toward is not None else (0, 0)),
            sign_words(spec.rotation, self.key, self.x.device), given if given is not None else none,
            0 if given is None or given.numel() == 1 else 1, outer if outer is not None else none,
            table_of(spec.format.element, ties, self.x.device), codes, codes.stride(0),
            stored if stored is not None else none, outers if outers is not None else none, rows, cols,
            *factors.values, *place(key, rows, cols, 8, self.x.device), blocks[4], blocks[8], blocks[9], blocks[10],
            BR=max(spec.shape[0], 1), BC=max(spec.shape[1], 1), RULE=rule, SCALE=SCALES[spec.format.scale.name],
            OUTER=_outer(spec), TILE=spec.above[1] if isinstance(spec.above, tuple) else 1,
            NONZERO=isinstance(spec.rule, AbsMax) and spec.rule.nonzero,
            STD=isinstance(spec.rule, Quest) and spec.rule.spread == "std",
            METRIC=_METRICS[spec.rule.metric] if isinstance(spec.rule, FourOverSix) else 0,
            GROUP=self.rotation if isinstance(rounding, Eden) and rounding.group == "rotation" else 0,
            ROUND=1 if isinstance(rounding, Stochastic) else 2 if toward is not None else 0, TIES=_TIES.get(ties, 1),
            LAST=len(spec.format.element.levels) - 1, **grid_constants(spec.format.element), **tile,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Factors:
    """The numbers of `grid_kernel` from numerator to mantissa."""

    values: tuple[float | int, ...]

    @classmethod
    def of(cls, spec: QuantSpec) -> _Factors:
        rule, element = spec.rule, spec.format.element
        chooser = spec.rounding if isinstance(spec.rounding, Eden) else rule
        v = scales.target_max(element.max, getattr(chooser, "headroom", 1.0))
        numerator = scales.fp32(scales.fp32(getattr(chooser, "budget", 1.0)) * v)
        before = scales.fp32(1.0 / rule.headroom) if isinstance(rule, Floor) else 1.0
        after = element.max if isinstance(rule, Ceil) and rule.of == "amax" else 1.0
        finer = scales.fp32(rule.finer_below) if isinstance(rule, Ceil) else 0.0
        factor = getattr(rule, "factor", None)
        bits = int(torch.tensor(element.max).view(torch.int32))
        return cls((
            numerator, scales.fp32(1.0 / v), v, before, after, finer,
            scales.fp32(scales.QUEST_E2M1 if factor is None else factor), element.exponent, bits & 0x7FFFFF,
        ))  # fmt: skip


def _rule(spec: QuantSpec) -> int:
    rule = spec.rule
    if isinstance(spec.rounding, Eden):
        return p.EDEN
    if isinstance(rule, Ceil):
        return p.CEIL if rule.of == "ratio" else p.CEIL_AMAX
    if isinstance(rule, Quest):
        return p.QUEST_BELOW if rule.power == "floor" else p.QUEST_NEAREST
    return {AbsMax: p.ABSMAX, Floor: p.FLOOR, FourOverSix: p.FOUR_OVER_SIX}[type(rule)]


def _outer(spec: QuantSpec) -> int:
    if isinstance(spec.above, tuple):
        return p.TILES
    return {"none": p.NONE, "tensor": p.ONE, "row": p.ROWS}[spec.above]
