"""NVFP4 codes and scales against Transformer Engine's formulas, re-derived here in numpy fp32 scalar arithmetic order.

S_enc = min(2688 / amax, FLT_MAX); s = e4m3(min(amax_b * (S_enc * (1/6)), 448));
enc = min(1 / (s * (1/S_enc)), FLT_MAX); q = e2m1(clamp(x * enc, -6, 6)).
E2M1 and E4M3 casts are ml_dtypes', so nothing of ours is used on the oracle's side.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from fp4dist.numerics import quantize
from fp4dist.numerics.codes import unpack
from tests.generators import families, spec

F = np.float32
FLT_MAX = np.finfo(F).max


def te_quantize(x: np.ndarray, block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """(codes [R, C], scale bytes [R/br, C/16], S_dec)."""
    rows, columns = x.shape
    amax = F(np.abs(x).max())
    with np.errstate(divide="ignore", over="ignore"):
        s_enc = F(min(F(448 * 6) / amax, FLT_MAX)) if amax > 0 else F(1)
    s_enc = s_enc if s_enc != 0 else F(1)
    blocks = x.reshape(rows // block[0], block[0], columns // block[1], block[1])
    amax_b = np.abs(blocks).max(axis=(1, 3)).astype(F)
    scale = np.minimum(amax_b * F(s_enc * (F(1) / F(6))), F(448)).astype(ml_dtypes.float8_e4m3fn)
    with np.errstate(divide="ignore", over="ignore"):
        enc = np.minimum(F(1) / (scale.astype(F) * F(F(1) / s_enc)), FLT_MAX).astype(F)
    with np.errstate(over="ignore"):
        u = np.clip(blocks * enc[:, None, :, None], F(-6), F(6)).astype(F).reshape(rows, columns)
    return u.astype(ml_dtypes.float4_e2m1fn).view(np.uint8), scale.view(np.uint8), F(F(1) / s_enc)


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_16x16"])
@pytest.mark.parametrize("family", list(families(32, 64)))
def test_bits(name: str, family: str) -> None:
    x = families(32, 64)[family]
    quantized = quantize(x, spec(name))
    codes, scales, s_dec = te_quantize(x.float().numpy(), spec(name).shape)
    assert np.array_equal(quantized.scales.numpy(), scales)
    assert np.array_equal(unpack(quantized.codes).numpy(), codes)
    assert quantized.global_scale.numpy() == s_dec
