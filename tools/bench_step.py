#!/usr/bin/env python
"""Time whole training steps of a run file by recipe: the engines, model and data path of launch/pretrain.py.

    python tools/bench_step.py --recipe bf16 --recipe quartet2 --recipe quartet --micro-batch 16
    python tools/bench_step.py --recipe bf16 --engine deepspeed --engine megatron --profile
    python tools/bench_step.py --config quickstart --recipe bf16 --recipe nvidia_nvfp4 --set train.dtype=fp32

Each case (recipe, engine) builds its model and optimizer, takes --warmup steps and then times --steps more on the
device, each from the end of the one before it: optimizer, clipping, reading of the batch and every wait included.
Cases follow each other in one process and see the same samples; their memory is freed in between. Where the token
files of `data.train` do not exist, samples are random tokens (Zipf's law), and the report says so: times hold, losses
mean little.

MFU is fp4dist.megatron.sites.flops_per_token (6 FLOP a weight of the linears, the head's included, and attention's two
products over the causal half) times tokens/s over --peak. Results go to bench_step.json and bench_step.png in --out.
--profile adds one step under torch.profiler for each case: seconds of device kernels by kind, and the longest ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import logging
import platform
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from job_runs import batches_of, has_data

from fp4dist.errors import Fp4DistError
from fp4dist.megatron.sites import flops_per_token
from fp4dist.megatron.upstream import parallel_state
from fp4dist.spec.load import load_run
from fp4dist.spec.run import RunConfig
from fp4dist.train import loop
from fp4dist.train.packages import versions
from fp4dist.train.world import World, open_world

KINDS = (  # of a kernel, by the first pattern that its name matches
    ("attention", r"flash|fmha|sdpa|attention|cudnn"),
    ("gemm", r"gemm|cutlass|nvjet|xmma|cublas|splitK|matmul|linear_combination"),
    ("quantize", r"quantize|amax|carrier|dequant|rotate|rounding|filter_kernel|mask_kernel|pair_kernel|eden"),
    ("optimizer", r"adam|multi_tensor|lpnorm|sgd"),
    ("loss", r"triton.*(logsumexp|gather|_eq_exp)|nll|softmax"),
    ("norm", r"(rms|layer)_?norm|GammaBeta|triton.*(rsqrt|_mean)"),
    ("swiglu", r"triton.*(silu|sigmoid)|silu"),
    ("rope", r"triton.*_cat_.*neg"),
    ("copy", r"memcpy|memset|(?<!_to_)copy|CatArray|fill"),
    ("elementwise", r"elementwise|triton_|reduce|index|embedding"),
)


@dataclass
class Result:
    """One case; times in seconds, memory in bytes."""

    recipe: str
    engine: str
    failure: str | None = None
    step_seconds: list[float] = field(default_factory=list)
    median_seconds: float | None = None
    tokens_per_s: float | None = None
    mfu: float | None = None
    peak_bytes: int | None = None
    losses: list[float] = field(default_factory=list)
    ratio: float | None = None  # to bf16 under the same engine
    fp4_share: float | None = None
    optimizer: str | None = None
    graphs: str | None = None  # whether micro-batches were replayed as CUDA graphs
    handed: dict[str, int] = field(default_factory=dict)  # slot -> operands that brought their amax, unreplayed
    host_seconds: float | None = None  # median, until forward and backward were launched
    profile: dict[str, Any] | None = None


def main() -> int:
    """Command line; exit code 1 when a case failed, 2 when there is something to correct."""
    args = _parse()
    if args.verbose:
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        configs = {(recipe, engine): _config(recipe, engine, args) for engine in args.engine for recipe in args.recipe}
    except (Fp4DistError, OSError) as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return 2
    results: list[Result] = []
    for engine in args.engine:
        for recipe in args.recipe:
            result = _case(configs[recipe, engine], engine, args)
            results.append(result)
            _relate(results)
            print(_line(result), flush=True)
            _write(results, configs[recipe, engine], args)
    _draw(results, args.out / "bench_step.png")
    return 1 if any(r.failure for r in results) else 0


def _parse() -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n")
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=rest, formatter_class=plain)
    parser.add_argument("--config", default="llama_350m", help="a run file, or the name of a shipped one")
    parser.add_argument("--recipe", action="append", help="repeatable; bf16 is what others are compared with")
    parser.add_argument("--engine", action="append", choices=("megatron", "deepspeed"), help="repeatable")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one key; repeatable")
    parser.add_argument("--micro-batch", type=int, help="samples a forward pass; default: the config's")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches a step")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--warmup", type=int, default=4, help="steps before them; kernels are compiled and tuned there")
    parser.add_argument("--peak", type=float, default=790.0, help="TFLOP/s that MFU relates to (default: 790, H100)")
    parser.add_argument(
        "--cuda-graph", choices=("auto", "true", "false"), help="train.cuda_graph; default: the config's"
    )
    parser.add_argument("--profile", action="store_true", help="one more step of each case under torch.profiler")
    parser.add_argument("--top", type=int, default=25, help="kernels that --profile lists")
    parser.add_argument("--verbose", action="store_true", help="show fp4dist's log")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_step"), help="folder of results")
    args = parser.parse_args()
    args.recipe = args.recipe or ["bf16"]
    args.engine = args.engine or ["megatron"]
    if args.steps < 1 or args.warmup < 1 or args.accumulate < 1:
        parser.error("--steps, --warmup and --accumulate must be at least 1")
    return args


def _config(recipe: str, engine: str, args: argparse.Namespace) -> RunConfig:
    """The run file with what a benchmark decides: one process's batch, few steps, nothing but steps."""
    micro = args.micro_batch or load_run(args.config, args.set).train.micro_batch_size
    steps = args.warmup + args.steps + 1  # the last one for the profiler
    sets = [
        f"recipe={recipe}",
        f"engine.kind={engine}",
        f"train.micro_batch_size={micro}",
        f"train.global_batch_size={micro * args.accumulate}",
        f"train.steps={steps}",
        "train.eval_samples=0",
        "train.eval_every=0",
        "optim.warmup_steps=1",
        f"run.dir={args.out}",
        *([f"train.cuda_graph={args.cuda_graph}"] if args.cuda_graph else []),
    ]
    return loop.resolve_dtype(load_run(args.config, [*args.set, *sets]))


