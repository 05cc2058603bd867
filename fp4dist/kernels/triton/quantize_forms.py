# pyright: reportCallIssue=false, reportArgumentType=false
# (a launch takes options beside the kernel's own parameters)
"""What the quantizers of E2M1 with E4M3 scales are compiled for: tiles, and launches that serve all matrices alike."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fp4dist.kernels.triton.launch import Launch
from fp4dist.kernels.triton.programs import amax_kernel, quantize_kernel
from fp4dist.kernels.triton.sources import Source, number_of, width_of_strip
from fp4dist.numerics.scales import fp32, target_max
from fp4dist.numerics.tensor import Want
from fp4dist.spec.blocks import AbsMax, BestOf, FourOverSix, ScaleRule, Stochastic
from fp4dist.spec.formats import E2M1
from fp4dist.spec.recipe import QuantSpec

_MOST_STRETCHES = 4  # of `programs`


def stretches(rule: ScaleRule) -> int | None:
    """RULE of `programs`: what a rule multiplies the amax's scale by beside 1, in 16ths, a byte each, the first lowest.

    None where that cannot be written so.
    """
    factors = (1.5,) if isinstance(rule, FourOverSix) else rule.also if isinstance(rule, BestOf) else ()
    exact = len(factors) <= _MOST_STRETCHES and all(0 < f < 16 and (16 * f).is_integer() for f in factors)
    return sum(int(16 * f) << 8 * i for i, f in enumerate(factors)) if exact else None


# (rows, columns) of a tile and warps, by how the matrix is read (READ of `programs`) and the columns of a block: the
# fastest of those tried on an H100 with 16384 x 4096 bf16.
_TILES = {
    (0, 16): (32, 128, 4), (0, 32): (32, 128, 4), (1, 16): (64, 64, 4), (1, 32): (64, 128, 4),
    (2, 16): (32, 128, 4), (2, 32): (64, 128, 4),
}  # fmt: skip
_WIDE = {(1, 16): (64, 128, 8)}  # for rotations that do not fit into the columns above
BACK = (128, 64, 4)  # for codes that are turned back: a warp has 32 rows side by side


def _tile(src: Source, block: tuple[int, int], rotation: int, signed: bool) -> dict[str, Any]:
    """The constants that every kernel has for its tile of `src`, and the options of its launch."""
    kind = src.read, block[1]
    rows, columns, warps = _TILES[kind]
    if columns < rotation:
        rows, columns, warps = _WIDE[kind]
    if src.turn[0] > 1:
        rows, columns, warps = BACK
    return {
        "R": max(rows, block[0]), "N": columns, "E": block[1], "ROT": rotation, "SIGNED": signed,
        "W": 32 * block[1] // columns, **src.constants(), "num_warps": warps, "enable_fp_fusion": False,
    }  # fmt: skip


def programs_of(shape: tuple[int, int], rows: int, columns: int) -> int:
    """Tiles of a matrix."""
    return -(-shape[0] // rows) * -(-shape[1] // columns)


def line_of(src: Source) -> int:
    """LINE of `programs`, where a kernel is compiled for it: of x^T that is read in words. Else 0."""
    return src.stride if src.read == 1 and src.in_words else 0


class Amax(NamedTuple):
    """A launch of `amax_kernel` for all matrices of one layout.

    steps   tiles that a program looks through
    """

    form: Hashable
    constants: dict[str, Any]
    steps: int
    run: Launch

    @classmethod
    def of(cls, src: Source, columns: int, rotation: int, signed: bool) -> Amax:
        """For blocks of `columns` columns in the basis of a rotation of that size, 1 for none."""
        width = width_of_strip(src.shape[1])
        form = ("amax", columns, rotation, signed, width, src.layout())
        found = _AMAX.get(form)
        if found is None:
            constants = _tile(src, (1, columns), rotation, signed)
            r, n = constants["R"], constants["N"]
            steps = max(1, width // n)
            even = src.shape[0] % r == 0 and src.shape[1] % (n * steps) == 0
            constants = {**constants, "EVEN": even, "STEPS": steps}
            run = Launch(amax_kernel, constants, (0,) if src.in_words else ())
            found = _AMAX[form] = cls(form, constants, steps, run)
        return found

    def programs(self, shape: tuple[int, int]) -> int:
        """How many look through a matrix."""
        return programs_of(shape, self.constants["R"], self.constants["N"] * self.steps)


_AMAX: dict[Hashable, Amax] = {}


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """What is the same for all matrices of one layout under one spec.

    scalars   the kernel's numerator and inverse_v
    form      names the compiled kernel
    """

    spec: QuantSpec
    form: Hashable
    constants: dict[str, Any]
    scalars: tuple[float, ...]
    rotation: int
    noisy: bool
    amax: Amax
    run: Launch

    @property
    def light(self) -> bool:
        """Whether memory, not arithmetic, bounds it."""
        return self.constants["RULE"] == 0 and self.rotation <= (1 if self.noisy else 16)

    @classmethod
    def of(cls, src: Source, spec: QuantSpec, want: Want, signed: bool) -> Form:
        """That of a matrix; signed: its rotation has signs."""
        form = (
            number_of(spec),
            want.codes,
            want.carrier,
            signed,
            width_of_strip(src.shape[1]),
            line_of(src),
            src.layout(),
        )
        found = _FORMS.get(form)
        if found is None:
            found = _FORMS[form] = cls._new(src, spec, want, signed, form)
        return found

    @classmethod
    def _new(cls, src: Source, spec: QuantSpec, want: Want, signed: bool, form: Hashable) -> Form:
        rule, rounding = spec.rule, spec.rounding
        if want.carrier not in (None, torch.bfloat16):
            raise ValueError(f"{spec.label()} has no carrier in {want.carrier}; ask for bf16")
        rotation = spec.rotation.size if spec.rotation else 1
        rows, cols = src.shape
        carrier = want.carrier is not None
        constants = {
            "BR": spec.shape[0], "RULE": stretches(rule),
            "METRIC": {"mse": 0, "mae": 1, "absmax": 2}[getattr(rule, "metric", "mse")],
            "ROUND": int(isinstance(rounding, Stochastic)),
            "NONZERO": isinstance(rule, AbsMax) and rule.nonzero, "CODES": want.codes,
            "CARRIER": carrier, **_tile(src, spec.shape, rotation, signed),
        }  # fmt: skip
        several = constants["RULE"] > 0xFF and src.read == 0
        if several:  # scales to try: one block a thread, because two would need too many registers
            constants["R"] = max(16, spec.shape[0])
        r, n = constants["R"], constants["N"]
        v = target_max(E2M1.max, getattr(rule, "headroom", 1.0))
        scalars = fp32(fp32(getattr(rule, "budget", 1.0)) * v), fp32(1.0 / v)
        constants["EVEN"] = rows % r == 0 and cols % n == 0
        constants["LINE"] = line_of(src) if constants["EVEN"] else 0
        if constants["RULE"] and want.codes and carrier and not several:
            constants["maxnreg"] = 128  # a few more, and a quarter fewer warps fit on a multiprocessor
        words = (*((0,) if src.in_words else ()), *((10,) if want.codes else ()), *((12,) if carrier else ()))
        return cls(
            spec, ("quantize", form), constants, scalars, rotation, isinstance(rounding, Stochastic),
            Amax.of(src, spec.shape[1], rotation, signed), Launch(quantize_kernel, constants, words),
        )  # fmt: skip


_FORMS: dict[Hashable, Form] = {}
