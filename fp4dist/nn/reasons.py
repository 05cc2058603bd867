"""Why operations of a linear do not run in csrc/: said once for each reason, when a recipe is applied on a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from fp4dist.kernels.registry import Kernel, Request, explain
from fp4dist.numerics.splits import bare
from fp4dist.spec.recipe import GEMMS, SLOTS, LinearRecipe
from fp4dist.spec.run import BackendConfig


def why_not_cuda(
    recipe: LinearRecipe, kernels: Mapping[str, Kernel], device: torch.device, config: BackendConfig
) -> dict[str, tuple[str, str]]:
    """Slot, GEMM or name of `nn.passing` -> (operation, the reason), for everything that another backend runs."""
    found: dict[str, tuple[str, str]] = {}
    for name, kernel in kernels.items():
        if kernel.backend == "cuda":
            continue
        slots = [slot for slot in SLOTS if slot.startswith(name)] if name in GEMMS else [name.partition(":")[0]]
        spec = next((spec for slot in slots if (spec := recipe.slot(slot)) is not None), None)
        asked = Request(kernel.op, bare(spec) if spec is not None else None, device)
        reason = explain(asked, config)["cuda"]
        found[name] = kernel.op, f"backend.kind is {config.kind}" if reason == "yes" else reason
    return found


def remarks(reasons: Iterable[Mapping[str, tuple[str, str]]]) -> list[str]:
    """One line for each reason in the linears' `why_not_cuda`, with the operations that it is about."""
    operations: dict[str, dict[str, None]] = {}
    for of_linear in reasons:
        for operation, reason in of_linear.values():
            operations.setdefault(reason, {})[operation] = None
    return [f"not in csrc/: {', '.join(ops)}: {reason}" for reason, ops in operations.items()]
