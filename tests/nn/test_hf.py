"""Hugging Face transformers under a recipe: models built from a config, with random weights; no network, no files."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fp4dist.errors import RecipeMismatch
from fp4dist.nn.apply import AppliedRecipe, apply_recipe
from fp4dist.nn.linear import Fp4Conv1D, Fp4Linear
from fp4dist.nn.sites import find_linears
from fp4dist.nn.triage import triage
from fp4dist.spec.load import load_recipe
from fp4dist.spec.recipe import Recipe, Rule
from tests.nn.test_wrappers import readme_blocks

transformers = pytest.importorskip("transformers")

VOCABULARY, BATCH, SEQUENCE = 256, 2, 64
TOKENS = BATCH * SEQUENCE
SIZES = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 128}
LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def llama(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {**SIZES, "intermediate_size": 256, "num_key_value_heads": 4, "max_position_embeddings": SEQUENCE}
    tokens = {"bos_token_id": None, "eos_token_id": None}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **tokens, **options}))


def qwen3() -> Any:
    torch.manual_seed(0)
    options = {"intermediate_size": 256, "num_key_value_heads": 4, "head_dim": 32}
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, **options))


def gpt2(**options: Any) -> Any:
    torch.manual_seed(0)
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES, n_positions=SEQUENCE, **dropout, **options))


def qwen3_moe() -> Any:
    options = {"moe_intermediate_size": 128, "num_key_value_heads": 4, "head_dim": 32, "num_experts": 4}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES, **options, num_experts_per_tok=2))


def make_batch(seed: int = 0) -> Tensor:
    """[B, S] tokens that a model can learn: every one follows from the one before."""
    start = torch.randint(0, VOCABULARY, (BATCH, 1), generator=torch.Generator().manual_seed(seed))
    return (start + 3 * torch.arange(SEQUENCE)) % VOCABULARY


def loss_of(model: Any, seed: int = 0) -> Tensor:
    batch = make_batch(seed)
    return model(input_ids=batch, labels=batch).loss


def train(model: Any, applied: AppliedRecipe, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        applied.set_step(step, steps)
        loss = loss_of(model, seed=step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    applied.check_counts()
    return losses


README = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fp4dist

config = LlamaConfig(hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8)
model = LlamaForCausalLM(config)
applied = fp4dist.apply_recipe(model, "quartet2", tokens=micro_batch_size * sequence_length)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step, batch in enumerate(batches):
    applied.set_step(step, total_steps)
    model(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
model.save_pretrained("out")  # an ordinary checkpoint
"""


def test_the_readmes_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What README shows, run as it stands."""
    monkeypatch.chdir(tmp_path)
    batches = [torch.randint(0, 32000, (1, 128)) for _ in range(2)]
    names: dict[str, Any] = {"batches": batches, "total_steps": 2, "micro_batch_size": 1, "sequence_length": 128}
    exec(README, names)
    names["applied"].check_counts()
    assert names["applied"].counts()["calls"] == {"fp4": 2 * 4 * 7 * 3}
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert all(block == README for block in readme_blocks("transformers"))


# ---------- Llama


def test_a_llama_in_one_line() -> None:
    """The README's example: apply, print, train. The table is right, what ran is what it says, the loss falls."""
    model = llama(tie_word_embeddings=True)
    applied = apply_recipe(model, "quartet2", tokens=TOKENS)
    assert len(applied.targets) == 2 * len(LLAMA_LINEARS)
    roles = {row.site.path.rsplit(".", 1)[-1]: (row.site.role, row.linear) for row in applied.rows}
    fp4 = {
        name: (role, "fp4")
        for name, role in zip(LLAMA_LINEARS, ("qkv",) * 3 + ("proj", "fc1", "fc1", "fc2"), strict=True)
    }
    assert roles == {**fp4, "lm_head": ("head", "bf16")}
    assert "100.0% of block-linear FLOPs in FP4" in applied.table()
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight  # the tie is untouched
    losses = train(model, applied, 8)
    assert losses[0] > 5.4  # ln 256 = 5.55
    assert losses[-1] < losses[0] - 0.4
    counts = applied.counts()
    assert counts["calls"] == {"fp4": 8 * 2 * 7 * 3}
    assert (counts["fp4_share"], counts["uncounted"]) == (1.0, 0)


