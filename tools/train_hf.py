"""Train a small Llama of Hugging Face transformers in bf16 and in FP4: what `apply_recipe` asks of a user.

    python tools/train_hf.py --steps 50 --recipes bf16 nvidia_nvfp4 quartet2 --out runs/hf

Tokens are those of the quick start (Jane Austen, prepared on first use). Every recipe starts from the same weights and
sees the same batches. Prints the layer table and the losses; writes losses.json and losses.png into the folder.
Needs `pip install -c constraints.txt -e ".[hf]"`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import fp4dist
from fp4dist.spec.run import PrepareConfig
from fp4dist.train.prepare import prepare
from fp4dist.train.token_files import read_index

DATA = PrepareConfig(sources=("configs/data/austen.txt.bz2",), vocab_size=4096, valid_fraction=0.05)
VALIDATION_BATCHES = 4


@dataclass(frozen=True)
class Run:
    """One recipe's outcome; losses in nats per token."""

    recipe: str
    fp4_share: float  # of the block linears' FLOPs, by the table
    calls: dict[str, int]  # GEMMs that ran, counted, by kind
    losses: list[float]
    val_loss: tuple[float, float]  # before and after
    tokens_per_s: float


def make_model(vocab_size: int, options: argparse.Namespace) -> LlamaForCausalLM:
    """A Llama with random weights, the same ones at every call, its head tied to the embedding."""
    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 32,
        num_key_value_heads=options.hidden // 64,
        max_position_embeddings=options.sequence,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).to(options.device)


def read_tokens(prefix: Path) -> Tensor:
    """[N] int64 tokens of a .bin/.idx pair."""
    index = read_index(str(prefix))
    return torch.from_numpy(np.fromfile(f"{prefix}.bin", dtype=index.dtype).astype(np.int64))


def batches(tokens: Tensor, number: int, options: argparse.Namespace, seed: int) -> Iterator[Tensor]:
    """`number` batches [B, S] cut at random places, the same ones for a seed."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(number):
        starts = torch.randint(len(tokens) - options.sequence, (options.batch,), generator=draw)
        yield torch.stack([tokens[s : s + options.sequence] for s in starts.tolist()]).to(options.device)


@torch.no_grad()
def validate(model: LlamaForCausalLM, tokens: Tensor, options: argparse.Namespace) -> float:
    """Mean loss over a fixed set of batches, in eval mode: GEMMs without gradient are not counted."""
    model.eval()
    losses = [loss_of(model, batch, options).item() for batch in batches(tokens, VALIDATION_BATCHES, options, seed=1)]
    model.train()
    return sum(losses) / len(losses)


def loss_of(model: LlamaForCausalLM, batch: Tensor, options: argparse.Namespace) -> Tensor:
    """Next-token loss; what is not FP4 runs in bf16 on a GPU, in fp32 on a CPU."""
    with torch.autocast(options.device, torch.bfloat16, enabled=options.device == "cuda"):
        loss = model(input_ids=batch, labels=batch).loss
    assert isinstance(loss, Tensor)
    return loss


def train(recipe: str, vocab_size: int, train_tokens: Tensor, valid_tokens: Tensor, options: argparse.Namespace) -> Run:
    """One run: the only lines that FP4 needs are apply_recipe and set_step."""
    model = make_model(vocab_size, options)
    applied = fp4dist.apply_recipe(model, recipe, tokens=options.batch * options.sequence)
    print(f"\n{applied.table()}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, options.steps, pct_start=0.1)
    before, losses, seconds = validate(model, valid_tokens, options), [], 0.0
    for step, batch in enumerate(batches(train_tokens, options.steps, options, seed=0)):
        start = time.perf_counter()
        applied.set_step(step, options.steps)
        loss = loss_of(model, batch, options)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds += time.perf_counter() - start
        if step % 10 == 0 or step == options.steps - 1:
            print(f"{recipe:<20} step {step:>5}  loss {losses[-1]:.4f}", flush=True)
    applied.check_counts()  # what ran is what the table says
    return Run(
        recipe=recipe,
        fp4_share=applied.to_json()["fp4_share_of_block_linear_flops"],
        calls=applied.counts()["calls"],
        losses=losses,
        val_loss=(before, validate(model, valid_tokens, options)),
        tokens_per_s=options.steps * options.batch * options.sequence / seconds,
    )


def table(runs: list[Run]) -> str:
    """A Markdown table, the first run being the baseline of the gap."""
    lines = [
        "| recipe | FP4 share | training loss, last 5 | validation loss, first | last | gap | tokens/s | GEMMs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        mean = sum(run.losses[-5:]) / len(run.losses[-5:])
        (first, last), gap = run.val_loss, run.val_loss[1] - runs[0].val_loss[1]
        lines.append(
            f"| {run.recipe} | {run.fp4_share:.1%} | {mean:.4f} | {first:.4f} | {last:.4f} | {gap:+.4f}"
            f" | {run.tokens_per_s:,.0f} | {run.calls} |"
        )
    return "\n".join(lines)


def draw(runs: list[Run], picture: Path) -> None:
    """Training losses over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for run in runs:
        axes.plot(run.losses, linewidth=0.9, label=f"{run.recipe} ({run.fp4_share:.0%} FP4)")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (nats per token)")
    axes.set_title("LlamaForCausalLM under apply_recipe")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=["bf16", "nvidia_nvfp4", "quartet2"], help="first: baseline")
    parser.add_argument("--out", type=Path, default=Path("runs/hf"))
    parser.add_argument("--data", type=Path, default=Path("runs/quickstart_data/austen"), help="prefix of token files")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lr", type=float, default=2e-3)
    for name, default in (("steps", 50), ("batch", 8), ("sequence", 256), ("hidden", 256), ("layers", 4), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    data = prepare(DATA, options.data)
    assert data.valid_prefix is not None
    sides = (read_tokens(data.prefix), read_tokens(data.valid_prefix))
    runs = [train(recipe, data.vocab_size, *sides, options) for recipe in options.recipes]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "losses.json").write_text(json.dumps([asdict(run) for run in runs], indent=1))
    draw(runs, options.out / "losses.png")
    print(f"\n{table(runs)}\n{options.out / 'losses.json'}, {options.out / 'losses.png'}")


if __name__ == "__main__":
    main()
