"""QuantSpec: how one operand of a GEMM is quantized, which of its blocks fit together, and what to do where not."""

from __future__ import annotations

import math
from dataclasses import fields
from fractions import Fraction
from typing import ClassVar, Literal

from fp4dist.spec.blocks import (
    E4M3_NO_CLIP,
    AbsMax,
    BestOf,
    Ceil,
    Eden,
    Ema,
    Floor,
    FourOverSix,
    Hadamard,
    MseSearch,
    Nearest,
    Quest,
    Rounding,
    Sawb,
    ScaleRule,
    Stochastic,
)
from fp4dist.spec.estimators import Dge, Estimator, Lsq, Straight, TrustMask
from fp4dist.spec.formats import E2M1, INT4, Block, Format, Outer
from fp4dist.spec.frozen import frozen
from fp4dist.spec.splits import Channels, HotResidual, Occ, Outlier, Split, TopK
from fp4dist.spec.statistics import Current, GradScale, Hold, Learned, Statistic

# Scale format -> the rules that it can store.
RULES: dict[str, tuple[type, ...]] = {
    "e4m3": (AbsMax, FourOverSix, Quest, MseSearch, BestOf),
    "ue5m3": (AbsMax, FourOverSix, Quest, MseSearch, BestOf),
    "e4m3_inverse": (AbsMax,),
    "e8m0": (Floor, Ceil, Quest),
    "fp32": (AbsMax, Floor, Ceil, Quest, Sawb, MseSearch),
}
UNBIASED_FP32 = 1.0  # fp32 scales put the amax on the element's maximum, to one rounding
MXFP8_COLUMNS = 32  # of a block of a part in mxfp8
# A held amax may be outgrown; scales that reach this much beyond their budget have room for it.
HELD_GROWTH = 64.0
_PARITY = "or allow_bias: true for parity with a paper"


