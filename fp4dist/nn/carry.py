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
from fp4dist.nn.parts import chosen_later, parted_slots
from fp4dist.numerics.matmul import Operand
from fp4dist.numerics.splits import bare
from fp4dist.numerics.tensor import CODES, BlockScaledTensor, Carrier, Want
from fp4dist.spec.estimators import Straight, TrustMask
from fp4dist.spec.formats import E2M1
from fp4dist.spec.operand import QuantSpec
from fp4dist.spec.recipe import GEMMS, SLOTS, LinearRecipe

FORWARD_OF = {"dgrad.w": "fprop.w", "wgrad.x": "fprop.x"}  # backward operands with forward codes
REMEMBERED = 8  # numbers that a quantizer keeps of a slot; see `Want.memory`
NARROW = (torch.float8_e5m2, torch.float8_e4m3fn)  # carriers that may not hold every value: they count what is lost
E5M2, E4M3, BF16 = *NARROW, torch.bfloat16
Types = tuple[torch.dtype, torch.dtype]
# The forms in which GEMMs multiply E2M1 under power-of-two scales, best first. cuBLASLt multiplies the first two alike
# and has no e5m2 x e5m2, which is for Triton. Neither factors of rows nor powers of two that one operand gives to the
# other for parts of K would help further. What e5m2 does not hold is a first token's gradient of its query, in truth
# zero, beside that of its value and beside other tokens' queries: after 160 steps of a small Llama dgrad.dy of qkv
# spanned 28 to 52 binades, and 27 to 50 within 128 columns, or 32.
LADDER: tuple[Types, ...] = ((E5M2, E4M3), (E4M3, E5M2), (E5M2, E5M2), (BF16, BF16))
# Binades from the smallest to the largest block scale of E2M1 that a type holds, with every level of the grid
OCTAVES = {E5M2: 28, E4M3: 14, BF16: 254}


@dataclass(slots=True)
class Carrying:
    """One linear's carriers.

    types      slot -> the type in which its GEMM multiplies it; a slot without one gives codes
    wants      slot -> what its quantizer is to give in a training pass, where that is not codes alone
    decoders   slot -> kernel that turns its codes into a carrier
    lost       slot -> [] int32 on the device, the most elements that one of its carriers has lost so far; empty where
               nobody reads it
    spreads    slot -> [2] int32 on the device, which binades its operands span (`Want.spread`); likewise
    laddered   GEMMs that take an FP8 form as long as it is exact (`LADDER`), in whatever form they are now
    """

    types: dict[str, torch.dtype] = field(default_factory=dict)
    wants: dict[str, Want] = field(default_factory=dict)
    decoders: dict[str, Kernel] = field(default_factory=dict)
    lost: dict[str, Tensor] = field(default_factory=dict)
    spreads: dict[str, Tensor] = field(default_factory=dict)
    laddered: tuple[str, ...] = ()

    def count_in(self, lost: Mapping[str, Tensor], spreads: Mapping[str, Tensor]) -> None:
        """Count in these tensors from now on: of those slots whose GEMMs may change their form."""
        slots = [slot for slot in self.types if slot.split(".")[0] in self.laddered]
        self.lost = {slot: lost[slot] for slot in slots if slot in lost}
        self.spreads = {slot: spreads[slot] for slot in slots if slot in spreads}
        for slot, want in self.wants.items():
            if want.carrier is not None:
                self.wants[slot] = want._replace(lost=self.lost.get(slot), spread=self.spreads.get(slot))

    def want(self, slot: str, training: bool) -> Want:
        """What the slot's quantizer gives now: without a backward pass nobody reads codes beside a carrier, and nobody
        counts what it has lost.
        """
        want = self.wants.get(slot, CODES)
        if training or want.carrier is None:
            return want
        return want._replace(codes=False, mask=False, lost=None, spread=None)

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
        if kind in NARROW and codes.format.scale.name == "fp32":  # half the bytes of a carrier to read, and no copy
            return self.decoders[slot](codes, kind, transposed=True)
        if carrier is None or carrier.values.dtype != kind:
            carrier = self.decoders[slot](codes, kind)
        self._see(slot, codes)
        if carrier.rows is not None or carrier.rotation != 1:
            raise ValueError(f"{slot}: a carrier with scales of rows, or rotated, cannot be read transposed")
        values = carrier.values.t()  # a GEMM of bf16 takes either layout, one of FP8 wants K to be contiguous
        return replace(carrier, values=values.contiguous() if kind in NARROW else values)

    def note(self, slot: str, operand: Operand, given: Operand) -> None:
        """Remember what the carrier that `slot` gives to its GEMM has lost, unless its quantizer has.

        operand   the carrier;  given   what it was made from, or the carrier itself
        """
        if slot not in self.lost or not isinstance(operand, Carrier):
            return
        total = self.lost[slot]
        if operand.lost is not None and operand.lost is not total:
            torch.maximum(total, operand.lost, out=total)
        if isinstance(given, BlockScaledTensor) and given.carrier is not operand:
            self._see(slot, given)

    def _see(self, slot: str, codes: BlockScaledTensor) -> None:
        """Which binades `codes` span, for a slot whose quantizer does not tell, while its GEMM waits to go back to FP8.

        Blocks with the smallest scale of all count as zeros.
        """
        total = self.spreads.get(slot)
        if total is None or self.types[slot] in NARROW or codes.format.scale.name != "e8m0":
            return
        bytes_ = codes.scales.to(torch.int32)
        some = (bytes_ > 0) & (bytes_ < 255)
        found = torch.stack((torch.where(some, bytes_, 0).amax(), torch.where(some, 256 - bytes_, 0).amax()))
        torch.maximum(total, found, out=total)

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


