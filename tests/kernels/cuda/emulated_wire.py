"""The operators of csrc/bindings_wire.cpp on a CPU: see `emulated`, which registers them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_POINTERS = ("x", "out", "records", "sources", "table", "ranks", "bad")
_NUMBERS = ("x_wide", "out_wide", "number", "senders", "all_records", "source_bytes")


class _Wire(ctypes.Structure):
    """WirePointers of emulator/wire_glue.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in _POINTERS] + [(name, ctypes.c_int64) for name in _NUMBERS]


def implementations(library: ctypes.CDLL) -> list[Callable[..., None]]:
    """Functions under the operators' names."""

    def wide(x: Tensor | None) -> int:
        return int(x is not None and x.dtype == torch.float32)

    def call(what: int, how: Sequence[int], factors: Sequence[float], **parts: Tensor | None) -> None:
        sources = parts.get("sources")
        found = {name: x.data_ptr() for name, x in parts.items() if x is not None}
        table = parts["table"]
        assert table is not None
        found |= {"x_wide": wide(parts.get("x")), "out_wide": wide(parts.get("out")), "number": len(table)}
        if sources is not None:
            found |= {"senders": len(sources), "all_records": sources.shape[1], "source_bytes": sources.stride(0)}
        numbers = (ctypes.c_int64 * len(how))(*how), (ctypes.c_double * len(factors))(*factors)
        if library.emulated_wire(what, ctypes.byref(_Wire(**found)), *numbers):
            raise RuntimeError("no kernel for these records")

    def wire_encode(x: Tensor, table: Tensor, records: Tensor, how: Any, factors: Any) -> None:
        call(0, how, factors, x=x, table=table, records=records)

    def wire_sum(
        out: Tensor, own: Any, sources: Tensor, table: Tensor, ranks: Tensor, bad: Any, how: Any, factors: Any
    ) -> None:
        call(1, how, factors, out=out, x=own, sources=sources, table=table, ranks=ranks, bad=bad)

    def wire_recode(
        records: Tensor, own: Any, sources: Tensor, table: Tensor, ranks: Tensor, bad: Any, how: Any, factors: Any
    ) -> None:
        call(2, how, factors, records=records, x=own, sources=sources, table=table, ranks=ranks, bad=bad)

    def wire_plain(
        out: Tensor, own: Any, messages: Tensor, table: Tensor, unit: int, own_at: int, factor: float
    ) -> None:
        def vector(x: Tensor | None) -> tuple[Any, int]:
            return ctypes.c_void_p(0 if x is None else x.data_ptr()), wide(x)

        library.emulated_wire_plain(
            *vector(out), *vector(own), *vector(messages), ctypes.c_void_p(table.data_ptr()),
            ctypes.c_int64(len(table)), ctypes.c_int64(messages.stride(0)), unit, len(messages), own_at,
            ctypes.c_double(factor),
        )  # fmt: skip

    return [wire_encode, wire_sum, wire_recode, wire_plain]
