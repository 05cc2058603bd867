# pyright: reportCallIssue=false, reportArgumentType=false
# (a launch takes options beside the kernel's own parameters)
"""MS-EDEN: the tensor's scale, then codes or a carrier, from two readings of the data; see `eden_programs`."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fp4dist.kernels.triton.counters import unset, zeroed
from fp4dist.kernels.triton.eden_programs import (
    correct_kernel,
    largest_kernel,
    largest_pair_kernel,
    write_kernel,
    write_pair_kernel,
)
from fp4dist.kernels.triton.filters import original
from fp4dist.kernels.triton.launch import Launch, integer
from fp4dist.kernels.triton.noise import PLACE, place
from fp4dist.kernels.triton.quantize import Side, _number, _Source
from fp4dist.kernels.triton.signs import has_signs, sign_words
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
    job.look()
    job.correct()
    job.write()
    return job.result()


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
    """The operands of x [T, O] and of x^T [O, T] from one launch; bits as of two calls of `quantize`."""
    x = x if x.stride(1) == 1 else x.contiguous()
    first, second = _Job(x, row), _Job(x.t(), column)
    pair = _Pair.of(first, second)
    shared = first.memory, first.setup.stride, second.memory, second.setup.stride, *first.setup.shape
    pair.look(pair.programs, *shared, *first.looking(), *second.looking())
    first.correct()
    second.correct()
    pair.write(pair.programs, *shared, *first.writing(), *second.writing())
    return first.result(), second.result()


# (rows, columns) of a tile, columns of a thread, warps, by how the matrix is read (READ of `eden_programs`)
_TILES = {0: (64, 128, 32, 4), 1: (64, 128, 32, 4), 2: (128, 128, 16, 4)}
_REGISTERS = {0: 128, 1: 168, 2: 168}  # of a thread that writes, at most: a few more, and a third fewer warps fit
_FOUR = {"none": 0, "mse": 1, "mae": 2, "absmax": 3}  # of `eden_programs`
_STEPS = 2  # of a program that reads rows
_LOOKED = 16  # tiles whose largest value a program looks at


@dataclass(frozen=True, slots=True, eq=False)
class _Form:
    """What is the same for all matrices of one layout under one spec; `name` is the compiled kernels'.

    four          FOUR of `eden_programs`;  v   what a block's amax maps to
    least, most   what a corrected scale is above and below, over that of the block's amax
    """

    name: Hashable
    constants: dict[str, Any]
    four: int
    v: float
    least: float
    most: float
    rotation: int
    look: Launch
    correct: Launch
    write: dict[Hashable, Launch]  # by what it writes

    @classmethod
    def of(cls, src: _Source, spec: QuantSpec) -> _Form:
        words, stride = _words(src)
        name = _number(spec), src.shape[0] % 256 == 0, words.dtype, integer(stride), src.layout()
        found = _FORMS.get(name)
        if found is None:
            assert isinstance(spec.rounding, Eden)
            v, rotation = target_max(E2M1.max, spec.rounding.headroom), spec.rotation.size if spec.rotation else 1
            four = _FOUR[spec.rounding.four_over_six]
            constants = _constants(src, rotation, has_signs(spec.rotation))
            read = (0,) if words.dtype == torch.int32 else ()
            correct = Launch(correct_kernel, {"TILES": _LOOKED, "FOUR": four, **constants}, read)
            found = _FORMS[name] = cls(
                name, constants, four, v, *bounds_of_corrected(v, four > 0), rotation,
                Launch(largest_kernel, constants, read), correct, {},
            )  # fmt: skip
        return found

    def writes(self, told: _Told, words: tuple[int, ...]) -> Launch:
        """The second pass. words: places of what it reads and writes in words."""
        found = self.write.get(told)
        if found is None:
            registers = _REGISTERS[self.constants["READ"]]
            found = Launch(write_kernel, {**self.constants, **told._asdict(), "maxnreg": registers}, words)
            self.write[told] = found
        return found


_FORMS: dict[Hashable, _Form] = {}


def bounds_of_corrected(v: float, four: bool) -> tuple[float, float]:
    """Below and above a block's corrected scale over that of its amax; four: 1.5 of that may be what is corrected."""
    least, most = bounds_of_correction(v)
    if not four:
        return least, most
    below, above = bounds_of_correction(v / 1.5)
    return min(least, 1.5 * below), max(most, 1.5 * above)


