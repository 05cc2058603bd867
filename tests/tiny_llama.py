"""A Llama-like decoder in plain torch, with Hugging Face's module names: what users outside Megatron bring."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fp4dist.nn.sites import LinearSite, find_linears

VOCABULARY, SEQUENCE, BATCH = 64, 64, 2  # 128 tokens a batch: every shipped rotation divides them


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))


class Mlp(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(hidden, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, hidden: int, inner: int, heads: int) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.self_attn, self.mlp = Attention(hidden, heads), Mlp(hidden, inner)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, num_layers: int, hidden: int, inner: int, heads: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, hidden)
        self.layers = nn.ModuleList(Layer(hidden, inner, heads) for _ in range(num_layers))
        self.norm = nn.RMSNorm(hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class TinyLlama(nn.Module):
    """Next-token loss of tokens [B, S + 1]."""

    def __init__(self, num_layers: int = 2, hidden: int = 128, inner: int = 256, heads: int = 4, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.model = Decoder(num_layers, hidden, inner, heads)
        self.lm_head = nn.Linear(hidden, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.lm_head(self.model(tokens[:, :-1]))
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def make_tokens(seed: int = 0) -> Tensor:
    """[B, S + 1] random tokens."""
    return torch.randint(0, VOCABULARY, (BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(seed))


def make_sites(num_layers: int) -> list[LinearSite]:
    """The linears of a TinyLlama of that depth."""
    with torch.device("meta"):
        return [site for site, _, _ in find_linears(TinyLlama(num_layers))]
