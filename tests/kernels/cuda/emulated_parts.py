"""The operators of csrc/bindings_parts.cpp on a CPU: see `emulated`, which registers them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def implementations(library: ctypes.CDLL) -> list[Callable[..., None]]:
    """Functions under the operators' names."""

    def at(x: Tensor | None) -> ctypes.c_void_p:
        return ctypes.c_void_p(0 if x is None else x.data_ptr())

    def long(number: int) -> ctypes.c_int64:
        return ctypes.c_int64(number)

    def done(error: int) -> None:
        if error:
            raise RuntimeError("no kernel for this job")

    def lines(x: Tensor) -> tuple[ctypes.c_void_p, ctypes.c_int64]:
        assert x.stride(1) == 1
        return at(x), long(x.stride(0))

    def take_channels(
        x: Tensor, chosen: Tensor | None, by_row: bool, mx: bool, rest: Tensor | None, side: Tensor
    ) -> None:  # fmt: skip
        turned = x.stride(1) != 1
        assert not turned or x.stride(0) == 1
        how = long(x.stride(int(turned))), int(x.dtype == torch.float32), int(turned), *x.shape
        done(library.emulated_take_channels(at(x), *how, at(chosen), int(by_row), int(mx), at(rest), at(side)))

    def hot_residual(
        x: Tensor, codes: Tensor, scales: Tensor, outer: Tensor, chosen: Tensor, block: Sequence[int], e8m0: bool,
        side: Tensor,
    ) -> None:  # fmt: skip
        wide, last = int(x.dtype == torch.float32), (*x.shape, *block, int(e8m0), at(side))
        done(library.emulated_hot_residual(*lines(x), wide, at(codes), at(scales), at(outer), at(chosen), *last))

    def clamp_rows(x: Tensor, wanted: int, rest: Tensor, side: Tensor | None) -> None:
        done(library.emulated_clamp_rows(*lines(x), *x.shape, wanted, at(rest), at(side)))

    def take_largest(x: Tensor, group: int, k: int, rest: Tensor, side: Tensor) -> None:
        done(library.emulated_take_largest(*lines(x), *x.shape, group, k, at(rest), at(side)))

    def slope_offsets(u: Tensor, levels: Sequence[float], out: Tensor) -> None:
        of_levels = (ctypes.c_double * len(levels))(*levels), len(levels)
        done(library.emulated_slope_offsets(at(u), long(u.numel()), *of_levels, at(out)))

    def split_terms(x: Tensor, first: Tensor, second: Tensor, third: Tensor) -> None:
        done(library.emulated_split_terms(at(x), long(x.numel()), at(first), at(second), at(third)))

    return [take_channels, hot_residual, clamp_rows, take_largest, slope_offsets, split_terms]
