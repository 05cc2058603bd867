"""A quantization as the numbers that `grid_job_of` in csrc/grid.cu reads."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fp4dist.kernels.cuda import jobs
from fp4dist.numerics import codes as c
from fp4dist.numerics import scales
from fp4dist.numerics.tensor import Key
from fp4dist.spec.blocks import (
    AbsMax,
    BestOf,
    Ceil,
    Eden,
    Floor,
    FourOverSix,
    MseSearch,
    Nearest,
    Quest,
    Stochastic,
)
from fp4dist.spec.formats import E2M1, ElementFormat
from fp4dist.spec.recipe import QuantSpec

# enum GridRule, Above, ScaleKind of csrc/grid.h
GIVEN, OF_AMAX, BELOW, ABOVE, ABOVE_AMAX, SPREAD_BELOW, SPREAD_NEAREST, SEARCH, CORRECTED = range(9)
NOTHING, OF_TENSOR, OF_ROWS, OF_TILES = range(4)
SCALES = {"e4m3": 0, "e8m0": 1, "ue5m3": 2, "e4m3_inverse": 3, "fp32": 4}
LEVELS = 8  # at most, of a grid
STRIP = 16  # columns of a thread
SEARCHES = (FourOverSix, BestOf, MseSearch)


class Settings(NamedTuple):
    """What every matrix of a spec has in common.

    middle   integers from rotation to packed;  last   those from tries on;  floats   all of them
    block    rows and columns that share a scale in the kernel
    noisy    whether elements draw noise;  twice   and a second time;  corrected   whether scales do
    """

    middle: tuple[int, ...]
    last: tuple[int, int, int]
    floats: tuple[float, ...]
    block: tuple[int, int]
    noisy: bool
    twice: bool
    corrected: bool


@lru_cache(maxsize=256)
def settings(spec: QuantSpec, rule: int, toward: bool) -> Settings:
    """For the launch under `rule` (GIVEN, or `rule_of`). toward: rounding leans on a moving average."""
    element, rounding = spec.format.element, spec.rounding
    eden = rounding if isinstance(rounding, Eden) and rule == CORRECTED else None
    given, tries = rule == GIVEN, stretches(spec) if rule == SEARCH else ()
    noisy, rotation = isinstance(rounding, Stochastic), spec.rotation.size if spec.rotation is not None else 1
    block = (1, STRIP) if given else spec.shape
    group = STRIP if eden is None else rotation if eden.group == "rotation" else block[1]
    metric = eden.four_over_six if eden is not None else getattr(spec.rule, "metric", "mse")
    grid, table = _grid(element, rounding.ties if isinstance(rounding, Nearest) else "even")
    middle = (
        rotation, *block, rule, SCALES[spec.format.scale.name], NOTHING if given or is_post_hoc(spec) else _above(spec),
        spec.above[1] if isinstance(spec.above, tuple) and not given else 1,
        int(isinstance(spec.rule, AbsMax) and spec.rule.nonzero),
        int(isinstance(spec.rule, Quest) and spec.rule.spread == "std"), jobs.METRICS.get(metric, 0), group,
        1 if noisy else 2 if toward else 0, element.exponent,
        int(torch.tensor(element.max).view(torch.int32)) & 0x7FFFFF, *grid,
    )  # fmt: skip
    number = len(tries) if tries else 2 if eden is not None and eden.four_over_six != "none" else 1
    cut = 23 - eden.truncate if eden is not None and eden.truncate else 0
    last = number, cut, int(eden is not None and is_post_hoc(spec))
    floats = (*_factors(spec), *table, *tries)
    return Settings(middle, last, floats, block, noisy, noisy and bool(tries), eden is not None)


def job(
    x: Tensor, spec: QuantSpec, key: Key | None, toward: Tensor | None, rule: int, sample: int = 0, by_row: bool = False
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """(integers, floats) for [R, C] `x`. sample: number of the draw; by_row: multipliers are those of rows."""
    (rows, cols), of = x.shape, settings(spec, rule, toward is not None)
    draw = key.sample(sample) if key is not None else None
    second = draw.second_try() if draw is not None and of.twice else None
    blocks = jobs.place(draw, rows, cols, of.block[1]) if of.corrected else jobs.place(second, rows, cols, 8)
    how = (
        *x.stride(), int(x.dtype == torch.float32), rows, cols,
        *((*toward.stride(), int(toward.dtype == torch.float32)) if toward is not None else (0, 0, 0)), int(by_row),
        *of.middle, *jobs.signs(spec.rotation, key), *jobs.place(draw if of.noisy else None, rows, cols, 8), *blocks,
        *of.last,
    )  # fmt: skip
    return how, of.floats


def when(key: Key | None) -> Tensor | None:
    """Step and micro-batch in device memory, where the key has them there."""
    return None if key is None or key.moment is None else key.moment.time


def is_post_hoc(spec: QuantSpec) -> bool:
    """Whether MS-EDEN finds the outer scale after the codes."""
    return isinstance(spec.rounding, Eden) and spec.rounding.align == "post_hoc"


@lru_cache(maxsize=256)
def stretches(spec: QuantSpec) -> tuple[float, ...]:
    """Of the amax's scale, where several are tried."""
    rule = spec.rule
    if isinstance(rule, FourOverSix):
        return 1.0, 1.5
    if isinstance(rule, BestOf):
        return 1.0, *map(scales.fp32, rule.also)
    if isinstance(rule, MseSearch):
        shrink = (1.0 - rule.lowest) / rule.steps
        return tuple(scales.fp32(1.0 - i * shrink) for i in range(rule.steps + 1))
    return ()