@frozen
class QuantSpec:
    """How one operand becomes a block-scaled tensor."""

    SHORTHAND: ClassVar[str] = "format"  # `x: nvfp4` means `x: {format: nvfp4}`

    format: Format
    block: Block | None = None  # default: the format's own block
    outer: Outer | None = None  # default: the format's own outer level
    scale: ScaleRule | None = None  # default: Floor for E8M0 scales, AbsMax for all others
    rounding: Rounding = Nearest()
    rotation: Hadamard | None = None
    source: Literal["master", "requant", "reuse"] = "master"  # of a backward operand; see LinearRecipe
    amax: Statistic = Current()  # what a scale of the whole tensor is made from
    split: Split | None = None  # a part of low rank that is taken out first
    outlier: Outlier | None = None  # large elements or channels that are taken out
    estimator: Estimator = Straight()  # how the gradient passes (forward operands)
    allow_bias: bool = False  # stochastic rounding under a rule that clips, for parity with a paper
    amax_scope: Literal["tensor", "shard"] = (
        "tensor"  # of a scale that spans ranks: the logical tensor, or a rank's part
    )

    def __post_init__(self) -> None:
        _check_scale_rule(self)
        _check_unbiased(self)
        _check_blocks(self)
        _check_rounding(self)
        _check_statistic(self)
        _check_parts(self)
        _check_estimator(self)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns that share a scale; 0 stands for the whole dimension."""
        block = self.block or self.format.block
        return {"row": (1, 0), "tensor": (0, 0)}[block] if isinstance(block, str) else block

    @property
    def above(self) -> Outer:
        """The outer level."""
        return self.outer or self.format.outer

    @property
    def rule(self) -> ScaleRule:
        """The scale rule, default filled in."""
        if self.scale is not None:
            return self.scale
        if self.format.scale.name == "e8m0":
            return Floor()
        return AbsMax(budget=min(AbsMax().budget, self.format.scale.max))

    @property
    def draws_noise(self) -> bool:
        """Whether quantizing needs a Philox key for rounding."""
        return not isinstance(self.rounding, Nearest | Ema)

    @property
    def has_parts(self) -> bool:
        """Whether the operand is a sum of quantized codes and something beside them."""
        return self.split is not None or self.outlier is not None

    @property
    def is_deterministic(self) -> bool:
        """Whether the codes depend neither on noise nor on fresh signs."""
        return not self.draws_noise and (self.rotation is None or self.rotation.signs != "fresh")

    @property
    def is_fp4(self) -> bool:
        """Whether an element takes at most 4 bits."""
        return self.format.element.packed

    @property
    def samples(self) -> int:
        """Independent draws side by side in the codes."""
        return self.rounding.samples if isinstance(self.rounding, Stochastic) else 1

    @property
    def joins(self) -> bool:
        """Whether codes and scale bytes of two parts of a tensor, put side by side, are those of the whole tensor."""
        whole = 0 in self.shape or self.format.scale.name == "fp32"
        plain = self.samples == 1 and self.is_fp4 and not self.has_parts
        return not whole and self.above in ("none", "tensor") and plain

    @property
    def rows_multiple(self) -> int:
        """What the rows must be a multiple of."""
        return max(self.shape[0], self.above[0] if isinstance(self.above, tuple) else 1, 1)

    @property
    def columns_multiple(self) -> int:
        """What the contracted dimension must be a multiple of (8 elements share one draw of noise)."""
        noise = 8 if isinstance(self.rounding, Stochastic) else 2  # 2: two codes share a byte
        tile = self.above[1] if isinstance(self.above, tuple) else 1
        group = self.outlier.group if isinstance(self.outlier, TopK) else 1
        if isinstance(self.outlier, Occ | TopK | Channels) and self.outlier.precision == "mxfp8":
            group = math.lcm(group, MXFP8_COLUMNS)
        return math.lcm(max(self.shape[1], tile, self.rotation.size if self.rotation else 1, noise), group)

    def label(self) -> str:
        """A short text for tables: `nvfp4 1x16 17/16 sr rht16` (headroom 17/16, stochastic, 16-wide rotation)."""
        words = [self.format.title, _block_words(self.block or self.format.block)]
        if self.above != ("tensor" if self.format.scale.needs_range else "none"):
            words.append("outer:" + (self.above if isinstance(self.above, str) else _block_words(self.above)))
        words += [*_rule_words(self.rule), *_rounding_words(self)]
        if self.rotation:
            words.append(_rotation_word(self.rotation))
        if self.amax_scope == "shard":
            words.append("shard-amax")
        words += [_block_word(block) for block in (self.amax, self.split, self.outlier, self.estimator) if block]
        if self.source != "master":
            words.append(self.source)
        return " ".join(word for word in words if word)


def _block_word(block: object) -> str:
    """The block's kind with the fields that differ from their defaults; nothing for a default block."""
    kind = getattr(block, "kind", "")
    if kind in ("current", "straight"):
        return ""
    changed = [
        f"{f.name}={value:g}" if isinstance(value := getattr(block, f.name), float) else f"{f.name}={value}"
        for f in fields(block)  # type: ignore[arg-type]
        if f.name != "kind" and getattr(block, f.name) != f.default
    ]
    return f"{kind}({','.join(changed)})" if changed else kind


def _block_words(block: Block) -> str:
    return block if isinstance(block, str) else f"{block[0]}x{block[1]}"


def _rule_words(rule: ScaleRule) -> list[str]:
    words: list[str] = []
    if isinstance(rule, Ceil):
        words.append("ceil" if rule.of == "ratio" else "ceil(amax)")
        words += [f"finer<{rule.finer_below:g}"] if rule.finer_below else []
    elif isinstance(rule, FourOverSix):
        words.append("4/6" if rule.metric == "mse" else f"4/6({rule.metric})")
    elif isinstance(rule, BestOf):
        words.append(f"best({','.join(str(Fraction(a).limit_denominator(64)) for a in (1, *rule.also))})")
        words += [rule.metric] if rule.metric != "mse" else []
    elif isinstance(rule, Quest):
        words.append("quest" if rule.power == "floor" else "quest(nearest)")
        words += [rule.spread] if rule.spread != "std" else []
        words += [f"{rule.factor:.4g}"] if rule.factor is not None else []
    elif isinstance(rule, Sawb):
        words.append("sawb" if rule.rms is None else f"sawb({rule.rms:g},{rule.mean_abs:g})")
    elif isinstance(rule, MseSearch):
        words.append(f"mse({rule.steps}:{rule.lowest:g})")
    headroom = getattr(rule, "headroom", 1)
    if headroom != 1:
        near = Fraction(headroom).limit_denominator(16)
        words.append(str(near) if float(near) == headroom else f"{headroom:.4g}")
    budget = getattr(rule, "budget", None)
    if budget is not None and budget != type(rule)().budget:  # type: ignore[union-attr]
        words.append(f"max{budget:g}")
    if isinstance(rule, AbsMax) and rule.nonzero:
        words.append("nonzero")
    return words


