"""Time the kernels of csrc/ on one GPU beside Triton's and the copy bandwidth: the cases of tools/bench_kernels.py.

python tools/bench_csrc.py --quick                   # the quantizers of four recipes, csrc/ alone: seconds
python tools/bench_csrc.py --quick --triton          # and Triton's, which have to be compiled first
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import bench_kernels as cases_of
import torch

from fp4dist.kernels import cuda
from fp4dist.spec.load import shipped

NAMES = ("quantize", "requantize", "quantize_pair", "to_carrier", "amax", "Side", "filter_by_mask")


def of_csrc() -> dict[str, Any]:
    """The functions of csrc/ under the names that bench_kernels has for Triton's."""
    from fp4dist.kernels.cuda import filters, ops, quantize, quantizers

    found = (
        quantizers.quantize, quantizers.requantize, quantize.quantize_pair, quantizers.to_carrier, ops.amax,
        quantize.Side, filters.filter_by_mask,
    )  # fmt: skip
    return dict(zip(NAMES, found, strict=True))


def measure(recipes: list[str], repeats: int, rows: int, *, triton: bool) -> dict[str, Any]:
    """Microseconds of every case that csrc/ takes, and Triton's of the same."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.empty((rows, cases_of.SHAPE[1]), dtype=torch.bfloat16, device="cuda")
    copied = torch.empty_like(x)
    copy = cases_of.median(copied.copy_, lambda: x.normal_(generator=generator), repeats)
    ceiling = 4 * x.numel() / copy * 1e-6
    print(f"copy of {x.numel()} bf16: {copy:.1f} us, {ceiling:.2f} TB/s read and written")
    times: dict[tuple[str, str], dict[str, float]] = {}
    bytes_of: dict[tuple[str, str], float] = {}
    theirs = {name: getattr(cases_of, name) for name in NAMES}
    for backend, functions in (("cuda", of_csrc()), *((("triton", theirs),) if triton else ())):
        for name, function in functions.items():
            setattr(cases_of, name, function)
        for case in cases_of.cases(recipes):
            bytes_of[case.name, case.what] = case.bytes
            try:
                time = cases_of.median(
                    case.run, lambda case=case: case.prepare(x.normal_(generator=generator)), repeats
                )
            except (ValueError, RuntimeError) as error:
                print(f"{case.name:<58.58} {case.what:<12} {backend}: {str(error)[:90]}")
                continue
            times.setdefault((case.name, case.what), {})[backend] = time
    results = []
    for (name, what), found in times.items():
        if "cuda" not in found:
            continue
        share = bytes_of[name, what] * x.numel() / found["cuda"] * 1e-6 / ceiling
        beside = f"  triton {found['triton']:7.1f} us" if "triton" in found else ""
        print(f"{name:<58.58} {what:<12} {found['cuda']:7.1f} us {100 * share:4.0f} % of copy{beside}")
        results.append({"name": name, "what": what, "microseconds": found, "share_of_copy": share})
    return {"elements": x.numel(), "copy_microseconds": copy, "results": results}


def main() -> None:
    """Measure and write a report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the recipes of bench_kernels.QUICK, few repeats")
    parser.add_argument("--recipes", nargs="*", default=[], help="the quantizers of these")
    parser.add_argument("--triton", action="store_true", help="time Triton's kernels as well")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--rows", type=int, default=cases_of.SHAPE[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench_csrc.json"))
    args = parser.parse_args()
    if cuda.MISSING is not None:
        raise SystemExit(cuda.MISSING)
    recipes = args.recipes or (list(cases_of.QUICK) if args.quick else shipped("recipes"))
    report = measure(recipes, 7 if args.quick else args.repeats, args.rows, triton=args.triton)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({**cases_of.environment(), **report}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
