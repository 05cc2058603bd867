"""A backend that writes carriers, on the CPU: the reference's codes, decoded here, in place of a GPU's kernels.

It takes the name of the CUDA backend, which `backend.kind: auto` prefers. What it was asked for is in `asked`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fp4dist import numerics
from fp4dist.kernels import registry
from fp4dist.kernels.registry import Request, kernel
from fp4dist.numerics.quantize import carrier as exact_values
from fp4dist.numerics.tensor import CODES, BlockScaledTensor, Carrier, Want
from fp4dist.spec.recipe import QuantSpec

FP8, OTHER_FP8 = torch.float8_e5m2, torch.float8_e4m3fn
Given = BlockScaledTensor | Carrier


@dataclass
class Asked:
    """calls: operation -> times;  wants: of every quantizer, in order;  types: of every carrier made from codes"""

    calls: dict[str, int] = field(default_factory=dict)
    wants: list[Want] = field(default_factory=list)
    types: list[torch.dtype] = field(default_factory=list)
    loses: Callable[[BlockScaledTensor], int] = lambda _: 0  # what an FP8 carrier of these codes says it has lost
    spans: Callable[[BlockScaledTensor], int] | None = None  # binades that quantizers say codes span; None: nothing

    def count(self, op: str) -> None:
        self.calls[op] = self.calls.get(op, 0) + 1


def one_byte(spec: QuantSpec) -> bool:
    """Whether a code times its block's scale is exact in bf16, and nothing but one factor stands outside."""
    return (
        spec.format.scale.name in ("e4m3", "e8m0") and spec.above in ("none", "tensor") and spec.samples == 1
        and not spec.has_parts
    )  # fmt: skip


@contextmanager
def carrier_backend(kind: torch.dtype = torch.bfloat16, *, pairs: bool = True) -> Iterator[Asked]:
    """Inside, recipes that are applied get this backend.

    kind    of carriers: FP8 (e5m2 x e4m3) only where both operands have power-of-two scales, else bf16
    pairs   with quantize_pair
    """
    asked, before = Asked(), dict(registry._KERNELS)

    def as_wanted(q: BlockScaledTensor, want: Want) -> Given:
        asked.wants.append(want)
        if want.spread is not None and asked.spans is not None:
            told = torch.tensor([200, 256 - (200 - asked.spans(q))], dtype=torch.int32)
            torch.maximum(want.spread, told, out=want.spread)
        if want.carrier is None:
            return q
        carrier = to_carrier(q, want.carrier)
        return replace(q, carrier=carrier) if want.codes else carrier

    def quantize(
        x: Tensor, spec: QuantSpec, key: Any = None, reduce_max: Any = None, toward: Any = None, *, want: Want = CODES
    ) -> Given:
        asked.count("quantize")
        return as_wanted(numerics.quantize(x, spec, key, reduce_max, toward), want)

    def requantize(q: Any, spec: QuantSpec, key: Any = None, reduce_max: Any = None, *, want: Want = CODES) -> Given:
        asked.count("requantize")
        return as_wanted(numerics.requantize(q, spec, key, reduce_max), want)

    def quantize_pair(x: Tensor, row: tuple[Any, ...], column: tuple[Any, ...]) -> tuple[Given, Given]:
        asked.count("quantize_pair")
        sides = ((x, *row), (x.t(), *column))
        first, second = (
            as_wanted(numerics.quantize(m, spec, key, reduce_max), want) for m, spec, key, reduce_max, want in sides
        )
        return first, second

    def to_carrier(q: BlockScaledTensor, dtype: torch.dtype) -> Carrier:
        asked.types.append(dtype)
        values = exact_values(q)
        if dtype == torch.bfloat16:
            return Carrier(values.to(dtype), q.global_scale, q.rotation)
        shift = 2.0 ** -(int(q.scales.max()) - 127 - (12 if dtype == FP8 else 5))
        lost = torch.tensor(asked.loses(q), dtype=torch.int32)
        return Carrier((values * shift).to(dtype), q.global_scale / shift, q.rotation, lost=lost)

    def matmul(a: Any, b: Any, **named: Any) -> Tensor:
        asked.count("matmul")
        return numerics.matmul(a, b, **named)

    def carrier_types(
        a: QuantSpec | None, b: QuantSpec | None, _: torch.device
    ) -> tuple[torch.dtype, torch.dtype] | None:
        specs = [spec for spec in (a, b) if spec is not None]
        if not all(one_byte(spec) for spec in specs):
            return None
        powers = len(specs) == 2 and all(spec.format.scale.name == "e8m0" for spec in specs)
        return (kind, OTHER_FP8) if kind == FP8 and powers else (torch.bfloat16, torch.bfloat16)

    def both(request: Request) -> str | None:
        specs = (request.spec, request.other)
        return None if all(spec is not None and one_byte(spec) for spec in specs) else "needs one-byte scales"

    kernel("quantize", backend="cuda", carries=True)(quantize)
    kernel("requantize", backend="cuda", carries=True)(requantize)
    kernel("matmul", backend="cuda", carrier_types=carrier_types)(matmul)
    kernel("to_carrier", backend="cuda")(to_carrier)
    if pairs:
        kernel("quantize_pair", backend="cuda", supports=both)(quantize_pair)
    try:
        yield asked
    finally:
        registry._KERNELS.clear()
        registry._KERNELS.update(before)