def words_of(types: Types) -> str:
    """For the log: bf16, e5m2 x e4m3fn ..."""
    words = ("bf16" if kind == BF16 else str(kind).removeprefix("torch.float8_") for kind in types)
    return "bf16" if types == (BF16, BF16) else " x ".join(words)


def form_of(kinds: Types, specs: Collection[QuantSpec | None], place: int) -> Types:
    """The types of a GEMM's carriers in form `place` of `LADDER`, where its kernel would rather multiply `kinds`."""
    if not place or not any(kind in NARROW for kind in kinds):
        return kinds
    shifts = all(s is not None and s.format.scale.name == "e8m0" and s.format.element == E2M1 for s in specs)
    return LADDER[place] if shifts else (BF16, BF16)


def resolve_carrying(
    recipe: LinearRecipe, kernels: Mapping[str, Kernel], device: torch.device, forms: Mapping[str, int] | None = None
) -> Carrying:
    """What the resolved `kernels` of slots and GEMMs can carry. forms: GEMM -> its form, a place in `LADDER`; None: the
    first, for all.
    """
    found, parted, later = Carrying(), parted_slots(recipe), chosen_later(recipe)
    read = _read_codes(recipe)
    for gemm in GEMMS:
        slots = [slot for slot in SLOTS if slot.startswith(gemm)]
        specs = [spec if spec is None or not spec.has_parts else bare(spec) for spec in map(recipe.slot, slots)]
        kernel = kernels.get(gemm)
        in_parts = parted & set(slots)  # carriers are for the time when both operands are codes alone
        if kernel is None or kernel.carrier_types is None or (in_parts and not set(slots) <= later):
            continue
        kinds = kernel.carrier_types(specs[0], specs[1], device)
        laddered = kinds is not None and any(kind in NARROW for kind in kinds)
        if kinds is not None and forms:
            kinds = form_of(kinds, specs, forms.get(gemm, 0))
        quantized = {slot: spec for slot, spec in zip(slots, specs, strict=True) if spec is not None}
        decoders = {slot: _decoder(spec, kernel, device) for slot, spec in quantized.items()}
        if kinds is None:
            continue
        if any(decoder is None for decoder in decoders.values()):
            continue
        found.laddered += (gemm,) * laddered
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
