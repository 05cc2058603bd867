#!/usr/bin/env python
"""One host, 2 GPUs or more: collectives in NVFP4, whole steps by layout and recipe, and whether the losses agree.

    python tools/bench_scaling.py --set 'data.train=[my/prefix]'                     # all GPUs, within ten minutes
    python tools/bench_scaling.py --processes 8 --cpu --config tiny --samples 2 --mib 1 --steps 3 --loss-steps 10

Three parts (--parts), each measured by the tool or program that users run:

    collectives  tools/bench_comm.py: reduce-scatter and all-reduce over all GPUs, NCCL against NVFP4, flat and in two
                 levels of every shape that fits, 64 MiB to 2 GiB
    steps        training steps of --config by recipe: over all GPUs in each layout, gradients and activations as the
                 engine sends them (`plain`) and compressed (`coded`); on one GPU; data parallel on the numbers between.
                 Weak scaling: --samples a GPU. efficiency = tokens/s over (GPUs x tokens/s of one GPU)
    losses       --loss-steps steps of one global batch (--loss-batch) in each layout, beside one GPU's, same samples

Runs of one layout share a job (tools/job_runs.py). What was measured before, under the same --out, is not measured
again; when --budget seconds have passed, no run is begun, and what was left out is told: call again to go on.
Results: scaling.json and scaling.png under --out. Exit code 1 when a run failed or something was left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jobs import launcher, run_to, short_run, tail

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("collectives", "steps", "losses")
RECIPES = ("bf16", "quartet2", "quartet")


@dataclass(frozen=True)
class Layout:
    """Ranks and how they share the model; the rest of them are replicas."""

    processes: int
    tp: int = 1
    pp: int = 1

    @property
    def dp(self) -> int:
        """Replicas."""
        return self.processes // (self.tp * self.pp)

    @property
    def name(self) -> str:
        """Such as tp2_dp4; one."""
        sizes = {"tp": self.tp, "pp": self.pp, "dp": self.dp}
        return "_".join(f"{axis}{size}" for axis, size in sizes.items() if size > 1) or "one"

    def sets(self) -> list[str]:
        """Overrides of a run file."""
        words = [f"parallel.tp={self.tp}", f"parallel.pp={self.pp}"]
        return [*words, "parallel.sequence_parallel=true"] if self.tp > 1 else words


@dataclass
class Case:
    """A run: what it is, and what came of it. Times in seconds, memory in bytes."""

    part: str
    layout: Layout
    recipe: str
    wire: str  # plain, coded
    failure: str | None = None
    step_seconds: float | None = None
    tokens_per_s: float | None = None
    efficiency: float | None = None  # over as many times the one-GPU run of this recipe
    ratio: float | None = None  # time over bf16's, same layout, plain
    peak_bytes: int | None = None
    bytes_of_a_step: int | None = None  # that rank 0 sent of what the run compresses
    losses: list[float] = field(default_factory=list)
    gap: float | None = None  # mean loss of the last tenth over the one-GPU run's, minus 1
    random_tokens: bool = False

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.part}_{self.layout.name}_{self.recipe}_{self.wire}"


def main() -> int:
    """Command line."""
    args = _parse()
    begin, out = time.time(), args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    until = begin + args.budget
    rows = _collectives(args, out) if "collectives" in args.parts else []
    cases = [case for part in args.parts for case in _cases(part, args)]
    _run_all(cases, args, out, until)
    for case in cases:
        _read(case, args, out)
    _relate(cases)
    left = [case.name for case in cases if case.failure is None and not case.losses]
    content = {
        "device": _device(args),
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "seconds": time.time() - begin,
        "collectives": rows,
        "cases": [asdict(case) | {"layout": case.layout.name} for case in cases],
        "left_out": left,
    }
    (out / "scaling.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(*(_line(case) for case in cases if case.name not in left), sep="\n")
    if left:
        print(f"{len(left)} runs were not begun within {args.budget:g} s; the same command goes on: {' '.join(left)}")
    _draw(cases, rows, out / "scaling.png", _device(args))
    print(f"written to {out / 'scaling.json'} and {out / 'scaling.png'}")
    return 1 if left or any(case.failure for case in cases) else 0


def _parse() -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n")
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=rest, formatter_class=plain)
    parser.add_argument("--config", default="llama_350m", help="a run file, or the name of a shipped one")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one key; repeatable")
    parser.add_argument("--processes", type=int, help="GPUs (with --cpu: processes); default: all GPUs of this host")
    parser.add_argument("--cpu", action="store_true", help="gloo ranks on the CPU")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS), help=",".join(PARTS))
    parser.add_argument("--recipes", type=lambda text: text.split(","), default=list(RECIPES), help=",".join(RECIPES))
    parser.add_argument("--loss-recipe", default="quartet2", help="of the part losses")
    parser.add_argument("--samples", type=int, default=16, help="sequences a GPU and step in the part steps")
    parser.add_argument("--steps", type=int, default=8, help="timed steps, the median counts")
    parser.add_argument("--warmup", type=int, default=4, help="steps before them")
    parser.add_argument("--loss-steps", type=int, default=100)
    parser.add_argument("--loss-batch", type=int, default=16, help="sequences a step in the part losses")
    parser.add_argument("--mib", type=float, nargs="+", default=[64, 256, 1024, 2048], help="bf16 payloads a rank")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds after which no run is begun")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one job")
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"), help="folder of runs, logs and results")
    args = parser.parse_args()
    import torch

    found = torch.cuda.device_count()
    args.processes = args.processes or found
    if args.processes < 2 or (not args.cpu and args.processes > found):
        parser.error(f"--processes {args.processes} on {found} GPUs: scaling needs 2 or more; or give --cpu (gloo)")
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        parser.error(f"--parts {','.join(unknown)}: not among {', '.join(PARTS)}")
    return args


def _layouts(processes: int) -> list[Layout]:
    """Data parallelism alone, and what of 2 x dp, 2 x 2 x dp and 4 x 2 fits this number of ranks."""
    shapes = [(1, 1), (2, 1), (2, 2), (4, 2)] if processes > 2 else [(1, 1), (2, 1), (1, 2)]
    return [Layout(processes, tp, pp) for tp, pp in shapes if processes % (tp * pp) == 0]


def _cases(part: str, args: argparse.Namespace) -> Iterator[Case]:
    """What is measured, most telling first."""
    one, whole = Layout(1), _layouts(args.processes)
    if part == "steps":
        yield from (Case(part, one, recipe, "plain") for recipe in args.recipes)
        yield from (Case(part, at, recipe, w) for at in whole for w in ("plain", "coded") for recipe in args.recipes)
        between = [n for n in (2, 4, 8, 16) if n < args.processes]
        yield from (Case(part, Layout(n), recipe, "coded") for n in between for recipe in args.recipes)
    elif part == "losses":
        yield Case(part, one, args.loss_recipe, "plain")
        yield from (Case(part, at, args.loss_recipe, "coded") for at in whole)
        yield Case(part, whole[0], args.loss_recipe, "plain")


def _sets(case: Case, args: argparse.Namespace, out: Path) -> list[str]:
    """Overrides of a case: its steps, its layout, its share of the batch, what travels how."""
    at = case.layout
    if case.part == "steps":
        steps, batch = args.warmup + args.steps, args.samples * at.processes
        micro = args.samples
    else:
        steps, batch = args.loss_steps, args.loss_batch
        micro = max(1, batch // (at.dp * 2 * at.pp if at.pp > 1 else at.dp))  # a pipeline wants several to be full
    sets = [*short_run(steps, max(1, steps // 10), out), f"train.global_batch_size={batch}"]
    sets += [f"train.micro_batch_size={micro}", "train.eval_samples=0", f"recipe={case.recipe}", *at.sets()]
    if case.wire == "coded":
        sets += ["comm.grad_reduce=nvfp4"] if at.dp > 1 else []
        sets += ["comm.pp_forward={kind: nvfp4, rounding: nearest, rotation: 128}"] if at.pp > 1 else []
        sets += ["comm.pp_backward=nvfp4"] if at.pp > 1 else []
        sets += ["comm.sp_reduce_scatter=fp8"] if at.tp > 1 else []
        sets += ["comm.guard=false", "comm.canary.every=0"]
    return [*args.set, *sets, f"run.name={case.name}"]


def _run_all(cases: list[Case], args: argparse.Namespace, out: Path, until: float) -> None:
    """Start what has not been run. Runs of one GPU go side by side, each on its own; the others one job a layout."""
    todo = [case for case in cases if not (out / case.name / "case.json").exists()]
    alone = [case for case in todo if case.layout.processes == 1]
    with ThreadPoolExecutor(1 if args.cpu else args.processes) as pool:
        list(pool.map(lambda at: _job([at[1]], at[1].name, args, out, until, at[0]), enumerate(alone)))
    together: dict[tuple[str, Layout], list[Case]] = {}
    for case in todo:
        if case.layout.processes > 1:
            together.setdefault((case.part, case.layout), []).append(case)
    for (part, layout), same in together.items():
        _job(same, f"{part}_{layout.name}", args, out, until)


def _job(cases: list[Case], name: str, args: argparse.Namespace, out: Path, until: float, gpu: int = 0) -> None:
    """One job that trains `cases` one after the other; of one process on GPU `gpu` (modulo their number)."""
    if time.time() > until:
        return
    processes = cases[0].layout.processes
    plan, log = out / f"{name}.plan.json", out / f"{name}.log"
    runs = [{"config": args.config, "sets": _sets(c, args, out), "folder": str(out / c.name)} for c in cases]
    plan.write_text(json.dumps(runs), encoding="utf-8")
    setting = ["env", "NCCL_NVLS_ENABLE=0"]
    if args.cpu:
        setting += ["CUDA_VISIBLE_DEVICES="]
    elif processes == 1:
        sys.path.insert(0, str(ROOT))
        from fp4dist import env

        shown = env.visible_gpus(args.processes)
        setting += [f"CUDA_VISIBLE_DEVICES={shown[gpu % len(shown)]}"]
    print(f"{name}: {len(cases)} runs on {processes} {'processes' if args.cpu else 'GPUs'} ...", flush=True)
    command = [*setting, *launcher(processes), str(ROOT / "tools" / "job_runs.py"), str(plan), "--until", str(until)]
    failure, seconds = run_to(log, command, args.timeout)
    print(f"{name}: {seconds:.0f} s{f', {failure}; the end of its log:' if failure else ''}", flush=True)
    if failure:
        print(tail(log))
        stopped = next((c for c in cases if not (out / c.name / "case.json").exists()), None)
        if (
            stopped is not None and time.time() < until
        ):  # the run at which the job broke; those behind it were not begun
            stopped.failure = f"{failure}, see {log}"


def _read(case: Case, args: argparse.Namespace, out: Path) -> None:
    """Fill in what a run has left."""
    told, metrics = out / case.name / "case.json", out / case.name / "metrics.jsonl"
    if not told.exists():
        return
    found = json.loads(told.read_text(encoding="utf-8"))
    case.failure = found["failure"]
    if case.failure is not None:
        return
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    timed = rows[min(args.warmup, len(rows) - 1) :]
    case.losses = [row["loss"] for row in rows]
    case.step_seconds = statistics.median(row["seconds"] for row in timed)
    case.tokens_per_s = rows[0]["tokens"] / case.step_seconds
    case.peak_bytes, case.random_tokens = found["peak_bytes"], found["random_tokens"]
    sent = rows[-1]["bytes_sent"]
    case.bytes_of_a_step = sum(way["coded"] + way["exact"] for way in sent.values()) if sent else None


def _relate(cases: list[Case]) -> None:
    """Fill in what compares a run with others."""
    done = {(c.part, c.layout, c.recipe, c.wire): c for c in cases if c.losses}
    for c in done.values():
        one = done.get((c.part, Layout(1), c.recipe, "plain"))
        plain = done.get((c.part, c.layout, "bf16", "plain"))
        if c.part == "steps" and one and one.tokens_per_s and c.tokens_per_s:
            c.efficiency = c.tokens_per_s / (c.layout.processes * one.tokens_per_s)
        if c.part == "steps" and plain and plain.step_seconds and c.step_seconds:
            c.ratio = c.step_seconds / plain.step_seconds
        if c.part == "losses" and one:
            c.gap = _tail_mean(c.losses) / _tail_mean(one.losses) - 1


def _tail_mean(losses: list[float]) -> float:
    """Of the last tenth."""
    return statistics.fmean(losses[-max(1, len(losses) // 10) :])


def _line(c: Case) -> str:
    text = f"{c.part:7s}{c.layout.name:14s}{c.recipe:14s}{c.wire:6s}"
    if c.failure is not None or c.step_seconds is None or c.tokens_per_s is None:
        return f"{text} FAILED: {c.failure}"
    text += f"{c.step_seconds * 1e3:9.1f} ms {c.tokens_per_s:11,.0f} tokens/s"
    text += f"  efficiency {c.efficiency:.1%}" if c.efficiency is not None else ""
    text += f"  {c.ratio:.3f}x bf16" if c.ratio is not None else ""
    text += f"  peak {c.peak_bytes / 2**30:.2f} GiB" if c.peak_bytes else ""
    text += f"  sent {c.bytes_of_a_step / 2**20:,.1f} MiB" if c.bytes_of_a_step else ""
    text += f"  loss {c.losses[0]:.4f} -> {c.losses[-1]:.4f}"
    text += f" ({c.gap:+.3%} of one GPU's)" if c.gap is not None else ""
    return text + ("  (random tokens)" if c.random_tokens else "")


def _collectives(args: argparse.Namespace, out: Path) -> list[dict[str, Any]]:
    """Rows of tools/bench_comm.py, from an earlier call if there was one."""
    file = out / "collectives.json"
    if not file.exists():
        words = ["--world", str(args.processes), "--mib", *(f"{mib:g}" for mib in args.mib), "--regimes", "links"]
        inner = [str(n) for n in range(2, args.processes // 2 + 1) if args.processes % n == 0]
        words += ["--inner", *inner] if inner else []
        words += ["--only", "reduce_scatter", "all_reduce", "--rounds", "10", *(["--cpu"] if args.cpu else [])]
        done = subprocess.run([sys.executable, str(ROOT / "tools" / "bench_comm.py"), *words, "--out", str(file)])
        if done.returncode:
            print(f"collectives: bench_comm ended with {done.returncode}; the other parts go on", file=sys.stderr)
            return []
    return json.loads(file.read_text(encoding="utf-8"))["rows"]


def _device(args: argparse.Namespace) -> str:
    import torch

    name = "CPU ranks" if args.cpu else torch.cuda.get_device_name()
    return f"{args.processes} x {name}, torch {torch.__version__}"


def _draw(cases: list[Case], rows: list[dict[str, Any]], path: Path, device: str) -> None:
    """Tokens/s by layout, weak scaling, losses minus one GPU's, and collectives over NCCL's bf16."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(14, 9), layout="constrained")
    panels: list[Callable[[Any], None]] = [
        lambda a: _draw_layouts(a, cases),
        lambda a: _draw_weak(a, cases),
        lambda a: _draw_losses(a, cases),
        lambda a: _draw_collectives(a, rows),
    ]
    for axis, panel in zip(axes.flat, panels, strict=True):
        panel(axis)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="x-small")
    figure.suptitle(device)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_layouts(axis: Any, cases: list[Case]) -> None:
    most = max((c.layout.processes for c in cases), default=1)
    shown = [c for c in cases if c.part == "steps" and c.layout.processes == most and c.tokens_per_s]
    axis.barh([f"{c.layout.name} {c.recipe} {c.wire}" for c in shown][::-1], [c.tokens_per_s for c in shown][::-1])
    axis.set_xlabel("tokens/s")
    axis.tick_params(axis="y", labelsize=7)


