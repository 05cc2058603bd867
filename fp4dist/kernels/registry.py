"""Which implementation runs an operation: declared with a reason for every no, resolved once, never inside a step.

Operations and their signatures are those of the reference: `quantize`, `requantize`, `dequantize`, `amax`, `matmul`,
`grouped_matmul`.
A backend registers a function with `@kernel(op, backend=...)` and a `supports` that returns why not, or None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fp4dist.errors import KernelUnavailable
from fp4dist.spec.recipe import QuantSpec
from fp4dist.spec.run import BackendConfig

Op = Literal["quantize", "requantize", "dequantize", "amax", "matmul", "grouped_matmul"]
Backend = Literal["reference", "triton", "cuda"]
AUTO_ORDER: tuple[Backend, ...] = ("cuda", "triton", "reference")


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of a kernel: the operand's spec (None for plain operands) and the device.

    sums   an operand of the GEMM is a sum of codes and something beside them (`fp4dist.numerics.tensor.PartedTensor`)
    """

    op: Op
    spec: QuantSpec | None
    device: torch.device
    sums: bool = False


@dataclass(frozen=True, slots=True)
class Kernel:
    """One implementation of one operation."""

    op: Op
    backend: Backend
    fn: Callable[..., Any]
    supports: Callable[[Request], str | None]

    def __call__(self, *args: Any) -> Any:
        """Run it."""
        return self.fn(*args)


_KERNELS: dict[tuple[Op, Backend], Kernel] = {}
_MISSING: dict[Backend, str] = {}


def _anything(_: Request) -> str | None:
    return None


def kernel(
    op: Op, *, backend: Backend, supports: Callable[[Request], str | None] = _anything
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as `backend`'s implementation of `op`."""

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        _KERNELS[op, backend] = Kernel(op, backend, fn, supports)
        return fn

    return register


def declare_missing(backend: Backend, reason: str) -> None:
    """Record why a whole backend is not there (not built, package absent); shown in explanations."""
    _MISSING[backend] = reason


def resolve(request: Request, config: BackendConfig) -> Kernel:
    """The kernel for `request`; KernelUnavailable with every backend's reason if there is none."""
    wanted = AUTO_ORDER if config.kind == "auto" else (config.kind,)
    reasons: list[tuple[str, str]] = []
    for backend in wanted:
        reason = _reason_against(request, backend, config)
        if reason is None:
            return _KERNELS[request.op, backend]
        reasons.append((backend, reason))
    label = request.spec.label() if request.spec else "plain"
    lines = "\n".join(f"    {backend:<10} {reason}" for backend, reason in reasons)
    way_out = (
        "set backend.allow_reference: true to run the (slow, bit-identical) reference"
        if config.kind == "auto"
        else "set backend.kind: auto, or reference for the (slow, bit-identical) reference"
    )
    raise KernelUnavailable(f"no backend can run {request.op}({label}) on {request.device}:\n{lines}\n  {way_out}")


def grouped(matmul: Kernel) -> Callable[[Sequence[Any], Sequence[Any]], list[Any]]:
    """The backend of `matmul` for several independent pairs of operands: its `grouped_matmul`, or one call a pair.

    The bits are the same in either case, so what has resolved `matmul` needs no second resolution. A kernel that was
    wrapped, to watch its operands, is called for each pair.
    """
    found = _KERNELS.get(("grouped_matmul", matmul.backend))
    if found is not None and _KERNELS.get(("matmul", matmul.backend)) == matmul:
        return found.fn
    return lambda a, b: [matmul(*pair) for pair in zip(a, b, strict=True)]


def explain(request: Request, config: BackendConfig) -> dict[str, str]:
    """Backend -> "yes" or the reason for no, for the layer table."""
    return {b: _reason_against(request, b, config) or "yes" for b in AUTO_ORDER}


def _reason_against(request: Request, backend: Backend, config: BackendConfig) -> str | None:
    found = _KERNELS.get((request.op, backend))
    if found is None:
        return _MISSING.get(backend, f"has no {request.op}")
    if backend == "reference" and request.device.type != "cpu" and config.kind == "auto" and not config.allow_reference:
        return "refused on a GPU: backend.allow_reference is false"
    if backend != "reference" and (request.sums or (request.spec is not None and request.spec.has_parts)):
        return "multiplies codes alone, not what a split or an outlier leaves beside them"
    return found.supports(request)