def _rounding_words(spec: QuantSpec) -> list[str]:
    if isinstance(spec.rounding, Stochastic):
        return ["sr" if spec.samples == 1 else f"sr({spec.samples})"]
    if isinstance(spec.rounding, Eden):
        options = ["pre"] if spec.rounding.align == "pre" else []
        options += ["S/rotation"] if spec.rounding.group == "rotation" else []
        options += [f"truncate{spec.rounding.truncate}"] if spec.rounding.truncate else []
        options += [] if spec.rounding.four_over_six == "none" else [f"4/6:{spec.rounding.four_over_six}"]
        return [f"eden({','.join(options)})" if options else "eden"]
    if isinstance(spec.rounding, Ema):
        return [f"ema({spec.rounding.decay:g})"]
    return [] if spec.rounding.ties == "even" else [f"ties:{spec.rounding.ties}"]


def _rotation_word(rotation: Hadamard) -> str:
    word = {"none": "had", "fixed": "rht", "fresh": "rht*"}[rotation.signs] + str(rotation.size)
    return word if rotation.mask is None else f"{word}:{rotation.mask:x}"


def _check_scale_rule(spec: QuantSpec) -> None:
    fits = RULES[spec.format.scale.name]
    if not isinstance(spec.rule, fits):
        raise ValueError(
            f"scale rule {spec.rule.kind} does not fit {spec.format.scale.name} scales of {spec.format.title};"
            f" use one of {', '.join(rule().kind for rule in fits)}"
        )
    if isinstance(spec.rounding, Eden):
        if spec.format.scale.name != "e4m3":
            raise ValueError("eden rounds the block scale stochastically in E4M3: it needs format nvfp4")
        if spec.above != "tensor":
            raise ValueError(f"eden aligns its block scales under one scale of the tensor; outer = {spec.above}")
        if spec.scale is not None:
            raise ValueError("eden chooses its own block scale; leave `scale` out (its headroom and budget are eden's)")
        if spec.shape[0] != 1:
            raise ValueError(f"eden corrects 1xN blocks; block = {list(spec.shape)}")
        if spec.rounding.group == "rotation" and spec.rotation is None:
            raise ValueError("eden with group: rotation shares its correction in a rotation's group; set rotation")
    _check_budget(spec)
    _check_constants(spec)


def _check_budget(spec: QuantSpec) -> None:
    budget = getattr(spec.rule, "budget", None)
    if budget is None or isinstance(spec.rounding, Eden):
        return
    scale = spec.format.scale
    if scale.needs_range and spec.above != "none" and budget > scale.max:
        raise ValueError(
            f"{spec.rule.kind} has budget {budget:g}, but {scale.name} scales end at {scale.max:g};"
            f" set scale: {{kind: {spec.rule.kind}, budget: {scale.max:g}}} or less"
        )
    if not scale.needs_range and budget != type(spec.rule)().budget:  # type: ignore[union-attr]
        raise ValueError(
            f"{spec.rule.kind}.budget = {budget:g} divides a range between block and outer scales, and"
            f" {scale.name} scales have no outer level; leave budget out"
        )


def _check_constants(spec: QuantSpec) -> None:
    """Published constants hold for the grid that they were fitted to."""
    rule, element = spec.rule, spec.format.element
    if isinstance(rule, Quest) and rule.factor is None and element != E2M1:
        raise ValueError(
            f"quest's default factor is the optimum of e2m1, not of {element.name};"
            " set scale: {kind: quest, factor: ...}"
        )
    if isinstance(rule, Quest) and rule.spread == "std" and 0 in spec.shape:
        raise ValueError(
            "quest with spread: std removes the mean of a block, which a row or tensor shared by ranks has not at hand;"
            " use spread: rms, or a block of fixed size"
        )
    if isinstance(rule, Sawb) and rule.rms is None and element != INT4:
        raise ValueError(f"sawb's default coefficients are those of int4, not of {element.name}; set rms and mean_abs")


