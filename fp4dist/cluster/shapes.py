"""A model as the blocks that cost time and memory: linears, attention, scans, and what lies between them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Literal

from fp4dist.spec.run import ModelConfig

MLP_KINDS = ("mlp", "moe")
_SCAN_CHUNK = 256  # tokens that a state-space kernel multiplies as matrices


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """Y[T, outputs] = X[T, inputs] W^T.

    cut       which dimension tensor parallelism divides; `none`: every rank has it whole
    copies    matrices of this shape: the experts of a layer
    share     of the tokens that each copy sees; of experts: top_k / experts
    """

    role: Literal["qkv", "proj", "fc1", "fc2", "expert", "router", "head"]
    inputs: int
    outputs: int
    cut: Literal["column", "row", "none", "expert_column", "expert_row"]
    copies: int = 1
    share: float = 1.0

    @property
    def parameters(self) -> int:
        """Elements of all copies."""
        return self.inputs * self.outputs * self.copies

    @property
    def is_expert(self) -> bool:
        """Whether expert parallelism spreads it."""
        return self.cut.startswith("expert")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One residual branch.

    core_width     of an attention head (queries and values, on average)
    core_flops     of a token and position of context, forward, causal half included (attention); or of a token (scan)
    key_value      elements of keys and values of a token: what context parallelism exchanges
    whole_bytes    moved by elementwise kernels for a token, forward and backward, over the hidden width (cut by tp)
    split_bytes    likewise over widths that tensor parallelism cuts; scan_bytes: of state-space scans
    kernels        launched forward and backward
    saved_whole    bytes kept for backward of a token beside linears' inputs, over the hidden width
    saved_split    likewise, over cut widths
    cheap          of saved_split, what selective recomputation makes again
    routed         elements that the all-to-all carries for a token, one way (top_k * width); 0 without experts
    """

    kind: Literal["attention", "mlp", "moe", "mamba"]
    linears: tuple[Linear, ...]
    core_flops: float = 0.0
    core_width: int = 128
    scan_flops: float = 0.0
    scan_bytes: float = 0.0
    key_value: int = 0
    whole_bytes: float
    split_bytes: float
    kernels: int
    saved_whole: float
    saved_split: float
    cheap: float = 0.0
    routed: int = 0
    parameters: int = 0  # of norms and the like
    fusible_bytes: float = 0.0  # of split_bytes, what a grouped GEMM with the activation in its epilogue does not move

    @property
    def weights(self) -> tuple[int, int]:
        """Parameters (of others, of experts)."""
        experts = sum(linear.parameters for linear in self.linears if linear.is_expert)
        return sum(linear.parameters for linear in self.linears) - experts + self.parameters, experts


@dataclass(frozen=True, slots=True, eq=False)
class Shape:
    """A model: the blocks of each pipeline unit (a layer), and its ends."""

    model: ModelConfig
    layers: tuple[tuple[Block, ...], ...]
    head: Linear
    mtp: int
    counted: tuple[tuple[Block, int], ...]  # different blocks, and how many there are of each

    @property
    def parameters(self) -> int:
        """Of the whole model, embedding and head included, further-token layers not."""
        inside = sum(count * sum(block.weights) for block, count in self.counted)
        tables = self.model.vocab_size * self.model.hidden_size * (1 if self.model.tie_embeddings else 2)
        return inside + tables + self.model.hidden_size

    def flops_per_token(self, seq: int) -> float:
        """Model FLOPs of a token, forward and backward, attention causal, further-token layers included."""
        layers = sum(count * _block_flops(block, seq) for block, count in self.counted)
        extra = self.mtp * (sum(_block_flops(b, seq) for b in self.layers[-1]) + 6 * 2 * self.model.hidden_size**2)
        return layers + extra + (1 + self.mtp) * 6 * self.head.parameters


def _block_flops(block: Block, seq: int) -> float:
    gemms = sum(6 * linear.parameters * linear.share for linear in block.linears)
    return gemms + 3 * (block.core_flops * seq + block.scan_flops)


