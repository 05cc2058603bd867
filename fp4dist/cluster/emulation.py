"""Quantizing on a GPU without FP4 tensor cores: what the operands of one linear cost there, from measured rates.

The codes' values are written as bf16, or as FP8 where scales are powers of two, and multiplied as such
(docs/measured.md). The kernels are bound by instructions as much as by bytes, so their time is taken as measured.
"""

from __future__ import annotations

from typing import Literal

from fp4dist.spec.blocks import BestOf, Eden, FourOverSix, MseSearch, Nearest, Quest
from fp4dist.spec.operand import QuantSpec
from fp4dist.spec.recipe import LinearRecipe

Work = Literal["nearest", "search", "noise", "eden"]

# Picoseconds an element, carrier written, 64 Mi elements, torch 2.11, Triton 3.6: tools/bench_kernels.py on one H100;
# powers of two (their kernels are newer) on one H200, which has the same multiprocessors.
_FINE: dict[Work, float] = {"nearest": 2.2, "search": 2.65, "noise": 2.2, "eden": 2.85}  # fractional scales, bf16
_POWER: dict[Work, float] = {"nearest": 1.2, "search": 1.6, "noise": 1.7, "eden": 1.7}  # powers of two, FP8
_REQUANTIZED = 1.2  # times as long, where codes and not the operand itself are read
_AMAX = 0.86  # of a pass that finds the largest element, for a scale of the whole tensor; its two uses share it
# A word instead of a recipe means nearest x and stochastic dY in NVFP4, each along both dimensions.
OF_A_WORD = ((_AMAX + 2 * _FINE["nearest"]) * 1e-12, (_AMAX + 2 * _FINE["noise"]) * 1e-12)


def powers_of_two(linear: LinearRecipe, slots: tuple[str, ...]) -> bool:
    """Whether all the operands can be carried in FP8."""
    specs = [linear.slot(slot) for slot in slots]
    return all(s is not None and s.is_fp4 and s.format.scale.name == "e8m0" and not s.has_parts for s in specs)


def seconds(linear: LinearRecipe, *slots: str) -> float:
    """Time of each element of a tensor that `slots` are made from (fprop.x and wgrad.x, or the two of dY)."""
    specs = [s for s in map(linear.slot, slots) if s is not None and s.is_fp4]
    whole = _AMAX if any(s.above == "tensor" for s in specs) else 0.0
    return 1e-12 * (whole + sum(_one(s) for s in specs))


def _one(spec: QuantSpec) -> float:
    if spec.source == "reuse":
        return 0.0
    times = (_POWER if spec.format.scale.name == "e8m0" else _FINE)[_work(spec)]
    return times * (_REQUANTIZED if spec.source == "requant" else 1.0)


def _work(spec: QuantSpec) -> Work:
    if isinstance(spec.rounding, Eden):
        return "eden"
    if isinstance(spec.rule, FourOverSix | BestOf | MseSearch | Quest):
        return "search"
    return "nearest" if isinstance(spec.rounding, Nearest) else "noise"
