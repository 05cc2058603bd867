# pyright: reportCallIssue=false, reportArgumentType=false
# (a launch takes options beside the kernel's own parameters)
"""MS-EDEN: the tensor's scale, then codes or a carrier, from two readings of the data; see `eden_programs`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf
from typing import Any

import torch
from torch import Tensor

from fp4dist.kernels.triton.counters import zeroed
from fp4dist.kernels.triton.eden_programs import (
    correct_kernel,
    largest_kernel,
    largest_pair_kernel,
    write_kernel,
    write_pair_kernel,
)
from fp4dist.kernels.triton.filters import original
from fp4dist.kernels.triton.launch import integer, launch
from fp4dist.kernels.triton.noise import place
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
        (eden.four_over_six != "none", "four-over-six"),
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
    job = _Job(_Source.of(source), Side(spec, key, reduce_max, want))
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
    first, second = _Job(_Source.of(x), row), _Job(_Source.of(x.t()), column)
    _launch_pair(largest_pair_kernel, first, second, _Job.looking, _READ)
    first.correct()
    second.correct()
    _launch_pair(write_pair_kernel, first, second, _Job.writing, _WRITTEN)
    return first.result(), second.result()


# (rows, columns) of a tile, columns of a thread, warps, by how the matrix is read (READ of `eden_programs`)
_TILES = {0: (64, 128, 32, 4), 1: (64, 128, 32, 4), 2: (128, 128, 16, 4)}
_REGISTERS = {0: 128, 1: 168, 2: 168}  # of a thread that writes, at most: a few more, and a third fewer warps fit
_STEPS = 2  # of a program that reads rows
_LOOKED = 16  # tiles whose largest value a program looks at


@dataclass(frozen=True, slots=True, eq=False)
class _Form:
    """What is the same for all matrices of one layout under one spec; `name` is the compiled kernels'.

    v             what a block's amax maps to;  least, most   what its correction is above and below
    """

    name: Hashable
    constants: dict[str, Any]
    v: float
    least: float
    most: float
    rotation: int

    @classmethod
    def of(cls, src: _Source, spec: QuantSpec) -> _Form:
        name = _number(spec), src.shape[0] % 256 == 0, integer(_words(src)[1]), src.layout()
        found = _FORMS.get(name)
        if found is None:
            assert isinstance(spec.rounding, Eden)
            v, rotation = target_max(E2M1.max, spec.rounding.headroom), spec.rotation.size if spec.rotation else 1
            constants = _constants(src, rotation, has_signs(spec.rotation))
            found = _FORMS[name] = cls(name, constants, v, *bounds_of_correction(v), rotation)
        return found


_FORMS: dict[Hashable, _Form] = {}


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


class _Job:
    """One matrix: its outputs, and what a launch that fills them is told.

    top     [8] int32, 0 at first: bits of the largest corrected scale (in two, because a ReduceMax takes vectors), and
            in [4] of the largest value
    tiles   int32 bits of the largest value of each tile
    """

    def __init__(self, source: _Source, side: Side) -> None:
        self.spec, self.key, self.reduce_max, self.want = side
        self.src, self.form = source, _Form.of(source, self.spec)
        if self.want.carrier not in (None, torch.bfloat16):
            raise ValueError(f"{self.spec.label()} has no carrier in {self.want.carrier}; ask for bf16")
        (rows, cols), device = source.shape, source.tensor.device
        self.top = zeroed(device)
        self.tiles = torch.empty(self.programs(), dtype=torch.int32, device=device)
        self.codes = self.scales = self.values = None
        if self.want.codes:
            self.codes = torch.empty((rows, cols // 8), dtype=torch.int32, device=device)
            self.scales = torch.empty((rows, cols // _BLOCK), dtype=torch.uint8, device=device)
        if self.want.carrier is not None:
            self.values = torch.empty((rows, cols // 2), dtype=torch.int32, device=device)
        self.s_dec = torch.empty((), device=device)
        self.signs = sign_words(self.spec.rotation, self.key, device)
        self.where = place(self.key, rows, cols, _BLOCK, device)
        width, runs = self.where[4], self.where[8:]
        pairs = self.form.constants["E"] == 2 * _BLOCK and not any(n % 2 for n in (width, *runs))
        self.told = {"CODES": self.want.codes, "CARRIER": self.values is not None, "PAIRS": pairs}

    def looking(self) -> tuple[Any, ...]:
        """Arguments of the first launch from `signs` on."""
        return self.signs, self.top, self.tiles

    def writing(self) -> tuple[Any, ...]:
        """Arguments of the second pass from `signs` on."""
        assert isinstance(self.spec.rounding, Eden)
        outputs = (self.s_dec if t is None else t for t in (self.codes, self.scales, self.values))
        return self.signs, self.reduced(), *outputs, self.s_dec, self.form.v, self.spec.rounding.budget, *self.where

    def look(self) -> None:
        """Find the largest value of each tile."""
        arguments = *_read(self.src), *self.looking(), *self.src.shape
        launch(largest_kernel, self.programs(), arguments, self.form.constants, ("largest", self.form.name))

    def correct(self) -> None:
        """Find the largest corrected scale."""
        form = self.form
        arguments = *_read(self.src), *self.looking(), *self.src.shape, form.v, form.least, form.most
        programs = -(-self.programs() // _LOOKED)
        launch(correct_kernel, programs, arguments, {"TILES": _LOOKED, **form.constants}, ("correct", form.name))

    def write(self) -> None:
        """Run the second pass."""
        arguments = *_read(self.src), *self.src.shape, *self.writing()
        constants = {**self.form.constants, **self.told, "maxnreg": _REGISTERS[self.src.read]}
        launch(write_kernel, self.programs(), arguments, constants, ("write", *self.told.values(), self.form.name))

    def programs(self) -> int:
        """Tiles of the matrix."""
        rows, cols = self.src.shape
        return -(-rows // self.form.constants["R"]) * -(-cols // self.form.constants["N"])

    def result(self) -> BlockScaledTensor | Carrier:
        """What was asked for, once both passes have run."""
        carrier = None
        if self.values is not None:
            carrier = Carrier(self.values.view(torch.bfloat16), self.s_dec, self.form.rotation)
        if self.codes is None or self.scales is None:
            assert carrier is not None
            return carrier
        codes, spec = self.codes.view(torch.uint8), self.spec
        q = BlockScaledTensor(codes, self.scales, self.s_dec, spec.format, spec.shape, self.form.rotation)
        return q if carrier is None else replace(q, carrier=carrier)

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


def _read(src: _Source) -> tuple[Any, ...]:
    """The kernels' first four arguments."""
    words, stride = _words(src)
    scales, outer = (src.codes.scales, src.codes.global_scale) if src.codes is not None else (words, words)
    return words, stride, scales, outer


