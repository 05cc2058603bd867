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

from fp4dist.spec.blocks import Ema
from fp4dist.spec.estimators import Straight
from fp4dist.spec.frozen import frozen
from fp4dist.spec.operand import QuantSpec
from fp4dist.spec.phases import GradNoise, LrShape, Trigger
from fp4dist.spec.splits import Channels, HotResidual, Mean
from fp4dist.spec.statistics import Current
from fp4dist.spec.training import Cage, GradientTransform, OptimizerState, OsciReset, QRamping, WeightControl

HIGH_PRECISION = "bf16"  # the YAML word for "not quantized": the operand keeps the model's dtype
Role = Literal["qkv", "proj", "fc1", "fc2", "expert", "head", "embedding", "router"]
ROLES: tuple[str, ...] = get_args(Role)
BLOCK_ROLES = ("qkv", "proj", "fc1", "fc2", "expert")  # the linears inside transformer blocks


Dequantized = Literal["dequant"]  # a backward operand: the forward codes' values in high precision, not quantized again


def _check_pair(gemm: str, names: str, a: QuantSpec | None, b: QuantSpec | Dequantized | None) -> None:
    """Both operands of a GEMM must live in the same rotated basis."""
    b = b if isinstance(b, QuantSpec) else None
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
        _check_forward_only("fprop", {"x": self.x, "w": self.w}, token_dim=("x",))
        for name, spec in (("x", self.x), ("w", self.w)):
            if spec is not None and isinstance(spec.outlier, Channels | HotResidual) and name == "w":
                raise ValueError(
                    f"w.outlier = {spec.outlier.kind}: channels are chosen by x and stand for both; give it x"
                )
        if self.x is not None and isinstance(self.x.rounding, Ema):
            raise ValueError("x.rounding = ema: a moving average exists for weights alone; give it w")
        if self.w is not None and isinstance(self.w.rounding, Ema) and not self.w.is_deterministic:
            raise ValueError("w.rounding = ema under fresh signs: the average would be in another basis each time")


def _check_forward_only(gemm: str, specs: dict[str, QuantSpec | None], token_dim: tuple[str, ...]) -> None:
    """What only some operands can have."""
    for name, spec in specs.items():
        if spec is None:
            continue
        if isinstance(spec.split, Mean) and name not in token_dim:
            raise ValueError(f"{name}.split = mean takes the mean over tokens, and a weight has none; use lowrank")
        if gemm == "fprop":
            continue
        if not isinstance(spec.estimator, Straight):
            raise ValueError(
                f"{name}.estimator = {spec.estimator.kind}: gradients pass the quantizers of fprop alone; set it there"
            )
        if isinstance(spec.rounding, Ema) and spec.source != "reuse":
            raise ValueError(f"{name}.rounding = ema: it decides the forward weight's codes; set it in fprop")


@frozen
class Dgrad:
    """dX[T,I] = dY[T,O] (W^T[I,O])^T."""

    dy: QuantSpec | None = None
    w: QuantSpec | Dequantized | None = None

    def __post_init__(self) -> None:
        _check_pair("dgrad", "dy and w", self.dy, self.w)
        w = self.w if isinstance(self.w, QuantSpec) else None
        _check_forward_only("dgrad", {"dy": self.dy, "w": w}, token_dim=("dy",))
        for name, spec in (("dy", self.dy), ("w", w)):
            if spec is not None and isinstance(spec.outlier, Channels | HotResidual):
                raise ValueError(f"{name}.outlier = {spec.outlier.kind}: dgrad contracts outputs, not input channels")
        if self.dy is not None and self.dy.source != "master":
            raise ValueError(f"dy.source = {self.dy.source}: the incoming gradient has only its master")


