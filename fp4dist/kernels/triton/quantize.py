# pyright: reportCallIssue=false, reportArgumentType=false
# (a launch takes options beside the kernel's own parameters)
"""The quantizers of E2M1 with one-byte scales, in one pass over the data (two where the tensor's scale comes first)."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fp4dist.kernels.triton.amaxes import largest_both
from fp4dist.kernels.triton.counters import zeroed
from fp4dist.kernels.triton.filters import original
from fp4dist.kernels.triton.launch import integer, launch
from fp4dist.kernels.triton.noise import place
from fp4dist.kernels.triton.programs import amax_kernel, pair_amax_kernel, pair_kernel, quantize_kernel
from fp4dist.kernels.triton.signs import has_signs, sign_words
from fp4dist.numerics.grouping import ReduceMax
from fp4dist.numerics.handed import handed
from fp4dist.numerics.scales import fp32, target_max
from fp4dist.numerics.tensor import CODES, BlockScaledTensor, Carrier, Key, Want
from fp4dist.spec.blocks import AbsMax, FourOverSix, Hadamard, Nearest, Stochastic
from fp4dist.spec.formats import E2M1
from fp4dist.spec.recipe import QuantSpec


class _Source(NamedTuple):
    """What a kernel reads, in the output's orientation.

    READ   0: rows; 1: the transpose of rows; 2: codes of the transpose (see `programs`)
    tensor, stride   the memory, and elements (or words of two) from one of its rows to the next
    turn   (size, signs) of the rotation that codes are turned back from
    """

    read: int
    tensor: Tensor
    stride: int
    shape: tuple[int, int]
    codes: BlockScaledTensor | None = None
    turn: tuple[int, Tensor | None] = (1, None)

    @classmethod
    def of(cls, source: Tensor | BlockScaledTensor, turn: tuple[int, Tensor | None] = (1, None)) -> _Source:
        if not isinstance(source, Tensor):
            columns, rows = source.shape
            codes = source.codes if source.codes.stride(1) == 1 else source.codes.contiguous()
            return cls(2, codes, codes.stride(0), (rows, columns), source, turn)
        (rows, columns), (down, right) = source.shape, source.stride()
        if right == 1:
            return cls(0, source, down, (rows, columns))
        if down != 1:
            return cls.of(source.contiguous())
        if source.dtype == torch.bfloat16 and rows % 2 == right % 2 == source.data_ptr() % 4 == 0:
            return cls(1, source.t().view(torch.int32), right // 2, (rows, columns))
        return cls(1, source.t(), right, (rows, columns))

    def arguments(self) -> tuple[Any, ...]:
        """The kernels' first eight parameters."""
        q, (size, signs) = self.codes, self.turn
        scales, shared = (q.scales, q.global_scale) if q else (self.tensor, self.tensor)
        back = self.tensor if signs is None else signs
        return self.tensor, self.stride, scales, shared, back, fp32(size**-0.5), *self.shape

    def layout(self) -> tuple[Any, ...]:
        """All that decides which compiled kernel reads it: of its size only what tiles and Triton ask for."""
        q, t, (rows, cols) = self.codes, self.tensor, self.shape
        aligned = t.data_ptr() % 16 == 0 and (q is None or q.scales.data_ptr() % 16 == 0)
        block = None if q is None else (q.block, q.format.scale.name)
        uneven = cols % _width(cols) != 0  # 1024 and 2816 columns have strips of one width, which divides the first
        sizes = rows == 1, min(rows & -rows, 128), min(cols & -cols, 128), uneven, integer(self.stride)
        return self.read, t.dtype, sizes, aligned, block, self.turn[0], t.device

    def constants(self) -> dict[str, Any]:
        """How the memory is to be read."""
        q = self.codes
        block = q.block if q else (1, 16)
        words = self.tensor.dtype == torch.int32 or self.read == 2
        vector = 16 // self.tensor.element_size()
        return {
            "READ": self.read,
            "P": vector if self.read == 0 else 2 if words else 1,
            "QBR": block[0],
            "QBC": block[1],
            "QE8M0": bool(q) and q.format.scale.name == "e8m0",
            "BACK": self.turn[0],
        }


