"""tools/bench_host.py without a GPU: launches and calls of cuBLASLt become calls of nothing, the rest runs as on one.

    python -m tests.kernels.triton.host_time --profile 25

That counts calls, and compares two versions of this package on one machine (PYTHONPATH says which); its times are no
GPU's host times: memory comes from the CPU's allocator, and Triton's and CUDA's part of a launch is missing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime import jit

from fp4dist.kernels import cublaslt, registry
from fp4dist.kernels.triton import amaxes, eden, filters, matmul, power_forms, powers, quantize
from fp4dist.kernels.triton import launch as launching
from tools import bench_host


@contextmanager
def nothing_runs() -> Iterator[None]:
    """Kernels on the CPU that do nothing, behind the launches of a GPU that multiplies FP8."""
    compiled = SimpleNamespace(function=1, packed_metadata=(), run=lambda *_: None)
    nothing = SimpleNamespace(cublasLtMatmul=_c_function(), cublasLtMatmulDescSetAttribute=lambda *_: 0)
    scales = cublaslt._scales_of(ctypes.c_void_p(1))
    plan = cublaslt._Plan(1, 1, 1, 1, 1, cublaslt._Heuristic(), 1, 0, (1, 1), scales)

    def given(value: object) -> Callable[..., object]:
        return lambda *_, **__: value

    library: dict[str, Any] = {
        "why_not": given(None), "_lib": given(nothing), "_problem": given(1), "_plan": given(plan),
        "constant": lambda _, value: _number(value),
    }  # fmt: skip
    with ExitStack() as stack:
        for place in (
            mock.patch.multiple(cublaslt, **library),
            mock.patch.multiple(launching, _stream=given(0)),
            mock.patch.object(jit.KernelInterface, "__getitem__", given(given(compiled))),
            mock.patch.object(torch._C, "_cuda_getCurrentRawStream", given(0), create=True),
            mock.patch.object(torch.cuda, "current_device", given(None)),
            mock.patch.object(matmul, "multiplies_fp8", given(True)),
            mock.patch.object(filters, "_has_asm", given(True)),
            mock.patch.object(power_forms, "_has_asm", given(True)),
            mock.patch.dict(registry._KERNELS, _on_any_device()),
            *(mock.patch.dict(kept, clear=True) for kept in _kept()),
        ):
            stack.enter_context(place)
        yield


_KEPT = ("_AMAX", "_BY_MASK", "_COMPILED", "_FORMS", "_LAUNCHES", "_PAIRS", "_RUNS", "_SETUPS")


def _kept() -> Iterator[dict[Any, Any]]:
    """What launches are found by; others in this process must not find those that do nothing."""
    for module in (launching, amaxes, eden, filters, power_forms, powers, quantize):
        yield from (vars(module)[name] for name in _KEPT if name in vars(module))


@cache
def _number(value: float) -> Tensor:
    return torch.tensor(value)


def _c_function() -> Any:
    """A function of C that takes cublasLtMatmul's arguments, and looks at none."""
    function = ctypes.CDLL(None).getppid
    address = ctypes.c_void_p
    function.argtypes = [*(address,) * 14, ctypes.c_size_t, address]
    function.restype = ctypes.c_int
    return lambda *args: function(*args) and 0


def _on_any_device() -> dict[Any, registry.Kernel]:
    """Triton's kernels, which take on the CPU what they support on a GPU."""
    gpu = torch.device("cuda", 0)

    def asked_of_gpu(found: registry.Kernel) -> registry.Kernel:
        return replace(found, supports=lambda request: found.supports(replace(request, device=gpu)))

    return {at: asked_of_gpu(found) for at, found in registry._KERNELS.items() if found.backend == "triton"}


def main() -> None:
    options = bench_host.parser().parse_args()
    torch.set_num_threads(1)
    with nothing_runs():
        recipes = options.recipe or bench_host.RECIPES
        bench_host.report(recipes, torch.device("cpu"), options.rounds, options.profile, options.alone)


if __name__ == "__main__":
    main()
