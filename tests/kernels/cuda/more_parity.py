"""Where csrc's general quantizer and filters and the reference differ, over the matrices of Triton's.

python -m tests.kernels.cuda.more_parity         # on a GPU, with the extension built; exit status 1 if one differs
python -m tests.kernels.cuda.more_parity 3 8     # every eighth spec from the fourth on, for several processes
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fp4dist import numerics
from fp4dist.kernels.cuda import filters, grids, quantizers
from fp4dist.kernels.cuda import matmul as products
from fp4dist.numerics.matmul import Operand
from fp4dist.numerics.tensor import BlockScaledTensor
from fp4dist.spec.build import build
from fp4dist.spec.recipe import QuantSpec
from tests.generators import families
from tests.kernels.triton import filters_parity, grids_parity

EDEN: tuple[tuple[int, dict[str, Any]], ...] = (  # rotation, and the rounding
    (16, {"align": "pre"}), (32, {"align": "pre", "four_over_six": "mse"}), (128, {"four_over_six": "mae"}),
    (64, {"group": "rotation", "truncate": 4}), (128, {"group": "rotation", "four_over_six": "absmax"}),
    (128, {"align": "pre", "group": "rotation", "four_over_six": "mse"}),
)  # fmt: skip
# Beside Triton's matrices: what the general kernel alone does of formats that hot kernels serve, so that both are held
# against the reference, and blocks of other sizes.
MORE: tuple[dict[str, Any], ...] = (
    {"format": "nvfp4", "block": [16, 16], "scale": "four_over_six"},
    {"format": "nvfp4", "block": [1, 32], "scale": {"kind": "four_over_six", "metric": "absmax"}},
    {"format": "mxfp4", "block": [1, 16], "rounding": "stochastic", "scale": "ceil"},
    {"format": "mxfp4", "block": [32, 32], "scale": {"kind": "quest", "power": "nearest"}},
    {"format": "ue5m3_fp4", "rotation": {"size": 64, "signs": "fresh"}},
    {"format": {"element": "int4", "scale": "e4m3", "block": [1, 256]}, "outer": "none"},
    {"format": "nvfp4", "scale": {"kind": "mse_search", "steps": 12}},
    {"format": {"element": "int4", "scale": "fp32", "block": [1, 32]}, "scale": {"kind": "mse_search", "steps": 5}},
    {"format": "nvfp4", "scale": {"kind": "best_of"}},
    {"format": "nvfp4", "scale": {"kind": "four_over_six", "headroom": "17/16"}, "rounding": "stochastic",
     "allow_bias": True},
    *({"format": "nvfp4", "rounding": {"kind": "eden", **more}, "rotation": {"size": size, "signs": "fresh"}}
      for size, more in EDEN),
)  # fmt: skip


LARGE = ({"format": "mxfp4", "block": [64, 64], "scale": {"kind": "quest"}}, {"format": "nvfp4", "block": [64, 64]})


def multiply(a: Operand, b: Operand) -> Tensor:
    """Products that need no FP4 tensor cores; those of codes that they take are the reference's here."""
    if isinstance(a, BlockScaledTensor) and isinstance(b, BlockScaledTensor) and products.takes(a, b):
        return numerics.matmul(a, b)
    return products.matmul(a, b)


class Grids:
    """`fp4dist.kernels.triton.grids`, as csrc does it."""

    why_not = staticmethod(grids.why_not)
    quantize = staticmethod(grids.quantize)
    requantize = staticmethod(lambda q, spec, key: grids.quantize(q, spec, key))
    dequantize = staticmethod(grids.dequantize)
    has_values = staticmethod(grids.has_values)
    why_not_carrier = staticmethod(grids.why_not_carrier)
    to_carrier = staticmethod(grids.to_carrier)


class Filters:
    """`fp4dist.kernels.triton.filters`, as csrc does it."""

    why_not = staticmethod(filters.why_not)
    mask = staticmethod(filters.mask)
    filter_by_mask = staticmethod(filters.filter_by_mask)
    filter_by_scales = staticmethod(filters.filter_by_scales)
    why_no_original = staticmethod(filters.why_no_original)
    original = staticmethod(filters.original)


def use_ours(part: slice = slice(None)) -> None:
    """The matrices, with these kernels in place of Triton's."""
    _replace(
        grids_parity, {"grids": Grids, "grid_values": Grids, "matmul": multiply, "MORE": (*grids_parity.MORE, *MORE)}
    )
    _replace(filters_parity, {"filters": Filters})
    for module in (grids_parity, filters_parity):
        every: Callable[[], dict[str, QuantSpec]] = module.specs
        found = every()
        kept = {label: found[label] for label in sorted(found)[part]}
        _replace(module, {"specs": lambda kept=kept: kept})


def _replace(module: ModuleType, names: dict[str, Any]) -> None:
    for name, value in names.items():
        assert hasattr(module, name), name
        setattr(module, name, value)


def lacking() -> list[str]:
    """Specs of Triton's general matrix that csrc does not take."""
    from fp4dist.kernels.triton import grids as theirs

    every = {spec.label(): spec for spec in (build(QuantSpec, data) for data in grids_parity.MORE)}
    return [label for label, spec in every.items() if theirs.why_not(spec) is None and quantizers.why_not(spec)]


def of_large_blocks(device: torch.device) -> Iterator[str]:
    """Blocks whose threads are in several warps."""
    x = families(128, 192)["outliers"]
    for spec in (build(QuantSpec, data) for data in LARGE):
        expected = numerics.quantize(x, spec)
        yield from grids_parity.differences(spec.label(), expected, grids.quantize(x.to(device), spec))


def differences(device: torch.device) -> Iterator[str]:
    """Everything that differs."""
    for check in ("quantizers", "requantizers", "shards", "products"):
        yield from getattr(grids_parity, f"of_{check}")(device)
    yield from of_large_blocks(device)
    yield from filters_parity.differences(device)


def main(device: torch.device) -> int:
    """Print every difference."""
    part = slice(int(sys.argv[1]), None, int(sys.argv[2])) if len(sys.argv) > 2 else slice(None)
    use_ours(part)
    found = [*lacking(), *differences(device)]
    number = len(grids_parity.specs()) + len(filters_parity.specs())
    print("\n".join(found) if found else f"no difference in {number} specs on {device}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(torch.device("cuda")))
