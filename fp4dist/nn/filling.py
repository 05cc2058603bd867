"""Token counts that no block divides: a linear fills them up with zero tokens, where those change nothing.

A zero token changes no amax, adds exactly nothing to dW where tokens are not rotated (and nothing but rounding of the
others' rotation where they are), and is cut from Y and dX.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fp4dist.nn.comm import SLOT_DIMS, LinearComm
from fp4dist.spec.blocks import Quest, Sawb
from fp4dist.spec.recipe import SLOTS, LinearRecipe

FORWARD = tuple(slot for slot in SLOTS if slot.startswith("fprop"))


def token_multiple(recipe: LinearRecipe, slots: Sequence[str] = SLOTS) -> int:
    """What the number of tokens must be a multiple of for each of the recipe's `slots`."""
    needed = 1
    for slot in slots:
        spec = recipe.slot(slot)
        if spec is not None:
            sizes = (spec.rows_multiple, spec.columns_multiple)
            needed = math.lcm(needed, *(n for n, dim in zip(sizes, SLOT_DIMS[slot], strict=True) if dim == "T"))
    return needed


def why_not_filled(recipe: LinearRecipe) -> str | None:
    """Why zero tokens would change what the others become: they count in the moments of a row or tensor. Or None."""
    for slot in SLOTS:
        spec, dims = recipe.slot(slot), SLOT_DIMS[slot]
        if spec is None or not isinstance(spec.rule, (Quest, Sawb)):
            continue
        whole = [dim for dim, size in zip(dims, spec.shape, strict=True) if size == 0]
        if "T" in whole:
            return (
                f"{slot}: tokens would be filled up with zeros to a multiple of {token_multiple(recipe)}, and"
                f" {spec.label()} would take them into the moments of a whole {'row' if len(whole) == 1 else 'tensor'}"
            )
    return None


def may_fill(comm: LinearComm) -> bool:
    """Whether one rank has all tokens of its operand, so that the last ones may be zeros."""
    return comm.token_shard is None and comm.context[1] == 1
