"""Time the Triton quantizers on one GPU against the copy bandwidth measured in the same run.

Every quantizer of the shipped recipes that these kernels take: rows, transposes, requantized codes, both operands of
one matrix, as codes or as the carrier of a GEMM, every amax inside the timed region; fresh input each time. Bytes are
what has to be read and written at least (an amax is one more reading); a time is the median between two events, with
the host ahead. Below 80 % of the copy bandwidth the unit that limits is named: `issue` where the machine instructions
of the compiled kernels (slow paths included, so at most) fill more than 60 % of the issue slots of that time.

    python tools/bench_kernels.py --quick                         # one of each kind, about a minute
    python tools/bench_kernels.py --jobs 14                       # all; compiled by 14 processes first
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

import fp4dist
from fp4dist.kernels.triton import launch as launches
from fp4dist.kernels.triton.carriers import to_carrier
from fp4dist.kernels.triton.filters import filter_by_mask
from fp4dist.kernels.triton.quantize import Side, amax
from fp4dist.kernels.triton.quantizers import is_fast, quantize, quantize_pair, requantize, why_not_pair
from fp4dist.nn.carry import REMEMBERED
from fp4dist.numerics import BlockScaledTensor, Key
from fp4dist.numerics.tensor import Want
from fp4dist.spec.blocks import Hadamard
from fp4dist.spec.build import build
from fp4dist.spec.estimators import TrustMask
from fp4dist.spec.load import load_recipe, shipped
from fp4dist.spec.recipe import SLOTS, QuantSpec

SHAPE = (16384, 4096)
HEAD_START = 1_000_000  # clock cycles that the device waits, so that the host is ahead
CODES = 0.5  # bytes an element
QUICK: tuple[str, ...] = ("nvidia_nvfp4", "quartet2", "quartet", "tetrajet")
TARGET = 0.8
BUSY = 0.6


class Case(NamedTuple):
    """One operation. prepare: from a new x to what `run` takes; bytes: an element's."""

    name: str
    what: str
    bytes: float
    prepare: Callable[[Tensor], Any]
    run: Callable[[Any], Any]


def key(slot: int) -> Key:
    """The noise of the timed calls."""
    return Key(seed=1, layer=2, step=3, micro_batch=4, slot=slot)


class Use(NamedTuple):
    """A slot's spec, how it reads (rows, transposed or requantized), and the spec of the codes that it requantizes."""

    spec: QuantSpec
    how: str
    forward: QuantSpec | None = None

    @property
    def label(self) -> str:
        """What tells uses apart."""
        if self.forward is None:
            return f"{self.spec.label()} {self.how}"
        return f"{self.spec.label()} of {self.forward.label()}"


def used(recipes: list[str]) -> dict[str, Use]:
    """Label -> use of every slot that these kernels take."""
    found: dict[str, Use] = {}
    for recipe in recipes:
        for linear in load_recipe(recipe).linears.values():
            for slot in SLOTS:
                spec = linear.slot(slot)
                if spec is None or not is_fast(spec) or spec.source == "reuse":
                    continue
                use = Use(spec, "transposed" if slot in TURNED else "rows")
                if spec.source == "requant":
                    forward = linear.slot("fprop.w" if slot == "dgrad.w" else "fprop.x")
                    if forward is None or not is_fast(forward):
                        continue
                    use = Use(spec, "requantized", forward)
                found.setdefault(use.label, use)
    return found


TURNED = ("dgrad.w", "wgrad.dy", "wgrad.x")


