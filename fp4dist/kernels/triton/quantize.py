# pyright: reportCallIssue=false, reportArgumentType=false
# (a launch takes options beside the kernel's own parameters)
"""The quantizers of E2M1 with one-byte scales, in one pass over the data (two where the tensor's scale comes first)."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fp4dist.kernels.triton.amaxes import LargestBoth
from fp4dist.kernels.triton.counters import unset, zero
from fp4dist.kernels.triton.filters import original
from fp4dist.kernels.triton.launch import Launch, keep
from fp4dist.kernels.triton.noise import PLACE, place
from fp4dist.kernels.triton.programs import pair_amax_kernel, pair_kernel
from fp4dist.kernels.triton.quantize_forms import BACK, Amax, Form, programs_of, stretches
from fp4dist.kernels.triton.signs import has_signs, lasting_signs, sign_words
from fp4dist.kernels.triton.sources import Side
from fp4dist.kernels.triton.sources import Source as _Source
from fp4dist.kernels.triton.sources import number_of as _number
from fp4dist.numerics.grouping import ReduceMax
from fp4dist.numerics.handed import handed
from fp4dist.numerics.tensor import CODES, BlockScaledTensor, Carrier, Key, Want
from fp4dist.spec.blocks import AbsMax, BestOf, FourOverSix, Hadamard, Nearest, Stochastic
from fp4dist.spec.formats import E2M1
from fp4dist.spec.recipe import QuantSpec


def why_not(spec: QuantSpec) -> str | None:
    """The first block of `spec` that these kernels lack, or None."""
    rows, columns = spec.shape
    lacks = (
        (spec.format.element != E2M1, f"elements {spec.format.element.name}"),
        (spec.format.scale.name != "e4m3", f"{spec.format.scale.name} scales"),
        ((rows, columns) not in ((1, 16), (1, 32), (16, 16), (32, 32)), f"blocks {[rows, columns]}"),
        (spec.above != "tensor", f"outer {spec.above}"),
        (not isinstance(spec.rule, AbsMax | FourOverSix | BestOf), f"scale rule {spec.rule.kind}"),
        (spec.samples > 1, "several samples"),
        (not isinstance(spec.rounding, Nearest | Stochastic), f"rounding {spec.rounding.kind}"),
        (isinstance(spec.rounding, Nearest) and spec.rounding.ties != "even", "ties other than to even"),
        (isinstance(spec.rounding, Stochastic) and isinstance(spec.rule, FourOverSix), "four-over-six under noise"),
        (stretches(spec.rule) is None, f"scales {getattr(spec.rule, 'also', ())} times that of the amax"),
        (spec.has_parts, "operands in parts"),
    )
    return next((f"the Triton quantizer has no {what}" for missing, what in lacks if missing), None)


def why_not_pair(row: QuantSpec, column: QuantSpec) -> str | None:
    """Why `quantize_pair` cannot take these two specs, or None."""
    return why_not(row) or why_not(column)


def quantize_pair(
    x: Tensor, row: Side, column: Side
) -> tuple[BlockScaledTensor | Carrier, BlockScaledTensor | Carrier]:
    """The operands of x [T, O] and of x^T [O, T]; bits as of two calls of `quantize`.

    One launch finds the amax of both, and one writes both where reading x is what takes the time; where arithmetic is
    (noise), two launches need fewer registers each and are faster.
    """
    if x.stride(1) != 1:
        x = x.contiguous()
    first, second = _Job(x, row), _Job(x.t(), column)
    pair = _Pair.of(first.setup, second.setup)
    if first.known is None and second.known is None:
        pair.measure(first, second)
    else:
        first.measure()
        second.measure()
    if pair.write is not None:
        pair.write(pair.programs, *pair.read(first, second), *first.arguments(), *second.arguments())
    else:
        first.run()
        second.run()
    return first.result(), second.result()


def quantize(
    source: Tensor | BlockScaledTensor, spec: QuantSpec, key: Key | None = None, reduce_max: ReduceMax | None = None,
    toward: Tensor | None = None, *, want: Want = CODES,
) -> BlockScaledTensor | Carrier:  # fmt: skip
    """The codes of a matrix, or of the transpose of forward codes: see `fp4dist.numerics.quantize`.

    want   codes, or the carrier of a GEMM (bf16, or FP8 under power-of-two scales), or both; without codes none are
           written, unless an FP8 carrier is made of them
    """
    if toward is not None:
        raise ValueError(f"{spec.label()}: the Triton quantizer takes no moving average")
    return _run(_Job(source, Side(spec, key, reduce_max, want)))


def requantize(
    q: BlockScaledTensor, spec: QuantSpec, key: Key | None = None, reduce_max: ReduceMax | None = None, *,
    want: Want = CODES, back: tuple[Hadamard | None, Key | None] | None = None,
) -> BlockScaledTensor | Carrier:  # fmt: skip
    """The codes of `q`'s transpose, decoded in registers; see `fp4dist.numerics.requantize`.

    back   (rotation, key) whose basis the codes are in: their values are turned back from it first
    """
    if q.rotation == 1:
        return quantize(q, spec, key, reduce_max, want=want)
    if back is None or back[0] is None or back[0].size != q.rotation:
        raise ValueError(f"requantize needs codes in the original basis, or that basis, got rotation {q.rotation}")
    if q.rotation > 32 or (spec.rotation is not None and spec.rotation.size > BACK[1]):
        return quantize(original(q, back[0], back[1]).t(), spec, key, reduce_max, want=want)
    source = _Source.of(q, (q.rotation, sign_words(*back, q.codes.device)))
    return _run(_Job(source, Side(spec, key, reduce_max, want)))


def _run(job: _Job) -> BlockScaledTensor | Carrier:
    job.measure()
    job.run()
    return job.result()


def amax(x: Tensor) -> Tensor:
    """[] fp32 max |x| of a tensor of any shape; NaN if any element is."""
    src = _Source.of(x.reshape(-1, x.shape[-1] if x.dim() > 1 else x.numel()))
    found, top = Amax.of(src, 16, 1, False), zero(x.device)
    found.run(found.programs(src.shape), *src.arguments(), sign_words(None, None, x.device), top)
    return top.view(torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class _Setup:
    """What is the same for all matrices of one size and layout under one spec: found with one look.

    signs     of a rotation whose signs are always the same; None: fresh ones
    unplaced  what a kernel without noise is told in place of its place
    codes, scales, values   the outputs' shapes; None: not wanted
    block     rows and columns of a block
    in_words, layout   of the memory: see `_Source`
    """

    form: Form
    shape: tuple[int, int]
    stride: int
    nth: float
    programs: int
    amax_programs: int
    signs: Tensor | None
    unplaced: tuple[Any, ...] | None
    codes: tuple[int, int] | None
    scales: tuple[int, int] | None
    values: tuple[int, int] | None
    block: tuple[int, int]
    in_words: bool
    layout: Hashable

    @classmethod
    def of(cls, source: Tensor | BlockScaledTensor | _Source, spec: QuantSpec, want: Want) -> tuple[_Setup, Tensor]:
        """(the setup, the memory that its kernels read)."""
        if isinstance(source, _Source):
            return cls._new(source, spec, want), source.tensor
        of_codes: tuple[Hashable, ...] = ()
        if isinstance(source, Tensor):
            memory = source
        else:
            memory, of_codes = source.codes, (source.scales.data_ptr() % 16, source.block, source.format.scale.name)
        layout = memory.shape, memory.stride(), memory.dtype, memory.data_ptr() % 16, memory.device, *of_codes
        at = _number(spec), want.codes, want.carrier, layout
        found = _SETUPS.get(at)
        if found is not None:
            return found, memory
        src = _Source.of(source)
        found = cls._new(src, spec, want)
        if src.tensor.data_ptr() != memory.data_ptr():  # a copy that is laid out otherwise
            return found, src.tensor
        return keep(_SETUPS, at, found), memory

    @classmethod
    def _new(cls, src: _Source, spec: QuantSpec, want: Want) -> _Setup:
        form, (rows, cols), device = Form.of(src, spec, want, has_signs(spec.rotation)), src.shape, src.tensor.device
        c, block = form.constants, spec.shape
        return cls(
            form, src.shape, src.stride, 1.0 / src.turn[0], programs_of(src.shape, c["R"], c["N"]),
            form.amax.programs(src.shape), lasting_signs(spec.rotation, device),
            None if form.noisy else place(None, rows, cols, 8, device), (rows, cols // 2) if c["CODES"] else None,
            (rows // block[0], cols // block[1]) if want.codes else None, (rows, cols) if c["CARRIER"] else None,
            block, src.in_words, src.layout(),
        )  # fmt: skip


_SETUPS: dict[Hashable, _Setup] = {}


class _Job:
    """One matrix, quantized: its outputs, and what a launch that fills them is told.

    s_dec     [] fp32 the scale of the tensor
    outer     [] int32 bits of the logical tensor's amax
    known     [] int32 bits of this tensor's, where it came with one and no rotation comes before its scales
    """

    __slots__ = (
        "codes", "form", "key", "known", "memory", "outer", "q", "reduce_max", "s_dec", "scales", "setup", "signs",
        "turn", "values", "want",
    )  # fmt: skip

    def __init__(self, source: _Source | Tensor | BlockScaledTensor, side: Side) -> None:
        spec, self.key, self.reduce_max, self.want = side
        self.setup, self.memory = setup, _ = _Setup.of(source, spec, self.want)
        self.form, device = setup.form, self.memory.device
        self.known = self.outer = self.q = self.turn = None
        if isinstance(source, Tensor):
            if setup.form.rotation == 1:
                amax = handed(source)
                self.known = None if amax is None else amax.view(torch.int32)
        elif isinstance(source, BlockScaledTensor):
            self.q = source
        else:
            self.q, self.turn = source.codes, source.turn[1]
        self.signs = sign_words(spec.rotation, self.key, device) if setup.signs is None else setup.signs
        self.codes = self.scales = self.values = None
        if setup.codes is not None:
            self.codes = torch.empty(setup.codes, dtype=torch.uint8, device=device)
        if setup.scales is not None:
            self.scales = torch.empty(setup.scales, dtype=torch.uint8, device=device)
        if setup.values is not None:
            self.values = torch.empty(setup.values, dtype=torch.bfloat16, device=device)
        self.s_dec = unset(device)

    def read(self) -> tuple[Any, ...]:
        """The kernels' first eight parameters."""
        setup, memory, q = self.setup, self.memory, self.q
        scales, shared = (memory, memory) if q is None else (q.scales, q.global_scale)
        back = memory if self.turn is None else self.turn
        return memory, setup.stride, scales, shared, back, setup.nth, *setup.shape

    def measure(self) -> None:
        """Find the amax."""
        top = self.known
        if top is None:
            top = zero(self.memory.device)
            self.form.amax.run(self.setup.amax_programs, *self.read(), self.signs, top)
        self.outer = self.reduced(top)

    def reduced(self, top: Tensor) -> Tensor:
        """Bits of the logical tensor's largest magnitude from those of this shard's; kernels read a NaN's as Inf's."""
        if self.reduce_max is None:
            return top
        return self.reduce_max((top & 0x7FFFFFFF).clamp(max=0x7F800000).view(torch.float32)).view(torch.int32)

    def arguments(self) -> tuple[Any, ...]:
        """What changes from call to call, in the order of `quantize_kernel`'s parameters from `signs` on."""
        form, none, where = self.form, self.memory, self.setup.unplaced
        if where is None:
            where = place(self.key, *self.setup.shape, 8, none.device)
        return (
            self.signs, none if self.outer is None else self.outer, none if self.codes is None else self.codes,
            none if self.scales is None else self.scales, none if self.values is None else self.values, self.s_dec,
            *form.scalars, *where,
        )  # fmt: skip

    def run(self) -> None:
        """Fill the outputs from the matrix alone."""
        self.form.run(self.setup.programs, *self.read(), *self.arguments())

    def result(self) -> BlockScaledTensor | Carrier:
        """What was asked for, once the kernel has run."""
        form, carrier = self.form, None
        if self.values is not None:
            carrier = Carrier(self.values, self.s_dec, form.rotation)
        if self.codes is None or self.scales is None:
            assert carrier is not None
            return carrier
        return BlockScaledTensor(
            self.codes, self.scales, self.s_dec, form.spec.format, self.setup.block, form.rotation, 1, carrier
        )  # fmt: skip


