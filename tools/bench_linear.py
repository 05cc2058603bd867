"""Time one linear layer, forward and backward, under FP4 recipes against the plain layer on the same device.

    python tools/bench_linear.py --recipe nvidia_nvfp4 --recipe quartet2 --size 1024x1024x1024 --threads 2
    python tools/bench_linear.py --device cuda --more --recipe quartet2 --recipe nvidia_nvfp4 --recipe quartet

The FP4 layer is the module that `apply_recipe` builds from a torch.nn.Linear, under the recipe's first LinearRecipe;
the plain one is torch.nn.Linear itself. Each run gets new random x and dY, made outside the timed region and in several
buffers; quantization of all operands (the weight's too), noise and every amax are inside it. `handed` is the same layer
when x and dY bring their own amax (fp4dist.numerics.handed), which whoever wrote them finds on the way, outside of the
timed region; it is never that of an earlier step, and only what is scaled without a rotation gains by it. Runs
alternate; the ratio is that of the medians. --step N first runs the 60 steps before N, for recipes that choose channels
at some step.

On a CPU that is fp32 against the reference backend: what quantization in plain torch costs, not what a kernel would.
FP4 is hundreds of short parallel regions there and fp32 three long ones, so other load on the machine hurts FP4 more:
where `best` and the ratio differ, it was not idle.

On a GPU (--device cuda) it is bf16 against the Triton backend, or --backend reference. First the ceilings: copying, and
the layer's three GEMMs alone in bf16 and in FP8. `device` times begin after a pause in which the host runs ahead, as it
does in a training step; `eager` ones hold what the host costs a lone layer too. --more adds a GQA projection, a number
of tokens that has to be filled up, and experts. Results: --out (JSON) and a bar plot beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fp4dist
from fp4dist.errors import Fp4DistError
from fp4dist.nn.apply import AppliedRecipe, apply_recipe
from fp4dist.nn.grouped import Expert, TokenPart, grouped_linear
from fp4dist.nn.linear import Fp4Linear
from fp4dist.numerics.handed import hand_over
from fp4dist.spec.load import load_recipe
from fp4dist.spec.recipe import Recipe, Rule
from fp4dist.spec.run import BackendConfig

Size = tuple[int, int, int]  # T tokens, I inputs, O outputs
Forward = Callable[[Tensor], Tensor]

BUFFERS = 3
SETTLED = 60  # steps before --step: more than any recipe watches before it chooses
HEAD_START = 20_000_000  # device cycles that the host runs ahead
GPU_SIZES: tuple[Size, ...] = ((16384, 4096, 4096), (16384, 2048, 8192))
QKV_SIZE: Size = (16384, 4096, 6144)  # 32 heads of 128, 8 groups of keys and values
RAGGED_SIZE: Size = (16341, 4096, 4096)
EXPERTS, EXPERT_SIZE = 8, (8 * 2048, 2048, 8192)


@dataclass(frozen=True)
class Case:
    """A layer to time.

    experts   0: a linear; n: so many experts of the same size that share the tokens, through grouped_linear, which
              fills each expert's tokens up to what its recipe needs
    """

    size: Size
    experts: int = 0
    note: str = ""

    @property
    def label(self) -> str:
        """For tables and plots."""
        shape = "x".join(map(str, self.size))
        return shape if not self.note else f"{shape} {self.note}"

    @property
    def flops(self) -> int:
        """Of the three GEMMs."""
        tokens, inputs, outputs = self.size
        return 6 * tokens * inputs * outputs


def parse_size(text: str) -> Size:
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not TOKENSxINPUTSxOUTPUTS, such as 1024x1024x1024")
    tokens, inputs, outputs = map(int, parts)
    return tokens, inputs, outputs


@dataclass
class Layer:
    """Something to run: its forward pass, its weights, what to do between runs, and whether x and dY bring an amax."""

    forward: Forward
    weights: Sequence[Tensor]
    between: Callable[[int], object] = lambda run: None
    handed: bool = False


def linears(case: Case, device: torch.device, dtype: torch.dtype) -> nn.ModuleDict:
    """The layer's torch.nn.Linear modules, under names that roles are known by."""
    _, inputs, outputs = case.size
    torch.manual_seed(0)
    made = [nn.Linear(inputs, outputs, bias=False, device=device, dtype=dtype) for _ in range(max(case.experts, 1))]
    return nn.ModuleDict({"experts": nn.ModuleList(made)} if case.experts else {"fc1": made[0]})


