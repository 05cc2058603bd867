"""Whole linears, forward and backward, under a plan of csrc's kernels and under one of the reference.

python -m tests.kernels.cuda.linears [RECIPE ...]      # exit status 1 if one differs

On a GPU (with the extension built) all shipped recipes, else some on a CPU (`emulated`). The plan is that of compute
capability 10.0, except that codes which its tensor cores multiply go as carriers.
"""

from __future__ import annotations

import sys

import torch

from fp4dist.spec.load import shipped
from tests.kernels.cuda import emulated, faked
from tests.kernels.triton import linears_parity

# masks and rotated codes, outer scales of parts, several samples, fp32 scales of rows and of short blocks, averages
CHOSEN = ("luq", "quartet", "quest_mxfp4", "tetrajet_qema", "tetrajet_v2", "ue5m3", "ufp4", "wang2501")


def main() -> int:
    """Print every difference."""
    on_gpu = torch.cuda.is_available()
    faked.pretend((10, 0))
    if not on_gpu:
        emulated.load()
    faked.register()
    from fp4dist.kernels.cuda import matmul

    matmul.takes = lambda a, b: False
    names = sys.argv[1:] or (shipped("recipes") if on_gpu else CHOSEN)
    found = list(linears_parity.differences(names, torch.device("cuda" if on_gpu else "cpu"), "cuda"))
    print("\n".join(found) if found else f"no difference in linears of {len(names)} recipes")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
