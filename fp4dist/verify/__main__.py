"""Verify the kernels of this machine; one report file.

    python -m fp4dist.kernels.verify                       a GPU: bits, conversions, speeds, 50 steps; five minutes
    python -m fp4dist.kernels.verify --recipes quartet2 --no-train
    python -m fp4dist.kernels.verify --small                            no GPU: a training run on the reference
    TRITON_INTERPRET=1 python -m fp4dist.kernels.verify --small         no GPU: Triton's quantizers, interpreted

Exit codes: 0 all equal and trained, 1 something differs or did not train (the report says what), 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from fp4dist.spec.load import load_run, shipped
from fp4dist.verify import conversions, parity, report, speed, training, wires


def main() -> int:
    """All sections, the report, the exit code."""
    args = _parse()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    names = args.recipes or (list(shipped("recipes")) if gpu else [_usual()])
    data: dict[str, Any] = {"environment": report.environment(device)}
    for key, value in data["environment"].items():
        say(f"{key}: {value}")
    interpreted = conversions.INTERPRETED
    if gpu or interpreted:
        section("bits against the reference")
        matrix = parity.of_linears(names, device, say) if gpu else parity.of_operands(names, torch.device("cuda"), say)
        if gpu:
            wires.of_wires(matrix, device)
        data["parity"] = report.of_matrix(matrix)
    if gpu:
        section("conversion instructions")
        data["conversions"] = conversions.check(device)
        section("speed")
        data["speed"] = report.of_times(*speed.measure(names, device, say))
    if not args.no_train and not interpreted:
        section("training")
        data["training"] = _train(args, gpu)
    data["passed"] = passed(data)
    text, table = report.write(args.out, data)
    for cell in data.get("parity", {}).get("cells", []):
        if cell["fault"]:
            say(f"DIFFERS {cell['op']} {cell['spec']} on {cell['backend']} ({cell['recipe']}): {cell['fault']}")
    say(f"{'passed' if data['passed'] else 'FAILED'}: {text} and {table}")
    return 0 if data["passed"] else 1


def passed(data: dict[str, Any]) -> bool:
    """Nothing differs where the same is promised, and every run trained. Nothing compared is no proof."""
    faults = data.get("parity", {}).get("faults", 0)
    nearest = data.get("conversions", {}).get("cvt.rn e2m1x2", "")
    runs = data.get("training", {}).values()
    something = bool(data.get("parity", {}).get("cells")) or bool(runs)
    return something and not faults and "differs" not in nearest and all(run["ok"] for run in runs)


def _usual() -> str:
    """The recipe of the quick start."""
    return load_run("quickstart").recipe.name


def _train(args: argparse.Namespace, gpu: bool) -> dict[str, Any]:
    run = args.run or ("quickstart" if gpu else "tiny")
    done = {}
    for recipe in args.train or [_usual()]:
        with tempfile.TemporaryDirectory(prefix="fp4dist-verify-") as folder:
            done[f"{run}, {recipe}"] = training.train(run, Path(folder) / "run", recipe)
        say(f"{run}, {recipe}: {'trained' if done[f'{run}, {recipe}']['ok'] else done[f'{run}, {recipe}']['why']}")
    return done


_BEGAN = time.monotonic()


def say(text: str) -> None:
    """A line with the seconds since the start."""
    print(f"{time.monotonic() - _BEGAN:6.1f} s  {text}", flush=True)


def section(name: str) -> None:
    """The next part."""
    say(f"-- {name}")


def _parse() -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n")
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("fp4dist.kernels.verify", description=summary, epilog=rest, formatter_class=plain)
    parser.add_argument("--recipes", nargs="+", metavar="NAME", help="of the parity matrix; default: all that ship")
    parser.add_argument("--train", nargs="+", metavar="NAME", help="recipes to train; default: the quick start's")
    parser.add_argument("--run", help="run file to train; default quickstart, without a GPU tiny")
    parser.add_argument("--no-train", action="store_true")
    parser.add_argument("--small", action="store_true", help="without a GPU: say that this is what you want")
    parser.add_argument("--out", type=Path, default=Path("runs/verify"), help="folder of the report")
    args = parser.parse_args()
    known = set(shipped("recipes"))
    unknown = [name for name in (args.recipes or []) if name not in known]
    if unknown:
        parser.error(f"no shipped recipe is called {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    if not torch.cuda.is_available() and not args.small:
        parser.error("no GPU was found, so nothing can be verified; --small runs what a CPU can")
    return args


if __name__ == "__main__":
    sys.exit(main())
