"""Megatron-core's gradient norm and clipping in a few kernels on a GPU that has neither apex nor Transformer Engine.

Its own fallback takes each tensor by itself: the norm of every gradient is read back to the host, which then waits for
the device as often, and clipping multiplies into a copy and copies that back. torch's foreach functions do each in a
few launches, and only the final norm is read. Runs on a CPU keep the fallback and its bits.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from megatron.core.optimizer import clip_grads
from torch import Tensor

log = logging.getLogger("fp4dist")
_FALLBACKS = {"l2_norm_impl": "local_multi_tensor_l2_norm", "multi_tensor_scale_impl": "local_multi_tensor_scale"}


def use_foreach() -> tuple[str, ...]:
    """Replace the two fallbacks where Megatron-core uses them and there is a GPU; the names replaced by this call."""
    if not torch.cuda.is_available():
        return ()
    ours = {"l2_norm_impl": foreach_norm, "multi_tensor_scale_impl": foreach_scale}
    replaced = [place for place, name in _FALLBACKS.items() if getattr(clip_grads, place).__name__ == name]
    for place in replaced:
        setattr(clip_grads, place, ours[place])
    if replaced:
        log.info("gradient norm and clipping: torch's foreach functions (Megatron-core's fallback is slow on a GPU)")
    return tuple(replaced)


def foreach_norm(_: int, __: Any, tensor_lists: list[list[Tensor]], *___: Any) -> tuple[Tensor, None]:
    """(L2 norm of all tensors of the first list together, fp32 [1], on their device; None: no norm of each)."""
    norms = torch._foreach_norm(tensor_lists[0], 2, dtype=torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms)).view(1), None


def foreach_scale(_: int, __: Any, tensor_lists: list[list[Tensor]], scale: float) -> None:
    """The second list's tensors become `scale` times the first's, which may be the same ones."""
    source, target = tensor_lists
    if all(a is b or a.data_ptr() == b.data_ptr() for a, b in zip(source, target, strict=True)):
        torch._foreach_mul_(target, scale)
    else:
        torch._foreach_copy_(target, torch._foreach_mul(source, scale))
