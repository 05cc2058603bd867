"""Why operations of a linear do not run in csrc/: said once for each reason, when a recipe is applied on a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from fp4dist.kernels.registry import Kernel, Op, Request, explain
from fp4dist.nn.passing import ABOUT_PARTS, PARTS, slot_of
from fp4dist.numerics.splits import bare
from fp4dist.spec.recipe import GEMMS, SLOTS, LinearRecipe
from fp4dist.spec.run import BackendConfig


def why_not_cuda(
    recipe: LinearRecipe, kernels: Mapping[str, Kernel], device: torch.device, config: BackendConfig
) -> dict[str, tuple[str, str]]:
    """Slot, GEMM or name of `nn.passing` -> (operation, the reason), for everything that another backend runs."""
    operations: dict[str, Op] = {name: kernel.op for name, kernel in kernels.items() if kernel.backend != "cuda"}
    operations |= {name: "decompose" for name in _in_torch(recipe, kernels)}
    found: dict[str, tuple[str, str]] = {}
    for name, op in operations.items():
        slots = [slot for slot in SLOTS if slot.startswith(name)] if name in GEMMS else [slot_of(name)]
        spec = next((spec for slot in slots if (spec := recipe.slot(slot)) is not None), None)
        whole = spec is None or op in ABOUT_PARTS
        reason = explain(Request(op, spec if whole else bare(spec), device), config)["cuda"]
        found[name] = op, f"backend.kind is {config.kind}" if reason == "yes" else reason
    return found


def _in_torch(recipe: LinearRecipe, kernels: Mapping[str, Kernel]) -> list[str]:
    """Names of the parts that no kernel takes out of an operand."""
    parted = {slot for slot in SLOTS if (spec := recipe.slot(slot)) is not None and spec.has_parts}
    return [PARTS[slot] for slot in SLOTS if slot in parted and PARTS[slot] not in kernels]


def remarks(reasons: Iterable[Mapping[str, tuple[str, str]]]) -> list[str]:
    """One line for each reason in the linears' `why_not_cuda`, with the operations that it is about."""
    operations: dict[str, dict[str, None]] = {}
    for of_linear in reasons:
        for operation, reason in of_linear.values():
            operations.setdefault(reason, {})[operation] = None
    return [f"not in csrc/: {', '.join(ops)}: {reason}" for reason, ops in operations.items()]
