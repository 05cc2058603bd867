# pyright: reportCallIssue=false, reportArgumentType=false
# (a launch takes options beside the kernel's own parameters)
"""MS-EDEN: codes and the tensor's scale from one reading of the data, then bytes or a carrier; see `eden_programs`."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fp4dist.kernels.triton.counters import unset, zeroed
from fp4dist.kernels.triton.eden_programs import code_kernel, code_pair_kernel, scale_kernel
from fp4dist.kernels.triton.filters import original
from fp4dist.kernels.triton.launch import Launch, integer, keep
from fp4dist.kernels.triton.noise import place
from fp4dist.kernels.triton.quantize import Side, _number, _Source
from fp4dist.kernels.triton.signs import has_signs, lasting_signs, sign_words
from fp4dist.numerics.grouping import ReduceMax
from fp4dist.numerics.scales import target_max
from fp4dist.numerics.tensor import CODES, BlockScaledTensor, Carrier, Key, Want
from fp4dist.spec.blocks import Eden, Hadamard
from fp4dist.spec.formats import E2M1
from fp4dist.spec.recipe import QuantSpec

_BLOCK = 16  # columns


def is_eden(spec: QuantSpec) -> bool:
    """Whether `spec` is for these kernels to take, or to refuse."""
    return isinstance(spec.rounding, Eden) and spec.rounding.align == "post_hoc"


def why_not(spec: QuantSpec) -> str | None:
    """The first block of `spec` that these kernels lack, or None."""
    eden = spec.rounding
    if not isinstance(eden, Eden):
        return f"the Triton MS-EDEN does not round {spec.rounding.kind}"
    lacks = (
        (eden.align != "post_hoc", f"align: {eden.align}"),
        (spec.format.element != E2M1, f"elements {spec.format.element.name}"),
        (spec.format.scale.name != "e4m3", f"{spec.format.scale.name} scales"),
        (spec.shape != (1, _BLOCK), f"blocks {list(spec.shape)}"),
        (spec.above != "tensor", f"outer {spec.above}"),
        (eden.group != "block", f"group: {eden.group}"),
        (eden.truncate > 0, "truncate"),
        (spec.samples > 1, "several samples"),
        (spec.has_parts, "operands in parts"),
    )
    return next((f"the Triton MS-EDEN has no {what}" for missing, what in lacks if missing), None)


def quantize(
    source: Tensor | BlockScaledTensor, spec: QuantSpec, key: Key | None = None, reduce_max: ReduceMax | None = None,
    toward: Tensor | None = None, *, want: Want = CODES,
) -> BlockScaledTensor | Carrier:  # fmt: skip
    """The codes of a matrix, or of the transpose of forward codes: see `fp4dist.numerics.quantize`."""
    if toward is not None:
        raise ValueError(f"{spec.label()}: MS-EDEN takes no moving average")
    job = _Job(source, Side(spec, key, reduce_max, want))
    job.code()
    return job.scaled()


def requantize(
    q: BlockScaledTensor, spec: QuantSpec, key: Key | None = None, reduce_max: ReduceMax | None = None, *,
    want: Want = CODES, back: tuple[Hadamard | None, Key | None] | None = None,
) -> BlockScaledTensor | Carrier:  # fmt: skip
    """The codes of `q`'s transpose, decoded in registers; see `fp4dist.numerics.requantize`.

    back   (rotation, key) of the basis that the codes are in: their values are turned back from it first
    """
    if q.rotation == 1:
        return quantize(q, spec, key, reduce_max, want=want)
    if back is None or back[0] is None or back[0].size != q.rotation:
        raise ValueError(f"requantize needs codes in the original basis, or that basis, got rotation {q.rotation}")
    return quantize(original(q, back[0], back[1]).t(), spec, key, reduce_max, want=want)


def quantize_pair(
    x: Tensor, row: Side, column: Side
) -> tuple[BlockScaledTensor | Carrier, BlockScaledTensor | Carrier]:
    """The operands of x [T, O] and of x^T [O, T] from one reading of x; bits as of two calls of `quantize`."""
    x = x if x.stride(1) == 1 else x.contiguous()
    first, second = _Job(x, row), _Job(x.t(), column)
    pair = _Pair.of(first, second)
    shared = first.memory, first.setup.stride, second.memory, second.setup.stride, *first.setup.shape
    pair.code(pair.programs, *shared, *first.coding(), *second.coding())
    return first.scaled(), second.scaled()


# (rows, columns) of a tile, columns of a thread, warps, by how the matrix is read (READ of `eden_programs`)
_TILES = {0: (128, 128, 32, 4), 1: (64, 128, 32, 4), 2: (128, 128, 16, 4)}
_REGISTERS = {0: 128, 1: 128, 2: 96}  # of a thread, at most: with a few more, fewer warps fit on a multiprocessor
_MORE_REGISTERS = 168  # where two scales of a block are compared, which would otherwise go to memory
_FOUR = {"none": 0, "mse": 1, "mae": 2, "absmax": 3}  # of `eden_programs`
_STEPS = 4  # of a program that reads rows: it needs the signs of its columns once
_BLOCKS = 256  # of a program of the second pass, which has 4 warps


@dataclass(frozen=True, slots=True, eq=False)
class _Form:
    """What is the same for all matrices of one layout under one spec; `name` is the compiled kernels'.

    v      what a block's amax maps to;  code   the first pass
    """

    name: Hashable
    constants: dict[str, Any]
    v: float
    rotation: int
    code: Launch

    @classmethod
    def of(cls, src: _Source, spec: QuantSpec) -> _Form:
        words, stride = _words(src)
        name = _number(spec), src.shape[0] % 256 == 0, words.dtype, integer(stride), src.layout()
        found = _FORMS.get(name)
        if found is None:
            assert isinstance(spec.rounding, Eden)
            v, rotation = target_max(E2M1.max, spec.rounding.headroom), spec.rotation.size if spec.rotation else 1
            constants = _constants(src, rotation, has_signs(spec.rotation))
            constants["FOUR"] = _FOUR[spec.rounding.four_over_six]
            read = (0,) if words.dtype == torch.int32 else ()
            code = Launch(code_kernel, {**constants, "maxnreg": _registers(src.read, constants["FOUR"])}, (*read, 8))
            found = _FORMS[name] = cls(name, constants, v, rotation, code)
        return found


_FORMS: dict[Hashable, _Form] = {}


def _registers(read: int, four: int) -> int:
    """Of a thread of the first pass, at most."""
    return _MORE_REGISTERS if four else _REGISTERS[read]


def _constants(src: _Source, rotation: int, signed: bool) -> dict[str, Any]:
    rows, columns, chunk, warps = _TILES[src.read]
    block, e8m0 = (1, _BLOCK), False
    held = 2 if src.tensor.dtype == torch.int32 else 1
    if src.codes is not None:
        block, e8m0, held = src.codes.block, src.codes.format.scale.name == "e8m0", 8
    return {
        "R": rows, "N": columns, "E": chunk, "ROT": rotation, "SIGNED": signed, "READ": src.read,
        "S": held if src.read else _STEPS, "QBR": block[0], "QBC": block[1], "QE8M0": e8m0,
        "EVEN": src.shape[0] % rows == 0 and src.shape[1] % columns == 0, "num_warps": warps,
        "enable_fp_fusion": False,
    }  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class _Setup:
    """What is the same for all matrices of one size and layout under one spec: found with one look.

    programs   tiles of the matrix;  signs   of a rotation whose signs are always the same; None: fresh ones
    words      whether kernels read the matrix in words
    scale      the second pass, for ALIKE False and True, and its programs
    """

    spec: QuantSpec
    block: tuple[int, int]
    budget: float
    form: _Form
    shape: tuple[int, int]
    stride: int
    words: bool
    programs: int
    signs: Tensor | None
    scale: tuple[Launch, Launch]
    scale_programs: int

    @classmethod
    def of(cls, source: Tensor | BlockScaledTensor, spec: QuantSpec, want: Want) -> tuple[_Setup, Tensor]:
        """(the setup, the memory that its kernels read)."""
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
        words, stride = _words(src)
        found = cls._new(src, words, stride, spec, want)
        if words.data_ptr() != memory.data_ptr():  # a copy that is laid out otherwise
            return found, words
        return keep(_SETUPS, at, found), memory

    @classmethod
    def _new(cls, src: _Source, words: Tensor, stride: int, spec: QuantSpec, want: Want) -> _Setup:
        if want.carrier not in (None, torch.bfloat16):
            raise ValueError(f"{spec.label()} has no carrier in {want.carrier}; ask for bf16")
        assert isinstance(spec.rounding, Eden)
        form, (rows, cols) = _Form.of(src, spec), src.shape
        scale, scale_programs = _scales(rows, cols // _BLOCK, want, src.tensor.device)
        return cls(
            spec, spec.shape, spec.rounding.budget, form, src.shape, stride, words.dtype == torch.int32,
            -(-rows // form.constants["R"]) * -(-cols // form.constants["N"]),
            lasting_signs(spec.rotation, src.tensor.device), scale, scale_programs,
        )  # fmt: skip


_SETUPS: dict[Hashable, _Setup] = {}


class _Job:
    """One matrix: its outputs, and what a launch that fills them is told.

    top         [8] int32, 0 at first: bits of the largest corrected scale, in two, because a ReduceMax takes vectors
    corrected   [R, C / 16] fp32 block scales, before the tensor's divides them
    codes       [R, C / 2] of the result, or for the second pass alone
    """

    __slots__ = (
        "codes", "corrected", "form", "memory", "q", "reduce_max", "s_dec", "scales", "setup", "signs", "top", "values",
        "where",
    )  # fmt: skip

    def __init__(self, source: Tensor | BlockScaledTensor, side: Side) -> None:
        spec, key, self.reduce_max, want = side
        self.setup, self.memory = setup, memory = _Setup.of(source, spec, want)
        self.form, (rows, cols), device = setup.form, setup.shape, memory.device
        self.q = None if isinstance(source, Tensor) else source
        self.top = zeroed(device)
        self.codes = torch.empty((rows, cols // 2), dtype=torch.uint8, device=device)
        self.corrected = torch.empty((rows, cols // _BLOCK), device=device)
        self.scales = self.values = None
        if want.codes:
            self.scales = torch.empty((rows, cols // _BLOCK), dtype=torch.uint8, device=device)
        if want.carrier is not None:
            self.values = torch.empty((rows, cols), dtype=torch.bfloat16, device=device)
        self.s_dec = unset(device)
        self.signs = sign_words(spec.rotation, key, device) if setup.signs is None else setup.signs
        self.where = place(key, rows, cols, _BLOCK, device)

    def coding(self) -> tuple[Any, ...]:
        """Arguments of the first pass from `signs` on."""
        return self.signs, self.top, self.codes, self.corrected, self.form.v

    def code(self) -> None:
        """Run the first pass."""
        setup, memory, q = self.setup, self.memory, self.q
        scales, outer = (memory, memory) if q is None else (q.scales, q.global_scale)
        self.form.code(setup.programs, memory, setup.stride, scales, outer, *setup.shape, *self.coding())

    def scaled(self) -> BlockScaledTensor | Carrier:
        """Run the second pass; what was asked for."""
        setup, none, (width, run, first, second) = self.setup, self.s_dec, (self.where[4], *self.where[8:])
        alike = (width | run | first | second) % 4 == 0
        setup.scale[alike](
            setup.scale_programs, setup.shape[0], setup.shape[1] // _BLOCK, self.reduced(), self.codes, self.corrected,
            none if self.scales is None else self.scales, none if self.values is None else self.values, none,
            setup.budget, *self.where,
        )  # fmt: skip
        return self.result()

    def result(self) -> BlockScaledTensor | Carrier:
        """What was asked for, once both passes have run."""
        setup, rotation, carrier = self.setup, self.form.rotation, None
        if self.values is not None:
            carrier = Carrier(self.values, self.s_dec, rotation)
        if self.scales is None:
            assert carrier is not None
            return carrier
        return BlockScaledTensor(
            self.codes, self.scales, self.s_dec, setup.spec.format, setup.block, rotation, 1, carrier
        )  # fmt: skip

    def reduced(self) -> Tensor:
        """Bits of the logical tensor's largest corrected scale from those of this shard's; NaN's are read as Inf's."""
        if self.reduce_max is None:
            return self.top
        return self.reduce_max(self.top[:2].clamp(max=0x7F800000).view(torch.float32)).view(torch.int32)


def _words(src: _Source) -> tuple[Tensor, int]:
    """What the kernels read, in words where it can be (of eight codes or two bf16), and the stride of its rows."""
    x, stride = src.tensor, src.stride
    if src.codes is not None:
        codes = x if stride % 4 == 0 else x.contiguous()
        return codes.view(torch.int32), codes.stride(0) // 4
    if src.read == 0 and x.dtype == torch.bfloat16 and src.shape[1] % 2 == stride % 2 == x.data_ptr() % 4 == 0:
        return x.view(torch.int32), stride // 2
    return x, stride


def _scales(rows: int, blocks: int, want: Want, device: torch.device) -> tuple[tuple[Launch, Launch], int]:
    """The second pass, for ALIKE False and True, and its programs."""
    across = min(blocks & -blocks, _BLOCKS)
    tall, carrier = _BLOCKS // across, want.carrier is not None
    even = rows % tall == 0
    name = across, even, integer(rows), integer(blocks), want.codes, carrier, device
    found = _SCALES.get(name)
    if found is None:
        constants = {
            "M": tall, "C": across, "EVEN": even, "CODES": want.codes, "CARRIER": carrier, "num_warps": 4,
            "enable_fp_fusion": False,
        }  # fmt: skip
        words = (3, 6) if carrier else (3,)
        one, four = (Launch(scale_kernel, {**constants, "ALIKE": alike}, words) for alike in (False, across % 4 == 0))
        found = _SCALES[name] = one, four
    return found, -(-rows // tall) * (blocks // across)


_SCALES: dict[Hashable, tuple[Launch, Launch]] = {}
_CODED = ("R", "N", "E", "ROT", "SIGNED", "S", "FOUR")  # constants that a pair's kernel has for both sides


class _Pair(NamedTuple):
    """The first pass of both sides of one matrix; see `chunks.of_pair`."""

    programs: int
    code: Launch

    @classmethod
    def of(cls, first: _Job, second: _Job) -> _Pair:
        at = first.setup, second.setup
        found = _PAIRS.get(at)
        if found is None:
            found = keep(_PAIRS, at, cls._new(first, second))
        return found

    @classmethod
    def _new(cls, first: _Job, second: _Job) -> _Pair:
        (rows, cols), a, b = first.setup.shape, first.form.constants, second.form.constants
        tall, wide = b["N"], a["N"]
        constants = {
            **{name: a[name] for name in _CODED}, **{f"T_{name}": b[name] for name in _CODED},
            "EVEN": rows % tall == 0 and cols % wide == 0, "num_warps": a["num_warps"], "enable_fp_fusion": False,
            "maxnreg": _registers(1, a["FOUR"] + b["FOUR"]),
        }  # fmt: skip
        words = (*((0,) if first.setup.words else ()), *((2,) if second.setup.words else ()), 8, 13)
        code = _LAUNCHES.setdefault((first.form.name, second.form.name), Launch(code_pair_kernel, constants, words))
        return cls(-(-rows // tall) * -(-cols // wide) * (tall // a["R"] + wide // b["R"]), code)


_PAIRS: dict[tuple[_Setup, _Setup], _Pair] = {}
_LAUNCHES: dict[Hashable, Launch] = {}
