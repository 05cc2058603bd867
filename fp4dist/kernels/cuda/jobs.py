"""A quantization as the numbers that `csrc/jobs.h` reads: what lies where, the rule's constants, signs and noise."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fp4dist.numerics.rng import MASK, philox, run_words
from fp4dist.numerics.rotation import FIXED_SIGNS
from fp4dist.numerics.scales import QUEST_E2M1, fp32, target_max
from fp4dist.numerics.tensor import BlockScaledTensor, Key
from fp4dist.spec.blocks import AbsMax, Ceil, Eden, Floor, FourOverSix, Hadamard, Nearest, Quest, Stochastic
from fp4dist.spec.formats import E2M1
from fp4dist.spec.recipe import QuantSpec

# enum Source and enum Rule of csrc/quantize.h
BFLOAT16, FLOAT, CODES_E4M3, CODES_E8M0 = range(4)
AMAX, FLOOR, CEIL, CEIL_AMAX, QUEST_FLOOR, QUEST_NEAREST, FOUR_OVER_SIX, EDEN, MEASURE = range(9)
METRICS = {"mse": 0, "mae": 1, "absmax": 2}
MOST_BACK = 32  # the largest rotation that codes are turned back from in registers

Family = Literal["amax", "four_over_six", "eden", "power", "quest"]
# What was compiled (csrc/quantize_*.cu): family -> (rows of a block, rotation, noise).
INSTANCES: dict[Family, frozenset[tuple[int, int, bool]]] = {
    "amax": frozenset({(1, 1, False), (1, 16, False), (16, 1, False), (1, 1, True), (1, 16, True), (1, 32, True)}),
    "four_over_six": frozenset({(1, 1, False), (16, 1, False)}),
    "eden": frozenset({(1, 16, False), (1, 32, False), (1, 128, False)}),
    "power": frozenset({(1, 1, False), (1, 1, True), (1, 32, False), (32, 1, False)}),
    "quest": frozenset({(1, 32, False), (1, 128, False)}),
}
# Likewise of pairs: (family, rotation, noise) of the rows, and of the columns.
_PAIRS = frozenset({
    (("amax", 1, False), ("amax", 1, False)), (("amax", 1, False), ("amax", 1, True)),
    (("amax", 1, False), ("amax", 16, False)), (("amax", 1, True), ("amax", 1, True)),
    (("amax", 1, True), ("amax", 16, True)), (("amax", 32, True), ("amax", 32, True)),
    (("four_over_six", 1, False), ("amax", 16, False)), (("eden", 128, False), ("eden", 128, False)),
    (("power", 1, True), ("power", 1, True)), (("power", 32, False), ("power", 32, False)),
    (("power", 1, False), ("power", 32, False)), (("power", 1, True), ("power", 32, False)),
})  # fmt: skip


MISFITS_ALONE = 4  # kMisfitsAlone of csrc/decode.h
_BEFORE = 3  # among Form.factors


@dataclass(frozen=True, slots=True)
class Form:
    """What of a spec is the same for every matrix.

    integers   from rule to nonzero, factors from numerator to factor: in the order of `csrc/jobs.h`
    shared     the decode scale of a tensor whose scales have none of their own, else None
    """

    family: Family
    rule: int
    integers: tuple[int, ...]
    factors: tuple[float, ...]
    rotation: int
    noisy: bool
    shared: float | None
    v: float
    budget: float

    @property
    def needs_amax(self) -> bool:
        """Whether the tensor's amax decides the scales."""
        return self.rule in (AMAX, FOUR_OVER_SIX)

    @property
    def values_alone(self) -> bool:
        """Whether kernels write FP8 values without codes: no element is above 7 units of its block's scale."""
        return self.rule == CEIL or (self.rule == FLOOR and self.factors[_BEFORE] < 0.875)


@lru_cache(maxsize=1024)
def form_of(spec: QuantSpec) -> Form:
    """The numbers of a spec that `why_not` has nothing against."""
    rule, rounding = spec.rule, spec.rounding
    eden = rounding if isinstance(rounding, Eden) else None
    noisy, rotation = isinstance(rounding, Stochastic), spec.rotation.size if spec.rotation else 1
    v = target_max(E2M1.max, eden.headroom if eden else getattr(rule, "headroom", 1.0))
    budget = eden.budget if eden else getattr(rule, "budget", 1.0)
    number = _rule_number(spec)
    quest = rule if isinstance(rule, Quest) else None
    integers = (
        number, int(noisy), rotation, *spec.shape, METRICS[rule.metric] if isinstance(rule, FourOverSix) else 0,
        int(quest is not None and quest.spread == "std"), int(isinstance(rule, AbsMax) and rule.nonzero),
    )  # fmt: skip
    factors = (
        fp32(fp32(budget) * v), fp32(1.0 / v), v, fp32(1.0 / rule.headroom) if isinstance(rule, Floor) else 1.0,
        fp32(rule.finer_below) if isinstance(rule, Ceil) else 0.0,
        fp32(QUEST_E2M1 if quest is None or quest.factor is None else quest.factor),
    )  # fmt: skip
    return Form(family_of(spec), number, integers, factors, rotation, noisy, _shared_scale(spec), v, budget)


