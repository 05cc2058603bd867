"""Operands in parts at run time: what an operand's parts depend on within its linear, and what they cost.

mean, lowrank, occ, topk   the operand's own matter
channels                   fprop.x chooses; fprop.w and wgrad.x take out the same channels, and in wgrad those of x
                           meet dY in the channels' precision instead of its codes
hot_residual               fprop.x's rounding error in the chosen channels meets W as it was before quantization
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fp4dist.nn.comm import SLOT_DIMS
from fp4dist.nn.controllers import chosen_columns
from fp4dist.numerics.splits import Parts, Place, beyond, decompose, hot_residual, in_precision, take_channels
from fp4dist.numerics.tensor import BlockScaledTensor, Chosen, PartedTensor
from fp4dist.spec.recipe import GEMMS, SLOTS, LinearRecipe, QuantSpec
from fp4dist.spec.splits import Channels, HotResidual, LowRank, Mean, Occ, Precision, TopK

MANY_TOKENS = 2**20
_REUSED = {"dgrad.w": "fprop.w", "wgrad.x": "fprop.x"}  # slots that may read the forward operand of another


def parted_slots(recipe: LinearRecipe) -> frozenset[str]:
    """The slots whose operand is more than codes."""
    found = {slot for slot in SLOTS if (spec := recipe.slot(slot)) is not None and spec.has_parts}
    found |= {slot for slot in ("fprop.w", "wgrad.dy") if recipe.slot(slot) is not None and _chooser(recipe, slot)}
    for slot, source in _REUSED.items():
        spec = recipe.slot(slot)
        if spec is not None and spec.source == "reuse" and source in found and not _meets_alone(recipe, source):
            found.add(slot)
    return frozenset(found)


def chosen_later(recipe: LinearRecipe) -> frozenset[str]:
    """Those of `parted_slots` whose operand is codes alone as long as no channels are chosen."""
    return frozenset(slot for slot in parted_slots(recipe) if all(_waits(s) for s in _specs_of(recipe, slot)))


def _specs_of(recipe: LinearRecipe, slot: str) -> list[QuantSpec]:
    """The slot's spec, and that of the forward operand whose codes it reuses."""
    spec = recipe.slot(slot)
    reused = recipe.slot(_REUSED[slot]) if spec is not None and spec.source == "reuse" else None
    return [s for s in (spec, reused) if s is not None]


def _meets_alone(recipe: LinearRecipe, slot: str) -> bool:
    """Whether a partner alone stands beside the slot's codes: it is for that slot's GEMM, not for who reuses them."""
    spec = recipe.slot(slot)
    return spec is not None and not spec.has_parts and isinstance(_chooser(recipe, slot), HotResidual)


def _waits(spec: QuantSpec) -> bool:
    return spec.split is None and (spec.outlier is None or isinstance(spec.outlier, Channels | HotResidual))


def _chooser(recipe: LinearRecipe, slot: str) -> Channels | HotResidual | None:
    """The choice of channels in the other operand of the slot's GEMM."""
    other = {"fprop.w": "fprop.x", "wgrad.dy": "wgrad.x"}.get(slot)
    spec = recipe.slot(other) if other is not None else None
    return spec.outlier if spec is not None and isinstance(spec.outlier, Channels | HotResidual) else None


def alone_beside_codes(recipe: LinearRecipe) -> bool:
    """Whether wgrad.x starts from codes of fprop.x that are zero in the channels that both have beside their codes."""
    x, again = recipe.slot("fprop.x"), recipe.slot("wgrad.x")
    if x is None or again is None or again.source != "requant" or x.rotation is not None:
        return False
    both = all(isinstance(spec.outlier, Channels) and spec.split is None for spec in (x, again))
    return both and x.samples == 1 and 0.0 in x.format.element.levels


def meets_straight(recipe: LinearRecipe, slot: str) -> bool:
    """Whether the slot's side meets nothing but a partner, or its partner a side: both may then stay unrotated."""
    dy, x = recipe.slot("wgrad.dy"), recipe.slot("wgrad.x")
    if slot not in ("wgrad.dy", "wgrad.x") or dy is None or x is None or dy.has_parts:
        return False
    return isinstance(x.outlier, Channels) and x.split is None


def token_dim(slot: str) -> int | None:
    """0 or 1: the dimension of the tokens in the slot's operand; None for weights."""
    dims = SLOT_DIMS[slot]
    return dims.index("T") if "T" in dims else None


def channel_dim(slot: str) -> int:
    """0 or 1: the dimension of the input channels; 1 where there is none."""
    dims = SLOT_DIMS[slot]
    return dims.index("I") if "I" in dims else 1


class Ways(NamedTuple):
    """How parts are made: by the reference's functions, or by kernels of the same operations."""

    decompose: Callable[[Tensor, QuantSpec, Place], Parts] = decompose
    take_channels: Callable[[Tensor, Precision, Place], Parts] = take_channels
    in_precision: Callable[[Tensor, Precision, torch.dtype, Place], Tensor] = in_precision
    hot_residual: Callable[[Tensor, BlockScaledTensor, QuantSpec, torch.dtype, Place], Tensor] = hot_residual


REFERENCE = Ways()


@dataclass(frozen=True, slots=True)
class Taken:
    """One operand while it is quantized: its rest, what stands beside the codes, what its partner meets, and where."""

    parts: Parts
    partner: Tensor | None
    residual: bool
    chosen: Chosen | None = None
    ways: Ways = REFERENCE

    def beside(self, main: BlockScaledTensor, spec: QuantSpec, dtype: torch.dtype, place: Place) -> Tensor | None:
        """[R, C] the side, with the rounding error of `main` in the chosen channels where the spec asks for it."""
        if not self.residual:
            return self.parts.side
        error = self.ways.hot_residual(self.parts.rest, main, spec, dtype, place)
        return error if self.parts.side is None else self.parts.side.to(torch.float32) + error