def _draw_weak(axis: Any, cases: list[Case]) -> None:
    for recipe in dict.fromkeys(c.recipe for c in cases if c.part == "steps"):
        points = {
            c.layout.processes: c.efficiency
            for c in cases
            if c.part == "steps" and c.recipe == recipe and c.layout.tp == c.layout.pp == 1 and c.efficiency
            and (c.wire == "coded" or c.layout.processes == 1)
        }  # fmt: skip
        axis.plot(sorted(points), [points[n] for n in sorted(points)], marker="o", label=f"{recipe}, coded gradients")
    axis.set_xlabel("GPUs, data parallel")
    axis.set_ylabel("tokens/s a GPU over one GPU's")


def _draw_losses(axis: Any, cases: list[Case]) -> None:
    runs = [c for c in cases if c.part == "losses" and c.losses]
    one = next((c for c in runs if c.layout.processes == 1), None)
    for c in runs:
        if one is not None and c is not one:
            difference = [a - b for a, b in zip(c.losses, one.losses, strict=False)]
            axis.plot(range(1, len(difference) + 1), difference, label=f"{c.layout.name} {c.wire}", linewidth=0.9)
    axis.set_xlabel("step")
    axis.set_ylabel("loss - loss of one GPU (nats per token)")


def _draw_collectives(axis: Any, rows: list[dict[str, Any]]) -> None:
    base = {(r["collective"], r["mib"]): r["median"] for r in rows if r["method"] in ("NCCL bf16", "bf16")}
    for collective, method in dict.fromkeys((r["collective"], r["method"]) for r in rows if "nvfp4" in r["method"]):
        points = {
            r["mib"]: base[collective, r["mib"]] / r["median"]
            for r in rows
            if (r["collective"], r["method"]) == (collective, method) and (collective, r["mib"]) in base
        }
        axis.plot(sorted(points), [points[mib] for mib in sorted(points)], marker=".", label=f"{collective}, {method}")
    axis.set_xscale("log", base=2)
    axis.set_xlabel("MiB of bf16 a rank")
    axis.set_ylabel("speed over the library's bf16")


if __name__ == "__main__":
    sys.exit(main())
