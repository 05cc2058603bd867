"""Train one config with gradients on different wires, same seeds and data, and compare losses, time and bytes.

    python tools/compare_comm.py --config llama_124m --processes 2 --steps 500 --set 'data.train=[my/prefix]'
    python tools/compare_comm.py ... --variants exact,mseden --steps 20 --link sockets --out runs/comm_slow
    python tools/compare_comm.py --config tiny --processes 8 --variants exact,everything --steps 200 \
        --set parallel.tp=2 --set parallel.pp=2 --set parallel.sequence_parallel=true

`exact` sends gradients as the engine does (fp32), `bf16` rounded to bf16 and summed in fp32; `mseden_bf16` does the
latter with embedding, head and norms, which `mseden` sends in fp32. `int4` is what ZeRO++'s
qgZ puts on the wire: symmetric int4 rounded to nearest with one scale for 2048 elements, here with fp32 sums and the
mean of all ranks. Every --canary steps one bucket is reduced exactly as well: error, cosine, correlation.
Variants follow each other in one job, or each has its own, side by side (--at-once: times mean nothing then).
Pieces: `--minutes 7 --resume` begins no run later than that and keeps finished ones, `--report --join A B` puts the
folders of several machines together: gaps of all seeds, each to its own `exact`. `--trace` profiles one step of each
run and fails where a compressed bucket also travels in high precision.
`--link sockets` switches NVLink, PCIe peer access and shared memory off, the stand-in for a rack's NIC.
Results go to comm.json and comm.png under --out. Exit code 1 when a variant failed or is further than --tolerance (a
share of the loss, mean of the last tenth of the steps) from the first one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jobs import launcher, new_folder, run_to, short_run, tail

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "tools" / "job_runs.py"
_RTN = "{kind: nvfp4, rounding: nearest, rotation: 0}"
_INT4 = "{kind: int4, rounding: nearest, rotation: 0, chunk: 2048}"
VARIANTS: dict[str, tuple[str, ...]] = {
    "exact": (),
    "bf16": ("comm.grad_reduce={kind: bf16}",),
    "mseden": ("comm.grad_reduce=nvfp4",),
    "mseden_bf16": ("comm.grad_reduce=nvfp4", "comm.exact=bf16"),
    "rtn": (f"comm.grad_reduce={_RTN}",),
    "sr": ("comm.grad_reduce=nvfp4_stochastic",),
    "mxfp4": ("comm.grad_reduce=mxfp4",),
    "fp8": ("comm.grad_reduce=fp8",),
    "int4": (f"comm.grad_reduce={_INT4}",),
    "rtn_ef": (f"comm.grad_reduce={_RTN}", "comm.error_feedback=ef"),
    "everything": (
        "comm.grad_reduce=nvfp4",
        "comm.pp_forward={kind: nvfp4, rounding: nearest, rotation: 128}",
        "comm.pp_backward=nvfp4",
        "comm.sp_reduce_scatter=fp8",
    ),
}
DEFAULT = "exact,bf16,mseden,rtn,int4"
LINKS = {"fast": (), "sockets": ("NCCL_P2P_DISABLE=1", "NCCL_SHM_DISABLE=1")}
SOCKETS = """# GPUs that only sockets join, as `--link sockets` makes them; the rate that NCCL reached between two H200
extends: h200_hgx
name: sockets
host: {gpus: 1, gpus_per_numa: 1, nics: 1}
across: {name: sockets, gb_per_s: 3.6, latency_us: 50}
"""
LEFT = 3  # exit code: some runs were not begun


@dataclass
class Result:
    """What came of a variant: losses of all steps, seconds of a step after the first tenth, bytes that rank 0 sent."""

    name: str
    log: str
    seconds: float
    failure: str | None = None
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    val_losses: list[float] = field(default_factory=list)
    step_seconds: float | None = None
    bytes_of_a_step: dict[str, dict[str, int]] | None = None
    canaries: list[dict[str, Any]] = field(default_factory=list)
    tail_loss: float | None = None
    gap: float | None = None
    left: bool = False
    peak_bytes: int | None = None
    traced: bool = False
    trace_faults: list[str] = field(default_factory=list)
    kernels: dict[str, dict[str, float]] = field(default_factory=dict)


def main() -> int:
    """Command line."""
    args = _parse()
    out = _folder(args)
    keys = [key for key in _keys(args) if _place(key, args) is None]
    if not args.report:
        common, until = _common(args, out), time.time() + 60 * args.minutes
        jobs = [[key for key in keys if _variant(key) == name] for name in args.variants] if args.at_once else [keys]
        with ThreadPoolExecutor(len(jobs)) as pool:
            done = [pool.submit(_run, job, args, common, out, until) for job in jobs if job]
        for future in done:
            future.result()
    results = {key: _result(key, args, out) for key in _keys(args)}
    for key, result in results.items():
        _judge(results, key)
        print(_line(result), flush=True)
    lines = _over_seeds(results, args)
    print("\n".join(lines))
    told = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "join"}
    content = {"arguments": told, "results": {key: asdict(r) for key, r in results.items()}, "over seeds": lines}
    (out / "comm.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    drawn = [r for key, r in results.items() if key in args.variants and r.losses]
    if drawn:
        _draw(drawn, out / "comm.png")
    return _verdict(results, args)


def _verdict(results: dict[str, Result], args: argparse.Namespace) -> int:
    """Print what is wrong; the exit code."""
    bad = [
        f"{r.name}: {r.failure or '; '.join(r.trace_faults) or f'{r.gap:+.3%} from {args.variants[0]}'}"
        for r in results.values()
        if (r.failure is not None and not r.left)
        or r.trace_faults
        or (args.tolerance is not None and r.gap is not None and abs(r.gap) > args.tolerance)
    ]
    left = [r.name for r in results.values() if r.left]
    if left:
        print(f"left for another call with --resume, or --join: {', '.join(left)}")
    print("\n".join(bad) or "all as expected")
    return 1 if bad else LEFT if left else 0


def _parse() -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n")
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=rest, formatter_class=plain)
    parser.add_argument("--config", default="llama_124m", help="a run file, or the name of a shipped one")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one key; repeatable")
    parser.add_argument("--steps", type=int, default=500, help="train.steps, and warm-up cut to a tenth of it")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--variants", type=lambda text: text.split(","), default=DEFAULT.split(","), help=DEFAULT)
    seeds = lambda text: [int(word) for word in text.split(",")]  # noqa: E731
    parser.add_argument("--seeds", type=seeds, default=[], metavar="1,2", help="values of run.seed; default: the run's")
    parser.add_argument("--canary", type=int, default=20, help="steps between canaries; their steps' time is left out")
    parser.add_argument("--trace", action="store_true", help="profile a step of each: coded gradients travel once")
    parser.add_argument("--at-once", action="store_true", help="run all variants side by side: times mean nothing then")
    parser.add_argument("--link", choices=tuple(LINKS), default="fast")
    parser.add_argument("--tolerance", type=float, help="largest relative gap of the last losses that is all right")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for one job")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no run later than this")
    parser.add_argument("--resume", action="store_true", help="keep what is complete under --out, run the rest")
    parser.add_argument("--join", type=Path, nargs="+", default=[], metavar="DIR", help="take finished runs from these")
    parser.add_argument("--report", action="store_true", help="run nothing: report on --out and --join")
    parser.add_argument("--out", type=Path, default=Path("runs/comm"), help="folder of runs, logs and results")
    return parser.parse_args()


def _keys(args: argparse.Namespace) -> list[str]:
    """Names of the runs: a variant under the first seed has its own name; all variants of a seed before the next."""
    later = [f"{name}.s{seed}" for seed in args.seeds[1:] for name in args.variants]
    return [*args.variants, *later]


def _variant(key: str) -> str:
    return key.partition(".s")[0]


def _folder(args: argparse.Namespace) -> Path:
    """--out, made; under --resume and --report it may exist, and runs that did not end are removed."""
    if not args.resume and not args.report:
        return new_folder(args.out, args.variants, VARIANTS, "--variants")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for key in _keys(args) if args.resume else []:
        if (out / key).exists() and not _complete(out / key, args):
            shutil.rmtree(out / key)
    return out


def _complete(folder: Path, args: argparse.Namespace) -> bool:
    file = folder / "metrics.jsonl"
    return file.exists() and len(file.read_text(encoding="utf-8").splitlines()) == args.steps


def _place(key: str, args: argparse.Namespace) -> Path | None:
    """The folder of a finished run."""
    places = [folder.resolve() / key for folder in (args.out, *args.join)]
    return next((place for place in places if _complete(place, args)), None)


def _common(args: argparse.Namespace, out: Path) -> list[str]:
    """Overrides of every variant."""
    sys.path.insert(0, str(ROOT))
    from fp4dist.spec.load import load_run

    config = load_run(args.config, args.set)
    return [*args.set, *short_run(args.steps, min(config.optim.warmup_steps, args.steps // 10), out)]


def _run(keys: list[str], args: argparse.Namespace, common: list[str], out: Path, until: float) -> None:
    """Start a job that trains these runs one after the other, and wait for it."""
    stem = f"{keys[0]}_to_{keys[-1]}" if len(keys) > 1 else keys[0]
    plan, log = out / f"{stem}.plan.json", out / f"{stem}.log"
    shared = {"config": args.config, "trace": args.trace}
    runs = [{**shared, "sets": _sets(key, args, common, out), "folder": str(out / key)} for key in keys]
    plan.write_text(json.dumps(runs), encoding="utf-8")
    command = ["env", "NCCL_NVLS_ENABLE=0", *LINKS[args.link], *launcher(args.processes), str(RUNS), str(plan)]
    failure, seconds = run_to(log, [*command, "--until", str(until)], args.timeout)
    for key in keys:
        told = {"log": str(log), "seconds": seconds, "failure": failure}
        (out / f"{key}.job.json").write_text(json.dumps(told) + "\n", encoding="utf-8")


def _sets(key: str, args: argparse.Namespace, common: list[str], out: Path) -> list[str]:
    """Overrides of a run."""
    own, (_, _, seed) = VARIANTS[_variant(key)], key.partition(".s")
    watch = [f"comm.canary.every={args.canary}", "comm.guard=false"] if own else []
    watch += [f"comm.topology={_slow(out)}"] if own and args.link == "sockets" else []
    seeds = [f"run.seed={seed or args.seeds[0]}"] if args.seeds else []
    return [*common, *own, *watch, *seeds, f"run.name={key}", f"run.dir={out / key}"]


def _slow(out: Path) -> Path:
    """The topology of GPUs that only sockets join, from which the policy chooses how they exchange."""
    file = out / "sockets.yaml"
    file.write_text(SOCKETS, encoding="utf-8")
    return file


def _result(key: str, args: argparse.Namespace, out: Path) -> Result:
    """What a run has left; it has failed if it has not made all its steps, and is left if it was not begun."""
    place = _place(key, args) or out / key
    job = place.parent / f"{key}.job.json"
    told = json.loads(job.read_text(encoding="utf-8")) if job.exists() else {}
    result = Result(key, told.get("log", ""), told.get("seconds", 0.0), told.get("failure"))
    if (place / "metrics.jsonl").exists():
        _read(result, [json.loads(line) for line in (place / "metrics.jsonl").read_text("utf-8").splitlines()])
    case, trace = place / "case.json", place / "trace.json"
    if case.exists():
        ended = json.loads(case.read_text(encoding="utf-8"))
        result.peak_bytes, result.failure = ended.get("peak_bytes"), ended.get("failure") or result.failure
    if trace.exists():
        found = json.loads(trace.read_text(encoding="utf-8"))
        result.traced, result.trace_faults, result.kernels = True, found["faults"], found["kernels"]
    if len(result.losses) == args.steps:
        result.failure = None
    result.left = not place.exists() and result.failure is None
    return result


def _read(result: Result, rows: list[dict[str, Any]]) -> None:
    steps = [row for row in rows if row.get("loss") is not None]
    result.losses = [row["loss"] for row in steps]
    result.grad_norms = [row["grad_norm"] for row in steps]
    result.val_losses = [row["val_loss"] for row in rows if row.get("val_loss") is not None]
    late = [row for row in steps[max(3, len(steps) // 10) :] if not row.get("canary")]
    result.step_seconds = statistics.median(row["seconds"] for row in late) if late else None
    result.bytes_of_a_step = late[-1].get("bytes_sent") if late else None
    result.canaries = [{"step": row["step"], **found} for row in steps for found in row.get("canary") or ()]
    last = result.losses[-max(1, len(steps) // 10) :]
    result.tail_loss = statistics.fmean(last) if last else None


def _judge(results: dict[str, Result], key: str) -> None:
    """Fill in the gap to the first variant under the same seed."""
    reference = next(r for k, r in results.items() if k.partition(".s")[2] == key.partition(".s")[2])
    result = results[key]
    if result.tail_loss is not None and reference.tail_loss is not None:
        result.gap = result.tail_loss / reference.tail_loss - 1


def _over_seeds(results: dict[str, Result], args: argparse.Namespace) -> list[str]:
    """Of each variant the mean gap over seeds, paired, with its standard error."""
    lines = []
    for name in args.variants[1:]:
        gaps = [r.gap for key, r in results.items() if _variant(key) == name and r.gap is not None]
        if len(gaps) > 1:
            error = statistics.stdev(gaps) / len(gaps) ** 0.5
            low, high = min(gaps), max(gaps)
            lines.append(f"{name:11s} {len(gaps)} seeds: {statistics.fmean(gaps):+.3%} +- {error:.3%} of the loss of"
                         f" {args.variants[0]} ({low:+.3%} to {high:+.3%})")  # fmt: skip
    return lines


def _line(r: Result) -> str:
    if r.left:
        return f"{r.name}: not begun"
    if r.failure is not None or not r.losses:
        return (
            f"{r.name}: FAILED: {r.failure or 'no losses'}; the end of its log:\n{tail(Path(r.log)) if r.log else ''}"
        )
    text = f"{r.name:11s} {len(r.losses)} steps, last loss {r.losses[-1]:.4f}, mean of the last tenth {r.tail_loss:.4f}"
    text += f" ({r.gap:+.3%}), {1e3 * (r.step_seconds or 0):.1f} ms a step"
    for direction, account in (r.bytes_of_a_step or {}).items():
        sent = account["coded"] + account["exact"]
        text += f"; {direction} {sent:,} bytes"
        text += f" of {account['plain']:,}" if account["plain"] else ""
    if r.canaries:
        names = ("nmse", "one_shot", "bias", "cosine", "correlation")
        middle = {key: statistics.median(c[key] for c in r.canaries) for key in names}
        text += "; canaries' medians " + ", ".join(f"{key} {value:.5g}" for key, value in middle.items())
    text += f"; peak memory {r.peak_bytes / 2**30:.2f} GiB" if r.peak_bytes else ""
    text += f"; trace: {'; '.join(r.trace_faults) or 'nothing travels twice'}" if r.traced else ""
    text += "".join(f", {k['count']} x {name.split('(')[0]} {k['us']:.0f} us" for name, k in r.kernels.items())
    return text


def _draw(results: list[Result], path: Path) -> None:
    """Losses, their distance from the first variant's, and the canaries' errors."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, middle, bottom) = pyplot.subplots(3, 1, figsize=(8, 9), sharex=True)
    for r in results:
        steps = range(1, len(r.losses) + 1)
        (line,) = top.plot(steps, r.losses, label=r.name, linewidth=0.9)
        both = zip(r.losses, results[0].losses, strict=False)
        middle.plot(steps, [a - b for a, b in both], color=line.get_color(), linewidth=0.9)
        if r.canaries:
            x, y = [c["step"] for c in r.canaries], [c["one_shot"] for c in r.canaries]
            bottom.plot(x, y, color=line.get_color(), marker=".", linewidth=0.6)
    top.set_ylabel("loss (nats per token)")
    top.legend(ncols=2, fontsize="small")
    middle.set_ylabel(f"loss - loss of {results[0].name}")
    bottom.set_yscale("log")
    bottom.set_ylabel("error of one rank's message")
    bottom.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
