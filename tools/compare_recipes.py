"""Train a set of recipes on the same weights, data order and seeds, and compare their losses with bf16's.

    python tools/compare_recipes.py --tiny                                   # every shipped recipe, 200 steps, CPU
    python tools/compare_recipes.py --tiny --recipes quartet2,cage --seeds 1,2,3 --jobs 2
    python tools/compare_recipes.py --config llama_124m --recipes nvidia_nvfp4,nvidia_nvfp4+phases --seeds 1,2,3

Each run is launch/pretrain.py in a process of its own, with its folder and log under --out; `bf16` runs for every seed
as the baseline. `name+phases` is the recipe with its published phases switched on. Results: table.md, results.json and
gaps.png there, written after every run. Started again, the command goes on: finished runs are not repeated, an
interrupted one continues from its checkpoint. Exit code 1 when a run failed; the others go on.

The gap of a seed is the mean over the last --last evaluations of (validation loss - bf16's of the same seed and step),
all on the same held-out samples. Reported is the mean over seeds with a 95 % interval of Student's t over seeds. With
one seed it is that over its evaluations, which are not independent: such an interval is too narrow, and is marked.

--shrink-steps divides the step constants of recipes (when channels are chosen, windows of oscillation, resets of
moments ...), so that every block acts in a short run; --tiny divides by 10.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from compare_layouts import tail
from compare_runs import Run, read_run

from fp4dist.errors import Fp4DistError
from fp4dist.spec.blocks import Ema
from fp4dist.spec.build import plain
from fp4dist.spec.load import dump, load_recipe, load_run, shipped
from fp4dist.spec.phases import GradNoise, LrShape
from fp4dist.spec.recipe import Phase, Recipe
from fp4dist.spec.run import RunConfig
from fp4dist.spec.splits import Channels, HotResidual
from fp4dist.spec.statistics import Hold
from fp4dist.spec.training import AdaNorm, MomentReset, OsciReset, QRamping, SpikeClip
from fp4dist.study.statistics import half_interval
from fp4dist.train.folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]
BASELINE = "bf16"
PHASES = "+phases"
# Fields counted in steps: block -> (field, the least value that --shrink-steps leaves)
STEP_FIELDS: dict[type, tuple[tuple[str, int], ...]] = {
    Channels: (("after", 0), ("collect", 1)),
    HotResidual: (("every", 1),),
    Hold: (("steps", 1),),
    Ema: (("after", 0),),
    OsciReset: (("every", 2), ("window", 2)),
    QRamping: (("every", 4), ("probe", 3), ("longest", 2)),
    MomentReset: (("every", 2), ("warmup", 0)),
    SpikeClip: (("wait", 1),),
    GradNoise: (("every", 1), ("after", 0)),
    Phase: (("step", 0),),
    LrShape: (("warmup", 1),),
}


@dataclass(frozen=True)
class Job:
    """One run. settings: overrides that its recipe needs, beyond the common ones."""

    recipe: str
    seed: int
    folder: Path
    config: RunConfig
    command: tuple[str, ...]
    settings: tuple[str, ...]

    @property
    def log(self) -> Path:
        """Where the process writes."""
        return self.folder.with_suffix(".log")


@dataclass
class Outcome:
    """What came of a run. seconds: of this start, 0 where it was finished before."""

    job: Job
    seconds: float
    run: Run | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Gap:
    """A recipe's distance from the baseline in nats per token; interval: half of the 95 % interval, NaN without one."""

    recipe: str
    mean: float
    interval: float
    over_seeds: bool
    per_seed: dict[int, float]


def main() -> int:
    """Command line."""
    args = _parse()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    try:
        jobs = _jobs(args, out)
        finished = sum(_is_finished(job) for job in jobs)
        _prepare_data(jobs[0].config)
    except Fp4DistError as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return 2
    outcomes: list[Outcome] = []
    print(f"{len(jobs)} runs, {finished} of them finished before; results in {out}")
    begin = time.monotonic()
    stages = [[job for job in jobs if (job.recipe == BASELINE) == first] for first in (True, False)]
    for stage in stages:  # the baseline's runs build the caches of each seed's data order, which others only read
        with ThreadPoolExecutor(args.jobs) as pool:
            for future in as_completed([pool.submit(_run, job, args.timeout) for job in stage]):
                outcomes.append(future.result())
                print(_progress(outcomes, len(jobs), time.monotonic() - begin, args.last), flush=True)
                write(outcomes, args, out)
    print((out / "table.md").read_text(encoding="utf-8"))
    failed = [o for o in outcomes if o.failure is not None]
    for o in failed:
        print(f"{o.job.recipe} seed {o.job.seed}: {o.failure}, see {o.job.log}:\n{tail(o.job.log)}")
    return 1 if failed else 0


