"""Kernels that a linear can do without, where a backend has them: torch has the same bits in many passes over memory.

Gradients through quantizers with a trust mask (`lsq` and operands in parts run in torch), slopes of `dge`, forward
codes turned back from their rotated basis, and what is taken out of an operand.
"""

from __future__ import annotations

import torch

from fp4dist.kernels.registry import Backend, Kernel, Op, Request, auto_order, companion
from fp4dist.nn.carry import FORWARD_OF
from fp4dist.nn.parts import parted_slots
from fp4dist.numerics.splits import bare
from fp4dist.spec.operand import QuantSpec
from fp4dist.spec.recipe import SLOTS, LinearRecipe
from fp4dist.spec.run import BackendConfig

# Names in `LinearPlan.kernels`. ORIGINAL: of the backward slot that starts from forward codes.
MASK_X, FILTER_X, FILTER_W = "fprop.x:mask", "fprop.x:filter", "fprop.w:filter"
SLOPES = {"fprop.x": "fprop.x:slope", "fprop.w": "fprop.w:slope"}
FILTER_W_BITS = "fprop.w:bits"
ORIGINAL = {"dgrad.w": "dgrad.w:original", "wgrad.x": "wgrad.x:original"}
PARTS = {slot: f"{slot}:parts" for slot in SLOTS}
# Of chosen channels: the weight's, the rounding error of x, and what both operands of wgrad have beside their codes.
TAKEN_W, RESIDUAL, PRECISION = "fprop.w:taken", "fprop.x:residual", "wgrad.x:precision"
# About what stands beside codes, or the slope of their estimator.
ABOUT_PARTS: tuple[Op, ...] = ("decompose", "slope", "take_channels", "in_precision", "hot_residual")
# Name -> the slot whose codes it is about, and the operation.
_OPERATIONS: dict[str, tuple[str, Op]] = {
    MASK_X: ("fprop.x", "mask"),
    FILTER_X: ("fprop.x", "filter_by_mask"),
    FILTER_W: ("fprop.w", "filter_by_scales"),
    FILTER_W_BITS: ("fprop.w", "filter_by_mask"),
    ORIGINAL["dgrad.w"]: ("fprop.w", "original"),
    ORIGINAL["wgrad.x"]: ("fprop.x", "original"),
    **{name: (slot, "slope") for slot, name in SLOPES.items()},
    **{name: (slot, "decompose") for slot, name in PARTS.items()},
    TAKEN_W: ("fprop.x", "take_channels"),
    RESIDUAL: ("fprop.x", "hot_residual"),
    PRECISION: ("wgrad.x", "in_precision"),
}


def slot_of(name: str) -> str:
    """The slot whose spec says which kernel `name` of `LinearPlan.kernels` is."""
    return _OPERATIONS[name][0] if name in _OPERATIONS else name.partition(":")[0]


def passing_kernels(recipe: LinearRecipe, device: torch.device, config: BackendConfig) -> dict[str, Kernel]:
    """Name -> kernel, where a backend of `config` other than the reference takes the spec and the linear has use."""
    wanted: tuple[Backend, ...] = auto_order(device) if config.kind == "auto" else (config.kind,)
    backends: list[Backend] = [b for b in wanted if b != "reference"]  # which is what runs in torch
    unused = {name for slot, name in ORIGINAL.items() if not _needs_original(recipe, slot)}
    found: dict[str, Kernel] = {}
    for name, (slot, op) in _OPERATIONS.items():
        spec = recipe.slot(slot)
        if spec is None or name in unused:
            continue
        kernels = (companion(Request(op, spec, device), backend) for backend in _candidates(op, spec, device, backends))
        kernel = next((kernel for kernel in kernels if kernel is not None), None)
        if kernel is not None:
            found[name] = kernel
    return found


def _candidates(op: Op, spec: QuantSpec, device: torch.device, backends: list[Backend]) -> list[Backend]:
    """`backends`; for ABOUT_PARTS the one that makes the codes: kernels come from one place."""
    if op not in ABOUT_PARTS:
        return backends
    request = Request("quantize", bare(spec), device)
    found: list[Backend] = [b for b in backends if companion(request, b) is not None]
    return found[:1]


def _needs_original(recipe: LinearRecipe, slot: str) -> bool:
    """Whether backward `slot` may start from the values of forward codes that are rotated, or stand beside parts."""
    forward, spec = recipe.slot(FORWARD_OF[slot]), recipe.slot(slot)
    rotated = forward is not None and forward.rotation is not None
    if recipe.dequantized(slot):
        return rotated
    beside = bool(parted_slots(recipe) & {slot, FORWARD_OF[slot]})
    return spec is not None and spec.source == "requant" and (rotated or beside)
