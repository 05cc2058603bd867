"""The model of a study: a Llama of plain torch modules, which `apply_recipe` turns into FP4 as it would any other.

What lies between the linears is compiled on a GPU, each part as one function, so that runs of one process share the
kernels; on a CPU it runs as written. Weights are fp32, activations bf16 on a GPU; a linear without FP4 multiplies in
the activations' dtype. Sizes: B sequences, S tokens, H query heads, G key/value groups, D width of a head, T = B * S.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fp4dist.spec.run import ModelConfig

_CHUNK = 16384  # tokens whose logits exist at one time
Function = Callable[..., Any]


class Llama(nn.Module):
    """RMSNorm, RoPE, SwiGLU; embedding and head untied unless the configuration ties them. No biases."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        cos, sin = _angles(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, text_BS: Tensor, labels_BS: Tensor) -> Tensor:
        """The sum of the losses over the number of tokens, fp32. Without gradients, negative labels add nothing."""
        eps = self.config.norm_eps
        x = self.embedding(text_BS).to(self.dtype)
        y = None  # the newest branch, which joins x where the next norm reads it
        for layer in self.layers:
            x, y = layer(x, y, self.cos, self.sin, eps)
        _, h = _run(add_norm, x, y, self.norm.weight, eps)
        loss: Any = _HeadLoss.apply(h.flatten(0, 1), self.head.weight, labels_BS.flatten(), torch.is_grad_enabled())
        return loss

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Matrices decay, norms do not."""
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for p in self.parameters():
            groups[p.dim() > 1].append(p)
        return [{"params": ps, "weight_decay": weight_decay if decays else 0.0} for decays, ps in groups.items()]


class _Layer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, heads, groups, width = (
            config.hidden_size,
            config.num_attention_heads,
            config.query_groups,
            config.kv_channels,
        )
        self.shape = (heads, groups, width)
        self.norm_1 = nn.RMSNorm(d, config.norm_eps)
        self.linear_qkv = nn.Linear(d, (heads + 2 * groups) * width, bias=False)
        self.linear_proj = nn.Linear(heads * width, d, bias=False)
        self.norm_2 = nn.RMSNorm(d, config.norm_eps)
        self.linear_fc1 = nn.Linear(d, 2 * config.ffn_hidden_size, bias=False)
        self.linear_fc2 = nn.Linear(config.ffn_hidden_size, d, bias=False)

    def forward(self, x: Tensor, y: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(the residual stream before the last branch, the last branch), both [B, S, d]."""
        x, h = (
            (x, _run(norm, x, self.norm_1.weight, eps)) if y is None else _run(add_norm, x, y, self.norm_1.weight, eps)
        )
        h = _run(attend, self._multiply(self.linear_qkv, h), cos, sin, *self.shape)
        x, h = _run(add_norm, x, self._multiply(self.linear_proj, h), self.norm_2.weight, eps)
        h = _run(swiglu, self._multiply(self.linear_fc1, h))
        return x, self._multiply(self.linear_fc2, h)

    def _multiply(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """An FP4 linear takes fp32 weights and bf16 inputs; torch's own wants one dtype."""
        if getattr(linear, "plan", None) is not None or x.dtype == linear.weight.dtype:
            return linear(x)
        return F.linear(x, linear.weight.to(x.dtype))


@torch.no_grad()
def initialize(model: Llama, seed: int) -> None:
    """N(0, init_std), what writes to the residual stream by 1 / sqrt(2 layers) narrower; drawn on the CPU by name."""
    config = model.config
    for number, (name, p) in enumerate(model.named_parameters()):
        if p.dim() < 2:
            p.fill_(1.0)
            continue
        narrow = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        std = config.init_std * ((2 * config.num_layers) ** -0.5 if narrow else 1.0)
        draw = torch.Generator().manual_seed(seed * 100003 + number)
        p.copy_(torch.empty(p.shape).normal_(0.0, std, generator=draw))


# -- the parts between GEMMs


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm in fp32, in x's dtype."""
    f = x.float()
    return (f * torch.rsqrt(f.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def add_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + y, its norm)."""
    total = x + y
    return total, norm(total, weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(first half) * second half, in fp32."""
    gate, up = gate_up.float().chunk(2, -1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def attend(qkv_BSX: Tensor, cos: Tensor, sin: Tensor, heads: int, groups: int, width: int) -> Tensor:
    """[B, S, H * D] of causal attention with rotary positions."""
    B, S, _ = qkv_BSX.shape
    parts = qkv_BSX.split((heads * width, groups * width, groups * width), -1)
    q, k, v = (part.view(B, S, -1, width).transpose(1, 2) for part in parts)
    out = F.scaled_dot_product_attention(
        _turn(q, cos, sin), _turn(k, cos, sin), v, is_causal=True, enable_gqa=groups != heads
    )
    return out.transpose(1, 2).reshape(B, S, heads * width)


def _turn(t_BHSD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = t_BHSD.float().chunk(2, -1)
    return (t_BHSD.float() * cos + torch.cat((-second, first), -1) * sin).to(t_BHSD.dtype)


def _angles(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines [S, D]."""
    D = config.kv_channels
    rates = config.rope_base ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    angles = torch.outer(torch.arange(config.seq_length, dtype=torch.float64), rates).repeat(1, 2)
    return angles.cos().float(), angles.sin().float()


# -- the loss


def loss_and_gradient(logits_TV: Tensor, labels_T: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """(sum of the losses, fp32; gradient of share * that sum by the logits, in their dtype)."""
    logits = logits_TV.float()
    total = torch.logsumexp(logits, -1)
    loss = (total - logits.gather(1, labels_T[:, None])[:, 0]).sum()
    hit = torch.arange(logits.shape[1], device=logits.device) == labels_T[:, None]
    return loss, (((logits - total[:, None]).exp() - hit.float()) * share).to(logits_TV.dtype)


def loss_alone(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """Sum of the losses, fp32, over the tokens whose label is not negative."""
    logits, counts = logits_TV.float(), labels_T >= 0
    picked = logits.gather(1, labels_T.where(counts, 0)[:, None])[:, 0]
    return (torch.logsumexp(logits, -1) - picked).where(counts, 0.0).sum()


class _HeadLoss(torch.autograd.Function):
    """Head and cross-entropy, a chunk of tokens at a time; forward makes the gradients, so no logits are kept."""

    @staticmethod
    def forward(ctx: Any, h_TI: Tensor, weight_VI: Tensor, labels_T: Tensor, training: bool) -> Tensor:  # type: ignore[override]
        weight = weight_VI.to(h_TI.dtype)
        loss = torch.zeros((), dtype=torch.float32, device=h_TI.device)
        dh = torch.empty_like(h_TI) if training else None
        dw = torch.zeros_like(weight_VI) if training else None
        for begin in range(0, len(labels_T), _CHUNK):
            part = slice(begin, begin + _CHUNK)
            logits = h_TI[part] @ weight.t()
            if dh is None or dw is None:
                loss += _run(loss_alone, logits, labels_T[part])
                continue
            some, gradient = _run(loss_and_gradient, logits, labels_T[part], 1.0 / len(labels_T))
            loss += some
            torch.mm(gradient, weight, out=dh[part])
            dw += gradient.t() @ h_TI[part]
        if dh is not None and dw is not None:
            ctx.save_for_backward(dh, dw)
        return loss / len(labels_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        dh, dw = ctx.saved_tensors
        return dh * dy.to(dh.dtype), dw * dy, None, None


def _run(function: Function, tensor: Tensor, *more: Any) -> Any:
    """function(tensor, ...), compiled if the tensor is on a GPU."""
    return (_compiled(function) if tensor.is_cuda else function)(tensor, *more)


@cache
def _compiled(function: Function) -> Function:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(function, fullgraph=True, dynamic=False)


def schedule(step: int, steps: int, warmup: float, start: float, end: float) -> float:
    """The rate of step `step` (from 0) in units of the highest: two half cosines, start -> 1 -> end."""
    rise = warmup * steps
    if step < rise:
        return start + (1 - start) * 0.5 * (1 - math.cos(math.pi * step / rise))
    left = (step - rise) / max(steps - 1 - rise, 1)
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * min(left, 1.0)))