def wants(spec: QuantSpec) -> tuple[tuple[str, Want, float], ...]:
    """(name, what is asked for, bytes written an element)."""
    scale = 1.0 / (spec.shape[0] * spec.shape[1])
    if (
        spec.format.scale.name == "e8m0"
    ):  # the second launch, which looks whether the remembered shift fits, is timed too
        memory = torch.zeros(REMEMBERED, dtype=torch.int32, device="cuda")
        fp8 = Want(False, torch.float8_e5m2, memory=memory)
        both = fp8._replace(codes=True)
        found = [("codes", Want(), CODES + scale), ("e5m2", fp8, 1.0), ("codes, e5m2", both, 1.5 + scale)]
        if isinstance(spec.estimator, TrustMask):
            found.append(("codes, e5m2, mask", both._replace(mask=True), 1.625 + scale))
        return tuple(found)
    if spec.rounding.kind == "eden":  # likewise its scales: codes and fp32 scales come first
        first = 2 * (CODES + 4 * scale)
        return ("codes", Want(), CODES + 9 * scale), ("bf16", Want(False, torch.bfloat16), first + 2)
    return (
        ("codes", Want(), CODES + scale),
        ("bf16", Want(False, torch.bfloat16), 2.0),
        ("codes, bf16", Want(True, torch.bfloat16), CODES + scale + 2),
    )


def read_bytes(spec: QuantSpec) -> float:
    """Of bf16: once, and once more where the tensor's amax comes first."""
    return 2.0 if spec.format.scale.name == "e8m0" or spec.rounding.kind == "eden" else 4.0


def cases(recipes: list[str]) -> Iterator[Case]:
    """Every operation once."""
    yield Case("amax", "fp32", 2.0, lambda x: x, amax)
    for use in used(recipes).values():
        for name, want, written in wants(use.spec):
            if use.forward is None:
                size = read_bytes(use.spec) + written
                yield Case(use.label, name, size, _turned(use.how), _quantize(use.spec, want))
            else:
                size = read_bytes(use.spec) / 2 * (CODES + 1 / (use.forward.shape[0] * use.forward.shape[1])) + written
                yield Case(use.label, name, size, _codes_of(use.forward), _requantize(use.spec, want, use.forward))
    for row, column in pairs(recipes):
        found = [wants(spec)[1] for spec in (row, column)]
        once = max(read_bytes(spec) for spec in (row, column))
        label = f"{row.label()} | {column.label()}"
        run = _pair(row, column, found[0][1], found[1][1])
        yield Case(
            label, " | ".join(name for name, _, _ in found), once + found[0][2] + found[1][2], _turned("rows"), run
        )
    for dtype, size in ((torch.bfloat16, 4.125), (torch.float32, 6.125)):  # dX; dW, which becomes bf16
        name = f"{str(dtype).removeprefix('torch.')} to bf16"
        yield Case("filter by mask had32", name, size, _with_bits(dtype), _filter)
    for forward, dtype, size in (("nvfp4", torch.bfloat16, 2), ("mxfp4", torch.float8_e5m2, 1)):
        stored = CODES + (1 / 16 if forward == "nvfp4" else 1 / 32)
        name = str(dtype).removeprefix("torch.")
        yield Case(f"to_carrier {forward}", name, stored + size, _codes(forward), _to_carrier(dtype, False))
    square = build(QuantSpec, {"format": "nvfp4", "block": [16, 16]})
    prepare = _codes_of(square)
    yield Case(
        "to_carrier nvfp4 16x16 transposed", "bfloat16", CODES + 1 / 256 + 2, prepare, _to_carrier(torch.bfloat16, True)
    )


def pairs(recipes: list[str]) -> list[tuple[QuantSpec, QuantSpec]]:
    """The specs of dY's two operands, and of x's, where one reading can serve both."""
    found: dict[tuple[str, str], tuple[QuantSpec, QuantSpec]] = {}
    for recipe in recipes:
        for linear in load_recipe(recipe).linears.values():
            for slots in (("dgrad.dy", "wgrad.dy"), ("fprop.x", "wgrad.x")):
                row, column = (linear.slot(slot) for slot in slots)
                if row is None or column is None or column.source != "master" or why_not_pair(row, column):
                    continue
                found.setdefault((row.label(), column.label()), (row, column))
    return list(found.values())


def _turned(how: str) -> Callable[[Tensor], Tensor]:
    return lambda x: x.t() if how == "transposed" else x


def _codes_of(spec: QuantSpec) -> Callable[[Tensor], BlockScaledTensor]:
    def prepare(x: Tensor) -> BlockScaledTensor:
        q = quantize(x, spec, key(0))
        assert isinstance(q, BlockScaledTensor)
        return q

    return prepare


