"""Times of the resolved quantizers and FP4 GEMMs on a GPU, against a copy and a bf16 GEMM measured in the same run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fp4dist.kernels.registry import Kernel, Request, resolve
from fp4dist.numerics.tensor import Key
from fp4dist.spec.load import load_recipe
from fp4dist.spec.recipe import SLOTS, QuantSpec
from fp4dist.spec.run import BackendConfig

SHAPE = (16384, 4096)
_ROUNDS, _WARMUP = 12, 3
_HEAD_START = 1_000_000  # clock cycles that the device waits, so that the host is ahead
_KEY = Key(seed=1, layer=2, step=3, micro_batch=4)


@dataclass(frozen=True)
class Timed:
    """One operation: microseconds, and the roofline's time (a copy of the least bytes, a bf16 GEMM) over its own."""

    what: str
    backend: str
    us: float
    share: float


def measure(names: Iterable[str], device: torch.device, say: Callable[[str], None]) -> tuple[float, list[Timed]]:
    """(bytes/s of a copy, read plus write; times of each different quantizer, and of each different FP4 GEMM)."""
    x = torch.randn(SHAPE, device=device).bfloat16()
    out = torch.empty_like(x)
    copied = 2 * x.numel() * x.element_size() / _seconds(lambda: out.copy_(x))
    say(f"copy: {copied / 1e12:.2f} TB/s")
    found = [_quantizer(spec, x, copied) for spec in specs(names)]
    a, b = x[:8192], torch.randn(8192, SHAPE[1], device=device).bfloat16()
    plain = _seconds(lambda: a @ b.t())
    found.append(Timed("GEMM 8192 x 8192 x 4096, bf16", "torch", plain * 1e6, 1.0))
    found += [_gemm(spec, a, b, plain) for spec in {s.format.title: s for s in specs(names)}.values() if spec.is_fp4]
    return copied, found


def specs(names: Iterable[str]) -> list[QuantSpec]:
    """The different specs of the recipes, those with parts beside the codes left out."""
    found: dict[str, QuantSpec] = {}
    for name in names:
        for linear in load_recipe(name).linears.values():
            for slot in SLOTS:
                spec = linear.slot(slot)
                if spec is not None and spec.source == "master" and not spec.has_parts:
                    found.setdefault(spec.label(), spec)
    return [found[label] for label in sorted(found)]


def _quantizer(spec: QuantSpec, x: Tensor, copied: float) -> Timed:
    kernel = _kernel(Request("quantize", spec, x.device))
    seconds = _seconds(lambda: kernel(x, spec, _KEY))
    scale = 1.0 / max(1, spec.shape[0] * spec.shape[1])
    least = x.numel() * (2 * (1 + (spec.above == "tensor")) + spec.format.element.bits / 8 + scale)
    return Timed(f"quantize {spec.label()}", kernel.backend, seconds * 1e6, least / copied / seconds)


def _gemm(spec: QuantSpec, a: Tensor, b: Tensor, plain: float) -> Timed:
    quantizer, kernel = _kernel(Request("quantize", spec, a.device)), _kernel(Request("matmul", spec, a.device))
    left, right = quantizer(a, spec, _KEY), quantizer(b, spec, _KEY)
    seconds = _seconds(lambda: kernel(left, right, out=torch.bfloat16))
    return Timed(f"GEMM 8192 x 8192 x 4096, {spec.format.title} codes", kernel.backend, seconds * 1e6, plain / seconds)


def _kernel(request: Request) -> Kernel:
    return resolve(request, BackendConfig(allow_reference=True))


def _seconds(run: Callable[[], object]) -> float:
    """Median between two events of the device."""
    times = []
    for _ in range(_WARMUP + _ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_HEAD_START)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return statistics.median(times[_WARMUP:])