def _check_blocks(spec: QuantSpec) -> None:
    (rows, cols), scale = spec.shape, spec.format.scale
    if isinstance(spec.block or spec.format.block, str):
        if scale.name != "fp32":
            raise ValueError(
                f"one scale for a whole row or tensor is kept in fp32; {scale.name} scales need a block [r, c]"
            )
    elif rows not in (1, cols) or cols < 2 or cols & (cols - 1):
        raise ValueError(f"block = {[rows, cols]} must be [1, n] or square, with n a power of two")
    if spec.rotation is not None and cols and spec.rotation.size % cols:
        raise ValueError(f"rotation.size = {spec.rotation.size} is not a multiple of the block's {cols} columns")
    if spec.above == "none":
        if scale.name == "e4m3_inverse":
            raise ValueError("e4m3_inverse scales hold 2^-9 to 240 only and need outer: tensor, row or [r, c]")
        return
    if not scale.needs_range:
        raise ValueError(
            f"outer = {spec.above} widens the range of block scales, but {scale.name} has fp32's; use none"
        )
    if spec.above == "row" and rows != 1:
        raise ValueError(f"outer = row needs blocks within a row; block = {[rows, cols]}")
    if isinstance(spec.above, tuple):
        tile = spec.above
        if min(tile) < 1 or tile[0] % rows or tile[1] % cols or tile[1] & (tile[1] - 1):
            raise ValueError(f"outer = {list(tile)} must be whole blocks of {[rows, cols]}, its columns a power of two")


def _check_rounding(spec: QuantSpec) -> None:
    if isinstance(spec.rounding, Nearest) and spec.rounding.ties != "even" and spec.format.element.mantissa is not None:
        raise ValueError(f"{spec.format.element.name} elements round ties to even, as conversions do; leave ties out")
    if isinstance(spec.rule, MseSearch | BestOf) and not isinstance(spec.rounding, Nearest):
        raise ValueError(f"{spec.rule.kind} compares errors, which noise would blur: it needs nearest rounding")
    if isinstance(spec.rounding, Ema) and isinstance(spec.rule, (FourOverSix, MseSearch, BestOf)):
        raise ValueError(
            f"ema rounding decides between neighbours under the weight's own scale, {spec.rule.kind} between scales;"
            " use another scale rule"
        )


def _check_statistic(spec: QuantSpec) -> None:
    if isinstance(spec.amax, Current):
        return
    kind, of_tensor = spec.amax.kind, spec.above == "tensor" or spec.shape == (0, 0)
    if not of_tensor or isinstance(spec.rounding, Eden) or isinstance(spec.rule, (Quest, Sawb)):
        raise ValueError(
            f"amax = {kind} keeps the amax of a whole tensor, but nothing in {spec.format.title} is scaled by it here;"
            " use outer: tensor or block: tensor with an absmax scale and nearest or stochastic rounding"
        )
    if isinstance(spec.amax, GradScale | Learned) and spec.shape != (0, 0):
        raise ValueError(f"amax = {kind} is the only scale of its tensor; use block: tensor with an fp32 scale")
    if spec.amax_scope == "shard":
        raise ValueError(f"amax = {kind} is kept for the logical tensor; leave amax_scope: shard out")
    if isinstance(spec.rounding, Stochastic) and not spec.allow_bias:
        _check_held_room(spec)


def _check_held_room(spec: QuantSpec) -> None:
    budget = getattr(spec.rule, "budget", 0.0)
    roomy = spec.shape != (0, 0) and budget and spec.format.scale.max / budget >= HELD_GROWTH
    if not (isinstance(spec.amax, Hold) and roomy):
        raise ValueError(
            f"stochastic rounding under a scale rule that clips is biased: amax = {spec.amax.kind} may be below the"
            f" present one; use nearest, amax: current, amax: hold under scales with {HELD_GROWTH:g} times the range of"
            f" their budget (ue5m3), {_PARITY}"
        )


def _check_parts(spec: QuantSpec) -> None:
    if spec.source == "reuse" and spec.has_parts:
        raise ValueError(
            "source = reuse reads the forward codes and what stands beside them; leave split and outlier out"
        )