@torch.no_grad()
def take_out(
    slot: str, x: Tensor, spec: QuantSpec, recipe: LinearRecipe, place: Place, ways: Ways = REFERENCE
) -> Taken:  # fmt: skip
    """Take out of the slot's operand [R, C] what its spec and the other operand's choice of channels name."""
    chooser, chosen = _chooser(recipe, slot), place.chosen
    partner, inherited = None, None
    if chosen is not None and isinstance(chooser, Channels):
        if slot == "fprop.w":
            taken = ways.take_channels(x, chooser.precision, place)
            x, inherited = taken.rest, taken.side
        else:
            partner = ways.in_precision(x, chooser.precision, x.dtype, place)
    elif chosen is not None and isinstance(chooser, HotResidual):
        partner = torch.where(chosen, x, 0.0)
    parts = ways.decompose(x, spec, place)
    if inherited is not None:
        parts = Parts(parts.rest, inherited if parts.side is None else parts.side.to(torch.float32) + inherited)
    residual = isinstance(spec.outlier, HotResidual) and chosen is not None
    return Taken(parts, partner, residual, _where(slot, spec, chooser, place), ways)


@torch.no_grad()
def take_again(forward: PartedTensor, spec: QuantSpec, place: Place, ways: Ways) -> tuple[Tensor, Chosen | None]:
    """([I, T] what stands beside the codes of wgrad.x, and where) of a forward operand [T, I] beside whose codes chosen
    channels alone stand.
    """
    assert isinstance(spec.outlier, Channels)
    assert forward.side is not None
    kept = forward.chosen if forward.chosen is not None and forward.chosen.alone else None
    side = ways.in_precision(forward.side.t(), spec.outlier.precision, forward.side.dtype, place)
    if kept is not None:
        whole = side.new_zeros(forward.shape[1], forward.shape[0])
        side = whole.index_copy_(0, kept.numbers, side)
    return side, _where("wgrad.x", spec, None, place)


def _where(slot: str, spec: QuantSpec, chooser: Channels | HotResidual | None, place: Place) -> Chosen | None:
    """The chosen channels, where nothing else is taken out of an operand that has them."""
    alone = (
        "I" in SLOT_DIMS[slot]
        and spec.split is None
        and (spec.outlier is None or isinstance(spec.outlier, Channels | HotResidual))
    )
    if place.index is None or not alone:
        return None
    moved = isinstance(spec.outlier, Channels) or (spec.outlier is None and isinstance(chooser, Channels))
    return Chosen(place.index, place.channel_dim, moved and 0.0 in spec.format.element.levels)


class Cost(NamedTuple):
    """FLOPs of one GEMM of 2 m n k: what remains for the codes, and what is multiplied beside them."""

    main: int
    side: int


def cost(recipe: LinearRecipe, gemm: str, m: int, n: int, k: int, channels_chosen: bool = True) -> Cost:
    """What one GEMM [m, k] x [n, k] of `recipe` costs at the true size of its parts, not at that of dense zeros.

    A part of rank r takes 2 r n (k + m) more, or 2 r m (k + n) in the second operand; a sparse one 2 m n k times its
    share of elements. Chosen channels leave the codes' GEMM.
    """
    full, side, moved = 2 * m * n * k, 0.0, 0.0
    for slot, rows, others in zip((s for s in SLOTS if s.startswith(gemm)), (m, n), (n, m), strict=True):
        spec = _parts_of(recipe, slot)
        if spec is None:
            continue
        if isinstance(spec.split, Mean | LowRank):
            rank = spec.split.rank if isinstance(spec.split, LowRank) else 1
            side += 2 * rank * others * (k + rows)
        share = _share(spec, rows, k)
        if isinstance(spec.outlier, Channels | HotResidual):
            inputs = rows if channel_dim(slot) == 0 else k
            share = chosen_columns(spec.outlier, inputs) / inputs if channels_chosen else 0.0
            moved = share if isinstance(spec.outlier, Channels) else 0.0
        side += share * full
    return Cost(full - round(moved * full), round(side))


def _parts_of(recipe: LinearRecipe, slot: str) -> QuantSpec | None:
    """The spec that says which parts the slot's operand has: of reused codes that of the forward operand."""
    spec = recipe.slot(slot)
    if spec is None or spec.source != "reuse":
        return spec
    forward, chooser = recipe.slot(_REUSED[slot]), _chooser(recipe, _REUSED[slot])
    return replace(forward, outlier=chooser) if forward is not None and isinstance(chooser, Channels) else forward


def _share(spec: QuantSpec, rows: int, columns: int) -> float:
    """Share of elements that a sparse part takes out."""
    if isinstance(spec.outlier, TopK):
        return spec.outlier.k / spec.outlier.group
    if not isinstance(spec.outlier, Occ) or not spec.outlier.compensate:
        return 0.0
    count = columns if spec.outlier.per == "row" else rows * columns
    return 2 * beyond(count, spec.outlier.alpha) / count


def costs(recipe: LinearRecipe, outputs: int, inputs: int) -> dict[str, Cost]:
    """GEMM -> its cost for so many tokens that they outnumber the ranks of all parts."""
    sizes = {
        "fprop": (MANY_TOKENS, outputs, inputs),
        "dgrad": (MANY_TOKENS, inputs, outputs),
        "wgrad": (outputs, inputs, MANY_TOKENS),
    }
    return {gemm: cost(recipe, gemm, *sizes[gemm]) for gemm in GEMMS}
