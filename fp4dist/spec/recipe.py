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
from fractions import Fraction
from typing import ClassVar, Literal, get_args

from fp4dist.spec.blocks import (
    E4M3_NO_CLIP,
    FLOOR_NO_CLIP,
    AbsMax,
    Ceil,
    Eden,
    Floor,
    FourOverSix,
    Hadamard,
    Nearest,
    Rounding,
    ScaleRule,
    Stochastic,
)
from fp4dist.spec.formats import Format
from fp4dist.spec.frozen import frozen

HIGH_PRECISION = "bf16"  # the YAML word for "not quantized": the operand keeps the model's dtype
Role = Literal["qkv", "proj", "fc1", "fc2", "expert", "head", "embedding", "router"]
ROLES: tuple[str, ...] = get_args(Role)
BLOCK_ROLES = ("qkv", "proj", "fc1", "fc2", "expert")  # the linears inside transformer blocks


@frozen
class QuantSpec:
    """How one operand becomes a block-scaled tensor."""

    SHORTHAND: ClassVar[str] = "format"  # `x: nvfp4` means `x: {format: nvfp4}`

    format: Format
    block: tuple[int, int] | None = None  # default: the format's own block
    scale: ScaleRule | None = None  # default: AbsMax for E4M3 scales, Floor for E8M0 scales
    rounding: Rounding = Nearest()
    rotation: Hadamard | None = None
    source: Literal["master", "requant", "reuse"] = "master"  # of a backward operand; see LinearRecipe
    allow_bias: bool = False  # stochastic rounding under a rule that clips, for parity with a paper

    def __post_init__(self) -> None:
        _check_scale_rule(self)
        _check_unbiased(self)
        rows, cols = self.shape
        if rows not in (1, cols) or cols < 2 or cols & (cols - 1):
            raise ValueError(f"block = {[rows, cols]} must be [1, n] or square, with n a power of two")
        if self.rotation is not None and self.rotation.size % cols:
            raise ValueError(f"rotation.size = {self.rotation.size} is not a multiple of the block's {cols} columns")

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        return self.block or self.format.block

    @property
    def rule(self) -> ScaleRule:
        """The scale rule, default filled in."""
        if self.scale is not None:
            return self.scale
        return AbsMax() if self.format.scale.name == "e4m3" else Floor()

    @property
    def draws_noise(self) -> bool:
        """Whether quantizing needs a Philox key for rounding."""
        return not isinstance(self.rounding, Nearest)

    @property
    def is_deterministic(self) -> bool:
        """Whether the codes depend on the tensor alone, neither on noise nor on fresh signs."""
        return not self.draws_noise and (self.rotation is None or self.rotation.signs != "fresh")

    @property
    def columns_multiple(self) -> int:
        """What the contracted dimension must be a multiple of (8 elements share one draw of noise)."""
        noise = 8 if isinstance(self.rounding, Stochastic) else 1
        return max(self.shape[1], self.rotation.size if self.rotation else 1, noise)

    def label(self) -> str:
        """A short text for tables: `nvfp4 1x16 17/16 sr rht16` (headroom 17/16, stochastic, 16-wide rotation)."""
        words = [self.format.name, f"{self.shape[0]}x{self.shape[1]}", *_rule_words(self.rule), *_rounding_words(self)]
        if self.rotation:
            words.append(
                {"none": "had", "fixed": "rht", "fresh": "rht*"}[self.rotation.signs] + str(self.rotation.size)
            )
        if self.source != "master":
            words.append(self.source)
        return " ".join(words)


def _rule_words(rule: ScaleRule) -> list[str]:
    if isinstance(rule, Ceil):
        return ["ceil"]
    words = []
    if isinstance(rule, FourOverSix):
        words.append("4/6" if rule.metric == "mse" else f"4/6({rule.metric})")
    if rule.headroom != 1:
        near = Fraction(rule.headroom).limit_denominator(16)
        words.append(str(near) if float(near) == rule.headroom else f"{rule.headroom:.4g}")
    if not isinstance(rule, Floor) and rule.budget != type(rule)().budget:
        words.append(f"max{rule.budget:g}")
    return words


def _rounding_words(spec: QuantSpec) -> list[str]:
    if isinstance(spec.rounding, Stochastic):
        return ["sr"]
    if isinstance(spec.rounding, Eden):
        return ["eden" if spec.rounding.align == "post_hoc" else "eden(pre)"]
    return []


def _check_scale_rule(spec: QuantSpec) -> None:
    e4m3 = spec.format.scale.name == "e4m3"
    if e4m3 != isinstance(spec.rule, (AbsMax, FourOverSix)):
        fitting = "absmax, four_over_six" if e4m3 else "floor, ceil"
        raise ValueError(
            f"scale rule {spec.rule.kind} does not fit {spec.format.scale.name} scales of {spec.format.name};"
            f" use one of {fitting}"
        )
    if isinstance(spec.rounding, Eden):
        if not e4m3:
            raise ValueError("eden rounds the block scale stochastically in E4M3: it needs format nvfp4")
        if spec.scale is not None:
            raise ValueError("eden chooses its own block scale; leave `scale` out (its headroom and budget are eden's)")
        if spec.shape[0] != 1:
            raise ValueError(f"eden corrects 1xN blocks; block = {list(spec.shape)}")


def _check_unbiased(spec: QuantSpec) -> None:
    if spec.allow_bias:
        return
    fresh = spec.rotation is not None and spec.rotation.signs == "fresh"
    if isinstance(spec.rounding, Eden) and not fresh:
        raise ValueError(
            "eden is unbiased only under a fresh rotation: without one its error never averages out;"
            " set rotation: {size: 128, signs: fresh}, or allow_bias: true for parity with a paper"
        )
    if not isinstance(spec.rounding, Stochastic):
        return
    rule = spec.rule
    if isinstance(rule, FourOverSix):
        raise ValueError(
            "stochastic rounding with four_over_six is biased: the choice of the scale follows the noise;"
            " use nearest, or allow_bias: true for parity with a paper"
        )
    needed = FLOOR_NO_CLIP if isinstance(rule, Floor) else E4M3_NO_CLIP
    if not isinstance(rule, Ceil) and rule.headroom < needed - 1e-12:
        text = "4/3" if isinstance(rule, Floor) else "17/16"
        raise ValueError(
            f"stochastic rounding under a scale rule that clips is biased: {rule.kind} has headroom {rule.headroom:g}"
            f" < {text}; set scale: {{kind: {rule.kind}, headroom: {text}}},"
            " or allow_bias: true for parity with a paper"
        )


def _check_pair(gemm: str, names: str, a: QuantSpec | None, b: QuantSpec | None) -> None:
    """Both operands of a GEMM must live in the same rotated basis."""
    first, second = (s.rotation if s else None for s in (a, b))
    if first != second:
        raise ValueError(
            f"{gemm}: the operands {names} have different rotations ({first} and {second});"
            " a Hadamard cancels only when both operands of a GEMM share it"
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
        """Whether both operands of `gemm` are quantized, so that it runs on FP4 tensor cores where they exist."""
        return all(self.slot(s) is not None for s in SLOTS if s.startswith(gemm))

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
            f" block = {[rows, cols]}, rotation = {spec.rotation}; use requant"
        )
    same = (spec.format, spec.shape, spec.rule, spec.rounding, spec.rotation)
    if same != (forward.format, forward.shape, forward.rule, forward.rounding, forward.rotation):
        raise ValueError(
            f"{name}.source = reuse must repeat the forward operand's spec ({forward.label()}), got {spec.label()}"
        )


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
