"""Layer specs for Megatron-LM's `--spec fp4dist.megatron.specs gpt_layer` (objects: Megatron does not call them).

The layers hold our linears, norm and attention, in bf16 until a recipe is applied: by fp4dist.megatron.install, or by
fp4dist.megatron.apply in one's own script. With a layer spec Megatron chooses the final norm itself, and without
Transformer Engine or apex that one refuses sequence parallelism: there use install, which needs no `--spec`.
"""

from __future__ import annotations

from typing import Any, cast

from fp4dist.errors import ConfigError
from fp4dist.megatron.stock import StockSpecProvider
from fp4dist.megatron.upstream import (
    AttnMaskType,
    IdentityOp,
    ModuleSpec,
    SelfAttention,
    SelfAttentionSubmodules,
    TransformerConfig,
    TransformerLayer,
    TransformerLayerSubmodules,
    get_bias_dropout_add,
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
    norm_or_none = provider.layer_norm(for_qk=True) if qk_norm else IdentityOp
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=provider.layer_norm(),
            self_attention=ModuleSpec(
                module=CheckedSelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=provider.column_parallel_linear(),
                    core_attention=provider.core_attention(),
                    linear_proj=provider.row_parallel_linear(),
                    q_layernorm=norm_or_none,
                    k_layernorm=norm_or_none,
                ),
            ),
            self_attn_bda=cast(type, get_bias_dropout_add),  # a function here, as in Megatron's own specs
            pre_mlp_layernorm=provider.layer_norm(),
            mlp=get_mlp_module_spec_for_backend(backend=provider),
            mlp_bda=cast(type, get_bias_dropout_add),
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


gpt_layer: ModuleSpec = _layer(qk_norm=False)  # dense, whatever --num-experts says
gpt_layer_qk_norm: ModuleSpec = _layer(qk_norm=True)  # for --qk-layernorm