def _rule_number(spec: QuantSpec) -> int:
    rule = spec.rule
    if isinstance(spec.rounding, Eden):
        return EDEN
    if isinstance(rule, Ceil):
        return CEIL if rule.of == "ratio" else CEIL_AMAX
    if isinstance(rule, Quest):
        return QUEST_FLOOR if rule.power == "floor" else QUEST_NEAREST
    return {AbsMax: AMAX, Floor: FLOOR, FourOverSix: FOUR_OVER_SIX}[type(rule)]


def _shared_scale(spec: QuantSpec) -> float | None:
    if spec.format.scale.name != "e8m0":
        return None
    if isinstance(spec.rule, Floor):
        return fp32(spec.rule.headroom)
    return fp32(1.0 / E2M1.max) if isinstance(spec.rule, Ceil) and spec.rule.of == "amax" else 1.0


def family_of(spec: QuantSpec) -> Family:
    """Which file of csrc/ has the kernel, if one has."""
    if isinstance(spec.rounding, Eden):
        return "eden"
    if isinstance(spec.rule, FourOverSix):
        return "four_over_six"
    if isinstance(spec.rule, Quest):
        return "quest"
    return "amax" if isinstance(spec.rule, AbsMax) else "power"


@lru_cache(maxsize=1024)
def why_not(spec: QuantSpec) -> str | None:
    """The first block of `spec` that these kernels lack, or None."""
    rule, rounding, scale = spec.rule, spec.rounding, spec.format.scale.name
    columns = {"e4m3": 16, "e8m0": 32}.get(scale)
    eden = rounding if isinstance(rounding, Eden) else None
    lacks = (
        (spec.format.element != E2M1, f"elements {spec.format.element.name}"),
        (columns is None, f"{scale} scales"),
        (spec.shape[1] != columns, f"blocks {list(spec.shape)} of {scale} scales"),
        (scale == "e4m3" and spec.above != "tensor", f"outer {spec.above}"),
        (not isinstance(rule, AbsMax | FourOverSix | Floor | Ceil | Quest), f"scale rule {rule.kind}"),
        (isinstance(rule, AbsMax | FourOverSix) != (scale == "e4m3"), f"scale rule {rule.kind} under {scale} scales"),
        (spec.samples > 1, "several samples"),
        (not isinstance(rounding, Nearest | Stochastic | Eden), f"rounding {rounding.kind}"),
        (isinstance(rounding, Nearest) and rounding.ties != "even", "ties other than to even"),
        (eden is not None and eden.align != "post_hoc", "eden with align: pre"),
        (eden is not None and eden.four_over_six != "none", "eden with four-over-six"),
        (eden is not None and eden.group != "block", "eden with group: rotation"),
        (eden is not None and eden.truncate > 0, "eden with truncate"),
        (spec.has_parts, "operands in parts"),
    )
    found = next((what for missing, what in lacks if missing), None)
    if found is None:
        built = spec.shape[0], spec.rotation.size if spec.rotation else 1, isinstance(rounding, Stochastic)
        if built not in INSTANCES[family_of(spec)]:
            found = f"kernel for {family_of(spec)} with blocks {list(spec.shape)}, rotation {built[1]}" + (
                ", stochastic" if built[2] else ""
            )
    return f"the CUDA quantizer has no {found}" if found else None


def why_not_pair(row: QuantSpec, column: QuantSpec) -> str | None:
    """Why one reading of a matrix cannot serve both specs, or None."""
    reason = why_not(row) or why_not(column)
    if reason is not None:
        return reason
    a, b = form_of(row), form_of(column)
    both = (a.family, a.rotation, a.noisy), (b.family, b.rotation, b.noisy)
    if row.shape[0] != 1 or column.shape[0] != 1 or both not in _PAIRS:
        return f"the CUDA quantizer has no kernel for the pair {row.label()} and {column.label()}"
    return None


