"""Quantizers beyond those of the first recipes (tests/generators.py), one for each block of the vocabulary.

Tests that hold for every quantizer run over all of them.
"""

from __future__ import annotations

from typing import Any

from fp4dist.spec.build import build
from fp4dist.spec.recipe import QuantSpec

SR: dict[str, Any] = {"rounding": "stochastic"}
CLIPS: dict[str, Any] = {"rounding": "stochastic", "allow_bias": True}
INVERSE = {"element": "e2m1", "scale": "e4m3_inverse", "block": [1, 16], "outer": "tensor"}


def grid(element: str, block: Any = "tensor", scale: str = "fp32", outer: Any = "none") -> dict[str, Any]:
    """A format spelled out."""
    return {"element": element, "scale": scale, "block": block, "outer": outer}


EXTRA: dict[str, dict[str, Any]] = {
    # grids
    "e1m2_1x16": {"format": grid("e1m2", [1, 16])},
    "e3m0_row": {"format": grid("e3m0", "row")},
    "int4_1x128": {"format": "int4", "block": [1, 128]},
    "int2": {"format": grid("int2")},
    "radix4_even": {"format": grid("radix4_even")},
    "radix4_odd": {"format": grid("radix4_odd"), "scale": {"kind": "absmax", "headroom": 2}},
    "log8": {"format": grid("log8"), **SR},
    "fp8_e4m3": {"format": "fp8_e4m3"},
    "fp8_e5m2": {"format": "fp8_e5m2"},
    "mxfp8": {"format": "mxfp8"},
    # blocks and outer levels
    "fp4_tensor": {"format": "fp4_row", "block": "tensor"},
    "fp4_row": {"format": "fp4_row"},
    "fp4_row_pow2": {"format": "fp4_row", "scale": "ceil"},
    "nvfp4_32x32": {"format": "nvfp4", "block": [32, 32]},
    "nvfp4_1x256": {"format": "nvfp4", "block": [1, 256]},
    "nvfp4_tile": {"format": "nvfp4", "outer": [1, 128]},
    "nvfp4_tile_16x64": {"format": "nvfp4", "block": [16, 16], "outer": [16, 64]},
    "nvfp4_row": {"format": "nvfp4", "outer": "row"},
    "nvfp4_no_outer": {"format": "nvfp4", "outer": "none"},
    # scale formats and rules
    "ue5m3": {"format": "ue5m3_fp4"},
    "ue5m3_2048": {"format": "ue5m3_fp4", "scale": {"kind": "absmax", "budget": 2048, "nonzero": True}},
    "inverse": {"format": INVERSE},
    "mxfp4_ceil_amax": {"format": "mxfp4", "scale": {"kind": "ceil", "of": "amax"}},
    "mxfp4_finer": {"format": "mxfp4", "block": [32, 32], "scale": {"kind": "ceil", "of": "amax", "finer_below": 0.87}},
    "quest": {"format": "mxfp4", "scale": "quest"},
    "quest_nearest": {"format": "mxfp4", "scale": {"kind": "quest", "power": "nearest"}},
    "quest_nvfp4": {"format": "nvfp4", "scale": {"kind": "quest", "spread": "rms"}},
    "quest_tensor": {"format": "fp4_row", "block": "tensor", "scale": {"kind": "quest", "spread": "rms"}},
    "sawb": {"format": "int4", "scale": "sawb"},
    "sawb_row": {"format": "int4", "block": "row", "scale": "sawb"},
    "mse_nvfp4": {"format": "nvfp4", "scale": {"kind": "mse_search", "steps": 8, "lowest": 0.6}},
    "mse_row": {"format": "int4", "block": "row", "scale": {"kind": "mse_search", "steps": 8, "lowest": 0.6}},
    "best_of_row": {"format": "nvfp4", "outer": "row", "scale": {"kind": "best_of", "also": ["15/16"]}},
    "tile_46": {"format": "nvfp4", "outer": [1, 128], "scale": "four_over_six"},
    # roundings
    "nvfp4_away": {"format": "nvfp4", "rounding": {"kind": "nearest", "ties": "away"}},
    "luq": {"format": "log7", **SR},
    "luq_smp2": {"format": "log7", "rounding": {"kind": "stochastic", "samples": 2}},
    "luq_1x32": {"format": "log7", "block": [1, 32], **SR},
    "luq_low": {"format": "log7", "scale": {"kind": "absmax", "headroom": 0.8}, **CLIPS},
    "radix4_sr": {"format": grid("radix4_even"), **SR},
    "mxfp4_sr_clips": {"format": "mxfp4", **CLIPS},
    "inverse_sr": {"format": INVERSE, **CLIPS},
    "tile_sr": {"format": "nvfp4", "outer": [1, 128], "scale": {"kind": "absmax", "headroom": "17/16"}, **SR},
    "tile_sr_clips": {"format": "nvfp4", "outer": [1, 128], "scale": {"kind": "absmax", "nonzero": True}, **CLIPS},
    "ue5m3_sr": {"format": "ue5m3_fp4", "scale": {"kind": "absmax", "headroom": "17/16"}, **SR},
    "e1m2_sr": {"format": grid("e1m2", [1, 16]), **SR},
    "int4_row_sr": {"format": "int4", "block": "row", **SR},
    "fp8_e5m2_sr": {"format": "fp8_e5m2", **SR},
    "ceil_amax_sr": {"format": "mxfp4", "scale": {"kind": "ceil", "of": "amax"}, **SR},
    "nvfp4_sr3": {
        "format": "nvfp4",
        "scale": {"kind": "absmax", "headroom": "17/16"},
        "rounding": {"kind": "stochastic", "samples": 3},
    },
    # rotations
    "rht32": {"format": "mxfp4", "rotation": {"size": 32, "signs": "fixed", "mask": 0xD7E8D7E8}},
}  # fmt: skip


def extra(name: str) -> QuantSpec:
    """The QuantSpec called `name` in EXTRA."""
    return build(QuantSpec, EXTRA[name])