@frozen
class Wgrad:
    """dW[O,I] = dY^T[O,T] (X^T[I,T])^T."""

    dy: QuantSpec | None = None
    x: QuantSpec | Dequantized | None = None

    def __post_init__(self) -> None:
        _check_pair("wgrad", "dy and x", self.dy, self.x)
        x = self.x if isinstance(self.x, QuantSpec) else None
        _check_forward_only("wgrad", {"dy": self.dy, "x": x}, token_dim=("dy", "x"))
        if self.dy is not None and isinstance(self.dy.outlier, Channels | HotResidual):
            raise ValueError(f"dy.outlier = {self.dy.outlier.kind}: input channels belong to x")
        if x is not None and isinstance(x.outlier, HotResidual):
            raise ValueError("x.outlier = hot_residual: wgrad contracts tokens, not input channels; use it in fprop")
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
        for name, forward in (("dgrad.w", self.fprop.w), ("wgrad.x", self.fprop.x)):
            _check_source(name, self.slot(name), forward)
            if self.dequantized(name) and forward is None:
                raise ValueError(f"{name} = dequant needs quantized forward codes, but the forward operand is bf16")
        _check_channels(self)

    def slot(self, name: str) -> QuantSpec | None:
        """The spec of slot `name`, e.g. `wgrad.dy`; None where it is not quantized."""
        gemm, operand = name.split(".")
        value = getattr(getattr(self, gemm), operand)
        return value if isinstance(value, QuantSpec) else None

    def dequantized(self, name: str) -> bool:
        """Whether backward slot `name` is the forward codes' values in high precision."""
        gemm, operand = name.split(".")
        return getattr(getattr(self, gemm), operand) == "dequant"

    def reads_codes(self, name: str) -> bool:
        """Whether backward slot `name` starts from the forward codes, and not from the high-precision tensor."""
        spec = self.slot(name)
        return self.dequantized(name) or (spec is not None and spec.source != "master")

    def word(self, name: str) -> str:
        """What slot `name` is, for tables: the spec's label, `dequant` or `bf16`."""
        spec = self.slot(name)
        return spec.label() if spec else "dequant" if self.dequantized(name) else HIGH_PRECISION

    def with_high_precision_backward(self) -> LinearRecipe:
        """The same forward GEMM, and backward ones in which nothing is quantized anew: `dequant` stays."""
        dgrad = Dgrad(w="dequant" if self.dequantized("dgrad.w") else None)
        wgrad = Wgrad(x="dequant" if self.dequantized("wgrad.x") else None)
        return LinearRecipe(fprop=self.fprop, dgrad=dgrad, wgrad=wgrad)

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


def _check_channels(recipe: LinearRecipe) -> None:
    """One choice of channels serves the whole linear."""
    forward = recipe.fprop.x.outlier if recipe.fprop.x is not None else None
    backward = spec.outlier if (spec := recipe.slot("wgrad.x")) is not None else None
    if isinstance(backward, Channels) and backward != forward:
        raise ValueError(
            "wgrad.x.outlier = channels repeats the choice of fprop.x, which has"
            f" {forward.kind if forward else 'none'}{' with other fields' if isinstance(forward, Channels) else ''};"
            " give both the same block"
        )