def test_fp4_learns_as_bf16_does() -> None:
    curves = {}
    for recipe in ("bf16", "quartet2"):
        model = llama()
        curves[recipe] = train(model, apply_recipe(model, recipe), 5)
    gaps = [abs(a - b) for a, b in zip(curves["bf16"], curves["quartet2"], strict=True)]
    assert 0 < max(gaps) < 0.2


def test_a_recipe_that_keeps_the_last_layers() -> None:
    model = llama()
    applied = apply_recipe(model, "nvidia_nvfp4", tokens=TOKENS)
    assert {t.site.layer for t in applied.targets} == {0}
    assert all(type(m) is nn.Linear for m in model.model.layers[1].modules() if isinstance(m, nn.Linear))
    loss_of(model).backward()
    applied.check_counts()
    assert applied.counts()["uncounted"] == 7


def test_saved_and_loaded(tmp_path: Path) -> None:
    """save_pretrained of an FP4 model is an ordinary checkpoint; under the recipe the loaded model gives its bits."""
    model = llama()
    applied = apply_recipe(model, "quartet2", seed=5)
    train(model, applied, 1)
    model.save_pretrained(tmp_path)
    assert "fp4" not in (tmp_path / "config.json").read_text().lower()
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert not any(isinstance(module, Fp4Linear) for module in loaded.modules())
    again = apply_recipe(loaded, "quartet2", seed=5)
    for a in (applied, again):
        a.set_step(9, 10)
    first, second = loss_of(model), loss_of(loaded)
    assert torch.equal(first, second)
    first.backward()
    second.backward()
    for a, b in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.grad, b.grad)


def test_generate() -> None:
    """One token at a time, in eval mode: the forward GEMM alone, and nothing is counted."""
    model = llama()
    applied = apply_recipe(model, "quartet2")
    model.eval()
    out = model.generate(make_batch()[:1, :8], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 12)
    assert applied.counts()["calls"] == {}


def test_gradient_checkpointing() -> None:
    """The same bits as without it, the noise of the recomputed forward included."""
    seen = []
    for how in ("off", "on"):
        model = llama()
        if how == "on":
            model.gradient_checkpointing_enable()
        model.train()
        applied = apply_recipe(model, "quartet2", seed=5)
        applied.set_step(3, 10)
        loss_of(model).backward()
        applied.check_counts()
        seen.append((applied.counts()["calls"]["fp4"], [p.grad for p in model.parameters()]))
    (plain, gradients), (recomputed, again) = seen
    assert all(map(torch.equal, gradients, again))
    assert recomputed == plain + 2 * 7  # every forward GEMM ran twice: it did recompute


def test_triage_of_a_hugging_face_model() -> None:
    """Outputs that are dataclasses, inputs by keyword: hooks look into both."""
    model = llama()
    apply_recipe(model, "quartet2")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[0, 0] = float("nan")
    with triage(model) as found:
        loss_of(model).backward()
    assert found.forward is not None
    assert (found.forward.path, found.forward.what) == ("model.layers.1.self_attn.o_proj", "weight")


# ---------- other families


def test_qwen3() -> None:
    model = qwen3()
    applied = apply_recipe(model, "quartet2", tokens=TOKENS)
    assert len(applied.targets) == 14
    losses = train(model, applied, 3)
    assert losses[-1] < losses[0]


def test_gpt2() -> None:
    """Conv1D holds [in, out]: FP4 runs on its transpose, and the class comes back with bf16."""
    model, plain = gpt2(), gpt2()
    conv1d = type(plain.transformer.h[0].attn.c_attn)
    applied = apply_recipe(model, "quartet2", tokens=TOKENS, seed=5)
    assert [(r.site.role, r.site.out_features, r.site.in_features) for r in applied.rows[:4]] == [
        ("qkv", 384, 128),
        ("proj", 128, 128),
        ("fc1", 512, 128),
        ("fc2", 128, 512),
    ]
    assert sum(isinstance(m, Fp4Conv1D) for m in model.modules()) == 8
    assert list(model.state_dict()) == list(plain.state_dict())
    losses = train(model, applied, 3)
    assert losses[-1] < losses[0]
    apply_recipe(model, "bf16")
    assert type(model.transformer.h[0].attn.c_attn) is conv1d


