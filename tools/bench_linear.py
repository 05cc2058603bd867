"""Time one linear layer, forward and backward, under FP4 recipes against the plain layer on the same device.

On a CPU that is fp32 against the reference backend: what quantization in plain torch costs, not what a kernel would.
On a GPU (--device cuda) it is bf16 against the Triton backend, or --backend reference, every amax inside the timed
region. Runs alternate; the ratio is that of the medians. On a CPU FP4 is hundreds of short parallel regions and fp32
three long ones, so other load on the machine hurts FP4 more: where `best` and the ratio differ, it was not idle.

    python tools/bench_linear.py --recipe nvidia_nvfp4 --recipe quartet2 --size 1024x1024x1024 --threads 2
    python tools/bench_linear.py --device cuda --recipe quartet2 --size 16384x4096x4096 --size 16384x2048x8192
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fp4dist
from fp4dist.nn.clock import Clock
from fp4dist.nn.comm import NoComm
from fp4dist.nn.function import fp4_linear
from fp4dist.nn.plan import LinearPlan
from fp4dist.spec.load import load_recipe
from fp4dist.spec.run import BackendConfig

Size = tuple[int, int, int]  # T tokens, I inputs, O outputs


def parse_size(text: str) -> Size:
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not TOKENSxINPUTSxOUTPUTS, such as 1024x1024x1024")
    tokens, inputs, outputs = map(int, parts)
    return tokens, inputs, outputs


def make_step(
    size: Size, linear: Callable[[Tensor, Tensor], Tensor], device: torch.device, dtype: torch.dtype
) -> Callable[[], float]:
    """A function that runs forward and backward of Y = X W^T once and returns its seconds."""
    tokens, inputs, outputs = size
    generator = torch.Generator(device).manual_seed(0)
    x, w, dy = (
        torch.randn(shape, generator=generator, device=device, dtype=dtype)
        for shape in ((tokens, inputs), (outputs, inputs), (tokens, outputs))
    )
    x.requires_grad_()
    w.requires_grad_()

    def run() -> None:
        x.grad = w.grad = None
        linear(x, w).backward(dy)

    def on_cpu() -> float:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    def on_gpu() -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) * 1e-3

    return on_cpu if device.type == "cpu" else on_gpu


def fp4_linear_of(recipe: str, device: torch.device, backend: BackendConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """The first LinearRecipe of `recipe`, all its slots quantized at every call."""
    linears = load_recipe(recipe).linears
    if not linears:
        raise SystemExit(f"recipe {recipe} quantizes nothing")
    plan = LinearPlan.resolve("linear", 1, next(iter(linears.values())), Clock(), device, backend)
    return lambda x, w: fp4_linear(x, w, plan, NoComm())


def compare(recipe: str, size: Size, repeats: int, device: torch.device, backend: BackendConfig) -> dict[str, Any]:
    """Medians over `repeats` alternating runs, after two that warm up."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    plain = "fp32" if device.type == "cpu" else "bf16"
    steps = {
        plain: make_step(size, lambda x, w: x @ w.t(), device, dtype),
        "fp4": make_step(size, fp4_linear_of(recipe, device, backend), device, dtype),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(repeats + 2):
        for name, step in steps.items():
            seconds = step()
            if i >= 2:
                times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "recipe": recipe,
        "size": dict(zip(("tokens", "inputs", "outputs"), size, strict=True)),
        "plain": plain,
        "plain_seconds": medians[plain],
        "fp4_seconds": medians["fp4"],
        "ratio": medians["fp4"] / medians[plain],
        "best_ratio": min(times["fp4"]) / min(times[plain]),
        "all_seconds": times,
    }


def processor() -> str:
    """The CPU's name where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment(threads: int, device: torch.device) -> dict[str, Any]:
    return {
        "device": processor() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": threads,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fp4dist": fp4dist.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="FP4 linear (forward + backward) against the plain one.")
    parser.add_argument("--recipe", action="append", help="recipe name or path; repeatable (default: nvidia_nvfp4)")
    parser.add_argument("--size", action="append", type=parse_size, help="TOKENSxINPUTSxOUTPUTS; repeatable")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backend", choices=("auto", "reference", "triton"), default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each (default: 9)")
    parser.add_argument("--out", type=Path, default=Path("bench_linear.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    backend = BackendConfig(kind=options.backend, allow_reference=options.backend == "reference")
    results = [
        compare(recipe, size, options.repeats, device, backend)
        for size in options.size or [(1024, 1024, 1024)]
        for recipe in options.recipe or ["nvidia_nvfp4"]
    ]
    for r in results:
        shape = "x".join(str(n) for n in r["size"].values())
        print(
            f"{r['recipe']:<20} {shape:<16} {r['plain']} {r['plain_seconds'] * 1e3:8.2f} ms"
            f"   fp4 {r['fp4_seconds'] * 1e3:8.2f} ms   ratio {r['ratio']:5.2f}   best {r['best_ratio']:5.2f}"
        )
    report = {"environment": environment(options.threads, device), "results": results}
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
