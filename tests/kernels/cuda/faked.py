"""Which backend every operation of every shipped recipe resolves to on GPUs that are not there, and why not csrc/.

    python -m tests.kernels.cuda.faked 10.0 9.0     # compute capabilities

Lines: capability recipe linear operation backend reason, tabs between them.

The extension's operators are the emulator's: only their names matter here, nothing runs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

from fp4dist.spec.load import load_recipe, shipped
from fp4dist.spec.recipe import LinearRecipe
from fp4dist.spec.run import BackendConfig
from tests.kernels.cuda import emulated


def lines(recipe: LinearRecipe) -> Iterator[tuple[str, str, str]]:
    """(slot or GEMM, backend, why not csrc/) of one linear."""
    from fp4dist.nn.plan import resolve_kernels
    from fp4dist.nn.reasons import why_not_cuda

    device = torch.device("cuda")
    kernels = resolve_kernels(recipe, device, BackendConfig())
    reasons = why_not_cuda(recipe, kernels, device, BackendConfig())
    for name, kernel in kernels.items():
        yield f"{name}:{kernel.op}", kernel.backend, reasons[name][1] if name in reasons else ""
    for name, (op, reason) in reasons.items():
        if name not in kernels:
            yield f"{name}:{op}", "torch", reason


def pretend(capability: tuple[int, int]) -> None:
    """A GPU of this compute capability; what is compiled at run time is still for the one that is there, if one is."""
    if torch.cuda.device_count():  # Triton keeps the function that it first found
        from triton.runtime import driver

        driver.active.get_current_target()
    torch.cuda.get_device_capability = lambda device=None: capability
    torch.cuda.is_available = lambda: True


def register() -> None:
    """The backend, whose operators are there."""
    from fp4dist.kernels import cuda, registry

    if cuda.MISSING is not None:
        from fp4dist.kernels.cuda import ops as ops

        registry._MISSING.pop("cuda", None)


def main() -> int:
    """Print every line."""
    emulated.load()
    for capability in sys.argv[1:]:
        major, minor = capability.split(".")
        pretend((int(major), int(minor)))
        register()
        for name in shipped("recipes"):
            for linear, recipe in load_recipe(name).linears.items():
                for what, backend, reason in lines(recipe):
                    print(f"{capability}\t{name}\t{linear}\t{what}\t{backend}\t{reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