_READ = ("R", "N", "E", "ROT", "SIGNED", "S")  # constants that a pair's kernels have for both sides
_WRITTEN = (*_READ, "CODES", "CARRIER", "PAIRS")


def _launch_pair(
    kernel: Any, first: _Job, second: _Job, arguments: Callable[[_Job], tuple[Any, ...]], names: tuple[str, ...]
) -> None:
    """One pass for both; see `chunks.of_pair`."""
    rows, cols = first.src.shape
    form = arguments.__name__, *first.told.values(), *second.told.values(), first.form.name, second.form.name
    constants = _PAIRED.get(form)
    if constants is None:
        a, b = {**first.form.constants, **first.told}, {**second.form.constants, **second.told}
        constants = _PAIRED[form] = {
            **{name: a[name] for name in names}, **{f"T_{name}": b[name] for name in names},
            "EVEN": rows % b["N"] == 0 and cols % a["N"] == 0, "num_warps": a["num_warps"], "enable_fp_fusion": False,
            **({"maxnreg": _REGISTERS[1]} if kernel is write_pair_kernel else {}),
        }  # fmt: skip
    a, b = first.form.constants, second.form.constants
    tall, wide = b["N"], a["N"]
    programs = -(-rows // tall) * -(-cols // wide) * (tall // a["R"] + wide // b["R"])
    shared = *_words(first.src), *_words(second.src), rows, cols
    launch(kernel, programs, (*shared, *arguments(first), *arguments(second)), constants, form)


_PAIRED: dict[Hashable, dict[str, Any]] = {}
