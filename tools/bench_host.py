"""What the host spends on one linear layer, forward and backward: Python, torch's calls and launches, no kernels' time.

    python tools/bench_host.py
    python tools/bench_host.py --recipe quartet2 --profile 25

A small model's eager step is bound by it. 32 linears follow each other, as in a model: the weights are quantized once a
step, noise and signs are those of the step. The clock runs until the last launch of a step, and there are fewer than
the GPU's queue takes. --alone runs forward and backward of one after the other. Needs a GPU;
tests/kernels/triton/host_time.py does the same with kernels that do nothing.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fp4dist.nn.clock import Clock
from fp4dist.nn.comm import NoComm
from fp4dist.nn.function import fp4_linear
from fp4dist.nn.plan import LinearPlan
from fp4dist.spec.load import load_recipe
from fp4dist.spec.run import BackendConfig

LINEARS, SIZE = 32, 256  # plans that run in turn; of x, W and dY, which are square
RECIPES = ("nvidia_nvfp4", "quartet2", "quartet", "tetrajet")


class Linears:
    """Plans of one recipe's first LinearRecipe that share x, W and dY [SIZE, SIZE]; dW goes to `main_grad`.

    alone   each has a backward pass of its own, whose start is then part of its time
    """

    def __init__(self, recipe: str, device: torch.device, alone: bool = False) -> None:
        self.alone = alone
        linear, self.clock = next(iter(load_recipe(recipe).linears.values())), Clock(cache_weights=True)
        backend = BackendConfig(kind="triton")
        self.plans = [LinearPlan.resolve("linear", i, linear, self.clock, device, backend) for i in range(LINEARS)]
        self.x, self.w = (x.requires_grad_() for x in (_random(device), _random(device) / SIZE**0.5))
        self.dy, self.comm = _random(device), NoComm()
        setattr(self.w, "main_grad", torch.zeros(SIZE, SIZE, device=device))  # noqa: B010 - as Megatron's DDP does
        setattr(self.w, "grad_added_to_main_grad", False)  # noqa: B010

    def step(self) -> None:
        """One linear behind the other, at the next optimizer step."""
        self.clock.step += 1
        self.x.grad = self.w.grad = None
        y = self.x
        for plan in self.plans:
            y = fp4_linear(self.x if self.alone else y, self.w, plan, self.comm)
            if self.alone:
                self.x.grad = None
                y.backward(self.dy)
        if not self.alone:
            y.backward(self.dy)


def _random(device: torch.device) -> Tensor:
    return torch.randn(SIZE, SIZE, device=device).to(torch.bfloat16)


def microseconds(run: Callable[[], None], rounds: int, device: torch.device) -> float:
    """One linear's share of `run`: the median by the clock; without a GPU the least of this process's own time, which
    other load on the machine disturbs least.
    """
    on_gpu = device.type == "cuda"
    now, typical = (time.perf_counter, statistics.median) if on_gpu else (time.process_time, min)
    found = []
    for i in range(rounds + 3):
        begin = now()
        run()
        if i >= 3:
            found.append((now() - begin) / LINEARS * 1e6)
        if on_gpu:
            torch.cuda.synchronize()
    return typical(found)


def calls_of(run: Callable[[], None]) -> Counter[str]:
    """What one `run` calls: functions of Python and of C, torch's, and launches; of all its linears."""
    profile = _profiled(run, 1)
    counted: Counter[str] = Counter()
    for (file, _, name), (_, calls, *_) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        counted["python" if file != "~" else "built in"] += calls
        if "torch" in name and file == "~":
            counted["torch"] += calls
        if name in ("launch", "__call__") and file.endswith("launch.py"):
            counted["launches"] += calls
    return counted


def _profiled(run: Callable[[], None], times: int) -> cProfile.Profile:
    profile = cProfile.Profile()
    with torch.autograd.set_multithreading_enabled(False):
        profile.enable()
        for _ in range(times):
            run()
        profile.disable()
    return profile


def show(run: Callable[[], None], lines: int) -> None:
    """The functions that take longest by themselves, in us of one linear."""
    times = 8
    stats = pstats.Stats(_profiled(run, times)).strip_dirs()
    share = 1e6 / (times * LINEARS)
    found = sorted(((own, all_, n, at) for at, (_, n, own, all_, _) in stats.stats.items()), reverse=True)  # type: ignore[attr-defined]
    for own, all_, n, (file, line, name) in found[:lines]:
        print(
            f"{own * share:7.1f} us own {all_ * share:7.1f} all {n / times / LINEARS:6.1f}x {file}:{line} {name[:60]}"
        )


def report(recipes: Sequence[str], device: torch.device, rounds: int, lines: int, alone: bool = False) -> None:
    """A line for each recipe, and below it the functions that take longest."""
    for recipe in recipes:
        linears = Linears(recipe, device, alone)
        taken = microseconds(linears.step, rounds, device)
        counts = calls_of(linears.step)
        words = ", ".join(f"{counts[name] / LINEARS:.1f} {name}" for name in ("launches", "torch", "python"))
        print(f"{recipe:<14} {taken:7.0f} us a linear; calls: {words}", flush=True)
        if lines:
            show(linears.step, lines)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description="Host time of one FP4 linear, forward and backward.")
    found.add_argument("--recipe", action="append", help="recipe name or path; repeatable")
    found.add_argument("--rounds", type=int, default=15, help="timed steps (default: 15)")
    found.add_argument("--profile", type=int, default=0, metavar="N", help="also the N functions that take longest")
    found.add_argument("--alone", action="store_true", help="a backward pass for each linear")
    return found


def main() -> None:
    options = parser().parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(
            "bench_host.py needs a GPU; without one, python -m tests.kernels.triton.host_time counts calls"
        )
    report(
        options.recipe or RECIPES, torch.device("cuda", torch.cuda.current_device()), options.rounds, options.profile
    )


if __name__ == "__main__":
    main()
