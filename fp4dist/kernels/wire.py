"""Which backend codes and sums what travels between ranks: resolved by the registry, once a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from fp4dist.kernels import cuda, triton  # noqa: F401 (they register what they have)
from fp4dist.kernels.registry import WIRE_OPS, Request, resolve
from fp4dist.spec.run import BackendConfig


@dataclass(frozen=True, slots=True)
class WireKernels:
    """The codec's functions, as `fp4dist.kernels.triton.wire` describes them; backend: whose they are."""

    encode: Callable[..., None]
    accumulate: Callable[..., None]
    recode: Callable[..., None]
    sum_plain: Callable[..., None]
    backend: str


@cache
def wire_kernels(device: torch.device) -> WireKernels:
    """Those that run on `device`; on a CPU Triton's, in its interpreter. KernelUnavailable if there are none."""
    if device.type != "cuda":
        from fp4dist.kernels.triton import wire

        return WireKernels(wire.encode, wire.accumulate, wire.recode, wire.sum_plain, "triton")
    found = [resolve(Request(op, None, device), BackendConfig()) for op in WIRE_OPS]
    return WireKernels(*(kernel.fn for kernel in found), backend=found[0].backend)
