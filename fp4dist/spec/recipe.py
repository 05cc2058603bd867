"""Recipes: three GEMMs, six operands, and which layer gets which of them.

A linear layer Y = X W^T with T tokens, I inputs, O outputs runs three GEMMs, each contracting the last dimension of
both operands:

    fprop   Y [T,O] = X  [T,I] (W  [O,I])^T
    dgrad   dX[T,I] = dY [T,O] (W^T[I,O])^T
    wgrad   dW[O,I] = dY^T[O,T] (X^T[I,T])^T

An operand without a QuantSpec stays in the model's own precision (bf16). Nothing here knows torch, devices or ranks.
"""

from __future__ import annotations

from dataclasses import field
from typing import Literal, get_args

from fp4dist.spec.frozen import frozen
from fp4dist.spec.operand import QuantSpec

HIGH_PRECISION = "bf16"  # the YAML word for "not quantized": the operand keeps the model's dtype
Role = Literal["qkv", "proj", "fc1", "fc2", "expert", "head", "embedding", "router"]
ROLES: tuple[str, ...] = get_args(Role)
BLOCK_ROLES = ("qkv", "proj", "fc1", "fc2", "expert")  # the linears inside transformer blocks


def _check_pair(gemm: str, names: str, a: QuantSpec | None, b: QuantSpec | None) -> None:
    """Both operands of a GEMM must live in the same rotated basis."""
    first, second = (s.rotation if s else None for s in (a, b))
    if first != second:
        raise ValueError(
            f"{gemm}: the operands {names} have different rotations ({first} and {second});"
            " a Hadamard cancels only when both operands of a GEMM share it"
        )
    if a and b and min(a.samples, b.samples) > 1:
        raise ValueError(
            f"{gemm}: both operands {names} average several samples, which would run {a.samples * b.samples} GEMMs;"
            " give samples to one of them"
        )


@frozen
class Fprop:
    """Y[T,O] = X[T,I] (W[O,I])^T."""

    x: QuantSpec | None = None
    w: QuantSpec | None = None

    def __post_init__(self) -> None:
        _check_pair("fprop", "x and w", self.x, self.w)
        for name, spec in (("x", self.x), ("w", self.w)):
            if spec is not None and spec.source != "master":
                raise ValueError(f"{name}.source = {spec.source}: a forward operand has only its master")
            if spec is not None and spec.samples > 1:
                raise ValueError(
                    f"{name} averages {spec.samples} samples: only a gradient's GEMM repeats; use samples: 1"
                )


@frozen
class Dgrad:
    """dX[T,I] = dY[T,O] (W^T[I,O])^T."""

    dy: QuantSpec | None = None
    w: QuantSpec | None = None

    def __post_init__(self) -> None:
        _check_pair("dgrad", "dy and w", self.dy, self.w)
        if self.dy is not None and self.dy.source != "master":
            raise ValueError(f"dy.source = {self.dy.source}: the incoming gradient has only its master")


@frozen
class Wgrad:
    """dW[O,I] = dY^T[O,T] (X^T[I,T])^T."""

    dy: QuantSpec | None = None
    x: QuantSpec | None = None

    def __post_init__(self) -> None:
        _check_pair("wgrad", "dy and x", self.dy, self.x)
        if self.dy is not None and self.dy.source != "master":
            raise ValueError(f"dy.source = {self.dy.source}: the incoming gradient has only its master")


SLOTS = ("fprop.x", "fprop.w", "dgrad.dy", "dgrad.w", "wgrad.dy", "wgrad.x")
GEMMS = ("fprop", "dgrad", "wgrad")


@frozen
class LinearRecipe:
    """Three GEMMs, six operands.

    A backward operand's source: `master` quantizes the high-precision tensor again, `requant` quantizes the dequantized
    forward codes (so only codes are kept between forward and backward), `reuse` reads the forward codes transposed.
    """

    fprop: Fprop = Fprop()
    dgrad: Dgrad = Dgrad()
    wgrad: Wgrad = Wgrad()

    def __post_init__(self) -> None:
        _check_source("dgrad.w", self.dgrad.w, self.fprop.w)
        _check_source("wgrad.x", self.wgrad.x, self.fprop.x)

    def slot(self, name: str) -> QuantSpec | None:
        """The spec of slot `name`, e.g. `wgrad.dy`."""
        gemm, operand = name.split(".")
        return getattr(getattr(self, gemm), operand)

    def gemm_is_fp4(self, gemm: str) -> bool:
        """Whether both operands of `gemm` have at most 4 bits, so that FP4 tensor cores run it where they exist."""
        specs = [self.slot(s) for s in SLOTS if s.startswith(gemm)]
        return all(spec is not None and spec.is_fp4 for spec in specs)

    def repeats(self, gemm: str) -> int:
        """How often `gemm` runs: once for each of an operand's samples."""
        return max(spec.samples if (spec := self.slot(s)) is not None else 1 for s in SLOTS if s.startswith(gemm))

    @property
    def is_high_precision(self) -> bool:
        """Whether no slot is quantized."""
        return all(self.slot(s) is None for s in SLOTS)


