"""The linears of a GPT, known from its ModelConfig alone: for dry runs, and for pipeline stages that hold only a part.

Paths are those of GPTModel.named_modules() on one rank that holds everything, so layer numbers are global; sizes are
those before tensor parallelism splits them. Megatron-core is not imported.
"""

from __future__ import annotations

from fp4dist.nn.sites import LinearSite
from fp4dist.spec.run import ModelConfig


def gpt_sites(model: ModelConfig) -> list[LinearSite]:
    """Every linear of the whole model in forward order: qkv, proj, fc1, fc2 of each layer, then the head.

    fc1 holds SwiGLU's gate and up projections, hence 2 * ffn_hidden_size outputs; qkv holds the query heads and
    twice the key/value groups. The head is listed with tied embeddings too: its GEMM exists, its weight does not.
    """
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    query, key_value = model.num_attention_heads * model.kv_channels, model.query_groups * model.kv_channels
    shapes = (
        ("self_attention.linear_qkv", "qkv", hidden, query + 2 * key_value),
        ("self_attention.linear_proj", "proj", query, hidden),
        ("mlp.linear_fc1", "fc1", hidden, 2 * ffn),
        ("mlp.linear_fc2", "fc2", ffn, hidden),
    )
    sites = [
        LinearSite(
            path=f"decoder.layers.{layer}.{name}",
            role=role,
            layer=layer,
            in_features=in_features,
            out_features=out_features,
            pieces=2 if role == "fc1" else 1,
        )
        for layer in range(model.num_layers)
        for name, role, in_features, out_features in shapes
    ]
    head = LinearSite(path="output_layer", role="head", layer=None, in_features=hidden, out_features=model.vocab_size)
    return [*sites, head]


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

    P is the number of weights in all linears, the head included, the embedding look-up not: 2 operations a weight in
    the forward pass and twice that in the backward pass. The second term is attention's two products, QK^T and PV,
    with the causal half of the square only. Norms, RoPE, SwiGLU and the loss are not counted, recomputation neither:
    this is the useful work that MFU relates to.
    """
    weights = sum(site.in_features * site.out_features for site in gpt_sites(model))
    attention = model.num_layers * model.seq_length * model.num_attention_heads * model.kv_channels
    return 6.0 * weights + 6.0 * attention