def plain_layer(case: Case, device: torch.device, dtype: torch.dtype) -> Layer:
    """torch.nn.Linear, one for each expert."""
    model = linears(case, device, dtype)
    modules = [m for m in model.modules() if isinstance(m, nn.Linear)]
    counts = shares(case)

    def forward(x: Tensor) -> Tensor:
        if len(modules) == 1:
            return modules[0](x)
        return torch.cat([m(rows) for m, rows in zip(modules, x.split(counts), strict=True)])

    return Layer(forward, [m.weight for m in modules])


def fp4_layer(
    case: Case, recipe: str, step: int, device: torch.device, dtype: torch.dtype, backend: BackendConfig
) -> Layer:
    """The same under `recipe`, by apply_recipe; at a new micro-batch in each run."""
    model = linears(case, device, dtype)
    applied = apply_recipe(model, one_linear(recipe), backend=backend, tokens=None if case.experts else case.size[0])
    modules = [m for m in model.modules() if isinstance(m, Fp4Linear)]
    forward: Forward = modules[0] if not case.experts else partial(grouped, modules, shares(case))
    layer = Layer(forward, [m.weight for m in modules], partial(enter, applied, step))
    enter(applied, max(0, step - SETTLED), 0)
    for earlier in range(max(0, step - SETTLED), step):
        enter(applied, earlier, 0)
        draw = Buffers(case, device, dtype, number=1)
        run_once(layer, *draw.take())
    return layer


def one_linear(name: str) -> Recipe:
    """The first LinearRecipe of a recipe for every linear, without what acts on optimizers and in phases."""
    recipe = load_recipe(name)
    if not recipe.linears:
        raise SystemExit(f"recipe {name} quantizes nothing")
    label, linear = next(iter(recipe.linears.items()))
    return Recipe(name=recipe.name, linears={label: linear}, rules=(Rule(path="*", linear=label),))


def enter(applied: AppliedRecipe, step: int, run: int) -> None:
    """Set the noise clock."""
    applied.set_step(step, step + 1, run)


def grouped(modules: Sequence[Fp4Linear], counts: Sequence[int], x: Tensor) -> Tensor:
    """Experts' linears over rows sorted by expert."""
    experts = [Expert(m.weight, m.plan, m.comm) for m in modules if m.plan is not None]
    return grouped_linear(x, experts, counts, TokenPart())


