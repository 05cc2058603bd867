"""Which tensor cores each GEMM runs on: from one word (`--precision`) or from a recipe's rules."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from fp4dist.cluster import emulation
from fp4dist.cluster.shapes import Block, Linear, Shape
from fp4dist.errors import ConfigError
from fp4dist.spec.cluster import Gpu, Precision
from fp4dist.spec.recipe import SLOTS, LinearRecipe, Recipe, Rule

# bytes of an element of a GEMM's operand, scales included
OPERAND_BYTES: dict[Precision, float] = {"bf16": 2.0, "fp8": 1.0, "mxfp8": 1 + 1 / 32, "nvfp4": 0.5 + 1 / 16}
# bytes that quantizing moves for each element, into rows and columns: fp8 with current scaling and nvfp4 read twice,
# for the amax and to cast
QUANTIZE_BYTES: dict[Precision, float] = {
    "bf16": 0.0,
    "fp8": 5.0,
    "mxfp8": 2 + 2 * (1 + 1 / 32),
    "nvfp4": 4 + 2 * 0.5625,
}
_EIGHT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemms:
    """The three GEMMs of one linear, as the device runs them.

    fprop, dgrad, wgrad   precision of the tensor cores
    quantized             (x, dy): the format that each is quantized into, `bf16` for none
    emulated              (x, dy): seconds an element where FP4 is emulated, else 0: time by bytes
    """

    fprop: Precision
    dgrad: Precision
    wgrad: Precision
    quantized: tuple[Precision, Precision]
    emulated: tuple[float, float] = (0.0, 0.0)

    @property
    def saved_bytes(self) -> float:
        """Bytes of x, per element, that backward keeps: codes where wgrad reads them, bf16 else."""
        codes = self.wgrad != "bf16" or self.emulated[0] > 0
        return OPERAND_BYTES[self.quantized[0]] if codes else 2.0


_HIGH = Gemms(fprop="bf16", dgrad="bf16", wgrad="bf16", quantized=("bf16", "bf16"))


@dataclass(frozen=True, eq=False)
class Policy:
    """Precision of every linear: one word, or a recipe's rules."""

    word: Precision | None
    recipe: Recipe | None
    layers: int
    gpu: Gpu

    def gemms(self, linear: Linear, layer: int) -> Gemms:
        """What `linear` of layer `layer` runs as here. Head and router stay in bf16 unless a recipe says not."""
        if self.word is not None:
            wanted: Precision = "bf16" if linear.role in ("head", "router") else self.word
            return _on(self.gpu, Gemms(fprop=wanted, dgrad=wanted, wgrad=wanted, quantized=(wanted, wanted)))
        if self.recipe is None:
            return _HIGH
        return _on(self.gpu, _of_recipe(self.recipe, linear.role, layer, self.layers, native=self.gpu.peak.fp4 > 0))

    @property
    def wire(self) -> Precision:
        """The narrowest format in use, which names what parameters could be gathered in."""
        if self.word is not None:
            return self.word
        return "nvfp4" if self.recipe is not None and self.recipe.wants_fp4 else "bf16"


@dataclass(frozen=True, slots=True)
class Kind:
    """Layers that cost the same: `number` is the first of them."""

    layer: tuple[Block, ...]
    number: int
    count: int


@lru_cache(maxsize=512)
def kinds(shape: Shape, rules: Policy) -> tuple[Kind, ...]:
    """The different layers of a model under a policy, and how many there are of each."""
    found: dict[object, list[int]] = {}
    for n, layer in enumerate(shape.layers):
        gemms = tuple(rules.gemms(linear, n) for block in layer for linear in block.linears)
        found.setdefault((tuple(block.kind for block in layer), gemms), []).append(n)
    return tuple(Kind(shape.layers[at[0]], at[0], len(at)) for at in found.values())


def policy(precision: Precision | None, recipe: Recipe | None, layers: int, gpu: Gpu) -> Policy:
    """One of the two must be given."""
    if (precision is None) == (recipe is None):
        raise ConfigError("give either a precision (bf16, fp8, mxfp8, nvfp4) or a recipe")
    return _of_word(precision, layers, gpu) if precision else Policy(None, recipe, layers, gpu)


@lru_cache(maxsize=512)
def _of_word(precision: Precision, layers: int, gpu: Gpu) -> Policy:
    return Policy(precision, None, layers, gpu)


def _on(gpu: Gpu, gemms: Gemms) -> Gemms:
    """What the device does for what is wanted: without FP4 tensor cores, bf16 carriers of the codes; and so on."""

    def run(p: Precision) -> Precision:
        if p == "nvfp4" and not gpu.peak.fp4:
            return "bf16"
        if p in ("fp8", "mxfp8") and not gpu.peak.fp8:
            return "bf16"
        return "fp8" if p == "mxfp8" and gpu.family == "hopper" else p

    emulated = gemms.emulated
    if not gpu.peak.fp4 and gemms.quantized == ("nvfp4", "nvfp4") and not any(emulated):
        emulated = emulation.OF_A_WORD
    return Gemms(
        fprop=run(gemms.fprop),
        dgrad=run(gemms.dgrad),
        wgrad=run(gemms.wgrad),
        quantized=gemms.quantized,
        emulated=emulated,
    )


def _of_recipe(recipe: Recipe, role: str, layer: int, layers: int, *, native: bool) -> Gemms:
    """What the rules say; without FP4 tensor cores (`native`), FP8 ones multiply what FP8 can carry."""
    rule = next((r for r in recipe.rules if _matches(r, role, layer, layers)), None)
    if rule is None:
        return _HIGH
    linear = recipe.linear(rule.linear)
    x, dy = _operand(linear, "fprop.x"), _operand(linear, "dgrad.dy")
    times = emulation.seconds(linear, "fprop.x", "wgrad.x"), emulation.seconds(linear, "dgrad.dy", "wgrad.dy")
    return Gemms(
        fprop=_gemm(linear, "fprop", native),
        dgrad=_gemm(linear, "dgrad", native),
        wgrad=_gemm(linear, "wgrad", native),
        quantized=(x, dy),
        emulated=(0.0, 0.0) if native else times,
    )


def _matches(rule: Rule, role: str, layer: int, layers: int) -> bool:
    """Roles and layers; a path pattern is taken to hold, since the planner has no modules."""
    if rule.roles is not None and role not in rule.roles:
        return False
    if rule.roles is None and role in ("head", "router") and rule.path is None:
        return False
    if rule.layers is not None:
        return rule.layers[0] <= layer <= rule.layers[1]
    if rule.first is not None:
        return layer < _count(rule.first, layers)
    if rule.last is not None:
        return layer >= layers - _count(rule.last, layers)
    return True


def _count(part: float, layers: int) -> int:
    return ceil(part * layers) if part < 1 else int(part)


def _gemm(linear: LinearRecipe, gemm: str, native: bool) -> Precision:
    slots = tuple(s for s in SLOTS if s.startswith(gemm))
    specs = [linear.slot(s) for s in slots]
    if linear.gemm_is_fp4(gemm):
        return "fp8" if not native and emulation.powers_of_two(linear, slots) else "nvfp4"
    narrow = [spec is not None and spec.format.element.bits <= _EIGHT for spec in specs]
    return "mxfp8" if all(narrow) else "bf16"


def _operand(linear: LinearRecipe, slot: str) -> Precision:
    spec = linear.slot(slot)
    if spec is None:
        return "bf16"
    return "nvfp4" if spec.is_fp4 else "mxfp8"