def _codes(forward: str) -> Callable[[Tensor], BlockScaledTensor]:
    return _codes_of(build(QuantSpec, {"format": forward}))


def _quantize(spec: QuantSpec, want: Want) -> Callable[[Tensor], object]:
    return lambda x: quantize(x, spec, key(2), want=want)


def _requantize(spec: QuantSpec, want: Want, forward: QuantSpec) -> Callable[[BlockScaledTensor], object]:
    back = None if forward.rotation is None else (forward.rotation, key(0))
    return lambda q: requantize(q, spec, key(5), want=want, back=back)


def _pair(row: QuantSpec, column: QuantSpec, first: Want, second: Want) -> Callable[[Tensor], object]:
    return lambda x: quantize_pair(x, Side(row, key(2), None, first), Side(column, key(4), None, second))


def _with_bits(dtype: torch.dtype) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The gradient in dtype, and any mask bits."""
    return lambda x: (x.to(dtype), x.view(torch.uint8)[:, ::16].contiguous())


def _filter(operands: tuple[Tensor, Tensor]) -> object:
    return filter_by_mask(*operands, Hadamard(size=32, signs="none"), None, out=torch.bfloat16)


def _to_carrier(dtype: torch.dtype, transposed: bool) -> Callable[[BlockScaledTensor], object]:
    return lambda q: to_carrier(q, dtype, transposed=transposed)


def microseconds(run: Callable[[], object]) -> float:
    """Between two events, with the host ahead."""
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(HEAD_START)
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) * 1e3


def median(run: Callable[[Any], object], prepare: Callable[[], Any], repeats: int) -> float:
    """Microseconds on fresh input, after two runs that warm up."""
    found = []
    for i in range(-2, repeats):
        operand = prepare()
        time = microseconds(lambda operand=operand: run(operand))
        found += [time] if i >= 0 else []
    return statistics.median(found)


def instructions(compiled: Any) -> int:
    """Machine instructions of a compiled kernel, as its disassembly lists them."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing = subprocess.run(
            [tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=False
        ).stdout
    return len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?!.*\bNOP\b)", listing, re.MULTILINE))


class Watched:
    """Counts what the launches of one call issue: programs x warps x instructions."""

    def __init__(self) -> None:
        self.known: dict[int, int] = {}

    def issued(self, run: Callable[[], object]) -> int:
        """Warp instructions of the launches in `run`, all of whose kernels have run before."""
        total, launched, compiled_before = 0, JITFunction.run, dict(launches._COMPILED)

        def counting(kernel: Any, *arguments: Any, grid: tuple[int, ...], **named: Any) -> Any:
            nonlocal total
            compiled: Any = launched(kernel, *arguments, grid=grid, **named)
            if id(compiled) not in self.known:
                self.known[id(compiled)] = instructions(compiled)
            total += grid[0] * compiled.metadata.num_warps * self.known[id(compiled)]
            return compiled

        try:
            launches._COMPILED.clear()  # so that every launch asks Triton
            JITFunction.run = counting  # type: ignore[method-assign]
            run()
        finally:
            JITFunction.run = launched  # type: ignore[method-assign]
            launches._COMPILED.update(compiled_before)
        return total


def issue_share(warp_instructions: int, time: float, device: torch.device) -> float | None:
    """Of the slots in `time` microseconds: four instructions a clock on each multiprocessor."""
    properties = torch.cuda.get_device_properties(device)
    clock = getattr(properties, "clock_rate", None)  # kHz
    if not clock or not warp_instructions:
        return None
    return warp_instructions / (properties.multi_processor_count * 4 * clock * 1e-3 * time)


