"""Train one config in several parallel layouts on this machine and compare every loss with that of one process.

    python tools/compare_layouts.py --config quickstart --steps 20 --layouts one,tp2sp,pp2,vpp,cp2,dp2,zero1,zero3
    python tools/compare_layouts.py --config quickstart --recipe quartet2 --steps 20 --out runs/layouts_quartet2
    python tools/compare_layouts.py --config quickstart --layouts moe,moe_loop,ep2,ep2_loop --tolerance 2e-3

Each case is a run of launch/pretrain.py with its own folder and log under --out; results go to layouts.json and
layouts.png there. A case that fails is reported, and the others go on. Cases with experts get `model.moe` from --moe
and are compared with `moe`; `moe_loop` and `ep2_loop` run the experts one after the other and must give the grouped
GEMM's bits. Exit code 1 when a case failed, exceeded --tolerance, or should have had equal bits and had not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jobs import launcher, new_folder, run_to, short_run, tail

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Layout:
    """A case.

    processes   ranks to start
    sets        overrides of the config
    reference   the case that it is compared with
    same_bits   it must equal this one bit for bit
    experts     it trains the model with experts
    """

    processes: int
    sets: tuple[str, ...] = ()
    reference: str = "one"
    same_bits: str | None = None
    experts: bool = False


def _zero(stage: int, *more: str, processes: int = 2) -> Layout:
    return Layout(processes, ("engine.kind=deepspeed", f"engine.zero_stage={stage}", *more))


TP2SP = ("parallel.tp=2", "parallel.sequence_parallel=true")
LOOP = "model.moe.grouped_gemm=false"
LAYOUTS = {
    "one": Layout(1),
    "tp2": Layout(2, ("parallel.tp=2",)),
    "tp2sp": Layout(2, TP2SP),
    "pp2": Layout(2, ("parallel.pp=2",)),
    "vpp": Layout(2, ("parallel.pp=2", "parallel.vpp=2")),
    "cp2": Layout(2, ("parallel.cp=2",)),
    "dp2": Layout(2),
    "recompute": Layout(1, ("train.recompute=full",), same_bits="one"),
    **{f"zero{stage}": _zero(stage) for stage in range(4)},
    "zero1_tp2sp": _zero(1, *TP2SP),
    "zero1_pp2": _zero(1, "parallel.pp=2"),
    "pp2tp2sp": Layout(4, ("parallel.pp=2", *TP2SP)),
    "cp2tp2sp": Layout(4, ("parallel.cp=2", *TP2SP)),
    "moe": Layout(1, reference="moe", experts=True),
    "moe_loop": Layout(1, (LOOP,), reference="moe", same_bits="moe", experts=True),
    "ep2": Layout(2, ("parallel.ep=2",), reference="moe", experts=True),
    "ep2_loop": Layout(2, ("parallel.ep=2", LOOP), reference="moe", same_bits="ep2", experts=True),
}
DEFAULT = "one,tp2sp,pp2,vpp,cp2,dp2,zero1,zero3,moe,ep2,ep2_loop"


@dataclass
class Result:
    """What came of a case; gaps are over the steps that both runs have, in nats per token."""

    name: str
    log: str
    seconds: float
    failure: str | None = None
    losses: list[float] | None = None
    val_losses: list[float] | None = None
    tokens_per_s: float | None = None
    largest_gap: float | None = None
    mean_gap: float | None = None
    equal_steps: int | None = None


def main() -> int:
    """Command line."""
    args = _parse()
    out = new_folder(args.out, args.layouts, LAYOUTS, "--layouts")
    common = _common(args, out)
    results: dict[str, Result] = {}
    for name in args.layouts:
        results[name] = _run(name, args, common, out)
        _compare(results, name)
        print(_line(results[name]), flush=True)
        _write(results, args, out)
    problems = _problems(results, args.tolerance)
    print("\n".join(problems) or "all as expected")
    return 1 if problems else 0


def _parse() -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n")
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=rest, formatter_class=plain)
    parser.add_argument("--config", default="quickstart", help="a run file, or the name of a shipped one")
    parser.add_argument("--recipe", help="instead of the config's")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one key; repeatable")
    parser.add_argument("--steps", type=int, default=20, help="train.steps, and warm-up cut to a fifth of it")
    parser.add_argument("--layouts", type=lambda text: text.split(","), default=DEFAULT.split(","), help=DEFAULT)
    parser.add_argument("--moe", help="model.moe of the cases with experts; default: 4 experts, 2 of them a token")
    parser.add_argument("--launcher", choices=("torchrun", "deepspeed"), default="torchrun")
    parser.add_argument("--tolerance", type=float, help="largest loss gap that is all right")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for one case")
    parser.add_argument("--out", type=Path, default=Path("runs/layouts"), help="folder of runs, logs and results")
    return parser.parse_args()


def _common(args: argparse.Namespace, out: Path) -> list[str]:
    """Overrides of every case."""
    sys.path.insert(0, str(ROOT))
    from fp4dist.spec.load import load_run

    sets = [*args.set, *([f"recipe={args.recipe}"] if args.recipe else [])]
    config = load_run(args.config, sets)
    if args.moe is None:
        args.moe = f"{{num_experts: 4, top_k: 2, ffn_hidden_size: {config.model.ffn_hidden_size // 2}}}"
    return [
        *sets,
        *short_run(args.steps, min(config.optim.warmup_steps, args.steps // 5), out),
        "train.deterministic=true",
    ]


def _run(name: str, args: argparse.Namespace, common: list[str], out: Path) -> Result:
    """Start one case and wait for it."""
    layout = LAYOUTS[name]
    experts = [f"model.moe={args.moe}"] if layout.experts else []
    start = launcher(layout.processes, args.launcher) if layout.processes > 1 else [sys.executable]
    sets = [*common, *experts, *layout.sets, f"run.name={name}", f"run.dir={out / name}"]
    command = [*start, str(ROOT / "launch/pretrain.py"), "--config", args.config]
    command += [text for override in sets for text in ("--set", override)]
    log = out / f"{name}.log"
    print(f"{name}: {layout.processes} process{'es' * (layout.processes > 1)}, log {log}", flush=True)
    failure, seconds = run_to(log, command, args.timeout)
    result = Result(name, str(log), seconds, failure)
    if failure is None:
        _read(result, out / name / "metrics.jsonl")
    return result


def _read(result: Result, metrics: Path) -> None:
    rows: list[dict[str, Any]] = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    result.losses = [row["loss"] for row in rows if row.get("loss") is not None]
    result.val_losses = [row["val_loss"] for row in rows if row.get("val_loss") is not None]
    speeds = [row["tokens_per_s"] for row in rows if row.get("tokens_per_s")]
    result.tokens_per_s = statistics.median(speeds) if speeds else None


def _compare(results: dict[str, Result], name: str) -> None:
    """Fill in the gaps to the reference, where that ran."""
    result, reference = results[name], results.get(LAYOUTS[name].reference)
    if result.losses is None or reference is None or reference.losses is None:
        return
    gaps = [abs(a - b) for a, b in zip(result.losses, reference.losses, strict=True)]
    result.largest_gap, result.mean_gap = max(gaps), statistics.fmean(gaps)
    result.equal_steps = sum(gap == 0 for gap in gaps)


def _line(r: Result) -> str:
    if r.failure is not None or not r.losses:
        return f"  FAILED: {r.failure or 'no losses'}; the end of its log:\n{tail(Path(r.log))}"
    text = f"  loss {r.losses[0]:.6f} -> {r.losses[-1]:.6f}, {r.tokens_per_s or 0:,.0f} tokens/s, {r.seconds:.0f} s"
    if r.largest_gap is None:
        return text
    reference = LAYOUTS[r.name].reference
    return text + f"; to {reference}: largest gap {r.largest_gap:.2e}, {r.equal_steps} of {len(r.losses)} steps equal"


def _problems(results: dict[str, Result], tolerance: float | None) -> list[str]:
    found = []
    for name, r in results.items():
        twin = results.get(LAYOUTS[name].same_bits or "")
        if r.failure is not None or not r.losses:
            found.append(f"{name}: {r.failure or 'no losses'}, see {r.log}")
        elif twin is not None and twin.losses is not None and twin.losses != r.losses:
            found.append(f"{name}: its losses are not those of {twin.name}, bit for bit")
        elif tolerance is not None and r.largest_gap is not None and not r.largest_gap <= tolerance:
            reference = LAYOUTS[name].reference
            found.append(f"{name}: a loss is {r.largest_gap:.2e} from {reference}'s, more than {tolerance}")
    return found


def _write(results: dict[str, Result], args: argparse.Namespace, out: Path) -> None:
    told = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    content = {"arguments": told, "results": {name: asdict(r) for name, r in results.items()}}
    (out / "layouts.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    _draw(results, out / "layouts.png")


def _draw(results: dict[str, Result], path: Path) -> None:
    """Losses, and below them each case's distance from its reference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(8, 7), sharex=True)
    for name, r in results.items():
        if not r.losses:
            continue
        steps = range(1, len(r.losses) + 1)
        (line,) = top.plot(steps, r.losses, label=name, linewidth=0.9)
        reference = results.get(LAYOUTS[name].reference)
        if reference is not None and reference is not r and reference.losses:
            gaps = [abs(a - b) for a, b in zip(r.losses, reference.losses, strict=True)]
            bottom.plot(steps, gaps, color=line.get_color(), linewidth=0.9)
    top.set_ylabel("loss (nats per token)")
    if top.lines:
        top.legend(ncols=2, fontsize="small")
    bottom.set_yscale("symlog", linthresh=1e-7)
    bottom.set_ylabel("|loss - loss of the reference|")
    bottom.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
