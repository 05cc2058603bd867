"""Every kernel of csrc/ once, on small shapes that end inside a tile: what compute-sanitizer watches.

compute-sanitizer --tool memcheck python -m tests.kernels.cuda.touch
compute-sanitizer --tool racecheck python -m tests.kernels.cuda.touch
"""

from __future__ import annotations

import sys

import torch

from fp4dist.kernels.cuda import decode, ops, quantize
from fp4dist.numerics.tensor import BlockScaledTensor, Want
from fp4dist.spec.build import build
from fp4dist.spec.recipe import QuantSpec
from tests.kernels.cuda.parity import use_ours
from tests.kernels.triton import parity as matrix


def main(device: torch.device) -> int:
    """Run all; what they compute is checked by `parity`."""
    use_ours()
    forward = [build(QuantSpec, data) for data in matrix.FORWARD]
    calls = 0
    for spec in matrix.specs().values():
        rows, cols = 3 * spec.rows_multiple, 3 * spec.columns_multiple
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.randn((rows, cols), device=device).to(dtype)
            for source in (x, torch.randn((cols, rows), device=device).to(dtype).t()):
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
            quantize.quantize(x, spec, matrix.WHOLE, want=Want(False, torch.float8_e5m2))
    for row, column in matrix.pairs():
        size = max(s.columns_multiple for s in (row, column))
        x = torch.randn((3 * size, 3 * size), device=device).to(torch.bfloat16)
        quantize.quantize_pair(x, quantize.Side(row, matrix.WHOLE), quantize.Side(column, matrix.WHOLE))
        calls += 1
    ops.amax(torch.randn(1237, device=device))
    print(f"{calls} calls")
    return 0


if __name__ == "__main__":
    sys.exit(main(torch.device("cuda")))
