"""Time the wire codec of csrc/ beside Triton's on one GPU, and the copy bandwidth: encode, sum, sum and encode again.

A line is printed as soon as a wire is timed; it ends with the ratio of both times (above 1: csrc/ is slower).

python tools/bench_wire.py --mib 256 --jobs 6
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_kernels as timing
import torch

from fp4dist.comm import parts as p
from fp4dist.comm.codec import Noise
from fp4dist.kernels import cuda
from fp4dist.kernels.wire import WireKernels
from fp4dist.spec.wire import Wire

WIRES = (
    Wire(), Wire(rounding="nearest", rotation=0), Wire(rounding="stochastic", rotation=0), Wire(kind="mxfp4"),
    Wire(kind="fp8"), Wire(kind="int4"),
)  # fmt: skip
NOISE = Noise(seed=1, step=2, bucket=3)
SENDERS = 2
NOISE_OF_TIMES = 1.02  # of two that are called equal
Row = tuple[float, dict[str, float]]


def backends() -> dict[str, WireKernels]:
    """Those that are there."""
    from fp4dist.kernels.triton import wire as triton

    found = {"triton": WireKernels(triton.encode, triton.accumulate, triton.recode, triton.sum_plain, "triton")}
    if cuda.MISSING is None:
        from fp4dist.kernels.cuda import wire

        found["cuda"] = WireKernels(wire.encode, wire.accumulate, wire.recode, wire.sum_plain, "cuda")
    return found


def cases(wire: Wire, x: torch.Tensor) -> dict[str, tuple[float, Callable[[Any], object]]]:
    """Name -> (bytes that are read and written, what is timed)."""
    parts = p.Parts.of([x], wire)
    message = p.encode_parts(parts, NOISE, 0)
    messages = message.repeat(SENDERS, 1)
    out, runs, ranks = torch.empty_like(x), ((0, parts.records),), list(range(SENDERS))
    vector, coded = float(x.nbytes), float(message.nbytes)
    return {
        "encode": (vector + coded, lambda _: p.encode_parts(parts, NOISE, 0, out=message)),
        f"sum of {SENDERS}": (
            vector + SENDERS * coded,
            lambda _: p.decode_parts(p.Parts.of([out], wire), messages, NOISE, ranks, check=True),
        ),
        f"sum of {SENDERS} and own, encoded again": (
            vector + (SENDERS + 1) * coded,
            lambda _: p.recode_parts(parts, messages, NOISE, ranks, parts, 1.0, runs, NOISE.after, 0, True, None),
        ),
    }


def measure(wire: Wire, x: torch.Tensor, repeats: int, functions: dict[str, WireKernels]) -> dict[str, Row]:
    """What is done -> (bytes, microseconds of each backend)."""
    found: dict[str, Row] = {}
    for name, kernels in functions.items():
        p.wire_kernels = lambda device, kernels=kernels: kernels  # type: ignore[assignment]
        for what, (size, run) in cases(wire, x).items():
            found.setdefault(what, (size, {}))[1][name] = timing.median(run, lambda: None, repeats)
    return found


def compile_first(jobs: int) -> None:
    """Triton's kernels of all wires, into its cache, by so many processes."""
    command = [sys.executable, "-W", "ignore", __file__, "--compile-part"]
    for process in [subprocess.Popen([*command, f"{i}/{jobs}"]) for i in range(jobs)]:
        process.wait()


def main() -> None:
    """Measure and write a report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256, help="of the fp32 vector")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile Triton's kernels first")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_wire.json"))
    parser.add_argument("--compile-part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile_part:
        part, parts = map(int, args.compile_part.split("/"))
        for wire in WIRES[part::parts]:
            measure(wire, torch.randn(4 << 18, device="cuda"), 1, {"triton": backends()["triton"]})
        return
    if args.jobs > 1:
        compile_first(min(args.jobs, len(WIRES)))
    x = torch.randn(args.mib << 18, device="cuda")
    copied = torch.empty_like(x)
    copy = timing.median(copied.copy_, lambda: x, args.repeats)
    ceiling = 2 * x.nbytes / copy * 1e-6
    print(f"copy of {args.mib} MiB: {copy:.1f} us, {ceiling:.2f} TB/s read and written", flush=True)
    results, ratios = [], []
    for wire in WIRES:
        for what, (size, found) in measure(wire, x, args.repeats, backends()).items():
            shares = {name: size / time * 1e-6 / ceiling for name, time in found.items()}
            text = "  ".join(f"{name} {found[name]:6.1f} us {100 * shares[name]:3.0f} %" for name in found)
            if "cuda" in found:
                ratios.append(found["cuda"] / found["triton"])
                text += f"  {ratios[-1]:4.2f}"
            print(f"{wire.label():<15} {what:<33} {text}", flush=True)
            results.append({"wire": wire.label(), "what": what, "microseconds": found, "share_of_copy": shares})
    if ratios:
        slower = sum(ratio > NOISE_OF_TIMES for ratio in ratios)
        print(f"slower than Triton by over {100 * (NOISE_OF_TIMES - 1):.0f} %: {slower} of {len(ratios)}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    report = {**timing.environment(), "mib": args.mib, "copy_microseconds": copy, "results": results}
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
