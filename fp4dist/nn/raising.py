"""Linears whose GEMMs run in a higher precision than their recipe says: unquantized, or with FP8 operands."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from fp4dist.spec.formats import Format
from fp4dist.spec.operand import QuantSpec
from fp4dist.spec.recipe import GEMMS, Dgrad, Fprop, LinearRecipe, Wgrad
from fp4dist.spec.splits import Channels

PRECISIONS = ("bf16", "fp8")
_FP8 = QuantSpec(format=Format.from_name("mxfp8"))  # E4M3 in blocks of 32: fine enough for gradients too


def raised(linear: LinearRecipe, gemms: dict[str, str]) -> LinearRecipe:
    """`linear` with some of its GEMMs in another precision.

    gemms   GEMM -> bf16 or fp8. A backward operand that would start from forward codes which are no longer there, or no
            longer FP4's, starts from the high-precision tensor; `dequant` then is that tensor
    """
    if wrong := {*gemms} - {*GEMMS} or {*gemms.values()} - {*PRECISIONS}:
        raise ValueError(f"{sorted(wrong)}: GEMMs are {', '.join(GEMMS)}, precisions {', '.join(PRECISIONS)}")
    slots = {gemm: _FP8 if to == "fp8" else None for gemm, to in gemms.items()}
    fprop, dgrad, wgrad = linear.fprop, linear.dgrad, linear.wgrad
    if "fprop" in gemms:
        fprop = Fprop(x=slots["fprop"], w=slots["fprop"])
        dgrad = replace(dgrad, w=_from_master(dgrad.w))
        wgrad = replace(wgrad, x=_from_master(wgrad.x))
    if "dgrad" in gemms:
        dgrad = Dgrad(dy=slots["dgrad"], w=slots["dgrad"])
    if "wgrad" in gemms:
        wgrad = Wgrad(dy=slots["wgrad"], x=slots["wgrad"])
    return LinearRecipe(fprop=fprop, dgrad=dgrad, wgrad=wgrad)


def _from_master(spec: QuantSpec | str | None) -> QuantSpec | None:
    """Channels that fprop.x has chosen are not chosen any more."""
    if not isinstance(spec, QuantSpec):
        return None
    return replace(spec, source="master", outlier=None if isinstance(spec.outlier, Channels) else spec.outlier)


def merged(
    kept: dict[str, dict[str, str]], paths: Iterable[str], gemms: Iterable[str], to: str
) -> dict[str, dict[str, str]]:
    """`kept` (path -> GEMM -> precision) with more raised; what is in bf16 stays there."""
    out = {path: dict(found) for path, found in kept.items()}
    for path in paths:
        for gemm in gemms:
            if out.setdefault(path, {}).get(gemm) != "bf16":
                out[path][gemm] = to
    return out