@cache
def shape_of(model: ModelConfig) -> Shape:
    """The blocks of `model`."""
    head = Linear(role="head", inputs=model.hidden_size, outputs=model.vocab_size, cut="column")
    layers = _layers(model)
    counted = Counter(block for layer in layers for block in layer)
    return Shape(model, layers, head, model.beyond.mtp if model.beyond else 0, tuple(counted.items()))


def _layers(model: ModelConfig) -> tuple[tuple[Block, ...], ...]:
    attention = _latent_attention(model) if model.beyond and model.beyond.mla else _attention(model)
    experts = _moe(model) if model.moe else None
    if model.beyond and model.beyond.mamba and experts:
        return _hybrid(model, attention, _mamba(model), experts)
    dense = _mlp(model)
    first = model.moe.first_dense_layers if model.moe else model.num_layers
    return tuple((attention, dense if n < first or experts is None else experts) for n in range(model.num_layers))


def _hybrid(model: ModelConfig, attention: Block, mamba: Block, experts: Block) -> tuple[tuple[Block, ...], ...]:
    """One block a layer, each kind spread evenly over the depth."""
    assert model.beyond is not None
    assert model.beyond.mamba is not None
    counts = {"mamba": model.beyond.mamba.layers, "attention": model.beyond.attention or 0}
    counts["moe"] = model.num_layers - sum(counts.values())
    blocks = {"mamba": mamba, "attention": attention, "moe": experts}
    order = sorted(((i + 0.5) / n, kind) for kind, n in counts.items() for i in range(n))
    return tuple((blocks[kind],) for _, kind in order)


def _norms(model: ModelConfig) -> tuple[float, float]:
    """(bytes moved, bytes saved) of a branch's norm and residual sum: both in and out, gradients likewise; x kept."""
    return 16.0 * model.hidden_size, 2.0 * model.hidden_size


def _attention(model: ModelConfig) -> Block:
    h, width = model.hidden_size, model.kv_channels
    q, kv = model.num_attention_heads * width, model.query_groups * width
    moved, saved = _norms(model)
    norm = 2.0 * 12 * (q + kv) if model.qk_norm else 0.0
    return Block(
        kind="attention",
        linears=(
            Linear(role="qkv", inputs=h, outputs=q + 2 * kv, cut="column"),
            Linear(role="proj", inputs=q, outputs=h, cut="row"),
        ),
        core_flops=2.0 * q,
        core_width=width,
        key_value=2 * kv,
        whole_bytes=moved,
        split_bytes=8.0 * (q + kv) + 4.0 * (q + 2 * kv) + norm,
        kernels=26 + (6 if model.qk_norm else 0),
        saved_whole=saved,
        saved_split=2.0 * (2 * q + 2 * kv) + (2.0 * (q + kv) if model.qk_norm else 0.0),
        cheap=2.0 * (q + kv) if model.qk_norm else 0.0,
        parameters=h + (2 * width if model.qk_norm else 0),
    )


def _latent_attention(model: ModelConfig) -> Block:
    assert model.beyond is not None
    assert model.beyond.mla is not None
    m, h, heads = model.beyond.mla, model.hidden_size, model.num_attention_heads
    qk, v = heads * (m.nope_dim + m.rope_dim), heads * m.v_dim
    up = heads * (m.nope_dim + m.v_dim)
    moved, saved = _norms(model)
    down = m.q_rank + m.kv_rank + m.rope_dim
    return Block(
        kind="attention",
        linears=(
            Linear(role="qkv", inputs=h, outputs=down, cut="none"),
            Linear(role="qkv", inputs=m.q_rank, outputs=qk, cut="column"),
            Linear(role="qkv", inputs=m.kv_rank, outputs=up, cut="column"),
            Linear(role="proj", inputs=v, outputs=h, cut="row"),
        ),
        core_flops=1.0 * (qk + v),
        core_width=(qk + v) // heads // 2,
        key_value=m.kv_rank + m.rope_dim,
        whole_bytes=moved + 24.0 * down,
        split_bytes=16.0 * (qk + qk + v),  # rope, and keys put together from two parts
        kernels=48,
        saved_whole=saved + 4.0 * down,
        saved_split=2.0 * (2 * qk + 2 * v),
        cheap=2.0 * (2 * qk + v),
        parameters=h + m.q_rank + m.kv_rank,
    )


