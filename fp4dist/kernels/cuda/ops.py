"""Operators of the compiled extension: registration, what they need of a device, shapes for tracing.

Import this module only after the extension has loaded (the package's `__init__` does). Checks of shape, type and layout
are at the door in csrc/bindings.cpp, so that every caller meets them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp4dist.kernels.registry import Request, kernel

OLDEST = (8, 0)  # compute capability; the warp-wide integer reduction appeared with it


def supports(request: Request) -> str | None:
    """Why the extension cannot serve `request`, or None."""
    if request.device.type != "cuda":
        return f"needs a CUDA device, not {request.device.type}"
    capability = torch.cuda.get_device_capability(request.device)
    if capability < OLDEST:
        return f"needs compute capability {OLDEST[0]}.{OLDEST[1]} or newer, not {capability[0]}.{capability[1]}"
    return None


@kernel("amax", backend="cuda", supports=supports)
def amax(x: Tensor) -> Tensor:
    """[] fp32 max |x|, on x's device and current stream; NaN if any element is.

    x        any shape with at least one element; bf16, fp16 or fp32; dense in memory, in any order of dimensions
    raises   ValueError if x is empty or has gaps, TypeError for another dtype

    Guarantee: the bits of x.abs().amax().float() (the payload of a NaN excepted), the same on every call.
    """
    return torch.ops.fp4dist.amax(x)


@torch.library.register_fake("fp4dist::amax")
def _amax_shape(x: Tensor) -> Tensor:
    return x.new_empty((), dtype=torch.float32)
