"""How exactly FP8 tensor cores add up MXFP4 products: FP8 GEMM with fp32 output against fp64, beside the bf16 one.

    python tools/measure_accumulation.py                                      # on a GPU with FP8 tensor cores
    python tools/measure_accumulation.py --pairs gradients.pt --interval 256  # {name: (A [M, K], B [N, K])} of a run

Operands are quantized to MXFP4 (the reference's bits) and multiplied as the package does it (`fp8`: float8_e5m2 x
float8_e4m3fn through cuBLASLt, without fast accumulation), by the Triton GEMM (e5m2 x e5m2) with partial sums of each
--interval elements of K, and as bf16 carriers. All hold the codes exactly but for the elements counted as flushed, so
every difference from the fp64 product of the same carriers is the accumulator's. Families: Gaussian, Gaussian
magnitudes (nothing cancels), Student's t with 3 degrees of freedom, its magnitudes, and the operands of weight
gradients (dY^T, X^T) in a small language model after some steps on this repository's text. As a stress that the limit
is not asked of: blocks whose magnitudes spread over many binades (sigma 2.5).

    error   |found - exact| / |exact|, Frobenius norms
    bias    mean of (found - exact) * sign(exact) over mean of |exact|: negative where sums are too small

Results: a table, and accumulation.json and accumulation.png in --out. Exit code 1 if `fp8`, or the Triton GEMM's own
interval, is above --limit.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fp4dist
from fp4dist.kernels.triton.carriers import to_carrier
from fp4dist.kernels.triton.gemm import PROMOTED, Side, gemm
from fp4dist.kernels.triton.matmul import matmul
from fp4dist.numerics import quantize
from fp4dist.numerics.tensor import Carrier
from fp4dist.spec.build import build
from fp4dist.spec.recipe import QuantSpec

ROOT = Path(__file__).resolve().parents[1]
MXFP4 = {"format": "mxfp4"}
LIMIT = 2e-4  # an eighth of what rounding the output to bf16 costs
INTERVALS = (32, 64, 128, 256, 512, 1024, 0)
STRESS = "spread blocks"
DEPTHS = (1024, 2048, 4096, 8192, 16384)
Pair = tuple[Tensor, Tensor]


def families(rows: int, k: int, device: torch.device, generator: torch.Generator) -> Iterator[tuple[str, Pair]]:
    """Pairs of random operands [rows, k]."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def student() -> Tensor:
        return normal(rows, k) / (normal(3, rows, k).square().mean(0)).sqrt()

    def spread() -> Tensor:
        return normal(rows, k) * torch.exp2(2.5 * normal(rows, k // 32)).repeat_interleave(32, dim=1)

    yield "gaussian", (normal(rows, k), normal(rows, k))
    yield "gaussian, positive", (normal(rows, k).abs(), normal(rows, k).abs())
    yield "student", (student(), student())
    yield "student, positive", (student().abs(), student().abs())
    yield STRESS, (spread(), spread())
    yield f"{STRESS}, positive", (spread().abs(), spread().abs())


class Block(nn.Module):
    """One attention and one MLP with a norm each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, width] -> the same."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norms[1](x))))


def gradients_of_training(tokens: int, steps: int, device: torch.device) -> Iterator[tuple[str, Pair]]:
    """(dY^T, X^T) of the linears of two blocks in step `steps` on bytes of text: what weight gradients multiply."""
    torch.manual_seed(0)
    width, length = 256, 256
    embed, head = nn.Embedding(256, width).to(device), nn.Linear(width, 256).to(device)
    blocks = nn.Sequential(Block(width, 4), Block(width, 4)).to(device)
    parameters = [*embed.parameters(), *head.parameters(), *blocks.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    text = b"".join(p.read_bytes() for p in sorted((ROOT / "fp4dist").rglob("*.py")))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device).long()
    found: dict[str, list[Tensor]] = {}

    def keep(name: str, module: nn.Module) -> None:
        def forward(_: nn.Module, inputs: tuple[Tensor], __: Tensor) -> None:
            found[name] = [inputs[0].detach().flatten(0, -2).t()]

        def backward(_: nn.Module, __: Any, outputs: Any) -> None:
            found[name].insert(0, outputs[0].detach().flatten(0, -2).t())

        module.register_forward_hook(forward)
        module.register_full_backward_hook(backward)

    for name, module in blocks.named_modules():
        if isinstance(module, nn.Linear):
            keep(name, module)
    for _ in range(steps):
        starts = torch.randint(0, len(data) - length - 1, (max(tokens // length, 1),), device=device)
        batch = data[starts[:, None] + torch.arange(length + 1, device=device)]
        logits = head(blocks(embed(batch[:, :-1])))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, (dy, x) in found.items():
        yield f"gradients {name}", (dy.contiguous(), x.contiguous())


def carriers(operand: Tensor, dtype: torch.dtype) -> Carrier:
    """MXFP4 codes of the operand, as a carrier."""
    return to_carrier(quantize(operand, build(QuantSpec, MXFP4)), dtype)


def deviation(found: Tensor, exact: Tensor) -> dict[str, float]:
    """Relative error and mean bias."""
    difference = found.double() - exact
    return {
        "error": float(difference.norm() / exact.norm()),
        "bias": float((difference * exact.sign()).mean() / exact.abs().mean()),
    }


def measure(name: str, pair: Pair, intervals: tuple[int, ...]) -> dict[str, Any]:
    """All accumulations of one pair."""
    (m, k), n = pair[0].shape, pair[1].shape[0]
    bf16, e5m2, e4m3 = torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn
    wide, narrow, mixed = (
        (carriers(pair[0], left), carriers(pair[1], right))
        for left, right in ((bf16, bf16), (e5m2, e5m2), (e5m2, e4m3))
    )
    result: dict[str, Any] = {"family": name, "m": m, "n": n, "k": k}
    result["flushed"] = [int(c.lost) for c in (*narrow, mixed[1]) if c.lost is not None]
    result["bf16 output"] = deviation(exact_of(*wide).to(bf16), exact_of(*wide))
    result["bf16"] = deviation(matmul(*wide), exact_of(*wide))
    result["fp8"] = deviation(matmul(*mixed), exact_of(*mixed))
    left, right = (Side(c.values, c.scale) for c in narrow)
    for interval in intervals:
        result[str(interval or "none")] = deviation(gemm(left, right, promoted=interval), exact_of(*narrow))
    return result


def exact_of(a: Carrier, b: Carrier) -> Tensor:
    """[M, N] fp64."""
    return (a.values.double() @ b.values.double().t()) * (a.scale.double() * b.scale.double())


def line_of(r: dict[str, Any], columns: list[str]) -> str:
    """A row of the table: error (bias) in units of 1e-6."""
    cells = "".join(f"{r[c]['error'] * 1e6:8.1f} ({r[c]['bias'] * 1e6:+7.1f})" for c in columns)
    flushed = "/".join(map(str, r["flushed"]))
    return f"{r['family']:<24} {r['k']:>5} {flushed:>9}{cells}"


def draw(results: list[dict[str, Any]], columns: list[str], path: Path, title: str) -> None:
    """The largest error over families, by K."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, sides = pyplot.subplots(1, 2, figsize=(11, 4))
    depths = sorted({r["k"] for r in results})
    for axes, what in zip(sides, ("error", "bias"), strict=True):
        for column in columns:
            worst = [max(abs(r[column][what]) for r in results if r["k"] == k) for k in depths]
            axes.plot(depths, worst, marker="o", markersize=3, label=column)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("K")
        axes.set_ylabel(f"largest |{what}| over families")
    sides[0].axhline(LIMIT, color="black", linewidth=0.8, linestyle="--")
    sides[1].legend(fontsize="small", title="partial sums of")
    figure.suptitle(title, fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def pairs_of(args: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Pair]]:
    """Everything to measure."""
    generator = torch.Generator(device).manual_seed(args.seed)
    for k in args.depth:
        yield from families(args.rows, k, device, generator)
    if args.pairs is not None:
        for name, (a, b) in torch.load(args.pairs, map_location=device).items():
            yield name, (a, b)
        return
    for name, (dy, x) in gradients_of_training(max(args.depth), args.steps, device):
        for k in args.depth:
            if k <= dy.shape[1]:
                yield name, (dy[:, :k].contiguous(), x[:, :k].contiguous())


def main() -> int:
    parser = argparse.ArgumentParser(description="Error of FP8 accumulation.")
    parser.add_argument("--rows", type=int, default=1024, help="M and N of the random products")
    parser.add_argument("--depth", type=int, action="append", help="K, repeatable (default: 1024 ... 16384)")
    parser.add_argument("--interval", type=int, action="append", help="elements in a partial sum, 0: all; repeatable")
    parser.add_argument("--pairs", type=Path, help=".pt file of operand pairs instead of training a small model")
    parser.add_argument("--steps", type=int, default=20, help="steps of the small model before its gradients are taken")
    parser.add_argument("--limit", type=float, default=LIMIT)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("."))
    args = parser.parse_args()
    args.depth = args.depth or list(DEPTHS)
    device = torch.device(args.device)
    intervals = tuple(dict.fromkeys([*(args.interval or INTERVALS), PROMOTED]))
    columns = ["bf16 output", "bf16", "fp8", *(str(i or "none") for i in intervals)]
    print(f"{'1e-6: error (bias)':<24} {'K':>5} {'flushed':>9}" + "".join(f"{c:>18}" for c in columns))
    results = []
    for name, pair in pairs_of(args, device):
        results.append(measure(name, pair, intervals))
        print(line_of(results[-1], columns), flush=True)
    asked = [r for r in results if not r["family"].startswith(STRESS)]
    kept = True
    for path in ("fp8", str(PROMOTED)):
        errors = [r[path]["error"] for r in asked]
        worst = max(errors) if all(map(math.isfinite, errors)) else math.nan
        kept = kept and worst <= args.limit
        print(
            f"{path}: largest error {worst:.2e}, limit {args.limit:.0e}: {'kept' if worst <= args.limit else 'BROKEN'}"
        )
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    environment = {"device": where, "torch": torch.__version__, "fp4dist": fp4dist.__version__}
    report = {"environment": environment, "interval": PROMOTED, "limit": args.limit, "results": results}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "accumulation.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    draw(results, columns, args.out / "accumulation.png", f"{where}, torch {torch.__version__}")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
