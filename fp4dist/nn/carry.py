"""Carriers in a linear: which GEMM multiplies which type, which quantizer writes it, and what did not fit.

Tensor cores without FP4 multiply a quantized operand in a wider type that holds its values exactly. A backend that can
write those values itself spares a pass over the codes; codes are then written only where somebody reads them: kept
between forward and backward, gathered, looked at by an estimator. All of this is decided when the recipe is applied.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fp4dist.kernels.registry import Kernel, Request, companion
from fp4dist.nn.parts import parted_slots
from fp4dist.numerics.matmul import Operand
from fp4dist.numerics.tensor import CODES, BlockScaledTensor, Carrier, Want
from fp4dist.spec.estimators import Straight, TrustMask
from fp4dist.spec.operand import QuantSpec
from fp4dist.spec.recipe import GEMMS, SLOTS, LinearRecipe

FORWARD_OF = {"dgrad.w": "fprop.w", "wgrad.x": "fprop.x"}  # backward operands with forward codes
REMEMBERED = 8  # numbers that a quantizer keeps of a slot; see `Want.memory`
NARROW = (torch.float8_e5m2, torch.float8_e4m3fn)  # carriers that may not hold every value: they count what is lost


@dataclass(slots=True)
class Carrying:
    """One linear's carriers.

    types      slot -> the type in which its GEMM multiplies it; a slot without one gives codes
    wants      slot -> what its quantizer is to give, where that is not codes alone
    decoders   slot -> kernel that turns its codes into a carrier
    lost       slot -> [] int32 on the device, the most elements that one of its carriers has lost so far; empty where
               nobody reads it
    """

    types: dict[str, torch.dtype] = field(default_factory=dict)
    wants: dict[str, Want] = field(default_factory=dict)
    decoders: dict[str, Kernel] = field(default_factory=dict)
    lost: dict[str, Tensor] = field(default_factory=dict)

    def want(self, slot: str, training: bool) -> Want:
        """What the slot's quantizer gives now: without a backward pass nobody reads codes beside a carrier, and nobody
        counts what it has lost.
        """
        want = self.wants.get(slot, CODES)
        if want.carrier is None:
            return want
        return want._replace(lost=self.lost.get(slot)) if training else want._replace(codes=False, mask=False)

    def of(self, slot: str, operand: Operand) -> Operand:
        """The operand as its GEMM takes it: its carrier, where the GEMM has a type."""
        kind = self.types.get(slot)
        if kind is None or not isinstance(operand, BlockScaledTensor):
            return operand
        if operand.carrier is not None and operand.carrier.values.dtype == kind:
            return operand.carrier
        return self.decoders[slot](operand, kind)

    def with_carrier(self, slot: str, operand: Operand) -> Operand:
        """Codes with their carrier at their side, where the slot's GEMM multiplies one: for codes that are kept."""
        found = self.of(slot, operand)
        if not isinstance(operand, BlockScaledTensor) or not isinstance(found, Carrier):
            return operand
        return operand if operand.carrier is found else replace(operand, carrier=found)

    def turned(self, slot: str, codes: BlockScaledTensor) -> Carrier:
        """The carrier of the transpose of `codes` (square blocks, no rotation), which backward `slot` reuses."""
        kind, carrier = self.types[slot], codes.carrier
        if carrier is None or carrier.values.dtype != kind:
            carrier = self.decoders[slot](codes, kind)
        if carrier.rows is not None or carrier.rotation != 1:
            raise ValueError(f"{slot}: a carrier with scales of rows, or rotated, cannot be read transposed")
        values = carrier.values.t()  # a GEMM of bf16 takes either layout, one of FP8 wants K to be contiguous
        return replace(carrier, values=values.contiguous() if kind in NARROW else values)

    def note(self, slot: str, operand: Operand) -> None:
        """Remember what the carrier that `slot` gives to its GEMM has lost, unless its quantizer has."""
        if isinstance(operand, Carrier) and operand.lost is not None and slot in self.lost:
            total = self.lost[slot]
            if operand.lost is not total:
                torch.maximum(total, operand.lost, out=total)

    def words(self) -> dict[str, str]:
        """GEMM -> the types of its carriers, for tables: bfloat16, e5m2 x e4m3fn ..."""
        kinds: dict[str, dict[str, None]] = {}
        for slot, kind in self.types.items():
            word = str(kind).removeprefix("torch.").removeprefix("float8_")
            kinds.setdefault(slot.split(".")[0], {})[word] = None
        return {gemm: " x ".join(words) for gemm, words in kinds.items()}

    @property
    def narrow(self) -> tuple[str, ...]:
        """The GEMMs whose carriers may lose elements."""
        return tuple(dict.fromkeys(slot.split(".")[0] for slot, kind in self.types.items() if kind in NARROW))


def resolve_carrying(
    recipe: LinearRecipe, kernels: Mapping[str, Kernel], device: torch.device, in_bf16: Collection[str] = ()
) -> Carrying:
    """What the resolved `kernels` of slots and GEMMs can carry. in_bf16: GEMMs that no FP8 carrier may serve."""
    found, parted = Carrying(), parted_slots(recipe)
    read = _read_codes(recipe)
    for gemm in GEMMS:
        slots = [slot for slot in SLOTS if slot.startswith(gemm)]
        specs = [recipe.slot(slot) for slot in slots]
        kernel = kernels.get(gemm)
        if kernel is None or kernel.carrier_types is None or parted & set(slots):
            continue
        kinds = kernel.carrier_types(specs[0], specs[1], device)
        if kinds is not None and gemm in in_bf16:
            kinds = (torch.bfloat16, torch.bfloat16)
        quantized = {slot: spec for slot, spec in zip(slots, specs, strict=True) if spec is not None}
        decoders = {slot: _decoder(spec, kernel, device) for slot, spec in quantized.items()}
        if kinds is None or any(spec.samples > 1 for spec in quantized.values()):
            continue
        if any(decoder is None for decoder in decoders.values()):
            continue
        for slot, kind in zip(slots, kinds, strict=True):
            decoder = decoders.get(slot)
            if decoder is None:
                continue
            found.types[slot], found.decoders[slot] = kind, decoder
            if slot in kernels and kernels[slot].carries:
                memory = torch.zeros(REMEMBERED, dtype=torch.int32, device=device) if kind in NARROW else None
                masked = slot in read and isinstance(quantized[slot].estimator, TrustMask)
                found.wants[slot] = Want(slot in read, kind, masked, memory)
    return found


def _decoder(spec: QuantSpec, matmul: Kernel, device: torch.device) -> Kernel | None:
    return companion(Request("to_carrier", spec, device), matmul.backend)


def _read_codes(recipe: LinearRecipe) -> set[str]:
    """The forward slots whose codes are kept for backward, or looked at by an estimator."""
    kept = {forward for slot, forward in FORWARD_OF.items() if recipe.reads_codes(slot)}
    specs = {slot: recipe.slot(slot) for slot in FORWARD_OF.values()}
    return kept | {slot for slot, spec in specs.items() if spec and not isinstance(spec.estimator, Straight)}
