"""Time the kernels of csrc/ on one GPU beside Triton's and the copy bandwidth: the cases of tools/bench_kernels.py.

A row is printed as soon as it is timed; with --triton it ends with the ratio of both times (above 1: csrc/ is slower).

python tools/bench_csrc.py --quick                        # the quantizers of four recipes, csrc/ alone: seconds
python tools/bench_csrc.py --quick --triton --jobs 14     # and Triton's, which 14 processes compile first
python tools/bench_csrc.py --recipes luq wang2501 --general --triton     # formats of the general kernels, as codes
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_kernels as cases_of
import torch

from fp4dist.kernels import cuda
from fp4dist.kernels.triton import quantizers as triton
from fp4dist.numerics.tensor import Want
from fp4dist.spec.load import load_recipe, shipped
from fp4dist.spec.recipe import SLOTS

NAMES = ("quantize", "requantize", "quantize_pair", "to_carrier", "amax", "Side", "filter_by_mask")
NOISE = 1.02  # of two times that are called equal
TARGET = 0.85  # of the copy bandwidth


def of_csrc() -> dict[str, Any]:
    """The functions of csrc/ under the names that bench_kernels has for Triton's."""
    from fp4dist.kernels.cuda import filters, ops, quantize, quantizers

    found = (
        quantizers.quantize, quantizers.requantize, quantize.quantize_pair, quantizers.to_carrier, ops.amax,
        quantize.Side, filters.filter_by_mask,
    )  # fmt: skip
    return dict(zip(NAMES, found, strict=True))


def cases(recipes: list[str], *, general: bool) -> Iterator[cases_of.Case]:
    """Those of bench_kernels; general: the specs that no kernel was made for, as codes."""
    if not general:
        yield from cases_of.cases(recipes)
        return
    seen: set[str] = set()
    for recipe in recipes:
        for linear in load_recipe(recipe).linears.values():
            for slot in SLOTS:
                spec = linear.slot(slot)
                if spec is None or spec.has_parts or spec.label() in seen or triton.is_fast(spec):
                    continue
                if triton.why_not(spec) is None and spec.rounding.kind != "ema" and spec.source != "reuse":
                    seen.add(spec.label())
                    run = cases_of._quantize(spec, Want())
                    yield cases_of.Case(
                        spec.label(), "codes", 2.0 + (0.5 if spec.format.element.packed else 1.0), lambda x: x, run
                    )


def measure(arguments: argparse.Namespace, recipes: list[str], repeats: int) -> dict[str, Any]:
    """Microseconds of every case that csrc/ takes, and Triton's of the same."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.empty((arguments.rows, cases_of.SHAPE[1]), dtype=torch.bfloat16, device="cuda")
    copied = torch.empty_like(x)
    copy = cases_of.median(copied.copy_, lambda: x.normal_(generator=generator), repeats)
    ceiling = 4 * x.numel() / copy * 1e-6
    print(f"copy of {x.numel()} bf16: {copy:.1f} us, {ceiling:.2f} TB/s read and written", flush=True)
    backends = {"cuda": of_csrc()}
    if arguments.triton:
        backends["triton"] = {name: getattr(cases_of, name) for name in NAMES}
    results: list[dict[str, Any]] = []
    for case in cases(recipes, general=arguments.general):
        found: dict[str, float] = {}
        for backend, functions in backends.items():
            for name, function in functions.items():
                setattr(cases_of, name, function)
            run = functions["amax"] if case.name == "amax" else case.run
            try:
                found[backend] = cases_of.median(
                    run, lambda case=case: case.prepare(x.normal_(generator=generator)), repeats
                )
            except (ValueError, RuntimeError) as error:
                print(f"{case.name:<44.44} {case.what:<17} {backend}: {str(error)[:60]}", flush=True)
                break
        if "cuda" not in found:
            continue
        share = case.bytes * x.numel() / found["cuda"] * 1e-6 / ceiling
        results.append({"name": case.name, "what": case.what, "microseconds": found, "share_of_copy": share})
        beside = f"  triton {found['triton']:6.1f}  {ratio(found):4.2f}" if "triton" in found else ""
        print(f"{case.name:<44.44} {case.what:<17} {found['cuda']:6.1f} us {100 * share:3.0f} %{beside}", flush=True)
    print(closing(results))
    return {"elements": x.numel(), "copy_microseconds": copy, "results": results}


def ratio(microseconds: dict[str, float]) -> float:
    """Of csrc/'s time and Triton's."""
    return microseconds["cuda"] / microseconds["triton"]


def closing(results: list[dict[str, Any]]) -> str:
    """How many cases miss either target."""
    below = sum(row["share_of_copy"] < TARGET for row in results)
    text = f"below {100 * TARGET:.0f} % of copy: {below} of {len(results)}"
    ratios = [ratio(row["microseconds"]) for row in results if "triton" in row["microseconds"]]
    if ratios:
        text += (
            f"; slower than Triton by over {100 * (NOISE - 1):.0f} %: {sum(r > NOISE for r in ratios)} of {len(ratios)}"
        )
    return text


def compile_first(recipes: list[str], jobs: int) -> None:
    """Triton's kernels of all cases, into its cache."""
    tool = Path(__file__).with_name("bench_kernels.py")
    same = [argument for name in recipes for argument in ("--recipe", name)]
    command = [sys.executable, "-W", "ignore", str(tool), *same, "--compile-part"]
    running = [subprocess.Popen([*command, f"{i}/{jobs}"]) for i in range(jobs)]
    for process in running:
        process.wait()


def main() -> None:
    """Measure and write a report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the recipes of bench_kernels.QUICK, few repeats")
    parser.add_argument("--recipes", nargs="*", default=[], help="the quantizers of these")
    parser.add_argument("--general", action="store_true", help="those of their specs that the general kernels take")
    parser.add_argument("--triton", action="store_true", help="time Triton's kernels as well")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile Triton's kernels first")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--rows", type=int, default=cases_of.SHAPE[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench_csrc.json"))
    args = parser.parse_args()
    if cuda.MISSING is not None:
        raise SystemExit(cuda.MISSING)
    recipes = args.recipes or (list(cases_of.QUICK) if args.quick else shipped("recipes"))
    if args.triton and args.jobs > 1 and not args.general:
        compile_first(recipes, args.jobs)
    report = measure(args, recipes, 7 if args.quick else args.repeats)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({**cases_of.environment(), **report}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