def why_not(spec: QuantSpec) -> str | None:
    """The first block of `spec` that these kernels lack, or None."""
    rows, columns = spec.shape
    lacks = (
        (spec.format.element != E2M1, f"elements {spec.format.element.name}"),
        (spec.format.scale.name != "e4m3", f"{spec.format.scale.name} scales"),
        ((rows, columns) not in ((1, 16), (1, 32), (16, 16), (32, 32)), f"blocks {[rows, columns]}"),
        (spec.above != "tensor", f"outer {spec.above}"),
        (not isinstance(spec.rule, AbsMax | FourOverSix), f"scale rule {spec.rule.kind}"),
        (spec.samples > 1, "several samples"),
        (not isinstance(spec.rounding, Nearest | Stochastic), f"rounding {spec.rounding.kind}"),
        (isinstance(spec.rounding, Nearest) and spec.rounding.ties != "even", "ties other than to even"),
        (isinstance(spec.rounding, Stochastic) and isinstance(spec.rule, FourOverSix), "four-over-six under noise"),
        (spec.has_parts, "operands in parts"),
    )
    return next((f"the Triton quantizer has no {what}" for missing, what in lacks if missing), None)


class Side(NamedTuple):
    """How one of the two operands of `quantize_pair` is quantized: the arguments of `quantize`."""

    spec: QuantSpec
    key: Key | None = None
    reduce_max: ReduceMax | None = None
    want: Want = CODES


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
    jobs = _Job(x, row), _Job(x.t(), column)
    if all(job.known is None for job in jobs):
        _measure_pair(*jobs)
    else:
        for job in jobs:
            job.measure()
    if all(job.form.light for job in jobs):
        _launch_pair(pair_kernel, *jobs, (*jobs[0].arguments(), *jobs[1].arguments()), _TOLD, "pair")
    else:
        for job in jobs:
            job.run()
    return jobs[0].result(), jobs[1].result()


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
    if q.rotation > 32 or (spec.rotation is not None and spec.rotation.size > _BACK[1]):
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
    return _largest(_Amax.of(src, 16, 1, False), src, sign_words(None, None, x.device)).view(torch.float32)


# (rows, columns) of a tile and warps, by how the matrix is read (READ of `programs`) and the columns of a block: the
# fastest of those tried on an H100 with 16384 x 4096 bf16.
_TILES = {
    (0, 16): (32, 128, 4), (0, 32): (32, 128, 4), (1, 16): (64, 64, 4), (1, 32): (64, 128, 4),
    (2, 16): (32, 128, 4), (2, 32): (64, 128, 4),
}  # fmt: skip
_WIDE = {(1, 16): (64, 128, 8)}  # for rotations that do not fit into the columns above
_BACK = (128, 64, 4)  # for codes that are turned back: a warp has 32 rows side by side
_STRIP = 1024  # columns that a program looks through for the amax


def _tile(src: _Source, block: tuple[int, int], rotation: int, signed: bool) -> dict[str, Any]:
    """The constants that every kernel has for its tile of `src`, and the options of its launch."""
    kind = src.read, block[1]
    rows, columns, warps = _TILES[kind]
    if columns < rotation:
        rows, columns, warps = _WIDE[kind]
    if src.turn[0] > 1:
        rows, columns, warps = _BACK
    return {
        "R": max(rows, block[0]), "N": columns, "E": block[1], "ROT": rotation, "SIGNED": signed,
        "W": 32 * block[1] // columns, **src.constants(), "num_warps": warps, "enable_fp_fusion": False,
    }  # fmt: skip