def bounds_of_correction(v: float) -> tuple[float, float]:
    """Below and above the correction <u,u> / <u,c> of any block of 16 whose largest |u| is v (give or take rounding).

    B is above if B v c(v) - v^2 is more than 15 times what any u <= v adds to <u,u> - B <u,c>, which is most at the
    upper end of a level's interval; below, the other way round, at the lower ends. 0 and infinity where that proves
    nothing.
    """
    steps = [(low, high) for low, high in pairwise(E2M1.levels) if (low + high) / 2 < v]
    top = steps[-1][1] if steps else 0.0  # the level of v
    upper = [*(((low + high) / 2, low) for low, high in steps), (v, top)]  # (u, its level)
    lower = [((low + high) / 2, high) for low, high in steps]
    square, product = v * v, v * top
    least = next((b for b in (0.8, 0.5) if square - b * product > _most(b * u * c - u * u for u, c in lower)), 0.0)
    most = next((b for b in (1.25, 1.5, 2.0) if b * product - square > _most(u * u - b * u * c for u, c in upper)), inf)
    return least, most


def _most(added: Iterable[float]) -> float:
    """What 15 elements add at most, and a little more."""
    return 15 * max(0.0, *added, 0.0) * (1 + 1e-3) + 1e-3


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


class _Told(NamedTuple):
    """Constants of the second pass alone."""

    FOUR: int
    CODES: bool
    CARRIER: bool
    PAIRS: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Setup:
    """What is the same for all matrices of one size and layout under one spec: found with one look.

    programs   tiles of the matrix;  signs   of a rotation whose signs are always the same; None: fresh ones
    words      whether kernels read the matrix in words;  told   for PAIRS False and True
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
    told: tuple[_Told, _Told]

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
        if len(_SETUPS) > _MOST:  # sizes that are always new, as experts' tokens
            _SETUPS.clear()
        _SETUPS[at] = found
        return found, memory

    @classmethod
    def _new(cls, src: _Source, words: Tensor, stride: int, spec: QuantSpec, want: Want) -> _Setup:
        if want.carrier not in (None, torch.bfloat16):
            raise ValueError(f"{spec.label()} has no carrier in {want.carrier}; ask for bf16")
        assert isinstance(spec.rounding, Eden)
        form, (rows, cols) = _Form.of(src, spec), src.shape
        fresh = spec.rotation is not None and spec.rotation.signs == "fresh"
        wide = form.constants["E"] == 2 * _BLOCK
        told = tuple(_Told(form.four, want.codes, want.carrier is not None, pairs) for pairs in (False, wide))
        return cls(
            spec, spec.shape, spec.rounding.budget, form, src.shape, stride, words.dtype == torch.int32,
            -(-rows // form.constants["R"]) * -(-cols // form.constants["N"]),
            None if fresh else sign_words(spec.rotation, None, src.tensor.device), (told[0], told[1]),
        )  # fmt: skip


_SETUPS: dict[Hashable, _Setup] = {}
_MOST = 4096  # setups that are kept


class _Job:
    """One matrix: its outputs, and what a launch that fills them is told.

    top     [8] int32, 0 at first: bits of the largest corrected scale (in two, because a ReduceMax takes vectors), and
            in [4] of the largest value
    tiles   int32 bits of the largest value of each tile
    """

    __slots__ = (
        "codes", "form", "memory", "q", "reduce_max", "s_dec", "scales", "setup", "signs", "tiles", "told", "top",
        "values", "where",
    )  # fmt: skip

    def __init__(self, source: Tensor | BlockScaledTensor, side: Side) -> None:
        spec, key, self.reduce_max, want = side
        self.setup, self.memory = setup, memory = _Setup.of(source, spec, want)
        self.form, (rows, cols), device = setup.form, setup.shape, memory.device
        self.q = None if isinstance(source, Tensor) else source
        self.top = zeroed(device)
        self.tiles = torch.empty(setup.programs, dtype=torch.int32, device=device)
        self.codes = self.scales = self.values = None
        if want.codes:
            self.codes = torch.empty((rows, cols // 2), dtype=torch.uint8, device=device)
            self.scales = torch.empty((rows, cols // _BLOCK), dtype=torch.uint8, device=device)
        if want.carrier is not None:
            self.values = torch.empty((rows, cols), dtype=torch.bfloat16, device=device)
        self.s_dec = unset(device)
        self.signs = sign_words(spec.rotation, key, device) if setup.signs is None else setup.signs
        self.where = where = place(key, rows, cols, _BLOCK, device)
        width, run, first, second = where[4], *where[8:]
        self.told = setup.told[not (width | run | first | second) % 2]

    def read(self) -> tuple[Any, ...]:
        """The kernels' first four arguments."""
        memory, q = self.memory, self.q
        return (memory, self.setup.stride, *((memory, memory) if q is None else (q.scales, q.global_scale)))

    def looking(self) -> tuple[Any, ...]:
        """Arguments of the first launch from `signs` on."""
        return self.signs, self.top, self.tiles

    def writing(self) -> tuple[Any, ...]:
        """Arguments of the second pass from `signs` on."""
        none = self.s_dec
        return (
            self.signs, self.reduced(), none if self.codes is None else self.codes,
            none if self.scales is None else self.scales, none if self.values is None else self.values, none,
            self.form.v, self.setup.budget, *self.where,
        )  # fmt: skip

    def look(self) -> None:
        """Find the largest value of each tile."""
        self.form.look(self.setup.programs, *self.read(), *self.looking(), *self.setup.shape)

    def correct(self) -> None:
        """Find the largest corrected scale."""
        form, setup = self.form, self.setup
        told = *self.looking(), *setup.shape, form.v, form.least, form.most
        form.correct(-(-setup.programs // _LOOKED), *self.read(), *told)

    def write(self) -> None:
        """Run the second pass."""
        setup = self.setup
        words = (*((0,) if setup.words else ()), *self.written(6))
        self.form.writes(self.told, words)(setup.programs, *self.read(), *setup.shape, *self.writing())

    def written(self, first: int) -> tuple[int, ...]:
        """Places of the outputs in words, where the arguments from `signs` on begin at `first`."""
        return (*(() if self.codes is None else (first + 2,)), *(() if self.values is None else (first + 4,)))

    def result(self) -> BlockScaledTensor | Carrier:
        """What was asked for, once both passes have run."""
        setup, rotation, carrier = self.setup, self.form.rotation, None
        if self.values is not None:
            carrier = Carrier(self.values, self.s_dec, rotation)
        if self.codes is None or self.scales is None:
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


_READ = ("R", "N", "E", "ROT", "SIGNED", "S")  # constants that a pair's kernels have for both sides
_WRITTEN = (*_READ, "FOUR", "CODES", "CARRIER", "PAIRS")
_SIDE = 8 + len(PLACE) + 1  # arguments of `_Job.writing`


class _Pair(NamedTuple):
    """The launches of one pass for both sides of one matrix; see `chunks.of_pair`."""

    programs: int
    look: Launch
    write: Launch

    @classmethod
    def of(cls, first: _Job, second: _Job) -> _Pair:
        at = first.setup, second.setup, first.told, second.told
        found = _PAIRS.get(at)
        if found is None:
            if len(_PAIRS) > _MOST:
                _PAIRS.clear()
            found = _PAIRS[at] = cls._new(first, second)
        return found

    @classmethod
    def _new(cls, first: _Job, second: _Job) -> _Pair:
        rows, cols = first.setup.shape
        a, b = ({**job.form.constants, **job.told._asdict()} for job in (first, second))
        tall, wide = b["N"], a["N"]
        options = {
            "EVEN": rows % tall == 0 and cols % wide == 0, "num_warps": a["num_warps"], "enable_fp_fusion": False,
        }  # fmt: skip
        looks, writes = (
            {**{name: a[name] for name in names}, **{f"T_{name}": b[name] for name in names}, **options}
            for names in (_READ, _WRITTEN)
        )
        read = (*((0,) if first.setup.words else ()), *((2,) if second.setup.words else ()))
        written = (*read, *first.written(6), *second.written(6 + _SIDE))
        name = first.form.name, second.form.name, first.told, second.told
        look = _LAUNCHES.setdefault(("look", name), Launch(largest_pair_kernel, looks, read))
        write = _LAUNCHES.setdefault(
            ("write", name), Launch(write_pair_kernel, {**writes, "maxnreg": _REGISTERS[1]}, written)
        )
        return cls(-(-rows // tall) * -(-cols // wide) * (tall // a["R"] + wide // b["R"]), look, write)


_PAIRS: dict[Hashable, _Pair] = {}
_LAUNCHES: dict[Hashable, Launch] = {}