def _case(config: RunConfig, engine: str, args: argparse.Namespace) -> Result:
    """Measure one case; what fp4dist refuses and what does not fit into memory is told, and the others go on."""
    result = Result(config.recipe.name, engine)
    try:
        with open_world(config) as world:
            _measure(config, world, args, result)
    except (Fp4DistError, torch.cuda.OutOfMemoryError) as e:
        result.failure = f"{type(e).__name__}: {str(e).splitlines()[0]}"
        if dist.is_initialized():  # open_world leaves the groups to the launcher after an error that is not ours
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return result


def _measure(config: RunConfig, world: World, args: argparse.Namespace, result: Result) -> None:
    """Build, warm up, time; then one step under the profiler, if asked."""
    on_gpu = world.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(world.device)
    batches = batches_of(config, world)
    engine, applied = loop.build_engine(config, world)
    result.optimizer = engine.optimizer_name

    host: list[float] = []

    def step(number: int) -> float:
        applied.set_step(number - 1, config.train.steps)
        done, seconds = loop.timed_step(engine, applied, number, batches)
        result.losses.append(done.loss)
        host.append(getattr(engine, "host_seconds", seconds))
        return seconds

    for number in range(1, args.warmup + 1):
        step(number)
        if number == 1:
            applied.check_counts()
    if on_gpu:
        result.step_seconds = _on_device(step, range(args.warmup + 1, args.warmup + args.steps + 1))
    else:
        result.step_seconds = [step(args.warmup + i) for i in range(1, args.steps + 1)]
    result.median_seconds = statistics.median(result.step_seconds)
    result.host_seconds = statistics.median(host[args.warmup :])
    result.graphs = getattr(engine, "graphs", None)
    tokens = config.train.global_batch_size * config.model.seq_length
    result.tokens_per_s = tokens / result.median_seconds
    result.mfu = result.tokens_per_s * flops_per_token(config.model) / (args.peak * 1e12) if on_gpu else None
    result.peak_bytes = torch.cuda.max_memory_allocated(world.device) if on_gpu else None
    result.handed = applied.counts()["handed"]
    result.fp4_share = applied.to_json()["fp4_share_of_block_linear_flops"]
    if args.profile:
        result.profile = _profile(lambda: step(config.train.steps), on_gpu, args.top)
    engine.close()


def _on_device(step: Callable[[int], float], numbers: range) -> list[float]:
    """Seconds of each step on the device: from the end of the kernels of the step before it to the end of its own."""
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(len(numbers) + 1)]
    ends[0].record()
    for number, end in zip(numbers, ends[1:], strict=True):
        step(number)
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) * 1e-3 for begin, end in itertools.pairwise(ends)]