def _parse() -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=rest, formatter_class=raw)
    parser.add_argument("--config", help="a run file, or the name of a shipped one")
    parser.add_argument("--tiny", action="store_true", help="--config tiny --shrink-steps 10: 1.2M parameters, CPU")
    parser.add_argument("--recipes", help="names or files, comma-separated; default: every shipped one", type=_words)
    parser.add_argument("--seeds", default=["1"], help="comma-separated; default 1", type=_words)
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one key; repeatable")
    parser.add_argument("--shrink-steps", type=float, help="divide the step constants of recipes by this")
    parser.add_argument("--last", type=int, default=3, help="evaluations that count")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, help="CPU threads of each run; default: what torch takes")
    parser.add_argument("--timeout", type=float, help="seconds for one run")
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"), help="folder of runs, logs and results")
    args = parser.parse_args()
    if args.tiny == bool(args.config):
        parser.error("give --config, or --tiny")
    args.config = args.config or "tiny"
    args.shrink_steps = args.shrink_steps or (10.0 if args.tiny else 1.0)
    args.threads = args.threads or (1 if args.tiny else None)
    if args.shrink_steps < 1 or args.last < 1 or args.jobs < 1:
        parser.error("--shrink-steps, --last and --jobs must be at least 1")
    return args


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


# ---------- what is run


def _jobs(args: argparse.Namespace, out: Path) -> list[Job]:
    """Baseline first, then recipe by recipe; every configuration is loaded here, so that errors come before work."""
    names = list(dict.fromkeys([BASELINE, *(args.recipes or shipped("recipes"))]))
    return [_job(name, int(seed), args, out) for name in names for seed in args.seeds]


def _job(name: str, seed: int, args: argparse.Namespace, out: Path) -> Job:
    recipe = load_recipe(name.removesuffix(PHASES))
    changed = shrunk(recipe, args.shrink_steps)
    if name.endswith(PHASES):
        phases = tuple(dataclasses.replace(phase, enabled=True) for phase in changed.phases)
        changed = dataclasses.replace(changed, phases=phases)
    label = recipe.name + (PHASES if name.endswith(PHASES) else "")
    folder = out / label / f"seed_{seed}"
    file = out / label / "recipe.yaml"
    if changed != recipe:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(dump(changed), encoding="utf-8")
    settings = needed_settings(recipe)
    sets = [
        *args.set,
        *settings,
        f"recipe={file if changed != recipe else name}",
        f"run.name={label}_{seed}",
        f"run.seed={seed}",
        f"run.dir={folder}",
        f"data.cache_dir={out / 'data_cache'}",
        "logging.tensorboard=false",
    ]
    threads = ("env", f"OMP_NUM_THREADS={args.threads}") if args.threads else ()
    command = [*threads, sys.executable, str(ROOT / "launch/pretrain.py"), "--config", args.config]
    command += [text for override in sets for text in ("--set", override)]
    return Job(label, seed, folder, load_run(args.config, sets), tuple(command), settings)


def needed_settings(recipe: Recipe) -> tuple[str, ...]:
    """Overrides without which blocks of `recipe` cannot work: both of these replace the clipping of the whole norm."""
    blocks = (*recipe.gradients, *recipe.weights)
    return ("optim.clip_grad=0",) if any(isinstance(block, AdaNorm | QRamping) for block in blocks) else ()