def measure(recipes: list[str], repeats: int, rows: int) -> dict[str, Any]:
    """The copy bandwidth, then every case."""
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    x = torch.empty((rows, SHAPE[1]), dtype=torch.bfloat16, device=device)
    copied = torch.empty_like(x)
    copy = median(copied.copy_, lambda: x.normal_(generator=generator), repeats)
    ceiling = 4 * x.numel() / copy * 1e-6
    print(f"copy of {x.numel()} bf16: {copy:.1f} us, {ceiling:.2f} TB/s read and written")
    watched, results = Watched(), []
    for case in cases(recipes):
        time = median(case.run, lambda case=case: case.prepare(x.normal_(generator=generator)), repeats)
        rate = case.bytes * x.numel() / time * 1e-6
        operand = case.prepare(x)
        share = issue_share(watched.issued(lambda case=case, operand=operand: case.run(operand)), time, device)
        limit = None if rate >= TARGET * ceiling or share is None else "issue" if share > BUSY else "latency"
        results.append(
            {
                "name": case.name, "what": case.what, "microseconds": time, "bytes": case.bytes * x.numel(),
                "terabytes_per_second": rate, "share_of_copy": rate / ceiling, "issue_share": share, "limit": limit,
            }
        )  # fmt: skip
        print(
            f"{case.name:<58.58} {case.what:<16} {time:7.1f} us {rate:5.2f} TB/s {100 * rate / ceiling:4.0f} %"
            f"  {'' if share is None else f'issue {100 * share:3.0f} %'} {limit or ''}",
            flush=True,
        )
    return {"elements": x.numel(), "copy_microseconds": copy, "copy_terabytes_per_second": ceiling, "results": results}


def compile_part(recipes: list[str], part: int, parts: int) -> None:
    """Run every `parts`-th case once on few rows: what it compiles stays in Triton's cache."""
    x = torch.randn((512, SHAPE[1]), device="cuda").to(torch.bfloat16)
    for case in list(cases(recipes))[part::parts]:
        case.run(case.prepare(x))


def environment() -> dict[str, Any]:
    """Device and versions."""
    return {
        "device": torch.cuda.get_device_name(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "fp4dist": fp4dist.__version__,
    }


def plot(report: dict[str, Any], path: Path) -> None:
    """Bars of the share of the copy bandwidth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = report["results"]
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.22 * len(results)))
    names = [f"{r['name']} ({r['what']})" for r in results]
    axes.barh(range(len(results)), [100 * r["share_of_copy"] for r in results], color="#4878a8")
    axes.set_yticks(range(len(results)), names, fontsize=6)
    axes.invert_yaxis()
    axes.axvline(100 * TARGET, color="black", linewidth=0.8, linestyle="--")
    for i, r in enumerate(results):
        axes.text(1, i, f"{r['microseconds']:.0f} us", va="center", fontsize=6, color="white")
    machine = report["environment"]
    axes.set_xlabel(f"% of the copy bandwidth, {report['copy_terabytes_per_second']:.2f} TB/s")
    axes.set_title(f"{machine['device']}, torch {machine['torch']}, triton {machine['triton']}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="The Triton quantizers against the copy bandwidth.")
    parser.add_argument("--recipe", action="append", help="repeatable (default: every shipped recipe)")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}, few repeats")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile before anything is timed")
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each (default: 15)")
    parser.add_argument("--rows", type=int, default=SHAPE[0], help=f"of {SHAPE[1]} columns (default: {SHAPE[0]})")
    parser.add_argument("--out", type=Path, default=Path("bench_kernels.json"))
    parser.add_argument("--plot", type=Path, help="default: beside the JSON; needs matplotlib")
    parser.add_argument("--compile-part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("these kernels are timed on a GPU, and torch sees none")
    recipes: list[str] = options.recipe or (list(QUICK) if options.quick else shipped("recipes"))
    if options.compile_part:
        part, parts = map(int, options.compile_part.split("/"))
        compile_part(recipes, part, parts)
        return
    if options.jobs > 1:
        same = [argument for name in recipes for argument in ("--recipe", name)]
        command = [sys.executable, __file__, *same, "--compile-part"]
        running = [subprocess.Popen([*command, f"{i}/{options.jobs}"]) for i in range(options.jobs)]
        for process in running:
            process.wait()
    report = measure(recipes, 5 if options.quick else options.repeats, options.rows)
    report = {"environment": environment(), **report}
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    try:
        plot(report, options.plot or options.out.with_suffix(".png"))
    except ImportError:
        print("no plot: matplotlib is not installed")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
