"""Every kernel of csrc/ once, on small shapes that end inside a tile: what compute-sanitizer watches.

compute-sanitizer --tool memcheck python -m tests.kernels.cuda.touch
compute-sanitizer --tool racecheck python -m tests.kernels.cuda.touch
python -m tests.kernels.cuda.touch 0 2      # of the quantizers every second one from the first on, no general ones
"""

from __future__ import annotations

import sys

import torch

from fp4dist.kernels.cuda import decode, filters, grids, ops, parts, quantize, quantizers
from fp4dist.numerics.splits import Place
from fp4dist.numerics.tensor import BlockScaledTensor, Want
from fp4dist.spec.blocks import Ema
from fp4dist.spec.build import build
from fp4dist.spec.estimators import Dge
from fp4dist.spec.formats import E2M1, FP4_ROW, NVFP4
from fp4dist.spec.recipe import QuantSpec
from fp4dist.spec.splits import Occ, TopK
from tests.kernels.cuda import more_parity
from tests.kernels.cuda.parity import use_ours
from tests.kernels.triton import filters_parity, grids_parity
from tests.kernels.triton import parity as matrix


def general(device: torch.device) -> int:
    """The general quantizer and decoder, rows and columns of either type; how many calls."""
    calls = 0
    more_parity.use_ours()
    for spec in grids_parity.specs().values():
        rows, cols = 3 * spec.rows_multiple, 3 * spec.columns_multiple
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.randn((rows, cols), device=device).to(dtype)
            for source in (x, x.t().contiguous().t()):
                toward = source.float() * 1.1 if isinstance(spec.rounding, Ema) else None
                q = grids.quantize(source, spec, grids_parity.WHOLE, None, toward)
                assert isinstance(q, BlockScaledTensor)
                quantizers.dequantize(q)
                if quantizers.why_not_carrier(q, torch.bfloat16) is None:
                    quantizers.to_carrier(q, torch.bfloat16)
                calls += 1
    return calls


def of_filters(device: torch.device) -> int:
    """Masks, gradients under them, codes turned back; how many calls."""
    calls = 0
    for spec in filters_parity.specs().values():
        shape = 3 * spec.rows_multiple, 3 * spec.columns_multiple
        for dtype in (torch.bfloat16, torch.float32):
            x, g = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
            q = quantizers.quantize(x, spec, filters_parity.KEY)
            assert isinstance(q, BlockScaledTensor)
            scales = q.scales, q.global_scale
            kept = filters.mask(x, *scales, spec, filters_parity.KEY)
            filters.filter_by_mask(g, kept, spec.rotation, filters_parity.KEY)
            into = torch.zeros(shape, device=device)
            filters.filter_by_mask(g, kept, spec.rotation, filters_parity.KEY, into=into)
            filters.filter_by_scales(g, x, *scales, spec, filters_parity.KEY)
            quantizers.original(q, spec.rotation, filters_parity.KEY)
            calls += 5
    return calls


def of_parts(device: torch.device) -> int:
    """What is taken out of operands, slopes, terms, on shapes that end inside a block of threads; how many calls."""
    marks = torch.arange(96, device=device) % 5 == 2
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn((70, 96), device=device).to(dtype)
        q = quantizers.quantize(x[:64], QuantSpec(format=NVFP4))
        assert isinstance(q, BlockScaledTensor)
        for precision in ("bf16", "mxfp8"):
            parts.take_channels(x, precision, Place(channels=marks))
            parts.take_channels(x[:64].t(), precision, Place(channels=marks, channel_dim=0))
        parts.in_precision(x, "mxfp8", dtype, Place())
        parts.in_precision(x[:64].t(), "mxfp8", dtype, Place())
        parts.hot_residual(x[:64], q, QuantSpec(format=NVFP4), dtype, Place(channels=marks))
    parts.split_terms(x)
    parts.slope(x, E2M1, Dge())
    for columns in (1, 100, 1032, 5000):
        row = torch.randn((3, columns), device=device).bfloat16()
        parts.decompose(row, QuantSpec(format=FP4_ROW, outlier=Occ()), Place(token_dim=0))
    parts.decompose(x.bfloat16(), QuantSpec(format=NVFP4, outlier=TopK(k=2, group=32)), Place())
    return 21


def main(device: torch.device) -> int:
    """Run all; what they compute is checked by `parity`."""
    use_ours()
    if len(sys.argv) > 1:
        matrix._part[0] = slice(int(sys.argv[1]), None, int(sys.argv[2]))
    forward = [build(QuantSpec, data) for data in matrix.FORWARD]
    calls = 0
    for spec in matrix.specs().values():
        rows, cols = 3 * spec.rows_multiple, 3 * spec.columns_multiple
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.randn((rows, cols), device=device).to(dtype)
            turned = (torch.randn((cols, n), device=device).to(dtype).t() for n in (rows, 2 * rows))  # odd and even
            for source in (x, *turned):
                want = Want(True, torch.bfloat16)
                q = quantize.quantize(source, spec, matrix.WHOLE, want=want)
                assert isinstance(q, BlockScaledTensor)
                decode.dequantize(q)
                decode.swizzled(q)
                calls += 1
        for other in forward:
            size = max(spec.rows_multiple, other.columns_multiple)
            w = torch.randn(
                (3 * spec.columns_multiple // other.rows_multiple * other.rows_multiple, 3 * size), device=device
            )
            if w.shape[0] % spec.columns_multiple == 0:
                q = quantize.quantize(w, other)
                assert isinstance(q, BlockScaledTensor)
                quantize.requantize(q, spec, matrix.WHOLE)
                calls += 1
        if spec.format.scale.name == "e8m0":
            memory = torch.zeros(8, dtype=torch.int32, device=device)
            for want in (Want(False, torch.float8_e5m2), Want(True, torch.float8_e4m3fn, True, memory)):
                quantize.quantize(x, spec, matrix.WHOLE, want=want)
                calls += 1
    for row, column in matrix.pairs():
        size = max(s.columns_multiple for s in (row, column))
        x = torch.randn((3 * size, 3 * size), device=device).to(torch.bfloat16)
        quantize.quantize_pair(x, quantize.Side(row, matrix.WHOLE), quantize.Side(column, matrix.WHOLE))
        calls += 1
    ops.amax(torch.randn(1237, device=device))
    calls += of_filters(device) + of_parts(device) + (0 if len(sys.argv) > 1 else general(device))
    print(f"{calls} calls")
    return 0


if __name__ == "__main__":
    sys.exit(main(torch.device("cuda")))
