# pyright: reportCallIssue=false, reportArgumentType=false
# (a launch takes options beside the kernel's own parameters)
"""The quantizers of E2M1 with one-byte scales, in one pass over the data (two where the tensor's scale comes first)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fp4dist.kernels.triton.programs import amax_kernel, quantize_kernel, round_scales_kernel
from fp4dist.numerics.grouping import ReduceMax
from fp4dist.numerics.rng import MASK, run_words
from fp4dist.numerics.rotation import sign_vector
from fp4dist.numerics.scales import QUEST_E2M1, fp32, target_max
from fp4dist.numerics.tensor import BlockScaledTensor, Key
from fp4dist.spec.blocks import AbsMax, Ceil, Eden, Floor, FourOverSix, Nearest, Quest, Stochastic
from fp4dist.spec.formats import E2M1
from fp4dist.spec.recipe import QuantSpec


@dataclass(frozen=True, slots=True)
class _Source:
    """What a kernel reads: a matrix in the output's orientation with any strides, or codes of its transpose."""

    tensor: Tensor
    strides: tuple[int, int]
    shape: tuple[int, int]
    codes: BlockScaledTensor | None = None

    @classmethod
    def of(cls, source: Tensor | BlockScaledTensor) -> _Source:
        if isinstance(source, Tensor):
            return cls(source, (source.stride(0), source.stride(1)), (source.shape[0], source.shape[1]))
        return cls(source.codes, (0, 0), (source.shape[1], source.shape[0]), source)

    def arguments(self) -> tuple[object, ...]:
        """Pointers and strides in the order of the kernels' first five parameters."""
        q = self.codes
        return (
            self.tensor, *self.strides, q.scales if q else self.tensor, q.global_scale if q else self.tensor,
        )  # fmt: skip

    def constants(self) -> dict[str, object]:
        """How codes are to be read."""
        q = self.codes
        block = q.block if q else (1, 16)
        return {
            "SRC": q is not None,
            "QBR": block[0],
            "QBC": block[1],
            "QE8M0": bool(q) and q.format.scale.name == "e8m0",
        }


def why_not(spec: QuantSpec) -> str | None:
    """The first block of `spec` that these kernels lack, or None."""
    rows, columns = spec.shape
    lacks = (
        (spec.format.element != E2M1, f"elements {spec.format.element.name}"),
        (spec.format.scale.name not in ("e4m3", "e8m0"), f"{spec.format.scale.name} scales"),
        ((rows, columns) not in ((1, 16), (1, 32), (16, 16), (32, 32)), f"blocks {[rows, columns]}"),
        (spec.format.scale.name == "e4m3" and spec.above != "tensor", f"outer {spec.above}"),
        (not isinstance(spec.rule, AbsMax | FourOverSix | Floor | Ceil | Quest), f"scale rule {spec.rule.kind}"),
        (isinstance(spec.rule, Quest) and spec.format.scale.name == "e4m3", "quest under E4M3 scales"),
        (spec.samples > 1, "several samples"),
        (not isinstance(spec.rounding, Nearest | Stochastic | Eden), f"rounding {spec.rounding.kind}"),
        (isinstance(spec.rounding, Nearest) and spec.rounding.ties != "even", "ties other than to even"),
        (isinstance(spec.rounding, Eden) and spec.rounding.align != "post_hoc", "eden with align: pre"),
        (isinstance(spec.rounding, Eden) and spec.rounding.four_over_six != "none", "eden with four-over-six"),
        (isinstance(spec.rounding, Eden) and spec.rounding.group != "block", "eden with group: rotation"),
        (isinstance(spec.rounding, Eden) and spec.rounding.truncate > 0, "eden with truncate"),
        (isinstance(spec.rounding, Stochastic) and isinstance(spec.rule, FourOverSix), "four-over-six under noise"),
        (spec.has_parts, "operands in parts"),
    )
    return next((f"the Triton quantizer has no {what}" for missing, what in lacks if missing), None)


