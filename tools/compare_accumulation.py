#!/usr/bin/env python
"""One training step under the published model of Blackwell's FP4 sums, and as this device multiplies: how far apart?

    python tools/compare_accumulation.py --device cpu --model tiny          # seconds
    python tools/compare_accumulation.py --model llama_124m --recipe nvidia_nvfp4 --recipe quartet2

Same weights, tokens, noise and codes in both; only the order and the rounding of the sums of FP4 products differ:
`fp4dist.numerics.blackwell_sums` (arXiv:2609.02846 reports its bits for Blackwell) against the device's own GEMMs on
exact carriers (on a GPU bf16 tensor cores, on a CPU fp32). One last bit of a sum moves a few codes of the next layer;
`first` is the first FP4 linear, whose operands are equal. For scale: `again` runs the same step twice, `seeds` changes
its noise alone. Relative Frobenius norms; a table, and compare_accumulation.json in --out. Exit code 1 if a distance
of the loss, or of the first linear, is above --limit.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fp4dist
from fp4dist.nn.apply import AppliedRecipe, apply_recipe
from fp4dist.numerics.blackwell_sums import matmul_in_groups
from fp4dist.spec.load import load_model
from fp4dist.spec.recipe import GEMMS
from fp4dist.spec.run import BackendConfig
from fp4dist.study.model import Llama, initialize

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 1e-3


class Step(NamedTuple):
    """What one step gave: the loss, outputs of the linears in order, gradients of the parameters by name, sums run."""

    loss: float
    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    sums: int


def tokens(batch: int, length: int, vocabulary: int, device: torch.device) -> Tensor:
    """[batch, length + 1] bytes of this repository's text, so that no data has to be there."""
    text = b"".join(p.read_bytes() for p in sorted((ROOT / "fp4dist").rglob("*.py")))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)[: batch * (length + 1)].long()
    return (data % vocabulary).reshape(batch, length + 1).to(device)


def step(args: argparse.Namespace, recipe: str, *, published: bool, seed: int = 0) -> Step:
    """Forward and backward of one micro-batch. published: FP4 products by the model; seed: of the noise."""
    device = torch.device(args.device)
    config = replace(load_model(args.model), seq_length=args.seq)
    model = Llama(config, torch.bfloat16 if device.type == "cuda" else torch.float32).to(device)
    initialize(model, 1)
    backend = BackendConfig(allow_reference=True)
    applied = apply_recipe(model, recipe, tokens=args.batch * args.seq, seed=seed, backend=backend)
    applied.set_step(0, 1000)
    ran = _use_published_sums(applied) if published else lambda: 0
    outputs: dict[str, Tensor] = {}
    for target in applied.targets:
        module = target.module
        assert isinstance(module, torch.nn.Module)
        module.register_forward_hook(_keeper(outputs, target.site.path))
    batch = tokens(args.batch, args.seq, config.vocab_size, device)
    loss = model(batch[:, :-1], batch[:, 1:].contiguous())
    loss.backward()
    gradients = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    return Step(float(loss.detach()), outputs, gradients, ran())


def _keeper(outputs: dict[str, Tensor], name: str) -> Callable[[Any, Any, Tensor], None]:
    def keep(_: Any, __: Any, output: Tensor) -> None:
        outputs[name] = output.detach().float()

    return keep


def _use_published_sums(applied: AppliedRecipe) -> Callable[[], int]:
    """Every GEMM of the plans goes through the model; returns how to ask how many did."""
    count = [0]

    def multiply(*args: Any, **named: Any) -> Tensor:
        count[0] += 1
        return matmul_in_groups(*args, **named)

    for target in applied.targets:
        plan = target.module.plan
        if plan is not None:
            changed = {gemm: replace(plan.kernels[gemm], fn=multiply) for gemm in GEMMS if gemm in plan.kernels}
            plan.kernels = {**plan.kernels, **changed}
    return lambda: count[0]


def distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|, Frobenius."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def compare(found: Step, base: Step) -> dict[str, float]:
    """Of the loss, the first linear's output, the last one's, and of all gradients together and the worst alone."""
    names = list(base.outputs)
    apart = {name: distance(found.gradients[name], base.gradients[name]) for name in base.gradients}
    whole = [torch.cat([g.flatten() for g in s.gradients.values()]) for s in (found, base)]
    return {
        "loss": abs(found.loss - base.loss) / base.loss,
        "first": distance(found.outputs[names[0]], base.outputs[names[0]]),
        "last": distance(found.outputs[names[-1]], base.outputs[names[-1]]),
        "gradients": distance(*whole),
        "worst gradient": max(apart.values()),
    }


def main() -> int:
    """All recipes, a table, the file."""
    args = _parse()
    rows = []
    head = "".join(f" {name:>10}" for name in ("loss", "first", "last", "gradients"))
    print(f"{'recipe':<22} {'compared':<10}{head} {'worst gradient':>15}")
    for recipe in args.recipe or ["nvidia_nvfp4", "quartet2"]:
        base = step(args, recipe, published=False)
        modelled = step(args, recipe, published=True)
        again = step(args, recipe, published=False)
        noise = step(args, recipe, published=False, seed=1)
        for name, other in (("published", modelled), ("again", again), ("seeds", noise)):
            apart = compare(other, base)
            rows.append({"recipe": recipe, "compared": name, "sums": other.sums, "loss of base": base.loss} | apart)
            cells = " ".join(f"{v:>{15 if k == 'worst gradient' else 10}.2e}" for k, v in apart.items())
            print(f"{recipe:<22} {name:<10} {cells}", flush=True)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    environment = {"device": device, "torch": torch.__version__, "fp4dist": fp4dist.__version__}
    shape = {"model": args.model, "batch": args.batch, "seq": args.seq}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "compare_accumulation.json"
    path.write_text(json.dumps({"environment": environment, **shape, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    worst = max(max(row["loss"], row["first"]) for row in rows if row["compared"] == "published")
    print(
        f"{device}, {args.model}, {args.batch} x {args.seq} tokens: largest {worst:.1e}, limit {args.limit:.0e}; {path}"
    )
    return int(worst > args.limit)


def _parse() -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n")
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=rest, formatter_class=plain)
    parser.add_argument("--recipe", action="append", help="NVFP4 ones; repeatable; default nvidia_nvfp4 and quartet2")
    parser.add_argument("--model", default="llama_124m")
    parser.add_argument("--batch", type=int, default=4, help="samples")
    parser.add_argument("--seq", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--limit", type=float, default=LIMIT)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("runs/accumulation"))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
