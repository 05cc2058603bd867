"""The quantizers of E2M1 under power-of-two block scales: codes, FP8 or bf16 values, and mask bits in one pass."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fp4dist.kernels.triton.counters import unset, zeroed
from fp4dist.kernels.triton.filters import original
from fp4dist.kernels.triton.launch import keep
from fp4dist.kernels.triton.noise import place
from fp4dist.kernels.triton.power_forms import BACK, HELD, NARROW, Form, Pair, is_one
from fp4dist.kernels.triton.quantize import Side, _constant, _number, _Source
from fp4dist.kernels.triton.signs import has_signs, lasting_signs, sign_words
from fp4dist.numerics.grouping import ReduceMax
from fp4dist.numerics.scales import fp32
from fp4dist.numerics.tensor import CODES, BlockScaledTensor, Carrier, Key, Want
from fp4dist.spec.blocks import Ceil, Floor, Hadamard, Nearest, Quest, Stochastic
from fp4dist.spec.formats import E2M1
from fp4dist.spec.recipe import QuantSpec


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
    return _Job(source, _Setup.of(source, spec, want), key, want).run()


def requantize(
    q: BlockScaledTensor, spec: QuantSpec, key: Key | None = None, reduce_max: ReduceMax | None = None, *,
    want: Want = CODES, back: tuple[Hadamard | None, Key | None] | None = None,
) -> BlockScaledTensor | Carrier:  # fmt: skip
    """The codes of `q`'s transpose, decoded in registers; see `fp4dist.numerics.requantize`.

    back   (rotation, key) whose basis the codes are in: their values are turned back from it first
    """
    if q.rotation == 1:
        return _Job(q, _Setup.of(q, spec, want, words=True), key, want).run()
    if back is None or back[0] is None or back[0].size != q.rotation:
        raise ValueError(f"requantize needs codes in the original basis, or that basis, got rotation {q.rotation}")
    if q.rotation > 32 or (spec.rotation is not None and spec.rotation.size > BACK[1]):
        return quantize(original(q, back[0], back[1]).t(), spec, key, want=want)
    setup = _Setup.of(q, spec, want, (q.rotation, has_signs(back[0])), words=True)
    return _Job(q, setup, key, want, sign_words(*back, q.codes.device)).run()


def _in_words(src: _Source, spec: QuantSpec) -> _Source:
    """READ 3 or 4 in place of 2, where `turned_codes` or `held_codes` of `power_reads` take the codes: words of
    eight codes with power-of-two scales of 32 along their rows.
    """
    q, tensor, (rows, cols) = src.codes, src.tensor, src.shape
    assert q is not None
    if q.block != (1, 32) or spec.shape != (1, 32) or q.format.scale.name != "e8m0":
        return src
    if src.stride % 4 or tensor.data_ptr() % 4:
        return src
    size = spec.rotation.size if spec.rotation else 1
    tall, wide, _ = HELD
    read = 3 if (q.rotation, size) == (32, 32) else 4
    if read == 4 and ((q.rotation, size) != (1, 1) or rows % tall or cols % wide):
        return src
    return src._replace(read=read, tensor=tensor.view(torch.int32), stride=src.stride // 4)


def quantize_pair(
    x: Tensor, row: Side, column: Side
) -> tuple[BlockScaledTensor | Carrier, BlockScaledTensor | Carrier]:
    """The operands of x [T, O] and of x^T [O, T]; bits as of two calls of `quantize`."""
    x = x if x.stride(1) == 1 else x.contiguous()
    turned = x.t()
    first = _Job(x, _Setup.of(x, row.spec, row.want), row.key, row.want)
    second = _Job(turned, _Setup.of(turned, column.spec, column.want), column.key, column.want)
    pair = Pair.of(first.setup.form, second.setup.form)
    if pair is None:
        return first.run(), second.run()
    arguments, (programs, again) = (*first.arguments(), *second.arguments()), first.setup.programs
    pair.run(programs, *arguments)
    pair.again(again, *arguments)
    return first.result(), second.result()


@dataclass(frozen=True, slots=True, eq=False)
class _Setup:
    """What is the same for all matrices of one size and layout under one spec: found with one look.

    stride, nth, shape   kernels' arguments, of `Source`
    programs  of the first launch, and of the second
    table     of codes that a thread turns back alone, else a number that is not read
    shared    [] fp32 that every value is multiplied with after its power of two
    signs     of a rotation whose signs are always the same; None: fresh ones
    unplaced  what a kernel without noise is told in place of its place
    codes, scales, inside, values   the outputs' shapes; None: not wanted
    narrow    whether values are FP8
    """

    spec: QuantSpec
    form: Form
    stride: int
    nth: float
    shape: tuple[int, int]
    programs: tuple[int, int]
    table: Tensor
    shared: Tensor
    signs: Tensor | None
    unplaced: tuple[Any, ...] | None
    codes: tuple[int, int] | None
    scales: tuple[int, int] | None
    inside: tuple[int, int] | None
    values: tuple[int, int] | None
    narrow: bool

    @classmethod
    def of(
        cls, source: Tensor | BlockScaledTensor, spec: QuantSpec, want: Want, back: tuple[int, bool] = (1, False),
        words: bool = False,
    ) -> tuple[_Setup, Tensor]:  # fmt: skip
        """(the setup, the memory that its kernels read).

        back    (size, whether it has signs) of the rotation that codes are turned back from
        words   codes may be read in words: `_in_words`
        """
        of_codes: tuple[Hashable, ...] = ()
        if isinstance(source, Tensor):
            memory = source
        else:
            memory = source.codes
            of_codes = (
                source.scales.data_ptr() % 16, source.block, source.format.scale.name, is_one(source), back, words
            )  # fmt: skip
        layout = memory.shape, memory.stride(), memory.dtype, memory.data_ptr() % 16, memory.device
        at = _number(spec), want.codes, want.carrier, want.mask, want.spread is not None, layout, of_codes
        found = _SETUPS.get(at)
        if found is not None:
            return found, memory
        src = _Source.of(source) if isinstance(source, Tensor) else _Source.of(source, (back[0], None))
        found = cls._new(_in_words(src, spec) if words else src, spec, want, back[1])
        if src.tensor.data_ptr() != memory.data_ptr():  # a copy that is laid out otherwise
            return found, src.tensor
        return keep(_SETUPS, at, found), memory

    @classmethod
    def _new(cls, src: _Source, spec: QuantSpec, want: Want, flips: bool) -> _Setup:
        form, (rows, cols), device = Form.of(src, spec, want, flips), src.shape, src.tensor.device
        c = form.constants
        tiles = -(-rows // c["R"]) * -(-cols // c["N"])
        nth, shared = 1.0 / src.turn[0], _common_factor(spec, device)
        return cls(
            spec, form, src.stride, nth, src.shape, (tiles, min(tiles, _SECOND)),
            _thirty_seconds(device) if src.read == 3 else shared, shared,
            lasting_signs(spec.rotation, device),
            None if form.noisy else place(None, rows, cols, 8, device), (rows, cols // 2) if c["CODES"] else None,
            (rows // spec.shape[0], cols // spec.shape[1]) if c["CODES"] else None,
            (rows, cols // 8) if c["MASK"] else None, (rows, cols) if c["CARRIER"] else None, c["CARRIER"] in NARROW,
        )  # fmt: skip


_SETUPS: dict[Hashable, _Setup] = {}
_SECOND = 264  # programs of the second launch, which mostly has nothing to do


class _Job:
    """One matrix, quantized: its outputs, and what the launches that fill them are told.

    setup   (the setup, the memory) of `_Setup.of`;  turn   signs of the rotation that codes are turned back from
    """

    __slots__ = (
        "codes", "factor", "inside", "key", "lost", "memory", "q", "read", "scales", "setup", "signs", "spread", "turn",
        "values",
    )  # fmt: skip

    def __init__(
        self, source: Tensor | BlockScaledTensor, setup: tuple[_Setup, Tensor], key: Key | None, want: Want,
        turn: Tensor | None = None,
    ) -> None:  # fmt: skip
        found, self.read = self.setup, none = setup
        self.q, self.key, self.turn = None if isinstance(source, Tensor) else source, key, turn
        device = none.device
        self.codes = self.scales = self.inside = self.values = self.memory = self.factor = self.lost = none
        self.spread = none if want.spread is None else want.spread
        if found.codes is not None and found.scales is not None:
            self.codes = torch.empty(found.codes, dtype=torch.uint8, device=device)
            self.scales = torch.empty(found.scales, dtype=torch.uint8, device=device)
        if found.inside is not None:
            self.inside = torch.empty(found.inside, dtype=torch.uint8, device=device)
        if found.values is not None:
            self.values = torch.empty(found.values, dtype=want.carrier, device=device)
        if found.narrow:
            self.factor = unset(device)
            self.memory = zeroed(device) if want.memory is None else want.memory
            self.lost = self.memory[3] if want.lost is None else want.lost
        self.signs = sign_words(found.spec.rotation, key, device) if found.signs is None else found.signs

    def run(self) -> BlockScaledTensor | Carrier:
        """What was asked for."""
        setup, arguments = self.setup, self.arguments()
        setup.form.run(setup.programs[0], *arguments)
        if setup.narrow:
            setup.form.again(setup.programs[1], *arguments)
        return self.result()

    def arguments(self) -> tuple[Any, ...]:
        """Of `power_kernel`, up to its constants."""
        setup, none, q = self.setup, self.read, self.q
        scales, common = (none, none) if q is None else (q.scales, q.global_scale)
        where = setup.unplaced
        if where is None:
            where = place(self.key, *setup.shape, 8, none.device)
        return (
            none, setup.stride, scales, common, none if self.turn is None else self.turn, setup.nth, *setup.shape,
            setup.table, self.signs, self.codes, self.scales, self.values, self.inside, self.memory, setup.shared,
            self.factor, self.lost, self.spread, *setup.form.scalars, *where,
        )  # fmt: skip

    def result(self) -> BlockScaledTensor | Carrier:
        """What was asked for, once the kernels run."""
        setup, carrier = self.setup, None
        spec, rotation = setup.spec, setup.form.rotation
        if setup.narrow:
            carrier = Carrier(self.values, self.factor, rotation, lost=self.lost)
        elif setup.values is not None:
            carrier = Carrier(self.values, setup.shared, rotation)
        if setup.codes is None:
            assert carrier is not None
            return carrier
        inside = None if setup.inside is None else self.inside
        return BlockScaledTensor(
            self.codes, self.scales, setup.shared, spec.format, spec.shape, rotation, 1, carrier, inside
        )  # fmt: skip


@lru_cache(maxsize=16)
def _thirty_seconds(device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it outlives the pass
        return torch.full((32,), 1 / 32, device=device)


def _common_factor(spec: QuantSpec, device: torch.device) -> Tensor:
    """[] what every value is multiplied with after its power of two."""
    if isinstance(spec.rule, Floor):
        return _constant(fp32(spec.rule.headroom), device)
    return _constant(fp32(1.0 / E2M1.max) if isinstance(spec.rule, Ceil) and spec.rule.of == "amax" else 1.0, device)
