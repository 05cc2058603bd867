"""The launches of `powers`: their tiles and constants, one for all matrices of one layout under one spec."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fp4dist.kernels.triton.filters import _has_asm
from fp4dist.kernels.triton.launch import Launch
from fp4dist.kernels.triton.noise import PLACE
from fp4dist.kernels.triton.power_programs import power_kernel, power_pair_kernel
from fp4dist.kernels.triton.quantize import _constant
from fp4dist.kernels.triton.signs import has_signs
from fp4dist.kernels.triton.sources import Source, number_of
from fp4dist.numerics.scales import QUEST_E2M1, fp32
from fp4dist.numerics.tensor import BlockScaledTensor, Want
from fp4dist.spec.blocks import Ceil, Floor, Quest, Stochastic
from fp4dist.spec.recipe import QuantSpec

_KINDS = {None: 0, torch.bfloat16: 16, torch.float8_e5m2: 5, torch.float8_e4m3fn: 4}
_FP8 = torch.float8_e5m2, torch.float8_e4m3fn
NARROW = (5, 4)  # of these: those that may not hold every value
# (rows, columns) of a tile and warps, by how the matrix is read (READ of `programs`) and the columns of a block
_TILES = {
    (0, 16): (32, 128, 4), (0, 32): (64, 128, 4), (1, 16): (64, 64, 4), (1, 32): (128, 64, 4),
    (2, 16): (32, 128, 4), (2, 32): (64, 128, 4),
}  # fmt: skip
_NOISY = {(0, 32): (32, 128, 4)}  # more registers a block, where it goes by codes
_WIDE = {16: (64, 128, 8), 32: (64, 128, 4)}  # for rotations that do not fit into the columns above
BACK = (128, 64, 4)  # for codes that are turned back: a warp has 32 rows side by side
_TURNED = (128, 64, 4)  # for those that a thread can turn back alone (READ 3)
HELD = (256, 128, 4)  # for those of eight rows that a thread holds (READ 4)
# registers of a thread where values alone are drawn, by READ: more programs fit, and (almost) nothing is spilled
_REGISTERS = {0: 96, 1: 96, 4: 168}
_AGAIN = {"AGAIN": True}
_SIDE = 22 + len(PLACE) + 1  # arguments of `power_kernel`


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """What is the same for all matrices of one layout under one spec.

    form            names the compiled kernel: single numbers are read one by one, so their alignment is not part of it
    scalars         the kernel's arguments from `before` to `factor`
    words, halves   of its launches: see `Launch`
    run, again      the first launch, and the second one of FP8 values
    """

    form: Hashable
    constants: dict[str, Any]
    scalars: tuple[float, float, float]
    rotation: int
    noisy: bool
    words: tuple[int, ...]
    halves: tuple[int, ...]
    run: Launch
    again: Launch

    @classmethod
    def of(cls, src: Source, spec: QuantSpec, want: Want, flips: bool) -> Form:
        """flips: whether the rotation that the codes `src` are turned back from has signs."""
        asked = want.codes, want.carrier, want.mask, want.spread is not None
        line = src.stride if src.read <= 1 else 0
        form = "power", flips, is_one(src.codes), number_of(spec), *asked, line, src.layout()
        found = _FORMS.get(form)
        if found is None:
            found = _FORMS[form] = cls._new(src, spec, want, flips, form)
        return found

    @classmethod
    def _new(cls, src: Source, spec: QuantSpec, want: Want, flips: bool, form: Hashable) -> Form:
        rule, rotation, noisy = spec.rule, spec.rotation.size if spec.rotation else 1, _is_noisy(spec)
        alone = want.carrier in _FP8 and not want.codes
        rows, columns, warps = _tile(src, spec, rotation, noisy and not alone)
        before = fp32(1.0 / rule.headroom) if isinstance(rule, Floor) else 1.0
        finer = fp32(rule.finer_below) if isinstance(rule, Ceil) else 0.0
        factor = getattr(rule, "factor", None)
        masked = want.mask and want.codes
        constants = {
            "R": rows, "N": columns, "E": spec.shape[1], "BR": spec.shape[0], "ROT": rotation,
            "SIGNED": has_signs(spec.rotation), "RULE": _rule_number(rule), "ROUND": int(noisy),
            "STD": isinstance(rule, Quest) and rule.spread == "std",
            "CLIPS": isinstance(rule, Quest) or finer > 0.0 or (isinstance(rule, Floor) and before > 0.75),
            **src.constants(), "W": 16 if src.read == 4 else 32 * spec.shape[1] // columns,
            "EVEN": src.shape[0] % rows == 0 and src.shape[1] % columns == 0, "FLIPS": flips,
            "UNIT": is_one(src.codes), "CODES": want.codes,
            "CARRIER": _KINDS[want.carrier], "MASK": masked,
            "ASM": _has_asm(src.tensor.device), "AGAIN": False,
            "SPREAD": want.spread is not None, "LINE": _line(src, rows, columns), "num_warps": warps,
            "enable_fp_fusion": False,
        }  # fmt: skip
        if noisy and alone and constants["ASM"] and src.read in _REGISTERS:
            constants["maxnreg"] = _REGISTERS[src.read]
        scalars = before, finer, fp32(QUEST_E2M1 if factor is None else factor)
        wide = spec.shape[1] == 32  # mask bits: a word for each block, or half of one
        in_words = {
            0: src.tensor.dtype == torch.int32, 10: want.codes, 12: want.carrier is not None, 13: masked and wide
        }  # fmt: skip
        words, halves = tuple(at for at, is_so in in_words.items() if is_so), (13,) * (masked and not wide)
        run, again = (Launch(power_kernel, {**constants, "AGAIN": again}, words, halves) for again in (False, True))
        return cls(form, constants, scalars, rotation, noisy, words, halves, run, again)


def _tile(src: Source, spec: QuantSpec, rotation: int, noisy: bool) -> tuple[int, int, int]:
    """Rows, columns and warps of a program."""
    kind = min(src.read, 2), spec.shape[1]
    rows, columns, warps = _NOISY.get(kind, _TILES[kind]) if noisy else _TILES[kind]
    if src.turn[0] > 1:
        rows, columns, warps = _TURNED if src.read == 3 else BACK
    elif src.read == 4:
        rows, columns, warps = HELD
    elif columns < rotation:
        rows, columns, warps = _WIDE[spec.shape[1]]
    return max(rows, spec.shape[0]), columns, warps


def _line(src: Source, rows: int, columns: int) -> int:
    """The stride of a matrix, compiled into the kernel, where it has whole tiles, and where it is one of words if its
    transpose is read.
    """
    whole = src.shape[0] % rows == 0 and src.shape[1] % columns == 0
    return src.stride if whole and (src.read == 0 or (src.read == 1 and src.in_words)) else 0


_FORMS: dict[Hashable, Form] = {}


class Pair(NamedTuple):
    """The launches that quantize a matrix and its transpose, tile by tile, in as many threads."""

    run: Launch
    again: Launch

    @classmethod
    def of(cls, row: Form, column: Form) -> Pair | None:
        """None: one kernel cannot do both."""
        try:
            return _PAIRS[row, column]
        except KeyError:
            found = _PAIRS[row, column] = cls._new(row, column)
            return found

    @classmethod
    def _new(cls, row: Form, column: Form) -> Pair | None:
        mine, its = row.constants, column.constants
        same = (mine["R"], mine["N"], mine["num_warps"]) == (its["N"], its["R"], its["num_warps"])
        narrow = mine["CARRIER"] in NARROW and its["CARRIER"] in NARROW
        if not (same and narrow and mine["READ"] == 0 and its["READ"] == 1):
            return None
        constants = mine | {f"{n}_2": value for n, value in its.items() if n in power_kernel.arg_names and n != "AGAIN"}
        words, halves = (
            (*first, *(_SIDE + at for at in second))
            for first, second in ((row.words, column.words), (row.halves, column.halves))
        )
        return cls(
            Launch(power_pair_kernel, constants, words, halves),
            Launch(power_pair_kernel, constants | _AGAIN, words, halves),
        )


_PAIRS: dict[tuple[Form, Form], Pair | None] = {}


def _is_noisy(spec: QuantSpec) -> bool:
    return isinstance(spec.rounding, Stochastic)


def is_one(codes: BlockScaledTensor | None) -> bool:
    """Whether codes are known to have no common factor: their quantizer has made its tensor a constant."""
    if codes is None:
        return False
    scale = codes.global_scale
    return scale.data_ptr() == _constant(1.0, scale.device).data_ptr()


def _rule_number(rule: Any) -> int:
    """RULE of `arithmetic.power_byte`."""
    if isinstance(rule, Ceil):
        return 2 if rule.of == "ratio" else 3
    if isinstance(rule, Quest):
        return 4 if rule.power == "floor" else 5
    return 1
