"""Where the filters of gradients in Triton and their reference differ: on a GPU, or in Triton's interpreter on a CPU.

TRITON_INTERPRET=1 python -m tests.kernels.triton.filters_parity      # exit status 1 if anything differs
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fp4dist import numerics
from fp4dist.kernels.triton import filters
from fp4dist.numerics import BlockScaledTensor, Key, estimators
from fp4dist.numerics.quantize import original
from fp4dist.spec.build import build
from fp4dist.spec.load import load_recipe, shipped
from fp4dist.spec.recipe import SLOTS, QuantSpec
from fp4dist.spec.statistics import Current
from tests.generators import families

KEY = Key(seed=3_000_000_000, layer=4_000_000_000, step=12, micro_batch=5, slot=2)
# Every branch, beside the shipped recipes: fresh signs, wide rotations, square blocks, E4M3 scales, no rotation.
MORE: tuple[dict, ...] = (
    {"format": "mxfp4", "scale": "quest", "rotation": {"size": 64, "signs": "fresh"}, "estimator": "mask"},
    {"format": "mxfp4", "block": [32, 32], "scale": "floor", "estimator": "mask"},
    {"format": "nvfp4", "scale": "quest", "rotation": {"size": 16, "signs": "fixed"}, "estimator": "mask"},
    {"format": "mxfp4", "scale": {"kind": "quest", "spread": "rms"}, "estimator": "mask"},
)


def specs() -> dict[str, QuantSpec]:
    """Every spec with a mask of the shipped recipes, and MORE."""
    found = {build(QuantSpec, data) for data in MORE}
    for name in shipped("recipes"):
        for linear in load_recipe(name).linears.values():
            found |= {spec for slot in SLOTS if (spec := linear.slot(slot)) is not None}
    return {spec.label(): spec for spec in found if filters.why_not(spec) is None}


def matrices(spec: QuantSpec) -> Iterator[tuple[str, Tensor]]:
    """Of sizes that are ragged in tiles; NaN and Inf, values at the end of the grid."""
    rows, columns = (64, 160) if spec.rotation is None or spec.rotation.size < 64 else (32, 384)
    found = families(rows, columns)
    for name in ("outliers", "zero_blocks", "tiny", "huge", "bf16", "ties"):
        yield name, found[name]
    for name, value in (("nan", float("nan")), ("inf", -float("inf"))):
        x = found["normal"].clone()
        x[3, 5] = value
        yield name, x


def differences(device: torch.device) -> Iterator[str]:
    """The mask of every matrix, and gradients of both types that pass it either way."""
    for label, spec in specs().items():
        assert isinstance(spec.amax, Current)
        for name, x in matrices(spec):
            q = numerics.quantize(x, spec, KEY)
            scales, on_device = (q.scales, q.global_scale), (q.scales.to(device), q.global_scale.to(device))
            yield from of_values(f"{label} {name}", q, spec, device)
            kept = estimators.mask(x, *scales, spec, KEY)
            if not torch.equal(filters.mask(x.to(device), *on_device, spec, KEY).cpu(), kept):
                yield f"{label} {name}: mask"
            for g in gradients(x.shape):
                expected = estimators.filter_by_mask(g, kept, spec.rotation, KEY)
                moved = g.to(device)
                if not same(filters.filter_by_mask(moved, kept.to(device), spec.rotation, KEY).cpu(), expected):
                    yield f"{label} {name}: filter_by_mask in {g.dtype}"
                if not same(filters.filter_by_scales(moved, x.to(device), *on_device, spec, KEY).cpu(), expected):
                    yield f"{label} {name}: filter_by_scales in {g.dtype}"


def of_values(what: str, q: BlockScaledTensor, spec: QuantSpec, device: torch.device) -> Iterator[str]:
    """Codes turned back into the original basis, in fp32 and bf16."""
    if spec.rotation is None or filters.why_no_original(q) is not None:
        return
    moved = replace(q, **{n: getattr(q, n).to(device) for n in ("codes", "scales", "global_scale")})
    expected = original(q, spec.rotation, KEY)
    for dtype in (torch.float32, torch.bfloat16):
        if not same(filters.original(moved, spec.rotation, KEY, dtype).cpu(), expected.to(dtype)):
            yield f"{what}: original in {dtype}"


def gradients(shape: torch.Size) -> Iterator[Tensor]:
    """fp32 and bf16; an Inf that the mask may stop, subnormal values."""
    g = families(*shape, seed=1)["normal"] * 1e-4
    g[1, ::3] *= 1e-36
    yield g
    g = g.clone()
    g[2, 7] = float("inf")
    yield g.bfloat16()


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits, any NaN for a NaN."""
    if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
        return False
    bits = torch.int32 if a.dtype == torch.float32 else torch.int16
    return torch.equal(*(torch.where(t.isnan(), 0, t.contiguous()).view(bits) for t in (a, b)))


def main() -> int:
    """Print every difference."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = list(differences(device))
    print("\n".join(found) if found else f"no difference in {len(specs())} specs on {device}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
