"""Which backend every operation of every shipped recipe resolves to on a GPU that is not there, and why not csrc/.

    python -m tests.kernels.cuda.faked 10 0       # capability 10.0; lines: recipe linear operation backend reason

The extension's operators are the emulator's: only their names matter here, nothing runs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

from fp4dist.spec.load import load_recipe, shipped
from fp4dist.spec.recipe import GEMMS, SLOTS, LinearRecipe
from fp4dist.spec.run import BackendConfig
from tests.kernels.cuda import emulated


def lines(recipe: LinearRecipe) -> Iterator[tuple[str, str, str]]:
    """(slot or GEMM, backend, why not csrc/) of one linear."""
    from fp4dist.kernels.registry import Request, explain
    from fp4dist.nn.plan import resolve_kernels
    from fp4dist.numerics.splits import bare

    device = torch.device("cuda")
    for name, kernel in resolve_kernels(recipe, device, BackendConfig()).items():
        spec = recipe.slot(name) if name in SLOTS else None
        if name in GEMMS:
            spec = next((recipe.slot(s) for s in SLOTS if s.startswith(name) and recipe.slot(s)), None)
        asked = Request(kernel.op, bare(spec) if spec is not None else None, device)
        reason = "" if kernel.backend == "cuda" else explain(asked, BackendConfig())["cuda"]
        yield f"{name}:{kernel.op}", kernel.backend, reason


def main() -> int:
    """Print every line."""
    capability = int(sys.argv[1]), int(sys.argv[2])
    torch.cuda.get_device_capability = lambda device=None: capability
    torch.cuda.is_available = lambda: True
    emulated.load()
    from fp4dist.kernels import cuda, registry

    if cuda.MISSING is not None:
        from fp4dist.kernels.cuda import ops as ops

        registry._MISSING.pop("cuda", None)
    for name in shipped("recipes"):
        for linear, recipe in load_recipe(name).linears.items():
            for what, backend, reason in lines(recipe):
                print(f"{name}\t{linear}\t{what}\t{backend}\t{reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
