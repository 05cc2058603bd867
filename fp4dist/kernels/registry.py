"""Which implementation runs an operation: declared with a reason for every no, resolved once, never inside a step.

Operations and their signatures are those of the reference: `quantize`, `requantize`, `dequantize`, `amax`, `matmul`,
`grouped_matmul`. Two more save passes over memory and are optional, codes being enough without them: `quantize_pair`
(a matrix and its transpose at once) and `to_carrier` (codes -> `numerics.tensor.Carrier`). `mask`, `filter_by_mask`,
`filter_by_scales` and `slope` are those of `numerics.estimators`, `original` that of `numerics.quantize`, `decompose`,
`take_channels`, `in_precision` and `hot_residual` those of `numerics.splits`.
WIRE_OPS are the codec's of `comm`, which has its own reference.
A backend registers a function with `@kernel(op, backend=...)` and a `supports` that returns why not, or None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from fp4dist.errors import KernelUnavailable
from fp4dist.spec.recipe import QuantSpec
from fp4dist.spec.run import BackendConfig

Op = Literal[
    "quantize", "requantize", "dequantize", "amax", "matmul", "grouped_matmul", "quantize_pair", "to_carrier", "mask",
    "filter_by_mask", "filter_by_scales", "original", "decompose", "slope",
    "take_channels", "in_precision", "hot_residual",
    "wire_encode", "wire_accumulate", "wire_recode", "wire_sum_plain",
]  # fmt: skip
Backend = Literal["reference", "triton", "cuda"]
WIRE_OPS: tuple[Op, ...] = ("wire_encode", "wire_accumulate", "wire_recode", "wire_sum_plain")
AUTO_ORDER: tuple[Backend, ...] = ("cuda", "triton", "reference")
NATIVE = (10, 0)  # the first compute capability with FP4 tensor cores


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of a kernel: the operand's spec (None for plain operands) and the device.

    sums    an operand of the GEMM is a sum of codes and something beside them (`fp4dist.numerics.tensor.PartedTensor`)
    other   for `quantize_pair`: the spec of the transpose
    """

    op: Op
    spec: QuantSpec | None
    device: torch.device
    sums: bool = False
    other: QuantSpec | None = None


Types = tuple[torch.dtype, torch.dtype]
CarrierTypes = Callable[[QuantSpec | None, QuantSpec | None, torch.device], Types | None]


@dataclass(frozen=True, slots=True)
class Kernel:
    """One implementation of one operation.

    carries        a quantizer that takes `want=`: codes, a carrier, or both
    unrotates      a `requantize` that takes `back=`: the (rotation, key) whose basis the codes are in
    sums           takes operands in parts (`fp4dist.numerics.tensor.PartedTensor`), not codes alone
    carrier_types  of a GEMM: (spec of A, spec of B, device) -> the carriers' types in which it multiplies such operands
                   fastest, or None where it wants codes; a spec is None for a plain operand
    """

    op: Op
    backend: Backend
    fn: Callable[..., Any]
    supports: Callable[[Request], str | None]
    carries: bool = False
    unrotates: bool = False
    carrier_types: CarrierTypes | None = None
    sums: bool = False

    def __call__(self, *args: Any, **named: Any) -> Any:
        """Run it."""
        return self.fn(*args, **named)


_KERNELS: dict[tuple[Op, Backend], Kernel] = {}
_MISSING: dict[Backend, str] = {}


def _anything(_: Request) -> str | None:
    return None


def kernel(
    op: Op,
    *,
    backend: Backend,
    supports: Callable[[Request], str | None] = _anything,
    carries: bool = False,
    unrotates: bool = False,
    carrier_types: CarrierTypes | None = None,
    sums: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as `backend`'s implementation of `op`; see Kernel."""

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        _KERNELS[op, backend] = Kernel(op, backend, fn, supports, carries, unrotates, carrier_types, sums)
        return fn

    return register


def declare_missing(backend: Backend, reason: str) -> None:
    """Record why a whole backend is not there (not built, package absent); shown in explanations."""
    _MISSING[backend] = reason


def resolve(request: Request, config: BackendConfig) -> Kernel:
    """The kernel for `request`; KernelUnavailable with every backend's reason if there is none."""
    wanted = auto_order(request.device) if config.kind == "auto" else (config.kind,)
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


def companion(request: Request, backend: Backend) -> Kernel | None:
    """`backend`'s kernel for an optional operation, or None: whoever resolved that backend does without it."""
    found = _KERNELS.get((request.op, backend))
    return found if found is not None and found.supports(request) is None else None


def grouped(matmul: Kernel) -> Callable[..., list[Any]]:
    """The backend of `matmul` for several independent pairs of operands: its `grouped_matmul`, or one call a pair.

    The result is called as the reference's `grouped_matmul`.

    The bits are the same in either case, so what has resolved `matmul` needs no second resolution. A kernel that was
    wrapped, to watch its operands, is called for each pair.
    """
    found = _KERNELS.get(("grouped_matmul", matmul.backend))
    if found is not None and _KERNELS.get(("matmul", matmul.backend)) == matmul:
        return found.fn

    def one_by_one(
        a: Sequence[Any], b: Sequence[Any], *, into: Sequence[Any] | None = None, **named: Any
    ) -> list[Any]:  # fmt: skip
        sums = [{}] * len(a) if into is None else [{} if total is None else {"into": total} for total in into]
        return [matmul(x, w, **named, **more) for x, w, more in zip(a, b, sums, strict=True)]

    return one_by_one


Around = Callable[[Kernel, tuple[Any, ...], dict[str, Any]], Any]


@contextmanager
def watched(around: Around) -> Iterator[None]:
    """Within it `around` runs every kernel but the reference's: given kernel and arguments, it calls `kernel.fn`.

    For verification: what was resolved outside keeps its way, and calls between kernels are not seen.
    """
    kept = dict(_KERNELS)

    def through(kernel: Kernel) -> Kernel:
        return replace(kernel, fn=lambda *args, **named: around(kernel, args, named))

    _KERNELS.update({at: through(kernel) for at, kernel in kept.items() if kernel.backend != "reference"})
    try:
        yield
    finally:
        _KERNELS.update(kept)


def auto_order(device: torch.device) -> tuple[Backend, ...]:
    """AUTO_ORDER; on a GPU without FP4 tensor cores Triton's kernels, which are the faster ones there, come first."""
    if device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) < NATIVE:
        return ("triton", "cuda", "reference")
    return AUTO_ORDER


def explain(request: Request, config: BackendConfig) -> dict[str, str]:
    """Backend -> "yes" or the reason for no, for the layer table."""
    found = {b: _reason_against(request, b, config) or "yes" for b in AUTO_ORDER}
    later = config.kind == "auto" and auto_order(request.device) != AUTO_ORDER
    if later and found["cuda"] == found["triton"] == "yes":
        found["cuda"] = "Triton's kernels are faster before compute capability 10.0; backend.kind: cuda takes these"
    return found


def _reason_against(request: Request, backend: Backend, config: BackendConfig) -> str | None:
    found = _KERNELS.get((request.op, backend))
    if found is None:
        return _MISSING.get(backend, f"has no {request.op}")
    if backend == "reference" and request.device.type != "cpu" and config.kind == "auto" and not config.allow_reference:
        place = "a GPU" if request.device.type == "cuda" else request.device.type
        return f"refused on {place}: backend.allow_reference is false"
    of_sums = request.sums or (request.spec is not None and request.spec.has_parts)
    if backend != "reference" and of_sums and not found.sums:
        return "multiplies codes alone, not what a split or an outlier leaves beside them"
    return found.supports(request)