def _mlp(model: ModelConfig) -> Block:
    h, f = model.hidden_size, model.ffn_hidden_size
    moved, saved = _norms(model)
    wide = 2 * f if _gated(model) else f
    return Block(
        kind="mlp",
        linears=(
            Linear(role="fc1", inputs=h, outputs=wide, cut="column"),
            Linear(role="fc2", inputs=f, outputs=h, cut="row"),
        ),
        whole_bytes=moved,
        split_bytes=6.0 * wide + 4.0 * f,
        kernels=18,
        saved_whole=saved,
        saved_split=2.0 * wide,
        parameters=h,
    )


def _moe(model: ModelConfig) -> Block:
    assert model.moe is not None
    e, h, f = model.moe, model.hidden_size, model.moe.ffn_hidden_size
    latent = model.beyond.latent if model.beyond and model.beyond.latent else None
    inner, gate = latent or h, 2 if _gated(model) else 1
    share = e.top_k / e.num_experts
    linears = [
        Linear(role="router", inputs=h, outputs=e.num_experts, cut="none"),
        Linear(role="expert", inputs=inner, outputs=gate * f, cut="expert_column", copies=e.num_experts, share=share),
        Linear(role="expert", inputs=f, outputs=inner, cut="expert_row", copies=e.num_experts, share=share),
    ]
    s = e.shared_ffn_hidden_size
    if s:
        linears.append(Linear(role="fc1", inputs=h, outputs=gate * s, cut="column"))
        linears.append(Linear(role="fc2", inputs=s, outputs=h, cut="row"))
    if latent:
        linears.append(Linear(role="fc1", inputs=h, outputs=latent, cut="none"))
        linears.append(Linear(role="fc2", inputs=latent, outputs=h, cut="none"))
    moved, saved = _norms(model)
    routed = e.top_k * inner
    act = e.top_k * f + s
    return Block(
        kind="moe",
        linears=tuple(linears),
        whole_bytes=moved + 8.0 * routed + 32.0 * e.num_experts,  # sorted by expert; fused with the all-to-all one way
        split_bytes=(6.0 * gate + 4.0) * act,
        kernels=70 + (20 if s else 0) + (12 if latent else 0),
        saved_whole=saved + 2.0 * routed + 8.0 * e.num_experts,
        saved_split=2.0 * gate * act,
        cheap=2.0 * gate * act,
        routed=routed,
        parameters=h,
        fusible_bytes=(2.0 * gate + 2.0) * e.top_k * f if gate > 1 else 0.0,  # dispatched only for gated activations
    )


def _mamba(model: ModelConfig) -> Block:
    assert model.beyond is not None
    assert model.beyond.mamba is not None
    m, h = model.beyond.mamba, model.hidden_size
    inner, states = m.heads * m.head_dim, m.groups * m.state
    moved, saved = _norms(model)
    scan = 2.0 * inner * (2 * m.state + _SCAN_CHUNK / 2) + 2.0 * m.heads * m.state * _SCAN_CHUNK / 2
    return Block(
        kind="mamba",
        linears=(
            Linear(role="qkv", inputs=h, outputs=2 * inner + 2 * states + m.heads, cut="column"),
            Linear(role="proj", inputs=inner, outputs=h, cut="row"),
        ),
        scan_flops=scan,
        whole_bytes=moved,
        split_bytes=0.0,
        scan_bytes=60.0 * inner + 24.0 * states,
        kernels=44,
        saved_whole=saved,
        saved_split=2.0 * (5 * inner + 4 * states),
        cheap=2.0 * 2 * inner,
        parameters=h + 2 * m.heads + 5 * (inner + 2 * states) + inner,
    )


def _gated(model: ModelConfig) -> bool:
    return model.beyond is None or model.beyond.gated