def shrunk(block: Any, factor: float) -> Any:
    """A spec object with its step constants divided by `factor`."""
    if isinstance(block, tuple):
        return tuple(shrunk(item, factor) for item in block)
    if isinstance(block, dict):
        return {key: shrunk(item, factor) for key, item in block.items()}
    if factor == 1 or not dataclasses.is_dataclass(block) or isinstance(block, type):
        return block
    own = dict(STEP_FIELDS.get(type(block), ()))
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(block):
        value = getattr(block, field.name)
        if field.name in own and value is not None and value >= 1:  # below 1 it is a share of the run
            changes[field.name] = min(value, max(own[field.name], round(value / factor)))
        elif field.name not in own:
            changes[field.name] = shrunk(value, factor)
    return dataclasses.replace(block, **changes)


def _prepare_data(config: RunConfig) -> None:
    """Token files once, not by several runs at a time."""
    if config.data.prepare is not None:
        from fp4dist.train.data import ensure_prepared

        ensure_prepared(config)


def _is_finished(job: Job) -> bool:
    """Whether the folder holds this very run, with its last step. ConfigError where another run lives there."""
    folder = RunFolder(job.folder)
    folder.check(job.config)
    if not (folder.metrics.is_file() and folder.config.is_file()):
        return False
    lines = folder.metrics.read_text(encoding="utf-8").splitlines()
    return bool(lines) and json.loads(lines[-1])["step"] == job.config.train.steps


def _run(job: Job, timeout: float | None) -> Outcome:
    """Run one job to its end, unless that has happened."""
    begin = time.monotonic()
    if _is_finished(job):
        return Outcome(job, 0.0, read_run(job.folder))
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("w", encoding="utf-8") as file:
        file.write(" ".join(job.command) + "\n")
        file.flush()
        try:
            done = subprocess.run(job.command, stdout=file, stderr=subprocess.STDOUT, timeout=timeout, check=False)
            failure = f"exit code {done.returncode}" if done.returncode else None
        except subprocess.TimeoutExpired:
            failure = f"not done after {timeout:g} s"
    seconds = time.monotonic() - begin
    if failure is not None:
        return Outcome(job, seconds, failure=failure)
    return Outcome(job, seconds, read_run(job.folder))


def _progress(outcomes: Sequence[Outcome], total: int, elapsed: float, last: int) -> str:
    """One line about the newest outcome, with the time that the rest will take at the pace so far."""
    newest = outcomes[-1]
    label = f"[{len(outcomes)}/{total}] {newest.job.recipe} seed {newest.job.seed}"
    if newest.run is None:
        told = f"FAILED ({newest.failure})"
    else:
        found = {gap.recipe: gap for gap in gaps(outcomes, last)}.get(newest.job.recipe)
        told = f"validation loss {newest.run.val_losses[-1][1]:.4f}"
        told += f", gap {found.per_seed[newest.job.seed]:+.4f}" if found and newest.job.seed in found.per_seed else ""
    worked = sum(outcome.seconds > 0 for outcome in outcomes)
    rest = (total - len(outcomes)) * elapsed / worked if worked else 0.0
    took = f"{newest.seconds:.0f} s" if newest.seconds else "finished before"
    return f"{label}: {told}, {took}" + (f"; about {math.ceil(rest / 60)} min left" if rest else "")


# ---------- what came of it


def gaps(outcomes: Sequence[Outcome], last: int) -> list[Gap]:
    """The gap of every recipe that has a run whose seed the baseline has, too, smallest first."""
    runs = {(o.job.recipe, o.job.seed): o.run for o in outcomes if o.run is not None}
    baseline = {seed: dict(run.val_losses) for (name, seed), run in runs.items() if name == BASELINE}
    found = []
    for name in dict.fromkeys(name for name, _ in runs if name != BASELINE):
        differences = {
            seed: [loss - baseline[seed][step] for step, loss in run.val_losses[-last:] if step in baseline[seed]]
            for (n, seed), run in sorted(runs.items())
            if n == name and seed in baseline
        }
        if differences:
            found.append(_gap(name, differences))
    return sorted(found, key=lambda gap: (math.isnan(gap.mean), gap.mean))


def _gap(name: str, differences: dict[int, list[float]]) -> Gap:
    per_seed = {seed: statistics.fmean(values) for seed, values in differences.items()}
    over_seeds = len(per_seed) > 1
    sample = list(per_seed.values()) if over_seeds else next(iter(differences.values()))
    return Gap(name, statistics.fmean(per_seed.values()), half_interval(sample), over_seeds, per_seed)