def _check_source(name: str, spec: QuantSpec | None, forward: QuantSpec | None) -> None:
    if spec is None or spec.source == "master":
        return
    if forward is None:
        raise ValueError(
            f"{name}.source = {spec.source} needs quantized forward codes, but the forward operand is bf16"
        )
    if spec.source == "requant":
        if forward.rotation is not None:
            raise ValueError(
                f"{name}.source = requant reads forward codes in the original basis, but the forward operand has"
                f" rotation = {forward.rotation}; use master, or no rotation in fprop"
            )
        return
    rows, cols = spec.shape
    if rows != cols or spec.rotation is not None:
        raise ValueError(
            f"{name}.source = reuse reads the forward codes transposed, which needs a square block without rotation;"
            f" block = {'row' if cols == 0 else [rows, cols]}, rotation = {spec.rotation}; use requant"
        )
    if spec.above not in ("none", "tensor"):
        raise ValueError(
            f"{name}.source = reuse reads the forward codes transposed, but outer = {spec.above} lies along one of"
            " their dimensions; use requant, or outer: tensor"
        )
    if _identity(spec) != _identity(forward):
        raise ValueError(
            f"{name}.source = reuse must repeat the forward operand's spec ({forward.label()}), got {spec.label()}"
        )


def _identity(spec: QuantSpec) -> tuple[object, ...]:
    """What decides the codes of a tensor."""
    return spec.format, spec.shape, spec.above, spec.rule, spec.rounding, spec.rotation, spec.amax_scope


@frozen
class Rule:
    """Which linears get which LinearRecipe. All given conditions must hold; the first matching rule of a recipe wins.

    roles    what the linear does (see `fp4dist.nn.sites`), the same words for Megatron, Hugging Face and plain models
    layers   global layer numbers [first, last], inclusive
    first    the first n layers (n >= 1) or that fraction of them, rounded up
    last     likewise from the end
    path     glob on the full module path, with global layer numbers
    """

    roles: tuple[Role, ...] | None = None
    layers: tuple[int, int] | None = None
    first: float | None = None
    last: float | None = None
    path: str | None = None
    linear: str

    def __post_init__(self) -> None:
        if self.roles is not None and not self.roles:
            raise ValueError("roles is empty and would match nothing")
        for name, n in (("first", self.first), ("last", self.last)):
            if n is not None and (n <= 0 or (n >= 1 and n != int(n))):
                raise ValueError(f"{name} = {n} must be a fraction below 1 or a whole number of layers")
        if sum(v is not None for v in (self.layers, self.first, self.last)) > 1:
            raise ValueError("give only one of layers, first, last")


@frozen
class Phase:
    """From some step on, linears follow another LinearRecipe: `use: {fp4: fp4_tail}`.

    Start: `last` = fraction of the run before its end, or `step` = absolute step. `enabled: false` keeps a published
    phase in the file without running it.
    """

    name: str
    use: dict[str, str]
    last: float | None = None
    step: int | None = None
    enabled: bool = True

    def __post_init__(self) -> None:
        if (self.last is None) == (self.step is None):
            raise ValueError(f"phase {self.name!r} needs exactly one of last, step")
        if self.last is not None and not 0 < self.last < 1:
            raise ValueError(f"last = {self.last} must be in (0, 1)")
        if self.step is not None and self.step < 0:
            raise ValueError(f"step = {self.step} must not be negative")
        if not self.use:
            raise ValueError(f"phase {self.name!r} changes nothing: use is empty")

    def start(self, total_steps: int) -> int:
        """First step of the phase in a run of `total_steps`."""
        return self.step if self.step is not None else round(total_steps * (1 - (self.last or 0.0)))


@frozen
class Recipe:
    """Where and when: named LinearRecipes, ordered rules, phases. A linear that no rule matches stays in bf16."""

    name: str
    paper: str = ""
    notes: str = ""
    linears: dict[str, LinearRecipe] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    phases: tuple[Phase, ...] = ()

    def __post_init__(self) -> None:
        if HIGH_PRECISION in self.linears:
            raise ValueError(f"linears.{HIGH_PRECISION}: this name is taken; it means high precision")
        used = [(f"rules[{i}].linear", r.linear) for i, r in enumerate(self.rules)]
        used += [(f"phases[{i}].use", n) for i, p in enumerate(self.phases) for pair in p.use.items() for n in pair]
        for place, name in used:
            if name != HIGH_PRECISION and name not in self.linears:
                raise ValueError(f"{place} = {name!r} is not one of {', '.join([*self.linears, HIGH_PRECISION])}")
        phases = [p.name for p in self.phases]
        if len(set(phases)) < len(phases):
            raise ValueError(f"phases: the names {', '.join(phases)} must differ")
        unused = set(self.linears) - {name for _, name in used}
        if unused:
            raise ValueError(f"linears.{min(unused)} is used by no rule and no phase")

    def linear(self, name: str) -> LinearRecipe:
        """The LinearRecipe called `name`; `bf16` is the one without quantizers."""
        return LinearRecipe() if name == HIGH_PRECISION else self.linears[name]

    def variants(self, name: str) -> list[LinearRecipe]:
        """The LinearRecipe called `name`, and those that enabled phases turn it into."""
        turned = [phase.use[name] for phase in self.phases if phase.enabled and name in phase.use]
        return [self.linear(n) for n in dict.fromkeys([name, *turned])]

    @property
    def wants_fp4(self) -> bool:
        """Whether any rule asks for quantized operands."""
        return any(not self.linear(rule.linear).is_high_precision for rule in self.rules)