class Source(NamedTuple):
    """What a kernel reads.

    tensor   the memory;  stride   elements (of codes: bytes) between its rows;  kind   enum Source of csrc/quantize.h
    shape    [rows, cols] in the output's orientation;  turned   whether memory holds the transpose
    codes    where it is codes, with turn (size, sign bits) of the rotation that they are turned back from
    """

    tensor: Tensor
    stride: int
    kind: int
    shape: tuple[int, int]
    turned: bool
    codes: BlockScaledTensor | None = None
    turn: tuple[int, int] = (1, 0)

    @classmethod
    def of(cls, source: Tensor | BlockScaledTensor, turn: tuple[int, int] = (1, 0)) -> Source:
        """A matrix [R, C], or the transpose [C, R] of codes. One that is neither rows nor columns is copied."""
        if not isinstance(source, Tensor):
            columns, rows = source.shape
            codes = source.codes if source.codes.stride(1) == 1 else source.codes.contiguous()
            kind = CODES_E4M3 if source.format.scale.name == "e4m3" else CODES_E8M0
            return cls(codes, codes.stride(0), kind, (rows, columns), True, source, turn)
        kind = {torch.bfloat16: BFLOAT16, torch.float32: FLOAT}.get(source.dtype)
        if source.dim() != 2 or kind is None:
            raise TypeError(f"quantize: expected a bf16 or fp32 matrix, got {source.dtype} {list(source.shape)}")
        (rows, cols), (down, right) = source.shape, source.stride()
        if right == 1 or cols == 1:
            return cls(source, max(down, cols), kind, (rows, cols), False)
        if down == 1:
            return cls(source.t(), right, kind, (rows, cols), True)
        return cls.of(source.contiguous())

    def integers(self, form: Form, swizzled: bool, rule: int | None = None) -> tuple[int, ...]:
        """The first 18 of a job."""
        q, (back, signs) = self.codes, self.turn
        block = q.block if q is not None else (1, 16)
        found = form.integers if rule is None else (rule, 0, form.rotation, 1, 16, 0, 0, 0)
        return (
            self.stride, self.kind, int(self.turned), *self.shape, *block, back, signs * (0x10001 if back == 16 else 1),
            *found, int(swizzled),
        )  # fmt: skip

    def nth(self) -> float:
        """1 / the size of the rotation that codes are turned back from."""
        return 1.0 / self.turn[0]


def place(key: Key | None, rows: int, columns: int, group: int) -> tuple[int, ...]:
    """The twelve numbers of a Place for a shard of [rows, columns] in groups of `group` columns."""
    counted = columns // group
    if key is None:
        return (0, 0, 0, 0, 0, 1, rows, 0, 0, counted, 0, 0)
    if len(key.row_runs) > 2 or len(key.column_runs) > 2:
        raise ValueError(f"at most two runs of rows and columns, got {key.row_runs} and {key.column_runs}")
    width = key.columns // group if key.columns else counted
    rows_from = (*key.row_runs, 0)[:2]
    groups_from = (*(start // group for start in key.column_runs), 0)[:2]
    words = key.seed & MASK, key.layer & MASK, *run_words(key)
    return (
        *words, width, rows // len(key.row_runs), *rows_from, counted // len(key.column_runs), *groups_from,
    )  # fmt: skip


def signs(rotation: Hadamard | None, key: Key | None) -> tuple[int, ...]:
    """The ten numbers of Signs: mode, four words, and where fresh ones are drawn."""
    if rotation is None or rotation.signs == "none":
        return (0,) * 10
    if rotation.signs == "fixed":
        mask = sum(1 << i for i, s in enumerate(FIXED_SIGNS) if s < 0) if rotation.mask is None else rotation.mask
        return (1, *(mask >> 32 * i & MASK for i in range(4)), 0, 0, 0, 0, 0)
    if key is None:
        raise ValueError("a rotation with fresh signs needs a key")
    drawn = key.signs()
    return (2, 0, 0, 0, 0, drawn.seed & MASK, drawn.layer & MASK, *run_words(drawn))


def sign_bits(rotation: Hadamard | None, key: Key | None) -> int | None:
    """The first 32 sign bits of a rotation; None where they are drawn on the device."""
    found = signs(rotation, key)
    if found[0] < 2:
        return found[1]
    if key is not None and key.moment is not None:
        return None
    k0, k1, c1, c2, c3 = found[5:10]
    drawn = philox((0, c1, c2, c3), (k0, k1))
    return int(drawn[0])
