"""The operators of csrc/bindings_grid.cpp on a CPU: see `emulated`, which registers them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


class _Grid(ctypes.Structure):
    """GridPointers of csrc/grid.h."""

    _fields_ = [
        (name, ctypes.c_void_p) for name in ("data", "toward", "given", "outer", "when", "codes", "scales", "outers")
    ]


class _Filter(ctypes.Structure):
    """FilterPointers of csrc/filter.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("g", "kept", "x", "scales", "outer", "when", "out")]


def implementations(library: ctypes.CDLL) -> list[Callable[..., None]]:
    """Functions under the operators' names."""

    def at(x: Tensor | None) -> int:
        return 0 if x is None else x.data_ptr()

    def numbers(how: Sequence[int], factors: Sequence[float]) -> tuple[Any, Any]:
        return (ctypes.c_int64 * len(how))(*how), (ctypes.c_double * len(factors))(*factors)

    def done(error: int) -> None:
        if error:
            raise RuntimeError("no kernel for this job")

    def grid_quantize(
        source: Tensor, toward: Any, given: Any, outer: Any, when: Any, how: Any, factors: Any, codes: Tensor,
        scales: Any, outers: Any,
    ) -> None:  # fmt: skip
        pointers = _Grid(*map(at, (source, toward, given, outer, when, codes, scales, outers)))
        stride = ctypes.c_int64(codes.stride(0))
        done(library.emulated_grid_quantize(ctypes.byref(pointers), stride, *numbers(how, factors)))

    def grid_largest(source: Tensor, when: Any, how: Any, factors: Any, by_row: bool, top: Tensor) -> None:
        pointers = _Grid(at(source), 0, 0, 0, at(when), 0, 0, 0)
        last = int(by_row), ctypes.c_void_p(at(top))
        done(library.emulated_grid_largest(ctypes.byref(pointers), *numbers(how, factors), *last))

    def grid_decode(codes: Tensor, scales: Tensor, of: Tensor, how: Any, levels: Any, values: Tensor) -> None:
        memory = [ctypes.c_void_p(at(x)) for x in (codes, scales, of)]
        done(library.emulated_grid_decode(*memory, *numbers(how, levels), ctypes.c_void_p(at(values))))

    def of_filter(which: int, parts: Sequence[Any], how: Any, factors: Any) -> None:
        done(library.emulated_filter(which, ctypes.byref(_Filter(*map(at, parts))), *numbers(how, factors)))

    def clip_mask(x: Tensor, scales: Any, outer: Any, when: Any, how: Any, factors: Any, out: Tensor) -> None:
        of_filter(0, (None, None, x, scales, outer, when, out), how, factors)

    def clip_filter(
        gradient: Tensor, kept: Any, x: Any, scales: Any, outer: Any, when: Any, how: Any, factors: Any, out: Tensor
    ) -> None:  # fmt: skip
        of_filter(1, (gradient, kept, x, scales, outer, when, out), how, factors)

    def turn_back(codes: Tensor, scales: Any, outer: Any, when: Any, how: Any, factors: Any, out: Tensor) -> None:
        of_filter(2, (None, None, codes, scales, outer, when, out), how, factors)

    return [grid_quantize, grid_largest, grid_decode, clip_mask, clip_filter, turn_back]
