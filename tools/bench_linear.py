"""Time one linear layer, forward and backward, under FP4 recipes against plain fp32 on this CPU.

The FP4 numbers are those of the reference backend: they say what quantization in plain torch costs, not what a kernel
would. Runs of fp32 and FP4 alternate; the ratio is that of the medians. FP4 is hundreds of short parallel regions and
fp32 three long ones, so other load on the machine hurts FP4 more: where `best` and the ratio differ, it was not idle.

    python tools/bench_linear.py --recipe nvidia_nvfp4 --recipe quartet2 --size 1024x1024x1024 --threads 2
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


def make_step(size: Size, linear: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], float]:
    """A function that runs forward and backward of Y = X W^T once and returns its seconds."""
    tokens, inputs, outputs = size
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, inputs, generator=generator, requires_grad=True)
    w = torch.randn(outputs, inputs, generator=generator, requires_grad=True)
    dy = torch.randn(tokens, outputs, generator=generator)

    def step() -> float:
        x.grad = w.grad = None
        begin = time.perf_counter()
        linear(x, w).backward(dy)
        return time.perf_counter() - begin

    return step


def fp4_step(recipe: str, size: Size) -> Callable[[], float]:
    """The first LinearRecipe of `recipe`, all six slots quantized at every call."""
    linears = load_recipe(recipe).linears
    if not linears:
        raise SystemExit(f"recipe {recipe} quantizes nothing")
    linear = next(iter(linears.values()))
    plan = LinearPlan.resolve("linear", 1, linear, Clock(), torch.device("cpu"), BackendConfig(kind="reference"))
    return make_step(size, lambda x, w: fp4_linear(x, w, plan, NoComm()))


def compare(recipe: str, size: Size, repeats: int) -> dict[str, Any]:
    """Medians over `repeats` alternating runs, after two that warm up."""
    steps = {"fp32": make_step(size, lambda x, w: x @ w.t()), "fp4": fp4_step(recipe, size)}
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
        "fp32_seconds": medians["fp32"],
        "fp4_seconds": medians["fp4"],
        "ratio": medians["fp4"] / medians["fp32"],
        "best_ratio": min(times["fp4"]) / min(times["fp32"]),
        "all_seconds": times,
    }


def processor() -> str:
    """The CPU's name where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment(threads: int) -> dict[str, Any]:
    return {
        "device": processor(),
        "threads": threads,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fp4dist": fp4dist.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="FP4 linear (forward + backward) against fp32 on this CPU.")
    parser.add_argument("--recipe", action="append", help="recipe name or path; repeatable (default: nvidia_nvfp4)")
    parser.add_argument("--size", action="append", type=parse_size, help="TOKENSxINPUTSxOUTPUTS; repeatable")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each (default: 9)")
    parser.add_argument("--out", type=Path, default=Path("bench_linear.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = [
        compare(recipe, size, options.repeats)
        for size in options.size or [(1024, 1024, 1024)]
        for recipe in options.recipe or ["nvidia_nvfp4"]
    ]
    for r in results:
        shape = "x".join(str(n) for n in r["size"].values())
        print(
            f"{r['recipe']:<20} {shape:<16} fp32 {r['fp32_seconds'] * 1e3:8.1f} ms"
            f"   fp4 {r['fp4_seconds'] * 1e3:8.1f} ms   ratio {r['ratio']:5.2f}   best {r['best_ratio']:5.2f}"
        )
    report = {"environment": environment(options.threads), "results": results}
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
