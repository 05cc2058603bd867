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
`--link sockets` switches NVLink, PCIe peer access and shared memory off, the stand-in for a rack's NIC.
Results go to comm.json and comm.png under --out. Exit code 1 when a variant failed or is further than --tolerance (a
share of the loss, mean of the last tenth of the steps) from the first one.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import launcher, new_folder, run_to, short_run, tail

if TYPE_CHECKING:
    from fp4dist.spec.run import RunConfig

ROOT = Path(__file__).resolve().parents[1]
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


def main() -> int:
    """Command line."""
    args = _parse()
    if args.worker is not None:
        return _work(json.loads(args.worker.read_text(encoding="utf-8")))
    out = new_folder(args.out, args.variants, VARIANTS, "--variants")
    common = _common(args, out)
    results: dict[str, Result] = {}
    jobs = [[name] for name in args.variants] if args.at_once else [list(args.variants)]
    with ThreadPoolExecutor(len(jobs)) as pool:
        done = [pool.submit(_run, names, args, common, out) for names in jobs]
    found = {name: result for future in done for name, result in future.result().items()}
    for name in args.variants:
        results[name] = found[name]
        _judge(results, name)
        print(_line(results[name]), flush=True)
        told = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        content = {"arguments": told, "results": {n: asdict(r) for n, r in results.items()}}
        (out / "comm.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    _draw(list(results.values()), out / "comm.png")
    bad = [
        f"{r.name}: {r.failure or f'{r.gap:+.3%} from {args.variants[0]}'}"
        for r in results.values()
        if r.failure is not None or (args.tolerance is not None and r.gap is not None and abs(r.gap) > args.tolerance)
    ]
    print("\n".join(bad) or "all as expected")
    return 1 if bad else 0


def _parse() -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n")
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=rest, formatter_class=plain)
    parser.add_argument("--config", default="llama_124m", help="a run file, or the name of a shipped one")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one key; repeatable")
    parser.add_argument("--steps", type=int, default=500, help="train.steps, and warm-up cut to a tenth of it")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--variants", type=lambda text: text.split(","), default=DEFAULT.split(","), help=DEFAULT)
    parser.add_argument("--canary", type=int, default=20, help="steps between canaries; their steps' time is left out")
    parser.add_argument("--at-once", action="store_true", help="run all variants side by side: times mean nothing then")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--link", choices=tuple(LINKS), default="fast")
    parser.add_argument("--tolerance", type=float, help="largest relative gap of the last losses that is all right")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for one variant")
    parser.add_argument("--out", type=Path, default=Path("runs/comm"), help="folder of runs, logs and results")
    return parser.parse_args()


def _common(args: argparse.Namespace, out: Path) -> list[str]:
    """Overrides of every variant."""
    sys.path.insert(0, str(ROOT))
    from fp4dist.spec.load import load_run

    config = load_run(args.config, args.set)
    return [*args.set, *short_run(args.steps, min(config.optim.warmup_steps, args.steps // 10), out)]


def _run(names: list[str], args: argparse.Namespace, common: list[str], out: Path) -> dict[str, Result]:
    """Start a job that trains these variants one after the other, and wait for it."""
    plan, log = out / f"{'_'.join(names)}.plan.json", out / f"{'_'.join(names)}.log"
    runs = [(args.config, _sets(name, args, common, out)) for name in names]
    plan.write_text(json.dumps(runs), encoding="utf-8")
    command = ["env", "NCCL_NVLS_ENABLE=0", *LINKS[args.link], *launcher(args.processes)]
    failure, seconds = run_to(log, [*command, str(Path(__file__).resolve()), "--worker", str(plan)], args.timeout)
    return {name: _result(name, args, out, log, seconds, failure) for name in names}


def _work(runs: list[tuple[str, list[str]]]) -> int:
    """A rank of `_run`: each run in the same process group, without evaluations and checkpoints."""
    sys.path.insert(0, str(ROOT))
    import torch
    import torch.distributed as dist

    from fp4dist import env
    from fp4dist.spec.load import load_run

    logging.basicConfig(level=logging.INFO if env.rank() == 0 else logging.WARNING, format="%(message)s")
    env.ensure_launch_variables()
    if torch.cuda.is_available():
        torch.cuda.set_device(env.local_rank())
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    for config, sets in runs:
        _train(load_run(config, sets))
        dist.barrier()
    dist.destroy_process_group()
    return 0


def _train(config: RunConfig) -> None:
    """The steps of one run; rank 0 writes a line of metrics.jsonl for each."""
    from fp4dist.train import communication, data, loop
    from fp4dist.train.world import open_world

    config = loop.resolve_dtype(config)
    with open_world(config) as world:
        data.ensure_prepared(config)
        datasets = data.build_datasets(config, world.dp_size)
        engine, applied = loop.build_engine(config, world)
        place = {"dp_rank": world.dp_rank, "dp_size": world.dp_size, "cp_rank": world.cp_rank, "cp_size": world.cp_size}
        batches = data.train_iterator(datasets, config, consumed_samples=0, **place)
        Path(config.run_dir).mkdir(parents=True, exist_ok=True)
        with Path(config.run_dir, "metrics.jsonl" if world.is_first else f"rank{world.rank}.jsonl").open("w") as file:
            for step in range(1, config.train.steps + 1):
                applied.set_step(step - 1, config.train.steps)
                result, seconds = loop.timed_step(engine, applied, step, batches)
                sent, canaries = communication.told(result.traffic)
                row = {"step": step, "loss": result.loss, "grad_norm": result.grad_norm, "seconds": seconds,
                       "bytes_sent": sent, "canary": canaries}  # fmt: skip
                file.write(json.dumps(row) + "\n")
                file.flush()
        engine.close()


def _sets(name: str, args: argparse.Namespace, common: list[str], out: Path) -> list[str]:
    """Overrides of a variant."""
    own = VARIANTS[name]
    watch = [f"comm.canary.every={args.canary}", "comm.guard=false"] if own else []
    return [*common, *own, *watch, f"run.name={name}", f"run.dir={out / name}"]


def _result(name: str, args: argparse.Namespace, out: Path, log: Path, seconds: float, failure: str | None) -> Result:
    """What a variant has left; it has failed if it has not made all its steps."""
    result = Result(name, str(log), seconds, failure)
    metrics = out / name / "metrics.jsonl"
    if metrics.exists():
        _read(result, [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()])
    if len(result.losses) == args.steps:
        result.failure = None
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


def _judge(results: dict[str, Result], name: str) -> None:
    """Fill in the gap to the first variant."""
    result, reference = results[name], next(iter(results.values()))
    if result.tail_loss is not None and reference.tail_loss is not None:
        result.gap = result.tail_loss / reference.tail_loss - 1


def _line(r: Result) -> str:
    if r.failure is not None or not r.losses:
        return f"{r.name}: FAILED: {r.failure or 'no losses'}; the end of its log:\n{tail(Path(r.log))}"
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