def _check_judgeable(spec: QuantSpec) -> None:
    """A gradient's factor is judged by the value that was rounded, which must be known from the operand's scales."""
    kind = spec.estimator.kind
    if isinstance(spec.rounding, Eden):
        raise ValueError(
            f"estimator = {kind} with eden: its stored scales are not those that its codes were made with; use straight"
        )
    mixes = spec.outlier is not None and not isinstance(spec.outlier, Channels | HotResidual) and spec.rotation
    if spec.split is not None or mixes or (isinstance(spec.estimator, Lsq) and spec.has_parts):
        part = spec.split or spec.outlier
        raise ValueError(
            f"estimator = {kind} with {part.kind if part else ''}{' under a rotation' if mixes else ''}: what was taken"
            " out and what was rounded depend on the same elements; use estimator: straight, or leave the part out"
        )


def _check_estimator(spec: QuantSpec) -> None:
    if not isinstance(spec.estimator, Straight):
        _check_judgeable(spec)
    clips = isinstance(spec.rule, (Quest, Sawb, MseSearch, BestOf)) or not isinstance(spec.amax, Current)
    clips = clips or (isinstance(spec.rule, Floor) and spec.rule.headroom < _no_clip_headroom(spec))
    if isinstance(spec.estimator, TrustMask) and not clips:
        raise ValueError(
            f"estimator = mask lets nothing pass where the scale clips, and {spec.rule.kind} clips (next to) nothing;"
            " use a rule that does (quest, sawb), or estimator: straight"
        )
    if isinstance(spec.estimator, Dge) and isinstance(spec.rule, Quest):
        raise ValueError(
            "estimator = dge with scale quest: quest is published with a mask, and both would multiply the gradient;"
            " use estimator: mask, or another scale"
        )
    if isinstance(spec.estimator, Lsq) != isinstance(spec.amax, Learned):
        raise ValueError(
            f"estimator = {spec.estimator.kind} with amax = {spec.amax.kind}: the gradient of lsq is that of a learned"
            " amax; use both or neither"
        )


def _check_unbiased(spec: QuantSpec) -> None:
    if spec.allow_bias:
        return
    fresh = spec.rotation is not None and spec.rotation.signs == "fresh"
    if isinstance(spec.rounding, Eden) and not fresh:
        raise ValueError(
            "eden is unbiased only under a fresh rotation: without one its error never averages out;"
            f" set rotation: {{size: 128, signs: fresh}}, {_PARITY}"
        )
    if isinstance(spec.rounding, Stochastic):
        _check_never_clips(spec)


def _check_never_clips(spec: QuantSpec) -> None:
    rule, scale = spec.rule, spec.format.scale
    if isinstance(rule, FourOverSix):
        raise ValueError(
            "stochastic rounding with four_over_six is biased: the choice of the scale follows the noise;"
            f" use nearest, {_PARITY}"
        )
    if isinstance(rule, (Quest, Sawb, MseSearch)) or (isinstance(rule, Ceil) and rule.finer_below):
        raise ValueError(
            f"stochastic rounding under a scale rule that clips is biased: {rule.kind} clips the largest elements on"
            f" purpose; use nearest, another rule, {_PARITY}"
        )
    if scale.name == "e4m3_inverse":
        raise ValueError(
            "stochastic rounding under e4m3_inverse scales is biased: their coarsest steps are at the largest blocks,"
            f" which clip; use scale e4m3 with headroom 17/16, {_PARITY}"
        )
    if scale.needs_range and spec.above == "none":
        raise ValueError(
            f"stochastic rounding with {scale.name} scales and no outer level is biased wherever a block exceeds their"
            f" range; set outer: tensor, {_PARITY}"
        )
    needed = _no_clip_headroom(spec)
    if not isinstance(rule, Ceil) and rule.headroom < needed - 1e-12:
        text = str(Fraction(needed).limit_denominator(16))
        raise ValueError(
            f"stochastic rounding under a scale rule that clips is biased: {rule.kind} has headroom {rule.headroom:g}"
            f" < {text}; set scale: {{kind: {rule.kind}, headroom: {text}}}, {_PARITY}"
        )


def _no_clip_headroom(spec: QuantSpec) -> float:
    """The least headroom under which nothing exceeds the element's maximum."""
    if isinstance(spec.rule, Floor):
        element = spec.format.element
        return 2.0 ** (element.exponent + 1) / element.max
    return E4M3_NO_CLIP if spec.format.scale.needs_range else UNBIASED_FP32