def test_conv1d_computes_what_a_linear_does() -> None:
    """Bit for bit the Fp4Linear of the transposed weight, forward and backward; without a plan it is Conv1D."""
    conv1d = type(gpt2().transformer.h[0].attn.c_attn)
    torch.manual_seed(0)
    conv, linear, x = conv1d(256, 128), nn.Linear(128, 256), torch.randn(2, 64, 128)
    linear.load_state_dict({"weight": conv.weight.detach().t().contiguous(), "bias": torch.randn(256)})
    conv.bias.data.copy_(linear.bias.data)
    exact = conv(x)
    recipe = Recipe(name="r", linears=load_recipe("quartet2").linears, rules=(Rule(path="*", linear="fp4"),))
    results = []
    for module in (conv, linear):
        apply_recipe(module, recipe, seed=5)
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.square().sum().backward()
        results.append(
            (y, leaf.grad, module.weight.grad.t() if module is conv else module.weight.grad, module.bias.grad)
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not torch.equal(results[0][0], exact)
    conv.set_plan(None)
    assert torch.equal(conv(x), exact)


def test_fused_experts_are_named() -> None:
    """Transformers stacks experts in one parameter, which no class of ours can run: an error, not silent bf16."""
    model = qwen3_moe()
    with pytest.raises(RecipeMismatch, match=r"layers.0.mlp.experts.gate_up_proj: .* this layer's class cannot run it"):
        apply_recipe(model, "quartet2")
    recipe = load_recipe("quartet2")
    rules = (Rule(roles=("expert",), linear="bf16"), *recipe.rules)
    applied = apply_recipe(model, Recipe(name="attention", linears=recipe.linears, rules=rules), tokens=TOKENS)
    assert {t.site.role for t in applied.targets} == {"qkv", "proj"}
    assert 0 < applied.to_json()["fp4_share_of_block_linear_flops"] < 1
    loss_of(model).backward()
    applied.check_counts()
    assert applied.counts()["uncounted"] == 2 * 2


def test_layer_numbers_and_roles_by_family() -> None:
    for make in (llama, qwen3, gpt2, qwen3_moe):
        with torch.device("meta"):
            sites = [site for site, _, _ in find_linears(make())]
        assert {s.layer for s in sites if s.role not in ("head", "router")} == {0, 1}
        assert all(s.role for s in sites), [s.path for s in sites if not s.role]


# ---------- the tool


def load_tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "tools" / "train_hf.py"
    found = importlib.util.spec_from_file_location("train_hf", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    monkeypatch.setitem(sys.modules, "train_hf", module)  # where its dataclass looks for itself
    found.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A few steps of two recipes on real text: equal starts, losses, a table, a picture."""
    tool = load_tool(monkeypatch)
    text = "".join(f"It is a truth universally acknowledged, number {i}.\n<|endoftext|>\n" for i in range(4000))
    (tmp_path / "text.txt").write_text(text)
    monkeypatch.setattr(
        tool, "DATA", tool.PrepareConfig(sources=(str(tmp_path / "text.txt"),), vocab_size=300, valid_fraction=0.1)
    )
    small = ["--steps", "3", "--batch", "2", "--sequence", "64", "--hidden", "256", "--layers", "1"]
    paths = ["--out", str(tmp_path / "out"), "--data", str(tmp_path / "data" / "text"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["train_hf.py", *small, *paths, "--recipes", "bf16", "quartet2"])
    tool.main()
    bf16, fp4 = json.loads((tmp_path / "out" / "losses.json").read_text())
    assert (bf16["fp4_share"], fp4["fp4_share"]) == (0.0, 1.0)
    assert fp4["calls"] == {"fp4": 3 * 7 * 3}
    assert len(bf16["losses"]) == len(fp4["losses"]) == 3
    assert 0 < abs(bf16["losses"][0] - fp4["losses"][0]) < 0.1
    assert (tmp_path / "out" / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert "| quartet2 | 100.0% |" in capsys.readouterr().out
