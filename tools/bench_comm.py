#!/usr/bin/env python
"""Time coded collectives against NCCL's, on the links of this machine and over sockets, and measure their errors.

Payload is bf16 gradients of the given MiB on each rank. A time is the median of several calls between two events, with
the host ahead and the ranks aligned on the device; the slowest rank counts. `bytes` are counted from the buffers that
are handed to the process group. Sockets (NCCL_P2P_DISABLE=1 NCCL_SHM_DISABLE=1) stand in for a rack's NIC. NVLink
multicast is off.

    python tools/bench_comm.py --mib 256 1024                          # two GPUs: NVLink and sockets
    python tools/bench_comm.py --cpu --world 4 --mib 1                 # gloo on a CPU, with a two-level tree
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import qgz as qgz_module
import torch
import torch.cuda.nccl
import torch.distributed as dist
from comm_methods import Method, methods

import fp4dist
from fp4dist.comm.exchange import Handle, Options
from fp4dist.comm.hierarchy import GroupTree

REGIMES = {"links": [], "sockets": ["NCCL_P2P_DISABLE=1", "NCCL_SHM_DISABLE=1"]}
HEAD_START = 6_000_000  # clock cycles that the device waits, so that the host is ahead
GEMM = 8192  # of the GEMMs that a transfer is hidden under


@dataclass
class Row:
    """One method at one size. Times in ms."""

    collective: str
    method: str
    mib: float
    regime: str
    median: float = 0.0
    p10: float = 0.0
    p90: float = 0.0
    host: float = 0.0
    gb_per_s: float = 0.0  # of bf16 payload
    exposed: float | None = None
    bytes_sent: int | None = None
    bytes_formula: int | None = None
    nmse: float | None = None
    bias: float | None = None  # <exact, found> / <exact, exact> - 1
    extra_mib: float | None = None
    parts: dict[str, float] = field(default_factory=dict)  # encode, wire and decode alone
    note: str = ""


def times(run: Callable[[], Any], device: torch.device, rounds: int) -> tuple[list[float], float]:
    """(ms of each call, the slowest rank's; host ms of a call)."""
    aligned = torch.zeros(1, device=device)
    found, host = [], []
    for _ in range(rounds + 2):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(HEAD_START)
            dist.all_reduce(aligned)
            begin.record()
            started = time.perf_counter()
            run()
            host.append((time.perf_counter() - started) * 1e3)
            end.record()
            torch.cuda.synchronize()
            found.append(begin.elapsed_time(end))
        else:
            dist.barrier()
            started = time.perf_counter()
            run()
            found.append((time.perf_counter() - started) * 1e3)
            host.append(found[-1])
    slowest = torch.tensor(found[2:], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return sorted(slowest.tolist()), statistics.median(host[2:])


def measure(method: Method, mib: float, regime: str, device: torch.device, rounds: int, exposed: bool) -> Row:
    """Time it, then look at what it gives."""
    row = Row(method.collective, method.name, mib, regime)
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    handle = method.run(False)
    if device.type == "cuda":
        torch.cuda.synchronize()
        row.extra_mib = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    if isinstance(handle, Handle):
        row.bytes_sent, row.bytes_formula = handle.bytes_sent, handle.bytes_formula
    found, row.host = times(lambda: method.run(False), device, rounds)
    row.median, row.p10, row.p90 = statistics.median(found), found[len(found) // 10], found[-1 - len(found) // 10]
    row.gb_per_s = mib * 2**20 / row.median / 1e6
    exact = method.exact().double()
    if method.prepare is not None:
        method.prepare()
    method.run(False)
    result = method.result().double()
    if result.shape == exact.shape:
        row.nmse = float((result - exact).square().sum() / exact.square().sum())
        row.bias = float((result * exact).sum() / exact.square().sum()) - 1
    del exact, result
    if method.parts is not None:
        row.parts = {name: statistics.median(times(run, device, 5)[0]) for name, run in method.parts().items()}
    if exposed and device.type == "cuda":
        row.exposed = exposed_time(method, row.median, device)
    return row


def exposed_time(method: Method, alone: float, device: torch.device) -> float:
    """Time in ms that the transfer adds to GEMMs that take about twice as long as it does alone."""
    a = torch.randn(GEMM, GEMM, device=device, dtype=torch.bfloat16)
    out = torch.empty_like(a)
    one = statistics.median(times(lambda: torch.mm(a, a, out=out), device, 3)[0])
    count = max(1, round(2 * alone / one))

    def gemms() -> None:
        for _ in range(count):
            torch.mm(a, a, out=out)

    def both() -> None:
        handle = method.run(True)
        gemms()
        handle.wait()

    return statistics.median(times(both, device, 5)[0]) - statistics.median(times(gemms, device, 5)[0])


def child(args: argparse.Namespace) -> None:
    """One rank."""
    device = torch.device("cpu" if args.cpu else f"cuda:{args.rank}")
    if not args.cpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "gloo" if args.cpu else "nccl", init_method=f"file://{args.store}", rank=args.rank, world_size=args.world,
        device_id=None if args.cpu else device,
    )  # fmt: skip
    usual = [2] if args.world >= 4 and args.world % 2 == 0 else []
    trees = {inside: GroupTree.of_ranks(inside) for inside in (usual if args.inner is None else args.inner)}
    qgz = start_qgz(args) if args.qgz else None
    variants = [
        Options(pieces=pieces or None, sms=sms or None, urgent=urgent)
        for pieces, sms, urgent in product(args.pieces, args.sms, (False, True) if args.urgent else (False,))
    ]
    if args.child == "sockets" and args.world == 2:
        variants += [replace(options, pairs="all_gather") for options in variants]
    rows: list[dict[str, Any]] = []
    for mib in args.mib:
        for method in methods(int(mib * 2**20 / 2), device, variants, trees, qgz):
            if args.only and not any(word in f"{method.collective} {method.name}" for word in args.only):
                continue
            row = measure(method, mib, args.child, device, args.rounds, args.exposed)
            rows.append(asdict(row))
            if args.rank == 0:
                print(line(row), flush=True)
        if not args.cpu:
            torch.cuda.empty_cache()
    if args.rank == 0:
        Path(args.json).write_text(json.dumps(rows), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def start_qgz(args: argparse.Namespace) -> Any:
    """DeepSpeed's, or None where it cannot be had: the reason is printed."""
    try:
        return qgz_module.start(args.world)
    except RuntimeError as e:
        if args.rank == 0:
            print(f"no DeepSpeed qgZ: {e}", flush=True)
        return None


def line(row: Row) -> str:
    """For the terminal."""
    words = [f"{row.regime:8s}{row.collective:15s}{row.method:28s}{row.mib:6g} MiB {row.median:9.3f} ms"]
    words.append(f"[{row.p10:.3f} {row.p90:.3f}] {row.gb_per_s:7.1f} GB/s host {row.host:.2f}")
    if row.nmse is not None:
        words.append(f"nmse {row.nmse:.2e} bias {row.bias:+.1e}")
    if row.bytes_sent is not None:
        words.append(f"{row.bytes_sent} B {'=' if row.bytes_sent == row.bytes_formula else '!='} formula")
    if row.exposed is not None:
        words.append(f"exposed {row.exposed:.3f}")
    if row.extra_mib is not None:
        words.append(f"extra {row.extra_mib} MiB")
    words += [f"{name} {ms:.3f}" for name, ms in row.parts.items()]
    return " ".join(words)


def ratios(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Speeds relative to NCCL's."""
    index = {(r["regime"], r["collective"], r["mib"], r["method"]): r["median"] for r in rows}
    for (regime, collective, mib, method), ms in index.items():
        base = [(m, index.get((regime, collective, mib, m))) for m in ("NCCL bf16", "NCCL fp32", "bf16")]
        if method not in ("NCCL bf16", "NCCL fp32", "bf16"):
            words = [f"{found / ms:.2f}x {name}" for name, found in base if found]
            if words:
                yield f"{regime:8s} {collective:15s} {mib:6g} MiB {method:28s} " + ", ".join(words)


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """A bar for each method, one panel for each regime, collective and size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = sorted({(r["regime"], r["collective"], r["mib"]) for r in rows})
    down = -(-len(panels) // 2)
    figure, axes = plt.subplots(down, 2, figsize=(15, 1 + 2.2 * down), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, panel in zip(axes.flat, panels, strict=False):
        shown = [r for r in rows if (r["regime"], r["collective"], r["mib"]) == panel][::-1]
        axis.barh([r["method"] for r in shown], [r["median"] for r in shown])
        axis.set_title(f"{panel[1]}, {panel[2]:g} MiB bf16 a rank, {panel[0]}", fontsize=9)
        axis.set_xlabel("ms")
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=120)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=float, nargs="+", default=[256, 1024])
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="gloo on the CPU")
    parser.add_argument("--regimes", nargs="+", choices=sorted(REGIMES), default=None)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--pieces", type=int, nargs="+", default=[0], help="pieces that are overlapped; 0: by size")
    parser.add_argument("--sms", type=int, nargs="+", default=[0], help="multiprocessors for the codec; 0: all")
    parser.add_argument("--urgent", action="store_true", help="also with the codec's kernels before those that wait")
    parser.add_argument("--no-priority", action="store_true", help="NCCL's kernels wait behind the codec's")
    parser.add_argument("--only", nargs="+", help="methods whose collective and name hold one of these words")
    parser.add_argument("--inner", type=int, nargs="*", help="ranks of the inner level of two; default: 2 of 4 or more")
    parser.add_argument("--qgz", action="store_true", help="DeepSpeed's qgZ too; its operators are built first")
    parser.add_argument("--exposed", action="store_true", help="also what a GEMM beside it leaves visible")
    parser.add_argument("--out", type=Path, default=Path("bench_comm.json"))
    for name in ("child", "store", "json"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.cpu and torch.cuda.device_count() < args.world:
        parser.error(
            f"--world {args.world} needs as many GPUs, found {torch.cuda.device_count()}; or give --cpu (gloo)"
        )
    if wrong := [inside for inside in args.inner or () if inside < 1 or args.world % inside]:
        parser.error(f"--inner {wrong[0]}: {args.world} ranks are not whole groups of it")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    return args


def run_regime(args: argparse.Namespace, regime: str) -> list[dict[str, Any]]:
    """Start the ranks under a regime's environment; the rows of the first."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "rows.json"
        words = [w for w in sys.argv[1:] if not w.startswith("--regimes")]
        if args.regimes:
            at = sys.argv.index("--regimes") if "--regimes" in sys.argv else 0
            words = sys.argv[1:at] + sys.argv[at + 1 + len(args.regimes) :]
        first = f"TORCH_NCCL_HIGH_PRIORITY={int(not args.no_priority)}"
        setting = ["env", "NCCL_NVLS_ENABLE=0", first, *REGIMES[regime]]
        common = [sys.executable, __file__, *words, "--child", regime, "--store", f"{folder}/store"]
        started = [
            subprocess.Popen([*setting, *common, "--json", str(answer), "--rank", str(rank)])
            for rank in range(args.world)
        ]
        codes = [process.wait() for process in started]
        if any(codes):
            raise SystemExit(f"{regime}: the ranks ended with {codes}")
        return json.loads(answer.read_text(encoding="utf-8"))


def main() -> None:
    """Run all regimes, print ratios, write JSON and plot."""
    args = parse()
    if args.child:
        child(args)
        return
    regimes = args.regimes or (["links"] if args.cpu else list(REGIMES))
    rows = [row for regime in regimes for row in run_regime(args, regime)]
    device = platform.processor() or platform.machine() if args.cpu else torch.cuda.get_device_name()
    nccl = "" if args.cpu else ", NCCL " + ".".join(map(str, torch.cuda.nccl.version()))
    title = f"{args.world} x {device}, torch {torch.__version__}{nccl}, fp4dist {fp4dist.__version__}, NVLS off"
    title += ", no priority for transfers" if args.no_priority else ""
    print(title, *ratios(rows), sep="\n")
    args.out.write_text(json.dumps({"title": title, "rows": rows}, indent=1), encoding="utf-8")
    try:
        plot(rows, title, args.out.with_suffix(".png"))
    except ImportError:
        print("no plot: matplotlib is not installed")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
