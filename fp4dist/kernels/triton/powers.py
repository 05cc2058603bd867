# pyright: reportCallIssue=false, reportArgumentType=false
# (a launch takes options beside the kernel's own parameters)
"""The quantizers of E2M1 under power-of-two block scales: codes, FP8 or bf16 values, and mask bits in one pass."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fp4dist.kernels.triton.counters import zeroed
from fp4dist.kernels.triton.filters import _has_asm, original
from fp4dist.kernels.triton.launch import launch
from fp4dist.kernels.triton.noise import place
from fp4dist.kernels.triton.power_programs import power_kernel, power_pair_kernel
from fp4dist.kernels.triton.quantize import Side, _constant, _number, _Source
from fp4dist.kernels.triton.signs import has_signs, sign_words
from fp4dist.numerics.grouping import ReduceMax
from fp4dist.numerics.scales import QUEST_E2M1, fp32
from fp4dist.numerics.tensor import CODES, BlockScaledTensor, Carrier, Key, Want
from fp4dist.spec.blocks import Ceil, Floor, Hadamard, Nearest, Quest, Stochastic
from fp4dist.spec.formats import E2M1
from fp4dist.spec.recipe import QuantSpec

_KINDS = {None: 0, torch.bfloat16: 16, torch.float8_e5m2: 5, torch.float8_e4m3fn: 4}
# (rows, columns) of a tile and warps, by how the matrix is read (READ of `programs`) and the columns of a block
_TILES = {
    (0, 16): (32, 128, 4), (0, 32): (64, 128, 4), (1, 16): (64, 64, 4), (1, 32): (128, 64, 4),
    (2, 16): (32, 128, 4), (2, 32): (64, 128, 4),
}  # fmt: skip
_NOISY = {(0, 32): (32, 128, 4)}  # more registers a block
_WIDE = {16: (64, 128, 8), 32: (64, 128, 4)}  # for rotations that do not fit into the columns above
_BACK = (128, 64, 4)  # for codes that are turned back: a warp has 32 rows side by side
_TURNED = (128, 32, 4)  # for those that a thread can turn back alone (READ 3)
_HELD = (256, 128, 4)  # for those of eight rows that a thread holds (READ 4)
_SECOND = 264  # programs of the second launch, which mostly has nothing to do
_AGAIN = {"AGAIN": True}


def why_not(spec: QuantSpec) -> str | None:
    """The first block of `spec` that these kernels lack, or None."""
    rows, columns = spec.shape
    lacks = (
        (spec.format.element != E2M1, f"elements {spec.format.element.name}"),
        (spec.format.scale.name != "e8m0", f"{spec.format.scale.name} scales"),
        ((rows, columns) not in ((1, 16), (1, 32), (16, 16), (32, 32)), f"blocks {[rows, columns]}"),
        (not isinstance(spec.rule, Floor | Ceil | Quest), f"scale rule {spec.rule.kind}"),
        (spec.samples > 1, "several samples"),
        (not isinstance(spec.rounding, Nearest | Stochastic), f"rounding {spec.rounding.kind}"),
        (isinstance(spec.rounding, Nearest) and spec.rounding.ties != "even", "ties other than to even"),
        (spec.has_parts, "operands in parts"),
    )
    found = next((what for missing, what in lacks if missing), None)
    return None if found is None else f"the Triton quantizer of power-of-two scales has no {found}"


def quantize(
    source: Tensor | BlockScaledTensor, spec: QuantSpec, key: Key | None = None, reduce_max: ReduceMax | None = None,
    toward: Tensor | None = None, *, want: Want = CODES,
) -> BlockScaledTensor | Carrier:  # fmt: skip
    """The codes of a matrix, or of the transpose of forward codes: see `fp4dist.numerics.quantize`.

    want   codes, or the carrier of a GEMM (bf16 or FP8), or both; with codes also mask bits
    """
    if toward is not None:
        raise ValueError(f"{spec.label()}: the Triton quantizer takes no moving average")
    return _Job(_Source.of(source), spec, key, want).run()


def requantize(
    q: BlockScaledTensor, spec: QuantSpec, key: Key | None = None, reduce_max: ReduceMax | None = None, *,
    want: Want = CODES, back: tuple[Hadamard | None, Key | None] | None = None,
) -> BlockScaledTensor | Carrier:  # fmt: skip
    """The codes of `q`'s transpose, decoded in registers; see `fp4dist.numerics.requantize`.

    back   (rotation, key) whose basis the codes are in: their values are turned back from it first
    """
    if q.rotation == 1:
        return _Job(_in_words(_Source.of(q), spec), spec, key, want).run()
    if back is None or back[0] is None or back[0].size != q.rotation:
        raise ValueError(f"requantize needs codes in the original basis, or that basis, got rotation {q.rotation}")
    if q.rotation > 32 or (spec.rotation is not None and spec.rotation.size > _BACK[1]):
        return quantize(original(q, back[0], back[1]).t(), spec, key, want=want)
    src = _Source.of(q, (q.rotation, sign_words(*back, q.codes.device)))
    return _Job(_in_words(src, spec), spec, key, want, has_signs(back[0])).run()


def _in_words(src: _Source, spec: QuantSpec) -> _Source:
    """READ 3 or 4 in place of 2, where `_turned_codes` or `_held_codes` of `power_programs` take the codes: words of
    eight codes with power-of-two scales of 32 along their rows.
    """
    q, tensor, (rows, cols) = src.codes, src.tensor, src.shape
    assert q is not None
    if q.block != (1, 32) or spec.shape != (1, 32) or q.format.scale.name != "e8m0":
        return src
    if src.stride % 4 or tensor.data_ptr() % 4:
        return src
    size = spec.rotation.size if spec.rotation else 1
    tall, wide, _ = _HELD
    read = 3 if (q.rotation, size) == (32, 32) else 4
    if read == 4 and ((q.rotation, size) != (1, 1) or rows % tall or cols % wide):
        return src
    return src._replace(read=read, tensor=tensor.view(torch.int32), stride=src.stride // 4)


def quantize_pair(
    x: Tensor, row: Side, column: Side
) -> tuple[BlockScaledTensor | Carrier, BlockScaledTensor | Carrier]:
    """The operands of x [T, O] and of x^T [O, T]; bits as of two calls of `quantize`."""
    x = x if x.stride(1) == 1 else x.contiguous()
    sides = ((x, row), (x.t(), column))
    first, second = (_Job(_Source.of(matrix), side.spec, side.key, side.want) for matrix, side in sides)
    if not first.may_pair(second):
        return first.run(), second.run()
    return first.run_with(second)


@dataclass(frozen=True, slots=True, eq=False)
class _Form:
    """What is the same for all matrices of one layout under one spec; `form` names the compiled kernel.

    scalars   the kernel's arguments from `before` to `factor`
    """

    form: Hashable
    constants: dict[str, Any]
    scalars: tuple[float, float, float]
    rotation: int
    noisy: bool

    @classmethod
    def of(cls, src: _Source, spec: QuantSpec, want: Want, flips: bool) -> _Form:
        spread = want.spread is not None
        form = "power", flips, _is_one(src), _number(spec), want.codes, want.carrier, want.mask, spread, src.layout()
        found = _FORMS.get(form)
        if found is None:
            found = _FORMS[form] = cls._new(src, spec, want, flips, form)
        return found

    @classmethod
    def _new(cls, src: _Source, spec: QuantSpec, want: Want, flips: bool, form: Hashable) -> _Form:
        rule, rotation, noisy = spec.rule, spec.rotation.size if spec.rotation else 1, _is_noisy(spec)
        kind = min(src.read, 2), spec.shape[1]
        rows, columns, warps = _NOISY.get(kind, _TILES[kind]) if noisy else _TILES[kind]
        if src.turn[0] > 1:
            rows, columns, warps = _TURNED if src.read == 3 else _BACK
        elif src.read == 4:
            rows, columns, warps = _HELD
        elif columns < rotation:
            rows, columns, warps = _WIDE[spec.shape[1]]
        before = fp32(1.0 / rule.headroom) if isinstance(rule, Floor) else 1.0
        finer = fp32(rule.finer_below) if isinstance(rule, Ceil) else 0.0
        factor = getattr(rule, "factor", None)
        rows = max(rows, spec.shape[0])
        constants = {
            "R": rows, "N": columns, "E": spec.shape[1], "BR": spec.shape[0], "ROT": rotation,
            "SIGNED": has_signs(spec.rotation), "RULE": _rule_number(rule), "ROUND": int(noisy),
            "STD": isinstance(rule, Quest) and rule.spread == "std",
            "CLIPS": isinstance(rule, Quest) or finer > 0.0 or (isinstance(rule, Floor) and before > 0.75),
            **src.constants(), "W": 16 if src.read == 4 else 32 * spec.shape[1] // columns,
            "EVEN": src.shape[0] % rows == 0 and src.shape[1] % columns == 0, "FLIPS": flips,
            "UNIT": _is_one(src), "CODES": want.codes,
            "CARRIER": _KINDS[want.carrier], "MASK": want.mask and want.codes,
            "ASM": _has_asm(src.tensor.device), "AGAIN": False,
            "SPREAD": want.spread is not None, "num_warps": warps, "enable_fp_fusion": False,
        }  # fmt: skip
        scalars = before, finer, fp32(QUEST_E2M1 if factor is None else factor)
        return cls(form, constants, scalars, rotation, noisy)


_FORMS: dict[Hashable, _Form] = {}


def _is_noisy(spec: QuantSpec) -> bool:
    return isinstance(spec.rounding, Stochastic)


class _Job:
    """One matrix, quantized: its outputs, and the launches that fill them."""

    def __init__(self, src: _Source, spec: QuantSpec, key: Key | None, want: Want, flips: bool = False) -> None:
        self.src, self.spec, self.want = src, spec, want
        self.form = form = _Form.of(src, spec, want, flips)
        rows, cols = src.shape
        device = src.tensor.device
        self.codes = self.scales = self.values = self.inside = self.factor = none = src.tensor
        self.memory = want.memory if want.memory is not None else none
        if want.codes:
            self.codes = torch.empty((rows, cols // 8), dtype=torch.int32, device=device)
            grid = rows // spec.shape[0], cols // spec.shape[1]
            self.scales = torch.empty(grid, dtype=torch.uint8, device=device)
        if form.constants["MASK"]:
            self.inside = torch.empty((rows, cols // 8), dtype=torch.uint8, device=device)
        self.shared = _common_factor(spec, device)
        self.narrow = want.carrier is not None and want.carrier != torch.bfloat16
        if want.carrier is not None:
            self.values = torch.empty((rows, cols), dtype=want.carrier, device=device)
        if self.narrow:
            self.factor = torch.empty((), device=device)
            if want.memory is None:
                self.memory = zeroed(device)
        self.lost = want.lost if want.lost is not None else self.memory[3] if self.narrow else none
        self.spread = want.spread if want.spread is not None else none
        self.place = place(key if form.noisy else None, rows, cols, 8, device)
        self.signs = sign_words(spec.rotation, key, device)

    def run(self) -> BlockScaledTensor | Carrier:
        """What was asked for."""
        form, arguments, tiles = self.form, self._arguments(), self._tiles()
        launch(power_kernel, tiles, arguments, form.constants, form.form)
        if self.narrow:
            launch(power_kernel, min(tiles, _SECOND), arguments, form.constants | _AGAIN, ("again", form.form))
        return self._result()

    def may_pair(self, other: _Job) -> bool:
        """Whether one kernel may do both jobs, of a matrix and of its transpose: tile by tile, in as many threads."""
        mine, its = self.form.constants, other.form.constants
        same = (mine["R"], mine["N"], mine["num_warps"]) == (its["N"], its["R"], its["num_warps"])
        return same and self.narrow and other.narrow and mine["READ"] == 0 and its["READ"] == 1

    def run_with(self, other: _Job) -> tuple[BlockScaledTensor | Carrier, BlockScaledTensor | Carrier]:
        """What was asked for, and what was of the transpose."""
        tiles, arguments = self._tiles(), (*self._arguments(), *other._arguments())
        second = {f"{n}_2": value for n, value in other.form.constants.items() if n in power_kernel.arg_names}
        del second["AGAIN_2"]
        constants = {**self.form.constants, **second}
        form = "pair", self.form.form, other.form.form
        launch(power_pair_kernel, tiles, arguments, constants, form)
        launch(power_pair_kernel, min(tiles, _SECOND), arguments, constants | _AGAIN, ("again", form))
        return self._result(), other._result()

    def _tiles(self) -> int:
        rows, cols = self.src.shape
        return -(-rows // self.form.constants["R"]) * -(-cols // self.form.constants["N"])

    def _arguments(self) -> tuple[Any, ...]:
        """Of `power_kernel`, up to its constants."""
        form, constants = self.form, self.form.constants
        inside = self.inside.view(_WORDS[constants["E"]]) if constants["MASK"] else self.inside
        values = self.values.view(torch.int32) if self.want.carrier is not None else self.values
        read = self.src.arguments()
        table = _roots(read[5], self.shared.device) if self.src.read == 3 else self.shared
        return (
            *read, table, self.signs, self.codes, self.scales, values, inside, self.memory, self.shared,
            self.factor, self.lost, self.spread, *form.scalars, *self.place,
        )  # fmt: skip

    def _result(self) -> BlockScaledTensor | Carrier:
        spec, rotation, carrier = self.spec, self.form.rotation, None
        if self.want.carrier is not None:
            scale, lost = (self.factor, self.lost) if self.narrow else (self.shared, None)
            carrier = Carrier(self.values, scale, rotation, lost=lost)
        if not self.want.codes:
            assert carrier is not None
            return carrier
        codes, inside = self.codes.view(torch.uint8), self.inside if self.form.constants["MASK"] else None
        q = BlockScaledTensor(codes, self.scales, self.shared, spec.format, spec.shape, rotation, inside=inside)
        return q if carrier is None else replace(q, carrier=carrier)


def _is_one(src: _Source) -> bool:
    """Whether codes are known to have no common factor: their quantizer has made its tensor a constant."""
    if src.codes is None:
        return False
    scale = src.codes.global_scale
    return scale.data_ptr() == _constant(1.0, scale.device).data_ptr()


@lru_cache(maxsize=16)
def _roots(root: float, device: torch.device) -> Tensor:
    return torch.full((32,), root, device=device)


_WORDS = {16: torch.int16, 32: torch.int32}  # of mask bits, one for each block


def _rule_number(rule: Any) -> int:
    """RULE of `arithmetic.power_byte`."""
    if isinstance(rule, Ceil):
        return 2 if rule.of == "ratio" else 3
    if isinstance(rule, Quest):
        return 4 if rule.power == "floor" else 5
    return 1


def _common_factor(spec: QuantSpec, device: torch.device) -> Tensor:
    """[] what every value is multiplied with after its power of two."""
    if isinstance(spec.rule, Floor):
        return _constant(fp32(spec.rule.headroom), device)
    return _constant(fp32(1.0 / E2M1.max) if isinstance(spec.rule, Ceil) and spec.rule.of == "amax" else 1.0, device)