def shares(case: Case) -> list[int]:
    """Tokens of each expert: equal, the first ones take what is left."""
    number, tokens = max(case.experts, 1), case.size[0]
    return [tokens // number + (i < tokens % number) for i in range(number)]


class Buffers:
    """x [T, I] and dY [T, O], several of each, filled anew before each use."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype, number: int = BUFFERS) -> None:
        tokens, inputs, outputs = case.size
        self.generator = torch.Generator(device).manual_seed(0)
        self.pairs = [
            tuple(torch.empty(tokens, width, device=device, dtype=dtype) for width in (inputs, outputs))
            for _ in range(number)
        ]
        self.taken = 0

    def take(self, handed: bool = False) -> tuple[Tensor, Tensor]:
        """The next pair, with new values, and with their amax if `handed`."""
        x, dy = self.pairs[self.taken % len(self.pairs)]
        self.taken += 1
        with torch.no_grad():
            x.normal_(generator=self.generator)
            dy.normal_(generator=self.generator)
        x = x.detach().requires_grad_()
        if handed:
            for tensor in (x, dy):
                hand_over(tensor, tensor.detach().abs().amax().to(torch.float32))
        return x, dy


def run_once(layer: Layer, x: Tensor, dy: Tensor) -> None:
    """Forward and backward."""
    for weight in layer.weights:
        weight.grad = None
    layer.forward(x).backward(dy)


def seconds_of(run: Callable[[], object], device: torch.device, head_start: bool = False) -> float:
    """How long `run` takes; on a GPU between two events, the first after a pause for the host if `head_start`."""
    if device.type == "cpu":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    if head_start:
        torch.cuda._sleep(HEAD_START)
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) * 1e-3


@dataclass
class Times:
    """Seconds of every timed run."""

    device: list[float] = field(default_factory=list)
    eager: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The headline: with the host ahead where there is a device."""
        return statistics.median(self.device or self.eager)


def alternate(
    layers: dict[str, Layer], case: Case, repeats: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Times]:
    """Every layer in turn, `repeats` times after two that warm up."""
    times = {name: Times() for name in layers}
    buffers = Buffers(case, device, dtype)
    for i in range(-2, repeats):
        for name, layer in layers.items():
            for kind in ("device", "eager") if device.type == "cuda" else ("eager",):
                layer.between(2 * i + (kind == "eager") + 4)
                run = partial(run_once, layer, *buffers.take(layer.handed))
                found = seconds_of(run, device, head_start=kind == "device")
                if i >= 0:
                    getattr(times[name], kind).append(found)
    return times


def ceilings(case: Case, device: torch.device, repeats: int) -> dict[str, float]:
    """Seconds of the layer's three GEMMs alone, and of a copy of x; on a GPU only."""
    from fp4dist.kernels.triton.matmul import matmul, multiplies_fp8
    from fp4dist.numerics.tensor import Carrier

    tokens, inputs, outputs = case.size
    tokens //= max(case.experts, 1)
    shapes = ((tokens, outputs, inputs), (tokens, inputs, outputs), (outputs, inputs, tokens))  # M, N, K
    found = {"copy": 0.0, "bf16": 0.0}
    x = torch.randn(1 << 26, device=device, dtype=torch.bfloat16)
    copied = torch.empty_like(x)
    found["copy"] = median(lambda: copied.copy_(x), device, repeats)
    fp8 = multiplies_fp8(device) and not tokens % 16
    for m, n, k in shapes:
        a, b = (torch.randn(r, k, device=device, dtype=torch.bfloat16) for r in (m, n))
        found["bf16"] += median(lambda a=a, b=b: a @ b.t(), device, repeats)
        if fp8:
            a, b = ((x * 2).round().div(2) for x in (a, b))
            one = torch.ones((), device=device)
            pair = Carrier(a.to(torch.float8_e5m2), one), Carrier(b.to(torch.float8_e4m3fn), one)
            found["fp8"] = found.get("fp8", 0.0) + median(partial(matmul, *pair, out=torch.bfloat16), device, repeats)
    times = max(case.experts, 1)
    return {name: value if name == "copy" else value * times for name, value in found.items()}


def median(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds, after two runs that warm up."""
    run()
    run()
    return statistics.median(seconds_of(run, device, head_start=True) for _ in range(repeats))


def compare(
    recipe: str, case: Case, step: int, repeats: int, device: torch.device, backend: BackendConfig,
    ceiling: dict[str, float],
) -> dict[str, Any]:  # fmt: skip
    """The layer under `recipe` and the plain one, in turn."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    plain = "fp32" if device.type == "cpu" else "bf16"
    result: dict[str, Any] = {
        "recipe": recipe,
        "case": case.label,
        "size": dict(zip(("tokens", "inputs", "outputs"), case.size, strict=True)),
        "experts": case.experts,
        "step": step,
        "plain": plain,
    }
    try:
        layer = fp4_layer(case, recipe, step, device, dtype, backend)
        layers = {plain: plain_layer(case, device, dtype), "fp4": layer}
        if device.type == "cuda":  # torch's quantizers on a CPU look for every amax themselves
            layers["handed"] = dataclasses.replace(layer, handed=True)
        times = alternate(layers, case, repeats, device, dtype)
    except Fp4DistError as refused:
        if case.experts:
            return {**result, "refused": str(refused)}
        filled = dataclasses.replace(case, experts=1, note=f"{case.note} filled up".strip())
        return {**compare(recipe, filled, step, repeats, device, backend, ceiling), "refused": str(refused)}
    fp4, other = times["fp4"], times[plain]
    result |= {
        "plain_seconds": other.median,
        "fp4_seconds": fp4.median,
        "ratio": fp4.median / other.median,
        "best_ratio": min(fp4.device or fp4.eager) / min(other.device or other.eager),
        "fp4_tflops": case.flops / fp4.median * 1e-12,
        "plain_tflops": case.flops / other.median * 1e-12,
        "all_seconds": {name: dataclasses.asdict(t) for name, t in times.items()},
    }
    if fp4.device:
        result["eager_ratio"] = statistics.median(fp4.eager) / statistics.median(other.eager)
        result["handed_ratio"] = times["handed"].median / other.median
    return result | {f"share_of_{name}_ceiling": s / fp4.median for name, s in ceiling.items() if name != "copy"}


def line_of(r: dict[str, Any]) -> str:
    """A result for the terminal."""
    start = f"{r['recipe']:<20} {r['case']:<28}"
    refused = f"\n    refused as it is: {r['refused']}" if "refused" in r else ""
    if "ratio" not in r:
        return start + refused
    ends = [f"best {r['best_ratio']:5.2f}"]
    if "eager_ratio" in r:
        shares = " ".join(f"{r[k]:.0%} of {k[9:-8]}" for k in r if k.startswith("share_of_"))
        ends = [
            f"handed {r['handed_ratio']:5.2f}",
            f"eager {r['eager_ratio']:5.2f}",
            f"{r['fp4_tflops']:6.0f} TFLOP/s",
            f"GEMMs alone: {shares}",
        ]
    return (
        f"{start} {r['plain']} {r['plain_seconds'] * 1e3:8.3f} ms   fp4 {r['fp4_seconds'] * 1e3:8.3f} ms"
        f"   ratio {r['ratio']:5.2f}   {'   '.join(ends)}{refused}"
    )


def draw(results: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Ratios as bars, a group for each layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [r for r in results if "ratio" in r]
    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.3 * len(shown)))
    for place, r in enumerate(reversed(shown)):
        axes.barh(place, r["ratio"], color="C0" if r["ratio"] > 1 else "C2")
        handed = f"; amax handed over {r['handed_ratio']:.2f}" if "handed_ratio" in r else ""
        axes.text(r["ratio"], place, f" {r['ratio']:.2f}{handed}", va="center", fontsize="small")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [f"{r['recipe']} {r['case']}" for r in reversed(shown)], fontsize="small")
    axes.set_xlabel(f"forward + backward, time over {shown[0]['plain'] if shown else ''} nn.Linear")
    axes.set_title(title, fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def processor() -> str:
    """The CPU's name where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment(threads: int, device: torch.device) -> dict[str, Any]:
    return {
        "device": processor() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": threads,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of_triton(),
        "fp4dist": fp4dist.__version__,
    }


def version_of_triton() -> str | None:
    """None where it is not installed."""
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def cases_of(sizes: Sequence[Size], more: bool) -> list[Case]:
    """The layers to time."""
    extra = [
        Case(QKV_SIZE, note="GQA"), Case(RAGGED_SIZE, note="ragged"), Case(EXPERT_SIZE, EXPERTS, f"{EXPERTS} experts"),
    ]  # fmt: skip
    return [*(Case(size) for size in sizes), *(extra if more else [])]


def main() -> None:
    parser = argparse.ArgumentParser(description="FP4 linear (forward + backward) against the plain one.")
    parser.add_argument("--recipe", action="append", help="recipe name or path; repeatable (default: nvidia_nvfp4)")
    parser.add_argument("--size", action="append", type=parse_size, help="TOKENSxINPUTSxOUTPUTS; repeatable")
    parser.add_argument("--more", action="store_true", help="also GQA, ragged tokens and experts")
    parser.add_argument("--step", type=int, default=0, help="optimizer step to run at (default: 0)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backend", choices=("auto", "reference", "triton"), default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each (default: 9)")
    parser.add_argument("--out", type=Path, default=Path("bench_linear.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    backend = BackendConfig(kind=options.backend, allow_reference=options.backend == "reference")
    sizes = options.size or (GPU_SIZES if device.type == "cuda" else [(1024, 1024, 1024)])
    results, roofline = [], {}
    for case in cases_of(sizes, options.more):
        ceiling = ceilings(case, device, options.repeats) if device.type == "cuda" else {}
        if ceiling:
            roofline[case.label] = ceiling
            rates = "  ".join(
                f"{k} {v * 1e3:.3f} ms {case.flops / v * 1e-12:.0f}" for k, v in ceiling.items() if k != "copy"
            )
            print(
                f"ceilings of {case.label}: copy {4e-12 * 2**26 / ceiling['copy']:.2f} TB/s  {rates} TFLOP/s",
                flush=True,
            )
        for recipe in options.recipe or ["nvidia_nvfp4"]:
            results.append(compare(recipe, case, options.step, options.repeats, device, backend, ceiling))
            print(line_of(results[-1]), flush=True)
    where = environment(options.threads, device)
    report = {"environment": where, "ceilings": roofline, "results": results}
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    plot = options.out.with_suffix(".png")
    draw(results, plot, f"{where['device']}, torch {where['torch']}, triton {where['triton']}")
    print(f"written to {options.out} and {plot}")


if __name__ == "__main__":
    main()