def _programs(shape: tuple[int, int], rows: int, columns: int) -> int:
    """Tiles of a matrix."""
    return -(-shape[0] // rows) * -(-shape[1] // columns)


class _Amax(NamedTuple):
    """A launch of `amax_kernel` for all matrices of one layout.

    steps   tiles that a program looks through
    """

    form: Hashable
    constants: dict[str, Any]
    steps: int

    @classmethod
    def of(cls, src: _Source, columns: int, rotation: int, signed: bool) -> _Amax:
        width = _width(src.shape[1])
        form = ("amax", columns, rotation, signed, width, src.layout())
        found = _AMAX.get(form)
        if found is None:
            constants = _tile(src, (1, columns), rotation, signed)
            r, n = constants["R"], constants["N"]
            steps = max(1, width // n)
            even = src.shape[0] % r == 0 and src.shape[1] % (n * steps) == 0
            found = _AMAX[form] = cls(form, {**constants, "EVEN": even, "STEPS": steps}, steps)
        return found


def _width(columns: int) -> int:
    """Of the strip that a program of `amax_kernel` looks through: one that divides, unless only narrow ones do."""
    width = min(columns & -columns, _STRIP)
    return width if width >= _STRIP // 2 else _STRIP


_AMAX: dict[Hashable, _Amax] = {}


def _largest(amax: _Amax, src: _Source, signs: Tensor) -> Tensor:
    """[] int32 bits of max |x|; above those of Inf where something is NaN."""
    top = zeroed(src.tensor.device)[0]
    constants = amax.constants
    programs = _programs(src.shape, constants["R"], constants["N"] * amax.steps)
    launch(amax_kernel, programs, (*src.arguments(), signs, top), constants, amax.form)
    return top


@dataclass(frozen=True, slots=True, eq=False)
class _Form:
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
    amax: _Amax

    @property
    def light(self) -> bool:
        """Whether memory, not arithmetic, bounds it."""
        return self.constants["RULE"] == 0 and self.rotation <= (1 if self.noisy else 16)

    @classmethod
    def of(cls, src: _Source, spec: QuantSpec, want: Want, signed: bool) -> _Form:
        form = (_number(spec), want.codes, want.carrier, signed, _width(src.shape[1]), src.layout())
        found = _FORMS.get(form)
        if found is None:
            found = _FORMS[form] = cls._new(src, spec, want, signed, form)
        return found

    @classmethod
    def _new(cls, src: _Source, spec: QuantSpec, want: Want, signed: bool, form: Hashable) -> _Form:
        rule, rounding = spec.rule, spec.rounding
        if want.carrier not in (None, torch.bfloat16):
            raise ValueError(f"{spec.label()} has no carrier in {want.carrier}; ask for bf16")
        rotation = spec.rotation.size if spec.rotation else 1
        rows, cols = src.shape
        carrier = want.carrier is not None
        constants = {
            "BR": spec.shape[0], "RULE": 6 if isinstance(rule, FourOverSix) else 0,
            "METRIC": {"mse": 0, "mae": 1, "absmax": 2}[rule.metric] if isinstance(rule, FourOverSix) else 0,
            "ROUND": int(isinstance(rounding, Stochastic)),
            "NONZERO": isinstance(rule, AbsMax) and rule.nonzero, "CODES": want.codes,
            "CARRIER": carrier, **_tile(src, spec.shape, rotation, signed),
        }  # fmt: skip
        r, n = constants["R"], constants["N"]
        v = target_max(E2M1.max, getattr(rule, "headroom", 1.0))
        scalars = fp32(fp32(getattr(rule, "budget", 1.0)) * v), fp32(1.0 / v)
        constants["EVEN"] = rows % r == 0 and cols % n == 0
        if constants["RULE"] == 6 and want.codes and carrier:
            constants["maxnreg"] = 128  # a few more, and a quarter fewer warps fit on a multiprocessor
        return cls(
            spec, ("quantize", form), constants, scalars, rotation, isinstance(rounding, Stochastic),
            _Amax.of(src, spec.shape[1], rotation, signed),
        )  # fmt: skip


_FORMS: dict[Hashable, _Form] = {}
_NUMBERS: dict[QuantSpec, int] = {}
_SEEN: dict[int, tuple[QuantSpec, int]] = {}


def _number(spec: QuantSpec) -> int:
    """A number for each different spec; looked up by identity, because hashing a spec takes longer than a launch."""
    seen = _SEEN.get(id(spec))
    if seen is None:
        if len(_SEEN) > 4096:  # specs that are made anew at each call
            _SEEN.clear()
        seen = _SEEN[id(spec)] = spec, _NUMBERS.setdefault(spec, len(_NUMBERS))
    return seen[1]


class _Job:
    """One matrix, quantized: its outputs, and what a launch that fills them is told.

    s_dec     [] fp32 the scale of the tensor
    outer     [] int32 bits of the logical tensor's amax
    known     [] int32 bits of this tensor's, where it came with one and no rotation comes before its scales
    """

    def __init__(self, source: _Source | Tensor | BlockScaledTensor, side: Side) -> None:
        spec, self.key, self.reduce_max, self.want = side
        self.src = src = source if isinstance(source, _Source) else _Source.of(source)
        amax = handed(source) if isinstance(source, Tensor) and spec.rotation is None else None
        self.known = None if amax is None else amax.view(torch.int32)
        self.signs = sign_words(spec.rotation, self.key, src.tensor.device)
        self.form = form = _Form.of(src, spec, self.want, has_signs(spec.rotation))
        rows, cols = src.shape
        grid = rows // spec.shape[0], cols // spec.shape[1]
        self.device = device = src.tensor.device
        self.codes = self.scales = self.values = self.outer = None
        if form.constants["CODES"]:
            self.codes = torch.empty((rows, cols // 8), dtype=torch.int32, device=device)
        if self.want.codes:
            self.scales = torch.empty(grid, dtype=torch.uint8, device=device)
        if self.want.carrier == torch.bfloat16:
            self.values = torch.empty((rows, cols // 2), dtype=torch.int32, device=device)
        self.s_dec = torch.empty((), dtype=torch.float32, device=device)

    def measure(self) -> None:
        """Find the amax."""
        top = _largest(self.form.amax, self.src, self.signs) if self.known is None else self.known
        self.outer = self.reduced(top)

    def reduced(self, top: Tensor) -> Tensor:
        """Bits of the logical tensor's largest magnitude from those of this shard's; kernels read a NaN's as Inf's."""
        if self.reduce_max is None:
            return top
        return self.reduce_max((top & 0x7FFFFFFF).clamp(max=0x7F800000).view(torch.float32)).view(torch.int32)

    def arguments(self) -> tuple[Any, ...]:
        """What changes from call to call, in the order of `quantize_kernel`'s parameters from s0 on."""
        form, none = self.form, self.src.tensor
        return (
            self.signs, none if self.outer is None else self.outer, none if self.codes is None else self.codes,
            none if self.scales is None else self.scales, none if self.values is None else self.values, self.s_dec,
            *form.scalars, *place(self.key if form.noisy else None, *self.src.shape, 8, self.device),
        )  # fmt: skip

    def run(self) -> None:
        """Fill the outputs from the matrix alone."""
        constants = self.form.constants
        programs = _programs(self.src.shape, constants["R"], constants["N"])
        launch(quantize_kernel, programs, (*self.src.arguments(), *self.arguments()), constants, self.form.form)

    def result(self) -> BlockScaledTensor | Carrier:
        """What was asked for, once the kernel has run."""
        form, spec, carrier = self.form, self.form.spec, None
        if self.values is not None:
            carrier = Carrier(self.values.view(torch.bfloat16), self.s_dec, form.rotation)
        if self.codes is None or self.scales is None:
            assert carrier is not None
            return carrier
        codes = self.codes.view(torch.uint8)
        q = BlockScaledTensor(codes, self.scales, self.s_dec, spec.format, spec.shape, form.rotation)
        return q if carrier is None else replace(q, carrier=carrier)


_BOTH = ("R", "N", "E", "ROT", "SIGNED", "P", "W")  # constants of a pair's amax
_TOLD = (*_BOTH[:3], "BR", "ROT", "SIGNED", "RULE", "METRIC", "ROUND", "NONZERO", "P", "W", "CODES", "CARRIER")


def _launch_pair(
    kernel: Any, row: _Job, column: _Job, arguments: tuple[Any, ...], names: tuple[str, ...], form: Hashable
) -> None:
    """Run a kernel whose programs read x [T, O] for both sides; see `programs._of_pair`."""
    a, b = row.form.constants, column.form.constants
    tall, wide = b["N"], a["N"]
    each = tall // a["R"] + wide // b["R"]
    rows, cols = row.src.shape
    constants = {
        **{name: a[name] for name in names}, **{f"T_{name}": b[name] for name in names},
        "EVEN": rows % tall == 0 and cols % wide == 0, "num_warps": a["num_warps"], "enable_fp_fusion": False,
    }  # fmt: skip
    source = row.src.tensor, row.src.stride, column.src.tensor, column.src.stride, rows, cols
    programs = -(-rows // tall) * -(-cols // wide) * each
    launch(kernel, programs, (*source, *arguments), constants, (form, row.form.form, column.form.form))


def _measure_pair(row: _Job, column: _Job) -> None:
    """The amax of x and of x^T, in the bases that they are quantized in, from one reading."""
    src, rotation = column.src, column.form.rotation
    if row.form.rotation == 1 < rotation:
        signed = column.form.constants["SIGNED"]
        first, second = largest_both(
            src.tensor, src.stride, src.shape, src.layout(), rotation, column.signs, signed
        )  # fmt: skip
    else:
        first, second = zeroed(row.device)[0], zeroed(row.device)[0]
        _launch_pair(pair_amax_kernel, row, column, (row.signs, first, column.signs, second), _BOTH, "pair amax")
    row.outer, column.outer = row.reduced(first), column.reduced(second)


@lru_cache(maxsize=64)
def _constant(value: float, device: torch.device) -> Tensor:
    return torch.full((), value, device=device)
