#!/usr/bin/env python
"""Train a study's recipes, sizes, budgets and seeds piece by piece, and make its table.

    python tools/study.py plan ordering                                   # the runs and their sizes
    python tools/study.py run ordering --out runs/study --minutes 7 --devices cuda:0,cuda:1
    python tools/study.py report ordering --out runs/study                # table.md, results.json and four pictures
    python tools/study.py report ordering --out docs/studies/ordering/results.json   # the same again

`run` starts --jobs processes on each device; they share the folder of records, take what nobody has finished and stop
when --minutes are over. A run that cannot end by then is not begun; with --state it is cut, kept there (weights and
moments, 12 bytes a parameter) and continued by the next call; the --last one finishes what it can. Called again, it
goes on; finished runs are one JSON file each, which may be gathered from several machines into one folder. Exit code 1
when a run failed; the others go on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from fp4dist.errors import ConfigError, DataError, Fp4DistError
from fp4dist.spec.run import BackendConfig
from fp4dist.study.pieces import clear_claims, read_records, work
from fp4dist.study.plan import Study, fingerprint, jobs, load_study, name_of
from fp4dist.study.report import write_report
from fp4dist.study.results import read_results
from fp4dist.study.training import load_data


def main() -> int:
    """Command line."""
    args = _parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        study = _study(args)
        if args.command == "plan":
            print(_plan(study, args))
            return 0
        if args.command == "report":
            print(_report(study, args))
            return 0
        return _work(study, args) if args.worker is not None else _run(study, args)
    except (Fp4DistError, OSError) as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return 2


def _parse() -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=rest, epilog=summary, formatter_class=raw)
    parser.add_argument("command", choices=("plan", "run", "report"))
    parser.add_argument("study", help="a study file, or the name of a shipped one")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/study"), help="folder of records; `report`: or a results.json"
    )
    parser.add_argument("--report", type=Path, help="where `report` writes; default: --out")
    parser.add_argument("--minutes", type=float, default=7.0, help="of `run`")
    parser.add_argument("--devices", type=_words, default=["cuda" if torch.cuda.is_available() else "cpu"])
    parser.add_argument("--jobs", type=int, default=1, help="processes on each device")
    parser.add_argument("--state", type=Path, help="folder of cut runs; without it runs are never cut")
    parser.add_argument("--last", action="store_true", help="with --state: begin only what can end in time")
    parser.add_argument("--arms", type=_words, default=[], help="only these, comma-separated")
    parser.add_argument("--seeds", type=_numbers, default=(), help="only these")
    parser.add_argument("--tokens", type=_numbers, default=(), help="other budgets, such as 20e6")
    parser.add_argument("--micro-batch", type=int, help="sequences of a forward pass, in place of the study's")
    parser.add_argument("--train", type=_words, default=[], help="other prefixes of token files")
    parser.add_argument("--valid", type=_words, default=[], help="likewise, held out")
    parser.add_argument("--allow-reference", action="store_true", help="let the slow reference run on a GPU")
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)  # the deadline, in a process that `run` starts
    args = parser.parse_args()
    args.arms = tuple(args.arms)
    return args


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(float(word)) for word in _words(text))
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{text!r}: numbers such as 1,2 or 20e6 are wanted") from e


def _study(args: argparse.Namespace) -> Study:
    """The study with what the command line changes."""
    study = load_study(args.study)
    changes = {}
    if args.tokens:
        changes["tokens"], changes["baseline_tokens"] = args.tokens, ()
    if args.micro_batch:
        changes["sizes"] = tuple(dataclasses.replace(size, micro_batch=args.micro_batch) for size in study.sizes)
    changes |= {key: tuple(getattr(args, key)) for key in ("train", "valid") if getattr(args, key)}
    try:
        return dataclasses.replace(study, **changes)
    except ValueError as e:
        raise ConfigError(f"study {study.name} with {', '.join(changes)} of the command line: {e}") from e


def _report(study: Study, args: argparse.Namespace) -> str:
    """Write the report of a folder of records, or of what a report has kept of them; its page."""
    if not args.out.exists():
        raise DataError(f"--out {args.out}: no such folder of records, nor a report's results.json")
    if args.out.is_file():
        return write_report(study, read_results(args.out), args.report or args.out.parent)
    return write_report(study, read_records(args.out), args.report or args.out)


def _plan(study: Study, args: argparse.Namespace) -> str:
    """The runs, and what is done of them."""
    wanted = jobs(study, args.arms, args.seeds)
    done = {fingerprint(r["config"]) for r in read_records(args.out)} if args.out.exists() else set()
    lines = [f"study {study.name}: {len(wanted)} runs, {sum(job.fingerprint in done for job in wanted)} of them done"]
    lines += [f"  {job.name:<60} {job.steps:>6} steps{'  done' if job.fingerprint in done else ''}" for job in wanted]
    lines += [f"arm {name_of(job.arm)}: recipe {job.recipe.name}" for job in jobs(study, args.arms, study.seeds[:1])]
    return "\n".join(lines)


def _run(study: Study, args: argparse.Namespace) -> int:
    """Start the processes and wait for them."""
    args.out.mkdir(parents=True, exist_ok=True)
    jobs(study, args.arms, args.seeds)  # names that do not exist are told before anything starts
    clear_claims(args.out)
    deadline = time.monotonic() + 60 * args.minutes
    commands = []
    for device in args.devices:
        given = [a for a in sys.argv[1:] if not a.startswith("--devices=")]
        commands += [[sys.executable, __file__, *given, "--devices", device, "--worker", str(deadline)]] * args.jobs
    running = [subprocess.Popen(command) for command in commands]
    codes = [process.wait() for process in running]
    if read_records(args.out):
        print(write_report(study, read_records(args.out), args.out))
    return max(codes)


def _work(study: Study, args: argparse.Namespace) -> int:
    """One process: runs until the deadline."""
    device = torch.device(args.devices[-1])
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    data = load_data(study.train, study.valid, device)
    backend = BackendConfig(allow_reference=args.allow_reference)
    wanted = jobs(study, args.arms, args.seeds)
    failures = work(
        wanted, data, device, args.out, deadline=args.worker, state=args.state, last=args.last, backend=backend
    )
    if failures:
        file = args.out / "failures.json"
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        file.write_text(json.dumps([*before, *failures], indent=1) + "\n", encoding="utf-8")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