def quantize(
    source: Tensor | BlockScaledTensor, spec: QuantSpec, key: Key | None = None, reduce_max: ReduceMax | None = None
) -> BlockScaledTensor:
    """The codes of a matrix, or of the transpose of forward codes: see `fp4dist.numerics.quantize`."""
    src = _Source.of(source)
    rows, cols = src.shape
    device = src.tensor.device
    block = spec.shape
    signs = sign_vector(spec.rotation, key, device) if spec.rotation else None
    launch = _Launch(src, spec, signs)
    codes = torch.empty((rows, cols // 2), dtype=torch.uint8, device=device)
    scales = torch.empty((rows // block[0], cols // block[1]), dtype=torch.uint8, device=device)
    rotation = spec.rotation.size if spec.rotation else 1
    if isinstance(spec.rounding, Eden):
        s_dec = _eden(launch, spec.rounding, key, reduce_max, codes, scales)
        return BlockScaledTensor(codes, scales, s_dec, spec.format, block, rotation)
    if spec.format.scale.name == "e4m3":
        assert isinstance(spec.rule, AbsMax | FourOverSix)
        amax = launch.amax()
        amax = reduce_max(amax) if reduce_max is not None else amax
        s_dec = torch.empty((), dtype=torch.float32, device=device)
        v = target_max(E2M1.max, spec.rule.headroom)
        launch.run(codes, scales, key, outer=amax, numerator=fp32(fp32(spec.rule.budget) * v), v=v, top=s_dec)
    else:
        launch.run(codes, scales, key)
        s_dec = torch.full((), _common_factor(spec), device=device)
    return BlockScaledTensor(codes, scales, s_dec, spec.format, block, rotation)


def requantize(
    q: BlockScaledTensor, spec: QuantSpec, key: Key | None = None, reduce_max: ReduceMax | None = None
) -> BlockScaledTensor:
    """The codes of `q`'s transpose, decoded in registers; see `fp4dist.numerics.requantize`."""
    if q.rotation != 1:
        raise ValueError(f"requantize needs codes in the original basis, got rotation {q.rotation}")
    return quantize(q, spec, key, reduce_max)


def _eden(
    launch: _Launch, eden: Eden, key: Key | None, reduce_max: ReduceMax | None, codes: Tensor, scales: Tensor
) -> Tensor:
    """Codes and corrected scales, then their global scale, then the stochastic rounding of the scales."""
    corrected = torch.empty(scales.shape, dtype=torch.float32, device=codes.device)
    top = torch.zeros((), dtype=torch.int32, device=codes.device)
    launch.run(codes, corrected, key, v=target_max(E2M1.max, eden.headroom), top=top)
    largest = _finite_or_inf(top)
    largest = reduce_max(largest) if reduce_max is not None else largest
    s_dec = largest / torch.full((), eden.budget, device=codes.device)
    divisor = torch.where(s_dec == 0, 1.0, s_dec)
    blocks = launch.spec.shape[1]
    place = _place(key, corrected.shape[0], corrected.shape[1], blocks)
    number = corrected.numel()
    round_scales_kernel[(-(-number // 1024),)](
        corrected, divisor, scales, number, corrected.shape[1], *place, B=1024, enable_fp_fusion=False
    )
    return torch.where(s_dec.isfinite(), divisor, float("nan"))


@dataclass(frozen=True, slots=True)
class _Launch:
    """One matrix under one spec."""

    src: _Source
    spec: QuantSpec
    signs: Tensor | None

    def grid(self) -> tuple[tuple[int, int], dict[str, object]]:
        """(programs, tile): wide tiles along the dimension that is contiguous in memory."""
        rows, cols = self.src.shape
        size = self.spec.rotation.size if self.spec.rotation else 1
        turned = self.src.codes is not None or self.src.strides[1] != 1
        r, n = (64, max(32, size)) if turned else (16, 128)
        r = max(r, self.spec.shape[0])
        tile = {"R": r, "N": n, "ROT": size, "SIGNED": self.signs is not None, **self.src.constants()}
        return (-(-rows // r), -(-cols // n)), {**tile, "num_warps": 4, "enable_fp_fusion": False}

    def amax(self) -> Tensor:
        """[] fp32 max |x| after the rotation; Inf where something is NaN."""
        top = torch.zeros((), dtype=torch.int32, device=self.src.tensor.device)
        programs, tile = self.grid()
        signs = self.signs if self.signs is not None else self.src.tensor
        steps = min(16, programs[1])
        strips = (programs[0], -(-programs[1] // steps))
        amax_kernel[strips](*self.src.arguments(), signs, top, *self.src.shape, STEPS=steps, **tile)
        return _finite_or_inf(top)

    def run(
        self, codes: Tensor, scales: Tensor, key: Key | None, *, outer: Tensor | None = None, numerator: float = 0.0,
        v: float = 6.0, top: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Fill `codes` and `scales`."""
        spec, rule = self.spec, self.spec.rule
        programs, tile = self.grid()
        none = self.src.tensor
        place = _place(key if isinstance(spec.rounding, Stochastic) else None, *self.src.shape, 8)
        factor = fp32(QUEST_E2M1 if getattr(rule, "factor", None) is None else rule.factor)  # type: ignore[union-attr]
        quantize_kernel[programs](
            *self.src.arguments(), self.signs if self.signs is not None else none, outer if outer is not None else none,
            codes, scales, top if top is not None else none, *self.src.shape, numerator, fp32(1.0 / v), v,
            fp32(1.0 / rule.headroom) if isinstance(rule, Floor) else 1.0,
            fp32(rule.finer_below) if isinstance(rule, Ceil) else 0.0, factor, *place,
            BR=spec.shape[0], BC=spec.shape[1], RULE=_rule_number(spec),
            METRIC={"mse": 0, "mae": 1, "absmax": 2}[rule.metric] if isinstance(rule, FourOverSix) else 0,
            ROUND=int(isinstance(spec.rounding, Stochastic)), STD=isinstance(rule, Quest) and rule.spread == "std",
            NONZERO=isinstance(rule, AbsMax) and rule.nonzero, **tile,
        )  # fmt: skip


def _rule_number(spec: QuantSpec) -> int:
    rule = spec.rule
    if isinstance(spec.rounding, Eden):
        return 7
    if isinstance(rule, Ceil):
        return 2 if rule.of == "ratio" else 3
    if isinstance(rule, Quest):
        return 4 if rule.power == "floor" else 5
    return {AbsMax: 0, Floor: 1, FourOverSix: 6}[type(rule)]


def _common_factor(spec: QuantSpec) -> float:
    """What every value is multiplied with after its power of two."""
    if isinstance(spec.rule, Floor):
        return fp32(spec.rule.headroom)
    return fp32(1.0 / E2M1.max) if isinstance(spec.rule, Ceil) and spec.rule.of == "amax" else 1.0


def _finite_or_inf(top: Tensor) -> Tensor:
    """Magnitude bits -> fp32, NaN made Inf."""
    return top.clamp(max=0x7F800000).view(torch.float32)


def _place(key: Key | None, rows: int, cols: int, group: int) -> tuple[int, ...]:
    """The noise parameters of a shard of [rows, cols] in groups of `group` columns (cols: of groups, if group is a
    block's): key, counter words, global width, and the runs of rows and columns.
    """
    if key is None:
        return (0, 0, 0, 0, 0, 1, rows, 0, 0, cols, 0, 0)
    if len(key.row_runs) > 2 or len(key.column_runs) > 2:
        raise ValueError(f"at most two runs of rows and columns, got {key.row_runs} and {key.column_runs}")
    counted = cols // 8 if group == 8 else cols
    width = key.columns // group if key.columns else counted
    r = (*key.row_runs, 0)[:2]
    c = (*(start // group for start in key.column_runs), 0)[:2]
    return (
        *map(_int32, (key.seed, key.layer, *run_words(key))),
        width,
        rows // len(key.row_runs),
        *r,
        counted // len(key.column_runs),
        *c,
    )


def _int32(word: int) -> int:
    """The int32 of the same 32 bits, so that the kernel is compiled for one type."""
    word &= MASK
    return word - (1 << 32) if word >= 1 << 31 else word