def rule_of(spec: QuantSpec) -> int:
    """The scale rule, for blocks of fixed size."""
    rule = spec.rule
    if isinstance(spec.rounding, Eden):
        return CORRECTED
    if isinstance(rule, Ceil):
        return ABOVE if rule.of == "ratio" else ABOVE_AMAX
    if isinstance(rule, Quest):
        return SPREAD_BELOW if rule.power == "floor" else SPREAD_NEAREST
    return SEARCH if isinstance(rule, SEARCHES) else {AbsMax: OF_AMAX, Floor: BELOW}[type(rule)]


def _above(spec: QuantSpec) -> int:
    if isinstance(spec.above, tuple):
        return OF_TILES
    return {"none": NOTHING, "tensor": OF_TENSOR, "row": OF_ROWS}[spec.above]


@lru_cache(maxsize=256)
def _factors(spec: QuantSpec) -> tuple[float, ...]:
    """From numerator to factor."""
    rule, element = spec.rule, spec.format.element
    chooser: Any = spec.rounding if isinstance(spec.rounding, Eden) else rule
    v = scales.target_max(element.max, getattr(chooser, "headroom", 1.0))
    numerator = scales.fp32(scales.fp32(getattr(chooser, "budget", 1.0)) * v)
    before = scales.fp32(1.0 / rule.headroom) if isinstance(rule, Floor) else 1.0
    after = element.max if isinstance(rule, Ceil) and rule.of == "amax" else 1.0
    finer = scales.fp32(rule.finer_below) if isinstance(rule, Ceil) else 0.0
    factor = getattr(rule, "factor", None)
    return (
        numerator, scales.fp32(1.0 / v), v, before, after, finer,
        scales.fp32(scales.QUEST_E2M1 if factor is None else factor),
    )  # fmt: skip


@lru_cache(maxsize=256)
def _grid(element: ElementFormat, ties: str) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """(integers from e2m1 to packed, floats from largest on) of `grid_job_of` in csrc/grid.cu."""
    last = len(element.levels) - 1
    by_sign = ties == "up"
    integers = (
        int(element == E2M1 and ties == "even"), element.mantissa or 0, int(by_sign), last, 1 << element.bits - 1,
        int(element.packed),
    )  # fmt: skip
    if element.mantissa is not None:
        return integers, (element.max, *([0.0] * (3 * LEVELS - 3 + 3 * LEVELS)))
    cpu, infinite = torch.device("cpu"), [float("inf")] * LEVELS
    found = [element.max]
    for way in ("away", "to_zero") if by_sign else (ties, ties):
        found += [*c.nearest_boundaries(element, way), *infinite][: LEVELS - 1]
    found += [*element.levels[1:], *infinite][: LEVELS - 1]
    levels, gaps = c.levels_and_gaps(element, cpu).t().tolist()
    for values in (levels, gaps, c.middles(element, cpu).tolist()):
        found += [*values, *([values[-1]] * LEVELS)][:LEVELS]
    return integers, tuple(found)