def _check_source(name: str, spec: QuantSpec | None, forward: QuantSpec | None) -> None:
    if spec is None or spec.source == "master":
        return
    if forward is None:
        raise ValueError(
            f"{name}.source = {spec.source} needs quantized forward codes, but the forward operand is bf16"
        )
    if spec.source == "requant":
        if forward.rotation is not None and forward.rotation.signs == "fresh":
            raise ValueError(
                f"{name}.source = requant turns forward codes back into the original basis, but the forward operand has"
                f" rotation = {forward.rotation}, whose signs are not kept; use master, or fixed signs or none in fprop"
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
    return spec.format, spec.shape, spec.above, spec.rule, spec.rounding, spec.rotation, spec.amax_scope, spec.amax


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
    """From some step on, something else holds.

    Phases act in their order, so that later ones win over earlier ones that run too.

    use                linears follow another LinearRecipe: `use: {fp4: fp4_tail}`, by the names that rules gave them
    assign             rules that come before the recipe's own and win over this phase's `use`
    lr                 another learning-rate shape;  optimizer_state   other dtypes of master weights and moments
    last, step, trigger
                       start: a fraction of the run before its end, an absolute step, or a trigger; exactly one
    enabled            false keeps a published phase in the file without running it
    """

    name: str
    use: dict[str, str] = field(default_factory=dict)
    assign: tuple[Rule, ...] = ()
    lr: LrShape | None = None
    optimizer_state: OptimizerState | None = None
    last: float | None = None
    step: int | None = None
    trigger: Trigger | None = None
    enabled: bool = True

    def __post_init__(self) -> None:
        if sum(start is not None for start in (self.last, self.step, self.trigger)) != 1:
            raise ValueError(f"phase {self.name!r} needs exactly one of last, step, trigger")
        if self.last is not None and not 0 < self.last < 1:
            raise ValueError(f"last = {self.last} must be in (0, 1)")
        if self.step is not None and self.step < 0:
            raise ValueError(f"step = {self.step} must not be negative")
        if not (self.use or self.assign or self.lr or self.optimizer_state):
            raise ValueError(f"phase {self.name!r} changes nothing: give use, assign, lr or optimizer_state")

    def start(self, total_steps: int) -> int | None:
        """First step of the phase in a run of `total_steps`; None where a trigger decides."""
        if self.trigger is not None:
            return None
        return self.step if self.step is not None else round(total_steps * (1 - (self.last or 0.0)))


@frozen
class Recipe:
    """Where and when: named LinearRecipes, ordered rules, phases. A linear that no rule matches stays in bf16.

    gradients         transforms of every gradient between its reduction and the optimizer, in this order
    weights           what holds or moves the weights of quantized linears around the optimizer's step
    optimizer_state   dtypes of master weights and moments
    """

    name: str
    paper: str = ""
    notes: str = ""
    linears: dict[str, LinearRecipe] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    phases: tuple[Phase, ...] = ()
    gradients: tuple[GradientTransform, ...] = ()
    weights: tuple[WeightControl, ...] = ()
    optimizer_state: OptimizerState | None = None

    def __post_init__(self) -> None:
        if HIGH_PRECISION in self.linears:
            raise ValueError(f"linears.{HIGH_PRECISION}: this name is taken; it means high precision")
        used = [(f"rules[{i}].linear", r.linear) for i, r in enumerate(self.rules)]
        used += [(f"phases[{i}].use", n) for i, p in enumerate(self.phases) for pair in p.use.items() for n in pair]
        used += [(f"phases[{i}].assign", r.linear) for i, p in enumerate(self.phases) for r in p.assign]
        for place, name in used:
            if name != HIGH_PRECISION and name not in self.linears:
                raise ValueError(f"{place} = {name!r} is not one of {', '.join([*self.linears, HIGH_PRECISION])}")
        phases = [p.name for p in self.phases]
        if len(set(phases)) < len(phases):
            raise ValueError(f"phases: the names {', '.join(phases)} must differ")
        unused = set(self.linears) - {name for _, name in used}
        if unused:
            raise ValueError(f"linears.{min(unused)} is used by no rule and no phase")
        quantized = [name for name, linear in self.linears.items() if not linear.is_high_precision]
        if quantized and not self.wants_fp4:  # a disabled phase may still name it
            raise ValueError(
                f"rules: no rule and no enabled phase asks for linears.{quantized[0]}, so nothing would run in FP4; add"
                f" a rule such as {{roles: [qkv, proj, fc1, fc2], linear: {quantized[0]}}}, or use recipe bf16"
            )
        _check_training(self)
        _check_phases(self)

    def linear(self, name: str) -> LinearRecipe:
        """The LinearRecipe called `name`; `bf16` is the one without quantizers."""
        return LinearRecipe() if name == HIGH_PRECISION else self.linears[name]

    @property
    def steers_optimizer(self) -> bool:
        """Whether something acts around the optimizer's step: gradients, weights, averages of weights, state dtypes."""
        return bool(self.gradients or self.weights or self.averages_weights or self.rounds_optimizer_state)

    @property
    def averages_weights(self) -> bool:
        """Whether a weight is rounded by its moving average."""
        return any(isinstance(w.rounding, Ema) for linear in self.linears.values() if (w := linear.fprop.w))

    @property
    def watches_weights(self) -> bool:
        """Whether something compares whole weights with their quantized values, or averages them, after each step."""
        return bool(self.weights) or self.averages_weights

    @property
    def rounds_optimizer_state(self) -> bool:
        """Whether masters or moments have dtypes of their own, now or in a phase; an all-fp32 state rounds nothing."""
        states = [self.optimizer_state, *(p.optimizer_state for p in self.phases if p.enabled)]
        return any(state not in (None, OptimizerState()) for state in states)

    @property
    def keeps_state(self) -> bool:
        """Whether a run keeps something from step to step beside weights and moments, which a checkpoint must hold."""
        return bool(self.kept_state)

    @property
    def kept_state(self) -> tuple[str, ...]:
        """What `keeps_state` asks about, in words; each once."""
        specs = [
            (f"linears.{name}.{slot}", spec)
            for name, linear in self.linears.items()
            for slot in SLOTS
            if (spec := linear.slot(slot))
        ]
        words = [f"{at}.amax: {s.amax.kind}" for at, s in specs if not isinstance(s.amax, Current)]
        words += [f"{at}.outlier: {s.outlier.kind}" for at, s in specs if isinstance(s.outlier, Channels | HotResidual)]
        words += [f"phases.{p.name}.trigger: {p.trigger.kind}" for p in self.phases if p.enabled and p.trigger]
        words += [f"{name}: {b.kind}" for name in ("gradients", "weights") for b in getattr(self, name)]
        words += ["moving averages of weights"] if self.averages_weights else []
        return (*words, *(["optimizer_state"] if self.rounds_optimizer_state else []))

    @property
    def wants_fp4(self) -> bool:
        """Whether any rule, or an enabled phase, asks for quantized operands."""
        phases = [phase for phase in self.phases if phase.enabled]
        rules = [*self.rules, *(rule for phase in phases for rule in phase.assign)]
        names = {rule.linear for rule in rules} | {name for phase in phases for name in phase.use.values()}
        return any(not self.linear(name).is_high_precision for name in names)


def _check_phases(recipe: Recipe) -> None:
    """What a trigger measures must exist."""
    backward = ("dgrad.dy", "dgrad.w", "wgrad.dy", "wgrad.x")
    rounded = any(linear.slot(slot) is not None for linear in recipe.linears.values() for slot in backward)
    for phase in (p for p in recipe.phases if p.enabled):
        if isinstance(phase.trigger, GradNoise) and not rounded:
            raise ValueError(
                f"phase {phase.name!r} waits for the gradient's noise (trigger: grad_noise), but no linear quantizes a"
                " backward operand; give it last, step or another trigger"
            )


def _check_training(recipe: Recipe) -> None:
    """Which transforms and controls exclude each other."""
    for name, blocks in (("gradients", recipe.gradients), ("weights", recipe.weights)):
        kinds = [block.kind for block in blocks]
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"{name}: {max(kinds, key=kinds.count)} is given twice; keep one")
    controls = {type(control) for control in recipe.weights}
    if {Cage, OsciReset} <= controls:
        raise ValueError("weights: cage and osci_reset both pull weights to their quantized values; keep one")
    if {QRamping, OsciReset} <= controls:
        raise ValueError("weights: q_ramping and osci_reset both answer the same oscillation; keep one")
    if recipe.weights and not any(linear.fprop.w is not None for linear in recipe.linears.values()):
        raise ValueError(f"weights: {recipe.weights[0].kind} needs a linear whose fprop.w is quantized")
    for name, linear in recipe.linears.items():
        if recipe.weights and linear.fprop.w is not None and not linear.fprop.w.is_deterministic:
            raise ValueError(
                f"weights: {recipe.weights[0].kind} compares a weight with its quantized value, which linears.{name}"
                " draws anew each time (noise or fresh signs in fprop.w); use nearest rounding and fixed signs there"
            )
