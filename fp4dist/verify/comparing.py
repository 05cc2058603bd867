"""Equal bits: two results of one operation, wherever they lie; and arguments on the CPU, for the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fp4dist.numerics.grouping import spread
from fp4dist.numerics.quantize import carrier
from fp4dist.numerics.tensor import BlockScaledTensor, Carrier, Key, PartedTensor

_LAST_BITS = 2.0**-21  # relative: three factors in another order


def on_cpu(value: Any) -> Any:
    """A copy of a tensor, an operand, a key or a tuple of them, on the CPU; anything else as it is."""
    if isinstance(value, Tensor):
        return value.detach().cpu().contiguous()
    if isinstance(value, Key):
        return replace(value, moment=None)
    if isinstance(value, BlockScaledTensor | PartedTensor | Carrier):
        return type(value)(**{f.name: on_cpu(getattr(value, f.name)) for f in fields(value)})
    if isinstance(value, tuple) and type(value) is not torch.Size:
        moved = [on_cpu(v) for v in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value


def differs(found: Any, expected: Any) -> str | None:
    """Where `found` (on any device) is not `expected` (on the CPU), bit for bit; None: nowhere."""
    found = on_cpu(found)
    if isinstance(expected, tuple):
        texts = (differs(f, e) for f, e in zip(found, expected, strict=True))
        return next((text for text in texts if text), None)
    if isinstance(found, Carrier) and isinstance(expected, BlockScaledTensor):
        return _carrier_differs(found, expected)
    if isinstance(found, BlockScaledTensor) and isinstance(expected, BlockScaledTensor):
        for name in ("codes", "scales", "global_scale"):
            if text := _tensors_differ(getattr(found, name), getattr(expected, name)):
                return f"{name}: {text}"
        return _carrier_differs(found.carrier, expected) if found.carrier is not None else None
    if is_dataclass(expected):
        names = [f.name for f in fields(expected) if f.compare]
        texts = (differs(getattr(found, name), getattr(expected, name)) for name in names)
        return next((text for text in texts if text), None)
    if isinstance(expected, Tensor) and isinstance(found, Tensor):
        return _tensors_differ(found, expected)
    return None if found == expected else f"{found} instead of {expected}"


def _carrier_differs(found: Carrier, q: BlockScaledTensor) -> str | None:
    """A carrier holds code * block scale; one in FP8 may have moved a common power of two into its scale."""
    if found.lost is not None and int(found.lost):
        return f"carrier: {int(found.lost)} elements lost"
    values, wanted = found.values.float(), carrier(q)
    if found.rows is not None or q.global_scale.dim():  # factors of rows and tiles, in whatever order
        part = found.rows if found.rows is not None else torch.ones(1, 1)
        values = values * found.scale * spread(part, values.shape)
        wanted = wanted * spread(q.global_scale, wanted.shape)
        wrong = int(((values - wanted).abs() > _LAST_BITS * wanted.abs()).sum())
        return f"carrier: {wrong} of {wanted.numel()} elements" if wrong else None
    text = _tensors_differ(values * (found.scale / q.global_scale), wanted)
    return f"carrier: {text}" if text else None


def _tensors_differ(found: Tensor, expected: Tensor) -> str | None:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"{list(found.shape)} {found.dtype} instead of {list(expected.shape)} {expected.dtype}"
    same = (found == expected) | ((found != found) & (expected != expected))
    wrong = int((~same).sum())
    return f"{wrong} of {found.numel()} elements" if wrong else None


class Replayed:
    """A `reduce_max` that remembers its answers, and gives them again in their order to whoever computes the same."""

    def __init__(self, real: Callable[[Tensor], Tensor]) -> None:
        self.real = real
        self.answers: list[Tensor] = []

    def __call__(self, amax: Tensor) -> Tensor:
        """What the real one says."""
        answer = self.real(amax)
        self.answers.append(answer.detach().cpu())
        return answer

    def again(self) -> Callable[[Tensor], Tensor]:
        """The same answers, for one further computation."""
        answers = iter(self.answers)
        return lambda amax: next(answers).reshape(amax.shape)