def write(outcomes: Sequence[Outcome], args: argparse.Namespace, out: Path) -> None:
    """table.md, results.json and gaps.png."""
    found = gaps(outcomes, args.last)
    (out / "table.md").write_text(table(outcomes, found, args), encoding="utf-8")
    told = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    content = {
        "arguments": told,
        "gaps": [dataclasses.asdict(gap) for gap in found],
        "runs": [_as_json(outcome) for outcome in outcomes],
    }
    (out / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if found:
        draw(found, out / "gaps.png", args)


def table(outcomes: Sequence[Outcome], found: Sequence[Gap], args: argparse.Namespace) -> str:
    """A Markdown table: the baseline, then the recipes by gap, then what failed."""
    lines = [
        f"Gap: mean of the last {args.last} evaluations minus {BASELINE}'s of the same seed and steps. "
        + (
            f"95 % interval: Student's t over {len(args.seeds)} seeds."
            if len(args.seeds) > 1
            else "95 % interval (*): over these evaluations of one seed, which are not independent: too narrow."
        ),
        *([f"Step constants of recipes divided by {args.shrink_steps:g}."] if args.shrink_steps != 1 else []),
        "",
        "| recipe | FP4 share | validation loss | gap to bf16 | 95 % | tokens/s | settings |",
        "|---|---|---|---|---|---|---|",
    ]
    by_name = {gap.recipe: gap for gap in found}
    for name in [BASELINE, *by_name]:
        lines += _rows(name, [o for o in outcomes if o.job.recipe == name and o.run is not None], by_name.get(name))
    for outcome in outcomes:
        if outcome.failure is not None:
            lines.append(f"| {outcome.job.recipe} | | seed {outcome.job.seed}: {outcome.failure} | | | | |")
    return "\n".join(lines) + "\n"


def _rows(name: str, outcomes: Sequence[Outcome], gap: Gap | None) -> Iterator[str]:
    runs = [outcome.run for outcome in outcomes if outcome.run is not None]
    if not runs:
        return
    loss = statistics.fmean(run.val_losses[-1][1] for run in runs)
    width = ""
    if gap is not None and not math.isnan(gap.interval):
        width = f"± {gap.interval:.4f}" + ("" if gap.over_seeds else " *")
    yield (
        f"| {name} | {runs[0].fp4_share:.1%} | {loss:.4f} | {f'{gap.mean:+.4f}' if gap else ''} | {width}"
        f" | {statistics.median(run.tokens_per_s for run in runs):,.0f} | {' '.join(outcomes[0].job.settings)} |"
    )


def _as_json(outcome: Outcome) -> dict[str, Any]:
    run = outcome.run
    return {
        "recipe": outcome.job.recipe,
        "seed": outcome.job.seed,
        "seconds": outcome.seconds,
        "failure": outcome.failure,
        "folder": str(outcome.job.folder),
        "settings": list(outcome.job.settings),
        "phases": [p["name"] for p in plain(outcome.job.config.recipe)["phases"] if p["enabled"]],
        "losses": run.losses if run else None,
        "val_losses": run.val_losses if run else None,
        "tokens_per_s": run.tokens_per_s if run else None,
        "fp4_share": run.fp4_share if run else None,
    }


def draw(found: Sequence[Gap], path: Path, args: argparse.Namespace) -> None:
    """The gaps with their intervals, and each seed as a dot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 1.5 + 0.24 * len(found)))
    for place, gap in enumerate(reversed(found)):
        width = 0.0 if math.isnan(gap.interval) else gap.interval
        axes.errorbar(gap.mean, place, xerr=width, fmt="o", color="C0", capsize=3, markersize=4)
        axes.plot(list(gap.per_seed.values()), [place] * len(gap.per_seed), ".", color="C1", markersize=3)
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(found)), [gap.recipe for gap in reversed(found)], fontsize="small")
    over = "seeds" if any(gap.over_seeds for gap in found) else "evaluations of one seed (too narrow)"
    axes.set_xlabel(f"validation loss - {BASELINE}'s (nats per token), last {args.last} evaluations; 95 % over {over}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
