"""The quantizers of csrc/: every operation of a block in one kernel, one more where a tensor's scale comes first."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fp4dist.kernels.cuda import jobs
from fp4dist.kernels.cuda.decode import FP8_TYPES, TO, carrier_of, finished, original
from fp4dist.kernels.cuda.jobs import Form, Source, form_of
from fp4dist.numerics.grouping import ReduceMax
from fp4dist.numerics.handed import handed
from fp4dist.numerics.tensor import CODES, BlockScaledTensor, Carrier, Key, Want
from fp4dist.spec.blocks import Hadamard
from fp4dist.spec.recipe import QuantSpec

INFINITY = 0x7F800000
_BLOCK_OF_EDEN = 16


class Side(NamedTuple):
    """How one matrix is quantized: the arguments of `quantize`."""

    spec: QuantSpec
    key: Key | None = None
    reduce_max: ReduceMax | None = None
    want: Want = CODES


def quantize(
    source: Tensor | BlockScaledTensor, spec: QuantSpec, key: Key | None = None, reduce_max: ReduceMax | None = None,
    toward: Tensor | None = None, *, want: Want = CODES,
) -> BlockScaledTensor | Carrier:  # fmt: skip
    """The codes of a matrix, or of the transpose of forward codes: see `fp4dist.numerics.quantize`.

    want   codes, or the carrier of a GEMM (bf16, or FP8 under power-of-two scales), or both
    """
    if toward is not None:
        raise ValueError(f"{spec.label()}: the CUDA quantizer takes no moving average")
    return _run(_Work(Source.of(source), Side(spec, key, reduce_max, want)))


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
    bits = jobs.sign_bits(*back)
    if q.rotation > jobs.MOST_BACK or bits is None:
        return quantize(original(q, *back).t(), spec, key, reduce_max, want=want)
    mask = (1 << q.rotation) - 1
    return _run(_Work(Source.of(q, (q.rotation, bits & mask)), Side(spec, key, reduce_max, want)))


def quantize_pair(
    x: Tensor, row: Side, column: Side
) -> tuple[BlockScaledTensor | Carrier, BlockScaledTensor | Carrier]:
    """The operands of x [T, O] and of x^T [O, T] from one reading of x; bits as of two calls of `quantize`."""
    if x.stride(1) != 1:
        x = x.contiguous()
    first, second = works = _Work(Source.of(x), row), _Work(Source.of(x.t()), column)
    when = first.when if first.when is not None else second.when
    at_once = x.dtype == torch.bfloat16 and second.source.turned and first.same_time(when) and second.same_time(when)
    if at_once and first.form.needs_amax and second.form.needs_amax:
        _measure_pair(first, second, when)
    else:
        for work in works:
            work.measure()
    if at_once:
        (how, factors, outer, outputs), (how_t, factors_t, outer_t, outputs_t) = (work.arguments() for work in works)
        torch.ops.fp4dist.quantize_pair(
            x, when, outer, how, factors, *outputs, outer_t, how_t, factors_t, *outputs_t
        )  # fmt: skip
    else:
        for work in works:
            work.run()
    return first.result(), second.result()


def measure(source: Source, spec: QuantSpec, key: Key | None) -> Tensor:
    """[] int32 bits of max |x| of a matrix in the rotated basis of `spec`; above those of Inf where one is NaN."""
    q = source.codes
    if q is None and spec.rotation is None and source.tensor.is_contiguous():
        return torch.ops.fp4dist.amax(source.tensor).view(torch.int32)
    top = torch.zeros((), dtype=torch.int32, device=source.tensor.device)
    torch.ops.fp4dist.quantize(
        source.tensor, q.scales if q else None, q.global_scale if q else None, None, _when(key),
        *_measurement(source, spec, key), None, None, None, top, None, None,
    )  # fmt: skip
    return top


def _measurement(source: Source, spec: QuantSpec, key: Key | None) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """(integers, factors) of the job that only looks for the amax."""
    form = form_of(spec)
    how = (*source.integers(form, False, jobs.MEASURE), *jobs.signs(spec.rotation, key), *jobs.place(None, 0, 0, 8), 0)
    return how, (source.nth(), *form.factors)


def _when(key: Key | None) -> Tensor | None:
    return None if key is None or key.moment is None else key.moment.time


def _measure_pair(row: _Work, column: _Work, when: Tensor | None) -> None:
    """The amax of x and of x^T, in the bases that they are quantized in, from one reading."""
    if row.form.rotation == column.form.rotation == 1:
        row.measure()
        if column.reduce_max is row.reduce_max:
            column.outer = row.outer
        else:
            column.measure()
        return
    if row.handed() is not None or column.handed() is not None:
        row.measure()
        column.measure()
        return
    tops = torch.zeros(2, dtype=torch.int32, device=row.source.tensor.device)
    (how, factors), (how_t, factors_t) = (_measurement(w.source, w.spec, w.key) for w in (row, column))
    torch.ops.fp4dist.quantize_pair(
        row.source.tensor, when, None, how, factors, None, None, None, tops[0], None, None, None, how_t, factors_t,
        None, None, None, tops[1], None, None,
    )  # fmt: skip
    row.outer, column.outer = row.reduced(tops[0]), column.reduced(tops[1])


def _run(work: _Work) -> BlockScaledTensor | Carrier:
    work.measure()
    work.run()
    return work.result()


@lru_cache(maxsize=64)
def _constant(value: float, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it outlives the pass, and backward may keep it
        return torch.full((), value, device=device)


class _Work:
    """One matrix on its way: its outputs, and what the kernel that fills them is told.

    counters   [2] int32, zero at first: the largest byte, or MS-EDEN's largest scale; elements that FP8 loses
    memory     of a slot whose FP8 values the quantizer writes itself, at a shift that follows from it, else None
    alone      whether it writes them without codes, which a second launch makes where they did not fit
    """

    def __init__(self, source: Source, side: Side) -> None:
        self.source, (self.spec, self.key, self.reduce_max, self.want) = source, side
        self.form: Form = form_of(self.spec)
        self.when = _when(self.key)
        self.narrow = self.want.carrier in FP8_TYPES
        if self.want.carrier not in (None, torch.bfloat16) and not (self.narrow and self.form.shared is not None):
            raise ValueError(f"{self.spec.label()} has no carrier in {self.want.carrier}; ask for bf16")
        (rows, cols), device = source.shape, source.tensor.device
        _check(source.shape, self.spec)
        grid = rows // self.spec.shape[0], cols // self.spec.shape[1]
        self.eden = self.form.rule == jobs.EDEN
        self.codes = self.scales = self.values = self.corrected = self.counters = self.outer = self.inside = None
        self.memory = self.want.memory if self.narrow else None
        self.alone = self.memory is not None and not self.want.codes and self.form.values_alone
        if self.want.codes or self.narrow or self.eden:
            self.codes = torch.empty((rows, cols // 2), dtype=torch.uint8, device=device)
        if self.want.codes or self.narrow:
            self.scales = torch.empty(grid, dtype=torch.uint8, device=device)
        if self.want.carrier == torch.bfloat16 or self.memory is not None:
            self.values = torch.empty((rows, cols), dtype=self.want.carrier, device=device)
        if self.want.codes and self.want.mask and self.form.shared is not None:
            self.inside = torch.empty((rows, cols // 8), dtype=torch.uint8, device=device)
        if self.eden:
            self.corrected = torch.empty(grid, dtype=torch.float32, device=device)
        if self.eden or (self.narrow and self.memory is None):
            self.counters = torch.zeros(2, dtype=torch.int32, device=device)
        shared = self.form.shared
        self.global_scale = (
            torch.empty((), dtype=torch.float32, device=device) if shared is None else _constant(shared, device)
        )

    def same_time(self, when: Tensor | None) -> bool:
        """Whether noise and signs that it draws belong to the time at `when`."""
        rotation = self.spec.rotation
        return self.when is when or not (self.form.noisy or (rotation is not None and rotation.signs == "fresh"))

    def measure(self) -> None:
        """Find the logical tensor's amax, if the scales need it."""
        if self.form.needs_amax:
            known = self.handed()
            self.outer = self.reduced(measure(self.source, self.spec, self.key) if known is None else known)

    def handed(self) -> Tensor | None:
        """[] int32 bits of an amax that came with the matrix, in the basis that it is quantized in."""
        amax = handed(self.source.tensor) if self.source.codes is None and self.form.rotation == 1 else None
        return None if amax is None else amax.view(torch.int32)

    def reduced(self, top: Tensor) -> Tensor:
        """Bits of the logical tensor's largest magnitude from those of this shard's; kernels read a NaN's as Inf's."""
        if self.reduce_max is None:
            return top
        magnitude = (top & 0x7FFFFFFF).clamp(max=INFINITY)
        return self.reduce_max(magnitude.view(torch.float32)).view(torch.int32)

    def arguments(
        self, misfits: bool = False
    ) -> tuple[tuple[int, ...], tuple[float, ...], Tensor | None, tuple[Tensor | None, ...]]:
        """(integers, factors, outer, outputs) of the job; misfits: of the one behind that of values alone."""
        form, (rows, cols) = self.form, self.source.shape
        narrow = 0 if self.memory is None or self.want.carrier is None else TO[self.want.carrier]
        how = (
            *self.source.integers(form, False), *jobs.signs(self.spec.rotation, self.key),
            *jobs.place(self.key if form.noisy else None, rows, cols, 8),
            jobs.MISFITS_ALONE if misfits else narrow,
        )  # fmt: skip
        scales = self.corrected if self.eden else self.scales
        codes = not self.alone or misfits
        outputs = (
            self.codes if codes else None, scales if codes else None, None if self.eden or misfits else self.values,
            self.memory if self.counters is None else self.counters[0],
            self.global_scale if form.needs_amax else None, self.inside,
        )  # fmt: skip
        return how, (self.source.nth(), *form.factors), self.outer, outputs

    def run(self, misfits: bool = False) -> None:
        """Fill the outputs from the matrix alone."""
        how, factors, outer, outputs = self.arguments(misfits)
        q = self.source.codes
        torch.ops.fp4dist.quantize(
            self.source.tensor, q.scales if q else None, q.global_scale if q else None, outer, self.when, how, factors,
            *outputs,
        )  # fmt: skip

    def result(self) -> BlockScaledTensor | Carrier:
        """What was asked for, once the kernel has run."""
        spec, form = self.spec, self.form
        if self.alone:
            self.run(misfits=True)
        if self.eden:
            self._round_scales()
        carrier = Carrier(self.values, self.global_scale, form.rotation) if self.values is not None else None
        if self.codes is None or self.scales is None:
            assert carrier is not None
            return carrier
        q = BlockScaledTensor(
            self.codes, self.scales, self.global_scale, spec.format, spec.shape, form.rotation, inside=self.inside
        )
        if self.narrow:
            carrier = self._narrow_carrier(q)
        if carrier is None:
            return q
        return replace(q, carrier=carrier) if self.want.codes else carrier

    def _narrow_carrier(self, q: BlockScaledTensor) -> Carrier:
        """FP8 of the codes; where the quantizer has written it, again if the matrix did not fit at its shift."""
        want = self.want
        assert want.carrier is not None
        if self.memory is not None:
            assert self.values is not None
            return finished(q, self.values, self.memory, want.lost)
        carrier = carrier_of(q, want.carrier, counters=self.counters)
        if want.lost is not None and carrier.lost is not None:
            torch.maximum(want.lost, carrier.lost, out=want.lost)
        return carrier

    def _round_scales(self) -> None:
        """MS-EDEN's scales, and its carrier, from codes and corrected scales."""
        assert self.corrected is not None
        assert self.counters is not None
        rows, cols = self.source.shape
        torch.ops.fp4dist.eden_scales(
            self.corrected, self.reduced(self.counters[0]), self.codes, self.when, cols // _BLOCK_OF_EDEN,
            self.form.budget, False, jobs.place(self.key, rows, cols, _BLOCK_OF_EDEN), self.scales, self.values,
            self.global_scale,
        )  # fmt: skip


def _check(shape: tuple[int, int], spec: QuantSpec) -> None:
    rows, cols = shape
    if rows % spec.rows_multiple or cols % spec.columns_multiple or not rows * cols:
        raise ValueError(
            f"shape {list(shape)} does not fit {spec.label()}: rows must be a multiple of {spec.rows_multiple},"
            f" columns of {spec.columns_multiple}, and neither may be 0"
        )
