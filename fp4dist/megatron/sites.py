"""The linears of a GPT, known from its ModelConfig alone: for dry runs, and for pipeline stages that hold only a part.

Paths are those of GPTModel.named_modules() on one rank that holds everything, so layer numbers are global; sizes are
those before tensor parallelism splits them. Megatron-core is not imported.
"""

from __future__ import annotations

from fp4dist.nn.sites import LinearSite
from fp4dist.spec.run import ModelConfig


def gpt_sites(model: ModelConfig) -> list[LinearSite]:
    """Every linear of the whole model in forward order: qkv, proj, MLP or experts of each layer, then the head.

    fc1 holds SwiGLU's gate and up projections, hence 2 * ffn_hidden_size outputs; qkv holds the query heads and
    twice the key/value groups. A layer with experts has the router, each expert's fc1 and fc2 (role `expert`) and the
    shared expert's (roles `fc1`, `fc2`). The head is listed with tied embeddings too: its GEMM exists, its weight not.
    """
    sites = [site for layer in range(model.num_layers) for site in _layer_sites(model, layer)]
    head = LinearSite(
        path="output_layer", role="head", layer=None, in_features=model.hidden_size, out_features=model.vocab_size
    )
    return [*sites, head]


def _layer_sites(model: ModelConfig, layer: int) -> list[LinearSite]:
    hidden, moe = model.hidden_size, model.moe
    query, key_value = model.num_attention_heads * model.kv_channels, model.query_groups * model.kv_channels

    def site(name: str, role: str, inputs: int, outputs: int, token_share: float = 1.0) -> LinearSite:
        return LinearSite(
            path=f"decoder.layers.{layer}.{name}",
            role=role,
            layer=layer,
            in_features=inputs,
            out_features=outputs,
            pieces=2 if name.endswith("linear_fc1") else 1,
            token_share=token_share,
        )

    def mlp(name: str, ffn: int, role: str = "", token_share: float = 1.0) -> list[LinearSite]:
        return [
            site(f"{name}.linear_fc1", role or "fc1", hidden, 2 * ffn, token_share),
            site(f"{name}.linear_fc2", role or "fc2", ffn, hidden, token_share),
        ]

    attention = [
        site("self_attention.linear_qkv", "qkv", hidden, query + 2 * key_value),
        site("self_attention.linear_proj", "proj", query, hidden),
    ]
    if moe is None or layer < moe.first_dense_layers:
        return [*attention, *mlp("mlp", model.ffn_hidden_size)]
    share = moe.top_k / moe.num_experts
    names = [f"mlp.experts.local_experts.{expert}" for expert in range(moe.num_experts)]
    experts = [expert for name in names for expert in mlp(name, moe.ffn_hidden_size, "expert", share)]
    shared = mlp("mlp.shared_experts", moe.shared_ffn_hidden_size) if moe.shared_ffn_hidden_size else []
    return [*attention, site("mlp.router", "router", hidden, moe.num_experts), *experts, *shared]


def count_parameters(model: ModelConfig) -> int:
    """Number of trainable parameters, before the vocabulary is padded to a multiple of the tensor-parallel size.

    Linears without bias + embedding (once when tied) + two RMSNorms a layer + the final one + query/key norms.
    """
    linears = sum(site.in_features * site.out_features for site in gpt_sites(model))
    embedding = 0 if model.tie_embeddings else model.vocab_size * model.hidden_size
    norms = (2 * model.num_layers + 1) * model.hidden_size
    qk_norms = 2 * model.num_layers * model.kv_channels if model.qk_norm else 0
    return linears + embedding + norms + qk_norms


def flops_per_token(model: ModelConfig) -> float:
    """Floating-point operations of one training token, forward and backward, at sequences of `seq_length`.

        6 * P + 6 * num_layers * seq_length * num_attention_heads * kv_channels

    P is the number of weights that a token meets in all linears, the head included, the embedding look-up not, of the
    experts top_k: 2 operations a weight in the forward pass and twice that in the backward pass. The second term is
    attention's two products, QK^T and PV, with the causal half of the square only. Norms, RoPE, SwiGLU and the loss are
    not counted, recomputation neither: this is the useful work that MFU relates to.
    """
    weights = sum(site.token_share * site.in_features * site.out_features for site in gpt_sites(model))
    attention = model.num_layers * model.seq_length * model.num_attention_heads * model.kv_channels
    return 6.0 * weights + 6.0 * attention
