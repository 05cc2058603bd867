"""The source of shapes and input families that tests and benchmarks share."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4dist.numerics import BlockScaledTensor
from fp4dist.spec.build import build
from fp4dist.spec.formats import NVFP4
from fp4dist.spec.recipe import QuantSpec

# Every quantizer this release ships, and the published comparisons: name -> YAML data.
SPECS: dict[str, dict] = {
    "nvfp4": {"format": "nvfp4"},
    "nvfp4_256": {"format": "nvfp4", "scale": {"kind": "absmax", "budget": 256}},
    "nvfp4_clip": {"format": "nvfp4", "scale": {"kind": "absmax", "headroom": 0.988125}},
    "nvfp4_16x16": {"format": "nvfp4", "block": [16, 16]},
    "nvfp4_46": {"format": "nvfp4", "scale": "four_over_six"},
    "nvfp4_46_448": {"format": "nvfp4", "scale": {"kind": "four_over_six", "budget": 448}},
    "nvfp4_46_mae": {"format": "nvfp4", "scale": {"kind": "four_over_six", "metric": "mae"}},
    "nvfp4_46_absmax": {"format": "nvfp4", "scale": {"kind": "four_over_six", "metric": "absmax"}},
    "nvfp4_46_16x16": {"format": "nvfp4", "block": [16, 16], "scale": "four_over_six"},
    "nvfp4_best": {"format": "nvfp4", "scale": {"kind": "best_of", "also": ["3/2", "15/16", "17/16"]}},
    "nvfp4_best_16x16": {
        "format": "nvfp4",
        "block": [16, 16],
        "scale": {"kind": "best_of", "also": ["5/4"], "metric": "mae"},
    },
    "nvfp4_sr": {"format": "nvfp4", "rounding": "stochastic", "scale": {"kind": "absmax", "headroom": "17/16"}},
    "nvfp4_sr_clips": {"format": "nvfp4", "rounding": "stochastic", "allow_bias": True},
    "nvfp4_46_sr": {
        "format": "nvfp4",
        "rounding": "stochastic",
        "scale": {"kind": "four_over_six", "headroom": "17/16"},
        "allow_bias": True,
    },
    "eden": {"format": "nvfp4", "rounding": "eden", "rotation": {"size": 128, "signs": "fresh"}},
    "eden_46": {
        "format": "nvfp4",
        "rounding": {"kind": "eden", "four_over_six": "mse"},
        "rotation": {"size": 128, "signs": "fresh"},
    },
    "eden_pre": {
        "format": "nvfp4",
        "rounding": {"kind": "eden", "align": "pre"},
        "rotation": {"size": 128, "signs": "fresh"},
    },
    "mxfp4": {"format": "mxfp4"},
    "mxfp4_ceil": {"format": "mxfp4", "scale": "ceil"},
    "mxfp4_34": {"format": "mxfp4", "scale": {"kind": "floor", "headroom": "4/3"}},
    "mxfp4_34_sr": {"format": "mxfp4", "rounding": "stochastic", "scale": {"kind": "floor", "headroom": "4/3"}},
    "mxfp4_ceil_sr": {"format": "mxfp4", "rounding": "stochastic", "scale": "ceil"},
}


def spec(name: str) -> QuantSpec:
    """The QuantSpec called `name` in SPECS."""
    return build(QuantSpec, SPECS[name])


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    """[rows, columns] fp32 N(0, 1)."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def families(rows: int, columns: int, seed: int = 0) -> dict[str, Tensor]:
    """Inputs that break quantizers: zeros, ties, subnormal blocks, outliers, wide ranges, sparse, one-hot."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    index = torch.randint(0, 8, (rows, columns), generator=generator)
    sign = torch.randint(0, 2, (rows, columns), generator=generator) * 2 - 1
    outliers = x.clone()
    outliers[:, ::64] *= 30
    zero_blocks = x.clone()
    zero_blocks[:, : columns // 2] = 0
    one_hot = torch.zeros(rows, columns)
    one_hot[:, 3] = 1.0
    return {
        "normal": x,
        "zeros": torch.zeros(rows, columns),
        "ties": ties[index] * sign,
        "outliers": outliers,
        "zero_blocks": zero_blocks,
        "row_scales": x * torch.exp2(torch.arange(rows).remainder(24).float() - 12)[:, None],
        "tiny": x * 1e-38,
        "huge": x * 1e35,
        "one_hot": one_hot,
        "bf16": x.bfloat16(),
    }


def exactly_summable(rows: int, columns: int, seed: int = 0) -> BlockScaledTensor:
    """NVFP4 with block scales in {1, 2} and tensor scale 1: every partial sum of a product with K <= 4096 is a multiple
    of 1/4 below 2**24, so any order of summation gives the same fp32.
    """
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, columns // 2), generator=generator, dtype=torch.uint8)
    one, two = 0x38, 0x40  # E4M3
    scales = torch.where(torch.randint(0, 2, (rows, columns // 16), generator=generator) == 1, two, one).to(torch.uint8)
    return BlockScaledTensor(codes, scales, torch.ones(()), NVFP4, (1, 16))