_BOTH = ("R", "N", "E", "ROT", "SIGNED", "P", "W")  # constants of a pair's amax
_TOLD = (*_BOTH[:3], "BR", "ROT", "SIGNED", "RULE", "METRIC", "ROUND", "NONZERO", "P", "W", "CODES", "CARRIER")


class _Pair(NamedTuple):
    """The launches for x [T, O] and x^T of one size under two specs; see `chunks.of_pair`.

    amax    of one kernel that rotates either side
    both    in its place where x^T alone is rotated: `amaxes.LargestBoth`
    write   None: each side is written by a launch of its own
    """

    programs: int
    amax: Launch
    both: LargestBoth | None
    write: Launch | None

    @classmethod
    def of(cls, row: _Setup, column: _Setup) -> _Pair:
        found = _PAIRS.get((row, column))
        if found is None:
            found = keep(_PAIRS, (row, column), cls._new(row, column))
        return found

    @classmethod
    def _new(cls, row: _Setup, column: _Setup) -> _Pair:
        (a, b), (rows, cols) = (row.form.constants, column.form.constants), row.shape
        tall, wide = b["N"], a["N"]
        options = {
            "EVEN": rows % tall == 0 and cols % wide == 0, "num_warps": a["num_warps"], "enable_fp_fusion": False,
        }  # fmt: skip
        line = {"T_LINE": b["LINE"] if options["EVEN"] else 0}
        told, told_amax = (
            {**{name: a[name] for name in names}, **{f"T_{name}": b[name] for name in names}, **options}
            for names in (_TOLD, _BOTH)
        )
        words = (2,) if column.in_words else ()
        written = [
            first + place
            for first, setup in ((6, row), (6 + _SIDE, column))
            for place, shape in ((2, setup.codes), (4, setup.values))
            if shape is not None
        ]
        name = row.form.form, column.form.form
        amax = _LAUNCHES.setdefault(("amax", name), Launch(pair_amax_kernel, told_amax, words))
        write = _LAUNCHES.setdefault(("write", name), Launch(pair_kernel, told | line, (*words, *written)))
        rotation, signed = column.form.rotation, b["SIGNED"]
        both = None
        if row.form.rotation == 1 < rotation:
            both = LargestBoth.of(column.shape, column.stride, column.in_words, column.layout, rotation, signed)
        programs = -(-rows // tall) * -(-cols // wide) * (tall // a["R"] + wide // b["R"])
        return cls(programs, amax, both, write if row.form.light and column.form.light else None)

    def read(self, row: _Job, column: _Job) -> tuple[Any, ...]:
        """The pair kernels' first parameters."""
        return row.memory, row.setup.stride, column.memory, column.setup.stride, *row.setup.shape

    def measure(self, row: _Job, column: _Job) -> None:
        """The amax of x and of x^T, in the bases that they are quantized in, from one reading."""
        first, second = zero(row.memory.device), zero(row.memory.device)
        if self.both is not None:
            self.both.run(
                self.both.programs, column.memory, column.setup.stride, column.signs, first, second,
                *column.setup.shape,
            )  # fmt: skip
        else:
            self.amax(self.programs, *self.read(row, column), row.signs, first, column.signs, second)
        row.outer, column.outer = row.reduced(first), column.reduced(second)


_PAIRS: dict[tuple[_Setup, _Setup], _Pair] = {}
_LAUNCHES: dict[Hashable, Launch] = {}
_SIDE = 8 + len(PLACE) + 1  # arguments of `_Job.arguments`


@lru_cache(maxsize=64)
def _constant(value: float, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it outlives the pass, and backward may keep it
        return torch.full((), value, device=device)
