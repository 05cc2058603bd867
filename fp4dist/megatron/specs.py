"""Layer specs for Megatron-LM's `--spec fp4dist.megatron.specs gpt_layer` (objects: Megatron does not call them).

The layers hold our linears, norm and attention, in bf16 until a recipe is applied: by fp4dist.megatron.install, or by
fp4dist.megatron.apply in one's own script. With a layer spec Megatron chooses the final norm itself, and without
Transformer Engine or apex that one refuses sequence parallelism: there use install, which needs no `--spec`.
"""

from __future__ import annotations

from typing import Any

from fp4dist.errors import ConfigError
from fp4dist.megatron.provider import transformer_layer
from fp4dist.megatron.stock import StockSpecProvider
from fp4dist.megatron.upstream import (
    IdentityOp,
    ModuleSpec,
    SelfAttention,
    SelfAttentionSubmodules,
    TransformerConfig,
    get_mlp_module_spec_for_backend,
)


class CheckedSelfAttention(SelfAttention):
    """Megatron's attention, which before 0.20 takes the spec's word for query/key norms, whatever the config says."""

    def __init__(
        self, config: TransformerConfig, submodules: SelfAttentionSubmodules, *args: Any, **kwargs: Any
    ) -> None:
        if config.qk_layernorm != (submodules.q_layernorm is not IdentityOp):
            raise ConfigError(
                f"qk_layernorm = {config.qk_layernorm}: use"
                f" --spec fp4dist.megatron.specs {'gpt_layer_qk_norm' if config.qk_layernorm else 'gpt_layer'}"
            )
        super().__init__(config, submodules, *args, **kwargs)


def _layer(qk_norm: bool) -> ModuleSpec:
    """A dense layer, its kind of norm and activation read from the config; checkpoint keys are stock GPT layers'."""
    provider = StockSpecProvider()
    mlp = get_mlp_module_spec_for_backend(backend=provider)
    return transformer_layer(provider, mlp, qk_norm=qk_norm, attention=CheckedSelfAttention)


gpt_layer: ModuleSpec = _layer(qk_norm=False)  # dense, whatever --num-experts says
gpt_layer_qk_norm: ModuleSpec = _layer(qk_norm=True)  # for --qk-layernorm