def _profile(step: Any, on_gpu: bool, top: int) -> dict[str, Any]:
    """Device seconds (host seconds on a CPU) of one step by kind, and the kernels that took longest."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        seconds = step()
    kernels: dict[str, tuple[float, int]] = {}
    for event in profiler.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if spent > 0:
            before = kernels.get(event.key, (0.0, 0))
            kernels[event.key] = (before[0] + spent * 1e-6, before[1] + event.count)
    kinds: dict[str, dict[str, float]] = {}
    for name, (spent, calls) in kernels.items():
        kind = kinds.setdefault(kind_of(name), {"seconds": 0.0, "calls": 0})
        kind["seconds"] += spent
        kind["calls"] += calls
    gaps = _gaps(profiler.events()) if on_gpu else []
    longest = sorted(kernels.items(), key=lambda item: -item[1][0])[:top]
    return {
        "step_seconds": seconds,
        "busy_seconds": sum(spent for spent, _ in kernels.values()),
        "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1]["seconds"])),
        "longest": [{"name": name, "seconds": spent, "calls": calls} for name, (spent, calls) in longest],
        "idle_seconds": sum(gap for gap, *_ in gaps),
        "longest_idle": [
            {"seconds": gap, "at_seconds": at, "after": after, "before": before}
            for gap, at, after, before in sorted(gaps, reverse=True)[:8]
        ],
    }


def _gaps(events: Any) -> list[tuple[float, float, str, str]]:
    """(seconds, seconds since the first kernel, kernel before, kernel after) of every time in which no kernel runs."""
    kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda e: e.time_range.start)
    gaps, last = [], kernels[0] if kernels else None
    for kernel in kernels:
        assert last is not None
        if kernel.time_range.start > last.time_range.end:
            gap, at = kernel.time_range.start - last.time_range.end, last.time_range.end - kernels[0].time_range.start
            gaps.append((gap * 1e-6, at * 1e-6, last.name, kernel.name))
        if kernel.time_range.end > last.time_range.end:
            last = kernel
    return gaps


def kind_of(kernel: str) -> str:
    """What a kernel is for, judged by its name; "other" where no pattern fits."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, kernel, re.IGNORECASE)), "other")


def _relate(results: list[Result]) -> None:
    """Fill in the ratios to bf16 of the same engine."""
    plain = {r.engine: r.median_seconds for r in results if r.recipe == "bf16"}
    for r in results:
        base = plain.get(r.engine)
        r.ratio = r.median_seconds / base if base and r.median_seconds else None


def _line(r: Result) -> str:
    if r.failure is not None or r.median_seconds is None:
        return f"{r.engine:<10}{r.recipe:<18} FAILED: {r.failure}"
    text = f"{r.engine:<10}{r.recipe:<18}{r.median_seconds * 1e3:9.1f} ms {r.tokens_per_s or 0:11,.0f} tokens/s"
    text += f"  MFU {r.mfu:.1%}" if r.mfu is not None else ""
    text += f"  peak {r.peak_bytes / 2**30:.2f} GiB" if r.peak_bytes is not None else ""
    text += f"  {r.ratio:.3f}x bf16" if r.ratio is not None and r.recipe != "bf16" else ""
    text += f"  host {r.host_seconds * 1e3:.0f} ms" if r.host_seconds is not None else ""
    text += f"  {r.graphs.partition(' (')[0]}" if r.graphs is not None else ""
    text += f"  amax handed over: {', '.join(r.handed)}" if r.handed else ""
    text += f"  loss {r.losses[0]:.4f} -> {r.losses[-1]:.4f}"
    return "\n".join([text, *_profile_lines(r.profile)]) if r.profile else text


def _profile_lines(p: dict[str, Any]) -> list[str]:
    kinds = ", ".join(f"{k} {v['seconds'] * 1e3:.1f} ({v['calls']:.0f})" for k, v in p["kinds"].items())
    lines = [
        f"  profiled step {p['step_seconds'] * 1e3:.1f} ms, kernels {p['busy_seconds'] * 1e3:.1f} ms;"
        f" ms (calls) by kind: {kinds}"
    ]
    lines += [f"  {k['seconds'] * 1e3:8.2f} ms {k['calls']:5d}x {k['name'][:110]}" for k in p["longest"]]
    if p["longest_idle"]:
        lines.append(f"  idle {p['idle_seconds'] * 1e3:.1f} ms between kernels; the longest times:")
    return lines + [
        f"  {g['seconds'] * 1e3:8.2f} ms at {g['at_seconds'] * 1e3:.1f} ms, {g['after'][:50]} -> {g['before'][:50]}"
        for g in p["longest_idle"]
    ]


def _write(results: list[Result], config: RunConfig, args: argparse.Namespace) -> None:
    content = {
        "environment": {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
            "platform": platform.platform(),
            "python": platform.python_version(),
            **versions(),
        },
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "model": dataclasses.asdict(config.model),
        "tokens_a_step": config.train.global_batch_size * config.model.seq_length,
        "flops_per_token": flops_per_token(config.model),
        "data": list(config.data.train) if has_data(config) else "random tokens",
        "results": [asdict(r) for r in results],
    }
    (args.out / "bench_step.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _draw(results: list[Result], path: Path) -> None:
    """Bars of the median step, with ratio and peak memory written on them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [r for r in results if r.median_seconds is not None]
    if not shown:
        return
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.4 * len(shown)))
    axes.barh([f"{r.recipe} ({r.engine})" for r in shown], [(r.median_seconds or 0) * 1e3 for r in shown])
    for i, r in enumerate(shown):
        notes = [f"{r.ratio:.2f}x" if r.ratio else "", f"{r.peak_bytes / 2**30:.1f} GiB" if r.peak_bytes else ""]
        axes.text(
            (r.median_seconds or 0) * 1e3, i, " " + "  ".join(n for n in notes if n), va="center", fontsize="small"
        )
    axes.invert_yaxis()
    axes.margins(x=0.2)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    axes.set_xlabel(f"ms a step, {device}, torch {torch.__version__}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
